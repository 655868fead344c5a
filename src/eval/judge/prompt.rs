//! What a judge is asked, and what counts as an answer.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A kind of error, as GREEN names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The answer reports a finding that the reference does not have.
    #[serde(alias = "误报所见")]
    FalseFinding,
    /// The answer lacks a finding of the reference.
    #[serde(alias = "漏报所见")]
    MissingFinding,
    /// Another side or place.
    #[serde(alias = "部位或侧别错误")]
    WrongLocation,
    /// Another degree.
    #[serde(alias = "程度错误")]
    WrongSeverity,
    /// The answer compares with an earlier film, the reference does not.
    #[serde(alias = "虚构对比")]
    InventedComparison,
    /// The answer leaves out a change since an earlier film.
    #[serde(alias = "遗漏对比")]
    OmittedComparison,
}

impl ErrorKind {
    /// In the order of the paper.
    pub const ALL: [Self; 6] = [
        Self::FalseFinding,
        Self::MissingFinding,
        Self::WrongLocation,
        Self::WrongSeverity,
        Self::InventedComparison,
        Self::OmittedComparison,
    ];

    /// The key used in files and answers.
    pub fn key(self) -> &'static str {
        match self {
            Self::FalseFinding => "false_finding",
            Self::MissingFinding => "missing_finding",
            Self::WrongLocation => "wrong_location",
            Self::WrongSeverity => "wrong_severity",
            Self::InventedComparison => "invented_comparison",
            Self::OmittedComparison => "omitted_comparison",
        }
    }

    /// The name shown to Chinese readers.
    pub fn chinese(self) -> &'static str {
        match self {
            Self::FalseFinding => "误报所见",
            Self::MissingFinding => "漏报所见",
            Self::WrongLocation => "部位或侧别错误",
            Self::WrongSeverity => "程度错误",
            Self::InventedComparison => "虚构对比",
            Self::OmittedComparison => "遗漏对比",
        }
    }
}

/// One error as a judge names it. What a judge adds under other keys says nothing about the errors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JudgedError {
    /// Which kind.
    pub kind: ErrorKind,
    /// Whether it changes what is done for the patient.
    pub significant: bool,
    /// The judge's words.
    #[serde(default)]
    pub text: String,
}

/// What a judge says of one pair of reports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// Errors of the answer.
    pub errors: Vec<JudgedError>,
    /// Findings that both reports have.
    pub matched: Vec<String>,
}

impl Judgement {
    /// GREEN: matched findings over matched findings and significant errors; 0 without a match.
    pub fn green(&self) -> f64 {
        let matched = self.matched.len();
        let significant = self.errors.iter().filter(|error| error.significant).count();
        if matched == 0 {
            return 0.0;
        }
        matched as f64 / (matched + significant) as f64
    }

    /// Reads the text of an answer. Reasoning before it, words and fences of Markdown around it are no fault; of several
    /// judgements the last counts, since models correct themselves.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence.
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let text = text.rsplit("</think>").next().unwrap_or(text).trim();
        // A draft in the middle of reasoning is no judgement.
        if text.starts_with("<think>") {
            return Err("its reasoning did not come to an end".to_owned());
        }
        let mut found = None;
        let mut fault = None;
        let mut at = 0;
        while let Some(brace) = text[at..].find('{') {
            let start = at + brace;
            let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Self>();
            at = start + 1;
            match values.next() {
                Some(Ok(judgement)) => {
                    at = start + values.byte_offset();
                    found = Some(judgement);
                }
                Some(Err(cause)) => {
                    fault.get_or_insert(cause.to_string());
                }
                None => {}
            }
        }
        let none = || match text.is_empty() {
            true => "it is empty".to_owned(),
            false => "it holds no JSON object".to_owned(),
        };
        found.ok_or_else(|| fault.unwrap_or_else(none))
    }
}

const TASK: &str = "你是一名放射科主任医师，负责核对胸片报告。下面给出同一次检查的参考报告与待评报告。请以参考报告为准，逐条找出待评报告的错误，并列出两份报告一致的所见。\n\
错误分六类（kind）：\n\
false_finding：待评报告写了参考报告没有的所见；\n\
missing_finding：待评报告漏掉了参考报告的所见；\n\
wrong_location：所见相同，部位或侧别不同；\n\
wrong_severity：所见相同，程度或数量不同；\n\
invented_comparison：待评报告提到与前片的对比，而参考报告没有；\n\
omitted_comparison：参考报告写明与前片相比的变化，而待评报告没有。\n\
每个错误写明 significant：可能改变诊断、治疗或随访的为 true，否则为 false。否认的所见（如“未见气胸”）一致时不必列出。\n\
同一处错误只计一类：侧别写错只算 wrong_location，不再算漏报和误报。措辞不同而含义相同不是错误。\n\
只输出一个 JSON 对象：{\"errors\":[{\"kind\":…,\"significant\":…,\"text\":…}],\"matched\":[…]}，text 与 matched 用简短的中文。没有错误时 errors 为空数组，没有一致的所见时 matched 为空数组；两份报告都正常时，matched 写“未见异常”。";

/// The schema that an answer has to follow.
fn schema() -> Value {
    let kinds = ErrorKind::ALL.map(ErrorKind::key);
    json!({
        "type": "object",
        "additionalProperties": false,
        "required": ["errors", "matched"],
        "properties": {
            "errors": {
                "type": "array",
                "items": {
                    "type": "object",
                    "additionalProperties": false,
                    "required": ["kind", "significant", "text"],
                    "properties": {
                        "kind": { "type": "string", "enum": kinds },
                        "significant": { "type": "boolean" },
                        "text": { "type": "string" },
                    },
                },
            },
            "matched": { "type": "array", "items": { "type": "string" } },
        },
    })
}

/// Tokens that reasoning and judgement may take.
pub(super) const MOST_TOKENS: u32 = 2048;

/// What a server takes of the parameters of a request; not every one takes all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Accepted {
    /// Holds the answer to a schema.
    pub(super) schema: bool,
    /// `temperature`.
    pub(super) temperature: bool,
    /// `max_tokens`, which newer models of OpenAI know as `max_completion_tokens`.
    pub(super) max_tokens: bool,
}

impl Accepted {
    /// All of them.
    pub(super) const ALL: Self = Self {
        schema: true,
        temperature: true,
        max_tokens: true,
    };

    /// Without what the message of a refusal names; `None` where it names nothing that can be left out.
    pub(super) fn without_refused(self, message: &str) -> Option<Self> {
        let names = |words: &[&str]| words.iter().any(|word| message.contains(word));
        let mut left = self;
        if self.schema && names(&["response_format", "json_schema", "guided"]) {
            left.schema = false;
        } else if self.max_tokens && names(&["max_completion_tokens"]) {
            left.max_tokens = false;
        } else if self.temperature && names(&["temperature"]) {
            left.temperature = false;
        } else {
            return None;
        }
        Some(left)
    }
}

/// The body of a request, with what the server takes.
pub(super) fn body(model: &str, reference: &str, answer: &str, accepted: Accepted) -> Value {
    let reports = format!("参考报告：\n{reference}\n\n待评报告：\n{answer}");
    let mut body = json!({
        "model": model,
        "messages": [
            { "role": "system", "content": TASK },
            { "role": "user", "content": reports },
        ],
    });
    let tokens = match accepted.max_tokens {
        true => "max_tokens",
        false => "max_completion_tokens",
    };
    body[tokens] = MOST_TOKENS.into();
    if accepted.temperature {
        body["temperature"] = 0.into();
    }
    if accepted.schema {
        body["response_format"] = json!({
            "type": "json_schema",
            "json_schema": { "name": "judgement", "strict": true, "schema": schema() },
        });
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn green_is_matched_over_matched_and_significant() {
        let text = r#"{"errors":[{"kind":"wrong_location","significant":true,"text":"侧别"},
            {"kind":"wrong_severity","significant":false,"text":""}],"matched":["心影增大","气胸"]}"#;
        let judged = Judgement::read(text).expect("an answer");
        assert!((judged.green() - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(Judgement::default().green(), 0.0);
        let corrected = r#"{"errors":[],"matched":["气胸"]}"#;
        for habit in [
            format!("```json\n{text}\n```"),
            format!("<think>先看心影{{…}}。</think>\n{text}"),
            format!("评审结果如下：\n```json\n{text}\n```\n如有疑问请告知。"),
            format!("{corrected}\n更正：\n{text}"),
            text.replace("\"matched\"", "\"summary\":\"一处错误\",\"matched\""),
            text.replace("wrong_location", "部位或侧别错误"),
        ] {
            assert_eq!(Judgement::read(&habit), Ok(judged.clone()), "{habit}");
        }
    }

    #[test]
    fn another_answer_is_unreadable() {
        for text in [
            "",
            "没有错误",
            "{\"errors\":[]}",
            "{\"errors\":[{\"kind\":\"style\",\"significant\":true}],\"matched\":[]}",
            "{\"errors\":[{\"kind\":\"false_finding\",\"significant\":true,\"te",
            "抱歉，我不能评价医学报告。",
            "<think>先写草稿：{\"errors\":[],\"matched\":[]}，再看侧别",
        ] {
            assert!(Judgement::read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_schema_names_the_kinds_as_they_are_read() {
        for kind in ErrorKind::ALL {
            assert_eq!(json!(kind), json!(kind.key()));
            assert!(TASK.contains(kind.key()));
        }
        let asked = body("m", "甲", "乙", Accepted::ALL);
        assert_eq!(asked["temperature"], 0);
        assert_eq!(asked["max_tokens"], MOST_TOKENS);
        assert_eq!(asked["response_format"]["type"], "json_schema");
    }

    #[test]
    fn what_a_server_refuses_is_left_out() {
        let mut accepted = Accepted::ALL;
        for refusal in [
            "response_format is not supported",
            "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            "Unsupported value: 'temperature' does not support 0 with this model.",
        ] {
            accepted = accepted.without_refused(refusal).expect("less than before");
        }
        let asked = body("m", "甲", "乙", accepted);
        assert_eq!(asked["max_completion_tokens"], MOST_TOKENS);
        for key in ["temperature", "max_tokens", "response_format"] {
            assert!(asked.get(key).is_none(), "{key}");
        }
        assert_eq!(accepted.without_refused("temperature"), None);
        assert_eq!(
            Accepted::ALL.without_refused("the prompt is too long"),
            None
        );
    }
}
