//! `pull`: what is fetched, what is not, and what comes of transfers that break.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    hub::{Ended, Place, WEIGHTS, files_of, printed, tiny},
    hub_server::{Fault, Files, Seen, sha256},
    tiny_model,
};

#[test]
fn the_token_stays_with_the_hub() {
    let place = Place::new(&[("test/tiny", tiny())]);
    let token = [
        ("HF_TOKEN", "hf_secret"),
        ("MODELSCOPE_API_TOKEN", "ms_secret"),
    ];
    let pulled = place.run_in(&["pull", "hf:test/tiny"], &token).well();
    let seen = place.server.seen();
    assert!(seen.iter().any(|seen| seen.at_cdn));
    for request in &seen {
        let sent = request.header("authorization");
        let expected = (!request.at_cdn).then_some("Bearer hf_secret");
        assert_eq!(sent, expected, "{request:?}");
    }
    assert!(!pulled.stderr.contains("hf_secret"));

    place.run_in(&["pull", "ms:test/tiny"], &token).well();
    for request in place.server.seen() {
        let expected = (!request.at_cdn).then_some("m_session_id=ms_secret");
        assert_eq!(request.header("cookie"), expected, "{request:?}");
    }
    // The file that `hf auth login` writes.
    fs::write(place.path("home/.cache/huggingface/token"), "hf_file\n").unwrap();
    place.run(&["pull", "hf:test/tiny"]).well();
    assert_eq!(
        place.server.seen()[0].header("authorization"),
        Some("Bearer hf_file")
    );
}

#[test]
fn broken_transfers_go_on_where_they_were() {
    let place = Place::new(&[("test/tiny", tiny())]);
    let half = tiny()[WEIGHTS].len() / 2;
    place.server.spoil(
        WEIGHTS,
        &[
            Fault::Cut(half),
            Fault::Status(429, Some(2)),
            Fault::Status(503, None),
            Fault::Cut(1000),
            Fault::Stall(1000),
        ],
    );
    place
        .server
        .spoil("config.json", &[Fault::Cut(10), Fault::Whole]);
    place.server.spoil("listing", &[Fault::Status(500, None)]);
    let started = Instant::now();
    let timeout = [("HF_HUB_DOWNLOAD_TIMEOUT", "1")];
    let pulled = place.run_in(&["pull", "test/tiny"], &timeout).well();
    assert!(
        started.elapsed() > Duration::from_secs(2),
        "Retry-After was not kept"
    );
    assert_eq!(files_of(&printed(&pulled)), files_of(&tiny_model()));
    let asked: Vec<_> = place
        .fetched()
        .iter()
        .filter(|seen| seen.at_cdn)
        .map(Seen::from)
        .collect();
    let later = half + 1000;
    assert_eq!(
        asked,
        [
            None,
            Some(half),
            Some(half),
            Some(half),
            Some(later),
            Some(later + 1000)
        ]
    );
    for part in ["status 429", "status 503", "again in 2.0 s", "status 500"] {
        assert!(
            pulled.stderr.contains(part),
            "no `{part}` in {}",
            pulled.stderr
        );
    }
}

#[test]
fn a_killed_download_is_gone_on_with() {
    let place = Place::new(&[("test/tiny", tiny())]);
    place.server.spoil(WEIGHTS, &[Fault::Stall(1 << 20)]);
    let mut child = place.command(&["pull", "test/tiny"], &[]).spawn().unwrap();
    let partial = place
        .hf()
        .join("models--test--tiny/blobs")
        .join(format!("{}.incomplete", sha256(&tiny()[WEIGHTS])));
    let started = Instant::now();
    while fs::metadata(&partial).map_or(0, |data| data.len()) < 1 << 20 {
        assert!(started.elapsed() < Duration::from_secs(60), "nothing comes");
        thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // What is there is no model yet.
    place.infer("test/tiny", &[], &[]).refused(
        1,
        &[
            "is not whole: model.safetensors is missing",
            " pull test/tiny`",
        ],
    );
    place.server.seen();
    let pulled = place.run(&["pull", "test/tiny"]).well();
    let fetched = place.fetched();
    assert_eq!(fetched.last().and_then(Seen::from), Some(1 << 20));
    assert_eq!(fetched.len(), 2, "the weights alone: {fetched:?}");
    assert_eq!(files_of(&printed(&pulled)), files_of(&tiny_model()));
    assert!(!partial.exists());
}

#[test]
fn wrong_bytes_are_fetched_again_and_never_kept() {
    let place = Place::new(&[("test/tiny", tiny())]);
    place.server.spoil(WEIGHTS, &[Fault::Wrong]);
    place.server.spoil("tokenizer.json", &[Fault::Wrong]);
    let pulled = place.run(&["pull", "test/tiny"]).well();
    assert_eq!(files_of(&printed(&pulled)), files_of(&tiny_model()));
    for part in ["its sha256 is not", "its git hash is not"] {
        assert!(pulled.stderr.contains(part), "{}", pulled.stderr);
    }

    let place = Place::new(&[("test/tiny", tiny())]);
    place.server.spoil(WEIGHTS, &[Fault::Wrong; 9]);
    let expected = sha256(&tiny()[WEIGHTS]);
    place.run(&["pull", "test/tiny"]).refused(
        1,
        &["`model.safetensors` of `test/tiny`", "3 times", &expected],
    );
    let blobs = place.hf().join("models--test--tiny/blobs");
    for name in [expected.clone(), format!("{expected}.incomplete")] {
        assert!(!blobs.join(&name).exists(), "{name}");
    }
    place
        .infer("test/tiny", &[], &[])
        .refused(1, &["model.safetensors is missing"]);
}

#[test]
fn what_a_hub_refuses_is_said_with_a_cure() {
    let huge: Files = [("huge.safetensors".to_owned(), vec![0])].into();
    let place = Place::new(&[("test/tiny", tiny()), ("test/huge", huge)]);
    let pull = |args: &[&str]| place.run(&[&["pull"], args].concat());
    pull(&["test/absent"]).refused(1, &["Hugging Face has no `test/absent`", "`main`"]);
    pull(&["ms:test/absent"]).refused(1, &["ModelScope has no `test/absent`", "`master`"]);
    pull(&["test/tiny@v9"]).refused(1, &["revision `v9`", "RevisionNotFound"]);
    pull(&["test/gated"]).refused(1, &["does not give `test/gated`", "HF_TOKEN"]);
    pull(&["test/huge"]).refused(1, &["free, the download needs", "--output"]);
    pull(&["test/tiny", "--include", "*.gguf"]).refused(1, &["no file fits --include *.gguf"]);
    for wrong in ["tiny", "a/b/c", "./tiny", "hf:../a"] {
        pull(&[wrong]).refused(2, &["is no name of a model", "OWNER/NAME"]);
    }
    pull(&["ms:test/tiny", "--hub", "hf"]).refused(2, &["--hub another"]);
    pull(&["test/tiny@a", "--revision", "b"]).refused(2, &["--revision another"]);
    pull(&["test/tiny", "--revision", "../x"]).refused(2, &["--revision: `../x`"]);
    let offline = [("HF_HUB_OFFLINE", "1")];
    place
        .run_in(&["pull", "test/tiny"], &offline)
        .refused(1, &["HF_HUB_OFFLINE is set"]);
    let elsewhere = [("HF_ENDPOINT", "hf-mirror.com")];
    place
        .run_in(&["pull", "test/tiny"], &elsewhere)
        .refused(1, &["HF_ENDPOINT is `hf-mirror.com`"]);
    // Nobody listens at a port that was closed again.
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let closed = format!("http://{closed}");
    place
        .run_in(&["pull", "test/tiny"], &[("HF_ENDPOINT", &closed)])
        .refused(
            1,
            &[
                "does not answer",
                &closed,
                "HTTPS_PROXY",
                "--hub modelscope",
            ],
        );
    assert!(!place.hf().join("models--test--tiny/snapshots").exists());
}

#[test]
fn two_downloads_at_once_fetch_once() {
    let place = Place::new(&[("test/tiny", tiny())]);
    place.server.slow_down(Duration::from_millis(20));
    let first = place.command(&["pull", "test/tiny"], &[]).spawn().unwrap();
    let second = place.command(&["pull", "test/tiny"], &[]).spawn().unwrap();
    let ended = [first, second].map(|child| Ended::from(child.wait_with_output().unwrap()).well());
    for ended in &ended {
        assert_eq!(files_of(&printed(ended)), files_of(&tiny_model()));
    }
    let weights = place
        .fetched()
        .into_iter()
        .filter(|seen| seen.at_cdn)
        .count();
    assert_eq!(weights, 1);
    let waited = |ended: &Ended| ended.stderr.contains("another process downloads it");
    assert!(ended.iter().any(waited), "{}", ended[0].stderr);
}

#[test]
fn a_folder_of_the_user_gets_what_was_asked_for() {
    let place = Place::new(&[("test/tiny", tiny())]);
    let out = place.path("out");
    let pull = ["pull", "test/tiny", "--output", "out"];
    assert_eq!(printed(&place.run(&pull).well()), Path::new("out"));
    assert_eq!(files_of(&out), files_of(&tiny_model()));
    // What differs is replaced, and that is said; the rest stays.
    fs::write(out.join("config.json"), "{}").unwrap();
    place.server.seen();
    let again = place.run(&pull).well();
    assert!(
        again.stderr.contains("config.json: what was there differs"),
        "{}",
        again.stderr
    );
    assert_eq!(place.fetched().len(), 1);
    assert_eq!(files_of(&out), files_of(&tiny_model()));
    assert!(!place.hf().exists(), "nothing twice");
    place
        .run(&[
            "pull",
            "test/tiny",
            "--include",
            "onnx/*",
            "--include",
            "*.md",
            "--output",
            "some",
        ])
        .well();
    assert!(place.path("some/onnx/model.onnx").is_file() && place.path("some/README.md").is_file());
    assert!(!place.path("some/config.json").exists());
}

#[test]
fn only_the_shards_of_the_index_are_taken() {
    let mut files = tiny();
    let weights = files.remove(WEIGHTS).unwrap();
    files.insert("model-1.safetensors".into(), weights.clone());
    files.insert("consolidated.safetensors".into(), weights);
    let index = json!({"weight_map": {"a": "model-1.safetensors"}});
    files.insert(
        "model.safetensors.index.json".into(),
        index.to_string().into(),
    );
    let index = json!({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}});
    let mut lacking = files.clone();
    lacking.insert(
        "model.safetensors.index.json".into(),
        index.to_string().into(),
    );
    let place = Place::new(&[("test/sharded", files), ("test/lacking", lacking)]);
    let folder = printed(&place.run(&["pull", "test/sharded"]).well());
    assert!(folder.join("model-1.safetensors").is_file());
    assert!(!folder.join("consolidated.safetensors").exists());
    place
        .run(&["pull", "test/lacking"])
        .refused(1, &["names `model-2.safetensors`, which it does not hold"]);
}

#[test]
fn other_forms_are_named_for_what_they_are() {
    let of = |names: &[&str]| -> Files {
        let entry = |name: &&str| (name.to_string(), b"{}".to_vec());
        names.iter().map(entry).collect()
    };
    let mut mlx = of(&["tokenizer.json", WEIGHTS]);
    let config = json!({"quantization": {"group_size": 64, "bits": 4}});
    mlx.insert("config.json".into(), config.to_string().into());
    let place = Place::new(&[
        ("test/mlx", mlx),
        ("test/gguf", of(&["m-Q4.gguf", "mmproj.gguf"])),
        ("test/ggufs", of(&["m-Q4.gguf", "m-Q8.gguf"])),
        (
            "test/bin",
            of(&["config.json", "pytorch_model.bin", "training_args.bin"]),
        ),
        ("test/paper", of(&["README.md"])),
    ]);
    let kind = |id: &str, says: &str| {
        let pulled = place.run(&["pull", id]).well();
        assert!(pulled.stderr.contains(says), "{id}: {}", pulled.stderr);
    };
    kind("test/mlx", "MLX quantised to 4 bits");
    kind("test/gguf", "llama.cpp's form (GGUF), 2 files");
    kind("test/bin", "pickles of PyTorch (.bin), 1 file");
    place
        .run(&["pull", "test/ggufs"])
        .refused(1, &["2 times as GGUF", "--include 'm-Q4*'", "m-Q8"]);
    place
        .run(&["pull", "test/paper"])
        .refused(1, &["no weights", "README.md"]);
}
