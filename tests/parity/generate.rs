//! Greedy generation against the reference.

use serde_json::Value;
use xray_qwen3vl::{
    adapters::lora::{files::load_adapter, merge::merge},
    batch::positions::rope_index,
    runtime::{
        continuations::{continuation_log_probabilities, whole_log_probabilities},
        generate::{
            FinishReason, GenerateError, GenerationConfig, Prompt, PromptState, generate,
            generate_and_keep,
        },
    },
};

use crate::{
    backend::device,
    model::{Loaded, images_of, load, single},
    support::{Reference, assert_close, fixtures, json, values},
};

fn names(value: &Value) -> Vec<String> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap().to_string())
        .collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

fn settings(new: usize) -> GenerationConfig {
    GenerationConfig {
        max_new_tokens: new,
        stop_on_repetition: false,
        ..GenerationConfig::default()
    }
}

fn prompt(reference: &Reference, case: &str, images: &Value) -> Prompt {
    Prompt {
        input_ids: reference.id_rows(&format!("{case}.input_ids")).remove(0),
        images: images_of(&names(images)),
    }
}

fn check(loaded: &Loaded, part: &str, prompts: &[Prompt], want: &[Vec<u32>]) {
    let longest = want.iter().map(Vec::len).max().unwrap();
    let (results, _) = generate(
        &loaded.model,
        &loaded.config,
        prompts,
        &settings(longest),
        &device(),
        &mut |_, _| None,
    )
    .unwrap();
    for (row, (result, want)) in results.iter().zip(want).enumerate() {
        assert_eq!(&result.token_ids, want, "{part}, row {row}");
        assert_eq!(result.finish_reason, FinishReason::Length);
    }
}

#[test]
fn greedy_tokens_of_single_prompts() {
    let loaded = load("model-tiny");
    let reference = Reference::open("generate.safetensors");
    let cases = json("generate.json");
    for case in ["image", "text", "two"] {
        let prompt = prompt(&reference, case, &cases[case]["images"]);
        check(&loaded, case, &[prompt], &[ids(&cases[case]["new_ids"])]);
    }
}

#[test]
fn generation_ends_with_the_end_token() {
    let loaded = load("model-tiny");
    let reference = Reference::open("generate.safetensors");
    let case = &json("generate.json")["image_eos"];
    let settings = GenerationConfig {
        eos_token_ids: vec![case["eos_token_id"].as_u64().unwrap() as u32],
        ..settings(100)
    };
    let prompt = prompt(&reference, "image", &case["images"]);
    let mut streamed = Vec::new();
    let (results, _) = generate(
        &loaded.model,
        &loaded.config,
        &[prompt],
        &settings,
        &device(),
        &mut |_, token| {
            streamed.push(token);
            None
        },
    )
    .unwrap();
    let want = ids(&case["new_ids"]);
    assert_eq!(results[0].token_ids, want);
    assert_eq!(streamed, want[..want.len() - 1]);
    assert_eq!(results[0].finish_reason, FinishReason::Stop);
}

#[test]
fn rows_of_a_batch_equal_the_reference_and_the_row_alone() {
    let loaded = load("model-tiny");
    let reference = Reference::open("generate.safetensors");
    let cases = json("generate.json");
    let batch = &cases["batch"];
    let prompts: Vec<Prompt> = names(&batch["rows"])
        .iter()
        .map(|case| prompt(&reference, case, &cases[case.as_str()]["images"]))
        .collect();
    let want: Vec<Vec<u32>> = batch["new_ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(ids)
        .collect();
    check(&loaded, "batch", &prompts, &want);
    // Rows that end early leave the batch; the others must not notice.
    let eos = want[0][want[0].len() / 2];
    let with_eos = |prompts: &[Prompt]| {
        let settings = GenerationConfig {
            eos_token_ids: vec![eos],
            ..settings(24)
        };
        generate(
            &loaded.model,
            &loaded.config,
            prompts,
            &settings,
            &device(),
            &mut |_, _| None,
        )
        .unwrap()
        .0
    };
    let together = with_eos(&prompts);
    for (row, prompt) in prompts.iter().enumerate() {
        assert_eq!(
            together[row],
            with_eos(std::slice::from_ref(prompt))[0],
            "row {row}"
        );
    }
}

#[test]
fn greedy_tokens_of_the_tied_model() {
    let case = &json("generate.json")["tied_image"];
    let reference = Reference::open("tied.safetensors");
    let prompt = prompt(&reference, "gen_image", &case["images"]);
    check(
        &load("model-tiny-tied"),
        "tied",
        &[prompt],
        &[ids(&case["new_ids"])],
    );
}

#[test]
fn greedy_tokens_with_an_adapter_merged_and_not() {
    let Loaded { config, model } = load("model-tiny");
    let (model, _) = load_adapter(model, &fixtures().join("adapter")).unwrap();
    let reference = Reference::open("generate.safetensors");
    let case = &json("generate.json")["lora_image"];
    let prompt = prompt(&reference, "image", &case["images"]);
    let want = [ids(&case["new_ids"])];
    let unmerged = Loaded {
        config: config.clone(),
        model: model.clone(),
    };
    check(&unmerged, "adapter", std::slice::from_ref(&prompt), &want);
    check(
        &Loaded {
            config,
            model: merge(model),
        },
        "merged",
        &[prompt],
        &want,
    );
}

#[test]
fn logits_and_positions_of_every_step() {
    let Loaded { config, model } = load("model-tiny");
    let reference = Reference::open("generate.safetensors");
    let cases = json("generate.json");
    for case in ["image", "text", "two"] {
        let Prompt { input_ids, images } = prompt(&reference, case, &cases[case]["images"]);
        let steps = reference.shape(&format!("{case}.step_logits"))[1];
        let prompt_len = input_ids.len();
        let all: Vec<u32> = input_ids
            .into_iter()
            .chain(ids(&cases[case]["new_ids"]))
            .collect();
        let merge = config.vision_config.spatial_merge_size;
        let grids = &images.image_grid_thw;
        let (positions, _) = rope_index(&all, grids, config.image_token_id, merge).unwrap();
        for (step, want) in cases[case]["decode_positions"]
            .as_array()
            .unwrap()
            .iter()
            .enumerate()
        {
            let ours = positions
                .axes
                .clone()
                .map(|axis| axis[prompt_len - 1 + step]);
            let want: Vec<i64> = want
                .as_array()
                .unwrap()
                .iter()
                .map(|p| p.as_i64().unwrap())
                .collect();
            assert_eq!(ours.to_vec(), want, "{case}, position of step {step}");
        }
        let input = single(all, grids, &config);
        let logits = model.forward(&input, &images, &config, &device());
        let logits = values(logits.narrow(0, prompt_len - 1, steps));
        let want = reference.f32s(&format!("{case}.step_logits"));
        assert_close(&format!("{case} step logits"), &logits, &want, 1e-4, 1e-4);
    }
}

/// After the beginning of an answer the same holds, whatever comes later in the answer.
#[test]
fn continuations_after_an_answer_equal_whole_sequences() {
    let loaded = load("model-tiny");
    let reference = Reference::open("generate.safetensors");
    let cases = json("generate.json");
    let prompt = prompt(&reference, "two", &cases["two"]["images"]);
    let answer = ids(&cases["two"]["new_ids"]);
    let continuations = [vec![3, 5, 11, 2], vec![7], vec![9, 4]];
    let ends = [0, 2, answer.len()];
    let state = PromptState::of_prompt(&loaded.model, &loaded.config, &prompt, &device()).unwrap();
    let found = state
        .continuation_log_probabilities(
            &loaded.model,
            &loaded.config,
            &answer,
            &ends,
            &continuations,
            &device(),
        )
        .unwrap();
    for (end, found) in ends.iter().zip(&found) {
        let mut longer = prompt.clone();
        longer.input_ids.extend_from_slice(&answer[..*end]);
        let whole = whole_log_probabilities(
            &loaded.model,
            &loaded.config,
            &longer,
            &continuations,
            &device(),
        )
        .unwrap();
        for (row, (found, whole)) in found.iter().zip(&whole).enumerate() {
            assert_close(&format!("end {end}, row {row}"), found, whole, 2e-4, 0.0);
        }
    }
}

/// A prompt that was answered goes on from the keys and values of its answer's prefill, in a batch that is padded on the
/// left as well; the answers that were written in between do not change them.
#[test]
fn continuations_of_answered_prompts_equal_those_of_prompts() {
    let loaded = load("model-tiny");
    let reference = Reference::open("generate.safetensors");
    let cases = json("generate.json");
    let names = ["image", "text", "two"];
    let prompts: Vec<Prompt> = names
        .iter()
        .map(|case| prompt(&reference, case, &cases[case]["images"]))
        .collect();
    assert!(
        prompts
            .iter()
            .any(|prompt| prompt.input_ids.len() != prompts[0].input_ids.len())
    );
    let mut kept = Vec::new();
    generate_and_keep(
        &loaded.model,
        &loaded.config,
        &prompts,
        &settings(6),
        &device(),
        Some(&mut kept),
        &mut |_, _| None,
    )
    .unwrap();
    assert_eq!(kept.len(), prompts.len());
    let continuations = [vec![3, 5, 11, 2], vec![7], vec![9, 4]];
    let (answer, ends) = ([8, 13, 4], [0, 2]);
    for ((case, prompt), kept) in names.iter().zip(&prompts).zip(kept) {
        let plain =
            PromptState::of_prompt(&loaded.model, &loaded.config, prompt, &device()).unwrap();
        let [found, expected] = [kept, plain].map(|state| {
            state
                .continuation_log_probabilities(
                    &loaded.model,
                    &loaded.config,
                    &answer,
                    &ends,
                    &continuations,
                    &device(),
                )
                .unwrap()
        });
        for (end, (found, expected)) in found.iter().zip(&expected).enumerate() {
            for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
                let what = format!("{case}, end {end}, row {row}");
                assert_close(&what, found, expected, 2e-4, 0.0);
            }
        }
    }
}

/// Continuations share the prompt's cache, padded to one length; each equals the whole sequence alone. In f32 the two
/// add up the same products in another order: log-probabilities of some -12 agree to a few units in the last place of
/// the logits, and 2e-4 is what such sums differ by on every backend.
#[test]
fn continuations_of_one_prompt_equal_whole_sequences() {
    let loaded = load("model-tiny");
    let reference = Reference::open("generate.safetensors");
    let cases = json("generate.json");
    for case in ["image", "text", "two"] {
        let prompt = prompt(&reference, case, &cases[case]["images"]);
        let greedy = ids(&cases[case]["new_ids"]);
        // The model's own answer, parts of it, and tokens it would not take; one is empty.
        let mut continuations = vec![greedy.clone(), vec![7], Vec::new(), vec![3, 5, 11, 2]];
        continuations.extend((1..6).map(|length| greedy[greedy.len() - length..].to_vec()));
        let shared = continuation_log_probabilities(
            &loaded.model,
            &loaded.config,
            &prompt,
            &continuations,
            &device(),
        )
        .unwrap();
        let whole = whole_log_probabilities(
            &loaded.model,
            &loaded.config,
            &prompt,
            &continuations,
            &device(),
        )
        .unwrap();
        assert_eq!(shared.len(), continuations.len());
        for (row, (shared, whole)) in shared.iter().zip(&whole).enumerate() {
            assert_eq!(shared.len(), continuations[row].len());
            assert_close(&format!("{case}, row {row}"), shared, whole, 2e-4, 0.0);
            assert!(
                shared.iter().all(|value| *value <= 1e-6),
                "{case}, row {row}"
            );
        }
        // A greedy token is the likeliest: no other first token beats it.
        assert!(shared[0][0] >= shared[1][0] && shared[0][0] >= shared[3][0]);
        // One alone, where nothing is padded.
        let alone = continuation_log_probabilities(
            &loaded.model,
            &loaded.config,
            &prompt,
            &continuations[3..4],
            &device(),
        )
        .unwrap();
        assert_close(case, &alone[0], &shared[3], 2e-4, 0.0);
    }
}

#[test]
fn a_continuation_with_a_token_the_model_lacks_is_refused() {
    let loaded = load("model-tiny");
    let reference = Reference::open("generate.safetensors");
    let prompt = prompt(&reference, "text", &json("generate.json")["text"]["images"]);
    let vocab_size = loaded.config.text_config.vocab_size;
    let error = continuation_log_probabilities(
        &loaded.model,
        &loaded.config,
        &prompt,
        &[vec![1], vec![vocab_size as u32]],
        &device(),
    )
    .unwrap_err();
    assert!(
        matches!(error, GenerateError::UnknownToken { .. }),
        "{error}"
    );
}
