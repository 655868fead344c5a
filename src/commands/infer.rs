//! `infer`: reports about images, one by one, together, or as a batch run that can be resumed.

pub(super) mod args;
mod cluster;
mod data;
mod findings;
mod findings_args;
mod images;
mod journal;
pub(super) mod output;
pub(super) mod record;
mod shown;
pub(super) mod task;

use std::{sync::Mutex, time::Instant};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;

use super::{
    drafts::{drafting_for_batches, tell},
    finding_probabilities::{DRAWN_AT_ONCE, ask, draw, expect_named_weights, sentences},
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
        files::{expect_file, sha256_file},
        hub::Want,
    },
    batch::images::ImageInput,
    cluster::{Cluster, Launch},
    dataset::Question,
    eval::{findings::RuleSet, probability::logit::SentenceContext},
    ops::{memory::MemoryWatch, quantised::cache::CacheFormat},
    processor::{
        image::Reading,
        remark::{Remark, RemarkKind},
        sample::PixelLimits,
    },
    runtime::{
        accelerator::Accelerator,
        generate::{GenerationConfig, Prompt, PromptState, Timing, drafts::DraftCounts},
        pipeline::Pipeline,
        spread::{in_order, in_order_across},
    },
    study::counted,
};
pub use args::{DEFAULT_PROMPT, InferArgs};
use output::RecordFile;
use record::{Record, RecordRemark, RemarkPrinter};
use shown::Shown;
use task::Task;

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
    let launch = cluster::launch(&args)?;
    let devices = match &launch {
        Some(launch) => cluster::devices(launch, &args.model.device)?,
        None => args.model.device.clone(),
    };
    if devices.len() > 1 && (args.stream || args.server.is_some()) {
        bail!(UsageError(
            "several devices are for batch runs with a model; leave out --stream and --server, or name one --device".into()
        ));
    }
    let tasks = match data::list(&args)? {
        Some(rows) => rows,
        None => images::list(&args)?,
    };
    if args.show_tags {
        return tags::show(tasks.iter().flat_map(|task| &task.images), args.json);
    }
    if let Some(address) = &args.server {
        check_sent(&args)?;
        return infer_server::run(address, &args, &settings, &tasks);
    }
    args.model.find(Want::Checkpoint)?;
    findings::prepare(&mut args, &tasks)?;
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
            tasks,
            rules,
            remarks: RemarkPrinter::default(),
            launch,
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
        ("--mmproj", load.gguf.mmproj.is_some()),
        ("--tokenizer", load.gguf.tokenizer.is_some()),
        ("--kv-cache", args.generation.kv_cache != CacheFormat::Float),
        ("--no-repetition-stop", args.generation.no_repetition_stop),
        ("--drafts", args.generation.drafting.drafts.is_some()),
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
    tasks: Vec<Task>,
    /// Words that findings are read with; guessed from each report without one.
    rules: Option<RuleSet>,
    remarks: RemarkPrinter,
    /// Which process this is of several.
    launch: Option<Launch>,
}

impl ReplicatedTask for Infer {
    type Output = Result<()>;

    fn run<B: Accelerator>(mut self, replicas: Replicas<B>) -> Result<()> {
        let Some(launch) = self.launch.take() else {
            return self.answer_all(replicas, None);
        };
        let cluster = cluster::meet(&self.args, launch, replicas.devices.len())?;
        let ended = self.answer_all(replicas, Some(&cluster));
        cluster::end(&cluster, ended)
    }
}

impl Infer {
    /// Writes all reports; with a cluster this process's share of them, and the first process the file.
    fn answer_all<B: Accelerator>(
        mut self,
        replicas: Replicas<B>,
        cluster: Option<&Cluster>,
    ) -> Result<()> {
        let Replicas { mut devices, dtype } = replicas;
        let mut run = match cluster.is_none_or(Cluster::is_first) {
            true => Some(RecordFile::open(&self.args, &self.tasks)?),
            false => None,
        };
        let todo = run.as_ref().map(|run| run.todo(&self.tasks));
        if let Some(note) = todo.as_ref().and_then(|todo| todo.note.as_ref()) {
            eprintln!("{note}");
        }
        let todo = todo.map(|todo| todo.tasks);
        let todo = match cluster {
            Some(cluster) => cluster::agree(cluster, &self.args, &self.tasks, todo)?,
            None => todo.unwrap_or_default(),
        };
        if todo.is_empty() {
            return run.map_or(Ok(()), RecordFile::finish);
        }
        let started = Instant::now();
        if cluster.is_none() {
            devices.truncate(todo.len().div_ceil(self.args.batch_size));
        }
        let mut options = pipeline_options(&self.args.model, dtype);
        self.args
            .model
            .adapter
            .check_base(&options.model, &options.gguf)?;
        let most = |count: fn(&Task) -> usize| todo.iter().map(|task| count(task)).max();
        let images = most(|task| task.images.len()).unwrap_or(0);
        // A token is at least a byte.
        let text = most(|task| task.question().map_or(0, Question::text_bytes)).unwrap_or(0);
        let drawn = self.args.findings.basis.as_ref().map_or(0, |basis| {
            let draws = basis.draws();
            draws.min(DRAWN_AT_ONCE)
        });
        room_for_answers(
            &mut options,
            self.args.batch_size.max(drawn),
            images,
            text,
            &self.settings,
        );
        let mut pipelines =
            loading(|on_progress| Pipeline::<B>::load_on(&options, &devices, on_progress))?;
        if self.args.findings.basis.is_some() {
            expect_named_weights(&options, &pipelines[0])?;
        }
        let fitting = pipelines[0].fit.map_or(usize::MAX, |fit| fit.rows());
        let batch_size = self.args.batch_size.min(fitting);
        let batch_size = match cluster {
            Some(cluster) => cluster::smallest(cluster, batch_size)?,
            None => batch_size,
        };
        if batch_size < self.args.batch_size {
            let note = format!(
                "{batch_size} at once in place of {}, for which the memory is too small",
                self.args.batch_size
            );
            for pipeline in &mut pipelines {
                pipeline.notes.push(note.clone());
            }
        }
        let groups: Vec<&[&Task]> = todo.chunks(batch_size).collect();
        for note in &pipelines[0].notes {
            eprintln!("note: {note}");
        }
        if let Some(limits) = pipelines[0].parts.pixel_limits_to_know() {
            eprintln!("{limits}");
        }
        for remark in &pipelines[0].parts.remarks {
            eprintln!("{remark}");
        }
        let parts = &pipelines[0].parts;
        self.settings.drafts = drafting_for_batches::<B>(
            &self.args.generation.drafting,
            &options,
            &parts.tokenizer,
            batch_size,
        )?;
        for device in &devices {
            let (config, form) = (
                &pipelines[0].parts.config,
                pipelines[0].model.quantization(),
            );
            prepare_kernels::<B>(config, (dtype, form), device, batch_size);
            let _ = B::sync(device);
        }
        if self.args.verbose {
            eprintln!("load     {:8.2} s", started.elapsed().as_secs_f64());
        }
        let mut progress = (run.is_some() && (todo.len() > 1 || self.args.output.is_some()))
            .then(|| Progress::new("reports", todo.len() as u64, Unit::Items));
        let mut done = 0;
        let memory = Mutex::new(MemoryWatch::default());
        let drafted = Mutex::new(DraftCounts::default());
        let work = |pipeline: &mut Pipeline<B>, group: &&[&Task]| {
            let records = self.answer_group(pipeline, group, &drafted);
            if self.args.verbose
                && let Ok(mut memory) = memory.lock()
            {
                memory.note(B::memory_in_use(&pipeline.device));
            }
            records
        };
        let mut write = |place: usize, records: Vec<Record>| {
            done += records.len();
            if let Some(run) = &mut run {
                for (task, record) in groups[place].iter().zip(records) {
                    self.remarks.print(&record);
                    run.add(task, &record, &self.args)?;
                }
            }
            if let Some(progress) = &mut progress {
                progress.set(done as u64, todo.len() as u64);
            }
            anyhow::Ok(())
        };
        match cluster {
            Some(cluster) => in_order_across(cluster, &mut pipelines, &groups, work, &mut write)?,
            None => in_order(&mut pipelines, &groups, work, &mut write)?,
        }
        if let Some(progress) = progress {
            progress.finish();
        }
        if let Ok(counts) = drafted.into_inner() {
            tell(self.settings.drafts.as_ref(), &counts);
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
        run.map_or(Ok(()), RecordFile::finish)
    }

    /// Reads the images of a report; what is found out about them goes into its record.
    fn prompt<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        task: &Task,
        record: &mut Record,
    ) -> Result<Prompt> {
        let parts = &pipeline.parts;
        let about_model = parts.remarks.iter().chain(&pipeline.notes);
        record
            .remarks
            .extend(about_model.map(|remark| RecordRemark::of_model(remark)));
        let question = task.question();
        let limits = question.map_or_else(PixelLimits::default, |question| question.sample.limits);
        let processor = parts.images.with_pixels(limits)?;
        let mut input = ImageInput::default();
        let (mut hashes, mut sizes) = (Vec::new(), Vec::new());
        for (index, path) in task.images.iter().enumerate() {
            expect_file(path)?;
            let frame = self.args.frame.map(|frame| frame as usize);
            let Reading {
                picture: image,
                remarks,
            } = processor.read(path, frame)?;
            hashes.push(sha256_file(path)?);
            let about = (task.images.len() > 1).then(|| task.image_name(index));
            let remarks = remarks.iter();
            record
                .remarks
                .extend(remarks.map(|remark| RecordRemark::of(remark, about.clone())));
            sizes.push((image.width(), image.height()));
            let patches = processor.process(&image);
            let patches = patches.with_context(|| format!("`{}`", path.display()))?;
            input.extend(&ImageInput {
                pixel_values: patches.pixel_values.into(),
                image_grid_thw: vec![patches.grid_thw],
            });
        }
        record.image_sha256 = Some(hashes.join(";"));
        let system = self.args.system.as_deref();
        let Some(question) = question else {
            return Ok(parts.prompt(system, self.args.prompt(), input)?);
        };
        if task.images.is_empty() {
            let none = Remark::new(RemarkKind::NoImage, "the row has no image");
            record.remarks.push(RecordRemark::of(&none, None));
        }
        let asked = question.asked(system, &sizes)?;
        let messages = record.ask(asked);
        Ok(parts.chat_prompt(&messages, input)?)
    }

    /// Reports of one batch; what fails becomes a record with its error.
    fn answer_group<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        group: &[&Task],
        drafted: &Mutex<DraftCounts>,
    ) -> Vec<Record> {
        let started = Instant::now();
        let mut records: Vec<Record> = group
            .iter()
            .map(|task| Record::new(&self.args, task))
            .collect();
        let mut prompts = Vec::new();
        let mut rows = Vec::new();
        for (index, task) in group.iter().enumerate() {
            let record = &mut records[index];
            // A row that is no question.
            if record.error.is_some() {
                continue;
            }
            match self.prompt(pipeline, task, record) {
                Ok(prompt) => {
                    prompts.push(prompt);
                    rows.push(index);
                }
                Err(error) if task.row.is_some() => {
                    record.error = Some(format!("{}: {error:#}", record.label()));
                }
                Err(error) => record.error = Some(format!("{error:#}")),
            }
        }
        if prompts.is_empty() {
            return records;
        }
        let prepared = started.elapsed().as_secs_f64();
        let mut shown = Shown::new(pipeline.parts.template.opens_thinking());
        // Keys and values of a quantised cache are not those that calibrations are made with.
        let basis = self.args.findings.basis.as_ref();
        let keeps = basis.is_some_and(|basis| basis.form().is_of_sentences())
            && self.settings.kv_cache == CacheFormat::Float;
        let mut kept = Vec::new();
        let answers = pipeline.answer_and_keep(
            &prompts,
            &self.settings,
            &self.args.generation.stop,
            keeps.then_some(&mut kept),
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
                if let Ok(mut drafted) = drafted.lock() {
                    drafted.add(timing.drafts);
                }
                for (row, answer) in rows.iter().zip(answers) {
                    records[*row].fill(answer, seconds);
                }
                let mut kept = kept.into_iter();
                for (row, prompt) in rows.iter().zip(&prompts) {
                    self.add_findings(pipeline, prompt, kept.next(), &mut records[*row]);
                }
                if self.args.verbose {
                    print_timing(prepared, &timing);
                }
            }
            // One prompt that cannot be answered must not take the others with it.
            Err(_) if rows.len() > 1 => {
                for row in rows {
                    let alone = self.answer_group(pipeline, &group[row..=row], drafted);
                    records.splice(row..=row, alone);
                }
            }
            Err(error) => {
                for row in rows {
                    let record = &mut records[row];
                    record.error = Some(format!("{}: {error}", record.label()));
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
        kept: Option<PromptState<B>>,
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
        let asked = || {
            if !basis.form().is_of_sentences() {
                return Ok(basis.read(&draw(pipeline, prompt, basis.draws())?));
            }
            let sentences = sentences(&pipeline.parts, basis.lead())?;
            let state = match kept {
                Some(state) => state,
                None => pipeline.prompt_state(prompt)?,
            };
            ask(&sentences, pipeline, state, report)
        };
        match asked() {
            Ok(classes) => {
                findings::fill(record, &self.args.findings, self.rules.as_ref(), &classes);
            }
            // The report is kept; as a failed record it is tried again.
            Err(error) => record.error = Some(format!("{}: {error:#}", record.label())),
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
