//! The engine's tokens against those of [`generate`], which is equal to the reference.

use std::path::PathBuf;

use burn_flex::Flex;

use super::*;
use crate::{
    batch::positions::rope_index,
    runtime::{
        generate::{GenerationConfig, Prompt, backend::Pick, generate, sampler::argmax},
        pipeline::{Pipeline, PipelineOptions},
    },
};

fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn pipeline() -> Pipeline<Flex> {
    let options = PipelineOptions::new(repository("model/tiny"), DType::F32);
    Pipeline::load(&options, Default::default(), &mut |_, _| {}).unwrap()
}

fn decoder(pipeline: &Pipeline<Flex>) -> PlainDecoder<Flex> {
    PlainDecoder::new(
        pipeline.model.clone(),
        pipeline.parts.config.clone(),
        pipeline.device,
    )
}

fn prompts(pipeline: &Pipeline<Flex>) -> Vec<Prompt> {
    let demo = pipeline
        .parts
        .images
        .load(&repository("data/sample/demo.png"))
        .unwrap();
    let image = pipeline.parts.image_input(&demo).unwrap();
    let mut both = image.clone();
    both.extend(&image);
    [
        ("这张胸片有什么异常？", image),
        ("写一份报告。", Default::default()),
        ("比较两张影像，心影是否增大？", both),
    ]
    .into_iter()
    .map(|(question, images)| pipeline.parts.prompt(None, question, images).unwrap())
    .collect()
}

/// Prefills `slot` with `prompt` from token `from` on, in pieces; returns the first new token.
fn prefill(
    decoder: &mut PlainDecoder<Flex>,
    slot: SlotId,
    prompt: &Prompt,
    from: usize,
    piece: usize,
) -> (u32, i64) {
    let config = decoder.config.clone();
    let merge = config.vision_config.spatial_merge_size;
    let (positions, delta) = rope_index(
        &prompt.input_ids,
        &prompt.images.image_grid_thw,
        config.image_token_id,
        merge,
    )
    .unwrap();
    let features = (prompt.images.patches() > 0)
        .then(|| decoder.encode_image(AdapterId::BASE, &prompt.images));
    let image_tokens = |range: &[u32]| {
        range
            .iter()
            .filter(|id| **id == config.image_token_id)
            .count()
    };
    let (mut at, len) = (from, prompt.input_ids.len());
    loop {
        let end = len.min(at + piece);
        let before = image_tokens(&prompt.input_ids[..at]);
        let here = image_tokens(&prompt.input_ids[at..end]);
        let chunk = Chunk {
            input_ids: &prompt.input_ids[at..end],
            positions: Positions {
                axes: std::array::from_fn(|axis| positions.axes[axis][at..end].to_vec()),
            },
            features: features
                .iter()
                .filter(|_| here > 0)
                .map(|features| (features.clone(), before..before + here))
                .collect(),
            wants_logits: end == len,
        };
        let logits = decoder.prefill(slot, &chunk);
        at = end;
        if let Some(logits) = logits {
            return (argmax(&logits), delta);
        }
    }
}

/// Greedy tokens of sequences that were prefilled: all of them in every step.
fn decode(
    decoder: &mut PlainDecoder<Flex>,
    rows: &[(SlotId, usize, (u32, i64))],
    new: usize,
) -> Vec<Vec<u32>> {
    let mut tokens: Vec<Vec<u32>> = rows.iter().map(|(_, _, (first, _))| vec![*first]).collect();
    for _ in 1..new {
        let step: Vec<StepRow> = rows
            .iter()
            .zip(&tokens)
            .map(|((slot, prompt, (_, delta)), tokens)| StepRow {
                slot: *slot,
                token: tokens[tokens.len() - 1],
                position: (prompt + tokens.len() - 1) as i64 + delta,
                pick: Pick::Logits,
            })
            .collect();
        for (tokens, stepped) in tokens.iter_mut().zip(decoder.step(&step)) {
            let Stepped::Logits(logits) = stepped else {
                panic!("the step wants logits");
            };
            tokens.push(argmax(&logits));
        }
    }
    tokens
}

fn reference(pipeline: &Pipeline<Flex>, prompt: &Prompt, new: usize) -> Vec<u32> {
    let settings = GenerationConfig {
        max_new_tokens: new,
        stop_on_repetition: false,
        ..GenerationConfig::default()
    };
    let (results, _) = generate(
        &pipeline.model,
        &pipeline.parts.config,
        std::slice::from_ref(prompt),
        &settings,
        &pipeline.device,
        &mut |_, _| None,
    )
    .unwrap();
    results[0].token_ids.clone()
}

#[test]
fn tokens_are_those_of_generate_alone_in_pieces_and_in_a_batch() {
    let pipeline = pipeline();
    let prompts = prompts(&pipeline);
    let new = 40;
    let want: Vec<Vec<u32>> = prompts
        .iter()
        .map(|prompt| reference(&pipeline, prompt, new))
        .collect();
    // Pieces that end inside an image, and one that is the whole prompt.
    for piece in [7, 33, 10_000] {
        let mut decoder = decoder(&pipeline);
        let rows: Vec<_> = prompts
            .iter()
            .map(|prompt| {
                let slot = decoder.start(AdapterId::BASE, 0);
                let first = prefill(&mut decoder, slot, prompt, 0, piece);
                (slot, prompt.input_ids.len(), first)
            })
            .collect();
        assert_eq!(decode(&mut decoder, &rows, new), want, "pieces of {piece}");
        rows.iter().for_each(|(slot, ..)| decoder.free(*slot));
        assert_eq!(decoder.slots(), 0);
    }
}

#[test]
fn a_copied_beginning_gives_the_same_tokens_and_leaves_its_source_alone() {
    let pipeline = pipeline();
    let first = prompts(&pipeline).remove(0);
    let second = pipeline
        .parts
        .prompt(None, "有胸腔积液吗？", first.images.clone())
        .unwrap();
    let shared = first
        .input_ids
        .iter()
        .zip(&second.input_ids)
        .take_while(|(a, b)| a == b)
        .count();
    let mut decoder = decoder(&pipeline);
    let slot = decoder.start(AdapterId::BASE, 0);
    let start = prefill(&mut decoder, slot, &first, 0, 1000);
    let copy = decoder.fork(slot, shared, 0);
    let first_of_copy = prefill(&mut decoder, copy, &second, shared, 5);
    let rows = [
        (slot, first.input_ids.len(), start),
        (copy, second.input_ids.len(), first_of_copy),
    ];
    let found = decode(&mut decoder, &rows, 30);
    assert_eq!(found[0], reference(&pipeline, &first, 30));
    assert_eq!(found[1], reference(&pipeline, &second, 30));
}

#[test]
fn rows_of_different_adapters_share_a_step() {
    let fixtures = repository("tests/fixtures/parity");
    let config = Qwen3VlConfig::from_dir(&fixtures.join("model-tiny")).unwrap();
    let mut model = Qwen3Vl::<Flex>::new(&config, &Default::default(), &Default::default());
    crate::qwen3_vl::weights::load_checkpoint(
        &mut model,
        &fixtures.join("model-tiny"),
        DType::F32,
        &mut |_, _| {},
    )
    .unwrap();
    let prompt = Prompt {
        input_ids: (20..60).collect(),
        images: Default::default(),
    };
    let mut decoder = PlainDecoder::new(model, config, Default::default());
    let adapter = decoder.load_adapter(&fixtures.join("adapter")).unwrap().id;
    let mut run = |adapters: &[AdapterId]| {
        let rows: Vec<_> = adapters
            .iter()
            .map(|adapter| {
                let slot = decoder.start(*adapter, 0);
                let first = prefill(&mut decoder, slot, &prompt, 0, 16);
                (slot, prompt.input_ids.len(), first)
            })
            .collect();
        decode(&mut decoder, &rows, 20)
    };
    let base = run(&[AdapterId::BASE]).remove(0);
    let adapted = run(&[adapter]).remove(0);
    assert_ne!(base, adapted, "the fixture's adapter changes nothing");
    let together = run(&[adapter, AdapterId::BASE, adapter]);
    assert_eq!(together, [adapted.clone(), base, adapted]);
    decoder.unload_adapter(adapter);
}

/// Adapters that bring weights of the base's own have them for their rows alone.
#[test]
fn rows_of_adapters_that_change_the_base_share_a_step() {
    let fixtures = repository("tests/fixtures");
    let tiny = fixtures.join("parity/model-tiny-tied");
    let config = Qwen3VlConfig::from_dir(&tiny).unwrap();
    let mut model = Qwen3Vl::<Flex>::new(&config, &Default::default(), &Default::default());
    crate::qwen3_vl::weights::load_checkpoint(&mut model, &tiny, DType::F32, &mut |_, _| {})
        .unwrap();
    let prompt = Prompt {
        input_ids: (20..60).collect(),
        images: Default::default(),
    };
    let mut decoder = PlainDecoder::new(model, config, Default::default());
    let kinds = [
        "tied_head",
        "tied_embedding",
        "tied_saved_head",
        "tied_saved_embedding",
        "tied_tokens_of_head",
    ];
    let mut all = vec![AdapterId::BASE];
    for kind in kinds {
        let dir = fixtures.join("adapters").join(kind);
        all.push(decoder.load_adapter(&dir).unwrap().id);
    }
    let mut run = |adapters: &[AdapterId]| {
        let rows: Vec<_> = adapters
            .iter()
            .map(|adapter| {
                let slot = decoder.start(*adapter, 0);
                let first = prefill(&mut decoder, slot, &prompt, 0, 16);
                (slot, prompt.input_ids.len(), first)
            })
            .collect();
        decode(&mut decoder, &rows, 20)
    };
    let alone: Vec<_> = all.iter().map(|one| run(&[*one]).remove(0)).collect();
    for (at, one) in alone.iter().enumerate() {
        let others = alone.iter().enumerate().filter(|(other, _)| *other != at);
        for (other, text) in others {
            assert_ne!(one, text, "{at} and {other} answer the same");
        }
    }
    assert_eq!(run(&all), alone);
}
