//! A thread for each device: jobs are sent to all and waited for together, with a timeout.
//!
//! Knows nothing of training. A rank that fails, panics or is silent too long becomes an error that
//! names it; the others are never left waiting for it, because none gets the next job before
//! all have answered the last.

use std::{
    cell::RefCell,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    time::{Duration, Instant},
};

use crate::{
    base::panics::{device_reason, panic_text},
    cluster::ClusterError,
};

/// How long threads that are still running are waited for once nobody wants their answers.
const GRACE: Duration = Duration::from_secs(5);

/// Why the devices of a run cannot continue together.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    /// One of them failed or panicked.
    #[error("device {rank} failed while {what}: {reason}{}", hint(.reason))]
    Failed {
        /// Name and number of the device.
        rank: String,
        /// The job it was running.
        what: &'static str,
        /// Its error message.
        reason: String,
    },
    /// Some have not answered in time.
    #[error(
        "device {} did not end {what} within {seconds} s while the others wait; \
         raise ddp_timeout if it is only slow", .ranks.join(", ")
    )]
    Late {
        /// Names and numbers of the devices.
        ranks: Vec<String>,
        /// The job they were running.
        what: &'static str,
        /// How long they were waited for.
        seconds: f64,
    },
    /// Another process of the run.
    #[error(transparent)]
    Process(#[from] ClusterError),
    /// The copies of the model are no longer the same.
    #[error(
        "after step {step} the weights of {rank} are not those of {first}: {count} \
         tensors differ, first number {place} of {all}; one of the devices calculates or adds up \
         wrongly. Go on from the checkpoint before; if it comes again, leave the device out"
    )]
    Apart {
        /// Name and number of the device that differs.
        rank: String,
        /// Name and number of the device it is compared with.
        first: String,
        /// Steps taken.
        step: usize,
        /// Tensors that differ.
        count: usize,
        /// The first of them in the order of the model, from 1.
        place: usize,
        /// Trained tensors.
        all: usize,
    },
}

/// A hint on what to change, from the driver's error message.
fn hint(reason: &str) -> &'static str {
    let reason = reason.to_lowercase();
    if ["out of memory", "outofmemory", "alloc"]
        .iter()
        .any(|word| reason.contains(word))
    {
        "; lower per_device_train_batch_size, packing_tokens or max_pixels, or set gradient_checkpointing = true"
    } else {
        ""
    }
}

/// Threads that take jobs `J` and answer with `R`.
///
/// After an error no more jobs must be sent: late answers would be taken for new ones.
pub struct Ranks<J, R> {
    names: Vec<String>,
    jobs: Vec<Sender<J>>,
    answers: Receiver<(usize, Result<R, String>)>,
    /// Answers of each rank that arrived before they were collected.
    early: RefCell<Vec<VecDeque<R>>>,
    patience: Duration,
}

impl<J: Send + 'static, R: Send + 'static> Ranks<J, R> {
    /// Starts a thread for each name and worker; `patience` bounds every wait.
    pub fn start<W>(workers: Vec<(String, W)>, patience: Duration) -> Self
    where
        W: FnMut(J) -> Result<R, String> + Send + 'static,
    {
        let (answer, answers) = channel();
        let early = workers.iter().map(|_| VecDeque::new()).collect();
        let (names, jobs) = workers
            .into_iter()
            .enumerate()
            .map(|(rank, (name, mut work))| {
                let (job, jobs) = channel::<J>();
                let answer = answer.clone();
                std::thread::spawn(move || {
                    for job in jobs {
                        let result = catch_unwind(AssertUnwindSafe(|| work(job)))
                            .unwrap_or_else(|payload| Err(panic_text(payload.as_ref())));
                        if answer.send((rank, result)).is_err() {
                            return;
                        }
                    }
                });
                (name, job)
            })
            .unzip();
        Self {
            names,
            jobs,
            answers,
            early: RefCell::new(early),
            patience,
        }
    }

    /// Name and number of a rank.
    pub fn name(&self, rank: usize) -> &str {
        &self.names[rank]
    }

    /// Number of ranks.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Sends jobs to ranks and waits for all answers, which come in the order of the jobs.
    ///
    /// # Errors
    /// [`RankError`]: the first failure met, or all that are late.
    pub fn ask(&self, what: &'static str, jobs: Vec<(usize, J)>) -> Result<Vec<R>, RankError> {
        let ranks: Vec<usize> = jobs.iter().map(|(rank, _)| *rank).collect();
        for (rank, job) in jobs {
            self.send(rank, job);
        }
        self.collect(what, &ranks)
    }

    /// Queues a job for a rank after those it has; its answer is to be collected in its turn.
    pub fn send(&self, rank: usize, job: J) {
        // A thread ends only when its channel is closed, which is not before we are dropped.
        let _ = self.jobs[rank].send(job);
    }

    /// Waits for one answer of each of some ranks, in their order.
    ///
    /// # Errors
    /// [`RankError`]: the first failure met, or all that are late.
    pub fn collect(&self, what: &'static str, ranks: &[usize]) -> Result<Vec<R>, RankError> {
        let mut early = self.early.borrow_mut();
        let end = Instant::now() + self.patience;
        while ranks.iter().any(|rank| early[*rank].is_empty()) {
            let left = end.saturating_duration_since(Instant::now());
            match self.answers.recv_timeout(left) {
                Ok((rank, Ok(answer))) => early[rank].push_back(answer),
                Ok((rank, Err(reason))) => {
                    return Err(RankError::Failed {
                        rank: self.names[rank].clone(),
                        what,
                        reason: device_reason(&reason),
                    });
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let missing = ranks.iter().filter(|rank| early[**rank].is_empty());
                    return Err(RankError::Late {
                        ranks: missing.map(|rank| self.names[*rank].clone()).collect(),
                        what,
                        seconds: self.patience.as_secs_f64(),
                    });
                }
            }
        }
        let answers = ranks.iter().filter_map(|rank| early[*rank].pop_front());
        Ok(answers.collect())
    }
}

impl<J, R> Drop for Ranks<J, R> {
    /// Lets the threads end. A driver may not be torn down under a thread that still uses it, so one
    /// at work is waited for, but not for ever.
    fn drop(&mut self) {
        self.jobs.clear();
        let end = Instant::now() + GRACE;
        while let Ok(_late) = self
            .answers
            .recv_timeout(end.saturating_duration_since(Instant::now()))
        {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Work = Box<dyn FnMut(u64) -> Result<u64, String> + Send>;

    fn ranks(patience: Duration, works: Vec<Work>) -> Ranks<u64, u64> {
        let workers = works
            .into_iter()
            .enumerate()
            .map(|(rank, work)| (format!("`cpu` (rank {rank})"), work))
            .collect();
        Ranks::start(workers, patience)
    }

    fn double() -> Work {
        Box::new(|x| Ok(2 * x))
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn answers_come_in_the_order_of_the_jobs() {
        let slow: Work = Box::new(|x| {
            std::thread::sleep(Duration::from_millis(30));
            Ok(3 * x)
        });
        let ranks = ranks(LONG, vec![slow, double()]);
        assert_eq!(
            ranks.ask("counting", vec![(0, 5), (1, 7)]).unwrap(),
            [15, 14]
        );
        assert_eq!(ranks.ask("counting", vec![(1, 1)]).unwrap(), [2]);
        // The second has done both before the first has done its one.
        ranks.send(0, 1);
        ranks.send(1, 2);
        ranks.send(1, 3);
        assert_eq!(ranks.collect("counting", &[0, 1]).unwrap(), [3, 4]);
        assert_eq!(ranks.collect("counting", &[1]).unwrap(), [6]);
    }

    #[test]
    fn a_rank_that_fails_or_panics_ends_the_wait_at_once_and_is_named() {
        let failing: [(Work, &str); 4] = [
            (Box::new(|_| Err("no such image".into())), "no such image"),
            (
                Box::new(|x| panic!("device lost at {x}")),
                "device lost at 2",
            ),
            (
                Box::new(|_| panic!("CUDA_ERROR_OUT_OF_MEMORY: out of memory")),
                "lower per_device_train_batch_size",
            ),
            (
                Box::new(|_| panic!("called `Result::unwrap()` on an `Err` value: CallError")),
                "most likely because it is out of memory",
            ),
        ];
        for (bad, says) in failing {
            let started = Instant::now();
            let ranks = ranks(LONG, vec![double(), bad]);
            let error = ranks
                .ask("working out gradients", vec![(0, 1), (1, 2)])
                .unwrap_err()
                .to_string();
            for piece in ["`cpu` (rank 1) failed while working out gradients", says] {
                assert!(error.contains(piece), "{error}");
            }
            assert!(started.elapsed() < LONG / 2);
        }
    }

    #[test]
    fn a_rank_that_is_slow_beyond_the_time_out_is_named() {
        let (release, stuck) = channel::<()>();
        let slow: Work = Box::new(move |x| {
            // Until the test releases it, as a device that waits for a peer would.
            let _ = stuck.recv();
            Ok(x)
        });
        let ranks = ranks(Duration::from_millis(50), vec![slow, double()]);
        let error = ranks
            .ask("adding up gradients", vec![(0, 1), (1, 2)])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("`cpu` (rank 0) did not end adding up gradients within 0.05 s"),
            "{error}"
        );
        assert!(
            error.contains("ddp_timeout") && !error.contains("rank 1"),
            "{error}"
        );
        drop(release);
        // The thread has ended once this returns.
        let started = Instant::now();
        drop(ranks);
        assert!(started.elapsed() < GRACE);
    }
}
