//! Requests to a judge, with a limit on time, tried again where that may help.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use serde_json::Value;
use ureq::Agent;

use super::{error::JudgeError, prompt::body};

/// Requests for one pair before it is given up.
const ATTEMPTS: u32 = 4;

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
    with_schema: AtomicBool,
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
    Again(String, Option<Duration>),
    WithoutSchema,
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
            with_schema: AtomicBool::new(true),
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
        self.with_schema.load(Ordering::Relaxed)
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
        let mut reason = String::new();
        let mut wait = FIRST_WAIT;
        let mut attempt = 0;
        while attempt < ATTEMPTS {
            if attempt > 0 {
                thread::sleep(wait);
                wait = FIRST_WAIT * 2_u32.pow(attempt);
            }
            let with_schema = self.holds_schema();
            let body = body(&self.model, reference, answer, with_schema);
            match self.send(&url, &body, with_schema) {
                Answer::Text(text) => return Ok(text),
                Answer::WithoutSchema => self.with_schema.store(false, Ordering::Relaxed),
                Answer::Again(why, named) => {
                    reason = why;
                    attempt += 1;
                    wait = named.map_or(wait, |named| named.min(LONGEST_WAIT));
                }
                Answer::Final(reason) => {
                    return Err(Failure::Final(JudgeError::Answer { url, reason }));
                }
            }
        }
        Err(Failure::Exhausted(reason))
    }

    fn send(&self, url: &str, body: &Value, with_schema: bool) -> Answer {
        let mut request = self
            .agent
            .post(url)
            .header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("Authorization", &format!("Bearer {key}"));
        }
        let response = match request.send(body.to_string()) {
            Ok(response) => response,
            Err(cause) => return Answer::Again(cause.to_string(), None),
        };
        let status = response.status().as_u16();
        let named = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok()?.trim().parse().ok())
            .map(Duration::from_secs);
        let text = match text_of(response) {
            Ok(text) => text,
            Err(reason) => return Answer::Again(reason, None),
        };
        match status {
            200 => match serde_json::from_str::<Value>(&text) {
                Ok(answer) => match answer["choices"][0]["message"]["content"].as_str() {
                    Some(content) => Answer::Text(content.to_owned()),
                    // A refusal, or only reasoning: an answer, though none that can be read.
                    None if answer["choices"][0].is_object() => {
                        let refusal = answer["choices"][0]["message"]["refusal"].as_str();
                        Answer::Text(refusal.unwrap_or_default().to_owned())
                    }
                    None => Answer::Final(format!("no `choices` in its answer: {}", short(&text))),
                },
                Err(cause) => Answer::Again(format!("its answer is no JSON: {cause}"), None),
            },
            400 | 422 if with_schema && mentions_schema(&text) => Answer::WithoutSchema,
            408 | 425 | 429 | 500..=599 => {
                Answer::Again(format!("status {status}: {}", short(&text)), named)
            }
            _ => Answer::Final(format!("status {status}: {}", short(&text))),
        }
    }
}

fn mentions_schema(text: &str) -> bool {
    ["response_format", "json_schema", "guided"]
        .iter()
        .any(|word| text.contains(word))
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
    use super::*;

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
