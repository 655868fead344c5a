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

use crate::kernels::{AdamWStep, Kernels, TrainKernels};
use crate::qwen3_vl::nn::{to_dtype, to_f32};

/// Settings of [`AdamW`]; the defaults are ms-swift's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decay of the weights, times the learning rate; vectors (norms, biases) are left out.
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
}

impl<B: AutodiffBackend> Clone for AdamW<B> {
    fn clone(&self) -> Self {
        Self {
            config: self.config,
            state: self.state.clone(),
        }
    }
}

impl<B: TrainKernels> AdamW<B> {
    /// A fresh optimizer.
    pub fn new(config: AdamWConfig) -> Self {
        Self {
            config,
            state: Arc::new(Mutex::new(AdamWState {
                moments: HashMap::new(),
            })),
        }
    }

    /// An optimizer of its own for another device, with the same state.
    pub fn copy_to(&self, device: &B::Device) -> Self {
        let state = self.state();
        let moments = state.moments.iter().map(|(id, old)| {
            let moments = Moments {
                steps: old.steps,
                first: B::InnerBackend::send_to(old.first.clone(), device),
                second: B::InnerBackend::send_to(old.second.clone(), device),
            };
            (*id, moments)
        });
        Self {
            config: self.config,
            state: Arc::new(Mutex::new(AdamWState {
                moments: moments.collect(),
            })),
        }
    }

    /// The state, for reading and restoring.
    pub fn state(&self) -> MutexGuard<'_, AdamWState<B::InnerBackend>> {
        self.state.lock().unwrap_or_else(|lock| lock.into_inner())
    }
}

impl<M: AutodiffModule<B>, B: TrainKernels> Optimizer<M, B> for AdamW<B> {
    // Checkpoints are written by name (see `checkpoint`), not through Burn's records.
    type Record = ();

    fn step(&mut self, lr: LearningRate, module: M, mut grads: GradientsParams) -> M {
        let config = self.config;
        let mut state = self.state();
        module.map(&mut StepMapper::<B> {
            config,
            lr,
            state: &mut state,
            grads: &mut grads,
        })
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

struct StepMapper<'a, B: AutodiffBackend> {
    config: AdamWConfig,
    lr: f64,
    state: &'a mut AdamWState<B::InnerBackend>,
    grads: &'a mut GradientsParams,
}

impl<B: TrainKernels> ModuleMapper<B> for StepMapper<'_, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(grad) = self.grads.remove::<B::InnerBackend, D>(param.id) else {
            return param;
        };
        let AdamWConfig {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } = self.config;
        let (lr, id) = (self.lr, param.id);
        let moments = &mut self.state.moments;
        param.map(|tensor| {
            let dtype = tensor.dtype();
            let value = to_f32(tensor.inner());
            let shape = value.shape();
            let count = shape.num_elements();
            let grad = to_f32(grad).reshape([count]);
            let value = value.reshape([count]);
            let Moments {
                steps,
                first,
                second,
            } = moments.remove(&id).unwrap_or_else(|| Moments {
                steps: 0,
                first: grad.zeros_like(),
                second: grad.zeros_like(),
            });
            // The bias of the moments is that of the steps they were fed in, not of the run's.
            let steps = steps + 1;
            let power = steps.min(i32::MAX as u64) as i32;
            let step = AdamWStep {
                beta1,
                beta2,
                epsilon,
                step_size: lr / (1.0 - beta1.powi(power)),
                second_scale: 1.0 / (1.0 - beta2.powi(power)),
                keep: if D > 1 { 1.0 - lr * weight_decay } else { 1.0 },
            };
            let [value, first, second] = B::InnerBackend::adamw(value, grad, [first, second], step);
            moments.insert(
                id,
                Moments {
                    steps,
                    first,
                    second,
                },
            );
            Tensor::from_inner(to_dtype(value.reshape(shape), dtype)).require_grad()
        })
    }
}

/// Scales all gradients so that their common norm is at most `max_norm`, and gives the norm before.
///
/// `max_norm` 0 only measures. A norm that is not a number scales nothing.
///
/// Source: `torch.nn.utils.clip_grad_norm_`.
pub fn clip_global_norm<B: TrainKernels, M: AutodiffModule<B>>(
    module: &M,
    grads: &mut GradientsParams,
    max_norm: f64,
) -> f64 {
    struct Squares<'a, B: Backend> {
        grads: &'a GradientsParams,
        flat: Vec<Tensor<B, 1>>,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Squares<'_, B::InnerBackend> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(grad) = self.grads.get::<B::InnerBackend, D>(param.id) {
                let count = grad.shape().num_elements();
                self.flat.push(grad.reshape([count]));
            }
        }
    }
    struct Scale<'a> {
        grads: &'a mut GradientsParams,
        factor: f64,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Scale<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(grad) = self.grads.remove::<B::InnerBackend, D>(param.id) {
                self.grads.register(param.id, grad * self.factor);
            }
        }
    }
    let mut squares = Squares::<B::InnerBackend> {
        grads,
        flat: Vec::new(),
    };
    module.visit(&mut squares);
    if squares.flat.is_empty() {
        return 0.0;
    }
    let sums = B::InnerBackend::square_sums(squares.flat);
    debug_assert_eq!(sums.dtype(), DType::F32);
    let norm = sums.to_data().iter::<f64>().sum::<f64>().sqrt();
    let factor = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && factor < 1.0 {
        module.visit(&mut Scale { grads, factor });
    }
    norm
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
}
