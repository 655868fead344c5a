//! Checkpoints and adapters: read in every layout, saved, in half types.

use super::*;

#[test]
fn untied_checkpoint_in_the_newer_layout() {
    check_sequences(&load("model-tiny"), "text.safetensors", "model-tiny");
}

#[test]
fn tied_checkpoint_in_the_published_layout() {
    check_sequences(
        &load("model-tiny-tied"),
        "tied.safetensors",
        "model-tiny-tied",
    );
}

#[test]
fn sharded_bf16_checkpoint_through_its_index() {
    check_sequences(
        &load("model-tiny-sharded-bf16"),
        "sharded_bf16.safetensors",
        "model-tiny-sharded-bf16",
    );
}

#[test]
fn merged_checkpoint() {
    check_sequences(&load("merged"), "merged.safetensors", "merged");
}

#[test]
fn adapter_unmerged_and_merged() {
    let Loaded { config, model } = load("model-tiny");
    let (adapted, _) = load_adapter(model, &fixtures().join("adapter")).unwrap();
    let unmerged = Loaded {
        config: config.clone(),
        model: adapted.clone(),
    };
    check_sequences(&unmerged, "lora_forward.safetensors", "unmerged adapter");
    let merged = Loaded {
        config,
        model: merge(adapted),
    };
    check_sequences(&merged, "merged.safetensors", "adapter merged here");
    check_sequences(&merged, "lora_forward.safetensors", "adapter merged here");
}

#[test]
fn adapter_under_the_config_that_ms_swift_writes() {
    let Loaded { config, model } = load("model-tiny");
    let lora = LoraConfig::from_dir(&fixtures().join("adapter_dropout_cfg")).unwrap();
    assert!(lora.lora_dropout > 0.0);
    let model = load_adapter_tensors(model, &lora, &fixtures().join("adapter")).unwrap();
    check_sequences(
        &Loaded { config, model },
        "lora_forward.safetensors",
        "dropout config",
    );
}

#[test]
fn saving_keeps_every_bit_in_one_file_and_in_shards() {
    for name in ["model-tiny", "model-tiny-tied"] {
        let Loaded { config, model } = load(name);
        let all: Vec<f32> = flat(&model);
        for max_shard_bytes in [usize::MAX, 100_000] {
            let dir = tempfile::tempdir().unwrap();
            save_checkpoint(&model, dir.path(), max_shard_bytes).unwrap();
            std::fs::write(
                dir.path().join("config.json"),
                config.to_published_json("float32"),
            )
            .unwrap();
            let (again, config_again) = load_from(dir.path().to_path_buf());
            assert_eq!(config_again, config, "{name}");
            assert_eq!(flat(&again), all, "{name}, shards of {max_shard_bytes}");
        }
    }
}

/// The keys are the paths of the modules' parameters, so Burn's own reader needs no list of them.
#[test]
fn checkpoints_are_what_burn_store_reads() {
    for name in ["model-tiny", "model-tiny-tied"] {
        let Loaded { config, model } = load(name);
        let dir = tempfile::tempdir().unwrap();
        save_checkpoint(&model, dir.path(), usize::MAX).unwrap();
        let mut store = SafetensorsStore::from_file(dir.path().join("model.safetensors"));
        let mut again = Qwen3Vl::<B>::new(&config, &InitOptions::default(), &device());
        let result = again.load_from(&mut store).unwrap();
        assert!(result.missing.is_empty(), "{:?}", result.missing);
        assert!(result.unused.is_empty(), "{:?}", result.unused);
        assert_eq!(flat(&again), flat(&model), "{name}");
    }
}

fn flat(model: &Qwen3Vl<B>) -> Vec<f32> {
    xray_qwen3vl::qwen3_vl::weights::lazy_tensors(model)
        .iter()
        .flat_map(|tensor| (tensor.data)().to_vec::<f32>().unwrap())
        .collect()
}

#[test]
#[cfg(not(feature = "wgpu"))]
fn half_types_load_save_and_answer_alike() {
    let full = load("model-tiny");
    let reference = Reference::open("text.safetensors");
    let images = images_of(&sequence_images("one_image"));
    let ids = reference.id_rows("one_image.input_ids").remove(0);
    let input = single(ids, &images.image_grid_thw, &full.config);
    let want = reference.f32s("one_image.logits");
    let read = |dir: &std::path::Path, dtype| {
        let options = InitOptions {
            dtype,
            ..InitOptions::default()
        };
        let mut model = Qwen3Vl::<B>::new(&full.config, &options, &device());
        load_checkpoint(&mut model, dir, dtype, &mut |_, _| {}).unwrap();
        model
    };
    let bytes = |model: &Qwen3Vl<B>| -> Vec<u8> {
        let tensors = xray_qwen3vl::qwen3_vl::weights::lazy_tensors(model);
        tensors
            .iter()
            .flat_map(|tensor| (tensor.data)().bytes.to_vec())
            .collect()
    };
    // Weights and activations keep 8 and 11 significant bits; errors grow over eight layers.
    for (dtype, tolerance) in [(DType::BF16, 6e-2), (DType::F16, 8e-3)] {
        let half = read(&fixtures().join("model-tiny"), dtype);
        let dir = tempfile::tempdir().unwrap();
        save_checkpoint(&half, dir.path(), usize::MAX).unwrap();
        assert_eq!(
            bytes(&read(dir.path(), dtype)),
            bytes(&half),
            "{dtype:?} round trip"
        );
        let logits = half.forward(&input, &images, &full.config, &device());
        assert_eq!(logits.dtype(), DType::F32);
        let distance = crate::support::relative_distance(&values(logits), &want);
        assert!(
            distance < tolerance,
            "{dtype:?}: relative distance {distance}"
        );
        // A half-type file read as f32 gives the same numbers as the half-type model holds.
        let wide = read(dir.path(), DType::F32);
        let logits = wide.forward(&input, &images, &full.config, &device());
        let distance = crate::support::relative_distance(&values(logits), &want);
        assert!(
            distance < tolerance,
            "{dtype:?} as f32: relative distance {distance}"
        );
    }
}
