//! Fields about how an answer is written, which all kinds of request have.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Reader, rules::STREAM_RULES};
use crate::serve::{
    error::ApiError,
    fields::{Fields, texts_of, wrong_kind},
    types::GenerationFields,
};

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    match fields.value("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![text]),
        Some(other) => {
            texts_of(other).map_err(|other| wrong_kind("stop", &other, "a text or a list of texts"))
        }
    }
}

fn logit_bias(fields: &mut Fields) -> Result<Option<BTreeMap<String, f32>>, ApiError> {
    let expected = "an object of numbers by token id";
    let Some(value) = fields.value("logit_bias") else {
        return Ok(None);
    };
    let numbers = value.as_object().and_then(|object| {
        let number = |(id, value): (&String, &Value)| Some((id.clone(), value.as_f64()? as f32));
        object.iter().map(number).collect()
    });
    match numbers {
        Some(numbers) => Ok(Some(numbers)),
        None => Err(wrong_kind("logit_bias", &value, expected)),
    }
}

/// `best_of`, which has to be `n`.
fn check_best_of(fields: &mut Fields, n: Option<usize>) -> Result<(), ApiError> {
    match fields.count("best_of")? {
        Some(best_of) if best_of != n.unwrap_or(1) => Err(ApiError::invalid(
            "best_of",
            format!(
                "`best_of` is {best_of} and `n` is {}; all answers are sent, so both have to be equal",
                n.unwrap_or(1)
            ),
        )),
        _ => Ok(()),
    }
}

impl Reader {
    /// Takes the fields that chat requests and completions share; not `logprobs`, which differs.
    pub(super) fn generation(&mut self, fields: &mut Fields) -> Result<GenerationFields, ApiError> {
        let n = fields.count("n")?;
        check_best_of(fields, n)?;
        let flag = |fields: &mut Fields, name| Ok::<_, ApiError>(fields.flag(name)? == Some(true));
        let mut generation = GenerationFields {
            max_tokens: fields.count("max_tokens")?,
            max_completion_tokens: fields.count("max_completion_tokens")?,
            min_tokens: fields.count("min_tokens")?,
            top_k: fields.integer("top_k")?,
            min_p: fields.number("min_p")?,
            repetition_penalty: fields.number("repetition_penalty")?,
            frequency_penalty: fields.number("frequency_penalty")?,
            presence_penalty: fields.number("presence_penalty")?,
            logit_bias: logit_bias(fields)?,
            allowed_token_ids: fields.ids("allowed_token_ids")?,
            bad_words: fields.texts("bad_words")?.unwrap_or_default(),
            seed: fields.integer("seed")?,
            n,
            stop: stop(fields)?,
            stop_token_ids: fields.ids("stop_token_ids")?.unwrap_or_default(),
            include_stop_str_in_output: flag(fields, "include_stop_str_in_output")?,
            keep_special_tokens: fields.flag("skip_special_tokens")? == Some(false),
            prompt_logprobs: fields.count("prompt_logprobs")?,
            return_tokens_as_token_ids: flag(fields, "return_tokens_as_token_ids")?,
            form: self.form(fields)?,
            ignore_eos: fields.flag("ignore_eos")?,
            ..GenerationFields::default()
        };
        if let Some(mut options) = fields.object("stream_options")? {
            generation.include_usage = flag(&mut options, "include_usage")?;
            generation.continuous_usage_stats = flag(&mut options, "continuous_usage_stats")?;
            self.finish(options, STREAM_RULES)?;
        }
        Self::sampling(fields, &mut generation)?;
        Ok(generation)
    }

    /// OpenAI's `prediction`: the text that the answer is expected to be.
    pub(super) fn prediction(&mut self, fields: &mut Fields) -> Result<Option<String>, ApiError> {
        let Some(mut prediction) = fields.object("prediction")? else {
            return Ok(None);
        };
        let kind = prediction.text("type")?;
        let name = prediction.name("type");
        if prediction.needed("type", kind.as_deref())? != "content" {
            return Err(ApiError::invalid(
                &name,
                format!("`{name}` is another than `content`, the only kind there is"),
            ));
        }
        let name = prediction.name("content");
        let content = prediction.value("content");
        let text = match prediction.needed("content", content)? {
            Value::String(text) => text,
            Value::Array(parts) => {
                let mut all = String::new();
                for (place, part) in parts.into_iter().enumerate() {
                    let mut part = Fields::of(part, &format!("{name}[{place}]"))?;
                    let kind = part.text("type")?;
                    if kind.is_some_and(|kind| kind != "text") {
                        let name = part.name("type");
                        let reason = format!("`{name}` is another than `text`");
                        return Err(ApiError::invalid(&name, reason));
                    }
                    let text = part.text("text")?;
                    all.push_str(&part.needed("text", text)?);
                    self.finish(part, &[])?;
                }
                all
            }
            other => return Err(wrong_kind(&name, &other, "a text or a list of texts")),
        };
        self.finish(prediction, &[])?;
        Ok(Some(text))
    }

    /// Takes the fields that all kinds of request share.
    pub(super) fn sampling(
        fields: &mut Fields,
        generation: &mut GenerationFields,
    ) -> Result<(), ApiError> {
        generation.temperature = fields.number("temperature")?;
        generation.top_p = fields.number("top_p")?;
        generation.stream = fields.flag("stream")?;
        Ok(())
    }

    /// `truncate_prompt_tokens`: the number of tokens that are kept, if not all.
    pub(super) fn truncate(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
        let name = "truncate_prompt_tokens";
        match fields.integer(name)? {
            None => Ok(None),
            // As vLLM writes "what the model takes"; a longer prompt is an error in any case here.
            Some(-1) => Ok(None),
            Some(count) => usize::try_from(count)
                .ok()
                .filter(|count| *count > 0)
                .map(Some)
                .ok_or_else(|| {
                    ApiError::invalid(
                        name,
                        format!("`{name}` is {count}, expected -1 or at least 1"),
                    )
                }),
        }
    }
}
