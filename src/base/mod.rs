//! What every layer above uses: files, memory, names of devices, panics as sentences, drawing. Nothing
//! here knows of models, training or reports.

pub mod base64_text;
pub mod device_name;
pub mod files;
pub mod out_of_memory;
pub mod panics;
pub mod plot;
pub mod seeds;
pub mod system;
pub mod text_file;
pub mod trace;
pub mod web;
