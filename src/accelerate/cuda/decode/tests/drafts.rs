//! Drafted tokens in the paged step: rows of one sequence.

use super::*;
use crate::runtime::generate::{
    GenerationConfig, Prompt,
    drafts::{DraftCounts, DraftStore, Drafts},
    generate,
};

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn drafted_rows_are_those_of_single_steps_bit_for_bit() {
    let device = device();
    let config = RandomSize::Tiny.config(None).unwrap();
    let floats = model(&config, &device);
    let mut models = vec![("bf16", floats)];
    for format in ["int8", "int4"] {
        let [quantised, _] = quantised_pair(&config, format, &device);
        models.push((format, quantised));
    }
    for (name, model) in &models {
        for kv_cache in [CacheFormat::Float, CacheFormat::Int8] {
            for length in [60, 63, 64, 150, 1020] {
                drafted_and_single(&config, (name, model), kv_cache, length);
            }
        }
    }
}

/// Five tokens after a prompt in one step, across the end of a page, beside other sequences; two of them right.
fn drafted_and_single(
    config: &Qwen3VlConfig,
    (name, model): (&str, &Qwen3Vl<Cuda>),
    kv_cache: CacheFormat,
    length: usize,
) {
    let limits = ServingLimits { kv_cache, ..LIMITS };
    let mut ours = paged(model, config, &limits);
    let source = ours.start(AdapterId::BASE, 0);
    prefill(&mut ours, source, &ids(0..length as u32), 0, 200);
    let others: Vec<SlotId> = (0..2u32)
        .map(|at| {
            let slot = ours.start(AdapterId::BASE, 0);
            prefill(&mut ours, slot, &ids(at..at + 20 + 3 * at), 0, 64);
            slot
        })
        .collect();
    let (single, drafted) = (ours.fork(source, length, 0), ours.fork(source, length, 0));
    let tokens = [5, 9, 8, 7, 6];
    let one = |ours: &mut ServingDecoder<Cuda>, token, at| {
        logits(ours.step(&[row(single, token, at, Pick::Logits)]).remove(0))
    };
    let want: Vec<Vec<f32>> = tokens
        .iter()
        .enumerate()
        .map(|(at, token)| one(&mut ours, *token, length + at))
        .collect();
    let mut rows = vec![row(others[0], 7, 20, Pick::Token(TokenChoice::default()))];
    for (at, token) in tokens.iter().enumerate() {
        rows.push(row(drafted, *token, length + at, Pick::Logits));
    }
    rows.push(row(others[1], 7, 23, Pick::Token(TokenChoice::default())));
    ours.begin_step(&rows);
    let got: Vec<Vec<f32>> = ours.step(&rows)[1..6].iter().cloned().map(logits).collect();
    let what = format!("{name}, {kv_cache:?}, {length} tokens");
    assert!(got == want, "{what}: rows of a sequence differ from steps");
    for slot in [single, drafted] {
        ours.truncate(slot, length + 2);
    }
    let again = [
        row(drafted, 11, length + 2, Pick::Logits),
        row(drafted, 12, length + 3, Pick::Logits),
    ];
    let got: Vec<Vec<f32>> = ours.step(&again).into_iter().map(logits).collect();
    let one = |ours: &mut ServingDecoder<Cuda>, token, at| {
        logits(ours.step(&[row(single, token, at, Pick::Logits)]).remove(0))
    };
    let want = [
        one(&mut ours, 11, length + 2),
        one(&mut ours, 12, length + 3),
    ];
    assert!(got == want, "{what}: what was taken back is still seen");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_drafted_row_is_penalised_for_what_is_before_it_alone() {
    let device = device();
    let config = RandomSize::Tiny.config(None).unwrap();
    let model = model(&config, &device);
    let mut ours = paged(&model, &config, &LIMITS);
    let prompt = ids(0..90);
    let slot = ours.start(AdapterId::BASE, 0);
    prefill(&mut ours, slot, &prompt, 0, 64);
    let choice = |uniform| {
        let kind = SamplingConfig {
            temperature: if uniform == 0.0 { 0.0 } else { 0.7 },
            repetition_penalty: 1.6,
            ..SamplingConfig::default()
        };
        TokenChoice::new(&kind, uniform)
    };
    let mut held = prompt.clone();
    for (round, uniform) in [0.0, 0.31, 0.62, 0.0, 0.9].into_iter().enumerate() {
        let tokens = [5 + round as u32, 400, 401, 5 + round as u32];
        let rows = |pick: &dyn Fn() -> Pick| -> Vec<StepRow> {
            let places = tokens.iter().enumerate();
            places
                .map(|(at, token)| row(slot, *token, held.len() + at, pick()))
                .collect()
        };
        let seen_logits: Vec<Vec<f32>> = ours
            .step(&rows(&|| Pick::Logits))
            .into_iter()
            .map(logits)
            .collect();
        ours.truncate(slot, held.len());
        let chosen = ours.step(&rows(&|| Pick::Token(choice(uniform))));
        for (at, (found, logits)) in chosen.into_iter().zip(&seen_logits).enumerate() {
            let seen: HashSet<u32> = held.iter().chain(&tokens[..=at]).copied().collect();
            let want = choice(uniform).token(logits, &seen);
            assert_eq!(found, Stepped::Token(Some(want)), "round {round}, row {at}");
        }
        // One drafted token was right.
        held.extend(&tokens[..2]);
        ours.truncate(slot, held.len());
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn drafted_text_is_the_same_token_for_token() {
    let device = device();
    let config = RandomSize::Tiny.config(None).unwrap();
    let floats = model(&config, &device);
    let [int4, _] = quantised_pair(&config, "int4", &device);
    for (name, model) in [("bf16", floats), ("int4", int4)] {
        for temperature in [0.0, 0.5] {
            let settings = |drafts: Option<Drafts>, seed| GenerationConfig {
                max_new_tokens: 40,
                stop_on_repetition: false,
                sampling: SamplingConfig {
                    temperature,
                    seed,
                    ..SamplingConfig::default()
                },
                drafts,
                ..GenerationConfig::default()
            };
            let answer = |prompt: &Prompt, drafts: Option<Drafts>, seed| {
                let one = std::slice::from_ref(prompt);
                let settings = settings(drafts, seed);
                let (mut answers, timing) =
                    generate(&model, &config, one, &settings, &device, &mut |_, _| None).unwrap();
                (answers.remove(0).token_ids, timing.drafts)
            };
            let nothing = Drafts {
                most: 0,
                ..Drafts::default()
            };
            let (mut counts, mut other_kernels) = (DraftCounts::default(), 0);
            for at in 0..20u32 {
                let prompt = Prompt {
                    input_ids: ids(at..at + 30 + 7 * at),
                    images: Default::default(),
                };
                let (want, none) = answer(&prompt, Some(nothing.clone()), u64::from(at));
                assert_eq!(none.drafted, 0);
                let mut texts = vec![want.clone()];
                texts[0][13] = 3;
                let drafts = Drafts::from_store(DraftStore::new(&texts));
                let (got, some) = answer(&prompt, Some(drafts), u64::from(at));
                assert_eq!(got, want, "{name} at {temperature}, prompt {at}");
                counts.add(some);
                let (batch, _) = answer(&prompt, None, u64::from(at));
                other_kernels += usize::from(batch != want);
            }
            println!(
                "{name} at {temperature}: {counts:?}; {other_kernels} of 20 differ from the matrix-vector step"
            );
            assert!(counts.accepted > 300, "{counts:?}");
            // Of quantised weights every kernel sums in one order.
            assert!(name == "bf16" || other_kernels == 0);
        }
    }
}
