//! The reference of an objective: the same weights with the adapter as it was at first, or without it.
//!
//! The base is shared, so a reference takes no memory but that of an adapter. An adapter that a run starts from is
//! kept in the run's folder, so that a resumed run measures from the same weights.

use std::{fs, path::Path, sync::Arc};

use burn::{
    module::{Param, ParamId},
    prelude::*,
};

use crate::{
    adapters::lora::{attach::LinearMapper, files::load_adapter_for_training},
    base::files::{FileError, write_atomic},
    ops::Ops,
    qwen3_vl::{Qwen3Vl, nn::Linear},
    train::outcome::TrainError,
    weights::lora::Lora,
};

/// Folder of the adapter that a run started from, in the run's folder.
const FOLDER: &str = "reference";

/// Files of an adapter that its weights follow from.
const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The low-rank matrices of one layer, on the host.
#[derive(Debug, Clone)]
struct Matrices {
    path: String,
    a: TensorData,
    b: TensorData,
    scaling: f64,
}

/// Weights that an objective measures from, on the host.
#[derive(Debug, Clone, Default)]
pub struct Reference {
    /// Adapters of the start; the base alone if empty.
    adapters: Arc<Vec<Matrices>>,
}

impl Reference {
    /// The base alone.
    pub fn base() -> Self {
        Self::default()
    }

    /// The adapters of a model.
    pub fn of<B: Ops>(model: &Qwen3Vl<B>) -> Self {
        let all = model.linears().into_iter().filter_map(|(path, linear)| {
            let lora = linear.lora.as_ref()?;
            Some(Matrices {
                path,
                a: lora.lora_a.val().into_data(),
                b: lora.lora_b.val().into_data(),
                scaling: lora.scaling(),
            })
        });
        Self {
            adapters: Arc::new(all.collect()),
        }
    }

    /// The model with these weights: its base is shared.
    pub fn apply<B: Ops>(&self, model: &Qwen3Vl<B>) -> Qwen3Vl<B> {
        struct Replace<'a>(&'a [Matrices]);
        impl<B: Ops> LinearMapper<B> for Replace<'_> {
            fn map_linear(&mut self, path: &str, mut linear: Linear<B>) -> Linear<B> {
                let device = linear.weight.lazy_device();
                let own = self.0.iter().find(|one| one.path == path);
                linear.lora = own.map(|own| {
                    let param = |data: &TensorData| {
                        let tensor = Tensor::<B, 2>::from_data(data.clone(), &device);
                        Param::initialized(ParamId::new(), tensor)
                    };
                    Lora::new([param(&own.a), param(&own.b)], None, own.scaling)
                });
                linear
            }
        }
        model.clone().map_linears(&mut Replace(&self.adapters))
    }

    /// The adapter in `from`, kept in the folder of the run: copied there by a new run, read there by a resumed one.
    ///
    /// # Errors
    /// [`TrainError`] names the file.
    pub fn kept<B: Ops>(
        base: Qwen3Vl<B>,
        from: &Path,
        run: &Path,
        resumed: bool,
    ) -> Result<Self, TrainError> {
        let folder = run.join(FOLDER);
        if !resumed {
            fs::create_dir_all(&folder).map_err(|cause| FileError::write(&folder, cause))?;
            for name in FILES {
                let source = from.join(name);
                let bytes = fs::read(&source).map_err(|cause| FileError::read(&source, cause))?;
                write_atomic(&folder.join(name), |out| out.write_all(&bytes))?;
            }
        }
        let adapted = load_adapter_for_training(base, &folder, 0.0)?;
        Ok(Self::of(&adapted.model))
    }
}
