//! Whole models: captured decoding beside eager, the vision tower as a graph.

use super::*;

/// The captured step against the same step in single operations, over several tokens and batches.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn decoding() {
    let device = device();
    let config = RandomSize::Tiny.config(None).unwrap();
    let options = InitOptions {
        dtype: DType::BF16,
        // Large enough that logits differ.
        initializer_range: 0.1,
    };
    let model = drawn(&device, || Qwen3Vl::<Cuda>::new(&config, &options, &device));
    for format in [CacheFormat::Float, CacheFormat::Int8] {
        decoding_beside_eager(&config, [&model, &model], vec![1, 2, 9], format);
    }
}

/// A quantised model in fragment order, and the same one row by row.
pub(in super::super) fn quantised_pair(
    config: &Qwen3VlConfig,
    format: &str,
    device: &Device<Cuda>,
) -> [Qwen3Vl<Cuda>; 2] {
    struct ByRows;
    impl LinearMapper<Cuda> for ByRows {
        fn map_linear(&mut self, _path: &str, linear: Linear<Cuda>) -> Linear<Cuda> {
            Linear {
                weight: linear.weight.map_packed(|packed| packed.by_rows()),
                ..linear
            }
        }
    }
    let quantization = Some(format.parse().unwrap());
    let ours = draw::<Cuda>(config, 5, DType::BF16, quantization, device);
    let mut plain = ours.clone().map_linears(&mut ByRows);
    let table = &mut plain.model.language_model.embed_tokens;
    table.weight = table.weight.clone().map_packed(|packed| packed.by_rows());
    assert!(super::super::decode::is_arranged(&ours) && !super::super::decode::is_arranged(&plain));
    [ours, plain]
}

/// The captured step over quantised weights, the table tied to the head and not, an adapter beside them and none.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn decoding_with_quantised_weights() {
    let device = device();
    for (format, tied) in [("int8", true), ("int4", false), ("int4:32", true)] {
        let mut config = RandomSize::Tiny.config(None).unwrap();
        config.tie_word_embeddings = tied;
        let [ours, plain] = quantised_pair(&config, format, &device);
        decoding_beside_eager(
            &config,
            [&ours, &plain],
            vec![1, 2, 9, 20, 40],
            CacheFormat::Float,
        );
        let lora = LoraConfig::default();
        let adapted = [ours, plain].map(|model| attach(model, &lora, 3).unwrap().0);
        let [ours, plain] = adapted.map(|model| {
            crate::accelerate::draws::begin();
            model.map_linears(&mut super::super::decode::tests::FillB)
        });
        decoding_beside_eager(&config, [&ours, &plain], vec![1, 20], CacheFormat::Int8);
    }
}

/// `ours` decodes in the captured step, `plain` in single operations: the same model, perhaps in another order.
fn decoding_beside_eager(
    config: &Qwen3VlConfig,
    [ours, plain]: [&Qwen3Vl<Cuda>; 2],
    batches: Vec<usize>,
    format: CacheFormat,
) {
    let device = device();
    let mut report = Report::default();
    let vocab = config.text_config.vocab_size as u32;
    for rows in some(batches) {
        let prompts: Vec<Vec<u32>> = (0..rows as u32)
            .map(|row| {
                (0..20 + 7 * row)
                    // Below the placeholders of images.
                    .map(|at| (at * 37 + row * 11) % (vocab - 24))
                    .collect()
            })
            .collect();
        let grids = vec![vec![]; rows];
        let (input, deltas) =
            TextInput::padded(&prompts, &grids, config, Padding::Left, 0).unwrap();
        let layers = config.text_config.num_hidden_layers;
        let mut cache = KeyValueCache::with_format(layers, input.seq() + 32, format);
        ours.hidden_states(&input, None, config, Some(&mut cache), None, &device);
        // Two caches of the same prompt: one for each way.
        let mut plain_cache = KeyValueCache::with_format(layers, input.seq() + 32, format);
        plain.hidden_states(&input, None, config, Some(&mut plain_cache), None, &device);
        let mut tokens: Vec<u32> = (0..rows as u32).map(|row| 5 + row).collect();
        let start = DecodeStart {
            tokens: tokens.clone(),
            positions: prompts
                .iter()
                .zip(&deltas)
                .map(|(prompt, delta)| prompt.len() as i64 + delta)
                .collect(),
            most_steps: 8,
            sampling: SamplingConfig::default(),
            draws: Vec::new(),
            seen: Vec::new(),
        };
        let mut decoder = Cuda::decoder(ours, config, &cache, &start).expect("covered");
        for step in 0..4 {
            let got = decoder.next_logits(&tokens).unwrap();
            let mut text = TextInput {
                input_ids: tokens.iter().map(|token| vec![*token]).collect(),
                segments: vec![vec![0]; rows],
                positions: Default::default(),
                image_token_id: config.image_token_id,
            };
            for position in &start.positions {
                text.positions.push([position + step; 3]);
            }
            let hidden =
                plain.hidden_states(&text, None, config, Some(&mut plain_cache), None, &device);
            let want = plain.logits(hidden);
            let shape = [rows, vocab as usize];
            let data = burn::tensor::TensorData::new(got.concat(), shape);
            let got = T::<2>::from_data(data, (&device, DType::F32));
            // bf16 activations, rounded at other places, through four layers.
            report.close(
                &format!("logits of step {step}, {rows} rows"),
                got,
                want.clone(),
                3e-2,
            );
            let next: Vec<i32> = want.argmax(1).into_data().iter::<i32>().collect();
            tokens = next.into_iter().map(|token| token as u32).collect();
        }
        let logits = decoder.next_logits(&tokens).unwrap();
        let likeliest: Vec<Option<u32>> = logits
            .iter()
            .map(|row| {
                (0..row.len())
                    .max_by(|a, b| row[*a].total_cmp(&row[*b]).then(b.cmp(a)))
                    .map(|token| token as u32)
            })
            .collect();
        // The step that gave these logits has picked its tokens; the next one starts from them.
        let again = decoder.next_tokens().unwrap();
        assert_eq!(again.len(), rows);
        // From the keys and values that the step wrote: those of single operations round elsewhere, and neighbours
        // among the likeliest would change places.
        let written = KeyValueCache {
            segments: plain_cache.segments.clone(),
            ..cache.clone()
        };
        let mut own = Cuda::decoder(
            ours,
            config,
            &written,
            &DecodeStart {
                tokens: tokens.clone(),
                positions: start
                    .positions
                    .iter()
                    .map(|position| position + 4)
                    .collect(),
                most_steps: 4,
                ..start.clone()
            },
        )
        .expect("covered");
        assert_eq!(own.next_tokens().unwrap(), likeliest, "{rows} rows");
        assert_eq!(own.next_tokens().unwrap(), again, "{rows} rows");

        // Drawn with the host's numbers: what the host would choose from the same logits.
        let sampling = SamplingConfig {
            temperature: 1.3,
            top_k: 40,
            top_p: 0.9,
            repetition_penalty: 1.2,
            ..SamplingConfig::default()
        };
        let samplers: Vec<Sampler> = (0..rows as u64)
            .map(|seed| {
                let sampling = sampling.clone();
                Sampler::new(&SamplingConfig { seed, ..sampling }, &[])
            })
            .collect();
        let drawn = DecodeStart {
            tokens: (0..rows as u32).map(|row| 5 + row).collect(),
            draws: samplers.into_iter().map(|one| one.draws(8)).collect(),
            seen: (prompts.iter().zip(0u32..))
                .map(|(prompt, row)| [prompt, &[5 + row][..]].concat())
                .collect(),
            sampling,
            ..start.clone()
        };
        let mut device_draws = Cuda::decoder(ours, config, &cache, &drawn).expect("covered");
        let mut logits_of = Cuda::decoder(ours, config, &cache, &drawn).expect("covered");
        let mut tokens = drawn.tokens.clone();
        let mut seen = drawn.seen.clone();
        for step in 0..5 {
            let chosen = device_draws.next_tokens().unwrap();
            let logits = logits_of.next_logits(&tokens).unwrap();
            for row in 0..rows {
                let choice = TokenChoice::new(&drawn.sampling, drawn.draws[row][step]);
                let before: HashSet<u32> = seen[row].iter().copied().collect();
                let want = choice.token(&logits[row], &before);
                assert_eq!(chosen[row], Some(want), "row {row} of {rows}, step {step}");
                seen[row].push(want);
                tokens[row] = want;
            }
        }
    }
    report.finish();
}

/// The vision tower replayed as a graph gives the launched tower's bits, whatever the image.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn vision_tower_as_a_graph() {
    let device = device();
    let config = RandomSize::B8.config(Some(4)).unwrap();
    let options = InitOptions {
        dtype: DType::BF16,
        ..InitOptions::default()
    };
    let model = drawn(&device, || Qwen3Vl::<Cuda>::new(&config, &options, &device));
    let vision = &config.vision_config;
    let bits = |x: &T<2>| x.clone().into_data().bytes.to_vec();
    for (call, [height, width]) in [[8, 12], [8, 12], [8, 12], [4, 6], [8, 12], [4, 6], [4, 6]]
        .into_iter()
        .enumerate()
    {
        let count = height * width * vision.patch_dim();
        let images = ImageInput {
            pixel_values: (0..count)
                .map(|at| ((at * 31 + call * 17) % 255) as f32 / 128.0 - 1.0)
                .collect(),
            image_grid_thw: vec![[1, height, width]],
        };
        let got = encode_images(&model, &images, &config, &device);
        Cuda::wait_for_background(&model);
        let layout = VisionLayout::new(&images.image_grid_thw, vision, &device);
        let pixels = pixel_tensor(&images, vision.patch_dim(), DType::BF16, &device);
        let want = model.model.visual.forward(pixels, &layout, None);
        assert_eq!(bits(&got.merged), bits(&want.merged), "call {call}");
        for (got, want) in got.deepstack.iter().zip(&want.deepstack) {
            assert_eq!(bits(got), bits(want), "call {call}");
        }
    }
    for grid in [[1, 8, 12], [1, 4, 6]] {
        let tower = &model.model.visual;
        assert!(
            super::super::vision::is_replayed(tower, &[grid]),
            "{grid:?}"
        );
    }
}
