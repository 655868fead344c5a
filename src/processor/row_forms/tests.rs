use super::*;

fn plain(row: Value) -> Result<Value, RowFault> {
    let Value::Object(mut row) = row else {
        unreachable!()
    };
    to_messages(&mut row)?;
    Ok(Value::Object(row))
}

const A: &str = "双肺清晰。";

fn turns(question: &str) -> Value {
    json!([{"role": "user", "content": question}, {"role": "assistant", "content": A}])
}

#[test]
fn every_form_becomes_messages() {
    for (row, messages) in [
        (json!({"query": "问", "response": A}), turns("问")),
        (json!({"Question": "问", "Answer": A}), turns("问")),
        (json!({"prompt": "问", "completion": A}), turns("问")),
        (
            json!({"instruction": "看片", "input": "", "output": A}),
            turns("看片"),
        ),
        (
            json!({"instruction": "看片", "input": "正位", "output": A}),
            turns("看片\n正位"),
        ),
        (
            json!({"img": "a.png", "prompt": "问", "label": A}),
            turns("问"),
        ),
        (
            json!({"conversation": [{"human": "问", "assistant": A}]}),
            turns("问"),
        ),
        (
            json!({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": A}]}),
            turns("问"),
        ),
        (
            json!({"conversations": [{"role": "user", "content": "问"}, {"role": "bot", "content": A}]}),
            turns("问"),
        ),
        (
            json!({"messages": format!("[{{'role': 'user', 'content': '问'}}, {{'role': 'model', 'content': '{A}'}}]")}),
            turns("问"),
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "问"}]}, {"role": "assistant", "content": [{"text": A}]}]}),
            turns("<image>问"),
        ),
        (
            json!({"response": A}),
            json!([{"role": "assistant", "content": A}]),
        ),
    ] {
        let text = row.to_string();
        assert_eq!(plain(row).unwrap()["messages"], messages, "{text}");
    }
    let row = json!({"query": "二", "response": A, "history": [["一", "好"]]});
    let messages = plain(row).unwrap()["messages"].clone();
    assert_eq!(messages[1], json!({"role": "assistant", "content": "好"}));
    assert_eq!(messages[2]["content"], "二");
    let row = json!({"query": "二", "response": A, "history": "[['一', '好']]"});
    assert_eq!(plain(row).unwrap()["messages"], messages);
}

#[test]
fn images_of_parts_come_in_their_order() {
    let part = |image: Value| json!({"messages": [{"role": "user", "content": [image, "问"]}]});
    for (image, found) in [
        (json!({"type": "image", "image": "a.png"}), json!("a.png")),
        (
            json!({"type": "image_url", "image_url": {"url": "a.png"}}),
            json!("a.png"),
        ),
        (
            json!({"type": "image_url", "image_url": "a.png"}),
            json!("a.png"),
        ),
        (
            json!({"image": {"path": "a.png", "bytes": null}}),
            json!({"path": "a.png", "bytes": null}),
        ),
        (
            json!({"type": "image", "base64": "AAAA"}),
            json!({"bytes": "AAAA"}),
        ),
        (
            json!({"type": "image", "bytes": "AAAA", "path": "a.png"}),
            json!({"bytes": "AAAA", "path": "a.png"}),
        ),
        (
            json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}),
            json!({"bytes": "AAAA"}),
        ),
        (
            json!({"type": "image", "source": {"type": "url", "url": "a.png"}}),
            json!("a.png"),
        ),
        (
            json!({"type": "image_url", "value": "a.png"}),
            json!("a.png"),
        ),
    ] {
        let row = plain(part(image)).unwrap();
        assert_eq!(row["images"], json!([found]));
        assert_eq!(row["messages"][0]["content"], "<image>问");
    }
    let row = plain(part(
        json!({"type": "image", "image": "a.png", "max_pixels": 4096}),
    ));
    assert_eq!(
        row.unwrap()["chat_template_kwargs"],
        json!({"max_pixels": 4096})
    );
}

#[test]
fn what_says_two_things_is_refused() {
    for (row, says) in [
        (
            json!({"query": "q", "response": A, "answer": "b"}),
            "`response` is given beside `answer`",
        ),
        (
            json!({"query": "q", "question": "r", "response": A}),
            "`query` is given beside `question`",
        ),
        (
            json!({"conversations": [1], "conversation": [1]}),
            "`conversations` is given beside",
        ),
        (
            json!({"query": "q", "response": [A, "b"]}),
            "a list of 2 answers",
        ),
        (
            json!({"conversation": [{"human": "q", "note": "x"}]}),
            "`human`, `note`",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "video", "video": "v"}]}]}),
            "videos and sound",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image", "image": "a"}]}], "images": ["b"]}),
            "beside images in the parts",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image", "file_id": "f1"}]}], "images": ["b"]}),
            "`messages[0].content[0].file_id` is not supported",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image", "image": "a", "url": "b"}]}]}),
            "`messages[0].content[0].image` is given beside `url`",
        ),
        (
            json!({"query": "q", "response": A, "history": ["x"]}),
            "`history[0]` is a text",
        ),
    ] {
        let fault = plain(row).unwrap_err().to_string();
        assert!(fault.contains(says), "{says}: {fault}");
    }
}

#[test]
fn limits_of_an_image_in_an_object_are_those_of_the_row() {
    let row = plain(
        json!({"query": "q", "response": A, "images": [{"path": "a.png", "max_pixels": 4096}]}),
    );
    let row = row.unwrap();
    assert_eq!(row["chat_template_kwargs"], json!({"max_pixels": 4096}));
    assert_eq!(row["images"], json!([{"path": "a.png"}]));
}

#[test]
fn objects_of_a_list_become_two_lists() {
    let row = json!({"objects": [
        {"caption": "结节", "bbox": [1, 2, 3, 4], "bbox_type": "norm1000"},
        {"caption": "实变", "bbox": [5, 6, 7, 8], "bbox_type": "norm1000"},
    ]});
    let plain = plain(row).unwrap();
    let lists = json!({"ref": ["结节", "实变"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "bbox_type": "norm1000"});
    assert_eq!(plain["objects"], lists);
}
