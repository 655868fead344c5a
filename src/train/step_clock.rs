//! How long steps take where a step's numbers are read after the next step has been launched.

use std::time::{Duration, Instant};

/// A wait no longer than this, or than [`SHARE`] of the launch, found the numbers there already.
const AT_ONCE: Duration = Duration::from_millis(1);
const SHARE: f64 = 0.02;

/// When the host launched a step on the device.
#[derive(Debug, Clone, Copy)]
pub struct LaunchTimes {
    /// The host began with it.
    pub begun: Instant,
    /// The host was done with it.
    pub ended: Instant,
}

impl LaunchTimes {
    /// Times `work`.
    pub fn of<T>(work: impl FnOnce() -> T) -> (T, Self) {
        let begun = Instant::now();
        let result = work();
        let ended = Instant::now();
        (result, Self { begun, ended })
    }
}

/// Gives each step the time from the end of the step before it to its own.
///
/// Where the device is what takes time, a step ends when its numbers arrive. Where the host is, the
/// numbers of a step arrive long before the host reads them, after its next launch; the step has
/// then ended with its own launch. Times of all steps add up to the time they took together.
#[derive(Debug)]
pub struct StepClock {
    free: Instant,
}

impl StepClock {
    /// Starts; no step is running.
    pub fn start() -> Self {
        Self {
            free: Instant::now(),
        }
    }

    /// Leaves out what has happened since the last step ended.
    pub fn skip(&mut self) {
        self.free = Instant::now();
    }

    /// How long the step launched at `launch` took, whose numbers were waited for from `wait_start` on
    /// and have arrived now.
    pub fn complete(&mut self, launch: LaunchTimes, wait_start: Instant) -> Duration {
        self.complete_at(launch, wait_start, Instant::now())
    }

    fn complete_at(&mut self, launch: LaunchTimes, wait_start: Instant, now: Instant) -> Duration {
        let host = launch.ended.saturating_duration_since(launch.begun);
        let waited = now.saturating_duration_since(wait_start);
        let ended = match waited <= AT_ONCE.max(host.mul_f64(SHARE)) {
            true => launch.ended,
            false => now,
        };
        let seconds = ended.saturating_duration_since(self.free);
        self.free = self.free.max(ended);
        seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times of steps in ms on a device whose steps take `device` ms, launched in `host` ms each, with the
    /// numbers of a step read after the launch of the next.
    fn times(host: u64, device: u64, steps: usize) -> Vec<u64> {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut clock = StepClock { free: start };
        let (mut now, mut device_free) = (0, 0);
        let mut pending: Option<(LaunchTimes, u64)> = None;
        let mut found = Vec::new();
        let mut complete = |launch, done: u64, now: &mut u64| {
            let wait_start = *now;
            *now = done.max(*now);
            let time = clock.complete_at(launch, at(wait_start), at(*now));
            found.push(time.as_millis() as u64);
        };
        for _ in 0..steps {
            let launch = LaunchTimes {
                begun: at(now),
                ended: at(now + host),
            };
            device_free = (now + device).max(device_free + device).max(now + host);
            now += host;
            if let Some((launch, done)) = pending.replace((launch, device_free)) {
                complete(launch, done, &mut now);
            }
        }
        if let Some((launch, done)) = pending {
            complete(launch, done, &mut now);
        }
        found
    }

    #[test]
    fn no_step_holds_two_and_none_holds_nothing() {
        // The host takes the time: the last numbers are there at once.
        assert_eq!(times(40, 5, 4), [40, 40, 40, 40]);
        // The device takes the time: launches are short and run ahead.
        assert_eq!(times(5, 40, 4), [40, 40, 40, 40]);
        // A device that does nothing while the host works: one after another.
        assert_eq!(times(40, 40, 3), [40, 40, 40]);
        assert_eq!(times(5, 40, 1), [40]);
    }

    #[test]
    fn what_lies_between_steps_can_be_left_out() {
        let mut clock = StepClock::start();
        std::thread::sleep(Duration::from_millis(30));
        clock.skip();
        let ((), launch) = LaunchTimes::of(|| std::thread::sleep(Duration::from_millis(5)));
        let time = clock.complete(launch, Instant::now());
        assert!(time >= Duration::from_millis(5) && time < Duration::from_millis(25));
    }
}
