//! Models by name: found in the caches of Python's tools by every command, downloaded where that is said.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Output,
};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::{
    demo_image, field,
    hub_server::{COMMIT, Fault, Files, HubServer, Seen, git_hash, sha256},
    json_lines, program, text, tiny_model,
};

pub(crate) const WEIGHTS: &str = "model.safetensors";

/// The model of the repository, as a hub holds it: with files that a model does not need.
pub(crate) fn tiny() -> Files {
    let mut files = files_of(&tiny_model());
    for name in ["README.md", "LICENSE", ".gitattributes", "onnx/model.onnx"] {
        files.insert(name.into(), b"not needed".to_vec());
    }
    files
}

pub(crate) fn files_of(folder: &Path) -> Files {
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
pub(crate) struct Place {
    pub(crate) folder: TempDir,
    pub(crate) server: HubServer,
}

pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
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
    pub(crate) fn well(self) -> Self {
        assert_eq!(self.code, 0, "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// Ended with `code`, and stderr holds all of `says`.
    pub(crate) fn refused(self, code: i32, says: &[&str]) {
        assert_eq!(self.code, code, "{}\n{}", self.stdout, self.stderr);
        for part in says {
            assert!(self.stderr.contains(part), "no `{part}` in {}", self.stderr);
        }
        assert!(!self.stderr.contains("internal error"), "{}", self.stderr);
    }
}

impl Place {
    pub(crate) fn new(models: &[(&str, Files)]) -> Self {
        Self {
            folder: tempdir().unwrap(),
            server: HubServer::start(models),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The cache of Hugging Face's tools.
    pub(crate) fn hf(&self) -> PathBuf {
        self.path("home/.cache/huggingface/hub")
    }

    /// The cache of ModelScope's tools.
    pub(crate) fn ms(&self) -> PathBuf {
        self.path("home/.cache/modelscope")
    }

    pub(crate) fn command(
        &self,
        args: &[&str],
        variables: &[(&str, &str)],
    ) -> std::process::Command {
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

    pub(crate) fn run_in(&self, args: &[&str], variables: &[(&str, &str)]) -> Ended {
        self.command(args, variables).output().unwrap().into()
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ended {
        self.run_in(args, &[])
    }

    /// A report on the sample image, without a network.
    pub(crate) fn infer(&self, model: &str, more: &[&str], variables: &[(&str, &str)]) -> Ended {
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
    pub(crate) fn fetched(&self) -> Vec<Seen> {
        let mut seen = self.server.seen();
        seen.retain(|seen| {
            seen.target.contains("/resolve/") || seen.target.contains("FilePath") || seen.at_cdn
        });
        seen
    }
}

pub(crate) fn report(ended: &Ended) -> String {
    let lines = json_lines(&ended.stdout);
    field(&lines[0], "report").to_owned()
}

/// The folder that `pull` printed.
pub(crate) fn printed(ended: &Ended) -> PathBuf {
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

    // Weights are on a disk once, whichever hub is the default.
    place.server.seen();
    let again = place.run(&["pull", "test/tiny.v1"]).well();
    assert_eq!(printed(&again), folder);
    assert!(place.server.seen().is_empty());

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
    let mut bare = tiny();
    bare.remove("tokenizer.json");
    let place = Place::new(&[("test/tiny", tiny()), ("test/bare", bare)]);
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

    place.infer("test/bare", &["--download"], &online).refused(
        1,
        &[
            "was downloaded and is no whole model",
            "tokenizer.json is missing",
        ],
    );

    place.server.seen();

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
fn a_server_has_its_models_by_name() {
    let adapter = tempdir().unwrap();
    crate::serve::write_adapter(adapter.path());
    let place = Place::new(&[
        ("test/tiny", tiny()),
        ("test/adapter", files_of(adapter.path())),
    ]);
    let args = [
        "serve",
        "--device",
        "cpu",
        "--port",
        "0",
        "--model",
        "test/tiny",
        "--lora",
        "chest=test/adapter",
        "--any-base",
    ];
    place
        .run(&args)
        .refused(1, &["`test/tiny` is neither a folder"]);
    let mut child = place
        .command(&[&args[..], &["--download"]].concat(), &[])
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let ready = lines.find_map(|line| line.ok().filter(|line| line.contains("the API at ")));
    let ready = ready.expect("the server starts");
    assert!(ready.contains("`test/tiny` at http://"), "{ready}");
    let (_, address) = ready.split_once("the API at http://").unwrap();
    let address = address.trim_end().trim_end_matches("/v1");
    let mut stream = TcpStream::connect(address).unwrap();
    let request =
        format!("GET /v1/models HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    for id in ["\"test/tiny\"", "\"chest\""] {
        assert!(answer.contains(id), "no {id} in {answer}");
    }
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
