//! The wire format: OpenAI's API, with the extensions that vLLM has made common.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::processor::{remark::Remark, sample::PixelLimits};

/// A conversation to be answered: the body of `POST /v1/chat/completions`, and what that of
/// `POST /v1/responses` comes to.
#[derive(Debug, Clone, Default)]
pub struct ChatRequest {
    /// Name of a model; the base when absent.
    pub model: Option<String>,
    /// The conversation.
    pub messages: Vec<ChatMessage>,
    /// Functions the model may call.
    pub tools: ToolUse,
    /// How messages become a prompt.
    pub prompt: PromptOptions,
    /// How the answer is written.
    pub generation: GenerationFields,
    /// Sends probabilities of findings beside the answer.
    pub findings: bool,
    /// Fields that were passed over.
    pub ignored: Vec<String>,
}

/// Body of `POST /v1/completions`.
#[derive(Debug, Clone, Default)]
pub struct CompletionRequest {
    /// Name of a model; the base when absent.
    pub model: Option<String>,
    /// Texts that are continued.
    pub prompts: Vec<PromptText>,
    /// Sends the prompt before the answer.
    pub echo: bool,
    /// Number of tokens of the end of a prompt that are kept.
    pub truncate: Option<usize>,
    /// How the answer is written.
    pub generation: GenerationFields,
    /// Fields that were passed over.
    pub ignored: Vec<String>,
}

/// A prompt without a chat template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptText {
    /// As text, control tokens included.
    Text(String),
    /// As token ids.
    Ids(Vec<u32>),
}

/// Body of `POST /tokenize`.
#[derive(Debug, Clone)]
pub struct TokenizeRequest {
    /// Name of a model; the base when absent.
    pub model: Option<String>,
    /// What is made into tokens.
    pub input: TokenizeInput,
    /// Sends the text of each token.
    pub token_strs: bool,
}

/// What `POST /tokenize` makes into tokens.
#[derive(Debug, Clone)]
pub enum TokenizeInput {
    /// A text, control tokens included.
    Text(String),
    /// A conversation, as it would be answered.
    Chat(Box<ChatRequest>),
}

/// Body of `POST /detokenize`.
#[derive(Debug, Clone)]
pub struct DetokenizeRequest {
    /// Name of a model; the base when absent.
    pub model: Option<String>,
    /// Token ids.
    pub tokens: Vec<u32>,
}

/// How messages become a prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PromptOptions {
    /// Variables of the template.
    pub template: Map<String, Value>,
    /// Leaves the opening of an answer out.
    pub without_generation_prompt: bool,
    /// Lets the answer go on with the last message.
    pub continue_final_message: bool,
    /// Sizes of the images.
    pub limits: PixelLimits,
    /// Number of tokens of the prompt's end that are kept.
    pub truncate: Option<usize>,
}

/// How an answer is written: fields that all kinds of request have.
#[derive(Debug, Clone, Default)]
#[allow(
    missing_docs,
    reason = "the keys are OpenAI's and vLLM's; openapi/ explains each"
)]
pub struct GenerationFields {
    pub max_tokens: Option<usize>,
    pub max_completion_tokens: Option<usize>,
    pub max_output_tokens: Option<usize>,
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
    pub bad_words: Vec<String>,
    pub seed: Option<i64>,
    pub n: Option<usize>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub include_stop_str_in_output: bool,
    pub keep_special_tokens: bool,
    pub stream: Option<bool>,
    pub include_usage: bool,
    pub continuous_usage_stats: bool,
    /// Number of likeliest tokens beside the chosen one, where log probabilities are wanted at all.
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
    pub return_tokens_as_token_ids: bool,
    pub form: Option<AnswerForm>,
    pub ignore_eos: Option<bool>,
    /// What the answer is expected to be.
    pub prediction: Option<String>,
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
    /// A text of a grammar, in Lark's form or GBNF.
    Grammar(String),
}

/// Functions of a request, and whether they are called.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolUse {
    /// All functions.
    pub tools: Vec<Tool>,
    /// Whether one is called.
    pub choice: ToolChoice,
    /// Names of the only ones that may be called, if not all.
    pub allowed: Option<Vec<String>>,
    /// Several calls in one answer.
    pub parallel: bool,
}

impl Default for ToolUse {
    fn default() -> Self {
        Self {
            tools: Vec::new(),
            choice: ToolChoice::Auto,
            allowed: None,
            parallel: true,
        }
    }
}

impl ToolUse {
    /// Functions that the prompt describes: all, unless none may be called.
    pub fn described(&self) -> &[Tool] {
        match self.choice {
            ToolChoice::None => &[],
            _ => &self.tools,
        }
    }

    /// Functions that may be called, with their places.
    pub fn callable(&self) -> Vec<(usize, &Tool)> {
        let may = |tool: &Tool| {
            let allowed = self.allowed.as_ref();
            let listed = allowed.is_none_or(|names| names.contains(&tool.name));
            match &self.choice {
                ToolChoice::None => false,
                ToolChoice::Auto | ToolChoice::Required => listed,
                ToolChoice::Named(name) => *name == tool.name,
            }
        };
        let all = self.tools.iter().enumerate();
        all.filter(|(_, tool)| may(tool)).collect()
    }

    /// Whether the answer has to be a call.
    pub fn is_forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }
}

/// Whether a function is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// Never.
    None,
    /// As the model likes.
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

/// A function the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// Schema of its arguments; absent for none.
    pub parameters: Option<Value>,
    /// Whether a schema that cannot be followed is an error.
    pub strict: bool,
}

/// One message of a request.
#[derive(Debug, Clone, Default)]
pub struct ChatMessage {
    /// The speaker.
    pub role: String,
    /// Text and images.
    pub content: Option<ChatContent>,
    /// Reasoning before an earlier answer.
    pub reasoning_content: Option<String>,
    /// Calls of an earlier answer.
    pub tool_calls: Vec<ToolCall>,
}

/// A call of a function in an earlier answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// The function.
    pub name: String,
    /// JSON, as it was sent.
    pub arguments: String,
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
pub struct ImageUrl {
    /// The address.
    pub url: String,
    /// The size it is read at.
    pub size: ImageSize,
}

/// The size an image is read at, where a request sets it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ImageSize {
    /// Within the server's.
    pub limits: PixelLimits,
    /// OpenAI's `detail: "low"`.
    pub low: bool,
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

/// What a client should know of an answer besides its images; `image` is null, as for the request as a
/// whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerRemark {
    /// For programs.
    pub code: &'static str,
    /// For people.
    pub text: String,
}

impl AnswerRemark {
    /// The schema of the `what` says nothing of properties that it does not name.
    pub fn closed(what: &str) -> Self {
        Self {
            code: "schema_closed",
            text: format!(
                "the {what} has no other properties than the schema names, as with \
                 `additionalProperties: false`; `additionalProperties: true` allows them"
            ),
        }
    }

    /// As an entry of `remarks`.
    pub fn json(&self) -> Value {
        serde_json::json!({"image": null, "code": self.code, "text": self.text})
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
    #[serde(default)]
    pub completion_tokens_details: CompletionTokensDetails,
}

/// How a prompt's tokens came about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    /// Taken from the cache.
    pub cached_tokens: usize,
}

/// How an answer's tokens came about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompletionTokensDetails {
    /// Drafted tokens that are in the answer, out of the request's `prediction` or what the server drafts from.
    pub accepted_prediction_tokens: usize,
    /// Drafted tokens that are not.
    pub rejected_prediction_tokens: usize,
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
