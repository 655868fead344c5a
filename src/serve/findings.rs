//! Probabilities of findings beside an answer: the calibration of a model, the field of a request, and the object in its answer.

use serde_json::{Map, Value, json};

use super::{
    App,
    content::Prepared,
    engine::{Continuations, Places, cost_of},
    error::ApiError,
    finding_basis::FindingBasis,
    models::ModelEntry,
    settings::RequestSettings,
    types::{AnswerRemark, ChatContent, ChatMessage, ChatPart, ChatRequest},
};
use crate::{
    eval::{
        findings::RuleSet,
        probability::{
            calibration::{AskedModel, Calibration},
            evidence::{ClassEvidence, of_reports, of_sentences},
            judged::{CONFLICT, UNCALIBRATED, form_of, judge},
            logit::{DRAWN_REPORTS, DRAWN_TOKENS, SentenceContext},
            sentences::FindingSentences,
            wordings,
        },
    },
    processor::message::split_thinking,
};

/// Name of the field that asks for them.
pub(super) const FIELD: &str = "findings";

/// System message and question of a conversation that is one question about images, these first.
fn question_of(messages: &[ChatMessage]) -> Option<(Option<String>, String)> {
    let text = |content: &Option<ChatContent>| match content {
        Some(ChatContent::Text(text)) => Some(text.clone()),
        Some(ChatContent::Parts(parts)) => match &parts[..] {
            [ChatPart::Text { text }] => Some(text.clone()),
            _ => None,
        },
        None => None,
    };
    let (system, user) = match messages {
        [user] => (None, user),
        [system, user] if ["system", "developer"].contains(&&*system.role) => {
            (Some(text(&system.content)?), user)
        }
        _ => return None,
    };
    let Some(ChatContent::Parts(parts)) = &user.content else {
        return None;
    };
    let (last, images) = parts.split_last()?;
    let is_image = |part: &ChatPart| matches!(part, ChatPart::ImageUrl { .. });
    match last {
        ChatPart::Text { text } if images.iter().all(is_image) && user.role == "user" => {
            Some((system, text.clone()))
        }
        _ => None,
    }
}

/// Refuses what does not fit: the answer and one sequence more, of `needed` tokens each.
///
/// # Errors
/// [`ApiError`] of status 400.
fn expect_room(app: &App, needed: usize) -> Result<(), ApiError> {
    let most = app.engine.limits().cache_tokens;
    if needed <= app.context() && 2 * cost_of(needed) <= most {
        return Ok(());
    }
    let reason = format!(
        "`{FIELD}` needs room for two sequences of {needed} tokens; this server takes {} in one and {most} in all; \
         send a smaller image or a smaller `max_tokens`, or start the server with more --cache-tokens",
        app.context()
    );
    Err(ApiError::invalid(FIELD, reason).with_code("context_length_exceeded"))
}

/// What a request asks about findings, before its messages are made into a prompt.
pub(super) struct FindingRequest {
    question: Option<(Option<String>, String)>,
    /// Variables of the template change the prompt in ways that a calibration does not record.
    plain_template: bool,
}

/// What the engine has to do for probabilities of findings.
pub(super) enum FindingWork {
    /// Log-probabilities of sentences after the prompt.
    Sentences(Continuations),
    /// So many reports, drawn at temperature 1 from seed 0 on.
    Draws(usize),
}

/// What came of it.
pub(super) enum FoundFindings {
    /// `[place][sentence][token]`.
    Sentences(Vec<Vec<Vec<f32>>>),
    /// The drawn reports, without their reasoning.
    Reports(Vec<String>),
}

/// The probabilities of one answer, as its object in the response.
#[derive(Debug, Clone)]
pub(super) struct AskedFindings {
    calibration: Option<Box<Calibration>>,
    /// Why there is none.
    why: Option<String>,
}

impl FindingRequest {
    /// Takes what a request says; `None` where it does not ask.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 for what cannot be asked together with it.
    pub(super) fn new(
        request: &ChatRequest,
        settings: &RequestSettings,
    ) -> Result<Option<Self>, ApiError> {
        if !request.findings {
            return Ok(None);
        }
        let refuse = |why: &str| {
            Err(ApiError::invalid(
                FIELD,
                format!("`{FIELD}` cannot be followed: {why}"),
            ))
        };
        let has_image = request.messages.iter().any(|message| {
            matches!(&message.content, Some(ChatContent::Parts(parts))
                if parts.iter().any(|part| matches!(part, ChatPart::ImageUrl { .. })))
        });
        if !has_image {
            return refuse("findings are those of an image, and the messages have none");
        }
        if settings.choices != 1 {
            return refuse("it is about one answer, and `n` asks for several");
        }
        if !request.tools.callable().is_empty() {
            return refuse("it compares a report, and with `tools` the answer may be a call");
        }
        if settings.form.is_some() {
            return refuse("it compares a report, and the request asks for another form of answer");
        }
        if request.prompt.without_generation_prompt {
            return refuse("findings are asked for at the beginning of a new answer");
        }
        Ok(Some(Self {
            question: question_of(&request.messages),
            plain_template: request.prompt.template.is_empty(),
        }))
    }

    /// What the engine has to do for it, and what becomes of that; `max_new_tokens` is the longest answer.
    ///
    /// # Errors
    /// [`ApiError`] where prompt and sentences do not fit.
    pub(super) fn ask(
        self,
        app: &App,
        model: &ModelEntry,
        prepared: &Prepared,
        max_new_tokens: usize,
    ) -> Result<(FindingWork, AskedFindings), ApiError> {
        let (calibration, why) = match &*model.findings {
            FindingBasis::Uncalibrated(why) => (None, Some(why.clone())),
            FindingBasis::Calibrated { calibration, here } => {
                match self.differences(calibration, here, prepared) {
                    None => (Some(calibration.clone()), None),
                    Some(why) => (None, Some(why)),
                }
            }
        };
        let lead = calibration.as_ref().map_or("", |one| &one.model.lead);
        let (form, context) = form_of(calibration.as_deref());
        if !form.is_of_sentences() {
            let draws = calibration.as_ref().map(|one| one.model.draws);
            let draws = draws.unwrap_or(DRAWN_REPORTS);
            let most = app.engine.limits().max_queue;
            if draws >= most {
                return Err(ApiError::invalid(
                    FIELD,
                    format!(
                        "`{FIELD}` needs {draws} drawn reports beside the answer, and this server takes {most} sequences in all; start it with more --max-queue"
                    ),
                ));
            }
            let prompt = prepared.prompt.len();
            let left = app.context().saturating_sub(prompt);
            expect_room(app, prompt + DRAWN_TOKENS.min(left))?;
            return Ok((
                FindingWork::Draws(draws),
                AskedFindings { calibration, why },
            ));
        }
        let opens_thinking = prepared.opens_thinking;
        let sentences =
            FindingSentences::new(&app.parts.tokenizer, opens_thinking, lead).map_err(|error| {
                log::error!("the sentences of findings could not be encoded: {error}");
                ApiError::internal()
            })?;
        let opening = sentences.opening();
        let of_report = match context {
            SentenceContext::Start => 0,
            SentenceContext::Report => max_new_tokens,
        };
        let prompt = prepared.prompt.len();
        let needed = prompt + opening + of_report + sentences.longest() + 1;
        expect_room(app, needed)?;
        if !prepared.prompt.ends_in_text() {
            return Err(ApiError::invalid(
                FIELD,
                format!("`{FIELD}` cannot be followed: the prompt ends in an image"),
            ));
        }
        let most = opening + of_report;
        let continuations = Continuations {
            tokens: sentences.tokens().clone(),
            places: Box::new(move |answer| {
                let report = match context {
                    SentenceContext::Start => None,
                    SentenceContext::Report => Some(split_thinking(answer, opens_thinking).1),
                };
                let places = sentences.places(report.as_deref());
                let mut places = places.map_err(|error| error.to_string())?;
                // The report is encoded clause by clause, which may take more tokens than were generated.
                places.ends.retain(|end| *end <= most);
                places.tokens.truncate(most);
                Ok(Places {
                    tokens: places.tokens,
                    ends: places.ends,
                })
            }),
        };
        Ok((
            FindingWork::Sentences(continuations),
            AskedFindings { calibration, why },
        ))
    }

    /// Why the calibration is of something else than this request.
    fn differences(
        &self,
        calibration: &Calibration,
        here: &AskedModel,
        prepared: &Prepared,
    ) -> Option<String> {
        let Some((system, prompt)) = &self.question else {
            return Some(
                "the calibration is of one question after its images, and this conversation has another form".into(),
            );
        };
        if !self.plain_template {
            return Some("the calibration is of the chat template without variables".into());
        }
        let made_for = &calibration.model;
        let here = AskedModel {
            pixels: prepared.pixels,
            prompt: prompt.clone(),
            system: system.clone(),
            lead: made_for.lead.clone(),
            context: made_for.context,
            form: made_for.form,
            wordings: match made_for.form.is_of_sentences() {
                true => wordings::fingerprint(),
                false => String::new(),
            },
            draws: made_for.draws,
            rules: made_for.rules.clone(),
            ..here.clone()
        };
        let differences = made_for.differences(&here);
        (!differences.is_empty()).then(|| {
            format!(
                "the calibration was made for something else: here {}",
                differences.join(", ")
            )
        })
    }
}

impl AskedFindings {
    /// The object of an answer, and the remarks that belong to it. `report` is the answer without its reasoning.
    pub(super) fn told(&self, found: FoundFindings, report: &str) -> (Value, Vec<Value>) {
        let classes = match found {
            FoundFindings::Sentences(found) => of_sentences(found),
            FoundFindings::Reports(reports) => self.read(&reports),
        };
        let judged = judge(&classes, self.calibration.as_deref(), report, None);
        let mut classes = Map::new();
        for (finding, one) in &judged.findings {
            let mut entry = json!(one);
            entry["chinese"] = finding.chinese().into();
            classes.insert(finding.key().to_owned(), entry);
        }
        let mut remarks: Vec<Value> = judged
            .conflicts
            .into_iter()
            .map(|text| {
                let code = CONFLICT;
                AnswerRemark { code, text }.json()
            })
            .collect();
        if let Some(why) = &self.why {
            let text = format!(
                "the probabilities of findings are not calibrated and decide nothing: {why}"
            );
            let code = UNCALIBRATED;
            remarks.push(AnswerRemark { code, text }.json());
        }
        let object = json!({
            "calibrated": self.calibration.is_some(),
            "uncalibrated_because": self.why,
            "target_error": self.calibration.as_ref().map(|one| one.target_error),
            "rules": judged.rules,
            "classes": classes,
        });
        (object, remarks)
    }

    /// What drawn reports say, read with the table of the calibration or the one that their words suggest.
    fn read(&self, reports: &[String]) -> Vec<ClassEvidence> {
        let calibration = self.calibration.as_ref();
        let rules = calibration.and_then(|one| RuleSet::built_in(&one.model.rules));
        let guessed = || RuleSet::guess(reports.iter().map(String::as_str));
        of_reports(&rules.unwrap_or_else(guessed), reports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::{
        finding_basis::FindingFiles,
        types::{ImageSize, ImageUrl},
    };

    fn message(role: &str, content: ChatContent) -> ChatMessage {
        ChatMessage {
            role: role.into(),
            content: Some(content),
            ..ChatMessage::default()
        }
    }

    fn image() -> ChatPart {
        ChatPart::ImageUrl {
            image_url: ImageUrl {
                url: String::new(),
                size: ImageSize::default(),
            },
        }
    }

    fn words(text: &str) -> ChatPart {
        let text = text.to_owned();
        ChatPart::Text { text }
    }

    #[test]
    fn one_question_after_its_images_is_what_calibrations_are_made_with() {
        let user = |parts| message("user", ChatContent::Parts(parts));
        let asked = user(vec![image(), image(), words("?")]);
        assert_eq!(
            question_of(std::slice::from_ref(&asked)),
            Some((None, "?".into()))
        );
        let system = message("system", ChatContent::Text("!".into()));
        assert_eq!(
            question_of(&[system.clone(), asked.clone()]),
            Some((Some("!".into()), "?".into()))
        );
        for other in [
            vec![user(vec![words("?"), image()])],
            vec![user(vec![image(), words("a"), words("b")])],
            vec![message("user", ChatContent::Text("?".into()))],
            vec![
                asked.clone(),
                message("assistant", ChatContent::Text("a".into())),
                asked,
            ],
            vec![system],
            Vec::new(),
        ] {
            assert_eq!(question_of(&other), None);
        }
    }

    #[test]
    fn uncalibrated_probabilities_say_why_and_decide_nothing() {
        let basis = FindingBasis::find(&FindingFiles::default(), None).unwrap();
        let FindingBasis::Uncalibrated(why) = basis else {
            panic!("calibrated by nothing");
        };
        let asked = AskedFindings {
            calibration: None,
            why: Some(why),
        };
        let (object, remarks) = asked.told(
            FoundFindings::Reports(vec!["右侧气胸。".to_owned(); 16]),
            "右侧气胸。",
        );
        assert_eq!(object["calibrated"], false);
        assert_eq!(object["classes"].as_object().unwrap().len(), 20);
        let one = &object["classes"]["pneumothorax"];
        assert_eq!(one["chinese"], "气胸");
        assert_eq!(
            (&one["decision"], &one["in_report"]),
            (&json!("undecided"), &json!("present"))
        );
        assert_eq!(one["probability"], 0.970588, "16.5 of 17");
        assert_eq!(remarks.len(), 1);
        assert_eq!(remarks[0]["code"], UNCALIBRATED);
    }
}
