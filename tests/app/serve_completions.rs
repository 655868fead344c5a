//! `serve` from outside: text that goes on, and tokens.

use serde_json::{Value, json};

use crate::server::{Server, question, start, with};

fn complete(server: &Server, more: Value) -> Value {
    let mut body = json!({"prompt": "心影", "max_tokens": 6, "ignore_eos": true});
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    let response = server.post("/v1/completions", &body);
    assert_eq!(response.status, 200, "{response:?}");
    response.json()
}

fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap();
    choices
        .iter()
        .enumerate()
        .map(|(index, choice)| {
            assert_eq!(choice["index"], index);
            choice["text"].as_str().unwrap().to_owned()
        })
        .collect()
}

#[test]
fn a_text_goes_on_without_a_template() {
    let server = start(&[]);
    let one = complete(&server, json!({}));
    assert_eq!(one["object"], "text_completion");
    assert!(one["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(one["usage"]["completion_tokens"], 6);
    let text = texts(&one)[0].clone();
    let counted = server.post("/tokenize", &json!({"prompt": "心影"})).json();
    assert_eq!(one["usage"]["prompt_tokens"], counted["count"]);

    let ids = counted["tokens"].clone();
    assert_eq!(
        texts(&complete(&server, json!({"prompt": ids}))),
        std::slice::from_ref(&text)
    );
    let prompts = json!({"prompt": ["肺", "心影"], "n": 2, "temperature": 1.0, "seed": 5});
    let several = texts(&complete(&server, prompts.clone()));
    assert_eq!(several.len(), 4);
    assert_eq!(texts(&complete(&server, prompts)), several);
    let lists = json!({"prompt": [ids, ids]});
    assert_eq!(
        texts(&complete(&server, lists)),
        [text.clone(), text.clone()]
    );
    let echoed = complete(&server, json!({"echo": true}));
    assert_eq!(texts(&echoed), [format!("心影{text}")]);
    let by_id = complete(&server, json!({"prompt": ids, "echo": true}));
    assert_eq!(texts(&by_id), texts(&echoed));
    // OpenAI's number of tokens when none is named.
    let default = complete(&server, json!({"max_tokens": null, "ignore_eos": true}));
    assert_eq!(default["usage"]["completion_tokens"], 16);
    let digits = complete(&server, json!({"guided_regex": "[0-9]{3}"}));
    assert!(texts(&digits)[0].parse::<u32>().is_ok(), "{digits}");
    let end = complete(&server, json!({"truncate_prompt_tokens": 1}));
    assert_eq!(end["usage"]["prompt_tokens"], 1);
}

#[test]
fn a_streamed_text_is_the_whole_one() {
    let server = start(&[]);
    for more in [
        json!({}),
        json!({"echo": true, "n": 2}),
        json!({"echo": true, "logprobs": 1, "n": 2}),
    ] {
        let whole = complete(&server, more.clone());
        let mut body = json!({"prompt": "心影", "max_tokens": 6, "ignore_eos": true, "stream": true,
            "stream_options": {"include_usage": true}});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let mut events = server.post("/v1/completions", &body).events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        let mut found = vec![String::new(); texts(&whole).len()];
        let mut offsets = vec![Vec::new(); found.len()];
        let mut usage = Value::Null;
        for event in events {
            let chunk: Value = serde_json::from_str(&event).unwrap();
            if chunk.get("usage").is_some() {
                usage = chunk["usage"].clone();
            }
            for choice in chunk["choices"].as_array().unwrap() {
                let index = choice["index"].as_u64().unwrap() as usize;
                found[index].push_str(choice["text"].as_str().unwrap());
                let more = choice["logprobs"]["text_offset"].as_array().cloned();
                offsets[index].extend(more.unwrap_or_default());
            }
        }
        assert_eq!(found, texts(&whole), "{more}");
        assert_eq!(
            usage["completion_tokens"],
            whole["usage"]["completion_tokens"]
        );
        if more.get("logprobs").is_some() {
            for (index, offsets) in offsets.iter().enumerate() {
                let of_whole = &whole["choices"][index]["logprobs"]["text_offset"];
                assert_eq!(&json!(offsets), of_whole);
            }
        }
    }
}

#[test]
fn a_text_is_scored() {
    let server = start(&[]);
    let scored = complete(
        &server,
        json!({"prompt": "心影正常。", "echo": true, "max_tokens": 0, "logprobs": 2}),
    );
    let choice = &scored["choices"][0];
    assert_eq!(choice["text"], "心影正常。");
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    let lists = &choice["logprobs"];
    let tokens = lists["tokens"].as_array().unwrap();
    assert_eq!(
        tokens.len() as u64,
        scored["usage"]["prompt_tokens"].as_u64().unwrap()
    );
    assert!(lists["token_logprobs"][0].is_null() && lists["top_logprobs"][0].is_null());
    for (place, token) in tokens.iter().enumerate().skip(1) {
        let logprob = lists["token_logprobs"][place].as_f64().unwrap();
        assert!(logprob <= 0.0, "{token}: {logprob}");
        let top = lists["top_logprobs"][place].as_object().unwrap();
        let best = top
            .values()
            .map(|one| one.as_f64().unwrap())
            .fold(f64::MIN, f64::max);
        assert!(best >= logprob - 1e-4);
    }
    // The scores are those of the same tokens when the model writes them.
    let written = complete(&server, json!({"logprobs": 0, "ignore_eos": false}));
    let text = texts(&written)[0].clone();
    let again =
        json!({"prompt": format!("心影{text}"), "echo": true, "max_tokens": 0, "logprobs": 0});
    let again = complete(&server, again);
    let of = |answer: &Value| {
        answer["choices"][0]["logprobs"]["token_logprobs"]
            .as_array()
            .unwrap()
            .clone()
    };
    let (written, again) = (of(&written), of(&again));
    let end = &again[again.len() - written.len()..];
    for (one, other) in written.iter().zip(end) {
        let (one, other) = (one.as_f64().unwrap(), other.as_f64().unwrap());
        // Prompt and steps go through different kernels in f32.
        assert!((one - other).abs() < 1e-2, "{one} and {other}");
    }
}

#[test]
fn what_a_text_request_cannot_have_is_refused_by_name() {
    let server = start(&[]);
    for (more, param, says) in [
        (json!({"suffix": "."}), "suffix", "fills no gap"),
        (json!({"prompt": null}), "prompt", "missing"),
        (json!({"prompt": [1, "a"]}), "prompt", "list of token ids"),
        (json!({"prompt": [999_999]}), "prompt", "token ids below"),
        (json!({"prompt": ""}), "prompt", "empty"),
        (
            json!({"prompt": "<|image_pad|>"}),
            "prompt",
            "/v1/chat/completions",
        ),
        (json!({"messages": []}), "messages", "/v1/chat/completions"),
        (json!({"best_of": 3}), "best_of", "have to be equal"),
        (json!({"max_tokens": 0}), "max_tokens", "expected 1"),
        (json!({"logprobs": true}), "logprobs", "whole number"),
    ] {
        let mut body = json!({"prompt": "心影"});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let response = server.post("/v1/completions", &body);
        assert_eq!(response.status, 400, "{more}: {response:?}");
        let error = response.json()["error"].clone();
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    }
    let other = server.post("/v1/completions", &json!({"prompt": "x", "model": "no"}));
    assert_eq!(other.status, 404);
}

#[test]
fn tokens_and_text_are_each_others() {
    let server = start(&[]);
    let text = "心影正常。<|im_end|>\nabc";
    let found = server
        .post("/tokenize", &json!({"prompt": text, "model": "tiny"}))
        .json();
    assert!(found["max_model_len"].as_u64().unwrap() >= 512);
    assert_eq!(found["token_strs"], Value::Null);
    let back = server
        .post("/detokenize", &json!({"tokens": found["tokens"]}))
        .json();
    assert_eq!(back["prompt"], text);
    let empty = server.post("/tokenize", &json!({"prompt": ""})).json();
    assert_eq!(empty["count"], 0);
    // A conversation has as many tokens as its answer says.
    let asked = question("有什么异常？");
    let counted = server
        .post("/tokenize", &json!({"messages": asked["messages"]}))
        .json();
    let answer = server.chat(&with(asked, "max_tokens", 1.into())).json();
    assert_eq!(counted["count"], answer["usage"]["prompt_tokens"]);
    for (path, body, param) in [
        ("/detokenize", json!({"tokens": [999_999]}), "tokens"),
        ("/detokenize", json!({"tokens": ["a"]}), "tokens"),
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": "x", "promt": 1}), "promt"),
    ] {
        let refused = server.post(path, &body);
        assert_eq!(refused.status, 400, "{refused:?}");
        assert_eq!(refused.json()["error"]["param"], param);
    }
}
