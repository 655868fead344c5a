//! The model of a run: drawn or loaded, with what is trained of it, or as a checkpoint has it.

use std::path::Path;

use burn::{
    module::{Module, ModuleMapper, Param},
    prelude::*,
    tensor::DType,
};

use crate::{
    adapters::lora::{
        attach::attach, config::LoraConfig, files::load_adapter_for_training,
        saved_modules::train_saved,
    },
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions},
    runtime::accelerator::Accelerator,
    train::{
        checkpoint::restore_weights,
        config::{TrainConfig, Tuner},
        outcome::TrainError,
    },
};

/// Sets for each parameter whether it is trained, by its path.
struct Freeze<F> {
    path: Vec<String>,
    trained: F,
}

impl<B: Backend, F: Fn(&str) -> bool> ModuleMapper<B> for Freeze<F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let trained = (self.trained)(&self.path.join("."));
        param.set_require_grad(trained)
    }
}

/// Freezes what the run does not train and attaches adapters.
pub(super) fn prepare_model<B: Accelerator>(
    model: Qwen3Vl<B>,
    config: &TrainConfig,
    tell: &dyn Fn(&str),
) -> Result<(Qwen3Vl<B>, LoraConfig), TrainError> {
    let own = config.lora_config();
    match config.tuner {
        Tuner::Full => {
            let (vit, aligner, llm) = (config.freeze_vit, config.freeze_aligner, config.freeze_llm);
            let trained = move |path: &str| {
                let is_aligner = path.starts_with("model.visual.merger.")
                    || path.starts_with("model.visual.deepstack_merger_list.");
                if is_aligner {
                    !aligner
                } else if path.starts_with("model.visual.") {
                    !vit
                } else {
                    !llm
                }
            };
            let model = model.map(&mut Freeze {
                path: Vec::new(),
                trained,
            });
            Ok((model, own))
        }
        Tuner::Lora => {
            let frozen = model.no_grad();
            Ok(match &config.adapter {
                // Its rank, scaling and targets count; dropout is the run's.
                Some(dir) => {
                    let adapted = load_adapter_for_training(frozen, dir, config.lora_dropout)?;
                    adapted.notes.iter().for_each(|note| tell(note));
                    (adapted.model, adapted.config)
                }
                None => {
                    let (model, _) = attach(frozen, &own, config.seed)?;
                    let (model, notes) = train_saved(model, &own)?;
                    notes.iter().for_each(|note| tell(note));
                    (model, own)
                }
            })
        }
    }
}

/// Draws a model at random: for the first training of a small one.
pub(super) fn random_model<B: Accelerator>(
    config: &Qwen3VlConfig,
    seed: u64,
    dtype: DType,
    device: &B::Device,
) -> Qwen3Vl<B> {
    struct Draw;
    impl<B: Backend> ModuleMapper<B> for Draw {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            // Parameters are initialised at their first use: use them in order.
            param.map(|tensor| tensor)
        }
    }
    B::seed(device, seed);
    let options = InitOptions {
        dtype,
        ..InitOptions::default()
    };
    Qwen3Vl::new(config, &options, device).map(&mut Draw)
}

/// The model as the checkpoint `dir` has it, on the base that its run began with.
pub(super) fn restore_model<B: Accelerator>(
    base: Qwen3Vl<B>,
    config: &TrainConfig,
    dir: &Path,
    tell: &dyn Fn(&str),
) -> Result<(Qwen3Vl<B>, LoraConfig), TrainError> {
    Ok(match config.tuner {
        Tuner::Lora => {
            let adapted = load_adapter_for_training(base.no_grad(), dir, config.lora_dropout)?;
            (adapted.model, adapted.config)
        }
        Tuner::Full => {
            let (model, lora) = prepare_model(base, config, tell)?;
            (restore_weights(dir, model)?, lora)
        }
    })
}
