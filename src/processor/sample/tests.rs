use super::*;

fn parse(line: &str) -> Result<Sample, SampleError> {
    parse_line(line, Path::new("train.jsonl"), 7)
}

fn words(text: &str) -> Part {
    Part::Text { text: text.into() }
}

#[test]
fn a_line_of_swift_is_read() {
    let sample = parse(
        r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"<image>图一<image>q"},
        {"role":"assistant","content":"a"}],"images":["a.png",{"path":"b.png"}],"objects":{}}"#,
    )
    .unwrap();
    assert_eq!(sample.images, ["a.png", "b.png"]);
    assert_eq!(sample.unknown_keys, [""; 0]);
    let conversation = &sample.conversation;
    assert_eq!(conversation.system.as_deref(), Some("s"));
    assert_eq!(
        conversation.turns[0].question,
        [Part::Image, words("图一"), Part::Image, words("q")]
    );
    assert_eq!(conversation.last_answer(), Some("a"));
    assert_eq!(conversation.messages().len(), 3);
    assert_eq!(conversation.prompt_messages().len(), 2);
}

#[test]
fn images_without_a_place_go_to_the_front() {
    let sample = parse(
        r#"{"messages":[{"role":"user","content":"q<image>"},{"role":"assistant","content":"a"}],
        "images":["a.png","b.png"]}"#,
    )
    .unwrap();
    assert_eq!(
        sample.conversation.turns[0].question,
        [Part::Image, words("q"), Part::Image]
    );
    let alone = parse(r#"{"messages":[{"role":"user","content":"q"}],"images":"a.png"}"#);
    assert_eq!(alone.unwrap().conversation.image_count(), 1);
}

/// A row of one question and one answer with more keys.
fn with(keys: &str) -> String {
    format!(
        r#"{{"messages":[{{"role":"user","content":"q"}},{{"role":"assistant","content":"a"}}],{keys}}}"#
    )
}

fn fault(line: &str) -> String {
    parse(line).unwrap_err().fault.to_string()
}

#[test]
fn a_key_of_ones_own_is_noted_and_one_that_changes_what_is_learnt_is_refused() {
    let sample = parse(&with(
        r#""hospital":"x","id":3,"_mine":1,"videos":[],"channel":"c""#,
    ));
    assert_eq!(sample.unwrap().unknown_keys, ["hospital"]);
    let sample = parse(&with(r#""rejected_response":"x""#)).unwrap();
    assert_eq!(sample.unknown_keys, ["rejected_response"]);
    let mood = r#"{"messages":[{"role":"user","content":"q","mood":1}]}"#;
    let sample = parse(mood).unwrap();
    assert_eq!(sample.unknown_keys, ["messages[0].mood"]);
    assert_eq!(sample.conversation.last_answer(), None);
    for (keys, words) in [
        (r#""videos":["a.mp4"]"#, "`videos` is not supported: videos"),
        (r#""audios":["a.wav"]"#, "`audios` is not supported: sound"),
        (r#""label":false"#, "`label` is not supported: preference"),
        (
            r#""weight":0.5"#,
            "`weight` is not supported: rows and answers have no weights",
        ),
        (
            r#""response":"x""#,
            "`response` is not supported: the row has `messages` as well",
        ),
        (
            r#""Images":["a.png"]"#,
            "`Images` is not known; hint: is `images` meant?",
        ),
        (r#""loss-scale":1"#, "is `loss_scale` meant?"),
    ] {
        let fault = fault(&with(keys));
        assert!(fault.contains(words), "{keys}: {fault}");
    }
    let reasoning = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","reasoning_content":"想"}]}"#;
    let fault = fault(reasoning);
    assert!(
        fault.contains("`messages[1].reasoning_content`") && fault.contains("<think>"),
        "{fault}"
    );
}

#[test]
fn loss_and_loss_scale_say_which_answers_are_learnt() {
    let two = |first: &str, last: &str| {
        let line = format!(
            r#"{{"messages":[{{"role":"user","content":"q"}},{{"role":"assistant","content":"a"{first}}},
            {{"role":"user","content":"r"}},{{"role":"assistant","content":"b"{last}}}]}}"#
        );
        parse(&line).map(|sample| {
            sample
                .conversation
                .turns
                .iter()
                .map(|turn| turn.learns)
                .collect()
        })
    };
    let learns = |first, last| -> Vec<bool> { two(first, last).unwrap() };
    assert_eq!(learns("", ""), [true, true]);
    assert_eq!(learns(r#","loss":false"#, r#","loss":true"#), [false, true]);
    assert_eq!(learns("", r#","loss_scale":0"#), [true, false]);
    assert_eq!(learns(r#","loss":null,"loss_scale":1.0"#, ""), [true, true]);
    // Both have to allow it, as in ms-swift.
    assert_eq!(
        learns(r#","loss":true,"loss_scale":0.0"#, ""),
        [false, true]
    );
    // Axolotl's, OpenAI's and LLaMA-Factory's names.
    assert_eq!(
        learns(r#","train":false"#, r#","training":true"#),
        [false, true]
    );
    assert_eq!(learns(r#","weight":0"#, r#","weight":1"#), [false, true]);
    assert_eq!(learns("", r#","loss_weight":0.0"#), [true, false]);
    let nothing: Result<Vec<bool>, _> = two(r#","loss":false"#, r#","loss_scale":0"#);
    let nothing = nothing.unwrap_err().to_string();
    assert!(nothing.contains("without an answer to learn"), "{nothing}");
    for (line, words) in [
        (
            two(r#","loss_scale":0.5"#, ""),
            "`messages[1].loss_scale` is `0.5`; expected 1 (learnt) or 0",
        ),
        (
            two("", r#","loss_scale":2"#),
            "`messages[3].loss_scale` is `2`",
        ),
        (
            two("", r#","loss":"no""#),
            "`messages[3].loss` is the text `no`; expected true",
        ),
        (two("", r#","loss":0"#), "`messages[3].loss` is `0`"),
        (two("", r#","weight":0.5"#), "`messages[3].weight` is `0.5`"),
        (
            two(
                "",
                r#","train_detail":[{"begin_offset":0,"end_offset":1,"train":false}]"#,
            ),
            "the key `messages[3].train_detail` is not supported",
        ),
    ] {
        let line: Result<Vec<bool>, _> = line;
        let message = line.unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    }
    let question = r#"{"messages":[{"role":"user","content":"q","loss":true},{"role":"assistant","content":"a"}]}"#;
    assert!(fault(question).contains("`messages[0].loss` is set for a message of `user`"));
    assert!(fault(&with(r#""loss":false"#)).contains("take it out of the file"));
    assert!(parse(&with(r#""loss":true,"loss_scale":1"#)).is_ok());
}

#[test]
fn other_names_of_images_and_system_are_read_and_brought_into_the_plain_form() {
    let line = r#"{"system":"s","image":"a.png","messages":[{"role":"user","content":"看"},{"role":"assistant","content":"a"}],"id":7}"#;
    let (sample, row) = parse_row(line, Path::new("x"), 1).unwrap();
    assert_eq!(sample.images, ["a.png"]);
    assert_eq!(sample.conversation.system.as_deref(), Some("s"));
    assert_eq!(
        sample.conversation.turns[0].question,
        [Part::Image, words("看")]
    );
    let row = Value::Object(row);
    assert_eq!(
        row,
        json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "看"},
            {"role": "assistant", "content": "a"}], "id": 7, "images": "a.png"})
    );
    assert_eq!(parse(&row.to_string()).unwrap(), sample);

    let line = r#"{"messages":[{"role":"user","content":"Picture 1: <img>d/a 1.png</img>\nq<img>b.png</img>"},{"role":"assistant","content":"a"}]}"#;
    let (sample, row) = parse_row(line, Path::new("x"), 1).unwrap();
    assert_eq!((sample.images.len(), sample.marks), (2, 2));
    assert_eq!(sample.images, ["d/a 1.png", "b.png"]);
    assert_eq!(
        sample.conversation.turns[0].question,
        [words("Picture 1: "), Part::Image, words("\nq"), Part::Image]
    );
    assert_eq!(row["images"], json!(["d/a 1.png", "b.png"]));
    assert_eq!(parse(&Value::Object(row).to_string()).unwrap(), sample);

    for (line, words) in [
        (with(r#""image":"a","images":["b"]"#), "`image` is given beside `images`"),
        (
            r#"{"system":"s","messages":[{"role":"system","content":"t"},{"role":"user","content":"q"}]}"#.to_owned(),
            "`system` is given beside `messages[0]`",
        ),
        (with(r#""system":["s"]"#), "`system` is a list"),
        (
            r#"{"messages":[{"role":"user","content":"<img>a.png</img>q"},{"role":"assistant","content":"a"}],"images":["a.png"]}"#.to_owned(),
            "holds `<img>a.png</img>`; expected `<image>`",
        ),
    ] {
        let fault = fault(&line);
        assert!(fault.contains(words), "{fault}");
    }
}

#[test]
fn near_misses_of_a_place_are_refused_and_a_backslash_makes_words() {
    let ask = |content: &str| {
        json!({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}],
            "images": ["a.png"]})
        .to_string()
    };
    for tag in [
        "< image >",
        "<Image>",
        "<image/>",
        "＜image＞",
        "<img>",
        "<video>",
        "<bbox>",
    ] {
        let fault = fault(&ask(&format!("{tag}q")));
        assert!(
            fault.contains(&format!("`messages[0].content` holds `{tag}`")),
            "{fault}"
        );
        assert!(fault.contains(&format!(r"`\\{tag}`")), "{fault}");
    }
    let sample = parse(&ask(r"\<Image>与\<image>q")).unwrap();
    assert_eq!(
        sample.conversation.turns[0].question,
        [Part::Image, words("<Image>与<image>q")]
    );
    let answer = |content: &str| {
        json!({"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": content}],
            "images": ["a.png"]})
        .to_string()
    };
    let sample = parse(&answer(r"见图3(\<image>)")).unwrap();
    assert_eq!(sample.conversation.last_answer(), Some("见图3(<image>)"));
    assert_eq!(escaped("见图3(<image>)"), r"见图3(\<image>)");
    assert!(fault(&answer("见<image>")).contains("of `user` only"));
    // In an answer, what looks like a tag is what the model is to write.
    let html = parse(&answer("<img src=\"a\">")).unwrap();
    assert_eq!(html.conversation.last_answer(), Some("<img src=\"a\">"));
}

#[test]
fn objects_are_written_as_names_and_thousandths_of_the_picture() {
    // 331.5 of 1,280 wide is 258.98; 761.4 of 1,600 high is 475.875; halves go to the even number.
    let line = json!({
        "messages": [
            {"role": "user", "content": "<image><image>找<ref-object>"},
            {"role": "assistant", "content": "<ref-object><bbox>，<bbox>，<bbox>"},
        ],
        "images": ["a.png", "b.png"],
        "objects": {
            "ref": ["结节", "a dog"],
            "bbox": [[331.5, 761.4, 853.5, 1594.8], [30, 40, 1, 2], [1, 3]],
            "image_id": [0, 1, 1],
        },
    });
    let sample = parse(&line.to_string()).unwrap();
    assert!(sample.has_boxes());
    let placed = sample.placed(&[(1280, 1600), (128, 2000)]).unwrap();
    assert_eq!(placed.turns[0].question[2], words("找结节"));
    // 1/128 = 7.8125, 2/2000 = 1, 30/128 = 234.375, 40/2000 = 20; 3/2000 = 1.5 is 2.
    assert_eq!(
        placed.last_answer(),
        Some("a dog[259, 476, 667, 997]，[8, 1, 234, 20]，[8, 2]")
    );
    let mut shares = line.clone();
    shares["objects"] = json!({"ref": ["x", "y"], "bbox": [[0.1, 0.2, 0.3, 1.0], [0, 0], [0.0005, 0.0015]], "bbox_type": "norm1"});
    let sample = parse(&shares.to_string()).unwrap();
    assert_eq!(
        sample.placed(&[(7, 9), (3, 3)]).unwrap().last_answer(),
        Some("y[100, 200, 300, 1000]，[0, 0]，[0, 2]")
    );
    let mut thousandths = line.clone();
    thousandths["objects"] = json!({"ref": ["x", "y"], "bbox": [[1, 2, 3, 1000], [0, 0], [9, 8]], "bbox_type": "norm1000"});
    let sample = parse(&thousandths.to_string()).unwrap();
    assert_eq!(
        sample.placed(&[(7, 9), (3, 3)]).unwrap().last_answer(),
        Some("y[1, 2, 3, 1000]，[0, 0]，[9, 8]")
    );
    for (key, value, words) in [
        (
            "ref",
            json!(["x"]),
            "holds `<ref-object>`; expected a name in `objects.ref`",
        ),
        (
            "bbox",
            json!([[1, 2]]),
            "holds `<bbox>`; expected a box in `objects.bbox`",
        ),
        (
            "bbox",
            json!([[1, 2], [1, 2], [1, 2], [1, 2]]),
            "a list of 4, but the messages hold 3 `<bbox>`",
        ),
        (
            "bbox",
            json!([[1, 2, 3], [1, 2], [1, 2]]),
            "`objects.bbox[0]` is [1,2,3]",
        ),
        ("image_id", json!([2]), "`objects.image_id[0]` is `2`"),
        ("bbox_type", json!("norm"), "expected `real`"),
        (
            "box",
            json!([1]),
            "`objects.box` is not known; hint: is `bbox` meant?",
        ),
    ] {
        let mut wrong = line.clone();
        wrong["objects"][key] = value;
        let fault = fault(&wrong.to_string());
        assert!(fault.contains(words), "{fault}");
    }
    let sample = parse(&line.to_string()).unwrap();
    let outside = sample.placed(&[(400, 1600), (128, 2000)]).unwrap_err();
    assert!(
        outside
            .to_string()
            .contains("outside its picture of 400 × 1600 pixels"),
        "{outside}"
    );
}

#[test]
fn pixel_limits_of_a_row_are_read() {
    let sample = parse(&with(r#""chat_template_kwargs":{"max_pixels":4096}"#)).unwrap();
    assert_eq!(sample.limits.max_pixels, Some(4096));
    assert_eq!(sample.limits.min_pixels, None);
    for (kwargs, words) in [
        (r#"{"max_pixel":1}"#, "is `max_pixels` meant?"),
        (
            r#"{"enable_thinking":false}"#,
            "`chat_template_kwargs.enable_thinking` is not supported",
        ),
        (r#"{"max_pixels":-1}"#, "is `-1`; expected a whole number"),
        ("3", "`chat_template_kwargs` is a number"),
    ] {
        let fault = fault(&with(&format!(r#""chat_template_kwargs":{kwargs}"#)));
        assert!(fault.contains(words), "{fault}");
    }
}

#[test]
fn a_row_of_no_known_form_is_shown_the_line_that_would_be_right() {
    for (line, form, expected, hint) in [
        (
            r#"{"image_id":"1_1.png","caption":"双肺清晰"}"#,
            "a row of OpenI-zh",
            r#"`{"messages":[{"role":"user","content":"<image>…"},{"role":"assistant","content":"双肺清晰"}],"images":["1_1.png"]}`"#,
            "`--columns images=image_id,response=caption` (in a config `[columns]`)",
        ),
        (
            r#"{"影像":"a.png","报告":"心影不大"}"#,
            "only the keys `影像`, `报告`",
            r#""content":"心影不大"}],"images":["a.png"]}`"#,
            "`--columns images=影像,response=报告`",
        ),
        (
            r#"{"d":{"file_name":"x"}}"#,
            "LLaMA-Factory",
            r#"`{"messages": ["#,
            "name the data file",
        ),
        (
            r#"{"chosen":"a","rejected":"b"}"#,
            "preferences",
            r#"`{"messages": ["#,
            "`objective = \"dpo\"`",
        ),
        (
            r#"{"query":"q"}"#,
            "a question without an answer",
            r#"`{"messages": ["#,
            "`response`",
        ),
    ] {
        let fault = fault(line);
        for words in [form, expected, hint] {
            assert!(fault.contains(words), "{words}: {fault}");
        }
    }
    let null = fault(r#"{"messages":[{"role":"user","content":null}]}"#);
    assert!(null.contains("`messages[0].content` is null; expected a text"));
    let path = fault(&with(r#""image_path":"a.png""#));
    assert!(path.contains("`--columns images=image_path`"), "{path}");
}

#[test]
fn answers_that_follow_each_other_are_one_and_a_text_alone_is_learnt() {
    let two = |second: &str| {
        format!(
            r#"{{"messages":[{{"role":"user","content":"q"}},{{"role":"assistant","content":"a"}},{{"role":"assistant","content":"b"{second}}}]}}"#
        )
    };
    let sample = parse(&two("")).unwrap();
    assert_eq!(sample.conversation.last_answer(), Some("ab"));
    assert!(fault(&two(r#","loss":false"#)).contains("other than that of the answer before it"));
    let alone = parse(r#"{"messages":[{"role":"assistant","content":"a"}],"images":["a.png"]}"#);
    let turns = alone.unwrap().conversation.turns;
    assert_eq!((turns.len(), &turns[0].question), (1, &vec![Part::Image]));
}

#[test]
fn an_image_in_the_row_has_its_bytes_and_a_name() {
    let base64 = "iVBORw0KGgoAAAAA".repeat(50);
    for image in [
        json!(format!("data:image/png;base64,{base64}")),
        json!(base64),
        json!({"bytes": base64, "path": null}),
    ] {
        let line = json!({"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}], "images": [image]});
        let (sample, row) = parse_row(&line.to_string(), Path::new("x"), 1).unwrap();
        assert!(matches!(&sample.sources[&0], ImageSource::Bytes(bytes) if bytes.len() == 600));
        assert!(
            sample.images[0].starts_with("sha256:"),
            "{:?}",
            sample.images
        );
        assert_eq!(row["images"], json!(sample.images));
    }
    let line =
        r#"{"messages":[{"role":"user","content":"q"}],"images":["https://example.org/a.png"]}"#;
    let sample = parse(line).unwrap();
    assert!(matches!(&sample.sources[&0], ImageSource::Address(_)));
}

#[test]
fn errors_name_file_row_and_key() {
    for (line, word) in [
        ("{", "not JSON"),
        ("{}", "messages"),
        (r#"{"messages":[]}"#, "`messages`"),
        (
            r#"{"messages":[{"role":"user","content":5}]}"#,
            "`messages[0].content` is a number",
        ),
        (
            r#"{"messages":[{"role":"tool","content":"x"}]}"#,
            "`messages[0].role` is `tool` without a call before it",
        ),
        (
            r#"{"messages":[{"role":"assistant","content":"x"},{"role":"doctor","content":"y"}]}"#,
            "`messages[1].role` is `doctor`",
        ),
        (
            r#"{"messages":[{"role":"user","content":"x"},{"role":"user","content":"y"}]}"#,
            "`messages[1].role`",
        ),
        (
            r#"{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":" \n"}]}"#,
            "`messages[1].content` is empty",
        ),
        (
            r#"{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"<image>"}],"images":["a"]}"#,
            "`messages[1].content`",
        ),
        (
            r#"{"messages":[{"role":"user","content":"<image><image>"}],"images":["a"]}"#,
            "2 `<image>` placeholders but `images` holds 1",
        ),
        (
            r#"{"messages":[{"role":"user","content":"x"}],"images":[3]}"#,
            "`images[0]`",
        ),
        (
            r#"{"messages":[{"role":"user","content":"x"}],"images":3}"#,
            "`images` is a number",
        ),
    ] {
        let message = parse(line).unwrap_err().to_string();
        assert!(message.starts_with("`train.jsonl` row 7: "), "{message}");
        assert!(message.contains(word), "{message}");
    }
}
