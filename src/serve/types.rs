//! The wire format: OpenAI's chat completions, with the extensions that vLLM has made common.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::processor::remark::Remark;

/// Body of `POST /v1/chat/completions`.
#[derive(Debug, Clone, Default)]
#[allow(
    missing_docs,
    reason = "the keys are OpenAI's and vLLM's; openapi.json explains each"
)]
pub struct ChatRequest {
    pub model: Option<String>,
    pub messages: Vec<ChatMessage>,
    pub max_tokens: Option<usize>,
    pub max_completion_tokens: Option<usize>,
    pub min_tokens: Option<usize>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub logit_bias: Option<BTreeMap<String, f32>>,
    pub allowed_token_ids: Option<Vec<u32>>,
    pub seed: Option<i64>,
    pub n: Option<usize>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub stream: Option<bool>,
    pub include_usage: bool,
    pub logprobs: Option<bool>,
    pub top_logprobs: Option<usize>,
    pub form: Option<AnswerForm>,
    pub ignore_eos: Option<bool>,
    pub enable_thinking: Option<bool>,
    /// Fields that were passed over.
    pub ignored: Vec<String>,
}

/// Form of an answer that is no free text.
#[derive(Debug, Clone, PartialEq)]
pub enum AnswerForm {
    /// JSON of a schema.
    Json(Value),
    /// A text that a regular expression matches.
    Regex(String),
    /// One of these.
    Choice(Vec<String>),
}

/// One message of a request.
#[derive(Debug, Clone)]
pub struct ChatMessage {
    /// The speaker.
    pub role: String,
    /// Text and images.
    pub content: Option<ChatContent>,
    /// Reasoning before an earlier answer.
    pub reasoning_content: Option<String>,
}

/// Text, or text and images.
#[derive(Debug, Clone)]
pub enum ChatContent {
    /// Text alone.
    Text(String),
    /// Pieces in order.
    Parts(Vec<ChatPart>),
}

/// One piece of a message.
#[derive(Debug, Clone)]
pub enum ChatPart {
    /// Words.
    Text {
        /// The words.
        text: String,
    },
    /// An image.
    ImageUrl {
        /// Its address.
        image_url: ImageUrl,
    },
}

/// Address of an image: `data:`, `http:` or `https:`.
#[derive(Debug, Clone)]
pub struct ImageUrl(pub String);

impl ImageUrl {
    /// The address.
    pub fn url(&self) -> &str {
        &self.0
    }
}

/// What a reader of an answer should know about an image it was written from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageRemark {
    /// The image's number in the request, from 1; none for a remark on the request as a whole.
    pub image: Option<usize>,
    /// Code and sentence.
    #[serde(flatten)]
    pub remark: Remark,
}

/// Counts of tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "OpenAI's keys")]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    #[serde(default)]
    pub prompt_tokens_details: PromptTokensDetails,
}

/// How a prompt's tokens came about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    /// Taken from the cache.
    pub cached_tokens: usize,
}

/// Log probability of one token as text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LogprobEntry {
    /// The token's text; parts of characters as U+FFFD.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The token's bytes.
    pub bytes: Vec<u8>,
    /// The likeliest tokens in its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<Vec<LogprobEntry>>,
}

/// Body of `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`.
#[derive(Debug, Clone)]
pub struct AdapterRequest {
    /// The name to be used as `model`.
    pub lora_name: String,
    /// Folder inside the server's adapter folder; the name when absent.
    pub lora_path: Option<String>,
}
