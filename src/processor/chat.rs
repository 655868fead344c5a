//! Messages to token ids: the chat template of a checkpoint and the places of its images.
//!
//! Steps of a prompt: messages → [`ChatTemplate::render`] → [`Tokenizer::encode`] → one
//! `<|image_pad|>` per image → [`expand_image_pads`] → as many as the image has merged features.
//! [`encode_chat`] does all of them, and first refuses control tokens in the messages' text.
//! This module knows nothing of pixels: an image is its place and its patch grid.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use minijinja::value::{Value, merge_maps};
use minijinja::{Environment, context};
use serde::Serialize;

use super::jinja;
pub use super::message::{Content, Message, Part, Role, split_thinking};
use super::tokenizer::{Tokenizer, TokenizerError};

/// Patches of one image as (temporal, height, width), a row of `image_grid_thw`.
pub type ImageGrid = [usize; 3];

/// Qwen3-VL Instruct: answers at once.
pub const INSTRUCT_TEMPLATE: &str = include_str!("templates/instruct.jinja");

/// Qwen3-VL Thinking: the generation prompt opens a `<think>` block, past reasoning is dropped.
pub const THINKING_TEMPLATE: &str = include_str!("templates/thinking.jinja");

/// Why messages could not become token ids.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// A template file could not be read.
    #[error("cannot read chat template `{}`", .path.display())]
    Read {
        /// File that was being read.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// A file that should hold a template is not JSON.
    #[error("`{}` is not valid JSON", .path.display())]
    Json {
        /// File that was being read.
        path: PathBuf,
        /// What the parser said.
        #[source]
        cause: serde_json::Error,
    },
    /// The key `chat_template` is of a form that transformers does not write.
    #[error("`chat_template` in `{}` is neither a text nor a list of `name` and `template`", .path.display())]
    Form {
        /// File that was being read.
        path: PathBuf,
    },
    /// A list of templates lacks the wanted one.
    #[error("`{}` has no chat template `{wanted}`; it has: {found}", .path.display())]
    Unnamed {
        /// File that was being read.
        path: PathBuf,
        /// The wanted name.
        wanted: String,
        /// Names in the file.
        found: String,
    },
    /// The template is wrong, or it refused the messages.
    #[error("chat template `{origin}` cannot be rendered: {reason}")]
    Template {
        /// File or built-in name of the template.
        origin: String,
        /// What the engine or the template's `raise_exception` said.
        reason: String,
    },
    /// There is nothing to render.
    #[error("the conversation holds no message; expected at least one from the user")]
    NoMessages,
    /// A message holds a token that steers the model.
    #[error("message {index} of `{role}` is refused: {cause}")]
    Control {
        /// Place of the message, from 0.
        index: usize,
        /// Role of the message.
        role: &'static str,
        /// Which token it is.
        cause: TokenizerError,
    },
    /// As many image places as images are needed.
    #[error(
        "the text has {placeholders} image placeholders but {images} images were given; expected as many"
    )]
    ImageCount {
        /// Number of `<|image_pad|>` in the text.
        placeholders: usize,
        /// Number of grids.
        images: usize,
    },
    /// A grid that cannot be merged.
    #[error(
        "image {index} has the grid {grid:?}; expected sides above 0, height and width multiples of the merge size {merge_size}"
    )]
    Grid {
        /// Place of the image, from 0.
        index: usize,
        /// The grid, in patches.
        grid: ImageGrid,
        /// Patches per side that are merged into one feature.
        merge_size: usize,
    },
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// Settings of a template beside the messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RenderOptions {
    /// Ends with the opening of an answer.
    pub add_generation_prompt: bool,
    /// Numbers the images: `Picture 1: `.
    pub add_vision_id: bool,
    /// Asks a hybrid template to think or not; left to the template if `None`.
    pub enable_thinking: Option<bool>,
}

impl RenderOptions {
    /// The prompt for an answer, nothing else set.
    pub fn generation() -> Self {
        Self {
            add_generation_prompt: true,
            ..Self::default()
        }
    }
}

/// A chat template, ready to render.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    origin: String,
    tokens: BTreeMap<String, String>,
    opens_thinking: bool,
}

impl ChatTemplate {
    /// Makes a template from its Jinja source; `origin` only serves the error messages.
    ///
    /// # Errors
    /// [`ChatError::Template`] if it cannot render one short question.
    pub fn new(source: impl Into<String>, origin: impl Into<String>) -> Result<Self, ChatError> {
        Self::with_tokens(source.into(), origin.into(), BTreeMap::new())
    }

    fn with_tokens(
        source: String,
        origin: String,
        tokens: BTreeMap<String, String>,
    ) -> Result<Self, ChatError> {
        let mut template = Self {
            environment: jinja::environment(),
            source,
            origin,
            tokens,
            opens_thinking: false,
        };
        template.probe()?;
        Ok(template)
    }

    fn probe(&mut self) -> Result<(), ChatError> {
        let probe = [Message::text(Role::User, "?")];
        let prompt = self.render(&probe, RenderOptions::generation())?;
        self.opens_thinking = prompt.trim_end().ends_with("<think>");
        Ok(())
    }

    /// The built-in template of Qwen3-VL Instruct.
    ///
    /// # Errors
    /// [`ChatError::Template`], never in practice: a test renders it.
    pub fn instruct() -> Result<Self, ChatError> {
        Self::new(INSTRUCT_TEMPLATE, "built-in instruct")
    }

    /// The built-in template of Qwen3-VL Thinking.
    ///
    /// # Errors
    /// [`ChatError::Template`], never in practice: a test renders it.
    pub fn thinking() -> Result<Self, ChatError> {
        Self::new(THINKING_TEMPLATE, "built-in thinking")
    }

    /// Looks for the template of a checkpoint folder; `None` if it has none.
    ///
    /// Searched in the order of transformers: `chat_template.jinja`, `chat_template.json`, then
    /// the key `chat_template` of `tokenizer_config.json`. Where that is a list, `name` chooses,
    /// `default` if not given.
    ///
    /// # Errors
    /// A file that cannot be read or is not JSON, a list without the name, or a template that does
    /// not render.
    pub fn find(folder: impl AsRef<Path>, name: Option<&str>) -> Result<Option<Self>, ChatError> {
        let folder = folder.as_ref();
        let config = folder.join("tokenizer_config.json");
        let config_json = read_json(&config)?;
        let tokens = config_json.as_ref().map(named_tokens).unwrap_or_default();
        let jinja = folder.join("chat_template.jinja");
        if let Some(source) = read_text(&jinja)? {
            return Self::with_tokens(source, jinja.display().to_string(), tokens).map(Some);
        }
        let json = folder.join("chat_template.json");
        for (path, value) in [(&json, read_json(&json)?), (&config, config_json)] {
            let Some(found) = value.as_ref().and_then(|value| value.get("chat_template")) else {
                continue;
            };
            if let Some(source) = choose_template(found, path, name)? {
                return Self::with_tokens(source, path.display().to_string(), tokens).map(Some);
            }
        }
        Ok(None)
    }

    /// File or built-in name the template came from.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the generation prompt ends inside a `<think>` block, so that a generated text
    /// starts with reasoning that has no opening tag (see [`split_thinking`]).
    pub fn opens_thinking(&self) -> bool {
        self.opens_thinking
    }

    /// The conversation as one text, `<|image_pad|>` once for each image.
    ///
    /// The messages' text is not checked here; [`encode_chat`] does.
    ///
    /// # Errors
    /// [`ChatError::NoMessages`], and [`ChatError::Template`] if the template refuses.
    pub fn render(
        &self,
        messages: &[Message],
        options: RenderOptions,
    ) -> Result<String, ChatError> {
        self.render_with(messages, &serde_json::Map::new(), options)
    }

    /// As [`Self::render`], for messages of another form and with further variables, `tools` among them.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_with<M: Serialize>(
        &self,
        messages: &[M],
        variables: &serde_json::Map<String, serde_json::Value>,
        options: RenderOptions,
    ) -> Result<String, ChatError> {
        if messages.is_empty() {
            return Err(ChatError::NoMessages);
        }
        // Templates that test `is defined` treat undefined and false differently, so it stays undefined.
        let thinking = options
            .enable_thinking
            .map_or(Value::UNDEFINED, Value::from);
        let defaults = context! {
            tools => (),
            documents => (),
            enable_thinking => thinking,
            ..Value::from_serialize(&self.tokens)
        };
        // The later of two wins.
        let more = merge_maps([defaults, Value::from_serialize(variables)]);
        self.template()?
            .render(context! {
                messages => messages,
                add_generation_prompt => options.add_generation_prompt,
                add_vision_id => options.add_vision_id,
                ..more
            })
            .map_err(|error| self.failed(&error))
    }

    fn template(&self) -> Result<minijinja::Template<'_, '_>, ChatError> {
        self.environment
            .template_from_named_str("chat_template", &self.source)
            .map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &minijinja::Error) -> ChatError {
        ChatError::Template {
            origin: self.origin.clone(),
            reason: reason_of(error),
        }
    }

    /// Whether the template reads this variable.
    pub fn reads(&self, variable: &str) -> bool {
        self.template()
            .is_ok_and(|template| template.undeclared_variables(false).contains(variable))
    }
}

fn reason_of(error: &minijinja::Error) -> String {
    let words = error
        .detail()
        .map_or_else(|| error.kind().to_string(), ToOwned::to_owned);
    match error.line() {
        Some(line) => format!("{words} (line {line})"),
        None => words,
    }
}

fn read_text(path: &Path) -> Result<Option<String>, ChatError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(ChatError::Read {
            path: path.to_owned(),
            cause,
        }),
    }
}

fn read_json(path: &Path) -> Result<Option<serde_json::Value>, ChatError> {
    let Some(text) = read_text(path)? else {
        return Ok(None);
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|cause| ChatError::Json {
            path: path.to_owned(),
            cause,
        })
}

/// `bos_token`, `eos_token` and `pad_token` of a `tokenizer_config.json`, which templates may use.
fn named_tokens(config: &serde_json::Value) -> BTreeMap<String, String> {
    ["bos_token", "eos_token", "pad_token", "unk_token"]
        .into_iter()
        .filter_map(|key| {
            let value = config.get(key)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((key.to_owned(), text.to_owned()))
        })
        .collect()
}

fn choose_template(
    found: &serde_json::Value,
    path: &Path,
    name: Option<&str>,
) -> Result<Option<String>, ChatError> {
    match found {
        serde_json::Value::Null => Ok(None),
        serde_json::Value::String(source) => Ok(Some(source.clone())),
        serde_json::Value::Array(entries) => {
            let named = entries
                .iter()
                .map(|entry| {
                    Some((
                        entry.get("name")?.as_str()?,
                        entry.get("template")?.as_str()?,
                    ))
                })
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| ChatError::Form {
                    path: path.to_owned(),
                })?;
            let wanted = name.unwrap_or("default");
            match named.iter().find(|(name, _)| *name == wanted) {
                Some((_, source)) => Ok(Some((*source).to_owned())),
                None => Err(ChatError::Unnamed {
                    path: path.to_owned(),
                    wanted: wanted.to_owned(),
                    found: named
                        .iter()
                        .map(|(name, _)| format!("`{name}`"))
                        .collect::<Vec<_>>()
                        .join(", "),
                }),
            }
        }
        _ => Err(ChatError::Form {
            path: path.to_owned(),
        }),
    }
}

/// Checks that no message carries a control token, not even spread over neighbouring pieces.
///
/// # Errors
/// [`ChatError::Control`] with the message's place, its role and the token.
pub fn refuse_control_tokens(tokenizer: &Tokenizer, messages: &[Message]) -> Result<(), ChatError> {
    for (index, message) in messages.iter().enumerate() {
        let reasoning = message.reasoning_content.as_deref().unwrap_or_default();
        for text in [message.content.text().as_str(), reasoning] {
            tokenizer
                .refuse_control_tokens(text)
                .map_err(|cause| ChatError::Control {
                    index,
                    role: message.role.as_str(),
                    cause,
                })?;
        }
    }
    Ok(())
}

/// Ids of a conversation as the model takes them, image placeholders expanded.
///
/// `grids` are the images' patch grids in the order of their places; `merge_size` is the
/// vision config's `spatial_merge_size`.
///
/// # Errors
/// [`ChatError`]: a control token in a message, a template that refuses, a number of images that
/// differs from the number of places, or a grid that cannot be merged.
pub fn encode_chat(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    options: RenderOptions,
    grids: &[ImageGrid],
    merge_size: usize,
) -> Result<Vec<u32>, ChatError> {
    refuse_control_tokens(tokenizer, messages)?;
    let ids = tokenizer.encode(&template.render(messages, options)?)?;
    expand_image_pads(&ids, tokenizer.special().image_pad, grids, merge_size)
}

/// Number of `<|image_pad|>` tokens of an image: its patches over `merge_size`².
///
/// `index` only serves the error message.
///
/// # Errors
/// [`ChatError::Grid`] if a side is 0 or the sides are no multiples of `merge_size`.
pub fn image_token_count(
    index: usize,
    grid: ImageGrid,
    merge_size: usize,
) -> Result<usize, ChatError> {
    let [frames, height, width] = grid;
    let even = merge_size > 0 && height % merge_size == 0 && width % merge_size == 0;
    let count = if even {
        frames
            .checked_mul(height / merge_size)
            .and_then(|rows| rows.checked_mul(width / merge_size))
            .filter(|&count| count > 0)
    } else {
        None
    };
    count.ok_or(ChatError::Grid {
        index,
        grid,
        merge_size,
    })
}

/// Replaces each `<|image_pad|>` in `ids` by as many as its image has merged features.
///
/// # Errors
/// [`ChatError::ImageCount`] if there are not as many placeholders as grids, and
/// [`ChatError::Grid`].
pub fn expand_image_pads(
    ids: &[u32],
    image_pad: u32,
    grids: &[ImageGrid],
    merge_size: usize,
) -> Result<Vec<u32>, ChatError> {
    let placeholders = ids.iter().filter(|&&id| id == image_pad).count();
    if placeholders != grids.len() {
        return Err(ChatError::ImageCount {
            placeholders,
            images: grids.len(),
        });
    }
    let mut counts = Vec::with_capacity(grids.len());
    for (index, &grid) in grids.iter().enumerate() {
        counts.push(image_token_count(index, grid, merge_size)?);
    }
    let mut expanded = Vec::with_capacity(ids.len() + counts.iter().sum::<usize>());
    let mut counts = counts.into_iter();
    for &id in ids {
        let copies = if id == image_pad { counts.next() } else { None };
        expanded.extend(std::iter::repeat_n(id, copies.unwrap_or(1)));
    }
    Ok(expanded)
}
