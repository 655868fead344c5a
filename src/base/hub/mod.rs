//! Models by name: ids of Hugging Face and ModelScope, what their tools keep on this machine, downloads.
//!
//! [`name`] reads what was typed, [`resolve`] finds its folder, [`mod@pull`] downloads it. Files go where Python's
//! `huggingface_hub` and `modelscope` put and look for them, so weights are on a disk once. This module knows
//! names of files and no format of weights; it prints nothing, progress is a callback.

mod cache;
mod client;
mod error;
mod folder;
mod listing;
pub mod name;
mod place;
pub mod pull;
pub mod resolve;
mod select;
pub mod settings;
mod transfer;

pub use cache::repo_of_folder;
pub use error::HubError;
pub use folder::{Want, WeightsKind};
