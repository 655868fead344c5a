//! `infer`: reports about images, one by one, together, or as a batch run that can be resumed.

use crate::kernels::Kernels;
use std::{
    collections::HashSet,
    fs,
    io::{Write, stdout},
    path::{Path, PathBuf},
    sync::Mutex,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use serde::{Deserialize, Serialize};

use super::{
    UsageError, generation_config, pipeline_options,
    progress::{Progress, Unit, prepare_kernels},
    shipped,
};
use crate::{
    backend::{Replicas, ReplicatedTask, run_on_all},
    cli::InferArgs,
    generate::{FinishReason, GenerationConfig, Prompt, Timing},
    lora::base::check_base,
    pipeline::{Answer, Pipeline},
    processor::{image::Reading, message::split_thinking, remark::Remark},
    quant::cache::CacheFormat,
    qwen3_vl::ImageInput,
    spread::in_order,
    system::MemoryWatch,
};

/// How every record begins.
const RECORD_START: &str = "{\"image\":\"";

/// The image of a run without arguments.
const SAMPLE_IMAGE: &str = "data/sample/demo.png";

/// One line of a batch run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The image as it was named; several with `--together`, separated by `;`.
    pub image: String,
    /// The question.
    pub prompt: String,
    /// Tells apart runs whose answers may differ: a hash of model, adapter and generation settings.
    #[serde(default)]
    pub settings: String,
    /// The report; empty when there is an error.
    #[serde(default)]
    pub report: String,
    /// The reasoning before it, for models that think.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub thinking: Option<String>,
    /// Why it ended.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub finish_reason: Option<FinishReason>,
    /// Tokens of the prompt, image included.
    #[serde(default)]
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    #[serde(default)]
    pub completion_tokens: usize,
    /// Seconds from reading the image to the last token, shared evenly by a batch.
    #[serde(default)]
    pub seconds: f64,
    /// Why there is no report.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// Runs `infer`.
///
/// # Errors
/// Anything that kept a report from being written; images that failed in a batch run are counted.
pub fn run(args: InferArgs) -> Result<()> {
    let settings = generation_config(&args.generation)?;
    if args.batch_size == 0 {
        bail!(UsageError("--batch-size is 0, expected at least 1".into()));
    }
    if args.stream && args.batch_size > 1 {
        bail!(UsageError(
            "--stream shows one report as it grows; leave out --batch-size".into()
        ));
    }
    let devices = args.model.device.clone();
    if devices.len() > 1 && (args.stream || args.server.is_some()) {
        bail!(UsageError(
            "several devices are for batch runs with a model; leave out --stream and --server, or name one --device".into()
        ));
    }
    let images = list_images(&args)?;
    if args.show_tags {
        return super::tags::show(images.iter().flatten(), args.json);
    }
    if let Some(address) = &args.server {
        if args.frame.is_some() {
            bail!(UsageError(
                "--frame is not sent to a server; give it files of one frame".into()
            ));
        }
        let model = &args.model;
        let unsent = [
            ("--adapter", model.adapter.is_some()),
            ("--any-base", model.any_base),
            ("--dtype", model.dtype.is_some()),
            ("--quantize", model.quantize.is_some()),
            ("--min-pixels", model.min_pixels.is_some()),
            ("--max-pixels", model.max_pixels.is_some()),
            ("--kv-cache", args.generation.kv_cache != CacheFormat::Float),
        ];
        if let Some((option, _)) = unsent.iter().find(|(_, given)| *given) {
            bail!(UsageError(format!(
                "{option} is the server's to decide; give it to `serve`, or name a model of the server with --server-model"
            )));
        }
        return super::infer_server::run(address, &args, &settings, &images);
    }
    let dtype = args.model.dtype.map(DType::from);
    run_on_all(
        &devices,
        dtype,
        Infer {
            args,
            settings,
            images,
            remarked: Mutex::default(),
        },
    )?
}

/// The images of each report.
fn list_images(args: &InferArgs) -> Result<Vec<Vec<PathBuf>>> {
    let mut images = args.images.clone();
    if let Some(dir) = &args.images_dir {
        let entries = fs::read_dir(dir)
            .with_context(|| format!("cannot read the folder `{}`", dir.display()))?;
        for entry in entries {
            let path = entry?.path();
            let known = path
                .extension()
                .and_then(|extension| extension.to_str())
                .is_some_and(|extension| {
                    [
                        "png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "dcm", "dicom",
                    ]
                    .contains(&extension.to_lowercase().as_str())
                });
            if known && path.is_file() {
                images.push(path);
            }
        }
        images.sort();
        if images.is_empty() {
            bail!(
                "`{}` holds no image; expected files ending in png, jpg, webp, bmp, tiff or dcm",
                dir.display()
            );
        }
    }
    if images.is_empty() {
        images.push(shipped(Path::new(SAMPLE_IMAGE)));
    }
    Ok(if args.together {
        vec![images]
    } else {
        images.into_iter().map(|image| vec![image]).collect()
    })
}

struct Infer {
    args: InferArgs,
    settings: GenerationConfig,
    images: Vec<Vec<PathBuf>>,
    /// Remarks on images that are said once a run, and were.
    remarked: Mutex<HashSet<Remark>>,
}

impl ReplicatedTask for Infer {
    type Output = Result<()>;

    fn run<B: Kernels>(self, replicas: Replicas<B>) -> Result<()> {
        let Replicas { mut devices, dtype } = replicas;
        let mut run = OutputFile::open(self.args.output.as_deref(), &self.args)?;
        let todo: Vec<&Vec<PathBuf>> = self
            .images
            .iter()
            .filter(|images| !run.has(&name_of(images)))
            .collect();
        if todo.is_empty() {
            eprintln!("all {} reports are there already", self.images.len());
            return run.result();
        }
        if todo.len() < self.images.len() {
            eprintln!(
                "going on: {} of {} reports are there already",
                self.images.len() - todo.len(),
                self.images.len()
            );
        }
        let started = Instant::now();
        let groups: Vec<&[&Vec<PathBuf>]> = todo.chunks(self.args.batch_size).collect();
        devices.truncate(groups.len());
        let options = pipeline_options(&self.args.model, dtype);
        if let Some(adapter) = options
            .adapter
            .as_ref()
            .filter(|_| !self.args.model.any_base)
        {
            check_base(adapter, &options.model)?;
        }
        let mut progress = Progress::new("loading", 0, Unit::Bytes);
        let mut pipelines = Pipeline::<B>::load_on(&options, &devices, &mut |done, total| {
            progress.set(done, total);
        })?;
        progress.finish();
        for device in &devices {
            let config = &pipelines[0].parts.config;
            prepare_kernels::<B>(config, dtype, device, self.args.batch_size);
            let _ = B::sync(device);
        }
        if self.args.verbose {
            eprintln!("load     {:8.2} s", started.elapsed().as_secs_f64());
        }
        let mut progress = (todo.len() > 1 || self.args.output.is_some())
            .then(|| Progress::new("reports", todo.len() as u64, Unit::Items));
        let mut done = 0;
        let memory = Mutex::new(MemoryWatch::default());
        in_order(
            &mut pipelines,
            &groups,
            |pipeline, group| {
                let records = self.answer_group(pipeline, group);
                if self.args.verbose
                    && let Ok(mut memory) = memory.lock()
                {
                    memory.note(B::memory_in_use(&pipeline.device));
                }
                records
            },
            |_, records| {
                done += records.len();
                for record in records {
                    run.add(&record, &self.args)?;
                }
                if let Some(progress) = &mut progress {
                    progress.set(done as u64, todo.len() as u64);
                }
                anyhow::Ok(())
            },
        )?;
        if let Some(progress) = progress {
            progress.finish();
        }
        if self.args.verbose
            && let Ok(memory) = memory.into_inner()
            && let Some(peak) = memory.peak()
        {
            eprintln!(
                "memory   {:8.2} GiB at most on the {}",
                peak.gib(),
                peak.place()
            );
        }
        run.result()
    }
}

/// What decides an answer besides image and question.
fn settings_hash(args: &InferArgs) -> String {
    use sha2::{Digest, Sha256};
    let (model, generation) = (&args.model, &args.generation);
    let mut text = format!(
        "{:?} {:?} {:?} {:?} {:?} {:?} {generation:?}",
        model.model, model.adapter, model.dtype, model.min_pixels, model.max_pixels, args.system
    );
    if let Some(quantization) = model.quantize {
        text.push_str(&format!(" {quantization}"));
    }
    if let Some(server) = &args.server {
        text = format!("{text} {server:?} {:?}", args.server_model);
    }
    if let Some(frame) = args.frame {
        text.push_str(&format!(" frame {frame}"));
    }
    let hash = Sha256::digest(text.as_bytes());
    hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn name_of(images: &[PathBuf]) -> String {
    let names: Vec<String> = images
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    names.join(";")
}

/// A record without an answer.
pub(super) fn empty_record(args: &InferArgs, images: &[PathBuf]) -> Record {
    Record {
        image: name_of(images),
        prompt: args.prompt.clone(),
        settings: settings_hash(args),
        report: String::new(),
        thinking: None,
        finish_reason: None,
        prompt_tokens: 0,
        completion_tokens: 0,
        seconds: 0.0,
        error: None,
    }
}

impl Infer {
    /// Prints doubts about an image to stderr.
    fn tell(&self, path: &Path, remarks: Vec<Remark>) {
        let Ok(mut remarked) = self.remarked.lock() else {
            return;
        };
        for remark in remarks {
            if !remark.is_said_once() {
                eprintln!("`{}`: {remark}", path.display());
            } else if remarked.insert(remark.clone()) {
                eprintln!("`{}`: {remark} (said once)", path.display());
            }
        }
    }

    fn prompt<B: Kernels>(&self, pipeline: &Pipeline<B>, images: &[PathBuf]) -> Result<Prompt> {
        let mut input = ImageInput::default();
        for path in images {
            let frame = self.args.frame.map(|frame| frame as usize);
            let Reading { picture, remarks } = pipeline.parts.images.read(path, frame)?;
            self.tell(path, remarks);
            let patches = pipeline
                .parts
                .image_input(&picture)
                .with_context(|| format!("`{}`", path.display()))?;
            input.extend(&patches);
        }
        let system = self.args.system.as_deref();
        Ok(pipeline.parts.prompt(system, &self.args.prompt, input)?)
    }

    /// Reports of one batch; what fails becomes a record with its error.
    fn answer_group<B: Kernels>(
        &self,
        pipeline: &Pipeline<B>,
        group: &[&Vec<PathBuf>],
    ) -> Vec<Record> {
        let started = Instant::now();
        let mut records: Vec<Record> = group
            .iter()
            .map(|images| empty_record(&self.args, images))
            .collect();
        let mut prompts = Vec::new();
        let mut rows = Vec::new();
        for (index, images) in group.iter().enumerate() {
            match self.prompt(pipeline, images) {
                Ok(prompt) => {
                    prompts.push(prompt);
                    rows.push(index);
                }
                Err(error) => records[index].error = Some(format!("{error:#}")),
            }
        }
        if prompts.is_empty() {
            return records;
        }
        let prepared = started.elapsed().as_secs_f64();
        let mut shown = Shown::new(pipeline.parts.template.opens_thinking());
        let answers = pipeline.answer(
            &prompts,
            &self.settings,
            &self.args.generation.stop,
            &mut |_, piece| {
                if self.args.stream {
                    shown.push(piece);
                }
            },
        );
        let seconds = started.elapsed().as_secs_f64() / prompts.len() as f64;
        match answers {
            Ok((answers, timing)) => {
                if self.args.stream {
                    shown.end();
                }
                for (row, answer) in rows.into_iter().zip(answers) {
                    fill(&mut records[row], answer, seconds);
                }
                if self.args.verbose {
                    tell_timing(prepared, &timing);
                }
            }
            // One prompt that cannot be answered must not take the others with it.
            Err(_) if rows.len() > 1 => {
                for row in rows {
                    let alone = self.answer_group(pipeline, &group[row..=row]);
                    records.splice(row..=row, alone);
                }
            }
            Err(error) => {
                for row in rows {
                    records[row].error = Some(format!("`{}`: {error}", records[row].image));
                }
            }
        }
        records
    }
}

fn fill(record: &mut Record, answer: Answer, seconds: f64) {
    record.report = answer.report;
    record.thinking = answer.thinking;
    record.finish_reason = Some(answer.finish_reason);
    record.prompt_tokens = answer.prompt_tokens;
    record.completion_tokens = answer.completion_tokens;
    record.seconds = (seconds * 1e4).round() / 1e4;
}

fn tell_timing(prepared: f64, timing: &Timing) {
    let rate = |tokens: usize, seconds: f64| tokens as f64 / seconds.max(1e-9);
    eprintln!("images   {prepared:8.3} s");
    eprintln!("vision   {:8.3} s", timing.vision_seconds);
    eprintln!(
        "prefill  {:8.3} s, {} tokens, {:.0} tokens/s",
        timing.prefill_seconds,
        timing.prompt_tokens,
        rate(timing.prompt_tokens, timing.prefill_seconds)
    );
    eprintln!(
        "decode   {:8.3} s, {} tokens, {:.1} tokens/s",
        timing.decode_seconds,
        timing.decoded_tokens,
        rate(timing.decoded_tokens, timing.decode_seconds)
    );
}

/// The report as it grows: reasoning is kept back, the answer goes to stdout.
struct Shown {
    starts_inside: bool,
    text: String,
    printed: String,
}

impl Shown {
    fn new(starts_inside: bool) -> Self {
        Self {
            starts_inside,
            text: String::new(),
            printed: String::new(),
        }
    }

    fn push(&mut self, piece: &str) {
        self.text.push_str(piece);
        // What may still become an opening mark is not an answer yet.
        if "<think>".starts_with(self.text.trim_start()) {
            return;
        }
        let (_, answer) = split_thinking(&self.text, self.starts_inside);
        if !answer.starts_with(&self.printed) {
            // A closing mark came where no block was open: what was shown was reasoning.
            let _ = writeln!(stdout());
            self.printed.clear();
        }
        let _ = write!(stdout(), "{}", &answer[self.printed.len()..]);
        let _ = stdout().flush();
        self.printed = answer;
    }

    fn end(&mut self) {
        let _ = writeln!(stdout());
    }
}

/// Prints one line to stdout; a reader that has gone away is an error like any other.
fn say(line: &str) -> Result<()> {
    writeln!(stdout(), "{line}").context("cannot write to stdout")
}

/// Where records go, and what is there already.
pub(super) struct OutputFile {
    file: Option<(PathBuf, fs::File)>,
    there: HashSet<String>,
    failed: usize,
    first_error: Option<String>,
}

impl OutputFile {
    /// Opens the file of a batch run; a last line that was cut off is taken away.
    pub(super) fn open(path: Option<&Path>, args: &InferArgs) -> Result<Self> {
        let (prompt, settings) = (&args.prompt, settings_hash(args));
        let mut this = Self {
            file: None,
            there: HashSet::new(),
            failed: 0,
            first_error: None,
        };
        let Some(path) = path else {
            return Ok(this);
        };
        let context = || format!("cannot write `{}`", path.display());
        let mut file = fs::OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(path)
            .with_context(context)?;
        // The system's lock: it ends with the process, however that ends.
        if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
            bail!(
                "`{}` is being written by another run; wait for it, or name another file with --output",
                path.display()
            );
        }
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut bytes)
            .with_context(|| format!("cannot read `{}`", path.display()))?;
        // A record that was cut off is taken away; anything else at the end is not ours to touch.
        let whole = bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        let (rest, start) = (&bytes[whole..], RECORD_START.as_bytes());
        if !rest.starts_with(start) && !start.starts_with(rest) {
            bail!(
                "`{}`, last line: not a record of a batch run; name another file with --output",
                path.display()
            );
        }
        let text = std::str::from_utf8(&bytes[..whole]).with_context(|| {
            format!(
                "`{}` is not text; name another file with --output",
                path.display()
            )
        })?;
        for (row, line) in text.lines().enumerate() {
            let record: Record = serde_json::from_str(line).with_context(|| {
                format!(
                    "`{}`, line {}: not a record of a batch run; name another file with --output",
                    path.display(),
                    row + 1
                )
            })?;
            if record.prompt == *prompt && record.settings == settings {
                if record.error.is_some() {
                    this.note_error(&record);
                }
                this.there.insert(record.image);
            }
        }
        file.set_len(whole as u64).with_context(context)?;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).with_context(context)?;
        this.file = Some((path.to_path_buf(), file));
        Ok(this)
    }

    pub(super) fn has(&self, image: &str) -> bool {
        self.there.contains(image)
    }

    fn note_error(&mut self, record: &Record) {
        self.failed += 1;
        if let Some(error) = &record.error {
            self.first_error.get_or_insert_with(|| error.clone());
        }
    }

    /// Writes one record at once, so that an interruption loses nothing that was finished.
    pub(super) fn add(&mut self, record: &Record, args: &InferArgs) -> Result<()> {
        if record.error.is_some() {
            self.note_error(record);
        }
        if let Some((path, file)) = &mut self.file {
            let mut line = serde_json::to_string(record)?;
            line.push('\n');
            file.write_all(line.as_bytes())
                .with_context(|| format!("cannot write `{}`", path.display()))?;
        } else if args.json {
            say(&serde_json::to_string(record)?)?;
        } else if record.error.is_none() && !args.stream {
            say(&record.report)?;
        } else if let Some(error) = &record.error
            && self.failed > 1
        {
            // The first one ends the program; the others would be lost.
            eprintln!("{error}");
        }
        if self.file.is_none()
            && !args.json
            && args.verbose
            && let Some(thinking) = &record.thinking
        {
            eprintln!("thinking {thinking}");
        }
        match record.finish_reason {
            Some(FinishReason::Repetition) => eprintln!(
                "`{}`: ended because the text went round in circles",
                record.image
            ),
            Some(FinishReason::Length) => eprintln!(
                "`{}`: ended after {} tokens; --max-new-tokens allows more",
                record.image, record.completion_tokens
            ),
            _ => {}
        }
        Ok(())
    }

    pub(super) fn result(&self) -> Result<()> {
        match (&self.first_error, self.failed) {
            (Some(error), 1) => bail!("{error}"),
            (Some(error), failed) => bail!("{failed} reports failed, the first: {error}"),
            _ => Ok(()),
        }
    }
}
