//! Adapter gradients of a whole model on CUDA beside those of the CPU, and beside themselves.

use burn::{
    backend::Autodiff,
    module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param},
    optim::GradientsParams,
    prelude::*,
    tensor::DType,
};
use burn_flex::Flex;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    accelerate::cuda::Cuda,
    adapters::lora::{attach::attach, config::LoraConfig},
    batch::micro_batch::MicroBatch,
    ops::cast::{to_dtype, to_f32},
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions},
    runtime::{
        accelerator::TrainAccelerator,
        synthetic::{requests::Requests, weights::RandomSize},
    },
    train::{
        config::TrainConfig,
        gradients::{GradientOptions, gradients},
    },
};

/// Draws parameters on the host, so that every backend gets the same ones.
struct Fill {
    random: ChaCha8Rng,
    /// Only what is trained; else everything.
    trained_only: bool,
}

impl<B: Backend> ModuleMapper<B> for Fill {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if self.trained_only && !param.is_require_grad() {
            return param;
        }
        let trained = param.is_require_grad();
        param.map(|old| {
            let count = old.shape().num_elements();
            // Norms and biases are near their usual values, matrices of a size that keeps activations.
            let (center, spread) = match D {
                1 => (1.0, 0.2),
                _ => (0.0, 0.15),
            };
            let values: Vec<f32> = (0..count)
                .map(|_| center + spread * (self.random.random::<f32>() * 2.0 - 1.0))
                .collect();
            let data = TensorData::new(values, old.shape());
            let new = Tensor::<B, D>::from_data(data, (&old.device(), DType::F32));
            to_dtype(new, old.dtype()).set_require_grad(trained)
        })
    }
}

fn model<B: TrainAccelerator>(
    config: &Qwen3VlConfig,
    dtype: DType,
    device: &B::Device,
) -> Qwen3Vl<B> {
    let options = InitOptions {
        dtype,
        ..InitOptions::default()
    };
    let mut fill = Fill {
        random: ChaCha8Rng::seed_from_u64(3),
        trained_only: false,
    };
    let base = Qwen3Vl::<B>::new(config, &options, device).map(&mut fill);
    let lora: LoraConfig = TrainConfig::default().lora_config();
    let (model, _) = attach(base.no_grad(), &lora, 5).unwrap();
    // A fresh adapter's second factor is zero, and so would be the first one's gradient.
    fill.trained_only = true;
    model.map(&mut fill)
}

/// Gradients by the order of the adapters' parameters, and the loss.
pub(super) fn adapter_gradients<B: TrainAccelerator>(
    config: &Qwen3VlConfig,
    batch: &MicroBatch,
    dtype: DType,
    options: &GradientOptions,
    device: &B::Device,
) -> (Vec<Vec<f32>>, f64) {
    struct Collect<'a>(&'a GradientsParams, Vec<Vec<f32>>);
    impl<B: TrainAccelerator> ModuleVisitor<B> for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(gradient) = self.0.get::<B::InnerBackend, D>(param.id) {
                let values = to_f32(gradient).into_data();
                self.1.push(values.iter::<f32>().collect());
            }
        }
    }
    let model = model::<B>(config, dtype, device);
    let weight = 1.0 / batch.targets() as f64;
    let inner = model.valid();
    let (grads, sums) = gradients(&model, &inner, config, batch, weight, options, device);
    let mut collect = Collect(&grads, Vec::new());
    Module::<B>::visit(&model, &mut collect);
    (collect.1, sums.totals().nll * weight)
}

/// Norm of the difference over norm of the reference, over all gradients together.
fn distance(got: &[Vec<f32>], want: &[Vec<f32>]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut difference, mut reference) = (0.0, 0.0);
    for (got, want) in got.iter().zip(want) {
        assert_eq!(got.len(), want.len());
        for (a, b) in got.iter().zip(want) {
            difference += f64::from(a - b).powi(2);
            reference += f64::from(*b).powi(2);
        }
    }
    (difference / reference.max(1e-60)).sqrt()
}

pub(super) fn packed_samples(config: &Qwen3VlConfig) -> MicroBatch {
    let window = Requests::new(config, true, 9).window(3, 3, true).unwrap();
    window.parts[0][0].clone()
}

pub(super) const MANUAL: GradientOptions = GradientOptions {
    checkpoint_text: false,
    recompute_pointwise: false,
    checkpoint_vision: false,
    dropout_seed: None,
    manual_backward: true,
};

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn adapter_gradients_beside_the_cpu() {
    let device = crate::accelerate::cuda::tests::device();
    let config = RandomSize::Tiny.config(None).unwrap();
    let batch = packed_samples(&config);
    let cpu = Default::default();
    let (want, want_loss) =
        adapter_gradients::<Autodiff<Flex>>(&config, &batch, DType::F32, &MANUAL, &cpu);
    assert!(want.len() == 2 * 7 * config.text_config.num_hidden_layers);
    // f32: other orders of sums (2e-6 seen on an H100; a matmul in TF32 would be some 1e-3 away);
    // bf16: weights, activations and gradients are rounded (2⁻⁹) some dozen times in a row.
    for (dtype, allowed) in [(DType::F32, 1e-4), (DType::BF16, 8e-2)] {
        let (got, loss) =
            adapter_gradients::<Autodiff<Cuda>>(&config, &batch, dtype, &MANUAL, &device);
        let apart = distance(&got, &want);
        println!(
            "adapter gradients, {dtype:?}: {apart:.2e} from the CPU's f32; loss {loss:.5}, there {want_loss:.5}"
        );
        assert!(
            apart <= allowed,
            "{dtype:?}: {apart:.3e}, allowed {allowed:.0e}"
        );
        assert!(
            (loss / want_loss - 1.0).abs() < allowed,
            "{dtype:?}: {loss} {want_loss}"
        );
    }
}

/// Each form of the backward pass twice, with dropout: no bit differs, and what is computed again is
/// what was kept.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gradients_are_the_same_bit_for_bit() {
    let device = crate::accelerate::cuda::tests::device();
    let config = RandomSize::Tiny.config(None).unwrap();
    let batch = packed_samples(&config);
    let options = |checkpoint_text, recompute_pointwise| GradientOptions {
        checkpoint_text,
        recompute_pointwise,
        dropout_seed: Some(17),
        ..MANUAL
    };
    let run = |options: GradientOptions| {
        adapter_gradients::<Autodiff<Cuda>>(&config, &batch, DType::BF16, &options, &device)
    };
    let kept = run(options(false, false));
    assert!(kept.1.is_finite() && kept.0.iter().flatten().all(|value| value.is_finite()));
    for (text, pointwise) in [(false, false), (true, false), (false, true)] {
        let again = run(options(text, pointwise));
        assert!(
            again == kept,
            "recompute layers {text}, pointwise {pointwise}: {:.3e} apart",
            distance(&again.0, &kept.0)
        );
    }
    println!("four passes, no bit differs; loss {:.5}", kept.1);
}
