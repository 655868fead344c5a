//! `serve` from outside: keys of requests that OpenAI's and vLLM's clients send.

use serde_json::{Value, json};

use crate::{
    demo_image,
    server::{Server, about, data_url, question, start, with},
};

fn asked(more: Value) -> Value {
    let mut body =
        json!({"messages": [{"role": "user", "content": "请写一份报告。"}], "max_tokens": 24});
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

fn text_of(server: &Server, more: Value) -> String {
    server.chat(&asked(more)).text()
}

fn prompt_tokens(server: &Server, body: &Value) -> u64 {
    let answer = server.chat(body);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["usage"]["prompt_tokens"].as_u64().unwrap()
}

fn refused(server: &Server, more: Value, param: &str, says: &str) {
    let response = server.chat(&asked(more));
    assert_eq!(response.status, 400, "{response:?}");
    let error = &response.json()["error"];
    assert_eq!(error["param"], param, "{error}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(says), "{message}");
}

#[test]
fn words_and_stops_are_held_to_the_request() {
    let server = start(&[]);
    let plain = text_of(&server, json!({}));
    let letters: Vec<char> = plain.chars().collect();
    let word: String = letters[2..4].iter().collect();
    let without = text_of(&server, json!({"bad_words": [word]}));
    assert!(!without.contains(&word) && without != plain, "{without}");
    let stop = letters[3].to_string();
    let before = text_of(&server, json!({"stop": stop}));
    let after = text_of(
        &server,
        json!({"stop": stop, "include_stop_str_in_output": true}),
    );
    assert_eq!(after, format!("{before}{stop}"));
    let whole = json!({"skip_special_tokens": false, "include_stop_str_in_output": true, "max_tokens": 300});
    assert!(text_of(&server, whole).ends_with("<|im_end|>"));
    refused(
        &server,
        json!({"bad_words": [""]}),
        "bad_words",
        "1 to 128 bytes",
    );
    let both = json!({"bad_words": ["x"], "guided_regex": "a"});
    refused(&server, both, "bad_words", "together with a form");
}

#[test]
fn a_grammar_is_followed_in_either_form() {
    let server = start(&[]);
    let gbnf = "root ::= side \"侧\" digit{2}\nside ::= \"左\" | \"右\"\ndigit ::= [0-9]";
    let lark = "start: (\"左\" | \"右\") \"侧\" /[0-9]{2}/";
    for (key, value) in [
        ("guided_grammar", json!(gbnf)),
        ("guided_grammar", json!(lark)),
        ("structured_outputs", json!({"grammar": gbnf})),
    ] {
        let text = text_of(&server, json!({key: value}));
        let letters: Vec<char> = text.chars().collect();
        assert!(
            ['左', '右'].contains(&letters[0]) && letters[1] == '侧',
            "{text}"
        );
        assert!(
            letters.len() == 4 && letters[2..].iter().all(char::is_ascii_digit),
            "{text}"
        );
    }
    for (grammar, says) in [
        ("root ::= nobody", "no rule `nobody`"),
        ("start: (", "the grammar cannot be followed"),
    ] {
        refused(
            &server,
            json!({"guided_grammar": grammar}),
            "response_format",
            says,
        );
    }
}

#[test]
fn a_closed_schema_is_told() {
    let server = start(&[]);
    let open =
        json!({"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]});
    let codes = |schema: &Value| -> Vec<Value> {
        let answer = server.chat(&asked(json!({"guided_json": schema}))).json();
        let remarks = answer["remarks"].as_array().unwrap().clone();
        remarks.iter().map(|one| one["code"].clone()).collect()
    };
    assert_eq!(codes(&open), ["no_image", "schema_closed"]);
    assert_eq!(
        codes(&with(open, "additionalProperties", false.into())),
        ["no_image"]
    );
}

#[test]
fn an_answer_goes_on_with_the_last_message() {
    let server = start(&[]);
    let messages = json!([
        {"role": "user", "content": "？"},
        {"role": "assistant", "content": "心影"},
    ]);
    let body = |more: Value| with(asked(more), "messages", messages.clone());
    let goes_on = body(json!({"continue_final_message": true}));
    let tokens = |more: Value| {
        let mut request = json!({"messages": messages, "return_token_strs": true});
        request
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let found = server.post("/tokenize", &request).json();
        let texts = found["token_strs"].as_array().unwrap().clone();
        assert_eq!(found["count"], texts.len());
        texts
            .iter()
            .map(|one| one.as_str().unwrap())
            .collect::<String>()
    };
    assert!(tokens(json!({"continue_final_message": true})).ends_with("assistant\n心影"));
    assert!(tokens(json!({"add_generation_prompt": false})).ends_with("心影<|im_end|>\n"));
    assert!(tokens(json!({})).ends_with("<|im_start|>assistant\n"));
    assert_eq!(server.chat(&goes_on).status, 200);
    let of_user = asked(json!({"continue_final_message": true}));
    let response = server.chat(&of_user);
    assert_eq!(response.json()["error"]["param"], "continue_final_message");
    refused(
        &server,
        json!({"chat_template_kwargs": {"tone": 1}}),
        "chat_template_kwargs.tone",
        "not read by the model's chat template",
    );
    // What the template does anyway.
    assert_eq!(
        server
            .chat(&asked(json!({"enable_thinking": false})))
            .status,
        200
    );
    refused(
        &server,
        json!({"enable_thinking": true}),
        "chat_template_kwargs.enable_thinking",
        "not read",
    );
}

#[test]
fn a_prompt_is_cut_where_it_is_asked_for() {
    let server = start(&[]);
    let whole = prompt_tokens(&server, &asked(json!({})));
    let cut = asked(json!({"truncate_prompt_tokens": whole - 2}));
    assert_eq!(prompt_tokens(&server, &cut), whole - 2);
    let longer = asked(json!({"truncate_prompt_tokens": whole + 2}));
    assert_eq!(prompt_tokens(&server, &longer), whole);
    let image = with(question("？"), "truncate_prompt_tokens", 8.into());
    let error = server.chat(&image).json()["error"].clone();
    assert!(
        error["message"].as_str().unwrap().contains("cut an image"),
        "{error}"
    );
}

#[test]
fn images_are_read_at_the_size_that_is_asked_for() {
    let server = start(&[]);
    let url = data_url(&demo_image());
    let body = with(about(&url, "？"), "max_tokens", 2.into());
    let whole = prompt_tokens(&server, &body);
    let sized =
        |kwargs: Value| prompt_tokens(&server, &with(body.clone(), "mm_processor_kwargs", kwargs));
    let small = sized(json!({"min_pixels": 1024, "max_pixels": 4096}));
    assert!(small < whole, "{small} and {whole}");
    assert_eq!(
        sized(json!({"size": {"shortest_edge": 1024, "longest_edge": 4096}})),
        small
    );
    assert!(sized(json!({"min_pixels": 300_000})) > whole);
    let part = |more: Value| {
        let mut body = body.clone();
        let mut part = json!({"type": "image", "image": url});
        part.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body["messages"][0]["content"][0] = part;
        body
    };
    let pixels = json!({"min_pixels": 1024, "max_pixels": 4096});
    assert_eq!(prompt_tokens(&server, &part(pixels)), small);
    let high = prompt_tokens(&server, &part(json!({"detail": "high"})));
    let low = prompt_tokens(&server, &part(json!({"detail": "low"})));
    assert!(high == whole && low <= whole, "{low} {high} {whole}");
    for kwargs in [
        json!({"max_pixels": 100_000_000}),
        json!({"min_pixels": 100_000, "max_pixels": 5000}),
        json!({"max_pixels": 1}),
    ] {
        let refused = server.chat(&with(body.clone(), "mm_processor_kwargs", kwargs.clone()));
        assert_eq!(refused.status, 400, "{kwargs}: {refused:?}");
        assert_eq!(refused.json()["error"]["param"], "mm_processor_kwargs");
    }
}

#[test]
fn the_prompt_has_log_probabilities_where_they_are_wanted() {
    let server = start(&[]);
    let answer = server
        .chat(&asked(
            json!({"prompt_logprobs": 2, "max_tokens": 2, "n": 2}),
        ))
        .json();
    let found = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!(
        found.len() as u64,
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    );
    assert!(found[0].is_null());
    for token in &found[1..] {
        let entries = token.as_object().unwrap();
        assert!((2..=3).contains(&entries.len()), "{token}");
        for entry in entries.values() {
            assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
        }
        assert!(entries.values().any(|entry| entry["rank"] == 1), "{token}");
    }
    let plain = server.chat(&asked(json!({"max_tokens": 2}))).text();
    assert_eq!(answer["choices"][0]["message"]["content"], plain);
    refused(
        &server,
        json!({"prompt_logprobs": 1, "stream": true}),
        "prompt_logprobs",
        "not sent with `stream`",
    );
    let by_id = json!({"logprobs": true, "return_tokens_as_token_ids": true});
    let by_id = server.chat(&asked(by_id)).json();
    let token = by_id["choices"][0]["logprobs"]["content"][0]["token"].clone();
    assert!(token.as_str().unwrap().starts_with("token_id:"), "{token}");
}

#[test]
fn a_stream_can_count_as_it_goes() {
    let server = start(&[]);
    let body = json!({"stream": true, "stream_options": {"continuous_usage_stats": true}});
    let mut events = server.chat(&asked(body)).events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let counts: Vec<u64> = events
        .iter()
        .map(|event| {
            let chunk: Value = serde_json::from_str(event).unwrap();
            chunk["usage"]["completion_tokens"].as_u64().unwrap()
        })
        .collect();
    assert!(counts.is_sorted() && counts[0] == 0, "{counts:?}");
    let whole = server.chat(&asked(json!({}))).json();
    let written = whole["usage"]["completion_tokens"].as_u64();
    assert_eq!(counts.last().copied(), written);
}

#[test]
fn parts_of_refusals_and_of_the_other_api_are_text() {
    let server = start(&[]);
    let count = |content: Value| {
        let messages = json!([
            {"role": "user", "content": "？"},
            {"role": "assistant", "content": content},
            {"role": "user", "content": "？"},
        ]);
        server
            .post("/tokenize", &json!({"messages": messages}))
            .json()["count"]
            .clone()
    };
    let plain = count(json!("不知道。"));
    for part in [
        json!({"type": "refusal", "refusal": "不知道。"}),
        json!({"type": "output_text", "text": "不知道。"}),
    ] {
        assert_eq!(count(json!([part])), plain);
    }
}
