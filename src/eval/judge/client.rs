//! Requests to a judge, with a limit on time, tried again where that may help.

use std::{
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use serde_json::Value;
use ureq::Agent;

use super::{
    error::JudgeError,
    prompt::{Accepted, MOST_TOKENS, body},
};

/// Requests for one pair before it is given up.
const ATTEMPTS: u32 = 4;

/// The same where the server limits their rate: limits are often by the minute.
const LIMITED_ATTEMPTS: u32 = 7;

/// Wait after the first failure; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// Longest wait that a server can ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Longest answer that is read.
const LONGEST_ANSWER: u64 = 4 << 20;

/// A server of OpenAI's form.
pub struct Endpoint {
    agent: Agent,
    base: String,
    key: Option<String>,
    model: String,
    accepted: Mutex<Accepted>,
}

/// Why one request came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// It was tried as often as it is; another pair may go better.
    Exhausted(String),
    /// Every request would fail so.
    Final(JudgeError),
}

enum Answer {
    Text(String),
    Again(String),
    Limited(String, Option<Duration>),
    Without(Accepted),
    Final(String),
}

impl Endpoint {
    /// A server whose address is `url`, with or without `/chat/completions`. `model` may be left out where it has one.
    ///
    /// # Errors
    /// [`JudgeError::Address`]; without `model`, what keeps the list of models from being read, or several of them.
    pub fn open(
        url: &str,
        model: Option<&str>,
        key: Option<String>,
        timeout: Duration,
    ) -> Result<Self, JudgeError> {
        let base = url
            .trim_end_matches('/')
            .trim_end_matches("/chat/completions");
        let host = base
            .strip_prefix("http://")
            .or_else(|| base.strip_prefix("https://"));
        if host.is_none_or(str::is_empty) {
            return Err(JudgeError::Address(url.to_owned()));
        }
        if base.starts_with("https://") && !cfg!(feature = "tls") {
            return Err(JudgeError::Answer {
                url: base.to_owned(),
                reason: "https needs TLS; this program was built without `tls`".to_owned(),
            });
        }
        let agent = Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            // A key goes to the address that was named, and nowhere else.
            .max_redirects(0)
            .user_agent(concat!("xray-qwen3vl/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let mut endpoint = Self {
            agent,
            base: base.to_owned(),
            key,
            model: String::new(),
            accepted: Mutex::new(Accepted::ALL),
        };
        endpoint.model = match model {
            Some(model) => model.to_owned(),
            None => endpoint.only_model()?,
        };
        Ok(endpoint)
    }

    /// The address, without what a path adds.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// The model that is asked.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Whether the server holds answers to a schema.
    pub fn holds_schema(&self) -> bool {
        self.accepted().schema
    }

    fn accepted(&self) -> Accepted {
        *self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn only_model(&self) -> Result<String, JudgeError> {
        let url = format!("{}/models", self.base);
        let fail = |reason: String| JudgeError::Answer {
            url: url.clone(),
            reason,
        };
        let mut request = self.agent.get(&url);
        if let Some(key) = &self.key {
            request = request.header("Authorization", &format!("Bearer {key}"));
        }
        let response = request.call().map_err(|cause| fail(cause.to_string()))?;
        let status = response.status().as_u16();
        let text = text_of(response).map_err(&fail)?;
        if status != 200 {
            return Err(fail(format!("status {status}: {}", short(&text))));
        }
        let list: Value = serde_json::from_str(&text)
            .map_err(|cause| fail(format!("its list of models is no JSON: {cause}")))?;
        let models: Vec<&str> = list["data"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|model| model["id"].as_str())
            .collect();
        match models[..] {
            [model] => Ok(model.to_owned()),
            _ => Err(JudgeError::Model {
                url: self.base.clone(),
                models: if models.is_empty() {
                    "no model".to_owned()
                } else {
                    models.join(", ")
                },
            }),
        }
    }

    /// The text of the answer about one pair.
    pub(super) fn ask(&self, reference: &str, answer: &str) -> Result<String, Failure> {
        let url = format!("{}/chat/completions", self.base);
        let mut reason;
        let (mut attempt, mut most) = (0, ATTEMPTS);
        loop {
            let accepted = self.accepted();
            let body = body(&self.model, reference, answer, accepted);
            let named = match self.send(&url, &body, accepted) {
                Answer::Text(text) => return Ok(text),
                Answer::Without(left) => {
                    *self.accepted.lock().unwrap_or_else(PoisonError::into_inner) = left;
                    continue;
                }
                Answer::Again(why) => {
                    reason = why;
                    None
                }
                Answer::Limited(why, named) => {
                    (reason, most) = (why, LIMITED_ATTEMPTS);
                    named
                }
                Answer::Final(reason) => {
                    return Err(Failure::Final(JudgeError::Answer { url, reason }));
                }
            };
            attempt += 1;
            if attempt >= most {
                return Err(Failure::Exhausted(reason));
            }
            let doubled = FIRST_WAIT * 2_u32.pow(attempt - 1);
            thread::sleep(named.unwrap_or(doubled).min(LONGEST_WAIT));
        }
    }

    fn send(&self, url: &str, body: &Value, accepted: Accepted) -> Answer {
        let mut request = self
            .agent
            .post(url)
            .header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("Authorization", &format!("Bearer {key}"));
        }
        let response = match request.send(body.to_string()) {
            Ok(response) => response,
            Err(cause) => return Answer::Again(cause.to_string()),
        };
        let status = response.status().as_u16();
        let named = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok()?.trim().parse().ok())
            .map(Duration::from_secs);
        let text = match text_of(response) {
            Ok(text) => text,
            Err(reason) => return Answer::Again(reason),
        };
        match status {
            200 => match serde_json::from_str::<Value>(&text) {
                Ok(answer) => match &answer["choices"][0] {
                    choice if choice.is_object() => Answer::Text(content_of(choice)),
                    _ => Answer::Final(format!("no `choices` in its answer: {}", short(&text))),
                },
                Err(cause) => Answer::Again(format!("its answer is no JSON: {cause}")),
            },
            400 | 422 => match accepted.without_refused(&text) {
                Some(left) => Answer::Without(left),
                None => Answer::Final(format!("status {status}: {}", short(&text))),
            },
            429 | 503 => Answer::Limited(format!("status {status}: {}", short(&text)), named),
            408 | 425 | 500..=599 => Answer::Again(format!("status {status}: {}", short(&text))),
            _ => Answer::Final(format!("status {status}: {}", short(&text))),
        }
    }
}

/// The text of a choice: an answer, or its refusal or reasoning, though that cannot be read as a judgement.
fn content_of(choice: &Value) -> String {
    let message = &choice["message"];
    match message["content"]
        .as_str()
        .filter(|content| !content.is_empty())
    {
        Some(content) => content.to_owned(),
        // Only reasoning, which took all the tokens there are.
        None if choice["finish_reason"] == "length" => {
            format!("(no answer within {MOST_TOKENS} tokens)")
        }
        None => message["refusal"].as_str().unwrap_or_default().to_owned(),
    }
}

fn text_of(response: ureq::http::Response<ureq::Body>) -> Result<String, String> {
    let mut body = response.into_body();
    let text = body.with_config().limit(LONGEST_ANSWER).read_to_string();
    text.map_err(|cause| cause.to_string())
}

fn short(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_stands_in_the_place_of_an_answer_is_named() {
        let refused = json!({"message": {"content": null, "refusal": "no"}});
        assert_eq!(content_of(&refused), "no");
        let cut = json!({"finish_reason": "length",
            "message": {"content": "", "reasoning_content": "先看"}});
        assert!(content_of(&cut).contains("2048 tokens"));
        assert_eq!(content_of(&json!({"message": {"content": "{}"}})), "{}");
    }

    #[test]
    fn an_address_is_with_scheme_and_host() {
        let open = |url: &str| {
            Endpoint::open(url, Some("m"), None, Duration::from_secs(1)).map(|e| e.base)
        };
        let base = open("http://127.0.0.1:9/v1/chat/completions/").expect("an address");
        assert_eq!(base, "http://127.0.0.1:9/v1");
        for url in ["127.0.0.1:9", "ftp://a/v1", "http://"] {
            assert!(matches!(open(url), Err(JudgeError::Address(_))), "{url}");
        }
    }
}
