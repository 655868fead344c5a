//! Arguments to library calls, one command a file. Only here and in `main` is anything printed.

pub mod bench;
pub mod bench_scale;
pub mod bench_serve;
pub mod calibrate;
pub mod check;
pub mod clean;
pub mod cluster_args;
pub mod completions;
pub mod config;
pub mod convert;
pub mod doctor;
pub mod drafts;
pub mod eval;
pub mod examples;
pub mod export;
mod finding_probabilities;
pub mod infer;
mod infer_server;
pub mod init_tiny;
pub mod label;
pub mod log_lines;
mod logits;
pub mod merge;
pub mod models;
pub mod phantoms;
mod pipeline_options;
pub mod plan;
mod plan_cards;
pub mod prefer;
pub mod preview;
mod progress;
pub mod pull;
pub mod quantize;
mod question;
pub mod score;
pub mod serve;
pub mod shared_args;
mod shell;
mod shipped;
pub mod store;
mod tags;
pub mod train;
mod usage;
pub mod version;

pub use usage::UsageError;

/// The exit code of a command that ended with `error`.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<UsageError>() {
        2
    } else if error.is::<serve::DeviceLost>() {
        3
    } else {
        1
    }
}
