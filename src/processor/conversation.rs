//! A conversation of questions and answers, as training sees it.

use super::message::{Content, Message, Part, Role};

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// The question, its images in place.
    pub question: Vec<Part>,
    /// The answer; absent only in the last turn of a sample made for inference.
    pub answer: Option<String>,
    /// Whether the answer is learnt; else it is only read, as a question is.
    pub learns: bool,
}

/// A conversation of turns, as training sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversation {
    /// The system message.
    pub system: Option<String>,
    /// At least one question with its answer.
    pub turns: Vec<Turn>,
}

impl Conversation {
    /// One question about `images` images at its front, with its answer.
    pub fn single(images: usize, question: impl Into<String>, answer: impl Into<String>) -> Self {
        let mut parts = vec![Part::Image; images];
        parts.push(Part::Text {
            text: question.into(),
        });
        Self {
            system: None,
            turns: vec![Turn {
                question: parts,
                answer: Some(answer.into()),
                learns: true,
            }],
        }
    }

    /// Number of image places.
    pub fn image_count(&self) -> usize {
        self.turns
            .iter()
            .flat_map(|turn| &turn.question)
            .filter(|part| **part == Part::Image)
            .count()
    }

    /// Whether the first question has words.
    pub fn has_question(&self) -> bool {
        let first = self.turns.first().map(|turn| turn.question.as_slice());
        first.unwrap_or_default().iter().any(|part| match part {
            Part::Image => false,
            Part::Text { text } => !text.trim().is_empty(),
        })
    }

    /// Answer of the last turn: the reference text of an evaluation.
    pub fn last_answer(&self) -> Option<&str> {
        self.turns.last()?.answer.as_deref()
    }

    /// The messages up to and including the last question, for a chat template.
    pub fn prompt_messages(&self) -> Vec<Message> {
        let mut messages = self.messages();
        if self.last_answer().is_some() {
            messages.pop();
        }
        messages
    }

    /// All messages.
    pub fn messages(&self) -> Vec<Message> {
        let system = self
            .system
            .iter()
            .map(|text| Message::text(Role::System, text));
        let turns = self.turns.iter().flat_map(|turn| {
            let question = Message {
                role: Role::User,
                content: Content::Parts(turn.question.clone()),
                reasoning_content: None,
            };
            let answer = turn
                .answer
                .iter()
                .map(|text| Message::text(Role::Assistant, text));
            std::iter::once(question).chain(answer)
        });
        system.chain(turns).collect()
    }

    /// Adds the places of images that have none to the front of the first question, as ms-swift does.
    ///
    /// Source: `_add_default_tags`, ms-swift, `template/base.py`.
    pub(super) fn place_images(&mut self, images: usize) {
        let missing = images.saturating_sub(self.image_count());
        if let Some(first) = self.turns.first_mut() {
            first
                .question
                .splice(0..0, std::iter::repeat_n(Part::Image, missing));
        }
    }
}
