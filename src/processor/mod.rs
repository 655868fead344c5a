//! Bytes and text to what the model reads: patches and token ids; rows of data files to samples.
//!
//! This module alone knows the order of pixels, the chat template and the tokenizer; it knows no
//! tensor.

pub mod chat;
mod conversation;
mod decode_limits;
pub mod dicom;
pub mod image;
mod jinja;
mod jpeg;
mod jpeg_2000;
mod jpeg_lossless;
mod jpeg_ls;
mod learnt;
mod literal;
pub mod message;
mod objects;
mod pack_bits;
pub mod patches;
mod percentiles;
mod pixel_limits;
mod rejected;
pub mod remark;
pub mod resize;
mod row_fault;
mod row_forms;
mod row_images;
pub mod row_keys;
mod row_parts;
mod row_question;
mod row_tools;
mod row_turns;
mod row_unknown;
pub mod sample;
pub(crate) mod strict_json;
pub mod supervised;
mod tags;
pub mod tokenizer;
pub mod tools;
pub mod train_tokenizer;
