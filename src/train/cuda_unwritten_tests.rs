//! Whole models over memory that holds NaN wherever nothing was written: inference, a packed training
//! step and the serving step give the bits they give over ordinary memory.

use std::sync::Mutex;

use burn::{backend::Autodiff, prelude::*, tensor::DType};

use crate::{
    accelerate::cuda::{
        Cuda, poison,
        tests::{T, device, drawn},
    },
    batch::{
        positions::Positions,
        text::{Padding, TextInput},
    },
    ops::{AdamWStep, AdamWTensor, TrainingOps},
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, key_values::KeyValueCache, nn::InitOptions},
    runtime::{
        accelerator::{Accelerator, DecodeStart},
        generate::{
            SamplingConfig,
            backend::{AdapterId, Chunk, DecodeBackend, Pick, ServingLimits, StepRow, Stepped},
        },
        synthetic::{requests::Requests, weights::RandomSize},
        vision::encode_images,
    },
    train::{
        cuda_gradient_tests::{MANUAL, adapter_gradients, packed_samples},
        gradients::GradientOptions,
    },
};

/// Memory of all sizes that the pools hold, filled with NaN and freed.
fn poison_pools(device: &Device<Cuda>) {
    let filled: Vec<T<1>> = [128, 1 << 10, 1 << 14, 1 << 18, 1 << 21]
        .into_iter()
        .flat_map(|count| (0..16).map(move |_| count))
        .map(|count| Tensor::full([count], f32::NAN, (device, DType::F32)))
        .collect();
    drop(filled);
    Cuda::sync(device).unwrap();
}

/// What `work` gives over ordinary memory and over NaN.
fn both<R>(device: &Device<Cuda>, work: impl Fn() -> R) -> [R; 2] {
    // The switch is the process's.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(|lock| lock.into_inner());
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            poison::set(self.0);
        }
    }
    let _before = Before(poison::is_on());
    poison::set(false);
    let clean = work();
    poison::set(true);
    poison_pools(device);
    [clean, work()]
}

fn bits(values: &[f32]) -> Vec<u32> {
    assert!(values.iter().all(|value| value.is_finite()));
    values.iter().map(|value| value.to_bits()).collect()
}

fn read<const D: usize>(x: T<D>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}

fn tiny(device: &Device<Cuda>) -> (Qwen3VlConfig, Qwen3Vl<Cuda>) {
    let config = RandomSize::Tiny.config(Some(2)).unwrap();
    let options = InitOptions {
        dtype: DType::BF16,
        initializer_range: 0.1,
    };
    let model = drawn(device, || Qwen3Vl::<Cuda>::new(&config, &options, device));
    (config, model)
}

/// Fresh memory really holds NaN: else the tests below show nothing.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn unwritten_memory_is_filled() {
    let device = device();
    let like = crate::accelerate::cuda::launch::strided(T::<1>::zeros([1], (&device, DType::BF16)));
    let fresh = || {
        let buffer = crate::accelerate::cuda::launch::empty(&like, [1001], DType::BF16);
        read(crate::accelerate::cuda::launch::tensor::<1>(buffer))
    };
    let [_, filled] = both(&device, fresh);
    assert!(filled.iter().all(|value| value.is_nan()));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn nothing_unwritten_reaches_inference() {
    let device = device();
    let (config, model) = tiny(&device);
    let mut requests = Requests::new(&config, false, 5);
    let images = requests.image();
    let prompts: Vec<Vec<u32>> = [3, 70, 29]
        .iter()
        .map(|length| (0..*length).map(|at| at * 37 % 1000).collect())
        .collect();
    let run = |prompts: &[Vec<u32>]| {
        let rows = prompts.len();
        let seen = encode_images(&model, &images, &config, &device);
        let mut all = read(seen.merged);
        seen.deepstack.into_iter().for_each(|x| all.extend(read(x)));
        let grids = vec![vec![]; rows];
        let (input, deltas) =
            TextInput::padded(prompts, &grids, &config, Padding::Left, 0).unwrap();
        let layers = config.text_config.num_hidden_layers;
        let mut cache = KeyValueCache::with_capacity(layers, input.seq() + 32);
        let hidden = model.hidden_states(&input, None, &config, Some(&mut cache), None, &device);
        // Rows of padding hold anything; the last one of each prompt is a token.
        let [_, width] = hidden.dims();
        let last = hidden.reshape([rows as i32, -1, width as i32]);
        let last = last.narrow(1, input.seq() - 1, 1).reshape([rows, width]);
        all.extend(read(model.logits(last)));
        let mut decoder = Cuda::decoder(
            &model,
            &config,
            &cache,
            &DecodeStart {
                tokens: (0..rows as u32).map(|row| 5 + row).collect(),
                positions: (prompts.iter().zip(&deltas))
                    .map(|(prompt, delta)| prompt.len() as i64 + delta)
                    .collect(),
                most_steps: 8,
                sampling: SamplingConfig::default(),
                draws: Vec::new(),
                seen: Vec::new(),
            },
        )
        .expect("covered");
        for step in 0..3 {
            let tokens: Vec<u32> = (0..rows as u32).map(|row| 5 + row + step).collect();
            all.extend(decoder.next_logits(&tokens).unwrap().concat());
        }
        all
    };
    for rows in [1, 3] {
        let [clean, poisoned] = both(&device, || run(&prompts[..rows]));
        assert!(bits(&clean) == bits(&poisoned), "{rows} rows");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn nothing_unwritten_reaches_a_packed_training_step() {
    let device = device();
    let config = RandomSize::Tiny.config(Some(2)).unwrap();
    let batch = packed_samples(&config);
    for (checkpoint_text, recompute_pointwise) in [(false, false), (false, true), (true, false)] {
        let options = GradientOptions {
            checkpoint_text,
            recompute_pointwise,
            dropout_seed: Some(17),
            ..MANUAL
        };
        let step = || {
            let (grads, loss) = adapter_gradients::<Autodiff<Cuda>>(
                &config,
                &batch,
                DType::BF16,
                &options,
                &device,
            );
            let tensors: Vec<AdamWTensor<Cuda>> = (grads.iter())
                .map(|values| {
                    let data = TensorData::new(values.clone(), [values.len()]);
                    let gradient = T::<1>::from_data(data, (&device, DType::F32));
                    AdamWTensor {
                        value: gradient.clone(),
                        first: gradient.zeros_like(),
                        second: gradient.zeros_like(),
                        gradient,
                        step: AdamWStep {
                            beta1: 0.9,
                            beta2: 0.95,
                            epsilon: 1e-8,
                            step_size: 0.01,
                            second_scale: 1.7,
                            keep: 0.999,
                        },
                    }
                })
                .collect();
            let gradients = tensors.iter().map(|one| one.gradient.clone()).collect();
            let clip = Cuda::clip_scale(gradients, 1.0);
            let mut all = grads.concat();
            all.push(loss as f32);
            all.extend(read(clip.clone()));
            for stepped in Cuda::adamw(tensors, Some(clip)) {
                stepped.into_iter().for_each(|x| all.extend(read(x)));
            }
            all
        };
        let [clean, poisoned] = both(&device, step);
        assert!(
            bits(&clean) == bits(&poisoned),
            "layers again {checkpoint_text}, pointwise again {recompute_pointwise}"
        );
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn nothing_unwritten_reaches_the_serving_step() {
    let device = device();
    let (config, model) = tiny(&device);
    let limits = ServingLimits {
        kv_cache: Default::default(),
        rows: 2,
        warm_up: true,
        cache_tokens: 1024,
        prefill_chunk: 64,
        adapters: true,
    };
    let run = || {
        let mut engine = Cuda::serving_decoder(&model, &config, &limits, &mut |_, _| {})
            .unwrap()
            .expect("covered");
        let mut all = Vec::new();
        let ids: Vec<u32> = (0..150).map(|at| at * 37 % 1000).collect();
        let slot = engine.start(AdapterId::BASE, 0);
        for (at, piece) in ids.chunks(64).enumerate() {
            let mut positions = Positions::default();
            (0..piece.len()).for_each(|i| positions.push([(at * 64 + i) as i64; 3]));
            let chunk = Chunk {
                input_ids: piece,
                positions,
                features: Vec::new(),
                wants_logits: true,
            };
            all.extend(
                engine
                    .prefill(slot, &chunk)
                    .expect("the chunk wants logits"),
            );
        }
        // A page that is copied in part, and rows that are not in use.
        let fork = engine.fork(slot, 130, 0);
        for step in 0..2 {
            let row = |slot, position| StepRow {
                slot,
                token: 9,
                position,
                pick: Pick::Logits,
            };
            for stepped in engine.step(&[row(slot, 150 + step), row(fork, 130 + step)]) {
                match stepped {
                    Stepped::Logits(logits) => all.extend(logits),
                    Stepped::Token(_) => panic!("the chunk wants logits"),
                }
            }
        }
        all
    };
    let [clean, poisoned] = both(&device, run);
    assert!(bits(&clean) == bits(&poisoned));
}
