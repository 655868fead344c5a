//! What stops a run from outside.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result};

use super::say;

/// Turns the first SIGINT, SIGTERM or SIGHUP into a wish to stop; a second one ends the process at once.
pub(super) fn watch_signals() -> Result<Arc<AtomicBool>> {
    use signal_hook::{
        consts::{SIGINT, SIGTERM},
        iterator::Signals,
    };
    let flag = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    #[allow(unused_mut, reason = "some systems have no further signal")]
    let mut watched = vec![SIGINT, SIGTERM];
    #[cfg(unix)]
    if !ignores_hangup() {
        watched.push(signal_hook::consts::SIGHUP);
    }
    let mut signals = Signals::new(watched).context("cannot watch for signals")?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if seen.swap(true, Ordering::Relaxed) {
                std::process::exit(128 + signal);
            }
            say("stopping after this step and saving; once more to stop at once");
        }
    });
    Ok(flag)
}

/// Whether the process was started to outlive its terminal, as `nohup` does; also where that cannot be found out.
#[cfg(unix)]
fn ignores_hangup() -> bool {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else {
        return true;
    };
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // The first bit is that of signal 1.
    mask.is_none_or(|mask| mask & 1 == 1)
}
