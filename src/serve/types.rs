//! The wire format: OpenAI's chat completions, with the extensions that vLLM has made common.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Body of `POST /v1/chat/completions`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
#[allow(
    missing_docs,
    reason = "the keys are OpenAI's; openapi.json explains each"
)]
pub struct ChatRequest {
    pub model: Option<String>,
    pub messages: Vec<ChatMessage>,
    pub max_tokens: Option<usize>,
    pub max_completion_tokens: Option<usize>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub logit_bias: Option<std::collections::BTreeMap<String, f32>>,
    pub seed: Option<i64>,
    pub n: Option<usize>,
    pub stop: Option<Stop>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub logprobs: Option<bool>,
    pub top_logprobs: Option<usize>,
    pub response_format: Option<ResponseFormat>,
    pub ignore_eos: Option<bool>,
    pub tools: Option<Vec<Value>>,
    pub functions: Option<Vec<Value>>,
}

/// One stop text or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "`stop` is a text or a list of texts")]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// What a stream tells besides text.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub struct StreamOptions {
    /// Ends the stream with a chunk of token counts.
    pub include_usage: bool,
}

/// Form of the answer.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Any text.
    Text,
    /// Some JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema {
        /// The schema with its name.
        json_schema: NamedSchema,
    },
}

/// A JSON schema in OpenAI's wrapping.
#[derive(Debug, Clone, Deserialize)]
pub struct NamedSchema {
    /// The schema.
    pub schema: Value,
}

/// One message of a request.
#[derive(Debug, Clone, Deserialize)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: String,
    /// What is said.
    #[serde(default)]
    pub content: Option<ChatContent>,
    /// Reasoning before an earlier answer.
    #[serde(default)]
    pub reasoning_content: Option<String>,
}

/// Text, or text and images.
#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "`content` is a text or a list of {\"type\": \"text\", \"text\": …} and {\"type\": \"image_url\", \"image_url\": {\"url\": …}}"
)]
pub enum ChatContent {
    /// Text alone.
    Text(String),
    /// Pieces in order.
    Parts(Vec<ChatPart>),
}

/// One piece of a message.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
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

/// Address of an image, alone or in an object.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "`image_url` is {\"url\": …}")]
pub enum ImageUrl {
    /// As OpenAI writes it.
    Object {
        /// `data:`, `http:` or `https:`.
        url: String,
    },
    /// As some clients write it.
    Plain(String),
}

impl ImageUrl {
    /// The address.
    pub fn url(&self) -> &str {
        match self {
            Self::Object { url } | Self::Plain(url) => url,
        }
    }
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
#[derive(Debug, Clone, Deserialize)]
pub struct AdapterRequest {
    /// The name to be used as `model`.
    pub lora_name: String,
    /// Folder inside the server's adapter folder; the name when absent.
    #[serde(default)]
    pub lora_path: Option<String>,
}
