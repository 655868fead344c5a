//! Timing: the first call apart, warm-up apart, median and range of the rest.

use std::{
    fs,
    time::{Duration, Instant},
};

use super::count::Work;

/// One timed call.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lap {
    /// What is measured, in seconds.
    pub seconds: f64,
    /// Longest wait without an answer in it, in seconds.
    pub stall_seconds: f64,
    /// Requests or training samples.
    pub samples: f64,
    /// Tokens that count for the speed.
    pub tokens: f64,
    /// The model's work in it.
    pub work: Work,
}

/// All calls of one measurement.
#[derive(Debug, Clone)]
pub struct Laps {
    /// Wall time of the first call, compilation and tuning included.
    pub first_call_seconds: f64,
    /// Calls between the first and the measured ones.
    pub warm_up_calls: usize,
    /// The measured calls, in order.
    pub measured: Vec<Lap>,
}

/// Calls `work` once, `warm_up_calls` times unmeasured, then `samples` times (at least once).
///
/// `work` gets the number of the call. It ends when the device has done its part.
///
/// # Errors
/// The first error of a call.
pub fn measure<E>(
    warm_up_calls: usize,
    samples: usize,
    mut work: impl FnMut(usize) -> Result<Lap, E>,
) -> Result<Laps, E> {
    let start = Instant::now();
    work(0)?;
    let first_call_seconds = start.elapsed().as_secs_f64();
    for call in 1..=warm_up_calls {
        work(call)?;
    }
    let measured = (0..samples.max(1))
        .map(|sample| work(1 + warm_up_calls + sample))
        .collect::<Result<_, _>>()?;
    Ok(Laps {
        first_call_seconds,
        warm_up_calls,
        measured,
    })
}

impl Laps {
    fn sorted(&self) -> Vec<f64> {
        let mut seconds: Vec<f64> = self.measured.iter().map(|lap| lap.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds
    }

    /// Median; of an even number of calls the mean of the middle two.
    pub fn median_seconds(&self) -> f64 {
        let sorted = self.sorted();
        let half = sorted.len() / 2;
        if sorted.len() % 2 == 1 {
            sorted[half]
        } else {
            (sorted[half - 1] + sorted[half]) / 2.0
        }
    }

    /// Fastest and slowest call.
    pub fn range_seconds(&self) -> (f64, f64) {
        let sorted = self.sorted();
        (sorted[0], sorted[sorted.len() - 1])
    }

    /// Longest wait after warm-up.
    pub fn longest_stall_seconds(&self) -> f64 {
        self.measured
            .iter()
            .map(|lap| lap.stall_seconds)
            .fold(0.0, f64::max)
    }

    /// Mean of a quantity over the measured calls.
    pub fn mean(&self, quantity: impl Fn(&Lap) -> f64) -> f64 {
        self.measured.iter().map(quantity).sum::<f64>() / self.measured.len() as f64
    }

    /// What one call takes for the speeds: the median where all calls do the same work, the mean
    /// where they do not, so that long and short ones count as they come.
    pub fn seconds_per_call(&self) -> f64 {
        let first = self.measured[0].work;
        if self.measured.iter().all(|lap| lap.work == first) {
            self.median_seconds()
        } else {
            self.mean(|lap| lap.seconds)
        }
    }
}

/// Time since the process was started, where the system reports it; in steps of 10 ms.
pub fn since_process_start() -> Option<Duration> {
    /// `USER_HZ`, the unit of `/proc/PID/stat`: 100 on every Linux architecture Rust builds for here.
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold spaces; the start time is field 22 of the line.
    let (_, fields) = stat.rsplit_once(')')?;
    let started: f64 = fields.split_whitespace().nth(19)?.parse().ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let now: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    Duration::try_from_secs_f64(now - started / TICKS_PER_SECOND).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_call_and_warm_up_are_not_measured() {
        let mut calls = Vec::new();
        let laps = measure(2, 4, |call| {
            calls.push(call);
            Ok::<_, ()>(Lap {
                seconds: call as f64,
                stall_seconds: call as f64,
                ..Lap::default()
            })
        })
        .unwrap();
        assert_eq!(calls, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(laps.median_seconds(), 4.5);
        assert_eq!(laps.range_seconds(), (3.0, 6.0));
        assert_eq!(laps.longest_stall_seconds(), 6.0);
        assert_eq!(laps.seconds_per_call(), 4.5);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_process_is_older_than_its_clock() {
        let before = since_process_start().unwrap();
        std::thread::sleep(Duration::from_millis(30));
        let after = since_process_start().unwrap();
        assert!(after > before && after < Duration::from_secs(3600));
    }
}
