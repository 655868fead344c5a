//! Progress lines of a run: one every `logging_steps`, with means over the steps since the previous line.

use std::time::Instant;

use super::{step_numbers::StepNumbers, words::clock};

/// Number of lines of a run if `logging_steps` is 0.
const LINES: usize = 50;

/// Sums over steps, and the line when one is due.
#[derive(Debug)]
pub(super) struct StepLines {
    every: usize,
    total: usize,
    /// Steps done before this process started.
    before: usize,
    started: Instant,
    sums: Sums,
}

#[derive(Debug, Default)]
struct Sums {
    steps: usize,
    seconds: f64,
    samples: f64,
    tokens: f64,
    loss: f64,
    token_acc: f64,
    grad_norm: f64,
}

/// Work of one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepWork {
    /// Its duration.
    pub(super) seconds: f64,
    /// Number of samples.
    pub(super) samples: usize,
    /// Number of their tokens.
    pub(super) tokens: usize,
}

impl StepLines {
    /// Lines of a run of `total` steps that starts after step `before`; `every` 0 gives about [`LINES`] of them.
    pub(super) fn new(every: usize, before: usize, total: usize) -> Self {
        Self {
            every: match every {
                0 => total.div_ceil(LINES).max(1),
                every => every,
            },
            total,
            before,
            started: Instant::now(),
            sums: Sums::default(),
        }
    }

    /// Adds step `step` (from 1) and returns the line if one is due: for the first step of the process, each
    /// `every`-th and the last.
    pub(super) fn add(
        &mut self,
        step: usize,
        epoch: f64,
        numbers: &StepNumbers,
        work: StepWork,
    ) -> Option<String> {
        let elapsed = self.started.elapsed().as_secs_f64();
        self.add_after(elapsed, step, epoch, numbers, work)
    }

    fn add_after(
        &mut self,
        elapsed: f64,
        step: usize,
        epoch: f64,
        numbers: &StepNumbers,
        work: StepWork,
    ) -> Option<String> {
        let sums = &mut self.sums;
        sums.steps += 1;
        sums.seconds += work.seconds;
        sums.samples += work.samples as f64;
        sums.tokens += work.tokens as f64;
        sums.loss += numbers.loss;
        sums.token_acc += numbers.token_acc;
        sums.grad_norm += numbers.grad_norm;
        let own = step.saturating_sub(self.before);
        if own > 1 && !step.is_multiple_of(self.every) && step != self.total {
            return None;
        }
        let Sums {
            steps,
            seconds,
            samples,
            tokens,
            loss,
            token_acc,
            grad_norm,
        } = std::mem::take(sums);
        let mean = |sum: f64| sum / steps as f64;
        let left = elapsed / own.max(1) as f64 * self.total.saturating_sub(step) as f64;
        let seconds = seconds.max(f64::MIN_POSITIVE);
        Some(format!(
            "step {step}/{}  epoch {epoch:.2}  loss {:.4}  token acc {:.1} %  lr {:.2e}  grad norm {:.2}  {:.1} samples/s  {:.0} tokens/s  {:.2} GiB  elapsed {}  left {}",
            self.total,
            mean(loss),
            mean(token_acc) * 100.0,
            numbers.learning_rate,
            mean(grad_norm),
            samples / seconds,
            tokens / seconds,
            numbers.memory_gib,
            clock(elapsed),
            clock(left),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: StepWork = StepWork {
        seconds: 0.5,
        samples: 8,
        tokens: 800,
    };

    fn lines(every: usize, before: usize, total: usize) -> Vec<String> {
        let mut lines = StepLines::new(every, before, total);
        (before + 1..=total)
            .filter_map(|step| {
                let numbers = StepNumbers {
                    loss: step as f64,
                    ..StepNumbers::default()
                };
                lines.add_after((step - before) as f64, step, 0.5, &numbers, WORK)
            })
            .collect()
    }

    #[test]
    fn a_run_gives_some_fifty_lines_and_each_says_what_is_left() {
        assert_eq!(lines(0, 0, 480).len(), 49);
        assert_eq!(lines(0, 0, 5).len(), 5);
        let all = lines(10, 0, 25);
        assert_eq!(all.len(), 4, "{all:?}");
        assert!(all[0].starts_with("step 1/25 "), "{}", all[0]);
        // The mean of the losses of steps 2 to 10; sixteen samples a second; fifteen steps of a second left.
        for piece in [
            "step 10/25",
            "loss 6.0000",
            "16.0 samples/s",
            "elapsed 0:10",
            "left 0:15",
        ] {
            assert!(all[1].contains(piece), "no `{piece}` in {}", all[1]);
        }
        assert!(all[3].contains("step 25/25") && all[3].ends_with("left 0:00"));
        // Gone on with after 20 of 25: the speed is that of this process.
        let resumed = lines(10, 20, 25);
        assert!(
            resumed[0].ends_with("elapsed 0:01  left 0:04"),
            "{}",
            resumed[0]
        );
    }
}
