//! Bytes and text to what the model reads: patches and token ids.
//!
//! This module alone knows the order of pixels, the chat template and the tokenizer; it knows no
//! tensor.

pub mod chat;
pub mod dicom;
pub mod image;
mod jinja;
pub mod message;
pub mod patches;
pub mod remark;
pub mod resize;
pub mod sample;
pub mod supervised;
pub mod tokenizer;
pub mod train_tokenizer;
