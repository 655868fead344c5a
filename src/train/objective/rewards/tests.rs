//! Each reward on answers whose value can be worked out by hand.

use super::*;

fn answered(truth: &str, answer: &str) -> Answered {
    Answered {
        row: 0,
        truth: truth.to_owned(),
        answer: answer.to_owned(),
        thinking: None,
        ended: true,
    }
}

fn values(config: RewardConfig, answers: &[Answered]) -> Vec<f64> {
    let mut rewards = Rewards::new(&[config], Some("hospital"), []).unwrap();
    rewards.of(answers).unwrap().parts.remove(0).1
}

fn kind(kind: RewardKind) -> RewardConfig {
    RewardConfig {
        kind,
        ..RewardConfig::default()
    }
}

#[test]
fn findings_count_by_side() {
    let answers = [
        answered("左侧胸腔积液。", "左侧胸腔积液。"),
        answered("左侧胸腔积液。", "右侧胸腔积液。"),
        answered("左侧胸腔积液。", "双侧胸腔积液。"),
        answered("左侧胸腔积液。", ""),
    ];
    let found = values(kind(RewardKind::FindingF1), &answers);
    assert!(
        (found[0] - 1.0).abs() < 1e-9 && found[1] == 0.0 && found[3] == 0.0,
        "{found:?}"
    );
    assert!((found[2] - 2.0 / 3.0).abs() < 1e-9, "{found:?}");
    let config = RewardConfig {
        side: Some(false),
        ..kind(RewardKind::FindingF1)
    };
    assert!((values(config, &answers)[1] - 1.0).abs() < 1e-9);
}

#[test]
fn the_degree_counts_where_it_is_asked_for() {
    let answers = [answered("左侧少量胸腔积液。", "左侧大量胸腔积液。")];
    assert!((values(kind(RewardKind::FindingF1), &answers)[0] - 1.0).abs() < 1e-9);
    let config = RewardConfig {
        severity: Some(true),
        ..kind(RewardKind::FindingF1)
    };
    assert_eq!(values(config, &answers), [0.0]);
}

#[test]
fn what_cannot_be_read_earns_nothing() {
    let read = answered("左侧胸腔积液。", "左侧胸腔积液。");
    let vague = answered("左侧胸腔积液。", "左侧胸腔积液。右肺见一奇特征。");
    let found = values(kind(RewardKind::FindingF1), &[read, vague]);
    assert!(found[1] < found[0], "{found:?}");
}

#[test]
fn comparisons_contradictions_repeats_and_length() {
    let answers = [
        answered("左侧胸腔积液。", "左侧胸腔积液，较前片增多。"),
        answered("左侧胸腔积液。", "左侧胸腔积液。未见左侧胸腔积液。"),
        answered("左侧胸腔积液。", &"左侧胸腔积液。".repeat(10)),
    ];
    assert_eq!(
        values(kind(RewardKind::UnsupportedComparison), &answers),
        [0.0, 1.0, 1.0]
    );
    assert_eq!(
        values(kind(RewardKind::Contradiction), &answers)[..2],
        [1.0, 0.0]
    );
    let repeats = values(kind(RewardKind::Repetition), &answers);
    assert!(repeats[0] == 1.0 && repeats[2] < 0.2, "{repeats:?}");
    let length = values(kind(RewardKind::Length), &answers);
    assert!(length[2] < 0.2 && length[0] < 1.0, "{length:?}");
    let config = RewardConfig {
        max_characters: Some(20),
        ..kind(RewardKind::Length)
    };
    assert_eq!(values(config, &answers)[..2], [1.0, 1.0]);
}

#[test]
fn formats_are_headings_or_keys() {
    let answers = [
        answered("x", "影像所见：双肺清晰。\n印象：未见异常。"),
        answered("x", "双肺清晰。"),
        answered("x", r#"{"findings": "x"}"#),
    ];
    assert_eq!(values(kind(RewardKind::Format), &answers)[..2], [1.0, 0.0]);
    let config = RewardConfig {
        json_keys: Some(vec!["findings".into(), "impression".into()]),
        ..kind(RewardKind::Format)
    };
    let found = values(config, &answers);
    assert_eq!(found[..2], [0.0, 0.0]);
    assert!((found[2] - 2.0 / 3.0).abs() < 1e-9);
}

#[test]
fn text_scores_are_those_of_eval() {
    let config = RewardConfig {
        metric: Some("characters.rouge_l".into()),
        ..kind(RewardKind::Text)
    };
    let found = values(
        config,
        &[
            answered("双肺清晰。", "双肺清晰。"),
            answered("双肺清晰。", "心"),
        ],
    );
    assert!(
        (found[0] - 1.0).abs() < 1e-9 && found[1] == 0.0,
        "{found:?}"
    );
}

#[test]
fn keys_that_do_not_belong_or_are_missing_are_named() {
    let text = |config: RewardConfig| config.check().unwrap_err().to_string();
    let config = RewardConfig {
        url: Some("http://x".into()),
        ..RewardConfig::default()
    };
    assert!(text(config).contains("reward `finding_f1`: `url` has no meaning"));
    assert!(text(kind(RewardKind::Command)).contains("it needs `command`"));
    assert!(text(kind(RewardKind::Http)).contains("it needs `url`"));
    assert!(text(kind(RewardKind::Text)).contains("it needs `metric`"));
}

#[test]
fn a_sum_is_weighted_and_shown_by_part() {
    let list = [
        kind(RewardKind::FindingF1),
        RewardConfig {
            weight: 0.5,
            ..kind(RewardKind::Repetition)
        },
        RewardConfig {
            weight: 0.25,
            ..kind(RewardKind::Repetition)
        },
    ];
    let mut rewards = Rewards::new(&list, Some("hospital"), []).unwrap();
    let table = rewards
        .of(&[answered("左侧胸腔积液。", "左侧胸腔积液。")])
        .unwrap();
    let names: Vec<_> = table.parts.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["finding_f1", "repetition", "repetition#2"]);
    assert!((table.totals[0] - 1.75).abs() < 1e-9);
}

#[cfg(unix)]
#[test]
fn a_program_is_asked_line_by_line_and_stays() {
    let script = "import sys, json\nn = 0\nfor line in sys.stdin:\n    n += 1\n    row = json.loads(line)\n    print(json.dumps({'reward': len(row['answer']) + 100 * n}), flush=True)\n";
    let config = RewardConfig {
        command: Some(vec!["python3".into(), "-c".into(), script.into()]),
        ..kind(RewardKind::Command)
    };
    let mut rewards = Rewards::new(&[config], None, []).unwrap();
    let answers = [answered("x", "ab"), answered("x", "abcd")];
    assert_eq!(rewards.of(&answers).unwrap().totals, [102.0, 204.0]);
    assert_eq!(rewards.of(&answers).unwrap().totals, [302.0, 404.0]);
    let config = RewardConfig {
        command: Some(vec!["false".into()]),
        ..kind(RewardKind::Command)
    };
    let mut rewards = Rewards::new(&[config], None, []).unwrap();
    let error = rewards.of(&answers).unwrap_err().to_string();
    assert!(
        error.contains("reward `command`: the program ended"),
        "{error}"
    );
}

#[test]
fn a_server_is_posted_all_answers() {
    use std::io::{BufRead, BufReader, Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/reward", listener.local_addr().unwrap());
    let serving = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream);
        let mut length = 0;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let count = body["answers"].as_array().unwrap().len();
        let answer = serde_json::json!({"rewards": vec![0.5; count]}).to_string();
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{answer}",
            answer.len()
        );
        reader.into_inner().write_all(head.as_bytes()).unwrap();
    });
    let config = RewardConfig {
        url: Some(url),
        timeout: Some(20.0),
        ..kind(RewardKind::Http)
    };
    let mut rewards = Rewards::new(&[config], None, []).unwrap();
    let answers = [answered("x", "ab"), answered("x", "abcd")];
    assert_eq!(rewards.of(&answers).unwrap().totals, [0.5, 0.5]);
    serving.join().unwrap();
}
