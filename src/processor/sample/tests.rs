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
    assert_eq!(sample.unknown_keys, ["objects"]);
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

#[test]
fn keys_of_a_message_are_reported_too() {
    let sample = parse(r#"{"messages":[{"role":"user","content":"q","loss":false}]}"#).unwrap();
    assert_eq!(sample.unknown_keys, ["messages[0].loss"]);
    assert_eq!(sample.conversation.last_answer(), None);
}

#[test]
fn errors_name_file_row_and_key() {
    for (line, word) in [
        ("{", "not a sample"),
        ("{}", "messages"),
        (r#"{"messages":[]}"#, "`messages`"),
        (
            r#"{"messages":[{"role":"user","content":5}]}"#,
            "`messages[0].content` is a number",
        ),
        (
            r#"{"messages":[{"role":"tool","content":"x"}]}"#,
            "`messages[0].role` is `tool`",
        ),
        (
            r#"{"messages":[{"role":"assistant","content":"x"}]}"#,
            "`messages[0].role`",
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
