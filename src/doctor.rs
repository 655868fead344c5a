//! Whether a device computes what it should: a small model with fixed weights, compared with the CPU.
//!
//! The weights are drawn on the host, so they are the same on every backend. Compared are the logits of
//! a prompt with an image, and the gradients of an adapter on the frozen model, once recorded by autodiff
//! and once written out as training does it. Greedy decoding is compared with one pass over what it wrote,
//! on the device itself, so that rounding decides nothing.

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
    adapters::lora::{attach::attach, config::LoraConfig, files::adapter_params},
    base::seeds::mix,
    batch::{
        images::ImageInput,
        micro_batch::MicroBatch,
        text::{Padding, TextInput},
    },
    ops::cast::to_dtype,
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions},
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
pub struct Answers {
    /// Of every token of the prompt, token after token.
    pub logits: Vec<f32>,
    /// How far the logit of a decoded token lies below the largest of one full pass, at most, over the
    /// spread of the logits.
    pub decoding: f64,
    /// Of the adapter, recorded and written out, by name.
    pub gradients: [BTreeMap<String, Vec<f32>>; 2],
}

/// How a part compares.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Relative distance and what is allowed.
    Measured(f64, f64),
    /// The driver's or the program's own words.
    Failed(String),
    /// There is nothing to compare with.
    Unknown,
}

impl Outcome {
    /// Whether the part was compared and is too far; a NaN is too far.
    pub fn is_bad(&self) -> bool {
        match self {
            Self::Measured(distance, allowed) => distance.is_nan() || distance > allowed,
            Self::Failed(_) => true,
            Self::Unknown => false,
        }
    }
}

/// How a device does in one type.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkup {
    /// The type of the weights.
    pub dtype: DType,
    /// Logits of a prompt.
    pub forward: Outcome,
    /// Cached decoding.
    pub decoding: Outcome,
    /// Gradients of an adapter.
    pub gradient: Outcome,
}

impl Checkup {
    /// Whether all that could be compared agrees.
    pub fn is_good(&self) -> bool {
        ![&self.forward, &self.decoding, &self.gradient]
            .iter()
            .any(|outcome| outcome.is_bad())
    }
}

/// Relative distance allowed in a type. The half types round every activation of eight layers to 8 or
/// 11 bits; f32 allows for TF32 products, which CUDA backends take for f32.
pub fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 8e-2,
        DType::F16 => 2e-2,
        _ => 5e-3,
    }
}

/// The model's answers on a device.
///
/// # Errors
/// What decoding or a panicking driver said.
pub fn answers<B: Accelerator>(device: &B::Device, dtype: DType) -> Result<Answers, String> {
    crate::base::panics::quietly(|| work_out::<B>(device, dtype))?
}

/// Compares the answers of a device with those of the CPU in f32.
pub fn compare(dtype: DType, answers: Result<Answers, String>, cpu: Option<&Answers>) -> Checkup {
    let allowed = allowed(dtype);
    let answers = match answers {
        Ok(answers) => answers,
        Err(reason) => {
            return Checkup {
                dtype,
                forward: Outcome::Failed(reason),
                decoding: Outcome::Unknown,
                gradient: Outcome::Unknown,
            };
        }
    };
    let (forward, gradient) = match cpu {
        None => (Outcome::Unknown, Outcome::Unknown),
        Some(cpu) => {
            let forward = distance([(&answers.logits, &cpu.logits)].into_iter());
            // By tensor: a wrong small one must not hide behind a large one.
            let gradient = answers
                .gradients
                .iter()
                .flat_map(|named| {
                    named
                        .iter()
                        .map(|(name, ours)| (ours, &cpu.gradients[0][name]))
                })
                .map(|pair| distance([pair].into_iter()))
                .fold(0.0, worse);
            (
                Outcome::Measured(forward, allowed),
                // A gradient has passed through twice as many roundings.
                Outcome::Measured(gradient, 2.0 * allowed),
            )
        }
    };
    Checkup {
        dtype,
        forward,
        decoding: Outcome::Measured(answers.decoding, allowed),
        gradient,
    }
}

/// Norm of the differences over the norm of the second.
fn distance<'a>(pairs: impl Iterator<Item = (&'a Vec<f32>, &'a Vec<f32>)>) -> f64 {
    let (mut difference, mut norm) = (0.0, 0.0);
    for (ours, want) in pairs {
        for (a, b) in ours.iter().zip(want) {
            difference += f64::from(a - b).powi(2);
            norm += f64::from(*b).powi(2);
        }
    }
    (difference / f64::max(norm, 1e-300)).sqrt()
}

/// Draws every parameter on the host.
struct Draw {
    dtype: DType,
    next: Cell<u64>,
}

impl Draw {
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

impl<B: Accelerator> ModuleMapper<B> for Draw {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let shape: [usize; D] = param.lazy_shape().dims();
        let device = param.lazy_device();
        let values = if D == 1 {
            self.values(&shape, 0.8, 0.4)
        } else {
            // Products keep the size of their inputs.
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
    Qwen3Vl::new(config, &options, device).map(&mut Draw {
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

fn work_out<B: Accelerator>(device: &B::Device, dtype: DType) -> Result<Answers, String> {
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
    let decoding = decoding.fold(0.0, worse);

    let adapter = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: 0.0,
        ..LoraConfig::default()
    };
    let frozen = model::<Autodiff<B>>(&config, dtype, device).no_grad();
    let (mut adapted, _) = attach(frozen, &adapter, SEED).map_err(|error| error.to_string())?;
    // A fresh `B` is zero, and so would be the gradient of `A`.
    let draw = Draw {
        dtype: DType::F32,
        next: Cell::new(1 << 32),
    };
    adapted = adapted.map_linears(&mut Fill(draw));
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
    Ok(Answers {
        logits,
        decoding,
        gradients,
    })
}

/// Gives the second factor of every adapter values.
struct Fill(Draw);

impl<B: Accelerator> crate::adapters::lora::attach::LinearMapper<Autodiff<B>> for Fill {
    fn map_linear(
        &mut self,
        _path: &str,
        mut linear: crate::qwen3_vl::nn::Linear<Autodiff<B>>,
    ) -> crate::qwen3_vl::nn::Linear<Autodiff<B>> {
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

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn_flex::Flex;

    fn cpu() -> Answers {
        answers::<Flex>(&Default::default(), DType::F32).unwrap()
    }

    #[test]
    fn what_is_no_number_is_worst_wherever_it_stands() {
        for distances in [
            [0.5, f64::NAN, 0.001],
            [f64::NAN, 0.5, 0.001],
            [0.001, 0.5, f64::NAN],
        ] {
            assert!(
                distances.into_iter().fold(0.0, worse).is_nan(),
                "{distances:?}"
            );
        }
        assert_eq!([0.1, 0.5, 0.2].into_iter().fold(0.0, worse), 0.5);
    }

    #[test]
    fn the_cpu_agrees_with_itself_and_has_gradients() {
        let cpu = cpu();
        assert!(cpu.logits.iter().all(|value| value.is_finite()));
        assert!(cpu.gradients[0].len() >= 4 * 2);
        assert_eq!(cpu.gradients[0].len(), cpu.gradients[1].len());
        for gradient in cpu.gradients[0].values() {
            assert!(gradient.iter().any(|value| value.abs() > 1e-6));
        }
        let checkup = compare(DType::F32, Ok(cpu.clone()), Some(&cpu));
        assert!(checkup.is_good(), "{checkup:?}");
    }

    #[test]
    fn wrong_answers_are_found() {
        let cpu = cpu();
        let spoiled = |spoil: &dyn Fn(&mut Answers)| {
            let mut answers = cpu.clone();
            spoil(&mut answers);
            compare(DType::F16, Ok(answers), Some(&cpu))
        };
        let logits = spoiled(&|answers| answers.logits[3] = f32::NAN);
        assert!(logits.forward.is_bad() && !logits.gradient.is_bad());
        // One tensor of many, as large as it should be, and wrong.
        let gradient = spoiled(&|answers| {
            let values = answers.gradients[1].values_mut().next().unwrap();
            values.iter_mut().for_each(|value| *value = -*value);
        });
        assert!(!gradient.forward.is_bad() && gradient.gradient.is_bad());
        let decoding = spoiled(&|answers| answers.decoding = 0.4);
        assert!(decoding.decoding.is_bad() && !decoding.is_good());
        let failed = compare(DType::F16, Err("no".into()), Some(&cpu));
        assert!(!failed.is_good());
    }
}
/// The larger of two distances; what is no number is worst of all.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b <= a { a } else { b }
}
