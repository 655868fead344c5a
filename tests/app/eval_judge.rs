//! `eval --judge` against servers of its own, `--export` read back as the other programs read it, and English reports.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::{run, server::start};

/// What a request is answered with: status and body.
type Reply = (u16, String);

/// A judge made of a rule. It keeps the head and body of each request.
struct Judge {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Judge {
    fn new(reply: impl Fn(usize, &Value) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<(String, Value)>>> = Arc::default();
        let kept = seen.clone();
        let reply = Arc::new(reply);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (kept, reply) = (kept.clone(), reply.clone());
                thread::spawn(move || answer(stream, &kept, &*reply));
            }
        });
        Self { address, seen }
    }

    fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    fn asked(&self) -> usize {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .filter(|(head, _)| head.starts_with("POST"))
            .count()
    }
}

fn answer(
    stream: TcpStream,
    seen: &Mutex<Vec<(String, Value)>>,
    reply: &dyn Fn(usize, &Value) -> Reply,
) {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while reader.read_line(&mut head).is_ok_and(|read| read > 2) {}
    let length = head
        .lines()
        .find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.trim().parse().ok())?
        })
        .unwrap_or(0);
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    let (status, text) = if head.starts_with("GET /v1/models ") {
        (200, json!({"data": [{"id": "rule"}]}).to_string())
    } else {
        let body: Value = serde_json::from_slice(&body).unwrap();
        let number = {
            let mut seen = seen.lock().unwrap();
            seen.push((head.clone(), body.clone()));
            seen.len() - 1
        };
        reply(number, &body)
    };
    let _ = write!(
        reader.get_mut(),
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    );
}

fn chat(content: &str) -> String {
    json!({"choices": [{"message": {"role": "assistant", "content": content}}]}).to_string()
}

/// Reference and answer of a request.
fn reports(body: &Value) -> (String, String) {
    let asked = body["messages"][1]["content"].as_str().unwrap();
    let (reference, answer) = asked.split_once("\n\n待评报告：\n").unwrap();
    let reference = reference.strip_prefix("参考报告：\n").unwrap();
    (reference.to_owned(), answer.to_owned())
}

/// Finds another side, a comparison and a degree, and nothing else.
fn judged(body: &Value) -> Reply {
    let (reference, answer) = reports(body);
    let has = |word: &str| (reference.contains(word), answer.contains(word));
    let mut kinds = Vec::new();
    match has("较前") {
        (false, true) => kinds.push("invented_comparison"),
        (true, false) => kinds.push("omitted_comparison"),
        _ => {}
    }
    if has("少量") != has("大量") && reference != answer && reference.contains('量') {
        kinds.push("wrong_severity");
    } else if reference.replace('左', "右") == answer.replace('左', "右") && reference != answer
    {
        kinds.push("wrong_location");
    }
    let errors: Vec<Value> = kinds
        .iter()
        .map(|kind| json!({"kind": kind, "significant": true, "text": "不同"}))
        .collect();
    let judgement = json!({"errors": errors, "matched": ["胸腔积液"]});
    (200, chat(&judgement.to_string()))
}

fn predictions(folder: &Path) {
    let rows = [
        ("a", "左侧胸腔积液。", "右侧胸腔积液。"),
        ("b", "心影增大。", "心影增大。"),
        ("c", "右侧气胸。", "右侧气胸，较前增多。"),
    ];
    let lines: String = rows
        .iter()
        .map(|(study, truth, answer)| {
            format!("{}\n", json!({"study": study, "image": format!("{study}.png"), "reference": truth, "report": answer}))
        })
        .collect();
    fs::write(folder.join("p.jsonl"), lines).unwrap();
}

fn eval(folder: &Path, args: &[&str]) -> (i32, String, String, Value) {
    let mut all = vec!["eval", "p.jsonl", "--resamples", "20", "--json", "out.json"];
    all.extend(args);
    let (code, stdout, stderr) = run(folder, &all);
    let json = fs::read_to_string(folder.join("out.json")).unwrap_or_default();
    let json = serde_json::from_str(&json).unwrap_or(Value::Null);
    (code, stdout, stderr, json)
}

#[test]
fn a_judge_is_asked_once_a_report_and_its_answers_are_kept() {
    let judge = Judge::new(|_, body| judged(body));
    let folder = tempdir().unwrap();
    predictions(folder.path());
    let (code, _, stderr, json) = eval(folder.path(), &[]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(json["judge"], Value::Null);
    assert_eq!(judge.asked(), 0, "nothing is sent without the flag");
    let url = judge.url();
    let args = ["--judge", &url, "--html", "out.html"];
    let (code, stdout, stderr, json) = eval(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(judge.asked(), 3);
    let found = &json["judge"];
    assert_eq!(found["model"], "rule");
    assert_eq!((&found["judged"], &found["known"]), (&json!(3), &json!(0)));
    // 1/2, 1/1 and 1/2.
    let green = found["green"]["value"].as_f64().unwrap();
    assert!((green - 2.0 / 3.0).abs() < 1e-9, "{green}");
    assert_eq!(found["by_kind"]["wrong_location"]["significant"], 1);
    assert_eq!(found["by_kind"]["invented_comparison"]["reports"], 1);
    assert!(stdout.contains("GREEN 0.667"), "{stdout}");
    let told = json["warnings"].to_string();
    assert!(
        told.contains("was sent to") && told.contains(&url),
        "{told}"
    );
    let page = fs::read_to_string(folder.path().join("out.html")).unwrap();
    assert!(page.contains("GREEN 0.667") && page.contains("部位或侧别错误"));
    let (_, body) = judge.seen.lock().unwrap()[0].clone();
    assert_eq!(body["temperature"], 0);
    assert_eq!(body["response_format"]["type"], "json_schema");
    // The same again asks nothing.
    let (code, _, stderr, json) = eval(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(judge.asked(), 3);
    assert_eq!(json["judge"]["known"], 3);
}

#[test]
fn what_goes_wrong_is_tried_again_counted_and_told() {
    // The first request fails, the server knows no schema, and one answer is prose.
    let judge = Judge::new(|number, body| match number {
        0 => (503, "busy".to_owned()),
        _ if body.get("response_format").is_some() => {
            (400, "response_format is not supported".to_owned())
        }
        _ if reports(body).0.contains("心影") => (200, chat("两份报告一致。")),
        _ => judged(body),
    });
    let folder = tempdir().unwrap();
    predictions(folder.path());
    let url = judge.url();
    let args = ["--judge", &url, "--judge-concurrency", "1"];
    let (code, _, stderr, json) = eval(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    let found = &json["judge"];
    assert_eq!(
        (&found["judged"], &found["unreadable"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(found["schema"], false);
    assert_eq!(found["cases"][1], Value::Null);
    let told = json["warnings"].to_string();
    assert!(
        told.contains("1 answer of the judge cannot be read"),
        "{told}"
    );
    assert!(told.contains("does not hold answers to a schema"), "{told}");
    // What could not be read is asked again.
    let before = judge.asked();
    eval(folder.path(), &args);
    assert_eq!(judge.asked(), before + 2, "with the schema, and without");
}

#[test]
fn a_judge_that_refuses_ends_the_run_and_a_later_one_goes_on() {
    let judge = Judge::new(|number, body| match number {
        0 => judged(body),
        1 => (401, "no such key".to_owned()),
        _ => judged(body),
    });
    let folder = tempdir().unwrap();
    predictions(folder.path());
    let url = judge.url();
    let args = ["--judge", &url, "--judge-concurrency", "1"];
    let (code, _, stderr, json) = eval(folder.path(), &args);
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("status 401") && stderr.contains("out.judge.jsonl"),
        "{stderr}"
    );
    assert_eq!(json, Value::Null);
    let (code, _, stderr, json) = eval(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(json["judge"]["known"], 1);
    let (code, _, stderr, _) = eval(
        folder.path(),
        &["--judge", &url, "--judge-key-env", "XRAY_NO_SUCH_KEY"],
    );
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("`XRAY_NO_SUCH_KEY` is not set"), "{stderr}");
    let (code, _, stderr, _) = eval(folder.path(), &["--judge", "127.0.0.1:1"]);
    assert_ne!(code, 0);
    assert!(stderr.contains("no address of a judge"), "{stderr}");
    let (code, _, _, _) = eval(folder.path(), &["--judge-check"]);
    assert_eq!(code, 2);
}

#[test]
fn planted_errors_measure_the_judge() {
    let judge = Judge::new(|_, body| judged(body));
    let folder = tempdir().unwrap();
    predictions(folder.path());
    let url = judge.url();
    let (code, stdout, stderr, json) = eval(
        folder.path(),
        &["--judge", &url, "--judge-check", "--html", "out.html"],
    );
    assert_eq!(code, 0, "{stderr}");
    let check = &json["judge"]["check"];
    for (kind, recall) in [
        ("wrong_location", 1.0),
        ("wrong_severity", 1.0),
        ("invented_comparison", 1.0),
        ("omitted_comparison", 1.0),
        ("false_finding", 0.0),
        ("missing_finding", 0.0),
    ] {
        assert_eq!(check["by_kind"][kind]["recall"], recall, "{kind}: {check}");
        assert_eq!(check["by_kind"][kind]["planted"], 20, "{kind}");
    }
    assert_eq!(check["by_kind"]["wrong_severity"]["precision"], 1.0);
    assert_eq!(check["by_kind"]["false_finding"]["precision"], Value::Null);
    assert_eq!(
        (&check["clean"], &check["called_clean"]),
        (&json!(20), &json!(20))
    );
    assert!(stdout.contains("planted errors"), "{stdout}");
    let page = fs::read_to_string(folder.path().join("out.html")).unwrap();
    assert!(page.contains("植入") && page.contains("100.0 %"));
}

/// The same judgement as language models write it: after reasoning, in a fence, with words around, with keys of their
/// own, with Chinese names of the kinds, corrected once.
fn in_some_habit(number: usize, judgement: &str) -> String {
    match number % 6 {
        0 => format!("<think>\n先看心影，再看胸膜腔{{左、右}}。\n</think>\n\n{judgement}"),
        1 => format!("```json\n{judgement}\n```"),
        2 => format!("以下是评审结果：\n\n```json\n{judgement}\n```\n\n如需进一步说明请告知。"),
        3 => judgement.replacen('{', "{\"explanation\":\"逐句核对\",", 1),
        4 => judgement
            .replace("wrong_location", "部位或侧别错误")
            .replace("invented_comparison", "虚构对比"),
        _ => format!("{{\"errors\":[],\"matched\":[]}}\n更正如下：{judgement}"),
    }
}

#[test]
fn a_judge_with_the_habits_of_language_models_is_read() {
    // Rate limits now and then, two kinds of refusal, an answer that is cut off, and else some habit.
    let judge = Judge::new(|number, body| {
        let (status, text) = judged(body);
        let answer: Value = serde_json::from_str(&text).unwrap();
        let judgement = answer["choices"][0]["message"]["content"].as_str().unwrap();
        match number % 50 {
            7 => (
                429,
                "{\"error\":{\"code\":\"rate_limit_exceeded\"}}".to_owned(),
            ),
            20 => (200, chat("抱歉，我无法评价医学影像报告，请咨询专业医生。")),
            30 => {
                let refusal = json!({"content": null, "refusal": "I can't help with that."});
                (200, json!({"choices": [{"message": refusal}]}).to_string())
            }
            40 => (200, chat(&judgement[..judgement.len() / 2])),
            _ => (status, chat(&in_some_habit(number, judgement))),
        }
    });
    let folder = tempdir().unwrap();
    predictions(folder.path());
    let url = judge.url();
    let args = ["--judge", &url, "--judge-check", "--judge-concurrency", "1"];
    let (code, stdout, stderr, json) = eval(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    // 143 pairs and three rate limits: numbers 20, 30, 40, 70, … up to 145.
    assert_eq!(judge.asked(), 143 + 3);
    let check = &json["judge"]["check"];
    assert_eq!(check["unreadable"], 9, "{check}");
    assert_eq!(check["judged"], 131);
    // What was read was read right: nothing is named that was not planted.
    let mut lost = 20 - check["called_clean"].as_u64().unwrap();
    for kind in [
        "wrong_location",
        "wrong_severity",
        "invented_comparison",
        "omitted_comparison",
    ] {
        let of = &check["by_kind"][kind];
        assert_eq!(of["found"], of["named"], "{kind}: {of}");
        lost += 20 - of["found"].as_u64().unwrap();
    }
    assert!(lost <= 9, "{check}");
    assert!(stdout.contains("9 unreadable"), "{stdout}");
}

#[test]
fn a_slow_server_that_limits_the_rate_and_knows_other_parameters_is_waited_for() {
    // Like a model that reasons: another name for the limit of tokens, no temperature, reasoning that is cut off once,
    // four refusals for the rate in a row, and every answer late.
    let judge = Judge::new(|number, body| {
        thread::sleep(Duration::from_millis(300));
        let bad = |text: &str| (400, json!({"error": {"message": text}}).to_string());
        if body.get("max_tokens").is_some() {
            return bad(
                "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            );
        }
        if body.get("temperature").is_some() {
            return bad("Unsupported value: 'temperature' does not support 0 with this model.");
        }
        match number {
            2..=5 => (
                429,
                "{\"error\":{\"code\":\"rate_limit_exceeded\"}}".to_owned(),
            ),
            6 => (
                200,
                chat("<think>先写草稿：{\"errors\":[],\"matched\":[\"心影\"]}，再看"),
            ),
            _ => judged(body),
        }
    });
    let folder = tempdir().unwrap();
    predictions(folder.path());
    let url = judge.url();
    let args = ["--judge", &url, "--judge-concurrency", "1"];
    let (code, _, stderr, json) = eval(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    let found = &json["judge"];
    assert_eq!(
        (&found["judged"], &found["unreadable"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(
        (&found["failed"], &found["schema"]),
        (&json!(0), &json!(true))
    );
    let told = json["warnings"].to_string();
    assert!(told.contains("reasoning did not come to an end"), "{told}");
    // A server that never answers ends the run after the time that is given; no answer is kept from before.
    let folder = tempdir().unwrap();
    predictions(folder.path());
    let silent = Judge::new(|_, _| {
        thread::sleep(Duration::from_secs(5));
        (200, String::new())
    });
    let url = silent.url();
    let args = ["--judge", &url, "--judge-timeout-seconds", "1"];
    let (code, _, stderr, _) = eval(folder.path(), &args);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("timeout"), "{stderr}");
}

#[test]
fn the_tiny_model_as_judge_is_unreadable_or_held_to_the_schema() {
    let server = start(&[]);
    let folder = tempdir().unwrap();
    predictions(folder.path());
    let url = format!("http://{}/v1", server.address);
    let (code, stdout, stderr, json) = eval(
        folder.path(),
        &[
            "--judge",
            &url,
            "--limit",
            "1",
            "--judge-timeout-seconds",
            "50",
        ],
    );
    assert_eq!(code, 0, "{stdout}{stderr}");
    let found = &json["judge"];
    let of = |key: &str| found[key].as_u64().unwrap();
    assert_eq!(of("judged") + of("unreadable") + of("failed"), 1, "{found}");
    if of("judged") == 0 {
        assert!(
            found["first_fault"].is_string() && found["green"].is_null(),
            "{found}"
        );
    }
}

#[test]
fn exports_are_what_the_other_programs_read() {
    let folder = tempdir().unwrap();
    let rows = [
        (
            "s1",
            "FINDINGS: Small left effusion. IMPRESSION: Effusion.",
            "Left pleural effusion.",
        ),
        ("s2", "The lungs are clear.", ""),
    ];
    let lines: String = rows
        .iter()
        .map(|(study, truth, answer)| {
            format!("{}\n", json!({"study": study, "image": format!("{study}.png"), "reference": truth, "report": answer}))
        })
        .collect();
    fs::write(folder.path().join("p.jsonl"), lines).unwrap();
    let (code, _, stderr, json) = eval(folder.path(), &["--export", "radeval", "radeval.json"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains("`english`, guessed") && stderr.contains("are english, guessed"),
        "{stderr}"
    );
    assert_eq!(json["language"], "english");
    assert_eq!(json["rules"]["name"], "english");
    let read = |name: &str| -> Value {
        serde_json::from_str(&fs::read_to_string(folder.path().join(name)).unwrap()).unwrap()
    };
    // RadEval: evaluator(refs=file["references"], hyps=file["hypotheses"]).
    let radeval = read("radeval.json");
    let list = |key: &str| radeval[key].as_array().unwrap().clone();
    assert_eq!(list("references").len(), list("hypotheses").len());
    assert_eq!(list("references")[1], rows[1].1);
    assert_eq!(list("hypotheses")[0], rows[0].2);
    let (code, _, stderr, _) = eval(folder.path(), &["--export", "rexrank", "rexrank.json"]);
    assert_eq!(code, 0, "{stderr}");
    // ReXrank's split_json: for study, row in file.items(): row["model_prediction"], row["section_findings"], row["section_impression"].
    let rexrank = read("rexrank.json");
    assert_eq!(rexrank.as_object().unwrap().len(), 2);
    for (study, _, answer) in rows {
        assert_eq!(rexrank[study]["model_prediction"], answer);
        for key in ["section_findings", "section_impression"] {
            assert!(rexrank[study][key].is_string(), "{study} {key}");
        }
    }
    assert_eq!(rexrank["s1"]["section_findings"], "Small left effusion.");
    assert_eq!(rexrank["s1"]["section_impression"], "Effusion.");
    let (code, _, stderr, _) = eval(folder.path(), &["--export", "csv", "x"]);
    assert_eq!(code, 2, "{stderr}");
    let (_, _, _, json) = eval(folder.path(), &["--language", "chinese"]);
    assert_eq!(json["language"], "chinese");
    let told = json["warnings"].to_string();
    assert!(told.contains("the answers are english"), "{told}");
}
