//! `infer --server`: reports from a server in place of a model of our own.

use std::{
    io::{Write, stdout},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::{StreamExt, stream};
use http_body_util::BodyExt;
use hyper::header;
use serde_json::{Value, json};

use super::{
    infer::{
        args::InferArgs,
        output::RecordFile,
        record::{Record, RecordRemark, RemarkPrinter},
        task::Task,
    },
    progress::{Progress, Unit},
};
use crate::{
    base::files::{expect_file, sha256_bytes},
    processor::{
        image::{DecodeLimits, probe, read_bytes},
        message::{Content, Message, Part, Role},
        sample::PixelLimits,
    },
    runtime::generate::{FinishReason, GenerationConfig},
    serve::client::{EventLines, Server},
};

/// Longest wait between two tries at a busy server.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Tries at a server that is busy.
const MAX_TRIES: u32 = 60;

/// The server cannot answer now; it may later.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unreachable(String);

struct Remote<'a> {
    server: Server,
    args: &'a InferArgs,
    settings: &'a GenerationConfig,
    /// What the server says of how it read the model.
    about_model: Vec<String>,
}

/// Sends all images to the server at `address`, `--batch-size` requests at a time.
///
/// # Errors
/// As `infer` without a server. A server that cannot be reached, stops or stays full ends the run: what
/// was not answered has no record, and the next run sends it again.
pub(super) fn run(
    address: &str,
    args: &InferArgs,
    settings: &GenerationConfig,
    tasks: &[Task],
) -> Result<()> {
    let mut output = RecordFile::open(args, tasks)?;
    let todo = output.todo(tasks);
    if let Some(note) = todo.note {
        eprintln!("{note}");
    }
    let todo = todo.tasks;
    let mut remote = Remote {
        server: Server::new(address, args.api_key.clone())?,
        args,
        settings,
        about_model: Vec::new(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let total = todo.len() as u64;
    let mut progress =
        (total > 1 || args.output.is_some()).then(|| Progress::new("reports", total, Unit::Items));
    runtime.block_on(async {
        if !todo.is_empty() {
            remote.about_model = remote.model_remarks().await;
            remote
                .about_model
                .iter()
                .for_each(|remark| eprintln!("{remark}"));
        }
        let remote = &remote;
        // In order, with as many under way as the batch is large.
        let mut answers = stream::iter(&todo)
            .map(|task| remote.record(task))
            .buffered(args.batch_size);
        let remarks = RemarkPrinter::default();
        let mut done = 0;
        while let Some(record) = answers.next().await {
            let task = todo[done as usize];
            let record = record.with_context(|| {
                let goes_on = match &args.output {
                    Some(_) => "; start it again to go on from there",
                    None => "",
                };
                format!("{done} of {total} reports were written{goes_on}")
            })?;
            remarks.print(&record);
            output.add(task, &record, args)?;
            done += 1;
            if let Some(progress) = &mut progress {
                progress.set(done, total);
            }
        }
        anyhow::Ok(())
    })?;
    if let Some(progress) = progress {
        progress.finish();
    }
    output.finish()
}

impl Remote<'_> {
    /// The report about some images; what is wrong with them becomes a record with its error, what is
    /// wrong with the server an error.
    async fn record(&self, task: &Task) -> Result<Record> {
        let started = Instant::now();
        let mut record = Record::new(self.args, task);
        // A row that is no question.
        if record.error.is_some() {
            return Ok(record);
        }
        let about_model = self.about_model.iter();
        record
            .remarks
            .extend(about_model.map(|remark| RecordRemark::of_model(remark)));
        let answer = match self.body(task, &mut record) {
            Ok((body, sha256)) => {
                record.image_sha256 = Some(sha256);
                self.answer(body).await
            }
            Err(error) => Err(error),
        };
        match answer {
            Ok(answer) => fill(&mut record, &answer, task),
            Err(error) if error.is::<Unreachable>() => return Err(error),
            Err(error) => record.error = Some(format!("{}: {error:#}", record.label())),
        }
        record.set_seconds(started.elapsed().as_secs_f64());
        Ok(record)
    }

    /// What `/v1/models` says of how the model was read; nothing where a server says none of it.
    async fn model_remarks(&self) -> Vec<String> {
        let listed = async {
            let mut connection = self.server.connect().await.ok()?;
            let request = self.server.request("/v1/models", None).ok()?;
            let response = connection.send(request).await.ok()?;
            let body = response.into_body().collect().await.ok()?.to_bytes();
            serde_json::from_slice::<Value>(&body).ok()
        };
        let Some(models) = listed.await else {
            return Vec::new();
        };
        let wanted = self.args.server_model.as_deref();
        let mut models = models["data"].as_array().into_iter().flatten();
        // The base is the first one.
        let model = models.find(|model| wanted.is_none_or(|name| model["id"] == name));
        let remarks = model.and_then(|model| model["remarks"].as_array());
        let texts = remarks.into_iter().flatten().filter_map(Value::as_str);
        texts.map(str::to_owned).collect()
    }

    /// The request, and the hash of its images as a record has it.
    fn body(&self, task: &Task, record: &mut Record) -> Result<(Vec<u8>, String)> {
        let mut images = Vec::new();
        let (mut hashes, mut sizes) = (Vec::new(), Vec::new());
        let question = task.question();
        for path in &task.images {
            expect_file(path)?;
            let limits = DecodeLimits::default();
            let bytes = read_bytes(path, &limits)?;
            hashes.push(sha256_bytes(&bytes));
            if question.is_some_and(|question| question.sample.has_boxes()) {
                sizes.push(probe(path, &limits)?);
            }
            // The server goes by the content.
            let url = format!(
                "data:application/octet-stream;base64,{}",
                STANDARD.encode(bytes)
            );
            images.push(json!({"type": "image_url", "image_url": {"url": url}}));
        }
        let system = self.args.system.as_deref();
        let messages = match question {
            Some(question) => record.ask(question.asked(system, &sizes)?),
            None => {
                let system = system.map(|text| Message::text(Role::System, text));
                let asked = Message::question(images.len(), self.args.prompt());
                system.into_iter().chain([asked]).collect()
            }
        };
        let messages = in_json(&messages, images);
        let sampling = &self.settings.sampling;
        let mut body = json!({
            "messages": messages,
            "max_completion_tokens": self.settings.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed as i64,
            "stop": self.args.generation.stop,
            "stream": self.args.stream,
        });
        if self.args.stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        if let Some(model) = &self.args.server_model {
            body["model"] = model.as_str().into();
        }
        if let Some(question) = question {
            let PixelLimits {
                min_pixels,
                max_pixels,
            } = question.sample.limits;
            for (key, limit) in [("min_pixels", min_pixels), ("max_pixels", max_pixels)] {
                if let Some(limit) = limit {
                    body["mm_processor_kwargs"][key] = limit.into();
                }
            }
        }
        Ok((serde_json::to_vec(&body)?, hashes.join(";")))
    }

    async fn answer(&self, body: Vec<u8>) -> Result<Value> {
        let mut tries = 0;
        loop {
            tries += 1;
            let connected = self.server.connect().await;
            let mut connection = connected.map_err(|error| Unreachable(error.to_string()))?;
            let request = self
                .server
                .request("/v1/chat/completions", Some(body.clone()))?;
            let sent = connection.send(request).await;
            let response = sent.map_err(|error| Unreachable(error.to_string()))?;
            let status = response.status();
            if self.args.stream && status.is_success() {
                return show(response.into_body()).await;
            }
            let pause = response
                .headers()
                .get(header::RETRY_AFTER)
                .and_then(|value| value.to_str().ok()?.parse().ok())
                .map_or(Duration::from_secs(1), Duration::from_secs)
                .min(LONGEST_PAUSE);
            let body_came = response.into_body().collect().await;
            let bytes = body_came
                .map_err(|error| Unreachable(error.to_string()))?
                .to_bytes();
            // Full, stopping, or not reached by its proxy: no other image would fare better.
            if [429, 502, 503].contains(&status.as_u16()) {
                if tries < MAX_TRIES && status == 429 {
                    tokio::time::sleep(pause).await;
                    continue;
                }
                let reason = String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).into_owned();
                bail!(Unreachable(format!(
                    "status {} from the server: {reason}",
                    status.as_u16()
                )));
            }
            let answer: Value = serde_json::from_slice(&bytes).with_context(|| {
                format!("status {status}, and no JSON with it; is this the server's address?")
            })?;
            if !status.is_success() {
                let message = answer["error"]["message"]
                    .as_str()
                    .unwrap_or("no reason given");
                bail!(
                    "the server answered: {message} (status {})",
                    status.as_u16()
                );
            }
            return Ok(answer);
        }
    }
}

/// Messages in the form of OpenAI's interface, `images` in their places.
fn in_json(messages: &[Message], images: Vec<Value>) -> Vec<Value> {
    let mut images = images.into_iter();
    let mut part = |part: &Part| match part {
        Part::Image => images.next().unwrap_or_default(),
        Part::Text { text } => json!({"type": "text", "text": text}),
    };
    let mut message = |message: &Message| {
        let content = match &message.content {
            Content::Text(text) => json!(text),
            Content::Parts(parts) => parts.iter().map(&mut part).collect(),
        };
        json!({"role": message.role, "content": content})
    };
    messages.iter().map(&mut message).collect()
}

/// Prints a stream as it comes; gives what a whole answer would have held.
async fn show(mut body: hyper::body::Incoming) -> Result<Value> {
    let mut lines = EventLines::default();
    let (mut content, mut reasoning) = (String::new(), String::new());
    let mut choice = json!({});
    let (mut usage, mut remarks) = (Value::Null, Value::Null);
    while let Some(frame) = body.frame().await {
        let frame = frame?;
        let Some(bytes) = frame.data_ref() else {
            continue;
        };
        for data in lines.push(bytes) {
            if data == "[DONE]" {
                writeln!(stdout())?;
                choice["message"] = json!({"content": content, "reasoning_content": reasoning});
                return Ok(json!({"choices": [choice], "usage": usage, "remarks": remarks}));
            }
            let chunk: Value = serde_json::from_str(&data)?;
            if let Some(error) = chunk.get("error") {
                bail!(
                    "the server answered: {}",
                    error["message"].as_str().unwrap_or_default()
                );
            }
            if chunk["usage"].is_object() {
                usage = chunk["usage"].clone();
            }
            if chunk["remarks"].is_array() {
                remarks = chunk["remarks"].clone();
            }
            let part = &chunk["choices"][0];
            if let Some(text) = part["delta"]["content"].as_str() {
                write!(stdout(), "{text}")?;
                stdout().flush()?;
                content.push_str(text);
            }
            if let Some(text) = part["delta"]["reasoning_content"].as_str() {
                reasoning.push_str(text);
            }
            if part["finish_reason"].is_string() {
                choice = part.clone();
            }
        }
    }
    bail!("the stream was cut off")
}

/// The remarks of an answer, `{"code", "text", "image"}` each; `image` counts from 1.
fn remarks(answer: &Value, task: &Task) -> Vec<RecordRemark> {
    let text = |remark: &Value, key: &str| Some(remark[key].as_str()?.to_owned());
    let remark = |remark: &Value| {
        let images = task.images.len();
        let number = remark["image"].as_u64().filter(|_| images > 1);
        let index = number.and_then(|number| (number as usize).checked_sub(1));
        Some(RecordRemark {
            code: text(remark, "code")?,
            text: text(remark, "text")?,
            image: index
                .filter(|index| *index < images)
                .map(|index| task.image_name(index)),
        })
    };
    let list = answer["remarks"].as_array();
    list.map_or_else(Vec::new, |list| list.iter().filter_map(remark).collect())
}

fn fill(record: &mut Record, answer: &Value, task: &Task) {
    let choice = &answer["choices"][0];
    let text = |key: &str| {
        choice["message"][key]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let tokens = |key: &str| answer["usage"][key].as_u64().unwrap_or(0) as usize;
    record.report = text("content");
    record.thinking = Some(text("reasoning_content")).filter(|thinking| !thinking.is_empty());
    record.finish_reason = match (
        choice["finish_reason"].as_str(),
        choice["stop_reason"].as_str(),
    ) {
        (_, Some("repetition")) => Some(FinishReason::Repetition),
        (Some("length"), _) => Some(FinishReason::Length),
        (Some(_), _) => Some(FinishReason::Stop),
        _ => None,
    };
    record.remarks.extend(remarks(answer, task));
    record.prompt_tokens = tokens("prompt_tokens");
    record.completion_tokens = tokens("completion_tokens");
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn remarks_of_a_server_name_the_image_where_there_are_several() {
        let answer = json!({"remarks": [
            {"image": 2, "code": "not_a_chest", "text": "its body part is HAND"},
            {"image": null, "code": "no_image", "text": "there is no image"},
        ]});
        let task = |names: &[&str]| Task::about(names.iter().map(PathBuf::from).collect());
        let found = remarks(&answer, &task(&["a.dcm", "b.dcm"]));
        assert_eq!(found[0].image.as_deref(), Some("b.dcm"));
        assert_eq!(
            (found[1].code.as_str(), &found[1].image),
            ("no_image", &None)
        );
        assert_eq!(remarks(&answer, &task(&["b.dcm"]))[0].image, None);
        assert_eq!(remarks(&json!({}), &task(&["b.dcm"])), []);
    }
}
