//! Loads a checkpoint to one device or several.
//!
//! Bytes go from the file to where the device takes them (see [`upload`](crate::ops::DeviceOps::upload))
//! without a stop: read, checked and converted in one pass, on all cores, while the piece before is copied.

use std::{collections::HashMap, path::Path};

use burn::{
    module::{Module, ModuleMapper, Param},
    prelude::*,
    tensor::{DType, Shape, TensorPrimitive, ops::FloatTensor},
};

use super::{Checkpoint, LoadProgress, WeightsError, parameter_shapes};
use crate::ops::{
    Ops,
    upload::{Upload, UploadError},
};

/// Fills a fresh module from the checkpoint in `dir`, converting to `dtype`.
///
/// All names and shapes are compared before the first tensor is read. A `lm_head.weight` that is the copy
/// of a tied embedding is skipped ([`super::head`] distinguishes it from another one).
/// `on_progress` gets bytes done and in all.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn load_checkpoint<B: Ops, M: Module<B>>(
    module: &mut M,
    dir: &Path,
    dtype: DType,
    on_progress: LoadProgress<'_>,
) -> Result<(), WeightsError> {
    load_checkpoints(std::slice::from_mut(module), dir, dtype, on_progress)
}

/// [`load_checkpoint`] for the same module on several devices: files are read once.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn load_checkpoints<B: Ops, M: Module<B>>(
    modules: &mut [M],
    dir: &Path,
    dtype: DType,
    on_progress: LoadProgress<'_>,
) -> Result<(), WeightsError> {
    load_opened(modules, &Checkpoint::open(dir)?, dtype, on_progress)
}

/// [`load_checkpoints`] of a checkpoint that is open already.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn load_opened<B: Ops, M: Module<B>>(
    modules: &mut [M],
    checkpoint: &Checkpoint,
    dtype: DType,
    on_progress: LoadProgress<'_>,
) -> Result<(), WeightsError> {
    let Some(first) = modules.first() else {
        return Ok(());
    };
    let sources = checkpoint.of_model(&parameter_shapes(first))?;
    let devices: Vec<B::Device> = modules
        .iter()
        .filter_map(|module| module.devices().into_iter().next())
        .collect();
    if devices.len() < modules.len() {
        return Ok(());
    }
    let tensors: Vec<Upload> = sources
        .iter()
        .map(|source| Upload {
            shape: Shape::from(source.1.clone()),
            dtype,
        })
        .collect();
    let total: u64 = tensors.iter().map(|tensor| tensor.byte_len() as u64).sum();
    let mut done = 0;
    on_progress(done, total);
    let sent = B::upload(&devices, &tensors, &mut |place, offset, out| {
        let name = &sources[place].0;
        checkpoint.read_into(name, offset / dtype.size(), dtype, out)?;
        done += out.len() as u64;
        on_progress(done, total);
        Ok::<_, WeightsError>(())
    })?;
    for (module, sent) in modules.iter_mut().zip(sent) {
        let names = sources.iter().map(|source| source.0.clone());
        let mut put = Put::<B> {
            path: Vec::new(),
            tensors: names.zip(sent).collect(),
        };
        *module = module.clone().map(&mut put);
    }
    Ok(())
}

impl From<UploadError> for WeightsError {
    fn from(error: UploadError) -> Self {
        Self::Upload(error.0)
    }
}

/// Puts tensors in the places of parameters, by path; what the parameter was to be trained as stays.
struct Put<B: Backend> {
    path: Vec<String>,
    tensors: HashMap<String, FloatTensor<B>>,
}

impl<B: Backend> ModuleMapper<B> for Put<B> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        match self.tensors.remove(&self.path.join(".")) {
            Some(tensor) => {
                let id = param.id;
                param.transform_for_load(Tensor::from_primitive(TensorPrimitive::Float(tensor)), id)
            }
            None => param,
        }
    }
}
