//! `eval`: are the reports right? Scores of a model or of a file of predictions, beside the baselines.

mod args;
mod cases;
mod export;
mod judge;
mod model;
mod output;
mod probabilities;
mod run_folder;

use std::{
    io::{Write, stdout},
    path::PathBuf,
};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;

use super::{
    models::find, shared_args::generation_config, shell::unless_closed, shipped::shipped_data,
    usage::UsageError,
};
use crate::{
    accelerate::devices::run_on,
    base::{files::write_atomic, hub::Want},
    dataset::Dataset,
    eval::{
        baselines::systems::{Reports, nearest_image, without_images},
        bootstrap::Bootstrap,
        cases::{System, SystemTexts, WrittenReport},
        caveat::{Caveat, too_few},
        evaluate::evaluate,
        findings::{Policies, RuleSet},
        outcome::{EvalOutcome, EvalSettings},
        predictions::{PredictionKeys, read_predictions},
        probability::{comparison::compare_probabilities, evaluation::evaluate_probabilities},
        report::{
            page::{PageFacts, html},
            table,
        },
        subgroups::{Division, divide, score_subgroups},
        text::TextLanguage,
    },
    study::{StudyFacts, counted},
    train::{data::RunData, loss::LossTotals},
};
pub use args::{EvalArgs, Uncertain};
use cases::TestSet;
use model::{ModelRun, ModelWork};

/// What a run without arguments is evaluated on, and what its baselines learn from.
const SAMPLE_DATA: &str = "data/sample/val/samples.jsonl";
const SAMPLE_TRAIN_DATA: &str = "data/sample/train/samples.jsonl";

/// Runs `eval`: tables go to stdout.
///
/// # Errors
/// Whatever keeps a report from being read, written or scored, with file, row and key.
pub fn run(mut args: EvalArgs) -> Result<()> {
    args.check()?;
    let rule = args.studies.rule()?;
    let mut settings = EvalSettings {
        language: args.language.map_or(TextLanguage::default(), Into::into),
        bootstrap: Bootstrap {
            resamples: args.resamples,
            ..Bootstrap::default()
        },
        policies: Policies {
            truth: args.uncertain.into(),
            answer: args.uncertain_answer.unwrap_or(args.uncertain).into(),
        },
    };
    let curves = args.run.as_deref().map(run_folder::curves).transpose()?;
    let (data, train) = match choose_what(&mut args)? {
        Some(run) => (run.validation, Some(run.train)),
        None => (
            open(&args, args.data.as_deref())?,
            open(&args, args.train_data.as_deref())?,
        ),
    };
    let (data, train) = (data.as_ref(), train.as_ref());
    if let Some(model) = &mut args.model {
        *model = find(model, Want::Checkpoint, args.download)?;
    }
    args.adapter.find(args.download)?;
    let mut warnings = Vec::new();

    let keys = PredictionKeys {
        answer: args.prediction_key.clone(),
        reference: args.reference_key.clone(),
    };
    let (mut set, written) = test_set(&args, &keys, data, &mut warnings)?;
    let probabilities = probabilities::find(&args, &set, &mut warnings)?;
    let study = set.find_studies(&rule, &mut warnings)?;
    warnings.extend(too_few(study.studies, args.compare.is_some()));
    let training = train.map(cases::reports).transpose()?;
    cases::warn_of_leaks(&set, train, &rule, &mut warnings)?;
    let compared = match &args.compare {
        Some(path) => Some(cases::align(
            path,
            read_predictions(path, &keys)?,
            &set,
            data,
        )?),
        None => None,
    };

    let from_model = match model_work(&args, &set, data, train, !study.guessed)? {
        Some(work) => run_on(args.device, args.load.dtype.map(DType::from), work)??,
        None => ModelRun::default(),
    };
    let loss = from_model.loss;
    let seed = settings.bootstrap.seed;
    let training = training.as_deref();
    let systems = systems(&set, written, from_model, training, seed, &mut warnings)?;
    let truths = set.cases.iter().map(|case| case.truth.as_str());
    if args.language.is_none() {
        settings.language = TextLanguage::guess(truths.clone());
    }
    warnings.extend(other_language(&systems[0], settings.language));
    for warning in &warnings {
        eprintln!("note: {}", warning.english);
    }
    eprintln!("{}", study.english());
    eprintln!("scoring {}", counted(set.cases.len(), "report", "reports"));
    let rules = RuleSet::choose(args.rules.as_deref(), truths)?;
    eprintln!("{}", rules.told());
    if args.language.is_none() {
        eprintln!(
            "words of the text scores are {}, guessed from the references; --language names the other",
            settings.language
        );
    }
    let divisions = match args.no_subgroups {
        true => Vec::new(),
        false => {
            let keys: Vec<_> = set.of.iter().map(|row| &row.keys).collect();
            divide(&keys, &args.subgroup)?
        }
    };
    for told in divisions.iter().filter_map(Division::told) {
        eprintln!("{told}");
    }
    let cases = set.cases.clone();
    let mut outcome = evaluate(cases, systems, compared.as_deref(), &rules, settings)?;
    if let Some(found) = &probabilities {
        let (labels, truth) = (&outcome.labels, settings.policies.truth);
        let bootstrap = &settings.bootstrap;
        outcome.probabilities = evaluate_probabilities(labels, found, truth, bootstrap)?;
        let other = args.compare.as_deref();
        let other = other.map(|path| probabilities::of_other(path, &set));
        if let Some(other) = other.transpose()?.flatten() {
            outcome.probability_comparison =
                compare_probabilities(labels, found, &other, truth, bootstrap)?;
        }
    }
    score_subgroups(&mut outcome, divisions)?;
    // Scores that are there already are printed before a judge is waited for.
    unless_closed(print(&outcome, loss.as_ref(), args.all)).context("cannot write to stdout")?;
    let sent = warnings.len();
    outcome.judge = judge::judge(&args, &outcome, &mut warnings)?;
    if let Some(found) = &outcome.judge {
        for warning in &warnings[sent..] {
            eprintln!("note: {}", warning.english);
        }
        let printed = stdout().lock().write_all(found.text().as_bytes());
        unless_closed(printed).context("cannot write to stdout")?;
    }
    if let [form, path] = &args.export[..] {
        export::write_export(export::ExportForm::named(form)?, path.as_ref(), &outcome)?;
    }
    let facts = facts(
        &args,
        settings.language,
        &study,
        warnings,
        loss.as_ref(),
        curves,
    );
    let rollout = args
        .run
        .as_deref()
        .map(run_folder::last_rollout)
        .transpose()?;
    let facts = PageFacts {
        rollout: rollout.flatten(),
        ..facts
    };
    write_files(&args, &set, data, &outcome, &facts, &study)
}

/// Answers in another language than the references: words and findings of them are not read.
fn other_language(system: &SystemTexts, language: TextLanguage) -> Option<Caveat> {
    let answers = system.texts.iter().map(|text| text.answer.as_str());
    let any = answers
        .clone()
        .flat_map(str::chars)
        .any(char::is_alphabetic);
    let other = TextLanguage::guess(answers);
    (any && other != language).then(|| {
        let name = |language| match language {
            TextLanguage::Chinese => "中文",
            TextLanguage::English => "英文",
        };
        Caveat::new(
            format!(
                "参考报告按{}、回答却是{}：所见按参考报告语言的规则读取，分数没有意义",
                name(language),
                name(other)
            ),
            format!(
                "the references are taken as {language} and the answers are {other}: their findings are read with the rules of the references' \
                 language, so the scores mean nothing"
            ),
        )
    })
}

/// The cases to score, and where predictions were given what they hold.
fn test_set(
    args: &EvalArgs,
    keys: &PredictionKeys,
    data: Option<&Dataset>,
    warnings: &mut Vec<Caveat>,
) -> Result<(TestSet, Option<Vec<WrittenReport>>)> {
    let (mut set, mut written) = match (&args.predictions, data) {
        (Some(path), data) => {
            let predictions = read_predictions(path, keys)?;
            let (set, written) = cases::join(path, predictions, data, warnings)?;
            (set, Some(written))
        }
        (None, Some(data)) => (TestSet::of(data)?, None),
        (None, None) => bail!(UsageError(
            "--baselines-only: expected --data, the test set".into()
        )),
    };
    if let Some(limit) = args.limit {
        set.truncate(limit);
        if let Some(written) = &mut written {
            written.truncate(limit);
        }
    }
    Ok((set, written))
}

/// The model, or the predictions in its place, and the baselines, in the order in which they are shown.
fn systems(
    set: &TestSet,
    predictions: Option<Vec<WrittenReport>>,
    from_model: ModelRun,
    training: Option<&[String]>,
    seed: u64,
    warnings: &mut Vec<Caveat>,
) -> Result<Vec<SystemTexts>> {
    let system = |system: System| {
        move |texts: Vec<WrittenReport>| SystemTexts {
            system,
            note: String::new(),
            texts,
        }
    };
    let mut systems = Vec::new();
    systems.extend(predictions.map(system(System::Model)));
    warnings.extend(from_model.warnings);
    systems.extend(from_model.written.map(system(System::Model)));
    systems.extend(from_model.swapped.map(system(System::Swapped)));
    let reports = training.map_or_else(
        || {
            warnings.push(Caveat::new(
                "没有给训练集，基线取自测试集自身的报告，偏高",
                "no --train-data: the baselines know the test set's own reports, which flatters them",
            ));
            Reports::Own
        },
        Reports::Training,
    );
    systems.extend(without_images(&set.cases, reports, seed));
    if let (Some(found), Some(reports)) = (from_model.embeddings, training) {
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
    Ok(systems)
}

/// Fills in what was not typed: a run's best checkpoint and data, or what comes with the repository.
///
/// Opens a data set as the arguments say.
fn open(args: &EvalArgs, name: Option<&str>) -> Result<Option<Dataset>> {
    let mut options = args.reading.options();
    // Test and training set may have columns of their own.
    options.columns_may_be_absent = args.data.is_some() && args.train_data.is_some();
    Ok(name
        .map(|name| Dataset::open_with(name, &options))
        .transpose()?)
}

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
        if held_out.is_none() {
            *name = shipped_data(name);
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
    args.adapter.check_base(model, &args.load.gguf.parts())?;
    let writes = args.predictions.is_none();
    let Some(data) = data.cloned().filter(|_| writes || neighbour.is_some()) else {
        bail!(UsageError(
            "--model beside predictions finds the nearest training images: expected --data and --train-data".into()
        ));
    };
    Ok(Some(ModelWork {
        model: model.clone(),
        adapter: args.adapter.clone(),
        load: args.load.clone(),
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

fn print(outcome: &EvalOutcome, loss: Option<&LossTotals>, all: bool) -> std::io::Result<()> {
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

/// Writes the JSON and the page, where they were named.
fn write_files(
    args: &EvalArgs,
    set: &TestSet,
    data: Option<&Dataset>,
    outcome: &EvalOutcome,
    facts: &PageFacts,
    study: &StudyFacts,
) -> Result<()> {
    if let Some(path) = &args.json {
        let json = output::json(outcome, facts, study);
        write_atomic(path, |out| {
            serde_json::to_writer_pretty(&mut *out, &json)?;
            out.write_all(b"\n")
        })?;
    }
    if let Some(path) = &args.html {
        let mut images = output::ImageFinder::new(set, data, args.images_dir.as_deref());
        let page = html(outcome, facts, &mut |case| images.of(case));
        images.print_missing();
        write_atomic(path, |out| out.write_all(page.as_bytes()))?;
        eprintln!("page: `{}`", path.display());
    }
    Ok(())
}

fn facts(
    args: &EvalArgs,
    language: TextLanguage,
    study: &StudyFacts,
    warnings: Vec<Caveat>,
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
    fact("适配器", "adapter", path(&args.adapter.adapter));
    let quantize = args
        .load
        .quantize
        .map(|quantization| quantization.to_string());
    fact("量化", "quantised", quantize);
    fact("测试集", "test set", args.data.clone());
    fact("训练集", "training set", args.train_data.clone());
    fact("概率", "probabilities", path(&args.probabilities));
    fact("比较对象", "compared with", path(&args.compare));
    let guessed = if args.language.is_none() {
        " (guessed)"
    } else {
        ""
    };
    fact("文本语言", "language", Some(format!("{language}{guessed}")));
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
        rollout: None,
        gallery: args.gallery,
    }
}
