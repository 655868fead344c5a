//! What was typed wrongly.

/// What was typed cannot be meant; ends with exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// The exit code of a command that ended with `error`.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<UsageError>() {
        2
    } else if error.is::<super::serve::DeviceLost>() {
        3
    } else {
        1
    }
}
