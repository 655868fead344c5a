//! Drafts in the worker: the same answers in fewer steps, whatever is drafted.

use super::*;
use crate::runtime::generate::drafts::{DRAFTS_FILE, DraftStore};

fn prompts() -> Vec<Vec<u32>> {
    (0..12u32)
        .map(|job| (0..3 + job % 23).map(|at| 1 + job * 7 + at).collect())
        .collect()
}

/// A store of the right answers, of which every other one has a wrong token in its middle.
fn drafts(new: usize) -> Drafts {
    let answers: Vec<Vec<u32>> = prompts()
        .iter()
        .enumerate()
        .map(|(job, ids)| {
            let mut answer = expected(ids, new);
            if job % 2 == 1 {
                answer[new / 2] += 1;
            }
            answer
        })
        .collect();
    Drafts::from_store(DraftStore::new(&answers))
}

fn with_base(base: Drafts) -> EngineLimits {
    EngineLimits {
        drafts: EngineDrafts {
            base: Some(base),
            ..EngineDrafts::default()
        },
        ..limits()
    }
}

/// Without log probabilities, so that tokens are chosen on the device.
fn plain(ids: &[u32], new: usize) -> Submission {
    Submission {
        logprobs: None,
        ..submission(ids, new)
    }
}

/// The end of an answer.
fn done(events: UnboundedReceiver<Event>) -> Done {
    wait(events).1.unwrap()
}

#[test]
fn answers_are_the_same_in_fewer_steps() {
    let new = 60;
    let bench = bench(with_base(drafts(new)), Duration::ZERO);
    for (job, ids) in prompts().iter().enumerate() {
        // Log probabilities name the tokens.
        let (tokens, end) = wait(submit(&bench, submission(ids, new)));
        assert_eq!(tokens, expected(ids, new), "job {job}");
        let counts = end.unwrap().drafts;
        assert_eq!(counts.tokens, new, "job {job}");
        assert!(counts.steps < new / 2, "job {job}: {counts:?}");
        assert!(counts.accepted > new / 2 && counts.accepted <= counts.drafted);
    }
    // Tokens that the device chooses: seven drafted in place of three.
    for ids in prompts().iter().step_by(2) {
        let counts = done(submit(&bench, plain(ids, new))).drafts;
        assert_eq!(counts.tokens, new);
        assert!(counts.steps <= new.div_ceil(8) + 2, "{counts:?}");
    }
    let metrics = &bench.metrics;
    assert!(metrics.accepted_tokens.get() > 0);
    assert!(metrics.accepted_tokens.get() <= metrics.drafted_tokens.get());
    let generated = (prompts().len() + prompts().len() / 2) * new;
    assert_eq!(metrics.generated_tokens.get(), generated as u64);
}

#[test]
fn an_answer_ends_inside_of_a_draft_as_it_would_without() {
    let bench = bench(with_base(drafts(60)), Duration::ZERO);
    let ids = &prompts()[4];
    for new in 1..20 {
        let (tokens, end) = wait(submit(&bench, submission(ids, new)));
        assert_eq!(tokens, expected(ids, new));
        assert_eq!(end.unwrap().reason, FinishReason::Length);
    }
    for at in 0..20 {
        let answer = expected(ids, 40);
        let stop = answer[at];
        let first = answer.iter().position(|token| *token == stop).unwrap();
        let mut ends = submission(ids, 40);
        ends.eos_token_ids = vec![stop];
        let (tokens, end) = wait(submit(&bench, ends));
        let end = end.unwrap();
        assert_eq!(tokens, answer[..first]);
        assert_eq!(
            (end.reason, end.completion_tokens),
            (FinishReason::Stop, first + 1)
        );
    }
    // What was kept of these answers is right: a conversation goes on from it.
    let next = [ids.clone(), expected(ids, 19), vec![400]].concat();
    let (tokens, end) = wait(submit(&bench, submission(&next, 8)));
    assert_eq!(tokens, expected(&next, 8));
    assert!(end.unwrap().cached_tokens >= ids.len() + 18);
}

#[test]
fn samples_with_penalties_rules_and_a_seed_are_the_same() {
    let ids = &prompts()[3];
    let sampled = |drafts: EngineDrafts, change: &dyn Fn(&mut Submission)| {
        let bench = bench(EngineLimits { drafts, ..limits() }, Duration::ZERO);
        let mut one = submission(ids, 50);
        one.sampling = SamplingConfig {
            // The largest logit is 1, all others 0.
            temperature: 0.2,
            top_k: 40,
            seed: 11,
            ..SamplingConfig::default()
        };
        change(&mut one);
        let (tokens, end) = wait(submit(&bench, one));
        (tokens, end.unwrap().drafts)
    };
    let changes: [&dyn Fn(&mut Submission); 4] = [
        &|_| {},
        &|one| one.sampling.repetition_penalty = 1.3,
        &|one| {
            one.penalties.frequency = 0.5;
            one.penalties.bias = vec![(17, 0.9)];
        },
        &|one| one.sampling.temperature = 0.0,
    ];
    for (at, change) in changes.into_iter().enumerate() {
        let (want, none) = sampled(EngineDrafts::default(), change);
        assert_eq!(none, Default::default());
        let drafts = EngineDrafts {
            base: Some(Drafts::from_store(DraftStore::new(std::slice::from_ref(
                &want,
            )))),
            ..EngineDrafts::default()
        };
        let (got, counts) = sampled(drafts, change);
        assert_eq!(got, want, "{at}");
        assert!(counts.accepted > 10, "{at}: {counts:?}");
    }
}

#[test]
fn rows_are_drafted_as_far_as_a_step_has_room() {
    let limits = EngineLimits {
        max_running: 32,
        ..with_base(drafts(60))
    };
    let bench = bench(limits, Duration::from_micros(300));
    let receivers: Vec<_> = (0..24u32)
        .map(|job| submit(&bench, submission(&prompts()[job as usize % 12], 60)))
        .collect();
    for (job, receiver) in receivers.into_iter().enumerate() {
        assert_eq!(
            wait(receiver).0,
            expected(&prompts()[job % 12], 60),
            "{job}"
        );
    }
    // Sixteen rows are cheap on this device; with more sequences than that nothing is drafted.
    assert!(bench.seen.lock().unwrap().largest_step <= 24);
}

#[test]
fn a_full_block_and_a_failed_draft_cost_nothing_but_speed() {
    let new = 300;
    let ids: Vec<u32> = (1..=250).collect();
    let mut right = expected(&ids, new);
    let limits = EngineLimits {
        // Room for these tokens and no more.
        cache_tokens: 768,
        ..with_base(Drafts::from_store(DraftStore::new(&[right.clone()])))
    };
    let one = bench(limits, Duration::ZERO);
    let (tokens, end) = wait(submit(&one, submission(&ids, new)));
    assert_eq!(tokens, right);
    assert!(end.unwrap().drafts.steps < new / 2);
    // A drafted token at which the device fails ends no answer.
    right[20] = POISON;
    let limits = with_base(Drafts::from_store(DraftStore::new(&[right])));
    let other = bench(limits, Duration::ZERO);
    let (tokens, end) = wait(submit(&other, submission(&ids, 60)));
    assert_eq!(tokens, expected(&ids, 60));
    assert!(end.is_ok());
}

#[test]
fn a_cancelled_answer_gives_its_drafts_back() {
    let bench = bench(with_base(drafts(400)), Duration::from_millis(1));
    let mut cancelled = submit(&bench, submission(&prompts()[0], 400));
    let other = submit(&bench, submission(&prompts()[2], 60));
    assert!(matches!(
        cancelled.blocking_recv(),
        Some(Event::Token { .. })
    ));
    drop(cancelled);
    assert_eq!(wait(other).0, expected(&prompts()[2], 60));
    wait_idle(&bench);
    assert_eq!(bench.seen.lock().unwrap().slots.len(), 1);
    assert_eq!(bench.metrics.cache_running_tokens.get(), 0);
}

#[test]
fn a_prediction_is_drafted_without_any_store() {
    let bench = bench(limits(), Duration::ZERO);
    let ids = &prompts()[5];
    let mut predicted = submission(ids, 40);
    let mut answer = expected(ids, 40);
    answer[13] = 3;
    predicted.prediction = answer;
    let (tokens, end) = wait(submit(&bench, predicted));
    assert_eq!(tokens, expected(ids, 40));
    let counts = end.unwrap().drafts;
    assert!(counts.steps < 20 && counts.accepted > 20, "{counts:?}");
    let (_, end) = wait(submit(&bench, submission(ids, 40)));
    assert_eq!(end.unwrap().drafts, Default::default());
}

#[test]
fn what_was_written_is_drafted_where_that_is_allowed() {
    let new = 60;
    let ids = &prompts()[6];
    let drafts = EngineDrafts {
        grow: true,
        most: 7,
        ..EngineDrafts::default()
    };
    let bench = bench(EngineLimits { drafts, ..limits() }, Duration::ZERO);
    assert_eq!(
        wait(submit(&bench, submission(ids, new))).0,
        expected(ids, new)
    );
    // The index is made on another thread.
    let started = Instant::now();
    loop {
        let (tokens, end) = wait(submit(&bench, submission(ids, new)));
        assert_eq!(tokens, expected(ids, new));
        if end.unwrap().drafts.accepted > 0 {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "never drafted");
    }
}

#[test]
fn each_adapter_has_the_store_of_its_folder() {
    let new = 60;
    let folder = tempfile::tempdir().unwrap();
    let answers: Vec<_> = prompts().iter().map(|ids| expected(ids, new)).collect();
    let store = DraftStore::new(&answers);
    store
        .save(&folder.path().join(DRAFTS_FILE), &tokenizer())
        .unwrap();
    let drafts = EngineDrafts {
        beside_adapters: true,
        most: 7,
        ..EngineDrafts::default()
    };
    let bench = bench(EngineLimits { drafts, ..limits() }, Duration::ZERO);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let load = |dir: &Path| {
        let loaded = runtime.block_on(bench.engine.load_adapter(dir.to_path_buf()));
        loaded.unwrap().id
    };
    let empty = tempfile::tempdir().unwrap();
    let damaged = tempfile::tempdir().unwrap();
    std::fs::write(damaged.path().join(DRAFTS_FILE), b"XRAYDRFT").unwrap();
    let adapters = [
        (AdapterId::BASE, false),
        (load(folder.path()), true),
        (load(empty.path()), false),
        (load(damaged.path()), false),
    ];
    for (adapter, drafted) in adapters {
        let mut one = submission(&prompts()[1], new);
        one.adapter = adapter;
        let (tokens, end) = wait(submit(&bench, one));
        assert_eq!(tokens, expected(&prompts()[1], new));
        assert_eq!(end.unwrap().drafts.accepted > 0, drafted, "{adapter:?}");
    }
}
