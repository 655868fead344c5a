//! `merge` and `plan`.

use std::path::{Path, PathBuf};

use xray_qwen3vl::qwen3_vl::weights::TensorFile;

use super::{repository, run, text};

fn fixture(name: &str) -> String {
    text(&repository().join("tests/fixtures/parity").join(name)).to_string()
}

/// `merge` of a base on the CPU into `folder/merged`.
fn merge(folder: &Path, base: &str, more: &[&str]) -> (i32, String, String) {
    let args = [
        "merge", "--device", "cpu", "--output", "merged", "--model", base,
    ];
    run(folder, &[&args[..], more].concat())
}

/// `merge` of a fixture base and the fixture adapter.
fn merge_adapter(folder: &Path, base: &str, more: &[&str]) -> (i32, String, String) {
    let adapter = fixture("adapter");
    merge(
        folder,
        &fixture(base),
        &[&["--adapter", &adapter], more].concat(),
    )
}

#[test]
fn merge_writes_what_peft_writes() {
    let folder = tempfile::tempdir().unwrap();
    let (code, stdout, stderr) = merge_adapter(folder.path(), "model-tiny", &[]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("differ from base plus adapter"), "{stdout}");
    let open = |path: &Path| TensorFile::open(&path.join("model.safetensors")).unwrap();
    let ours = open(&folder.path().join("merged"));
    let theirs = open(&repository().join("tests/fixtures/parity/merged"));
    assert_eq!(ours.shapes().unwrap(), theirs.shapes().unwrap());
    for name in theirs.shapes().unwrap().keys() {
        let read = |file: &TensorFile| -> Vec<f32> {
            let data = file.read(name, burn::tensor::DType::F32).unwrap();
            data.to_vec().unwrap()
        };
        for (a, b) in read(&ours).iter().zip(read(&theirs)) {
            // The sum of eight terms in another order.
            assert!((a - b).abs() < 1e-5, "{name}: {a} {b}");
        }
    }
}

/// A copy of a fixture folder, which tests may change.
fn copied(folder: &Path, name: &str) -> PathBuf {
    let to = folder.join("base");
    std::fs::create_dir(&to).unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
    to
}

#[test]
fn merge_keeps_the_type_of_the_base_and_copies_what_goes_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let base = copied(folder.path(), "model-tiny-sharded-bf16");
    let write = |name: &str, text: &str| std::fs::write(base.join(name), text).unwrap();
    let processor = r#"{"image_processor": {"image_mean": [0.4, 0.5, 0.6]}}"#;
    write("processor_config.json", processor);
    write("configuration.json", r#"{"framework": "pytorch"}"#);
    write("LICENSE", "Apache-2.0");
    write("trainer_state.json", "{}");
    let (code, stdout, stderr) = merge(folder.path(), text(&base), &[]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("BF16"), "{stdout}");
    let merged = folder.path().join("merged");
    let read = |name: &str| std::fs::read_to_string(merged.join(name)).unwrap_or_default();
    assert_eq!(read("processor_config.json"), processor);
    assert_eq!(read("configuration.json"), r#"{"framework": "pytorch"}"#);
    assert_eq!(read("LICENSE"), "Apache-2.0");
    for name in [
        "tokenizer.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    ] {
        assert_eq!(
            merged.join(name).is_file(),
            base.join(name).is_file(),
            "{name}"
        );
    }
    // Files of a run and of the old weights stay with them.
    for name in ["trainer_state.json", "model.safetensors.index.json"] {
        assert!(!merged.join(name).exists(), "{name}");
    }
}

#[test]
fn a_tied_checkpoint_with_a_head_of_its_own_keeps_it() {
    use burn::tensor::DType;
    use xray_qwen3vl::qwen3_vl::{
        config::Qwen3VlConfig,
        weights::{Head, head},
    };
    let folder = tempfile::tempdir().unwrap();
    let base = copied(folder.path(), "model-tiny-tied");
    let file = base.join("model.safetensors");
    let embedding = "model.language_model.embed_tokens.weight";
    let add_head = |change: u8| {
        let bytes = std::fs::read(Path::new(&fixture("model-tiny-tied")).join("model.safetensors"));
        let bytes = bytes.unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let view = tensors.tensor(embedding).unwrap();
        let mut head = view.data().to_vec();
        // The last byte of the last element: its sign and exponent.
        *head.last_mut().unwrap() ^= change;
        let mut all = tensors.tensors();
        let head = safetensors::tensor::TensorView::new(view.dtype(), view.shape().to_vec(), &head);
        all.push(("lm_head.weight".to_string(), head.unwrap()));
        std::fs::write(&file, safetensors::serialize(all, None).unwrap()).unwrap();
    };
    assert!(head(&base).unwrap() != Head::Own);
    add_head(0);
    assert!(head(&base).unwrap() != Head::Own);
    assert!(Qwen3VlConfig::from_dir(&base).unwrap().tie_word_embeddings);
    add_head(0x80);
    assert!(head(&base).unwrap() == Head::Own);
    assert!(!Qwen3VlConfig::from_dir(&base).unwrap().tie_word_embeddings);
    let (code, _, stderr) = merge(folder.path(), text(&base), &[]);
    assert_eq!(code, 0, "{stderr}");
    let merged = folder.path().join("merged");
    assert!(
        !Qwen3VlConfig::from_dir(&merged)
            .unwrap()
            .tie_word_embeddings
    );
    let read = |name: &str| {
        TensorFile::open(&merged.join("model.safetensors"))
            .unwrap()
            .read(name, DType::F32)
            .unwrap()
    };
    let (head, table) = (read("lm_head.weight"), read(embedding));
    let (head, table): (Vec<f32>, Vec<f32>) = (head.to_vec().unwrap(), table.to_vec().unwrap());
    assert_eq!(head.last().unwrap(), &-table.last().unwrap());
    // Quantised, it stays a head of its own as well.
    let args = [
        "quantize",
        "--bits",
        "8",
        "--device",
        "cpu",
        "--model",
        text(&base),
        "--output",
        "packed",
    ];
    let (code, _, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        !Qwen3VlConfig::from_dir(&folder.path().join("packed"))
            .unwrap()
            .tie_word_embeddings
    );
}

#[test]
fn merge_in_a_half_type_is_proven_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let (code, stdout, stderr) = merge_adapter(folder.path(), "model-tiny", &["--dtype", "bf16"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("BF16"), "{stdout}");
    let size = |path: &Path| path.join("model.safetensors").metadata().unwrap().len();
    let halved = size(&folder.path().join("merged"));
    assert!(halved * 2 < size(&repository().join("tests/fixtures/parity/merged")) + 20_000);
}

#[test]
fn merge_refuses_another_base_and_an_output_that_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let (code, stdout, stderr) = merge_adapter(folder.path(), "model-tiny-tied", &[]);
    assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
    assert!(stderr.contains("another base model"), "{stderr}");
    assert_eq!(
        folder.path().read_dir().unwrap().count(),
        0,
        "something was left"
    );
    std::fs::create_dir(folder.path().join("merged")).unwrap();
    let (code, _, stderr) = merge(folder.path(), &fixture("model-tiny"), &[]);
    assert_eq!(code, 2, "{stderr}");
}

#[test]
fn plan_tells_parameters_memory_steps_tokens_and_time() {
    let (code, stdout, stderr) = run(
        repository(),
        &[
            "plan",
            "--config",
            "configs/tiny.toml",
            "--samples-per-second",
            "50",
        ],
    );
    assert_eq!(code, 0, "{stderr}");
    for word in [
        "parameters",
        "trained",
        "together",
        "steps",
        "tokens of a sample",
        "time",
    ] {
        assert!(stdout.contains(word), "{word} is missing in: {stdout}");
    }
}

#[test]
fn plan_follows_flags_benches_and_devices() {
    let folder = tempfile::tempdir().unwrap();
    let plan = |args: &[&str]| {
        let (code, stdout, stderr) = run(repository(), &[&["plan"][..], args].concat());
        assert_eq!(code, 0, "{stderr}");
        stdout
    };
    let cards = plan(&["--cards"]);
    for card in ["8 GB", "12 GB", "16 GB", "24 GB", "int8", "int4"] {
        assert!(cards.contains(card), "{card} is missing in: {cards}");
    }
    let (code, _, stderr) = run(repository(), &["plan", "--cards", "8,-1"]);
    assert_eq!(code, 2, "{stderr}");
    let line = |text: &str, name: &str| -> String {
        let found = text.lines().find(|line| line.trim().starts_with(name));
        found
            .unwrap_or_else(|| panic!("no `{name}` in: {text}"))
            .to_string()
    };
    let full = ["--set", "tuner=full", "--set", "freeze_llm=true"];
    let vision = plan(&[&full[..], &["--set", "freeze_vit=false"]].concat());
    let aligner = plan(&[&full[..], &["--set", "freeze_aligner=false"]].concat());
    assert_ne!(line(&vision, "trained"), line(&aligner, "trained"));
    assert!(!aligner.contains("100.000 %"), "{aligner}");
    // Nothing is invented where nothing was measured.
    assert!(
        line(&aligner, "time").contains("not estimated"),
        "{aligner}"
    );

    // The pretraining's config names the CPU and f32; without the latter the CPU's default counts.
    let text_of = std::fs::read_to_string(repository().join("configs/tiny.toml")).unwrap();
    let config = folder.path().join("run.toml");
    std::fs::write(&config, text_of.replace("dtype = \"f32\"\n", "")).unwrap();
    let config = text(&config);
    let weights = |text: &str| line(text, "frozen weights");
    assert_eq!(weights(&plan(&["--config", config])), weights(&plan(&[])));
    let half = plan(&["--set", "dtype=bf16"]);
    assert_ne!(weights(&half), weights(&plan(&[])));

    let bench = folder.path().join("bench.json");
    std::fs::write(
        &bench,
        "{\"device\": \"cpu\", \"samples_per_second\": 32.0}\n",
    )
    .unwrap();
    // 640 samples, six times, at 32 a second: two minutes.
    let timed = plan(&["--bench", text(&bench)]);
    assert!(
        line(&timed, "time").contains("2.0 min at 32 samples/s, measured on cpu"),
        "{timed}"
    );
    std::fs::write(&bench, "{}").unwrap();
    let (code, _, stderr) = run(repository(), &["plan", "--bench", text(&bench)]);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("samples_per_second"), "{stderr}");
}
