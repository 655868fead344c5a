//! Messages of a run: who takes them; counts and times in them.

use std::{path::Path, sync::Arc};

pub use crate::study::counted;

/// Prints one line about the progress of the run.
pub type Tell = Arc<dyn Fn(&str) + Send + Sync>;

/// A time as a clock shows it: `0:07`, `12:30`, `1:02:03`.
pub fn clock(seconds: f64) -> String {
    let all = if seconds.is_finite() {
        seconds.max(0.0).round() as u64
    } else {
        return "unknown".to_string();
    };
    let (hours, minutes, seconds) = (all / 3600, all / 60 % 60, all % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        _ => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

/// A time in its largest fitting unit: `0.5 s`, `7.5 s`, `12.5 min`, `1.25 h`.
pub fn duration(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 60.0 => format!("{seconds:.1} s"),
        seconds if seconds < 3600.0 => format!("{:.1} min", seconds / 60.0),
        seconds => format!("{:.2} h", seconds / 3600.0),
    }
}

/// What is said with the end of a run in several processes.
pub(super) fn last_checkpoint(path: &Path) -> String {
    format!("the last checkpoint is `{}`", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_no_plural_and_times_have_their_unit() {
        assert_eq!(counted(1, "step", "steps"), "1 step");
        assert_eq!(counted(0, "step", "steps"), "0 steps");
        assert_eq!(
            [6.6, 750.0, 3723.0].map(clock),
            ["0:07", "12:30", "1:02:03"]
        );
        assert_eq!(clock(f64::INFINITY), "unknown");
        assert_eq!(
            [7.5, 750.0, 4500.0].map(duration),
            ["7.5 s", "12.5 min", "1.25 h"]
        );
    }
}
