//! What keeps processes from working together.

use super::launch::LaunchError;

/// What keeps processes from working together.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClusterError {
    /// The launcher's variables or the flags.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The first process cannot listen.
    #[error(
        "cannot listen at {address} for the other processes: {reason}; name another free port or address of this machine with --master HOST:PORT (on all of them), or with --cluster-bind the address to listen at"
    )]
    Bind {
        /// Host and port.
        address: String,
        /// Of the system.
        reason: String,
    },
    /// The first process does not answer.
    #[error(
        "the first process does not answer at {address} within {seconds} s: {reason}; is it running, and may this machine connect to that port?"
    )]
    Unreachable {
        /// Host and port.
        address: String,
        /// How long it was tried.
        seconds: f64,
        /// Of the last attempt.
        reason: String,
    },
    /// The first process does not take this one.
    #[error("the first process at {address} refuses this one: {reason}")]
    Refused {
        /// Host and port.
        address: String,
        /// Its reason.
        reason: String,
    },
    /// The key cannot be used.
    #[error("{0}")]
    Key(String),
    /// Processes that do not do the same.
    #[error("{0}")]
    Apart(String),
    /// One of the processes ended the work of all.
    #[error("{0}")]
    Ended(String),
}
