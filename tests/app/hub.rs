//! Models by name: found in the caches of Python's tools, downloaded by `pull` and `--download`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::{
    demo_image, field,
    hub_server::{COMMIT, Fault, Files, HubServer, Seen, git_hash, sha256},
    json_lines, program, text, tiny_model,
};

const WEIGHTS: &str = "model.safetensors";

/// The model of the repository, as a hub holds it: with files that a model does not need.
fn tiny() -> Files {
    let mut files = files_of(&tiny_model());
    for name in ["README.md", "LICENSE", ".gitattributes", "onnx/model.onnx"] {
        files.insert(name.into(), b"not needed".to_vec());
    }
    files
}

fn files_of(folder: &Path) -> Files {
    let entries = fs::read_dir(folder).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.is_file())
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(path).unwrap())
        })
        .collect()
}

/// A folder with a home in it, and a hub.
struct Place {
    folder: TempDir,
    server: HubServer,
}

struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }
}

impl Ended {
    fn well(self) -> Self {
        assert_eq!(self.code, 0, "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// Ended with `code`, and stderr holds all of `says`.
    fn refused(self, code: i32, says: &[&str]) {
        assert_eq!(self.code, code, "{}\n{}", self.stdout, self.stderr);
        for part in says {
            assert!(self.stderr.contains(part), "no `{part}` in {}", self.stderr);
        }
        assert!(!self.stderr.contains("internal error"), "{}", self.stderr);
    }
}

impl Place {
    fn new(models: &[(&str, Files)]) -> Self {
        Self {
            folder: tempdir().unwrap(),
            server: HubServer::start(models),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The cache of Hugging Face's tools.
    fn hf(&self) -> PathBuf {
        self.path("home/.cache/huggingface/hub")
    }

    /// The cache of ModelScope's tools.
    fn ms(&self) -> PathBuf {
        self.path("home/.cache/modelscope")
    }

    fn command(&self, args: &[&str], variables: &[(&str, &str)]) -> std::process::Command {
        let mut command = program(self.folder.path(), args);
        for name in [
            "HF_HOME",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "XDG_CACHE_HOME",
            "HF_TOKEN",
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "MODELSCOPE_CACHE",
            "MODELSCOPE_DOMAIN",
            "MODELSCOPE_API_TOKEN",
            "USE_MODELSCOPE_HUB",
            "HTTP_PROXY",
            "http_proxy",
            "HTTPS_PROXY",
            "https_proxy",
            "ALL_PROXY",
            "all_proxy",
            "SSL_CERT_FILE",
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
        ] {
            command.env_remove(name);
        }
        command
            .env("HOME", self.path("home"))
            .env("HF_ENDPOINT", self.server.url())
            .env("MODELSCOPE_ENDPOINT", self.server.url())
            .envs(variables.iter().copied());
        command
    }

    fn run_in(&self, args: &[&str], variables: &[(&str, &str)]) -> Ended {
        self.command(args, variables).output().unwrap().into()
    }

    fn run(&self, args: &[&str]) -> Ended {
        self.run_in(args, &[])
    }

    /// A report on the sample image, without a network.
    fn infer(&self, model: &str, more: &[&str], variables: &[(&str, &str)]) -> Ended {
        let image = demo_image();
        let mut args = vec![
            "infer",
            "--device",
            "cpu",
            "--max-new-tokens",
            "6",
            "--json",
        ];
        args.extend(["--model", model]);
        args.extend(more);
        args.push(text(&image));
        let variables: Vec<_> = [("HF_HUB_OFFLINE", "1")]
            .into_iter()
            .chain(variables.iter().copied())
            .collect();
        self.run_in(&args, &variables)
    }

    /// What was asked of the hub about files, the list left out.
    fn fetched(&self) -> Vec<Seen> {
        let mut seen = self.server.seen();
        seen.retain(|seen| {
            seen.target.contains("/resolve/") || seen.target.contains("FilePath") || seen.at_cdn
        });
        seen
    }
}

fn report(ended: &Ended) -> String {
    let lines = json_lines(&ended.stdout);
    field(&lines[0], "report").to_owned()
}

/// The folder that `pull` printed.
fn printed(ended: &Ended) -> PathBuf {
    PathBuf::from(ended.stdout.strip_suffix('\n').expect("one line"))
}

#[test]
fn a_pulled_model_is_what_python_writes_and_answers_by_its_name() {
    let place = Place::new(&[("test/tiny", tiny())]);
    let pulled = place.run(&["pull", "test/tiny"]).well();
    let repo = place.hf().join("models--test--tiny");
    let snapshot = repo.join("snapshots").join(COMMIT);
    assert_eq!(printed(&pulled), snapshot);
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let expected = files_of(&tiny_model());
    assert_eq!(files_of(&snapshot), expected, "no file more, none less");
    for (name, bytes) in &expected {
        let blob = match name == WEIGHTS {
            true => sha256(bytes),
            false => git_hash(bytes),
        };
        assert!(repo.join("blobs").join(&blob).is_file(), "{name}");
        #[cfg(unix)]
        assert_eq!(
            fs::read_link(snapshot.join(name)).unwrap(),
            Path::new("../../blobs").join(blob)
        );
    }
    assert!(
        pulled.stderr.contains("weights as safetensors, 1 file"),
        "{}",
        pulled.stderr
    );

    // Everything is there: the hub is asked for its list and nothing else.
    place.server.seen();
    place.run(&["pull", "test/tiny"]).well();
    assert!(place.fetched().is_empty());
    place.run(&["pull", "test/tiny", "--revision", "v1"]).well();
    assert!(place.fetched().is_empty());
    assert_eq!(fs::read_to_string(repo.join("refs/v1")).unwrap(), COMMIT);

    let by_path = report(&place.infer(text(&tiny_model()), &[], &[]).well());
    for name in [
        "test/tiny",
        "hf:test/tiny",
        "test/tiny@main",
        "test/tiny@v1",
        "test/tiny@0123456789ab",
        "~/.cache/huggingface/hub/models--test--tiny",
    ] {
        let found = place.infer(name, &[], &[]).well();
        assert_eq!(report(&found), by_path, "{name}");
        assert!(found.stderr.contains(text(&snapshot)), "{}", found.stderr);
    }
    place
        .infer("test/tiny@v2", &[], &[])
        .refused(1, &["test/tiny@v2", "hf download test/tiny --revision v2"]);
    place
        .infer("ms:test/tiny", &[], &[])
        .refused(1, &["modelscope download --model test/tiny`"]);
}

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
fn model_scope_is_spoken_and_its_caches_are_read() {
    let place = Place::new(&[("test/tiny.v1", tiny())]);
    let default = [("USE_MODELSCOPE_HUB", "1")];
    place
        .server
        .spoil(WEIGHTS, &[Fault::Cut(5000), Fault::Wrong]);
    let pulled = place.run_in(&["pull", "test/tiny.v1"], &default).well();
    let folder = place.ms().join("models/test--tiny.v1/snapshots/master");
    assert_eq!(printed(&pulled), folder);
    assert_eq!(files_of(&folder), files_of(&tiny_model()));
    place.server.seen();
    place
        .run(&["pull", "test/tiny.v1", "--hub", "modelscope"])
        .well();
    assert!(place.fetched().is_empty());
    let expected = report(&place.infer(text(&tiny_model()), &[], &[]).well());
    for (name, variables) in [("ms:test/tiny.v1", &[][..]), ("test/tiny.v1", &default)] {
        let found = place.infer(name, &[], variables).well();
        assert_eq!(report(&found), expected);
    }
    let found = place.infer("test/tiny.v1", &[], &[]).well();
    assert!(
        found.stderr.contains("downloaded from ModelScope"),
        "{}",
        found.stderr
    );

    // What tools before 1.38 wrote, with and without MODELSCOPE_CACHE; `pull` goes on there.
    for (cache, below) in [
        (None, "hub/models/test/tiny___v1"),
        (None, "hub/test/tiny___v1"),
        (Some("other"), "models/test/tiny___v1"),
        (Some("other"), "hub/test/tiny___v1"),
    ] {
        fs::remove_dir_all(place.path("home")).unwrap();
        let _ = fs::remove_dir_all(place.path("other"));
        fs::create_dir_all(place.path("home")).unwrap();
        let variable = cache.map(|name| ("MODELSCOPE_CACHE", place.path(name)));
        let variables: Vec<(&str, &str)> = variable
            .as_ref()
            .map(|(name, path)| (*name, text(path)))
            .into_iter()
            .collect();
        let root = cache.map_or_else(|| place.ms(), |name| place.path(name));
        let old = root.join(below);
        copy(&tiny_model(), &old);
        fs::write(old.join(".mv"), "Revision:master,CreatedAt:1700000000").unwrap();
        let found = place.infer("test/tiny.v1@master", &[], &variables).well();
        assert_eq!(report(&found), expected, "{below}");
        place
            .infer("ms:test/tiny.v1@v2", &[], &variables)
            .refused(1, &["is of revision master"]);
        fs::remove_file(old.join("tokenizer.json")).unwrap();
        place.server.seen();
        let pulled = place
            .run_in(&["pull", "ms:test/tiny.v1"], &variables)
            .well();
        assert_eq!(printed(&pulled), old);
        assert_eq!(place.fetched().len(), 1, "the missing file alone");
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for (name, bytes) in files_of(from) {
        fs::write(to.join(name), bytes).unwrap();
    }
}

#[test]
fn a_snapshot_without_a_shard_is_not_taken() {
    let place = Place::new(&[]);
    let repo = place.path("cache/models--test--tiny");
    let (old, new) = (
        repo.join("snapshots/aaaaaaaaaa"),
        repo.join("snapshots/bbbbbbbbbb"),
    );
    copy(&tiny_model(), &new);
    fs::remove_file(new.join(WEIGHTS)).unwrap();
    let map = json!({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}});
    fs::write(new.join("model.safetensors.index.json"), map.to_string()).unwrap();
    fs::write(new.join("model-1.safetensors"), "").unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), "bbbbbbbbbb").unwrap();
    let cache = place.path("cache");
    let variables = [("HF_HUB_CACHE", text(&cache))];
    for name in ["test/tiny", text(&repo)] {
        place
            .infer(name, &[], &variables)
            .refused(1, &["model-2.safetensors is missing", "bbbbbbbbbb"]);
    }
    // An older one that is whole is taken, and said to be.
    copy(&tiny_model(), &old);
    let found = place.infer("test/tiny", &[], &variables).well();
    assert!(
        found.stderr.contains("`aaaaaaaaaa` is taken"),
        "{}",
        found.stderr
    );
    place
        .infer("test/tiny@main", &[], &variables)
        .refused(1, &["model-2.safetensors is missing"]);
    // A clone without git-lfs.
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n";
    fs::write(old.join(WEIGHTS), pointer).unwrap();
    place.infer(text(&old), &[], &[]).refused(
        1,
        &["is a git-lfs pointer, not the weights", "git lfs pull"],
    );
    place
        .infer("test/tiny", &[], &variables)
        .refused(1, &["git-lfs pointer"]);
}

#[test]
fn nothing_is_downloaded_unless_that_is_said() {
    let place = Place::new(&[("test/tiny", tiny())]);
    let online = [("HF_HUB_OFFLINE", "0")];
    place.infer("test/tiny", &[], &online).refused(
        1,
        &[
            "`test/tiny` is neither a folder here nor downloaded",
            " pull test/tiny`",
            "--download",
            "`hf download test/tiny`",
            "`modelscope download --model test/tiny`",
        ],
    );
    assert!(place.server.seen().is_empty());
    place
        .infer("test/tiny", &["--download"], &[])
        .refused(1, &["HF_HUB_OFFLINE is set"]);

    // Without weights where they are not needed.
    let data = crate::repository().join("data/sample/train/samples.jsonl");
    let plan = [
        "plan",
        "--model",
        "test/tiny",
        "--download",
        "--train-data",
        text(&data),
    ];
    place.run(&plan).well();
    assert!(
        place
            .fetched()
            .iter()
            .all(|seen| !seen.target.contains(WEIGHTS))
    );
    let all = place.infer("test/tiny", &["--download"], &online).well();
    assert_eq!(place.fetched().len(), 2, "the weights alone, by a redirect");
    let again = place.infer("test/tiny", &["--download"], &online).well();
    assert!(
        place.server.seen().is_empty(),
        "no network for what is there"
    );
    assert_eq!(report(&all), report(&again));
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

#[test]
fn a_folder_of_the_same_name_wins_and_that_is_said() {
    let place = Place::new(&[("test/tiny", tiny())]);
    place.run(&["pull", "test/tiny"]).well();
    copy(&tiny_model(), &place.path("test/tiny"));
    let found = place.infer("test/tiny", &[], &[]).well();
    assert!(
        found
            .stderr
            .contains("is a folder here, which is taken; `hf:test/tiny` is the download"),
        "{}",
        found.stderr
    );
    let pulled = place.run(&["pull", "test/tiny"]).well();
    assert!(
        pulled.stderr.contains("is also a folder here"),
        "{}",
        pulled.stderr
    );
    let found = place.infer("hf:test/tiny", &[], &[]).well();
    assert!(found.stderr.contains(COMMIT), "{}", found.stderr);
    let found = place.infer("~/tiny", &[], &[]);
    found.refused(1, &[text(&place.path("home/tiny"))]);
}

#[test]
fn training_and_adapters_go_by_name() {
    let place = Place::new(&[("test/tiny", tiny())]);
    let data = crate::repository().join("data/sample/train/samples.jsonl");
    let train = [
        "train",
        "--model",
        "test/tiny",
        "--download",
        "--train-data",
        text(&data),
        "--output-dir",
        "run",
        "--no-tui",
        "--device",
        "cpu",
        "--dtype",
        "f32",
        "--show",
        "0",
        "--eval-generate",
        "0",
        "--set",
        "max_steps=1",
        "--set",
        "split_dataset_ratio=0",
        "--set",
        "lora_rank=2",
    ];
    let trained = place.run(&train).well();
    let checkpoint = place.path("run/checkpoint-1");
    let config: Value =
        serde_json::from_slice(&fs::read(checkpoint.join("adapter_config.json")).unwrap()).unwrap();
    // As PEFT writes it: a name that works on every machine, not a folder of this one.
    assert_eq!(config["base_model_name_or_path"], "test/tiny");
    let next = trained
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("next: "));
    let next = next.unwrap_or_else(|| panic!("{}", trained.stdout));
    let typed = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("{next} --device cpu --max-new-tokens 4"))
        .current_dir(place.folder.path())
        .output()
        .unwrap();
    assert!(
        typed.status.success(),
        "{next}: {}",
        String::from_utf8_lossy(&typed.stderr)
    );

    // The adapter as it would be published.
    let adapter = Place::new(&[
        ("test/tiny", tiny()),
        ("test/adapter", files_of(&checkpoint)),
    ]);
    let online = [("HF_HUB_OFFLINE", "0")];
    let more = ["--adapter", "test/adapter", "--download"];
    let by_name = adapter.infer("test/tiny", &more, &online).well();
    let by_path = adapter
        .infer("test/tiny", &["--adapter", text(&checkpoint)], &[])
        .well();
    assert_eq!(report(&by_name), report(&by_path));
    let folder = adapter
        .hf()
        .join("models--test--adapter/snapshots")
        .join(COMMIT);
    assert!(
        !folder.join("optimizer.safetensors").exists(),
        "a trainer's state is not needed"
    );
    adapter
        .infer("test/tiny", &["--adapter", "test/other"], &[])
        .refused(1, &["`test/other` is neither a folder here nor downloaded"]);
    let merged = [
        "merge",
        "--model",
        "test/tiny",
        "--adapter",
        "test/adapter",
        "--output",
        "merged",
        "--device",
        "cpu",
    ];
    adapter.run(&merged).well();
}
