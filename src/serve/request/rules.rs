//! What becomes of fields of other servers, by the object they are in.

use crate::serve::fields::{Rule, Rules};

const TEXT_ONLY: &str = "this server writes text only";
const ONE_TEMPLATE: &str = "the model's own template is used";
const TOOLS_INSTEAD: &str = "send `tools` and `tool_choice`";
const NO_REASONING_SETTING: &str = "how long the model reasons cannot be set";
const NO_WHITE_SPACE: &str = "JSON is written without free white space";
const FINDINGS_ELSEWHERE: &str = "probabilities of findings are sent by /v1/chat/completions";
const IMAGES_IN_PARTS: &str =
    "put each into `content`, as a part `{\"type\": \"image_url\", \"image_url\": {\"url\": …}}`";
const FORM_INSTEAD: &str = "send `response_format` with a JSON schema, `guided_regex`, `guided_choice` or `guided_grammar`";

/// Fields of OpenAI's and vLLM's requests for text, and of their like, that are not honoured as such:
/// first of all kinds, then of a conversation.
pub(super) const GENERATION_RULES: Rules = &[
    // The user, the purpose, and how a provider bills and stores a request.
    ("keep_alive", Rule::Harmless),
    ("metadata", Rule::Harmless),
    ("prompt_cache_key", Rule::Harmless),
    ("prompt_cache_retention", Rule::Harmless),
    ("request_id", Rule::Harmless),
    ("safety_identifier", Rule::Harmless),
    ("service_tier", Rule::Harmless),
    ("store", Rule::Harmless),
    ("user", Rule::Harmless),
    // What this server does anyway.
    ("cache_prompt", Rule::Only(&["true"])),
    ("detokenize", Rule::Only(&["true"])),
    ("early_stopping", Rule::Only(&["false"])),
    ("length_penalty", Rule::Only(&["1"])),
    ("media_io_kwargs", Rule::Only(&["{}"])),
    ("num_beams", Rule::Only(&["1"])),
    ("priority", Rule::Only(&["0"])),
    ("return_details", Rule::Only(&["false"])),
    ("return_token_ids", Rule::Only(&["false"])),
    ("spaces_between_special_tokens", Rule::Only(&["true"])),
    ("timings_per_token", Rule::Only(&["false"])),
    ("use_beam_search", Rule::Only(&["false"])),
    ("vllm_xargs", Rule::Only(&["{}"])),
    // What it does not do.
    (
        "cache_salt",
        Rule::Refused("start the server with --no-prefix-cache to share nothing between requests"),
    ),
    (
        "guided_decoding_backend",
        Rule::Refused("there is one backend only"),
    ),
    ("guided_whitespace_pattern", Rule::Refused(NO_WHITE_SPACE)),
    ("kv_transfer_params", Rule::Refused("")),
    ("logits_processors", Rule::Refused("")),
    ("structural_tag", Rule::Refused(FORM_INSTEAD)),
    // What others call it.
    (
        "do_sample",
        Rule::Refused("send `temperature`; 0 is greedy"),
    ),
    ("format", Rule::Refused("did you mean `response_format`?")),
    ("grammar", Rule::Refused("did you mean `guided_grammar`?")),
    (
        "json_schema",
        Rule::Refused("did you mean `response_format`?"),
    ),
    ("max_length", Rule::Refused("did you mean `max_tokens`?")),
    (
        "max_new_tokens",
        Rule::Refused("did you mean `max_tokens`?"),
    ),
    ("n_predict", Rule::Refused("did you mean `max_tokens`?")),
    ("num_predict", Rule::Refused("did you mean `max_tokens`?")),
    (
        "repeat_penalty",
        Rule::Refused("did you mean `repetition_penalty`?"),
    ),
    (
        "options",
        Rule::Refused("send what is in it as fields of their own"),
    ),
    ("stop_sequences", Rule::Refused("did you mean `stop`?")),
];

/// Fields of chat requests.
pub(super) const CHAT_RULES: Rules = &[
    ("add_special_tokens", Rule::Only(&["false"])),
    ("audio", Rule::Refused(TEXT_ONLY)),
    // The client of ms-swift sends these four in every request.
    ("audios", Rule::Else(&["[]"], TEXT_ONLY)),
    ("chat_template", Rule::Refused(ONE_TEMPLATE)),
    ("documents", Rule::Only(&["[]"])),
    ("echo", Rule::Only(&["false"])),
    (
        "function_call",
        Rule::Else(&["\"none\"", "\"auto\""], TOOLS_INSTEAD),
    ),
    ("functions", Rule::Else(&["[]"], TOOLS_INSTEAD)),
    ("images", Rule::Else(&["[]"], IMAGES_IN_PARTS)),
    ("include_reasoning", Rule::Only(&["true"])),
    ("input", Rule::Refused("did you mean `messages`?")),
    (
        "max_output_tokens",
        Rule::Refused("did you mean `max_tokens`?"),
    ),
    ("modalities", Rule::Only(&["[\"text\"]"])),
    ("objects", Rule::Else(&["{}"], "write boxes as text")),
    ("prompt", Rule::Refused("did you mean `messages`?")),
    ("reasoning_effort", Rule::Refused(NO_REASONING_SETTING)),
    ("system", Rule::Refused("send a message of role `system`")),
    ("thinking_token_budget", Rule::Refused(NO_REASONING_SETTING)),
    (
        "verbosity",
        Rule::Else(&["\"medium\""], "ask for a short or long answer in words"),
    ),
    (
        "videos",
        Rule::Else(&["[]"], "videos are not read; send single frames as images"),
    ),
    ("web_search_options", Rule::Refused(TEXT_ONLY)),
];

/// Fields of requests that continue a text.
pub(super) const COMPLETION_RULES: Rules = &[
    ("add_special_tokens", Rule::Harmless),
    ("findings", Rule::Else(&["false"], FINDINGS_ELSEWHERE)),
    (
        "messages",
        Rule::Refused("send messages to /v1/chat/completions"),
    ),
    ("prompt_embeds", Rule::Refused("send the prompt as text")),
    (
        "suffix",
        Rule::Refused("the model continues text and fills no gap"),
    ),
    (
        "tools",
        Rule::Else(&["[]"], "send it to /v1/chat/completions"),
    ),
    (
        "top_logprobs",
        Rule::Refused("`logprobs` is the number here"),
    ),
];

/// Fields of requests to `/v1/responses`.
pub(super) const RESPONSES_RULES: Rules = &[
    ("background", Rule::Only(&["false"])),
    ("findings", Rule::Else(&["false"], FINDINGS_ELSEWHERE)),
    (
        "conversation",
        Rule::Refused("nothing is stored; send the whole conversation as `input`"),
    ),
    (
        "max_tool_calls",
        Rule::Refused("a client calls the functions, and may stop to do so"),
    ),
    ("messages", Rule::Refused("did you mean `input`?")),
    (
        "max_tokens",
        Rule::Refused("did you mean `max_output_tokens`?"),
    ),
    (
        "previous_response_id",
        Rule::Refused("nothing is stored; send the whole conversation as `input`"),
    ),
    (
        "prompt",
        Rule::Refused("prompts are not stored; send `instructions` and `input`"),
    ),
    (
        "response_format",
        Rule::Refused("did you mean `text.format`?"),
    ),
    (
        "store",
        Rule::Else(
            &["false"],
            "nothing is stored; leave it out, and send the whole conversation as `input`",
        ),
    ),
    ("truncation", Rule::Only(&["\"disabled\""])),
];

/// What the field `reasoning` may have.
pub(super) const REASONING_RULES: Rules = &[
    ("effort", Rule::Refused(NO_REASONING_SETTING)),
    (
        "generate_summary",
        Rule::Refused("the reasoning is sent as it is"),
    ),
    (
        "summary",
        Rule::Else(&["\"auto\""], "the reasoning is sent as it is"),
    ),
];

/// What the field `text` may have besides.
pub(super) const TEXT_RULES: Rules = &[(
    "verbosity",
    Rule::Else(&["\"medium\""], "ask for a short or long answer in words"),
)];

/// What a message may have besides: answers of this and other servers are sent back whole.
pub(super) const MESSAGE_RULES: Rules = &[
    ("annotations", Rule::Only(&["[]"])),
    ("audio", Rule::Refused(TEXT_ONLY)),
    (
        "function_call",
        Rule::Refused("send it as one of `tool_calls`"),
    ),
    (
        "name",
        Rule::Refused("the model's template has no place for a name; say it in the content"),
    ),
    ("provider_specific_fields", Rule::Only(&["{}"])),
    (
        "tool_call_id",
        Rule::Refused("it belongs to a message of role `tool`"),
    ),
    (
        "tool_calls",
        Rule::Else(&["[]"], "it belongs to a message of role `assistant`"),
    ),
];

/// What an item of `input` may have besides.
pub(super) const ITEM_RULES: Rules = &[
    ("annotations", Rule::Only(&["[]"])),
    (
        "encrypted_content",
        Rule::Refused("send the reasoning as it is"),
    ),
    ("id", Rule::Harmless),
    ("phase", Rule::Harmless),
    ("status", Rule::Harmless),
    // A summary of the reasoning that is there itself.
    ("summary", Rule::Harmless),
];

const SIZE_BY_PIXELS: &str = "send `min_pixels` and `max_pixels`";

/// What a piece of a message may have besides.
pub(super) const PART_RULES: Rules = &[
    ("annotations", Rule::Only(&["[]"])),
    ("cache_control", Rule::Harmless),
    (
        "file_id",
        Rule::Refused("no files are kept; send the image as data:image/TYPE;base64,…"),
    ),
    ("logprobs", Rule::Only(&["[]"])),
    ("resized_height", Rule::Refused(SIZE_BY_PIXELS)),
    ("resized_width", Rule::Refused(SIZE_BY_PIXELS)),
    ("uuid", Rule::Harmless),
];

/// What `stream_options` may have besides.
pub(super) const STREAM_RULES: Rules = &[("include_obfuscation", Rule::Harmless)];

/// What `structured_outputs` may have besides.
pub(super) const STRUCTURED_RULES: Rules = &[
    ("disable_any_whitespace", Rule::Only(&["true"])),
    ("disable_additional_properties", Rule::Only(&["true"])),
    ("disable_fallback", Rule::Harmless),
    ("structural_tag", Rule::Refused(FORM_INSTEAD)),
    ("whitespace_pattern", Rule::Refused(NO_WHITE_SPACE)),
];

/// What comes beside a schema.
pub(super) const SCHEMA_RULES: Rules = &[
    ("description", Rule::Harmless),
    ("name", Rule::Harmless),
    // A schema is followed to the letter in any case.
    ("strict", Rule::Harmless),
];

/// What `mm_processor_kwargs` may have besides.
pub(super) const SIZE_RULES: Rules = &[
    ("do_resize", Rule::Only(&["true"])),
    ("fps", Rule::Refused("videos are not read")),
    ("use_fast", Rule::Harmless),
];

/// What a call of a function may have besides.
pub(super) const CALL_RULES: Rules = &[("id", Rule::Harmless), ("index", Rule::Harmless)];

/// What requests about tokens may have besides.
pub(super) const TOKENIZE_RULES: Rules = &[
    ("add_special_tokens", Rule::Harmless),
    ("chat_template", Rule::Refused(ONE_TEMPLATE)),
];

/// What a request about an adapter may have besides.
pub(super) const ADAPTER_RULES: Rules = &[
    ("base_model_name", Rule::Refused("there is one base only")),
    (
        "lora_int_id",
        Rule::Refused("an adapter is known by its name"),
    ),
    ("load_inplace", Rule::Only(&["false"])),
];
