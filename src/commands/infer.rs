//! `infer`: reports about images, one by one, together, or as a batch run that can be resumed.

pub(super) mod args;
mod findings;
mod images;
mod journal;
pub(super) mod output;
pub(super) mod record;
mod shown;

use std::{path::PathBuf, sync::Mutex, time::Instant};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;

use super::{
    finding_probabilities::FindingSentences,
    infer_server,
    pipeline_options::{pipeline_options, room_for_answers},
    progress::{Progress, Unit, loading, prepare_kernels},
    shared_args::generation_config,
    tags,
    usage::UsageError,
};
use crate::{
    accelerate::devices::{Replicas, ReplicatedTask, run_on_all},
    base::{
        files::{expect_file, name, sha256_file},
        hub::Want,
    },
    batch::images::ImageInput,
    eval::{findings::RuleSet, probability::logit::SentenceContext},
    ops::{memory::MemoryWatch, quantised::cache::CacheFormat},
    processor::image::Reading,
    runtime::{
        accelerator::Accelerator,
        generate::{GenerationConfig, Prompt, Timing},
        pipeline::Pipeline,
        spread::in_order,
    },
    study::counted,
};
pub use args::{DEFAULT_PROMPT, InferArgs};
use output::RecordFile;
use record::{Record, RecordRemark, RemarkPrinter};
use shown::Shown;

/// Runs `infer`.
///
/// # Errors
/// Anything that kept a report from being written; images that failed in a batch run are counted.
pub fn run(mut args: InferArgs) -> Result<()> {
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
    let images = images::list(&args)?;
    if args.show_tags {
        return tags::show(images.iter().flatten(), args.json);
    }
    if let Some(address) = &args.server {
        check_sent(&args)?;
        return infer_server::run(address, &args, &settings, &images);
    }
    args.model.find(Want::Checkpoint)?;
    findings::prepare(&mut args)?;
    let rules = args
        .findings
        .rules
        .as_deref()
        .map(RuleSet::named)
        .transpose()?;
    let dtype = args.model.load.dtype.map(DType::from);
    run_on_all(
        &devices,
        dtype,
        Infer {
            args,
            settings,
            images,
            rules,
            remarks: RemarkPrinter::default(),
        },
    )?
}

/// Refuses settings that cannot be sent to a server.
fn check_sent(args: &InferArgs) -> Result<()> {
    if args.frame.is_some() {
        bail!(UsageError(
            "--frame is not sent to a server; give it files of one frame".into()
        ));
    }
    let (adapter, load) = (&args.model.adapter, &args.model.load);
    let unsent = [
        ("--adapter", adapter.adapter.is_some()),
        ("--any-base", adapter.any_base),
        ("--download", args.model.download.download),
        ("--dtype", load.dtype.is_some()),
        ("--quantize", load.quantize.is_some()),
        ("--memory", load.memory.is_some()),
        ("--min-pixels", load.min_pixels.is_some()),
        ("--max-pixels", load.max_pixels.is_some()),
        ("--mmproj", load.mmproj.is_some()),
        ("--tokenizer", load.tokenizer.is_some()),
        ("--kv-cache", args.generation.kv_cache != CacheFormat::Float),
        ("--no-repetition-stop", args.generation.no_repetition_stop),
        ("--findings", args.findings.findings),
    ];
    match unsent.iter().find(|(_, given)| *given) {
        Some((option, _)) => bail!(UsageError(format!(
            "{option} is a setting of the server; give it to `xray-qwen3vl serve`, or name a model of the server with --server-model"
        ))),
        None => Ok(()),
    }
}

struct Infer {
    args: InferArgs,
    settings: GenerationConfig,
    images: Vec<Vec<PathBuf>>,
    /// Words that findings are read with; guessed from each report without one.
    rules: Option<RuleSet>,
    remarks: RemarkPrinter,
}

impl ReplicatedTask for Infer {
    type Output = Result<()>;

    fn run<B: Accelerator>(self, replicas: Replicas<B>) -> Result<()> {
        let Replicas { mut devices, dtype } = replicas;
        let mut run = RecordFile::open(&self.args, &self.images)?;
        let todo = run.todo(&self.images);
        if let Some(note) = todo.note {
            eprintln!("{note}");
        }
        let todo = todo.groups;
        if todo.is_empty() {
            return run.finish();
        }
        let started = Instant::now();
        devices.truncate(todo.len().div_ceil(self.args.batch_size));
        let mut options = pipeline_options(&self.args.model, dtype);
        self.args.model.adapter.check_base(&options.model)?;
        let images = todo.iter().map(|images| images.len()).max().unwrap_or(0);
        room_for_answers(&mut options, self.args.batch_size, images, &self.settings);
        let mut pipelines =
            loading(|on_progress| Pipeline::<B>::load_on(&options, &devices, on_progress))?;
        let fitting = pipelines[0].fit.map_or(usize::MAX, |fit| fit.rows());
        let batch_size = self.args.batch_size.min(fitting);
        if batch_size < self.args.batch_size {
            let note = format!(
                "{batch_size} at once in place of {}, for which the memory is too small",
                self.args.batch_size
            );
            for pipeline in &mut pipelines {
                pipeline.notes.push(note.clone());
            }
        }
        let groups: Vec<&[&Vec<PathBuf>]> = todo.chunks(batch_size).collect();
        for note in &pipelines[0].notes {
            eprintln!("note: {note}");
        }
        if let Some(limits) = pipelines[0].parts.pixel_limits_to_know() {
            eprintln!("{limits}");
        }
        for remark in &pipelines[0].parts.remarks {
            eprintln!("{remark}");
        }
        for device in &devices {
            let config = &pipelines[0].parts.config;
            prepare_kernels::<B>(config, dtype, device, batch_size);
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
            |place, records| {
                done += records.len();
                for (images, record) in groups[place].iter().zip(records) {
                    self.remarks.print(&record.image, &record.remarks);
                    run.add(images, &record, &self.args)?;
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
        run.finish()
    }
}

impl Infer {
    /// Reads the images of a report; what is found out about them goes into its record.
    fn prompt<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        images: &[PathBuf],
        record: &mut Record,
    ) -> Result<Prompt> {
        let about_model = pipeline.parts.remarks.iter().chain(&pipeline.notes);
        record
            .remarks
            .extend(about_model.map(|remark| RecordRemark::of_model(remark)));
        let mut input = ImageInput::default();
        let mut hashes = Vec::new();
        for path in images {
            expect_file(path)?;
            let frame = self.args.frame.map(|frame| frame as usize);
            let Reading {
                picture: image,
                remarks,
            } = pipeline.parts.images.read(path, frame)?;
            hashes.push(sha256_file(path)?);
            let about = (images.len() > 1).then(|| name::text_of(&[path]).0);
            let remarks = remarks.iter();
            record
                .remarks
                .extend(remarks.map(|remark| RecordRemark::of(remark, about.clone())));
            let patches = pipeline
                .parts
                .image_input(&image)
                .with_context(|| format!("`{}`", path.display()))?;
            input.extend(&patches);
        }
        record.image_sha256 = Some(hashes.join(";"));
        let system = self.args.system.as_deref();
        Ok(pipeline.parts.prompt(system, &self.args.prompt, input)?)
    }

    /// Reports of one batch; what fails becomes a record with its error.
    fn answer_group<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        group: &[&Vec<PathBuf>],
    ) -> Vec<Record> {
        let started = Instant::now();
        let mut records: Vec<Record> = group
            .iter()
            .map(|images| Record::new(&self.args, images))
            .collect();
        let mut prompts = Vec::new();
        let mut rows = Vec::new();
        for (index, images) in group.iter().enumerate() {
            match self.prompt(pipeline, images, &mut records[index]) {
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
                for (row, answer) in rows.iter().zip(answers) {
                    records[*row].fill(answer, seconds);
                }
                for (row, prompt) in rows.iter().zip(&prompts) {
                    self.add_findings(pipeline, prompt, &mut records[*row]);
                }
                if self.args.verbose {
                    print_timing(prepared, &timing);
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
                    let record = &mut records[row];
                    record.error = Some(format!("`{}`: {error}", record.image));
                }
            }
        }
        records
    }

    /// Probabilities of findings beside the report, where they are wanted.
    fn add_findings<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        prompt: &Prompt,
        record: &mut Record,
    ) {
        let Some(basis) = &self.args.findings.basis else {
            return;
        };
        let started = Instant::now();
        let report = match basis.context() {
            SentenceContext::Start => None,
            SentenceContext::Report => Some(record.report.as_str()),
        };
        let asked = FindingSentences::new(&pipeline.parts, basis.lead())
            .and_then(|sentences| sentences.ask(pipeline, prompt, report));
        match asked {
            Ok(classes) => {
                findings::fill(record, &self.args.findings, self.rules.as_ref(), &classes);
            }
            // The report is kept; as a failed record it is tried again.
            Err(error) => record.error = Some(format!("`{}`: {error:#}", record.image)),
        }
        let seconds = started.elapsed().as_secs_f64();
        record.set_seconds(record.seconds + seconds);
        if self.args.verbose {
            eprintln!("findings {seconds:8.3} s");
        }
    }
}

fn print_timing(prepared: f64, timing: &Timing) {
    let rate = |tokens: usize, seconds: f64| tokens as f64 / seconds.max(1e-9);
    eprintln!("images   {prepared:8.3} s");
    eprintln!("vision   {:8.3} s", timing.vision_seconds);
    eprintln!(
        "prefill  {:8.3} s, {}, {:.0} tokens/s",
        timing.prefill_seconds,
        counted(timing.prompt_tokens, "token", "tokens"),
        rate(timing.prompt_tokens, timing.prefill_seconds)
    );
    eprintln!(
        "decode   {:8.3} s, {}, {:.1} tokens/s",
        timing.decode_seconds,
        counted(timing.decoded_tokens, "token", "tokens"),
        rate(timing.decoded_tokens, timing.decode_seconds)
    );
}
