//! What every layer above uses: files and texts in them, models by name, the web, memory, names of devices, panics as
//! sentences, drawing. Nothing here knows what is in a model, or of training or reports.

pub mod base64_text;
pub mod build_info;
pub mod device_name;
pub mod files;
pub mod hub;
pub mod out_of_memory;
pub mod panics;
pub mod plot;
pub mod seeds;
pub mod system;
pub mod text_file;
pub mod trace;
pub mod web;
