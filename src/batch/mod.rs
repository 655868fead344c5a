//! Inputs of the model, on the host: images, token ids, positions, labels. No tensors.

pub mod images;
pub mod micro_batch;
pub mod pixels;
pub mod positions;
pub mod sequences;
pub mod text;
pub mod window;
