//! All pairs of a test set before a judge: several at a time, what is known already not asked again.

use std::{
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use super::{
    cache::Cache,
    client::{Endpoint, Failure},
    error::JudgeError,
    prompt::Judgement,
};

/// Pairs in a row that a server may fail before the run is ended.
const FAILURES_IN_A_ROW: usize = 3;

/// What came of one pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// An answer that can be read.
    Judged(Judgement),
    /// An answer that is not what was asked for, and why.
    Unreadable(String),
    /// No answer, and why.
    Failed(String),
}

/// All verdicts of a run.
#[derive(Debug, Clone, Default)]
pub struct Verdicts {
    /// One a pair, in their order.
    pub pairs: Vec<Verdict>,
    /// Answers that were known from an earlier run.
    pub known: usize,
}

/// Asks about each of `pairs` (reference, answer), at most `concurrency` at a time. Answers that can be read are kept in
/// `cache` and not asked for again; `tick` is called after each pair.
///
/// # Errors
/// [`JudgeError`]: what would fail for every pair. What was answered before is kept.
pub fn ask(
    endpoint: &Endpoint,
    pairs: &[(&str, &str)],
    concurrency: usize,
    cache: Option<&Path>,
    tick: &(dyn Fn() + Sync),
) -> Result<Verdicts, JudgeError> {
    let cache = Cache::open(cache)?;
    let verdicts: Vec<Mutex<Option<Verdict>>> = pairs.iter().map(|_| Mutex::new(None)).collect();
    let error: Mutex<Option<JudgeError>> = Mutex::new(None);
    let (next, known, failed) = (
        AtomicUsize::new(0),
        AtomicUsize::new(0),
        AtomicUsize::new(0),
    );
    let ended = AtomicBool::new(false);
    let end = |cause: JudgeError| {
        ended.store(true, Ordering::Relaxed);
        held(&error).get_or_insert(cause);
    };
    let work = || {
        while !ended.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(&(reference, answer)) = pairs.get(at) else {
                break;
            };
            let key = Cache::key(endpoint.model(), reference, answer);
            let earlier = cache.get(&key).and_then(|text| Judgement::read(text).ok());
            let verdict = match earlier {
                Some(judgement) => {
                    known.fetch_add(1, Ordering::Relaxed);
                    Verdict::Judged(judgement)
                }
                None => match endpoint.ask(reference, answer) {
                    Ok(text) => {
                        failed.store(0, Ordering::Relaxed);
                        match Judgement::read(&text) {
                            Ok(judgement) => {
                                if let Err(cause) = cache.add(&key, &text) {
                                    end(cause);
                                }
                                Verdict::Judged(judgement)
                            }
                            Err(reason) if text.trim().is_empty() => Verdict::Unreadable(reason),
                            Err(reason) => Verdict::Unreadable(format!(
                                "{reason}; the answer begins `{}`",
                                beginning(&text)
                            )),
                        }
                    }
                    Err(Failure::Exhausted(reason)) => {
                        if failed.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES_IN_A_ROW {
                            end(JudgeError::Answer {
                                url: endpoint.url().to_owned(),
                                reason: reason.clone(),
                            });
                        }
                        Verdict::Failed(reason)
                    }
                    Err(Failure::Final(cause)) => {
                        end(cause);
                        break;
                    }
                },
            };
            *held(&verdicts[at]) = Some(verdict);
            tick();
        }
    };
    thread::scope(|scope| {
        for _ in 0..concurrency.clamp(1, pairs.len().max(1)) {
            scope.spawn(work);
        }
    });
    if let Some(cause) = held(&error).take() {
        return Err(cause);
    }
    let pairs = verdicts.into_iter().map(|verdict| {
        let verdict = verdict
            .into_inner()
            .unwrap_or_else(|lock| lock.into_inner());
        verdict.unwrap_or_else(|| Verdict::Failed("it was not asked".to_owned()))
    });
    Ok(Verdicts {
        pairs: pairs.collect(),
        known: known.into_inner(),
    })
}

/// Enough of an answer to recognise a refusal by.
fn beginning(text: &str) -> String {
    text.trim().chars().take(60).collect()
}

fn held<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|lock| lock.into_inner())
}
