//! What a small model with fixed weights answers on a device: logits, decoded tokens and gradients.
//!
//! The weights are drawn on the host, so they are the same on every backend. Gradients of an adapter on the frozen
//! model are taken twice: recorded by autodiff, and with the backward pass that training has written out. Greedy
//! decoding is compared with one pass over the decoded tokens on the device itself, so that rounding decides nothing.

use std::{cell::Cell, collections::BTreeMap};

use burn::{
    backend::Autodiff,
    module::{AutodiffModule, Module, ModuleMapper, Param},
    prelude::*,
    tensor::{DType, TensorData},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    adapters::lora::{
        attach::{LinearMapper, attach},
        config::LoraConfig,
        files::adapter_params,
    },
    base::{panics::quietly, seeds::mix},
    batch::{
        images::ImageInput,
        micro_batch::MicroBatch,
        text::{Padding, TextInput},
    },
    commands::logits::larger_or_nan,
    ops::cast::to_dtype,
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        nn::{InitOptions, Linear},
    },
    runtime::{
        accelerator::Accelerator,
        generate::{GenerationConfig, Prompt, generate},
        synthetic::weights::RandomSize,
    },
    train::gradients::{GradientOptions, gradients},
};

const SEED: u64 = 20_240_817;

/// Tokens that are decoded.
const STEPS: usize = 8;

/// Patches of the image, and its tokens.
const GRID: [usize; 3] = [1, 4, 6];

/// What the model says in one type on one device.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct DeviceAnswers {
    /// Of every token of the prompt, token after token.
    pub(super) logits: Vec<f32>,
    /// How far the logit of a decoded token is below the largest of one full pass, at most, over the
    /// spread of the logits.
    pub(super) decoding: f64,
    /// Of the adapter, recorded and written out, by name.
    pub(super) gradients: [BTreeMap<String, Vec<f32>>; 2],
}

/// The model's answers on a device.
///
/// # Errors
/// What decoding or a panicking driver said.
pub(super) fn answers<B: Accelerator>(
    device: &B::Device,
    dtype: DType,
) -> Result<DeviceAnswers, String> {
    quietly(|| work_out::<B>(device, dtype))?
}

/// Draws every parameter on the host.
struct HostDraw {
    dtype: DType,
    next: Cell<u64>,
}

impl HostDraw {
    fn values(&self, shape: &[usize], centre: f32, reach: f32) -> TensorData {
        let mut random = ChaCha8Rng::seed_from_u64(mix(SEED, self.next.get()));
        self.next.set(self.next.get() + 1);
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count)
            .map(|_| centre + random.random_range(-reach..reach))
            .collect();
        TensorData::new(values, shape.to_vec())
    }
}

impl<B: Accelerator> ModuleMapper<B> for HostDraw {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let shape: [usize; D] = param.lazy_shape().dims();
        let device = param.lazy_device();
        let values = if D == 1 {
            self.values(&shape, 0.8, 0.4)
        } else {
            // A matmul keeps the size of its input.
            let inner: usize = shape[1..].iter().product();
            self.values(&shape, 0.0, (3.0 / inner as f32).sqrt())
        };
        let tensor = Tensor::from_data(values, (&device, DType::F32));
        Param::initialized(param.id, to_dtype(tensor, self.dtype))
    }
}

fn model<B: Accelerator>(config: &Qwen3VlConfig, dtype: DType, device: &B::Device) -> Qwen3Vl<B> {
    let options = InitOptions {
        dtype,
        ..InitOptions::default()
    };
    Qwen3Vl::new(config, &options, device).map(&mut HostDraw {
        dtype,
        next: Cell::new(0),
    })
}

/// Text, an image, and text again.
fn prompt(config: &Qwen3VlConfig) -> Prompt {
    let image_tokens = GRID.iter().product::<usize>() / 4;
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let mut word = || random.random_range(0..config.image_token_id);
    let mut input_ids: Vec<u32> = (0..5).map(|_| word()).collect();
    input_ids.extend(std::iter::repeat_n(config.image_token_id, image_tokens));
    input_ids.extend((0..12).map(|_| word()));
    let values = GRID.iter().product::<usize>() * config.vision_config.patch_dim();
    Prompt {
        input_ids,
        images: ImageInput {
            pixel_values: (0..values)
                .map(|_| random.random_range(-1.0..1.0))
                .collect(),
            image_grid_thw: vec![GRID],
        },
    }
}

fn input(ids: Vec<u32>, config: &Qwen3VlConfig) -> Result<TextInput, String> {
    TextInput::padded(&[ids], &[vec![GRID]], config, Padding::Right, 0)
        .map(|(input, _)| input)
        .map_err(|error| error.to_string())
}

fn work_out<B: Accelerator>(device: &B::Device, dtype: DType) -> Result<DeviceAnswers, String> {
    let config = RandomSize::Tiny.config(None)?;
    let prompt = prompt(&config);
    let plain = model::<B>(&config, dtype, device);
    let read = |logits: Tensor<B, 2>| -> Vec<f32> { logits.into_data().iter::<f32>().collect() };
    let text = input(prompt.input_ids.clone(), &config)?;
    let logits = read(plain.forward(&text, &prompt.images, &config, device));

    let settings = GenerationConfig {
        max_new_tokens: STEPS,
        stop_on_repetition: false,
        ..GenerationConfig::default()
    };
    let (written, _) = generate(
        &plain,
        &config,
        std::slice::from_ref(&prompt),
        &settings,
        device,
        &mut |_, _| None,
    )
    .map_err(|error| error.to_string())?;
    let written = &written[0].token_ids;
    let all = input([prompt.input_ids.as_slice(), written].concat(), &config)?;
    let full = read(plain.forward(&all, &prompt.images, &config, device));
    let decoding = written.iter().enumerate().map(|(step, token)| {
        let start = (prompt.input_ids.len() + step - 1) * config.text_config.vocab_size;
        let row = &full[start..start + config.text_config.vocab_size];
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let least = row.iter().copied().fold(f32::INFINITY, f32::min);
        f64::from(most - row[*token as usize]) / f64::from(most - least)
    });
    let decoding = decoding.fold(0.0, larger_or_nan);

    let adapter = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: 0.0,
        ..LoraConfig::default()
    };
    let frozen = model::<Autodiff<B>>(&config, dtype, device).no_grad();
    let (mut adapted, _) = attach(frozen, &adapter, SEED).map_err(|error| error.to_string())?;
    // A fresh `B` is zero, and so would be the gradient of `A`.
    let draw = HostDraw {
        dtype: DType::F32,
        next: Cell::new(1 << 32),
    };
    adapted = adapted.map_linears(&mut FillAdapters(draw));
    let inner = adapted.valid();
    let labels = text.input_ids[0].iter().map(|id| i64::from(*id)).collect();
    let batch = MicroBatch {
        labels: vec![labels],
        text,
        images: prompt.images,
    };
    let weight = 1.0 / batch.targets() as f64;
    let gradients = [false, true].map(|manual_backward| {
        let options = GradientOptions {
            manual_backward,
            ..GradientOptions::default()
        };
        let (grads, _) = gradients(&adapted, &inner, &config, &batch, weight, &options, device);
        adapter_params(&adapted)
            .into_iter()
            .filter_map(|(name, id)| {
                let grad = grads.get::<B, 2>(id)?;
                Some((name, grad.into_data().iter::<f32>().collect()))
            })
            .collect()
    });
    Ok(DeviceAnswers {
        logits,
        decoding,
        gradients,
    })
}

/// Gives the second factor of every adapter values.
struct FillAdapters(HostDraw);

impl<B: Accelerator> LinearMapper<Autodiff<B>> for FillAdapters {
    fn map_linear(&mut self, _path: &str, mut linear: Linear<Autodiff<B>>) -> Linear<Autodiff<B>> {
        if let Some(lora) = &mut linear.lora {
            let shape: [usize; 2] = lora.lora_b.lazy_shape().dims();
            let device = lora.lora_b.lazy_device();
            let values = self.0.values(&shape, 0.0, 0.2);
            let tensor = Tensor::from_data(values, (&device, DType::F32));
            lora.lora_b = Param::initialized(lora.lora_b.id, tensor.require_grad());
        }
        linear
    }
}
