//! Adapters of every kind that PEFT saves: read, attached and merged, against PEFT's logits.

use std::path::{Path, PathBuf};

use xray_qwen3vl::{
    adapters::lora::{
        files::{Adapted, attach_adapter, load_adapter_for_training},
        merge::merge,
    },
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        weights::{lazy_tensors, save_checkpoint},
    },
};

use crate::{
    backend::{TestBackend as B, device},
    model::{Loaded, images_of, load, load_from, sequence_images, single},
    support::{Reference, assert_close, values},
};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapters")
}

/// Case by case: its name, its base, and how far its adapter moves the logits.
fn cases() -> Vec<(String, String, f32)> {
    let text = std::fs::read_to_string(folder().join("cases.json")).unwrap();
    let tree: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    tree.into_iter()
        .map(|(name, facts)| {
            let base = facts["base"].as_str().unwrap().to_owned();
            let moves = facts["moves"].as_f64().unwrap() as f32;
            (name, base, moves)
        })
        .collect()
}

/// The rows of the prompt's logits that the fixture holds.
fn logits(model: &Qwen3Vl<B>, config: &Qwen3VlConfig, rows: usize) -> Vec<f32> {
    let reference = Reference::open("text.safetensors");
    let images = images_of(&sequence_images("one_image"));
    let ids = reference.id_rows("one_image.input_ids").remove(0);
    let every = (ids.len() - 1) / (rows - 1);
    let input = single(ids, &images.image_grid_thw, config);
    let logits = model.forward(&input, &images, config, &device());
    let width = logits.dims()[1];
    let all = values(logits);
    all.chunks(width)
        .step_by(every)
        .flatten()
        .copied()
        .collect()
}

fn largest(ours: &[f32], want: &[f32]) -> f32 {
    ours.iter()
        .zip(want)
        .fold(0.0, |far, (a, b)| far.max((a - b).abs()))
}

/// Sums of some 1,500 products in another order, over logits of some 10: measured 2e-5 at most. PEFT's own merge is as far
/// from its attached adapter (`cases.json`).
const TOLERANCE: f32 = 1e-4;

#[test]
fn every_kind_gives_pefts_logits_attached_merged_and_written() {
    let reference = Reference::at(&folder().join("logits.safetensors"));
    let all = cases();
    assert!(all.len() > 40);
    for (name, base, moves) in all {
        assert!(moves > 0.1, "{name}: the adapter does nothing");
        let Loaded { model, config } = load(&base);
        let want = reference.f32s(&name);
        let rows = reference.shape(&name)[0];
        let adapted = attach_adapter(model, &folder().join(&name))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let attached = logits(&adapted.model, &config, rows);
        assert_close(&name, &attached, &want, TOLERANCE, TOLERANCE);
        let merged = merge(adapted.model);
        let ours = logits(&merged, &config, rows);
        assert_close(
            &format!("{name} merged"),
            &ours,
            &want,
            TOLERANCE,
            TOLERANCE,
        );
        println!(
            "| {name} | {base} | {moves:.2} | {:.1e} | {:.1e} |",
            largest(&attached, &want),
            largest(&ours, &want)
        );
        if name == "lora_bias_without" {
            // A checkpoint has no place for these biases; `merge` refuses.
            continue;
        }
        // The file of a merged model is one of its kind: nothing left over, nothing missing.
        let dir = tempfile::tempdir().unwrap();
        save_checkpoint(&merged, dir.path(), usize::MAX).unwrap();
        let config = Qwen3VlConfig {
            tie_word_embeddings: config.tie_word_embeddings && merged.lm_head.is_none(),
            ..config
        };
        let text = config.to_published_json("float32");
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        let (again, _) = load_from::<B>(dir.path().to_path_buf());
        assert_eq!(
            lazy_tensors(&again).len(),
            lazy_tensors(&merged).len(),
            "{name}"
        );
        assert_eq!(logits(&again, &config, rows), ours, "{name} written");
    }
}

fn adapted(name: &str) -> Adapted<B> {
    let base = cases()
        .into_iter()
        .find(|(case, ..)| case == name)
        .unwrap()
        .1;
    attach_adapter(load(&base).model, &folder().join(name)).unwrap()
}

#[test]
fn what_is_read_otherwise_than_named_is_noted() {
    for (name, piece) in [
        ("no_prefix", "another layout"),
        ("older_text", "`base_model.model.language_model.model."),
        ("older_towers", "another layout"),
        ("pissa", "the difference of the two"),
        (
            "head_other_base",
            "differs from the base's `lm_head.weight`",
        ),
        ("tied_head", "one table"),
    ] {
        let notes = adapted(name).notes.join("\n");
        assert!(notes.contains(piece), "{name}: {notes}");
    }
    // PEFT's copy of the base's own head says nothing.
    for name in ["plain", "head", "embedding", "tied_ensured"] {
        assert_eq!(adapted(name).notes, Vec::<String>::new(), "{name}");
    }
}

#[test]
fn what_changes_the_base_is_named_and_not_trained_on() {
    for (name, text, changed) in [
        ("plain", false, None),
        ("head", false, None),
        ("tied_head", false, None),
        (
            "proj",
            false,
            Some("`model.visual.patch_embed.proj.weight` by `target_modules`"),
        ),
        ("bias_all", false, Some("by `bias`")),
        ("lora_bias", false, Some("by `lora_bias`")),
        ("saved_merger", false, Some("by `modules_to_save`")),
        (
            "saved_head",
            true,
            Some("`lm_head.weight` by `modules_to_save`"),
        ),
        (
            "embedding",
            true,
            Some("embed_tokens.weight` by `target_modules`"),
        ),
        ("tokens", true, Some("by `trainable_token_indices`")),
        ("pissa", false, None),
    ] {
        let adapted = adapted(name);
        assert_eq!(adapted.changes_text, text, "{name}");
        let all: Vec<String> = adapted.changed.iter().map(ToString::to_string).collect();
        let all = all.join(", ");
        assert_eq!(
            adapted.changed.is_empty(),
            changed.is_none(),
            "{name}: {all}"
        );
        assert!(all.contains(changed.unwrap_or_default()), "{name}: {all}");
        let base = cases()
            .into_iter()
            .find(|(case, ..)| case == name)
            .unwrap()
            .1;
        let model = load(&base).model;
        let trained = load_adapter_for_training(model, &folder().join(name), 0.0);
        match (name, trained) {
            (name, trained) if is_trained_on(name) => assert!(trained.is_ok(), "{name}"),
            (_, Ok(_)) => panic!("{name} is trained on"),
            (_, Err(error)) => {
                let error = error.to_string();
                assert!(error.contains("merge --adapter"), "{name}: {error}");
            }
        }
    }
}

/// Whether an adapter has only what is trained: low-rank matrices of linear layers, and whole modules.
fn is_trained_on(name: &str) -> bool {
    ["plain", "head", "tied_head"].contains(&name) || name.starts_with("saved_")
}

/// Why an adapter is not taken.
fn refusal(dir: &Path) -> String {
    match attach_adapter(load("model-tiny").model, dir) {
        Ok(_) => panic!("{} is taken", dir.display()),
        Err(error) => error.to_string(),
    }
}

/// Copies a case and edits its config.
fn edited(name: &str, edit: impl FnOnce(&mut serde_json::Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(folder().join(name).join(file), dir.path().join(file)).unwrap();
    }
    let path = dir.path().join("adapter_config.json");
    let mut tree = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut tree);
    std::fs::write(path, tree.to_string()).unwrap();
    dir
}

#[test]
fn a_file_that_its_config_contradicts_is_refused_by_name() {
    type Edit = fn(&mut serde_json::Value);
    let cases: [(&str, Edit, &[&str]); 9] = [
        (
            "plain",
            |tree| tree["modules_to_save"] = serde_json::json!(["lm_head"]),
            &["lm_head.weight` is missing", "modules_to_save"],
        ),
        (
            "plain",
            |tree| tree["trainable_token_indices"] = serde_json::json!([1]),
            &["trainable_tokens_delta` is missing"],
        ),
        (
            "tokens",
            |tree| tree["trainable_token_indices"] = serde_json::Value::Null,
            &["does not say which tokens"],
        ),
        (
            "tokens",
            |tree| tree["trainable_token_indices"] = serde_json::json!([10, 375, 384]),
            &["token 384"],
        ),
        (
            "tokens",
            |tree| tree["trainable_token_indices"] = serde_json::json!([10, 375, 10]),
            &["token 10 twice"],
        ),
        (
            "lora_bias",
            |tree| tree["lora_bias"] = false.into(),
            &["lora_B.bias", "`lora_bias` is not true"],
        ),
        (
            "conv_dora",
            |tree| tree["use_dora"] = false.into(),
            &["`use_dora` is false", "magnitudes"],
        ),
        (
            "plain",
            |tree| {
                tree["target_modules"] = serde_json::json!(["model.language_model.embed_tokens"])
            },
            &["holds nothing for it", "embed_tokens"],
        ),
        (
            "plain",
            |tree| tree["layers_to_transform"] = serde_json::json!([2]),
            &["layers.1.self_attn.q_proj", "do not match"],
        ),
    ];
    for (name, edit, pieces) in cases {
        let dir = edited(name, edit);
        let error = refusal(dir.path());
        for piece in pieces {
            assert!(error.contains(piece), "{name}: {error}");
        }
    }
    // Without the adapter as training began, the conversion is named.
    let dir = edited("pissa", |_| ());
    let error = refusal(dir.path());
    assert!(error.contains("pissa_init"), "{error}");
}
