//! `eval`: are the reports right? Scores of a model or of a file of predictions, beside the baselines.

use std::{
    io::{Write, stdout},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use clap::{Args, ValueEnum};

use super::{UsageError, generation_config, shipped, studies::StudyArgs, unless_closed};
use crate::{
    accelerate::devices::run_on,
    adapters::lora::base::check_base,
    base::{
        device_name::{DeviceName, DtypeName},
        files::write_atomic,
    },
    cli::{GenerationArgs, ModelArgs},
    dataset::Dataset,
    evaluate::{
        Bootstrap,
        predictions::{PredictionKeys, read_predictions},
    },
    evaluation::{
        Outcome, Remark, Settings, System, SystemTexts, Written,
        baselines::{Reports, nearest_image, without_images},
        evaluate,
        page::{PageFacts, html},
        table, too_few,
    },
    findings::score::UncertainPolicy,
    ops::quantised::Quantization,
    study::{StudyFacts, counted},
    train::{data::RunData, gradients::LossTotals},
};
use cases::TestSet;
use model::ModelWork;
pub(super) use model::question_about;

mod cases;
mod model;
mod output;
mod run_folder;

/// What a run without arguments is evaluated on, and what its baselines learn from.
const SAMPLE_DATA: &str = "data/sample/val/samples.jsonl";
const SAMPLE_TRAIN_DATA: &str = "data/sample/train/samples.jsonl";

/// What a doubtful finding counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Uncertain {
    /// As present: it calls for action.
    Present,
    /// As absent.
    Absent,
    /// The class is left out for that report.
    LeaveOut,
}

impl From<Uncertain> for UncertainPolicy {
    fn from(choice: Uncertain) -> Self {
        match choice {
            Uncertain::Present => Self::AsPresent,
            Uncertain::Absent => Self::AsAbsent,
            Uncertain::LeaveOut => Self::LeaveOut,
        }
    }
}

/// Arguments of `eval`.
#[derive(Debug, Clone, Args)]
pub struct EvalArgs {
    /// Predictions, one JSON object per line, as written by `infer --output`, ms-swift, LLaMA-Factory or
    /// vLLM.
    ///
    /// Without it, the model generates the reports.
    #[arg(value_name = "PREDICTIONS.jsonl")]
    pub predictions: Option<PathBuf>,
    /// Test set: JSONL in ms-swift's format, or `phantom:SEED:FROM..TO`. Not needed for predictions that
    /// contain their references.
    #[arg(long, value_name = "DATA")]
    pub data: Option<String>,
    /// Training set of the baselines; without it they use the reports of the test set.
    #[arg(long, value_name = "DATA")]
    pub train_data: Option<String>,
    /// Folder of a training run, whose curves are shown on the page. Without predictions and model, its best
    /// checkpoint is evaluated on its validation data.
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// Folder of a Qwen3-VL checkpoint [default without predictions: model/tiny]. With predictions it is only
    /// used to find the nearest training image.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Folder of a PEFT LoRA adapter.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Use the adapter even if it was trained on a different base model.
    #[arg(long)]
    pub any_base: bool,
    /// cpu, cuda, cuda:N, wgpu or wgpu:N; the default is the fastest one available.
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceName>,
    /// Dtype of the weights; the default is bf16 on CUDA, f16 on other GPUs and f32 on the CPU.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Quantise the weights at load time: int8, int4 (groups of 64) or int4:32.
    #[arg(long, value_name = "FORMAT")]
    pub quantize: Option<Quantization>,
    /// Smallest size an image is scaled to, in pixels.
    #[arg(long, value_name = "PIXELS")]
    pub min_pixels: Option<usize>,
    /// Largest size an image is scaled to, in pixels.
    #[arg(long, value_name = "PIXELS")]
    pub max_pixels: Option<usize>,
    /// Generation.
    #[command(flatten)]
    pub generation: GenerationArgs,
    /// Number of samples processed together.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub batch_size: usize,
    /// Studies: intervals and tests are drawn by them.
    #[command(flatten)]
    pub studies: StudyArgs,
    /// Evaluate only this many reports, the first of the test set.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Score only the baselines that need no image; no model is loaded.
    #[arg(long, conflicts_with_all = ["predictions", "model", "run"])]
    pub baselines_only: bool,
    /// Skip the reports on images swapped between studies, which take as long as the reports themselves.
    #[arg(long)]
    pub no_swapped: bool,
    /// Skip the baseline of the nearest training image.
    #[arg(long)]
    pub no_neighbour: bool,
    /// Predictions of another model on the same test set, to compare pair by pair.
    #[arg(long, value_name = "OTHER.jsonl")]
    pub compare: Option<PathBuf>,
    /// Key of the answer in the predictions, if it is not found by itself.
    #[arg(long, value_name = "KEY")]
    pub prediction_key: Option<String>,
    /// Key of the reference in the predictions, if it is not found by itself.
    #[arg(long, value_name = "KEY")]
    pub reference_key: Option<String>,
    /// How an uncertain finding is counted, in reference and answer alike.
    #[arg(long, value_enum, default_value = "present")]
    pub uncertain: Uncertain,
    /// Bootstrap samples for the confidence intervals.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub resamples: usize,
    /// Print every score; files always contain all of them.
    #[arg(long)]
    pub all: bool,
    /// Write all scores and cases as JSON.
    #[arg(long, value_name = "FILE.json")]
    pub json: Option<PathBuf>,
    /// Write the results as an HTML page, a single file.
    #[arg(long, value_name = "FILE.html")]
    pub html: Option<PathBuf>,
    /// Number of cases in the page's gallery, the worst first.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub gallery: usize,
    /// Folder of the images, if the paths in the predictions are not valid here.
    #[arg(long, value_name = "DIR")]
    pub images_dir: Option<PathBuf>,
    /// Save the generated reports as predictions that `eval` can read.
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["predictions", "baselines_only"])]
    pub output: Option<PathBuf>,
}

/// Runs `eval`: tables go to stdout.
///
/// # Errors
/// Whatever keeps a report from being read, written or scored, with file, row and key.
pub fn run(mut args: EvalArgs) -> Result<()> {
    check(&args)?;
    let rule = args.studies.rule()?;
    let settings = Settings {
        bootstrap: Bootstrap {
            resamples: args.resamples,
            ..Bootstrap::default()
        },
        policy: args.uncertain.into(),
    };
    let curves = match &args.run {
        Some(dir) => Some(run_folder::curves(dir)?),
        None => None,
    };
    let held_out = choose_what(&mut args)?;
    let (data, train) = match held_out {
        Some(run) => (run.validation, Some(run.train)),
        None => (
            args.data.as_deref().map(Dataset::open).transpose()?,
            args.train_data.as_deref().map(Dataset::open).transpose()?,
        ),
    };
    let mut warnings = Vec::new();

    let keys = PredictionKeys {
        answer: args.prediction_key.clone(),
        reference: args.reference_key.clone(),
    };
    let (mut set, written) = match (&args.predictions, &data) {
        (Some(path), data) => {
            let predictions = read_predictions(path, &keys)?;
            let (set, written) = cases::join(path, predictions, data.as_ref(), &mut warnings)?;
            (set, Some(written))
        }
        (None, Some(data)) => (TestSet::of(data)?, None),
        (None, None) => bail!(UsageError(
            "--baselines-only: expected --data, the test set".into()
        )),
    };
    if let Some(limit) = args.limit {
        set.truncate(limit);
    }
    let study = set.find_studies(&rule, &mut warnings)?;
    warnings.extend(too_few(study.studies, args.compare.is_some()));
    let training = train.as_ref().map(cases::reports).transpose()?;
    cases::warn_of_leaks(&set, train.as_ref(), &rule, &mut warnings)?;

    let compared = match &args.compare {
        Some(path) => Some(cases::align(
            path,
            read_predictions(path, &keys)?,
            &set,
            data.as_ref(),
        )?),
        None => None,
    };
    let work = model_work(&args, &set, data.as_ref(), train.as_ref(), !study.guessed)?;
    let from_model = match work {
        Some(work) => Some(run_on(args.device, args.dtype.map(DType::from), work)??),
        None => None,
    };
    let mut systems = Vec::new();
    let mut loss = None;
    if let Some(mut written) = written {
        written.truncate(set.cases.len());
        systems.push(system(System::Model, written));
    }
    let mut neighbour = None;
    if let Some(run) = from_model {
        loss = run.loss;
        neighbour = run.embeddings;
        warnings.extend(run.warnings);
        systems.extend(run.written.map(|texts| system(System::Model, texts)));
        systems.extend(run.swapped.map(|texts| system(System::Swapped, texts)));
    }
    let reports = training.as_deref().map_or_else(
        || {
            warnings.push(Remark::new(
                "没有给训练集，基线取自测试集自身的报告，偏高",
                "no --train-data: the baselines know the test set's own reports, which flatters them",
            ));
            Reports::Own
        },
        Reports::Training,
    );
    systems.extend(without_images(&set.cases, reports, settings.bootstrap.seed));
    if let (Some(found), Some(reports)) = (neighbour, &training) {
        let reports: Vec<String> = found.rows.iter().map(|row| reports[*row].clone()).collect();
        let texts = nearest_image(&found.queries, &found.training, found.dimension, &reports)
            .context("the nearest training images cannot be found")?;
        systems.push(texts);
    }
    systems.sort_by_key(|system| match system.system {
        System::Model => 0,
        System::Constant => 1,
        System::Random => 2,
        System::Neighbour => 3,
        System::Swapped => 4,
    });
    for warning in &warnings {
        eprintln!("note: {}", warning.english);
    }
    eprintln!("{}", study.english());
    eprintln!("scoring {}", counted(set.cases.len(), "report", "reports"));
    let outcome = evaluate(set.cases.clone(), systems, compared.as_deref(), settings)?;
    unless_closed(tell(&outcome, loss.as_ref(), args.all)).context("cannot write to stdout")?;
    let facts = facts(&args, &study, warnings, loss.as_ref(), curves);
    if let Some(path) = &args.json {
        let json = output::json(&outcome, &facts, &study);
        write_atomic(path, |out| {
            serde_json::to_writer_pretty(&mut *out, &json)?;
            out.write_all(b"\n")
        })?;
    }
    if let Some(path) = &args.html {
        let mut films = output::Films::new(&set, data.as_ref(), args.images_dir.as_deref());
        let page = html(&outcome, &facts, &mut |case| films.of(case));
        films.tell();
        write_atomic(path, |out| out.write_all(page.as_bytes()))?;
        eprintln!("page: `{}`", path.display());
    }
    Ok(())
}

fn check(args: &EvalArgs) -> Result<()> {
    let wrong = |text: &str| -> Result<()> { bail!(UsageError(text.into())) };
    if args.batch_size == 0 {
        wrong("--batch-size is 0, expected at least 1")?;
    }
    if args.resamples == 0 {
        wrong("--resamples is 0, expected at least 1 (1000 is usual)")?;
    }
    if args.limit == Some(0) {
        wrong("--limit is 0, expected at least 1")?;
    }
    // Before hours of generation, not after.
    for path in [&args.json, &args.html, &args.output].into_iter().flatten() {
        let folder = path.parent().unwrap_or(Path::new(""));
        if !folder.as_os_str().is_empty() && !folder.is_dir() {
            wrong(&format!(
                "`{}`: its folder is not there; make `{}` first",
                path.display(),
                folder.display()
            ))?;
        }
    }
    if args.predictions.is_none() && args.prediction_key.is_some() && args.compare.is_none() {
        wrong("--prediction-key: expected PREDICTIONS.jsonl or --compare to read it from")?;
    }
    if args.adapter.is_some() && args.predictions.is_some() && args.model.is_none() {
        wrong(
            "--adapter: the predictions are there already; name its base with --model, or leave it out",
        )?;
    }
    if args.adapter.is_some() && args.baselines_only {
        wrong("--adapter: --baselines-only loads no model; leave one of them out")?;
    }
    Ok(())
}

/// Fills in what was not typed: a run's best checkpoint and data, or what comes with the repository.
///
/// Gives the data of a run that held its validation rows out of its training data.
fn choose_what(args: &mut EvalArgs) -> Result<Option<RunData>> {
    let mut held_out = None;
    if args.predictions.is_none() && args.model.is_none() && !args.baselines_only {
        if let Some(dir) = args.run.clone() {
            held_out = run_folder::choose(&dir, args)?;
        } else {
            args.model = Some(PathBuf::from("model/tiny"));
            if args.data.is_none() {
                args.data = Some(SAMPLE_DATA.into());
                args.train_data.get_or_insert(SAMPLE_TRAIN_DATA.into());
            }
        }
    }
    if args.predictions.is_none() && args.data.is_none() && !args.baselines_only {
        bail!(UsageError(
            "--data: expected the test set the model is asked about".into()
        ));
    }
    for name in [&mut args.data, &mut args.train_data].into_iter().flatten() {
        if held_out.is_none() && !name.starts_with("phantom:") {
            *name = shipped(Path::new(name.as_str())).display().to_string();
        }
    }
    Ok(held_out)
}

/// What a model is needed for; `None` if for nothing.
fn model_work(
    args: &EvalArgs,
    set: &TestSet,
    data: Option<&Dataset>,
    train: Option<&Dataset>,
    keeps_studies: bool,
) -> Result<Option<ModelWork>> {
    let Some(model) = &args.model else {
        return Ok(None);
    };
    let neighbour = train.filter(|_| !args.no_neighbour).cloned();
    if let Some(adapter) = args.adapter.as_ref().filter(|_| !args.any_base) {
        check_base(adapter, &shipped(model))?;
    }
    let writes = args.predictions.is_none();
    let Some(data) = data.cloned().filter(|_| writes || neighbour.is_some()) else {
        bail!(UsageError(
            "--model beside predictions finds the nearest training images: expected --data and --train-data".into()
        ));
    };
    Ok(Some(ModelWork {
        model: ModelArgs {
            model: model.clone(),
            adapter: args.adapter.clone(),
            any_base: args.any_base,
            device: args.device.into_iter().collect(),
            dtype: args.dtype,
            quantize: args.quantize,
            min_pixels: args.min_pixels,
            max_pixels: args.max_pixels,
        },
        generation: generation_config(&args.generation)?,
        stop: args.generation.stop.clone(),
        batch_size: args.batch_size,
        data,
        rows: set.data_rows()?,
        cases: set.cases.clone(),
        writes,
        swaps: writes && !args.no_swapped,
        neighbour,
        output: args.output.clone(),
        keeps_studies,
    }))
}

fn system(system: System, texts: Vec<Written>) -> SystemTexts {
    SystemTexts {
        system,
        note: String::new(),
        texts,
    }
}

fn tell(outcome: &Outcome, loss: Option<&LossTotals>, all: bool) -> std::io::Result<()> {
    let mut out = stdout().lock();
    if let Some(totals) = loss {
        writeln!(
            out,
            "loss {:.4}  perplexity {:.4}  token accuracy {:.1} %  over {} target tokens",
            totals.loss(),
            totals.loss().exp(),
            100.0 * totals.token_accuracy(),
            totals.targets
        )?;
    }
    write!(out, "{}", table::text(outcome, all))
}

fn facts(
    args: &EvalArgs,
    study: &StudyFacts,
    warnings: Vec<Remark>,
    loss: Option<&LossTotals>,
    curves: Option<String>,
) -> PageFacts {
    let mut facts = Vec::new();
    let mut fact = |chinese, english, value: Option<String>| {
        facts.extend(value.map(|value| (chinese, english, value)));
    };
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    fact("预测", "predictions", path(&args.predictions));
    fact("模型", "model", path(&args.model));
    fact("适配器", "adapter", path(&args.adapter));
    fact("测试集", "test set", args.data.clone());
    fact("训练集", "training set", args.train_data.clone());
    fact("比较对象", "compared with", path(&args.compare));
    fact("检查来源", "studies from", Some(study.from.clone()));
    if args.baselines_only {
        let value = "仅基线，无模型 (baselines only; the first one stands in the model's place)";
        fact("系统", "system", Some(value.to_owned()));
    }
    PageFacts {
        facts,
        warnings,
        loss: loss.map(|totals| (totals.loss(), totals.loss().exp(), totals.token_accuracy())),
        curves,
        gallery: args.gallery,
    }
}
