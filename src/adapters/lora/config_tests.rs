//! Keys of `adapter_config.json`: what is read, refused and written.

use super::*;

fn matches(targets: TargetModules, path: &str) -> bool {
    let config = LoraConfig {
        target_modules: targets,
        ..LoraConfig::default()
    };
    config.matcher().unwrap().matches(path)
}

const Q: &str = "model.language_model.layers.3.self_attn.q_proj";
const VISUAL: &str = "model.visual.blocks.0.attn.qkv";

#[test]
fn a_pattern_must_match_the_whole_path() {
    let pattern = |text: &str| TargetModules::Pattern(text.to_string());
    assert!(matches(pattern(r".*\.q_proj"), Q));
    assert!(!matches(pattern("q_proj"), Q));
    // As ms-swift writes it, with a lookahead.
    let swift = r"^(model.language_model(?=\.).*\.(q_proj|k_proj))$";
    assert!(matches(pattern(swift), Q));
    assert!(!matches(pattern(swift), VISUAL));
    assert!(matches(pattern("all-linear"), VISUAL));
    assert!(!matches(pattern("all-linear"), "lm_head"));
}

#[test]
fn a_name_matches_whole_parts_of_the_path_only() {
    let names =
        |names: &[&str]| TargetModules::Names(names.iter().map(|name| name.to_string()).collect());
    assert!(matches(names(&["q_proj"]), Q));
    assert!(matches(names(&["self_attn.q_proj"]), Q));
    assert!(!matches(names(&["proj"]), Q));
    assert!(!matches(names(&["_proj"]), Q));
}

#[test]
fn patterns_of_rank_and_alpha_decide_the_scaling() {
    let mut config = LoraConfig::default();
    assert_eq!(config.scaling_of(Q).unwrap(), 4.0);
    config.use_rslora = true;
    assert!((config.scaling_of(Q).unwrap() - 32.0 / 8f64.sqrt()).abs() < 1e-12);
    config
        .rank_pattern
        .0
        .push((r"layers\.3\..*q_proj".into(), 2));
    config.alpha_pattern.0.push(("q_proj".into(), 6.0));
    // The first that matches counts, as in PEFT.
    config
        .alpha_pattern
        .0
        .push((r"layers\.3\..*q_proj".into(), 99.0));
    config.use_rslora = false;
    assert_eq!(config.rank_of(Q).unwrap(), 2);
    assert_eq!(config.scaling_of(Q).unwrap(), 3.0);
    assert_eq!(config.rank_of(VISUAL).unwrap(), 8);
}

#[test]
fn what_is_not_done_is_refused_by_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_config.json");
    let base = r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": "all-linear""#;
    for (extra, key) in [
        (r#", "fan_in_fan_out": true}"#, "fan_in_fan_out"),
        (
            r#", "layer_replication": [[0, 4], [2, 5]]}"#,
            "layer_replication",
        ),
        (r#", "bias": "some"}"#, "bias"),
        (r#", "use_dora": true, "lora_bias": true}"#, "lora_bias"),
    ] {
        fs::write(&path, format!("{base}{extra}")).unwrap();
        let error = LoraConfig::from_dir(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains(key) && error.contains("adapter_config.json"),
            "{error}"
        );
    }
    fs::write(&path, format!("{base}{}", r#", "modules_to_save": []}"#)).unwrap();
    assert_eq!(LoraConfig::from_dir(dir.path()).unwrap().r, 8);
}

#[test]
fn an_adapter_whose_base_is_not_the_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let read = |init: &str| {
        let text = format!(
            r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": {init}}}"#
        );
        fs::write(dir.path().join("adapter_config.json"), text).unwrap();
        LoraConfig::from_dir(dir.path())
    };
    for init in [
        "true",
        "false",
        "null",
        r#""gaussian""#,
        r#""orthogonal""#,
        r#""eva""#,
        r#""mica""#,
    ] {
        assert!(read(init).is_ok(), "{init}");
    }
    let converts = "path_initial_model_for_weight_conversion";
    for (init, cure) in [
        ("pissa", converts),
        ("pissa_niter_4", converts),
        ("olora", converts),
        ("corda", converts),
        ("lora_ga", converts),
        // Its base is quantised, which no LoRA makes good.
        ("loftq", "merge_and_unload"),
        ("new", "merge_and_unload"),
    ] {
        let error = read(&format!("\"{init}\"")).unwrap_err().to_string();
        for piece in [init, "init_lora_weights", cure] {
            assert!(error.contains(piece), "{error}");
        }
        assert_eq!(error.contains(converts), cure == converts, "{error}");
    }
}

#[test]
fn a_folder_around_an_adapter_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("checkpoint-7");
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("adapter_config.json"), "{}").unwrap();
    let read = || LoraConfig::from_dir(dir.path()).unwrap_err().to_string();
    assert!(read().contains("adapters are in `") && read().contains("checkpoint-7"));
    fs::write(dir.path().join("best.json"), r#"{"step": 7}"#).unwrap();
    assert!(read().contains("best checkpoint") && read().contains("checkpoint-7"));
}

#[test]
fn layers_are_chosen_as_peft_chooses_them() {
    let mut config = LoraConfig {
        target_modules: TargetModules::Names(vec!["k_proj".into(), Q.into()]),
        layers_to_transform: Some(vec![1]),
        ..LoraConfig::default()
    };
    let matcher = config.matcher().unwrap();
    let k = |layer: usize| format!("model.language_model.layers.{layer}.self_attn.k_proj");
    assert!(matcher.matches(&k(1)) && !matcher.matches(&k(3)));
    // A whole path is taken whatever its layer.
    assert!(matcher.matches(Q));
    config.target_modules = TargetModules::Pattern(r".*\.q_proj\Z".into());
    config.layers_to_transform = None;
    assert!(config.matcher().unwrap().matches(Q));
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("adapter_config.json"),
        r#"{"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": "layers"}"#,
    )
    .unwrap();
    assert_eq!(
        LoraConfig::from_dir(dir.path())
            .unwrap()
            .layers_to_transform,
        None
    );
}

#[test]
fn a_layers_pattern_says_in_which_list_the_numbers_count() {
    let names = TargetModules::Names(vec!["k_proj".into(), "qkv".into(), "linear_fc1".into()]);
    let mut config = LoraConfig {
        target_modules: names,
        layers_to_transform: Some(vec![1]),
        ..LoraConfig::default()
    };
    let k = "model.language_model.layers.1.self_attn.k_proj";
    let block = "model.visual.blocks.1.attn.qkv";
    let merger = "model.visual.merger.linear_fc1";
    let matcher = config.matcher().unwrap();
    assert!(matcher.matches(k) && matcher.matches(block) && !matcher.matches(merger));
    config.layers_pattern = vec!["layers".into()];
    let matcher = config.matcher().unwrap();
    assert!(matcher.matches(k) && !matcher.matches(block));
    config.layers_pattern = vec!["h".into(), "blocks".into()];
    let matcher = config.matcher().unwrap();
    assert!(!matcher.matches(k) && matcher.matches(block));
}

#[test]
fn modules_that_are_stored_whole_are_not_adapted() {
    let config = LoraConfig {
        modules_to_save: vec!["merger".into(), "lm_head".into()],
        ..LoraConfig::default()
    };
    let matcher = config.matcher().unwrap();
    assert!(matcher.matches(VISUAL) && matcher.matches(Q));
    assert!(!matcher.matches("model.visual.merger.linear_fc1"));
    assert!(matcher.matches("model.visual.deepstack_merger_list.0.linear_fc1"));
}

#[test]
fn other_methods_name_the_way_to_merge_them() {
    let dir = tempfile::tempdir().unwrap();
    let read = |kind: &str| {
        let text = format!(r#"{{"peft_type": "{kind}", "r": 8}}"#);
        fs::write(dir.path().join("adapter_config.json"), text).unwrap();
        LoraConfig::from_dir(dir.path()).unwrap_err().to_string()
    };
    for kind in [
        "VERA",
        "LOHA",
        "LOKR",
        "ADALORA",
        "IA3",
        "OFT",
        "BOFT",
        "LN_TUNING",
        "RANDLORA",
    ] {
        let error = read(kind);
        for piece in [kind, "peft_type", "merge_and_unload", "--model"] {
            assert!(error.contains(piece), "{error}");
        }
    }
    let error = read("PROMPT_TUNING");
    assert!(
        error.contains("cannot be merged") && !error.contains("merge_and_unload"),
        "{error}"
    );
}

#[test]
fn pythons_spelling_of_patterns_is_read() {
    let matches = |pattern: &str| matches(TargetModules::Pattern(pattern.into()), Q);
    assert!(matches(r"\A.*\.q_proj\Z"));
    assert!(matches(r"model\..{,30}\.3\.(?P<at>self)_attn\.q_proj\Z"));
    assert!(!matches(r".*\\Z"));
}

#[test]
fn what_is_written_reads_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = LoraConfig {
        use_dora: true,
        target_modules: TargetModules::Names(vec!["q_proj".into()]),
        layers_to_transform: Some(vec![1, 3]),
        layers_pattern: vec!["layers".into()],
        ..LoraConfig::default()
    };
    config.alpha_pattern.0.push(("q_proj".into(), 6.5));
    fs::write(dir.path().join("adapter_config.json"), config.to_json()).unwrap();
    assert_eq!(LoraConfig::from_dir(dir.path()).unwrap(), config);
}
