//! An adapter's tensors, read under its config.

use std::collections::BTreeMap;

use burn::{
    prelude::*,
    tensor::{DType, TensorData},
};

use super::{
    config::{AdapterError, LoraConfig},
    keys::PREFIX,
};
use crate::qwen3_vl::weights::TensorFile;

/// An adapter's file under its config.
pub(super) struct Source<'a> {
    pub(super) file: &'a TensorFile,
    pub(super) config: &'a LoraConfig,
    pub(super) shapes: &'a BTreeMap<String, Vec<usize>>,
}

impl Source<'_> {
    /// A tensor does not fit.
    pub(super) fn mismatch(&self, reason: String) -> AdapterError {
        AdapterError::Mismatch {
            path: self.file.path().to_path_buf(),
            reason,
        }
    }

    /// A tensor of this path is not there.
    pub(super) fn missing(&self, path: &str) -> AdapterError {
        let found = match self.shapes.keys().next() {
            Some(found) => format!("; the file holds names like `{found}`"),
            None => String::new(),
        };
        self.mismatch(format!("tensor `{}{path}` is missing{found}", PREFIX))
    }

    /// One part of the adapter contradicts another.
    pub(super) fn contradiction(&self, reason: String) -> AdapterError {
        AdapterError::Contradiction {
            path: self.file.path().to_path_buf(),
            reason,
        }
    }

    /// A tensor of this name as f32, whose shape is `expected` once dimensions of one element are left out,
    /// or all but the first are taken together.
    pub(super) fn read<B: Backend, const D: usize>(
        &self,
        name: &str,
        expected: [usize; D],
        device: &B::Device,
    ) -> Result<Tensor<B, D>, AdapterError> {
        self.expect(name, &expected)?;
        let data = self.file.read(name, DType::F32)?;
        let data = TensorData {
            shape: expected.into(),
            ..data
        };
        Ok(Tensor::from_data(data, (device, DType::F32)))
    }

    /// Checks a tensor's shape.
    pub(super) fn expect(&self, name: &str, expected: &[usize]) -> Result<(), AdapterError> {
        let found = self.shapes.get(name).map_or(&[][..], Vec::as_slice);
        let long = |shape: &[usize]| -> Vec<usize> {
            shape.iter().copied().filter(|size| *size != 1).collect()
        };
        let flat = |shape: &[usize]| match shape {
            [first, rest @ ..] if rest.len() > 1 => vec![*first, rest.iter().product()],
            short => short.to_vec(),
        };
        if long(found) == long(expected) || flat(found) == expected {
            return Ok(());
        }
        Err(self.mismatch(format!(
            "tensor `{name}` has shape {found:?}, expected {expected:?}"
        )))
    }
}
