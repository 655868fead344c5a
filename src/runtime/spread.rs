//! Jobs divided among workers, of one process or several, results in order: one model a device, one job at a
//! time each.
//!
//! Knows nothing of models. A worker that is done takes the next job, so that none waits for a slower
//! one; what is done early is kept until its turn, so that a file of results is always a beginning of
//! the whole.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::channel,
    },
    thread,
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    base::panics::{device_reason, panic_text},
    cluster::{Cluster, ClusterError},
    ops::queue::Queue,
};

/// A worker that failed.
#[derive(Debug, thiserror::Error)]
#[error("worker {worker} of {workers} failed: {reason}")]
pub struct SpreadError {
    /// Its number, from 1.
    pub worker: usize,
    /// How many there are.
    pub workers: usize,
    /// What its panic said.
    pub reason: String,
}

/// Runs all jobs and passes on each result in the order of the jobs; a single worker works on the
/// calling thread, others in its queue, so that one call after another finds the memory of the first.
///
/// # Errors
/// The first of `take`, or the first worker that panics; jobs that are being done are done to the end.
pub fn in_order<W: Send, J: Sync, R: Send, E: From<SpreadError>>(
    workers: &mut [W],
    jobs: &[J],
    work: impl Fn(&mut W, &J) -> R + Sync,
    mut take: impl FnMut(usize, R) -> Result<(), E>,
) -> Result<(), E> {
    if let [worker] = workers {
        for (number, job) in jobs.iter().enumerate() {
            take(number, work(worker, job))?;
        }
        return Ok(());
    }
    let count = workers.len();
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (done, results) = channel();
    let queue = Queue::current();
    thread::scope(|scope| {
        for (number, worker) in workers.iter_mut().enumerate() {
            let (done, next, stop, work) = (done.clone(), &next, &stop, &work);
            let work_on = move || {
                while !stop.load(Ordering::Relaxed) {
                    let place = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(place) else { return };
                    let result = catch_unwind(AssertUnwindSafe(|| work(worker, job)));
                    let failed = result.is_err();
                    if done.send((number, place, result)).is_err() || failed {
                        return;
                    }
                }
            };
            scope.spawn(move || queue.run(work_on));
        }
        drop(done);
        let mut early = BTreeMap::new();
        let mut turn = 0;
        for (number, place, result) in results {
            let handed = match result {
                Ok(result) => {
                    early.insert(place, result);
                    let mut handed = Ok(());
                    while let (Ok(()), Some(result)) = (&handed, early.remove(&turn)) {
                        handed = take(turn, result);
                        turn += 1;
                    }
                    handed
                }
                Err(payload) => Err(SpreadError {
                    worker: number + 1,
                    workers: count,
                    reason: device_reason(&panic_text(payload.as_ref())),
                }
                .into()),
            };
            if handed.is_err() {
                stop.store(true, Ordering::Relaxed);
                return handed;
            }
        }
        Ok(())
    })
}

/// How long the first process waits for results before it looks for workers that failed.
const LOOK: Duration = Duration::from_millis(500);

/// [`in_order`] over the workers of several processes, all of which call it with the same jobs: each worker takes
/// the next job that nobody has, and the first process alone passes on the results.
///
/// # Errors
/// As there; or that another process ended before its time.
pub fn in_order_across<W, J, R, E>(
    cluster: &Cluster,
    workers: &mut [W],
    jobs: &[J],
    work: impl Fn(&mut W, &J) -> R + Sync,
    mut take: impl FnMut(usize, R) -> Result<(), E>,
) -> Result<(), E>
where
    W: Send,
    J: Sync,
    R: Serialize + DeserializeOwned,
    E: From<SpreadError> + From<ClusterError>,
{
    let count = workers.len();
    let stop = AtomicBool::new(false);
    let (failed, failures) = channel::<Result<(), SpreadError>>();
    let queue = Queue::current();
    thread::scope(|scope| {
        for (number, worker) in workers.iter_mut().enumerate() {
            let (failed, stop, work) = (failed.clone(), &stop, &work);
            let work_on = move || {
                while !stop.load(Ordering::Relaxed) {
                    // The end of the others is seen by whoever waits for this worker.
                    let Ok(place) = cluster.take() else { return };
                    let Some(job) = jobs.get(place as usize) else {
                        return;
                    };
                    match catch_unwind(AssertUnwindSafe(|| work(worker, job))) {
                        Ok(result) => match serde_json::to_vec(&(place, result)) {
                            Ok(body) => cluster.post(body),
                            Err(error) => {
                                let reason = error.to_string();
                                let _ = failed.send(Err(SpreadError {
                                    worker: number + 1,
                                    workers: count,
                                    reason,
                                }));
                                return;
                            }
                        },
                        Err(payload) => {
                            let _ = failed.send(Err(SpreadError {
                                worker: number + 1,
                                workers: count,
                                reason: device_reason(&panic_text(payload.as_ref())),
                            }));
                            return;
                        }
                    }
                }
            };
            scope.spawn(move || queue.run(work_on));
        }
        drop(failed);
        let ended = if cluster.is_first() {
            let looked = || failures.try_iter().find_map(Result::err);
            collect(cluster, jobs.len(), looked, &mut take)
        } else {
            failures
                .iter()
                .find_map(Result::err)
                .map_or(Ok(()), |error| Err(error.into()))
        };
        stop.store(true, Ordering::Relaxed);
        ended
    })
}

/// Passes on the results that processes send, in the order of the jobs.
fn collect<R: DeserializeOwned, E: From<SpreadError> + From<ClusterError>>(
    cluster: &Cluster,
    jobs: usize,
    failed: impl Fn() -> Option<SpreadError>,
    take: &mut impl FnMut(usize, R) -> Result<(), E>,
) -> Result<(), E> {
    let mut early: BTreeMap<u64, R> = BTreeMap::new();
    let mut turn = 0;
    while turn < jobs {
        if let Some(error) = failed() {
            return Err(error.into());
        }
        let Some((rank, body)) = cluster.next_post(LOOK)? else {
            continue;
        };
        let (place, result) = serde_json::from_slice(&body).map_err(|error| {
            ClusterError::Ended(format!(
                "{} sent a damaged result: {error}",
                cluster.name(rank)
            ))
        })?;
        early.insert(place, result);
        while let Some(result) = early.remove(&(turn as u64)) {
            take(turn, result)?;
            turn += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Failed {
        #[error(transparent)]
        Spread(#[from] SpreadError),
        #[error("full")]
        Full,
    }

    #[test]
    fn results_come_in_the_order_of_the_jobs_and_nobody_waits_for_a_slow_worker() {
        let jobs: Vec<u64> = (0..40).collect();
        let shares = [Mutex::new(0), Mutex::new(0)];
        let mut workers = [0usize, 1];
        let mut taken = Vec::new();
        in_order(
            &mut workers,
            &jobs,
            |worker, job| {
                // The first is ten times as slow.
                thread::sleep(Duration::from_millis(if *worker == 0 { 10 } else { 1 }));
                *shares[*worker].lock().unwrap() += 1;
                job * job
            },
            |place, result| {
                assert_eq!(place, taken.len());
                taken.push(result);
                Ok::<_, Failed>(())
            },
        )
        .unwrap();
        assert_eq!(taken, jobs.iter().map(|job| job * job).collect::<Vec<_>>());
        let [slow, fast] = shares.map(|share| share.into_inner().unwrap());
        assert!(slow + fast == 40 && fast > 2 * slow, "{slow} and {fast}");
    }

    #[test]
    fn a_worker_that_panics_is_named_and_what_came_before_is_kept() {
        let jobs: Vec<usize> = (0..20).collect();
        let mut taken = Vec::new();
        let error = in_order(
            &mut [(), (), ()],
            &jobs,
            |(), job| {
                assert!(*job != 7, "device lost");
                *job
            },
            |_, result| {
                taken.push(result);
                Ok::<_, Failed>(())
            },
        )
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("of 3 failed: device lost"),
            "{error}, {taken:?}"
        );
        assert_eq!(taken, (0..taken.len()).collect::<Vec<_>>());
        assert!(taken.len() <= 7);
    }

    #[test]
    fn an_error_of_the_taker_ends_the_work() {
        for workers in [1, 2] {
            let begun = AtomicUsize::new(0);
            let error = in_order(
                &mut vec![(); workers],
                &[(); 1000],
                |(), ()| begun.fetch_add(1, Ordering::Relaxed),
                |place, _| {
                    if place == 3 {
                        Err(Failed::Full)
                    } else {
                        Ok(())
                    }
                },
            )
            .unwrap_err();
            assert!(matches!(error, Failed::Full), "{error}");
            assert!(begun.into_inner() >= 4);
        }
    }
}
