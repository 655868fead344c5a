//! Messages: role, text and places of images; reasoning and answer of a generated text.

use serde::{Deserialize, Serialize};

/// Author of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions; at most one message, the first.
    System,
    /// Asks; the only role that may hold images.
    User,
    /// Answers.
    Assistant,
}

impl Role {
    /// The role as templates and files write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One piece of a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Part {
    /// The place of the next image.
    Image,
    /// Words.
    Text {
        /// The words.
        text: String,
    },
}

/// What a message holds: plain text, or pieces in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Only words.
    Text(String),
    /// Words and images in order.
    Parts(Vec<Part>),
}

impl Content {
    /// All words, joined; images leave no trace.
    pub fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => parts
                .iter()
                .filter_map(|part| match part {
                    Part::Image => None,
                    Part::Text { text } => Some(text.as_str()),
                })
                .collect(),
        }
    }

    /// Number of images.
    pub fn image_count(&self) -> usize {
        match self {
            Self::Text(_) => 0,
            Self::Parts(parts) => parts.iter().filter(|part| **part == Part::Image).count(),
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Its author.
    pub role: Role,
    /// Text and images.
    pub content: Content,
    /// Reasoning before an answer; only Thinking templates write it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

impl Message {
    /// A message of words alone.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self {
            role,
            content: Content::Text(text.into()),
            reasoning_content: None,
        }
    }

    /// A user's message of `images` images followed by a question.
    pub fn question(images: usize, text: impl Into<String>) -> Self {
        let mut parts = vec![Part::Image; images];
        parts.push(Part::Text { text: text.into() });
        Self {
            role: Role::User,
            content: Content::Parts(parts),
            reasoning_content: None,
        }
    }
}

/// Splits a generated text into reasoning and answer.
///
/// `starts_inside` says that the prompt already opened the block
/// (`ChatTemplate::opens_thinking`). Without a closing tag, an open block is all reasoning and
/// the answer empty; without any tag the text is all answer.
/// A closing tag alone closes a block that the prompt opened, whatever `starts_inside` says. Newlines at the boundaries are dropped;
/// an empty block gives `None`.
pub fn split_thinking(text: &str, starts_inside: bool) -> (Option<String>, String) {
    let reasoning = |text: &str| {
        let text = text.trim_matches('\n');
        (!text.trim().is_empty()).then(|| text.to_owned())
    };
    let opened = text.trim_start().strip_prefix("<think>");
    let inner = opened.unwrap_or(text);
    match inner.split_once("</think>") {
        Some((thoughts, answer)) => (
            reasoning(thoughts),
            answer.trim_start_matches('\n').to_owned(),
        ),
        None if opened.is_some() || starts_inside => (reasoning(inner), String::new()),
        None => (None, text.to_owned()),
    }
}
