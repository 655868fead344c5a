//! `serve --store` from outside: studies come in, are drafted, edited, signed and found again; who may do what; and what
//! a server that is killed has kept.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use crate::{
    demo_image, run,
    server::{Response, Server, start},
    text,
};

/// Small images, no probabilities: drafts in a moment.
const QUICK: [&str; 5] = [
    "--max-pixels",
    "16384",
    "--max-new-tokens",
    "8",
    "--no-draft-findings",
];

/// A server on a store, with the keys of its accounts.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn store(&self) -> String {
        text(&self.folder.path().join("store")).to_owned()
    }

    fn command(&self, args: &[&str]) -> (i32, String, String) {
        run(self.folder.path(), args)
    }

    /// Makes an account and returns its key.
    fn account(&self, name: &str, role: &str, more: &[&str]) -> String {
        let store = self.store();
        let args = [
            "store", "key", "add", "--store", &store, "--name", name, "--role", role,
        ];
        let (code, stdout, stderr) = self.command(&[&args[..], more].concat());
        assert_eq!(code, 0, "{stderr}");
        stdout.trim().to_owned()
    }

    fn serve(&self, more: &[&str]) -> Server {
        let store = self.store();
        start(&[&["--store", &store][..], &QUICK, more].concat())
    }

    fn verified(&self) -> Value {
        let store = self.store();
        let (code, stdout, stderr) = self.command(&["store", "verify", "--store", &store]);
        assert_eq!(code, 0, "{stdout} {stderr}");
        serde_json::from_str(&stdout).unwrap()
    }
}

fn send(server: &Server, key: &str, method: &str, path: &str, body: &Value) -> Response {
    let key = format!("authorization: Bearer {key}");
    let head = ["content-type: application/json", key.as_str()];
    let body = match method {
        "GET" => String::new(),
        _ => body.to_string(),
    };
    server.send(method, path, &head, body.as_bytes())
}

fn good(response: &Response) -> Value {
    assert!((200..300).contains(&response.status), "{response:?}");
    response.json()
}

fn upload(patient: &str, accession: &str) -> Value {
    json!({
        "patient": {"id": patient, "name": "张三丰", "birth_date": "19850203", "sex": "M"},
        "accession": accession,
        "date": "20260131",
        "description": "胸部正位",
        "films": [{"file": STANDARD.encode(fs::read(demo_image()).unwrap()), "view": "PA"}],
    })
}

/// The study once it has another state than being drafted.
fn drafted(server: &Server, key: &str, id: &str) -> Value {
    let began = Instant::now();
    loop {
        let study = good(&send(
            server,
            key,
            "GET",
            &format!("/v1/studies/{id}"),
            &Value::Null,
        ));
        if !["received", "complete"].contains(&study["state"].as_str().unwrap()) {
            return study;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{study}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_study_is_drafted_edited_signed_and_there_after_a_restart() {
    let bench = Bench::new();
    let signer = bench.account("李医生", "signer", &[]);
    let reader = bench.account("王护士", "reader", &["--days", "30"]);
    let administrator = bench.account("root", "administrator", &[]);
    let server = bench.serve(&["--api-key", "a-program-key"]);
    let post = |key: &str, path: &str, body: Value| send(&server, key, "POST", path, &body);

    let id = good(&post(&signer, "/v1/studies", upload("P-778", "A-1")))["id"].clone();
    let id = id.as_str().unwrap();
    let study = drafted(&server, &reader, id);
    assert_eq!(study["state"], "drafted", "{study}");
    assert_eq!(study["patient"]["name"], "张三丰");
    let draft = study["draft"]["text"].as_str().unwrap();
    assert!(!draft.is_empty() && study["text"] == draft);
    // The same film again is the same study.
    let mut again = upload("P-778", "A-1");
    again["study"] = id.into();
    assert_eq!(
        good(&post(&signer, "/v1/studies", again))["films"],
        json!([study["films"][0]["id"]])
    );

    // The film with its levels.
    let film = study["films"][0]["id"].as_str().unwrap();
    let path = format!("/v1/studies/{id}/films/{film}");
    let shown = send(&server, &reader, "GET", &path, &Value::Null);
    assert_eq!(shown.status, 200);
    let facts: Value = serde_json::from_str(shown.header("x-film").unwrap()).unwrap();
    assert!(
        facts["width"].as_u64().unwrap() > 100 && facts["window"] == 255.0,
        "{facts}"
    );

    // Editing needs the revision that was read.
    let report = format!("/v1/studies/{id}/report");
    let revision = study["revision"].as_u64().unwrap();
    let edited = json!({"text": "右侧气胸。", "revision": revision});
    let kept = good(&post(&signer, &report, edited.clone()));
    assert_eq!(kept["edited"]["by"], "李医生");
    let late = post(&signer, &report, edited);
    assert_eq!(
        (late.status, &late.json()["error"]["code"]),
        (409, &json!("study_changed"))
    );

    let sign = format!("/v1/studies/{id}/sign");
    let text = json!({"text": "右侧气胸。", "revision": revision + 1, "consent": true});
    // Roles are refused by name, and nobody signs as somebody else.
    for (key, role) in [
        (&reader, "`reader`"),
        (&"a-program-key".to_owned(), "`api`"),
    ] {
        let refused = post(key, &sign, text.clone());
        assert_eq!(refused.status, 403);
        let message = refused.json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(
            message.contains(role) && message.contains("`sign`"),
            "{message}"
        );
    }
    let mut other = text.clone();
    other["name"] = "赵主任".into();
    assert_eq!(post(&signer, &sign, other).status, 400);
    let signed = good(&post(&signer, &sign, text));
    assert_eq!(
        (&signed["state"], &signed["signed"][0]["by"]),
        (&json!("signed"), &json!("李医生"))
    );
    // What is signed takes no film and no new draft.
    let mut late = upload("P-778", "A-1");
    late["study"] = id.into();
    let mut another = fs::read(demo_image()).unwrap();
    another.extend(b"another file");
    late["films"][0]["file"] = STANDARD.encode(another).into();
    assert_eq!(post(&signer, "/v1/studies", late).status, 409);
    assert_eq!(
        post(&signer, &format!("/v1/studies/{id}/draft"), json!({})).status,
        409
    );

    // The list, its search, and who may see it.
    let found = good(&post(
        &reader,
        "/v1/worklist",
        json!({"search": "p-778 气胸", "state": ["signed"]}),
    ));
    assert_eq!(
        (&found["total"], &found["studies"][0]["id"]),
        (&json!(1), &json!(id))
    );
    assert_eq!(post("a-program-key", "/v1/worklist", json!({})).status, 403);
    assert_eq!(
        post("wrong-key-0000", "/v1/worklist", json!({})).status,
        401
    );
    assert_eq!(server.post("/v1/worklist", &json!({})).status, 401);
    assert_eq!(server.get(&path).status, 401);
    assert_eq!(
        post(&reader, "/v1/studies", upload("P-1", "A-2")).status,
        403
    );
    assert_eq!(
        send(&server, &reader, "GET", "/metrics", &Value::Null).status,
        403
    );
    assert_eq!(
        send(&server, &administrator, "GET", "/metrics", &Value::Null).status,
        200
    );
    assert_eq!(
        post(&reader, "/v1/chat/completions", json!({"messages": []})).status,
        403
    );

    let document = send(
        &server,
        &reader,
        "GET",
        &format!("/v1/studies/{id}/report.docx"),
        &Value::Null,
    );
    assert!(document.body.contains("word/document.xml") && document.body.contains("李医生"));
    let table = post(&reader, "/v1/worklist.csv", json!({})).body;
    assert!(table.contains("右侧气胸。"), "{table}");

    // Nothing of the patient is in the log, nor in what an error says.
    let missing = send(&server, &reader, "GET", "/v1/studies/00", &Value::Null);
    assert_eq!(missing.status, 404);
    let log = server.log();
    for word in ["张三丰", "P-778", "A-1", "气胸", &signer, &reader] {
        assert!(!log.contains(word), "the log has `{word}`");
    }
    drop(server);

    // A key that was taken away opens nothing; the study is as it was.
    let store = bench.store();
    let (code, ..) = bench.command(&[
        "store",
        "key",
        "remove",
        "--store",
        &store,
        "--name",
        "王护士",
    ]);
    assert_eq!(code, 0);
    let server = bench.serve(&[]);
    assert_eq!(
        send(&server, &reader, "GET", "/v1/account", &Value::Null).status,
        401
    );
    let account = good(&send(&server, &signer, "GET", "/v1/account", &Value::Null));
    assert_eq!(
        (&account["name"], &account["role"]),
        (&json!("李医生"), &json!("signer"))
    );
    let study = good(&send(
        &server,
        &signer,
        "GET",
        &format!("/v1/studies/{id}"),
        &Value::Null,
    ));
    assert_eq!(
        (&study["text"], &study["draft"]["text"]),
        (&json!("右侧气胸。"), &json!(draft))
    );
    assert_eq!(bench.verified()["faults"], json!([]));
    let (_, lines, _) = bench.command(&["store", "audit", "--store", &store, "--study", id]);
    for action in [
        "receive", "complete", "draft", "edit", "sign", "look", "export",
    ] {
        assert!(
            lines.contains(&format!("\"action\":\"{action}\"")),
            "{action}: {lines}"
        );
    }

    // The export names nobody, and `check` reads it.
    let args = [
        "export",
        "--store",
        &store,
        "--signed",
        "--output",
        "train.jsonl",
    ];
    let (code, _, stderr) = bench.command(&args);
    assert_eq!(code, 0, "{stderr}");
    let rows = fs::read_to_string(bench.folder.path().join("train.jsonl")).unwrap();
    assert!(
        rows.contains("右侧气胸。")
            && !rows.contains("张三丰")
            && !rows.contains("P-778")
            && !rows.contains(id)
    );
    let (code, stdout, stderr) = bench.command(&["check", "train.jsonl"]);
    assert_eq!(code, 0, "{stdout} {stderr}");
    let (code, _, stderr) =
        bench.command(&["store", "edits", "--store", &store, "--output", "edits.svg"]);
    assert_eq!(code, 0, "{stderr}");

    // Who looks for something wrong finds it.
    send(
        &server,
        &administrator,
        "POST",
        &format!("/v1/studies/{id}/delete"),
        &Value::Null,
    );
    assert_eq!(
        send(
            &server,
            &signer,
            "GET",
            &format!("/v1/studies/{id}"),
            &Value::Null
        )
        .status,
        404
    );
}

#[test]
fn a_store_without_accounts_and_a_server_without_a_store() {
    let bench = Bench::new();
    let store = bench.store();
    let (code, _, stderr) =
        bench.command(&["serve", "--device", "cpu", "--port", "0", "--store", &store]);
    assert_eq!(code, 2);
    assert!(
        stderr.contains("store key add") && stderr.contains("--no-auth"),
        "{stderr}"
    );
    // Without accounts, whoever signs gives a name.
    let server = bench.serve(&["--no-auth"]);
    let id = good(&server.post("/v1/studies", &upload("", "")))["id"].clone();
    let id = id.as_str().unwrap();
    let study = drafted(&server, "", id);
    let path = format!("/v1/studies/{id}/sign");
    let mut body = json!({"text": "双肺清晰。", "revision": study["revision"]});
    assert_eq!(server.post(&path, &body).json()["error"]["param"], "name");
    body["name"] = "李医生".into();
    assert_eq!(
        good(&server.post(&path, &body))["signed"][0]["by"],
        "李医生"
    );
    assert_eq!(server.get("/worklist").status, 200);
    assert_eq!(server.get("/v1/limits").json()["studies"], true);
    drop(server);

    let plain = start(&QUICK[..4]);
    for path in ["/worklist", "/v1/account", "/work/work.js"] {
        assert_eq!(plain.get(path).status, 404, "{path}");
    }
    assert!(plain.get("/v1/limits").json().get("studies").is_none());
    assert_eq!(plain.get("/").status, 200);
}

#[test]
fn a_proxy_names_accounts_and_nobody_else_does() {
    let bench = Bench::new();
    bench.account("li", "signer", &["--proxy"]);
    let more = ["--user-header", "x-remote-user", "--trusted-proxy"];
    let server = bench.serve(&[&more[..], &["127.0.0.1"]].concat());
    let of = |server: &Server, head: &[&str]| server.send("GET", "/v1/account", head, b"");
    assert_eq!(of(&server, &["x-remote-user: li"]).json()["name"], "li");
    assert_eq!(of(&server, &["x-remote-user: wang"]).status, 401);
    assert_eq!(of(&server, &[]).status, 401);
    drop(server);
    let server = bench.serve(&[&more[..], &["192.0.2.1"]].concat());
    assert_eq!(of(&server, &["x-remote-user: li"]).status, 401);
}

#[test]
fn what_was_kept_survives_kill_9_at_any_moment() {
    let bench = Bench::new();
    let key = bench.account("li", "signer", &[]);
    let mut kept: Vec<String> = Vec::new();
    for round in 0..4 {
        let server = bench.serve(&[]);
        let (sender, answers) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            for worker in 0..3 {
                let (sender, server, key) = (sender.clone(), &server, &key);
                scope.spawn(move || {
                    for number in 0..50 {
                        let mut body = upload("P", &format!("{round}-{worker}-{number}"));
                        body["study_uid"] = format!("1.2.{round}.{worker}.{number}").into();
                        let sent = std::panic::catch_unwind(|| {
                            send(server, key, "POST", "/v1/studies", &body)
                        });
                        match sent {
                            Ok(response) if response.status == 201 => {
                                let id = response.json()["id"].as_str().unwrap().to_owned();
                                sender.send(id).unwrap();
                            }
                            // The server is gone.
                            _ => return,
                        }
                    }
                });
            }
            thread::sleep(Duration::from_millis(150 + 170 * round));
            let id = server.child.id().to_string();
            assert!(
                std::process::Command::new("kill")
                    .args(["-9", &id])
                    .status()
                    .unwrap()
                    .success()
            );
        });
        drop(sender);
        kept.extend(answers);
    }
    assert!(kept.len() > 4, "only {} studies came in", kept.len());
    let server = bench.serve(&[]);
    for id in &kept {
        let study = good(&send(
            &server,
            &key,
            "GET",
            &format!("/v1/studies/{id}"),
            &Value::Null,
        ));
        assert_eq!(study["films"].as_array().unwrap().len(), 1);
    }
    let found = bench.verified();
    assert!(
        found["studies"].as_u64().unwrap() as usize >= kept.len(),
        "{found}"
    );
    // No file is left that no record knows.
    let films = Path::new(&bench.store()).join("films");
    let files: usize = fs::read_dir(films)
        .unwrap()
        .map(|folder| fs::read_dir(folder.unwrap().path()).unwrap().count())
        .sum();
    assert_eq!(files as u64, found["films"].as_u64().unwrap());
}
