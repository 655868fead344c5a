//! `quantize`, and what quantised weights do afterwards.

use std::{fs, path::Path};

use serde_json::Value;
use xray_qwen3vl::qwen3_vl::weights::TensorFile;

use super::{infer, infer_well, repository, run, text, tiny_model};

fn fixture(name: &str) -> String {
    text(&repository().join("tests/fixtures/parity").join(name)).to_string()
}

/// `quantize` on the CPU into `folder/packed`; must end well.
fn quantize(folder: &Path, model: &str, more: &[&str]) -> String {
    let args = [
        "quantize", "--device", "cpu", "--model", model, "--output", "packed",
    ];
    let (code, stdout, stderr) = run(folder, &[&args[..], more].concat());
    assert_eq!(code, 0, "{stderr}");
    stdout
}

fn size(dir: &Path) -> u64 {
    dir.join("model.safetensors").metadata().unwrap().len()
}

#[test]
fn a_packed_checkpoint_writes_the_reports_of_packing_at_load() {
    for (flags, format, share) in [
        (&["--bits", "8"][..], "int8", 0.6),
        (&["--bits", "4"], "int4", 0.5),
        (&["--bits", "4", "--zero-points"], "int4:64:zero", 0.5),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let model = tiny_model();
        let stdout = quantize(folder.path(), text(&model), flags);
        let bits = flags[1];
        assert!(stdout.contains(&format!("int{bits}")), "{stdout}");
        let packed = folder.path().join("packed");
        let names = |dir: &Path| {
            let entries = fs::read_dir(dir).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        for name in [
            "config.json",
            "tokenizer_config.json",
            "COMPLETE.json",
            "base_fingerprint.json",
        ] {
            let found = names(&packed);
            assert!(found.iter().any(|found| found == name), "{name}: {found:?}");
        }
        assert!(
            (size(&packed) as f64) < share * size(&model) as f64,
            "{bits} bits: {} of {}",
            size(&packed),
            size(&model)
        );
        // Without the original: what is in the folder is all there is.
        let (ours, _) = infer_well(folder.path(), &["--model", "packed"]);
        let at_load = ["--model", text(&model), "--quantize", format];
        let (want, _) = infer_well(folder.path(), &at_load);
        assert_eq!(ours, want);
        assert!(!ours.trim().is_empty());
    }
}

#[test]
fn a_calibrated_checkpoint_says_what_it_costs_and_answers() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model();
    let data = repository().join("data/sample/val/samples.jsonl");
    let flags = [
        "--bits",
        "4",
        "--calibrate",
        text(&data),
        "--calibration-samples",
        "6",
        "--held-out-samples",
        "2",
    ];
    let stdout = quantize(folder.path(), text(&model), &flags);
    for piece in ["held out", "round to nearest", "calibrated", "last layer"] {
        assert!(stdout.contains(piece), "`{piece}` is missing in: {stdout}");
    }
    let packed = folder.path().join("packed");
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(packed.join(name)).unwrap()).unwrap()
    };
    let report = read("quantization.json");
    assert_eq!(report["calibration_samples"], 6);
    assert_eq!(report["held_out_samples"], 2);
    assert_eq!(report["held_out"]["floats"]["agreement"], 1.0);
    let matrices = report["matrices"].as_array().unwrap();
    assert!(!matrices.is_empty());
    for matrix in matrices {
        let of = |key: &str| matrix[key].as_f64().unwrap();
        assert!(
            of("calibrated") <= 1.001 * of("round_to_nearest"),
            "{matrix}"
        );
    }
    // The vision tower has 8 bits, of which the folder tells.
    let modules = &read("config.json")["quantization_config"]["modules"];
    assert_eq!(modules["model.visual.blocks.0.attn.qkv"], "int8");
    let (answer, _) = infer_well(folder.path(), &["--model", "packed"]);
    assert!(!answer.trim().is_empty());
}

#[test]
fn an_adapter_of_the_original_fits_its_packed_form() {
    let folder = tempfile::tempdir().unwrap();
    quantize(folder.path(), &fixture("model-tiny"), &["--bits", "8"]);
    // The fixture's folder has no tokenizer: that of the repository's model has other ids, and
    // nothing to say here; the adapter is what counts.
    let adapter = fixture("adapter");
    let (code, _, stderr) = run(
        folder.path(),
        &[
            "merge",
            "--device",
            "cpu",
            "--model",
            "packed",
            "--adapter",
            &adapter,
            "--output",
            "merged",
        ],
    );
    assert_eq!(code, 1, "{stderr}");
    for piece in [
        "packed",
        "quantised",
        "cannot be merged",
        "then run `quantize`",
    ] {
        assert!(stderr.contains(piece), "{stderr}");
    }
    assert!(!folder.path().join("merged").exists());
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model();
    let model = text(&model);
    quantize(folder.path(), model, &["--bits", "4", "--group", "32"]);
    let base = [
        "quantize", "--device", "cpu", "--model", model, "--output", "new",
    ];
    for (more, says) in [
        (&["--bits", "5"][..], "expected 8 or 4"),
        (&["--bits", "4", "--group", "48"], "expected 32, 64 or 128"),
        (&["--bits", "8", "--group", "64"], "no groups"),
        (&["--bits", "8", "--zero-points"], "symmetric"),
        (&["--bits", "8", "--vision-bits", "4"], "--vision-bits 4"),
        (&["--bits", "4", "--max-size", "6GB"], "--calibrate"),
    ] {
        let (code, stdout, stderr) = run(folder.path(), &[&base[..], more].concat());
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        assert!(stderr.contains(says), "{stderr}");
    }
    let again = |output: &str| {
        let args = [
            "quantize", "--device", "cpu", "--bits", "8", "--model", "packed",
        ];
        run(folder.path(), &[&args[..], &["--output", output]].concat())
    };
    let (code, _, stderr) = again("new");
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("packed as int4, groups of 32 already"),
        "{stderr}"
    );
    let (code, _, stderr) = again("packed");
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("is there already"), "{stderr}");

    let (code, _, stderr) = infer(folder.path(), &["--model", "packed", "--quantize", "int8"]);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("leave out --quantize"), "{stderr}");
    let (code, _, stderr) = infer(folder.path(), &["--model", model, "--quantize", "int3"]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("int8, int4 or int4:32"), "{stderr}");
    let train = [
        "train",
        "--no-tui",
        "--device",
        "cpu",
        "--model",
        "packed",
        "--output-dir",
        "run",
        "--set",
        "tuner=full",
    ];
    let (code, _, stderr) = run(folder.path(), &train);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("is quantised, and `tuner"), "{stderr}");

    let left = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name != "packed").collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Rewrites one file of tensors through its header.
fn edit_header(path: &Path, edit: impl FnOnce(&mut Value)) {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    edit(&mut header);
    let mut text = header.to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut new = (text.len() as u64).to_le_bytes().to_vec();
    new.extend(text);
    new.extend(&bytes[8 + length..]);
    fs::write(path, new).unwrap();
}

#[test]
fn a_damaged_packed_checkpoint_is_named_by_file_and_tensor() {
    const LAYER: &str = "model.language_model.layers.0.mlp.up_proj";
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model();
    quantize(folder.path(), text(&model), &["--bits", "4"]);
    let weights = folder.path().join("packed/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    let (words, scales) = (
        format!("{LAYER}.weight_packed"),
        format!("{LAYER}.weight_scale"),
    );
    let shape = TensorFile::open(&weights).unwrap().shapes().unwrap()[&words].clone();
    type Edit<'a> = Box<dyn Fn(&mut Value) + 'a>;
    let cases: [(Edit, Vec<&str>); 4] = [
        (
            Box::new(|header| {
                let tensor = header.as_object_mut().unwrap().remove(&scales).unwrap();
                header["other"] = tensor;
            }),
            vec![&scales, "lacks"],
        ),
        (
            Box::new(|header| header[&words]["dtype"] = "U32".into()),
            vec![&words, "stored as U32", "expected I32"],
        ),
        (
            Box::new(|header| header[&words]["shape"] = vec![shape[0] * 2, shape[1] / 2].into()),
            vec![&words, "shape"],
        ),
        (
            Box::new(|header| {
                let tensor = header.as_object_mut().unwrap().remove(&words).unwrap();
                header[format!("{LAYER}.weight_zero")] = tensor;
            }),
            vec![&words, "lacks"],
        ),
    ];
    for (edit, says) in cases {
        fs::write(&weights, &whole).unwrap();
        edit_header(&weights, edit);
        let (code, stdout, stderr) = infer(folder.path(), &["--model", "packed"]);
        assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
        for piece in says.iter().chain(&["packed"]) {
            assert!(stderr.contains(piece), "`{piece}` is missing in: {stderr}");
        }
    }
    // Floats of another program's method.
    fs::write(&weights, &whole).unwrap();
    let config = folder.path().join("packed/config.json");
    let mut tree: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    // A layer that the model does not have.
    tree["quantization_config"]["version"] = 2.into();
    tree["quantization_config"]["modules"] = serde_json::json!({"model.other": "int8"});
    fs::write(&config, tree.to_string()).unwrap();
    let (code, _, stderr) = infer(folder.path(), &["--model", "packed"]);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("`model.other`"), "{stderr}");
    tree["quantization_config"] = serde_json::json!({"quant_method": "aqlm", "bits": 4});
    fs::write(&config, tree.to_string()).unwrap();
    let (code, _, stderr) = infer(folder.path(), &["--model", "packed"]);
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("AQLM") && stderr.contains("--quantize"),
        "{stderr}"
    );
}

#[test]
fn a_memory_limit_chooses_the_form_and_tells_it_in_the_result() {
    let folder = tempfile::tempdir().unwrap();
    let chosen = |args: &[&str]| {
        let (report, _) = infer_well(folder.path(), &[&["--json"][..], args].concat());
        let record: Value = serde_json::from_str(&report).unwrap();
        record["remarks"].to_string()
    };
    let told = chosen(&["--memory", "4"]);
    assert!(told.contains("weights in 32 bits"), "{told}");
    let told = chosen(&["--memory", "auto", "--quantize", "int4"]);
    assert!(told.contains("weights in int4, groups of 64"), "{told}");
    assert!(told.contains("tokens in 32 bits"), "{told}");
    let told = chosen(&["--memory", "4", "--kv-cache", "int8"]);
    assert!(told.contains("tokens in 8 bits"), "{told}");
    let (code, _, stderr) = infer(folder.path(), &["--memory", "0.01"]);
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("too small") && stderr.contains("int4"),
        "{stderr}"
    );
    let (code, _, stderr) = infer(folder.path(), &["--memory", "much"]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("auto"), "{stderr}");
}
