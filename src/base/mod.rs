//! What everything may rest on: files, memory, names of devices, panics as sentences.

pub mod device_name;
pub mod files;
pub mod out_of_memory;
pub mod panics;
pub mod seeds;
pub mod system;
pub mod trace;
