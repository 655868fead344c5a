//! AdamW with decoupled decay, and clipping by the norm of all gradients together.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use burn::{
    module::{AutodiffModule, ModuleMapper, ModuleVisitor, Param, ParamId},
    optim::{GradientsParams, LearningRate, MultiGradientsParams, Optimizer},
    prelude::*,
    tensor::{DType, backend::AutodiffBackend},
};

use crate::{
    ops::{
        AdamWStep, AdamWTensor, DeviceOps, TrainingOps,
        cast::{to_dtype, to_f32},
    },
    runtime::accelerator::TrainAccelerator,
};

/// Settings of [`AdamW`]; the defaults are ms-swift's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decay of the weights, times the learning rate; norms and biases are left out.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
        }
    }
}

/// Moments of one parameter, flattened, f32.
#[derive(Debug, Clone)]
pub struct Moments<B: Backend> {
    /// Steps this parameter took: those in which it had a gradient.
    pub steps: u64,
    /// Running mean of the gradient.
    pub first: Tensor<B, 1>,
    /// Running mean of its square.
    pub second: Tensor<B, 1>,
}

/// State that outlives a step.
#[derive(Debug, Clone)]
pub struct AdamWState<B: Backend> {
    /// Moments by parameter.
    pub moments: HashMap<ParamId, Moments<B>>,
}

/// AdamW as PyTorch's `torch.optim.AdamW`.
///
/// Clones share their state, so that a checkpoint can be written while the Learner owns the optimizer.
#[derive(Debug)]
pub struct AdamW<B: AutodiffBackend> {
    config: AdamWConfig,
    state: Arc<Mutex<AdamWState<B::InnerBackend>>>,
    clip: Arc<Mutex<Option<Tensor<B::InnerBackend, 1>>>>,
}

impl<B: AutodiffBackend> Clone for AdamW<B> {
    fn clone(&self) -> Self {
        Self {
            config: self.config,
            state: self.state.clone(),
            clip: self.clip.clone(),
        }
    }
}

impl<B: TrainAccelerator> AdamW<B> {
    /// A fresh optimizer.
    pub fn new(config: AdamWConfig) -> Self {
        Self {
            config,
            state: Arc::new(Mutex::new(AdamWState {
                moments: HashMap::new(),
            })),
            clip: Arc::default(),
        }
    }

    /// Brings the gradients of the next step down to a common norm of at most `max_norm` (0 only
    /// measures). Returns the norm before and the factor, `[2]`, f32, on the device; `None` where there
    /// is no gradient.
    ///
    /// Source: `torch.nn.utils.clip_grad_norm_`.
    pub fn clip_next<M: AutodiffModule<B>>(
        &self,
        module: &M,
        grads: &GradientsParams,
        max_norm: f64,
    ) -> Option<Tensor<B::InnerBackend, 1>> {
        let clip = clip_on_device(module, grads, max_norm);
        *self.clip.lock().unwrap_or_else(|lock| lock.into_inner()) = clip.clone();
        clip
    }

    /// An optimizer of its own for another device, with the same state.
    pub fn copy_to(&self, device: &B::Device) -> Self {
        let state = self.state();
        let moments = state.moments.iter().map(|(id, old)| {
            let moments = Moments {
                steps: old.steps,
                first: B::InnerBackend::to_other_device(old.first.clone(), device),
                second: B::InnerBackend::to_other_device(old.second.clone(), device),
            };
            (*id, moments)
        });
        Self {
            config: self.config,
            state: Arc::new(Mutex::new(AdamWState {
                moments: moments.collect(),
            })),
            clip: Arc::default(),
        }
    }

    /// The state, for reading and restoring.
    pub fn state(&self) -> MutexGuard<'_, AdamWState<B::InnerBackend>> {
        self.state.lock().unwrap_or_else(|lock| lock.into_inner())
    }
}

impl<M: AutodiffModule<B>, B: TrainAccelerator> Optimizer<M, B> for AdamW<B> {
    // Checkpoints are written by name (see `checkpoint`), not through Burn's records.
    type Record = ();

    fn step(&mut self, lr: LearningRate, module: M, grads: GradientsParams) -> M {
        let clip = self
            .clip
            .lock()
            .unwrap_or_else(|lock| lock.into_inner())
            .take();
        let mut state = self.state();
        let mut stepper = Stepper::<B> {
            config: self.config,
            lr,
            clip,
            state: &mut state,
            grads,
            path: Vec::new(),
            waiting: Vec::new(),
            stepped: HashMap::new(),
        };
        module.visit(&mut stepper);
        stepper.flush();
        module.map(&mut stepper)
    }

    fn step_multi(&mut self, lr: LearningRate, module: M, mut grads: MultiGradientsParams) -> M {
        let mut single = GradientsParams::new();
        struct Gather<'a> {
            from: &'a mut MultiGradientsParams,
            into: &'a mut GradientsParams,
        }
        impl<B: AutodiffBackend> ModuleVisitor<B> for Gather<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                if let Some((grad, _)) = self.from.remove::<B::InnerBackend, D>(param.id) {
                    self.into.register(param.id, grad);
                }
            }
        }
        module.visit(&mut Gather {
            from: &mut grads,
            into: &mut single,
        });
        self.step(lr, module, single)
    }

    fn to_record(&self) -> Self::Record {}

    fn load_record(self, (): Self::Record) -> Self {
        self
    }
}

/// Steps all parameters that have a gradient, many at a time: a visit gathers them, a map puts the
/// new values in their places.
struct Stepper<'a, B: AutodiffBackend> {
    config: AdamWConfig,
    lr: f64,
    clip: Option<Tensor<B::InnerBackend, 1>>,
    state: &'a mut AdamWState<B::InnerBackend>,
    grads: GradientsParams,
    /// Names from the root of the module to where the visit is.
    path: Vec<String>,
    waiting: Vec<Waiting<B::InnerBackend>>,
    /// New values, flat, in the types of the parameters.
    stepped: HashMap<ParamId, Tensor<B::InnerBackend, 1>>,
}

struct Waiting<B: Backend> {
    id: ParamId,
    dtype: DType,
    steps: u64,
    tensor: AdamWTensor<B>,
}

/// Parameters that are stepped together: bounds what f32 copies of half-type ones take.
const TOGETHER: usize = 96;

impl<B: TrainAccelerator> Stepper<'_, B> {
    fn flush(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let (facts, tensors): (Vec<_>, Vec<_>) = self
            .waiting
            .drain(..)
            .map(|one| ((one.id, one.dtype, one.steps), one.tensor))
            .unzip();
        let stepped = B::InnerBackend::adamw(tensors, self.clip.clone());
        for ((id, dtype, steps), [value, first, second]) in facts.into_iter().zip(stepped) {
            let moments = Moments {
                steps,
                first,
                second,
            };
            self.state.moments.insert(id, moments);
            self.stepped.insert(id, to_dtype(value, dtype));
        }
    }
}

/// Whether a parameter of this name decays: all but norms and biases, which here are the vectors other
/// than DoRA's magnitudes.
///
/// Source: `Trainer.get_decay_parameter_names`, transformers, `trainer.py`, which goes by names (`bias`,
/// `norm`) and `nn.LayerNorm`; PEFT calls the magnitudes `lora_magnitude_vector`.
fn decays(name: &str, dimensions: usize) -> bool {
    dimensions > 1 || name == "lora_magnitude_vector"
}

impl<B: TrainAccelerator> ModuleVisitor<B> for Stepper<'_, B> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let Some(grad) = self.grads.remove::<B::InnerBackend, D>(param.id) else {
            return;
        };
        let AdamWConfig {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } = self.config;
        let value = param.val().inner();
        let dtype = value.dtype();
        let count = value.shape().num_elements();
        let gradient = to_f32(grad).reshape([count]);
        let Moments {
            steps,
            first,
            second,
        } = (self.state.moments.remove(&param.id)).unwrap_or_else(|| Moments {
            steps: 0,
            first: gradient.zeros_like(),
            second: gradient.zeros_like(),
        });
        // The bias of the moments is that of the steps they were fed in, not of the run's.
        let steps = steps + 1;
        let power = steps.min(i32::MAX as u64) as i32;
        let name = self.path.last().map_or("", String::as_str);
        let decay = match decays(name, D) {
            true => self.lr * weight_decay,
            false => 0.0,
        };
        self.waiting.push(Waiting {
            id: param.id,
            dtype,
            steps,
            tensor: AdamWTensor {
                value: to_f32(value).reshape([count]),
                gradient,
                first,
                second,
                step: AdamWStep {
                    beta1,
                    beta2,
                    epsilon,
                    step_size: self.lr / (1.0 - beta1.powi(power)),
                    second_scale: 1.0 / (1.0 - beta2.powi(power)),
                    keep: 1.0 - decay,
                },
            },
        });
        if self.waiting.len() == TOGETHER {
            self.flush();
        }
    }
}

impl<B: TrainAccelerator> ModuleMapper<B> for Stepper<'_, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        match self.stepped.remove(&param.id) {
            None => param,
            Some(value) => {
                param.map(|old| Tensor::from_inner(value.reshape(old.shape())).require_grad())
            }
        }
    }
}

/// The common norm of all gradients, and the factor that brings it down to `max_norm`.
fn clip_on_device<B: TrainAccelerator, M: AutodiffModule<B>>(
    module: &M,
    grads: &GradientsParams,
    max_norm: f64,
) -> Option<Tensor<B::InnerBackend, 1>> {
    struct Flat<'a, B: Backend> {
        grads: &'a GradientsParams,
        flat: Vec<Tensor<B, 1>>,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Flat<'_, B::InnerBackend> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(grad) = self.grads.get::<B::InnerBackend, D>(param.id) {
                let count = grad.shape().num_elements();
                self.flat.push(grad.reshape([count]));
            }
        }
    }
    let mut gathered = Flat::<B::InnerBackend> {
        grads,
        flat: Vec::new(),
    };
    module.visit(&mut gathered);
    (!gathered.flat.is_empty()).then(|| B::InnerBackend::clip_scale(gathered.flat, max_norm))
}

/// The norm before clipping, of what [`AdamW::clip_next`] gives; waits for the device.
pub(super) fn norm_of<B: DeviceOps>(clip: Tensor<B, 1>) -> f64 {
    let values = B::read_async(clip)();
    values.first().copied().map_or(0.0, f64::from)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::backend::Autodiff;

    use super::*;

    type AB = Autodiff<burn_flex::Flex>;

    #[derive(Module, Debug)]
    struct Two<B: Backend> {
        always: Param<Tensor<B, 1>>,
        later: Param<Tensor<B, 1>>,
    }

    fn values(param: &Param<Tensor<AB, 1>>) -> Vec<f32> {
        param.val().into_data().to_vec().unwrap()
    }

    /// PyTorch counts the steps of each parameter: one whose first gradient comes late is corrected
    /// as in its first step.
    #[test]
    fn the_bias_is_corrected_by_each_parameters_own_steps() {
        let device = Default::default();
        let parameter = || Param::from_tensor(Tensor::<AB, 1>::from_floats([1.0, -2.0], &device));
        let mut model = Two {
            always: parameter(),
            later: parameter(),
        };
        let mut optimizer = AdamW::<AB>::new(AdamWConfig {
            weight_decay: 0.0,
            ..AdamWConfig::default()
        });
        let lr = 0.1;
        let gradient = || Tensor::<burn_flex::Flex, 1>::from_floats([0.5, -3.0], &device);
        for step in 1..=3 {
            let mut grads = GradientsParams::new();
            grads.register(model.always.id, gradient());
            if step == 3 {
                grads.register(model.later.id, gradient());
            }
            model = optimizer.step(lr, model, grads);
        }
        // Under a constant gradient each corrected step is `lr` in the gradient's direction.
        let close = |found: Vec<f32>, expected: [f32; 2]| {
            for (a, b) in found.iter().zip(expected) {
                assert!((a - b).abs() < 1e-6, "{found:?}, expected {expected:?}");
            }
        };
        close(values(&model.always), [0.7, -1.7]);
        close(values(&model.later), [0.9, -1.9]);
        let state = optimizer.state();
        assert_eq!(state.moments[&model.always.id].steps, 3);
        assert_eq!(state.moments[&model.later.id].steps, 1);
        drop(state);
        // A copy steps as the original would.
        let mut copy = optimizer.copy_to(&device);
        let step = |optimizer: &mut AdamW<AB>| {
            let mut grads = GradientsParams::new();
            grads.register(model.later.id, gradient());
            values(&optimizer.step(lr, model.clone(), grads).later)
        };
        assert_eq!(step(&mut copy), step(&mut optimizer));
    }

    /// Gradients 3 and 4 of two parameters have the common norm 5: brought down to 1 they are 0.6 and
    /// 0.8, and what AdamW makes of those is known. A step after it is not clipped by the same factor.
    #[test]
    fn the_step_after_clip_next_takes_the_clipped_gradients() {
        let device = Default::default();
        let parameter = || Param::from_tensor(Tensor::<AB, 1>::from_floats([1.0], &device));
        let model = Two {
            always: parameter(),
            later: parameter(),
        };
        let mut optimizer = AdamW::<AB>::new(AdamWConfig {
            weight_decay: 0.0,
            epsilon: 1.0,
            ..AdamWConfig::default()
        });
        let grads = || {
            let mut grads = GradientsParams::new();
            let one = |value| Tensor::<burn_flex::Flex, 1>::from_floats([value], &device);
            grads.register(model.always.id, one(3.0_f32));
            grads.register(model.later.id, one(4.0_f32));
            grads
        };
        let close = |found: f32, expected: f32| {
            assert!((found - expected).abs() < 1e-6, "{found}, not {expected}");
        };
        let only =
            |tensor: &Tensor<burn_flex::Flex, 1>| tensor.to_data().to_vec::<f32>().unwrap()[0];

        let first = grads();
        let clip = optimizer.clip_next(&model, &first, 1.0).unwrap();
        let clip = clip.into_data().to_vec::<f32>().unwrap();
        close(clip[0], 5.0);
        // PyTorch divides by the norm plus 1e-6.
        close(clip[1], 1.0 / 5.000_001);
        let stepped = optimizer.step(0.1, model.clone(), first);
        // In the first step the corrected moments are g and g²: lr · g / (|g| + ε), with ε = 1.
        close(values(&stepped.always)[0], 1.0 - 0.1 * 0.6 / 1.6);
        close(values(&stepped.later)[0], 1.0 - 0.1 * 0.8 / 1.8);
        for (id, gradient) in [(model.always.id, 0.6), (model.later.id, 0.8)] {
            let state = optimizer.state();
            close(only(&state.moments[&id].first), 0.1 * gradient);
            close(only(&state.moments[&id].second), 0.05 * gradient * gradient);
        }

        // Below the bound, or without one, nothing is scaled.
        for max_norm in [10.0, 0.0] {
            let mut fresh = AdamW::<AB>::new(optimizer.config);
            fresh.clip_next(&model, &grads(), max_norm);
            let stepped = fresh.step(0.1, model.clone(), grads());
            close(values(&stepped.always)[0], 1.0 - 0.1 * 3.0 / 4.0);
        }
        // The factor belongs to one step.
        let mut fresh = AdamW::<AB>::new(optimizer.config);
        fresh.clip_next(&model, &grads(), 1.0);
        let _ = fresh.step(0.0, model.clone(), grads());
        let _ = fresh.step(0.0, model.clone(), grads());
        let second = only(&fresh.state().moments[&model.always.id].first);
        close(second, 0.9 * 0.1 * 0.6 + 0.1 * 3.0);
    }

    #[derive(Module, Debug)]
    struct Kinds<B: Backend> {
        weight: Param<Tensor<B, 2>>,
        bias: Param<Tensor<B, 1>>,
        lora_magnitude_vector: Option<Param<Tensor<B, 1>>>,
    }

    /// As transformers' Trainer: matrices and DoRA's magnitudes decay, norms and biases do not.
    #[test]
    fn magnitudes_decay_and_biases_do_not() {
        let device = Default::default();
        let vector = || Param::from_tensor(Tensor::<AB, 1>::from_floats([2.0], &device));
        let model = Kinds {
            weight: Param::from_tensor(Tensor::<AB, 2>::from_floats([[2.0]], &device)),
            bias: vector(),
            lora_magnitude_vector: Some(vector()),
        };
        let mut grads = GradientsParams::new();
        let zero = || Tensor::<burn_flex::Flex, 1>::zeros([1], &device);
        grads.register(model.weight.id, zero().reshape([1, 1]));
        grads.register(model.bias.id, zero());
        let magnitude = model.lora_magnitude_vector.as_ref().unwrap().id;
        grads.register(magnitude, zero());
        // Without a gradient the step is the decay alone: 2 · (1 - 0.1 · 0.5).
        let mut optimizer = AdamW::<AB>::new(AdamWConfig {
            weight_decay: 0.5,
            ..AdamWConfig::default()
        });
        let model = optimizer.step(0.1, model, grads);
        let weight: Vec<f32> = model.weight.val().into_data().to_vec().unwrap();
        assert_eq!(weight, [1.9]);
        assert_eq!(values(&model.bias), [2.0]);
        assert_eq!(values(model.lora_magnitude_vector.as_ref().unwrap()), [1.9]);
    }
}
