//! Answers with drafts against those without.

use std::path::PathBuf;

use burn::tensor::DType;
use burn_flex::Flex;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::runtime::{
    generate::{SamplingConfig, drafts::DraftStore, generate},
    pipeline::{Pipeline, PipelineOptions},
    synthetic::weights::{RandomSize, draw},
};

type Model = (Qwen3Vl<Flex>, Qwen3VlConfig);

fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn tiny() -> Pipeline<Flex> {
    let options = PipelineOptions::new(repository("model/tiny"), DType::F32);
    Pipeline::load(&options, Default::default(), &mut |_, _| {}).unwrap()
}

/// Two layers of width 128 whose logits differ well.
fn random_model(vocab: usize) -> Model {
    let mut config = RandomSize::Tiny.config(None).unwrap();
    config.text_config.vocab_size = vocab;
    let model = draw::<Flex>(&config, 3, DType::F32, None, &Default::default());
    (model, config)
}

fn answers(
    (model, config): (&Qwen3Vl<Flex>, &Qwen3VlConfig),
    prompts: &[Prompt],
    settings: &GenerationConfig,
) -> (Vec<Generation>, Timing) {
    generate(
        model,
        config,
        prompts,
        settings,
        &Default::default(),
        &mut |_, _| None,
    )
    .unwrap()
}

fn text_prompt(input_ids: Vec<u32>) -> Prompt {
    Prompt {
        input_ids,
        images: Default::default(),
    }
}

fn random_prompts(count: usize, vocab: u32, lengths: std::ops::Range<usize>) -> Vec<Prompt> {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut one = || {
        let length = random.random_range(lengths.clone());
        text_prompt((0..length).map(|_| random.random_range(0..vocab)).collect())
    };
    (0..count).map(|_| one()).collect()
}

/// A store with every other answer, so that some drafts are right, some go wrong and some are unknown.
fn store(answers: &[Generation]) -> Drafts {
    let texts: Vec<Vec<u32>> = answers
        .iter()
        .step_by(2)
        .map(|answer| answer.token_ids.clone())
        .collect();
    Drafts::from_store(DraftStore::new(&texts))
}

/// Most tokens of an answer, another one for each prompt: many end inside of a draft.
fn of_length(settings: &GenerationConfig, place: usize) -> GenerationConfig {
    GenerationConfig {
        max_new_tokens: 1 + place % 20,
        ..settings.clone()
    }
}

/// Against the tiny model that comes with the program, and its own true answers.
#[test]
fn greedy_text_is_the_same_on_a_thousand_prompts() {
    let pipeline = tiny();
    let model = (&pipeline.model, &pipeline.parts.config);
    let plain = GenerationConfig {
        stop_on_repetition: false,
        ..GenerationConfig::default()
    };
    let mut prompts = random_prompts(990, 1000, 3..30);
    // Across the end of the first buffer of the cache, whose blocks have 256 tokens.
    prompts.extend(random_prompts(10, 1000, 236..262));
    let want: Vec<Generation> = prompts
        .iter()
        .enumerate()
        .map(|(at, prompt)| {
            let one = std::slice::from_ref(prompt);
            answers(model, one, &of_length(&plain, at)).0.remove(0)
        })
        .collect();
    let drafted = GenerationConfig {
        drafts: Some(store(&want)),
        ..plain
    };
    let (mut counts, mut different) = (Timing::default().drafts, Vec::new());
    for (at, (prompt, want)) in prompts.iter().zip(&want).enumerate() {
        let one = std::slice::from_ref(prompt);
        let (mut got, timing) = answers(model, one, &of_length(&drafted, at));
        counts.add(timing.drafts);
        if got.remove(0) != *want {
            different.push(at);
        }
    }
    assert!(different.is_empty(), "{different:?}");
    assert!(
        counts.accepted > 1000 && counts.drafted > counts.accepted,
        "{counts:?}"
    );
    assert!(counts.steps < counts.tokens * 3 / 4, "{counts:?}");
}

/// About text that it knows, the tiny model ends its answers itself.
#[test]
fn an_end_token_inside_of_a_draft_ends_the_answer() {
    let pipeline = tiny();
    let model = (&pipeline.model, &pipeline.parts.config);
    let plain = GenerationConfig {
        eos_token_ids: pipeline.parts.eos_token_ids.clone(),
        ..GenerationConfig::default()
    };
    let mut ended = 0;
    for (at, prompt) in random_prompts(60, 1000, 3..30).iter().enumerate() {
        let one = std::slice::from_ref(prompt);
        let settings = of_length(&plain, 19);
        let (want, _) = answers(model, one, &settings);
        let mut text = want[0].token_ids.clone();
        if at % 3 == 0 {
            // What is drafted goes on after the end.
            text.extend([1, 2, 3]);
        }
        let drafted = GenerationConfig {
            drafts: Some(Drafts::from_store(DraftStore::new(&[text]))),
            ..settings
        };
        let (got, _) = answers(model, one, &drafted);
        assert_eq!(got, want, "{at}");
        ended += usize::from(got[0].finish_reason == FinishReason::Stop);
    }
    assert!(ended > 10, "{ended}");
}

#[test]
fn images_batches_and_an_early_end_change_nothing() {
    let pipeline = tiny();
    let model = (&pipeline.model, &pipeline.parts.config);
    let demo = pipeline
        .parts
        .images
        .load(&repository("data/sample/demo.png"))
        .unwrap();
    let image = pipeline.parts.image_input(&demo).unwrap();
    let questions = ["这张胸片有什么异常？", "写一份报告。", "心影是否增大？"];
    let prompts: Vec<Prompt> = questions
        .iter()
        .enumerate()
        .map(|(at, question)| {
            let images = if at == 1 {
                Default::default()
            } else {
                image.clone()
            };
            pipeline.parts.prompt(None, question, images).unwrap()
        })
        .collect();
    // Beyond their own end, so that there is much to draft.
    let plain = GenerationConfig {
        max_new_tokens: 48,
        ..GenerationConfig::default()
    };
    let (want, _) = answers(model, &prompts, &plain);
    let drafted = GenerationConfig {
        drafts: Some(store(&want)),
        ..plain
    };
    let (got, timing) = answers(model, &prompts, &drafted);
    assert_eq!(got, want);
    assert!(timing.drafts.accepted > 10, "{:?}", timing.drafts);
    let tokens: usize = want.iter().map(|one| one.token_ids.len() - 1).sum();
    assert_eq!(
        (timing.decoded_tokens, timing.drafts.tokens),
        (tokens, tokens)
    );
    // Whoever wants no more after some tokens gets just these.
    let mut seen = 0;
    let (cut, _) = generate(
        model.0,
        model.1,
        &prompts[..1],
        &drafted,
        &Default::default(),
        &mut |_, _| {
            seen += 1;
            (seen == 5).then_some(FinishReason::Cancelled)
        },
    )
    .unwrap();
    assert_eq!(cut[0].token_ids, want[0].token_ids[..5]);
    assert_eq!(cut[0].finish_reason, FinishReason::Cancelled);
}

#[test]
fn a_seed_gives_the_same_sample_with_every_filter() {
    let (model, config) = random_model(300);
    let prompts = random_prompts(24, 300, 3..20);
    let base = SamplingConfig {
        temperature: 0.02,
        seed: 5,
        ..SamplingConfig::default()
    };
    let kinds = [
        base.clone(),
        SamplingConfig {
            top_k: 5,
            top_p: 0.9,
            ..base.clone()
        },
        SamplingConfig {
            min_p: 0.05,
            repetition_penalty: 1.2,
            ..base.clone()
        },
        SamplingConfig {
            temperature: 0.0,
            repetition_penalty: 1.1,
            ..base.clone()
        },
    ];
    let mut counts = Timing::default().drafts;
    for sampling in kinds {
        let plain = GenerationConfig {
            max_new_tokens: 20,
            sampling,
            stop_on_repetition: false,
            ..GenerationConfig::default()
        };
        for prompt in &prompts {
            let one = std::slice::from_ref(prompt);
            let (want, _) = answers((&model, &config), one, &plain);
            let drafted = GenerationConfig {
                drafts: Some(store(&want)),
                ..plain.clone()
            };
            let (got, timing) = answers((&model, &config), one, &drafted);
            assert_eq!(got, want, "{:?}", plain.sampling);
            counts.add(timing.drafts);
        }
    }
    assert!(counts.accepted > 500, "{counts:?}");
}

/// The third token of samples, whose chances are added up over all ways there.
#[test]
fn samples_are_distributed_as_the_model_says() {
    const VOCAB: usize = 7;
    let (model, config) = random_model(VOCAB);
    let prompt = vec![3, 1, 4];
    let temperature = 0.3;
    let chances = |ids: &[u32]| -> Vec<f64> {
        let mut engine = PlainDecoder::new(model.clone(), config.clone(), Default::default());
        let slot = engine.start(AdapterId::BASE, 0);
        let mut boxed = Box::new(engine) as ServingDecoder<Flex>;
        let prompt = text_prompt(ids.to_vec());
        let (logits, _) = prefill(&mut boxed, slot, &prompt, None, &config, 100).unwrap();
        let weights: Vec<f64> = logits
            .iter()
            .map(|one| f64::from(one / temperature).exp())
            .collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / sum).collect()
    };
    let mut expected = [0.0; VOCAB];
    let mut likeliest = (0.0, Vec::new());
    for (first, p) in chances(&prompt).into_iter().enumerate() {
        let with_first = [&prompt[..], &[first as u32]].concat();
        for (second, q) in chances(&with_first).into_iter().enumerate() {
            let both = [&with_first[..], &[second as u32]].concat();
            for (third, r) in chances(&both).into_iter().enumerate() {
                expected[third] += p * q * r;
                if p * q * r > likeliest.0 {
                    likeliest = (p * q * r, vec![first as u32, second as u32, third as u32]);
                }
            }
        }
    }
    let drafts = Some(Drafts::from_store(DraftStore::new(&[likeliest.1])));
    let draws = 3000;
    let mut found = [0.0; VOCAB];
    let mut accepted = 0;
    for seed in 0..draws {
        let settings = GenerationConfig {
            max_new_tokens: 3,
            sampling: SamplingConfig {
                temperature,
                seed,
                ..SamplingConfig::default()
            },
            drafts: drafts.clone(),
            stop_on_repetition: false,
            ..GenerationConfig::default()
        };
        let (answer, timing) =
            answers((&model, &config), &[text_prompt(prompt.clone())], &settings);
        accepted += timing.drafts.accepted;
        found[answer[0].token_ids[2] as usize] += 1.0;
    }
    assert!(accepted > 50, "{accepted}");
    let chi_squared: f64 = expected
        .iter()
        .zip(found)
        .map(|(chance, found)| (found - chance * draws as f64).powi(2) / (chance * draws as f64))
        .sum();
    // Six degrees of freedom: above 22.5 once in a thousand.
    assert!(chi_squared < 22.5, "{chi_squared}: {found:?}, {expected:?}");
}

/// The engine's own part: rows of one slot, and what is taken back.
#[test]
fn rows_of_a_slot_are_its_tokens_one_after_another() {
    let (model, config) = random_model(300);
    let mut engine = PlainDecoder::new(model, config.clone(), Default::default());
    let mut slots: Vec<SlotId> = (0..2).map(|_| engine.start(AdapterId::BASE, 0)).collect();
    let mut boxed = Box::new(engine) as ServingDecoder<Flex>;
    for (slot, length) in slots.iter().zip([254, 12]) {
        let prompt = text_prompt((0..length).collect());
        prefill(&mut boxed, *slot, &prompt, None, &config, 100).unwrap();
    }
    let row = |slot, token, position| StepRow {
        slot,
        token,
        position,
        pick: Pick::Logits,
    };
    let logits = |stepped: Vec<Stepped>| -> Vec<Vec<f32>> {
        let one = |stepped| match stepped {
            Stepped::Logits(logits) => logits,
            Stepped::Token(_) => panic!("logits were requested"),
        };
        stepped.into_iter().map(one).collect()
    };
    let tokens = [9, 8, 7, 6, 5];
    // One by one in a copy.
    slots.push(boxed.fork(slots[0], 254, 0));
    let alone: Vec<Vec<f32>> = tokens
        .iter()
        .zip(254..)
        .map(|(token, position)| logits(boxed.step(&[row(slots[2], *token, position)])).remove(0))
        .collect();
    let mut together: Vec<StepRow> = tokens
        .iter()
        .zip(254..)
        .map(|(token, position)| row(slots[0], *token, position))
        .collect();
    together.extend([row(slots[1], 3, 12), row(slots[1], 4, 13)]);
    let close = |got: &[f32], want: &[f32]| {
        let different = got
            .iter()
            .zip(want)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        let largest = want
            .iter()
            .fold(0.0f32, |largest, one| largest.max(one.abs()));
        // Sums of other shapes are rounded elsewhere.
        assert!(different <= 1e-5 * largest, "{different} of {largest}");
        println!("largest difference {different:e} of {largest}");
    };
    let all = logits(boxed.step(&together));
    assert_eq!(all.len(), 7);
    for (got, want) in all.iter().zip(&alone) {
        close(got, want);
    }
    // Two were right: the rest is written again.
    boxed.truncate(slots[0], 256);
    boxed.truncate(slots[2], 256);
    let again = [row(slots[0], 200, 256), row(slots[0], 201, 257)];
    let got = logits(boxed.step(&again));
    for (at, got) in got.iter().enumerate() {
        let alone = row(slots[2], 200 + at as u32, 256 + at as i64);
        close(got, &logits(boxed.step(&[alone]))[0]);
    }
}
