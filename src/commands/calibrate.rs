//! `calibrate`: temperature, biases and thresholds of a model's probabilities, fitted on a validation set.

mod scored;

use std::{
    collections::BTreeSet,
    io::{Write, stdout},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use clap::{Args, ValueEnum};

use super::{
    eval::Uncertain,
    finding_probabilities::{AskedHow, ask, asked_model, draw, expect_named_weights, sentences},
    infer::DEFAULT_PROMPT,
    pipeline_options::pipeline_options,
    progress::{Progress, Unit, loading, prepare_kernels},
    question::patches,
    shared_args::{ModelArgs, one_device},
    shell::unless_closed,
    shipped::shipped_data,
    usage::UsageError,
};
use crate::{
    accelerate::devices::{DeviceTask, run_on},
    base::{device_name::dtype_text, hub::Want},
    dataset::Dataset,
    eval::{
        findings::{Finding, RuleSet, UncertainPolicy},
        probability::{
            calibration::{
                AskedModel, CALIBRATION_FILE, Calibration, CalibrationData, ClassCases, Fitness,
            },
            evidence::{ClassEvidence, of_reports},
            logit::{DRAWN_REPORTS, MOST_DRAWN, ScoreForm, SentenceContext},
            metrics::Ranked,
            sentences::FindingSentences,
            thresholds::FEWEST_CASES,
            wordings::WORDINGS,
        },
    },
    phantom,
    processor::message::split_thinking,
    runtime::{
        accelerator::Accelerator,
        generate::{GenerationConfig, Prompt, PromptState},
        pipeline::{Pipeline, PipelineOptions, TextAndImages},
    },
    study::counted,
};
use scored::{ClassLogits, ScoredFile, ScoredHeader, hash_of};

/// Arguments of `calibrate`.
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// Model and device.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Validation set, which the model was not trained on: JSONL in ms-swift's format, or
    /// `phantom:SEED:FROM..TO[:STYLE]`. Only its images and reports are used, not its questions.
    #[arg(long, value_name = "DATA")]
    pub data: String,
    /// File to write; by default calibration.json in the folder of the adapter, or of the model without one.
    #[arg(long, value_name = "FILE.json")]
    pub output: Option<PathBuf>,
    /// Largest share of errors among answers called present, and among those called absent.
    #[arg(long, value_name = "F", default_value_t = 0.05)]
    pub target_error: f64,
    /// How an uncertain finding of a report is counted.
    #[arg(long, value_enum, default_value = "present")]
    pub uncertain: Uncertain,
    /// Table of words that findings are read with, in the reports of the set and in those that the model draws: `openi`
    /// (machine-translated), `hospital`, `english`, or a file in the form of theirs; guessed from the reports of the set
    /// when not given. Phantoms know their own findings.
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub rules: Option<String>,
    /// Question to the model; `infer` has to ask the same.
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_PROMPT)]
    pub prompt: String,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Form of the score; forms over sentences are fitted together and compared.
    #[arg(long, value_enum, default_value_t = ScoreForm::default())]
    pub form: ScoreForm,
    /// With --form drawn: reports that are drawn of each image; 16 by default.
    #[arg(long, value_name = "N")]
    pub draws: Option<usize>,
    /// With forms of sentences: beginning of the answer, before each sentence; words after which the reports of the
    /// model name findings, such as their heading of the impression.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub lead: String,
    /// With forms of sentences: after what the sentences of each class are put, at the beginning of the answer alone, or
    /// also after each clause of the report that the model writes first, which takes some ten times as long.
    #[arg(long, value_enum, default_value_t = SentenceContext::default())]
    pub context: SentenceContext,
    /// Use only this many rows, the first.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
}

/// Runs `calibrate`: a table goes to stdout.
///
/// # Errors
/// Whatever keeps a row from being read or a file from being written; a set without findings.
pub fn run(mut args: CalibrateArgs) -> Result<()> {
    if !(args.target_error > 0.0 && args.target_error < 0.5) {
        bail!(UsageError(format!(
            "--target-error is {}, expected more than 0 and less than 0.5",
            args.target_error
        )));
    }
    if args.limit == Some(0) {
        bail!(UsageError("--limit is 0, expected at least 1".into()));
    }
    check_form(&args)?;
    args.model.find(Want::Checkpoint)?;
    let options = pipeline_options(&args.model, DType::F32);
    let output = args.output.clone().unwrap_or_else(|| {
        let folder = options.adapter.as_ref().unwrap_or(&options.model);
        folder.join(CALIBRATION_FILE)
    });
    // Before the model has worked, not after.
    let folder = output.parent().unwrap_or(Path::new(""));
    if !folder.as_os_str().is_empty() && !folder.is_dir() {
        bail!(UsageError(format!(
            "`{}`: its folder is not there; make `{}` first",
            output.display(),
            folder.display()
        )));
    }
    let device = one_device(&args.model.device)?;
    args.model
        .adapter
        .check_base(&options.model, &options.gguf)?;
    let data = Dataset::open(&shipped_data(&args.data))?;
    for remark in data.remarks() {
        eprintln!("note: {remark}");
    }
    let rows = data.len().min(args.limit.unwrap_or(usize::MAX));
    let policy = UncertainPolicy::from(args.uncertain);
    let Truths {
        classes: truths,
        said_by: truth,
        rules,
    } = truths(&data, rows, args.rules.as_deref(), policy)?;
    let parts = TextAndImages::load(&options)?;
    let asked = |form| {
        asked_model(
            &options,
            &parts,
            &AskedHow {
                prompt: &args.prompt,
                system: args.system.as_deref(),
                lead: &args.lead,
                context: args.context,
                form,
                draws: args.draws.unwrap_or(DRAWN_REPORTS),
                rules: rules.identity(),
            },
        )
    };
    let model = asked(args.form)?;
    let work = Scoring {
        options: options.clone(),
        data: data.clone(),
        rows,
        asked: model.clone(),
        rules: rules.clone(),
        uncertain: policy,
        output: output.clone(),
    };
    let (scored, partial) = run_on(device, args.model.load.dtype.map(DType::from), work)??;
    let reports = scored.iter().filter(|row| row.is_some()).count();
    if reports == 0 {
        bail!(
            "`{}`: no row has an image; there is nothing to calibrate on",
            data.name()
        );
    }
    if reports < rows {
        eprintln!(
            "note: {} no image and {} left out",
            counted(rows - reports, "row has", "rows have"),
            if rows - reports == 1 { "is" } else { "are" }
        );
    }
    let facts = CalibrationData {
        name: args.data.clone(),
        fingerprint: data.fingerprint().to_owned(),
        reports,
        without_image: rows - reports,
        truth,
        uncertain: policy,
    };
    let fit = |form: ScoreForm, model| {
        let cases = cases(&scored, &truths, form);
        let calibration = Calibration::of(model, facts.clone(), &cases, args.target_error);
        (calibration, cases)
    };
    let (calibration, cases) = fit(args.form, model);
    if calibration
        .classes
        .values()
        .all(|class| class.positives == 0)
    {
        bail!(
            "`{}`: no report has a finding of the classes; expected reports with and without findings",
            data.name()
        );
    }
    let mut fits = vec![(calibration, cases)];
    for form in ScoreForm::value_variants() {
        if *form != args.form && form.is_of_sentences() == args.form.is_of_sentences() {
            fits.push(fit(*form, asked(*form)?));
        }
    }
    let calibration = &fits[0].0;
    if output.exists() {
        eprintln!("`{}` is replaced", output.display());
    }
    calibration.save(&output)?;
    partial.remove();
    let text = table(&fits);
    unless_closed(stdout().write_all(text.as_bytes())).context("cannot write to stdout")?;
    for note in notes(calibration) {
        eprintln!("note: {note}");
    }
    eprintln!("calibration: `{}`", output.display());
    Ok(())
}

/// Refuses options that the form has no use for.
fn check_form(args: &CalibrateArgs) -> Result<()> {
    if args.form.is_of_sentences() {
        if args.draws.is_some() {
            bail!(UsageError(format!(
                "--draws is for --form drawn, and --form is {}; leave it out",
                args.form
            )));
        }
        return Ok(());
    }
    if !(1..=MOST_DRAWN).contains(&args.draws.unwrap_or(DRAWN_REPORTS)) {
        bail!(UsageError(format!(
            "--draws is {}, expected 1 to {MOST_DRAWN}",
            args.draws.unwrap_or(0)
        )));
    }
    let of_sentences = [
        ("--lead", !args.lead.is_empty()),
        ("--context report", args.context != SentenceContext::Start),
    ];
    match of_sentences.iter().find(|(_, given)| *given) {
        Some((option, _)) => bail!(UsageError(format!(
            "{option} is for forms of sentences, and reports are drawn; leave it out, or name --form sum, mean or stated"
        ))),
        None => Ok(()),
    }
}

/// What is there, and who says so.
struct Truths {
    /// Which classes each report has, `None` where one is left out.
    classes: Vec<Vec<(Finding, Option<bool>)>>,
    /// The table of words, or `phantom`.
    said_by: String,
    /// What reports that the model draws are read with.
    rules: Arc<RuleSet>,
}

fn truths(
    data: &Dataset,
    rows: usize,
    rules: Option<&str>,
    policy: UncertainPolicy,
) -> Result<Truths> {
    let classes = || WORDINGS.iter().map(|class| class.finding);
    if data.drawn_findings(0).is_some() {
        if rules.is_some() {
            bail!(UsageError(
                "--rules: phantoms know their findings, no report is read; leave it out".into()
            ));
        }
        let of_row = |row| {
            let there: BTreeSet<Finding> = data
                .drawn_findings(row)
                .into_iter()
                .flatten()
                .flat_map(classes_of)
                .copied()
                .collect();
            classes()
                .map(|class| (class, Some(there.contains(&class))))
                .collect()
        };
        let reports: Vec<String> = (0..rows).filter_map(|row| data.text(row).answer).collect();
        return Ok(Truths {
            classes: (0..rows).map(of_row).collect(),
            said_by: "phantom".to_owned(),
            rules: Arc::new(RuleSet::guess(reports.iter().map(String::as_str))),
        });
    }
    let reports = (0..rows)
        .map(|row| match data.text(row).answer {
            Some(answer) => Ok(split_thinking(&answer, false).1),
            None => bail!(
                "{}: the last question has no answer; expected the true report as the last message",
                data.study_row(row).name
            ),
        })
        .collect::<Result<Vec<String>>>()?;
    let rules = RuleSet::choose(rules, reports.iter().map(String::as_str))?;
    eprintln!("{}", rules.told());
    let of_report = |report: &String| {
        let labels = rules.label(report);
        classes()
            .map(|class| (class, policy.positive(class, labels.status(class))))
            .collect()
    };
    Ok(Truths {
        classes: reports.iter().map(of_report).collect(),
        said_by: rules.name.clone(),
        rules: Arc::new(rules),
    })
}

/// The classes of what a phantom shows, as its report is read: a consolidation is described as an opacity.
fn classes_of(finding: phantom::Finding) -> &'static [Finding] {
    match finding {
        phantom::Finding::Cardiomegaly => &[Finding::Cardiomegaly],
        phantom::Finding::Nodule(..) => &[Finding::LungLesion],
        phantom::Finding::Consolidation(..) => &[Finding::Consolidation, Finding::LungOpacity],
        phantom::Finding::PleuralEffusion(_) => &[Finding::PleuralEffusion],
        phantom::Finding::Pneumothorax(_) => &[Finding::Pneumothorax],
        phantom::Finding::Pacemaker => &[Finding::SupportDevices],
    }
}

/// Logits beside their truths, by class.
fn cases(
    scored: &[Option<Vec<ClassLogits>>],
    truths: &[Vec<(Finding, Option<bool>)>],
    form: ScoreForm,
) -> ClassCases {
    let mut cases = ClassCases::new();
    for (classes, truths) in scored.iter().zip(truths) {
        for (class, (finding, truth)) in classes.iter().flatten().zip(truths) {
            debug_assert_eq!(class.finding, *finding);
            let of_class = cases.entry(*finding).or_default();
            of_class.extend(class.logit(form).zip(*truth));
        }
    }
    cases
}

/// Work for a model on a device: what it says of all classes about the images of each row.
struct Scoring {
    options: PipelineOptions,
    data: Dataset,
    rows: usize,
    asked: AskedModel,
    /// What drawn reports are read with.
    rules: Arc<RuleSet>,
    /// What a drawn report that doubts a finding counts as.
    uncertain: UncertainPolicy,
    /// File of the calibration; rows are kept beside it until that is written.
    output: PathBuf,
}

impl DeviceTask for Scoring {
    type Output = Result<(Vec<Option<Vec<ClassLogits>>>, ScoredFile)>;

    fn run<B: Accelerator>(self, device: B::Device, dtype: DType) -> Self::Output {
        let options = PipelineOptions {
            dtype,
            ..self.options.clone()
        };
        // Before the model is loaded: a file of another run is an error.
        let dtype_name = dtype_text(dtype).to_owned();
        let header = ScoredHeader::new(
            &self.asked,
            self.uncertain,
            dtype_name,
            self.data.fingerprint(),
        );
        let mut file = ScoredFile::open(&self.output, &header)?;
        let pipeline = loading(|on_progress| Pipeline::<B>::load(&options, device, on_progress))?;
        expect_named_weights(&options, &pipeline)?;
        let parts = &pipeline.parts;
        if let Some(limits) = parts.pixel_limits_to_know() {
            eprintln!("{limits}");
        }
        let weights = (dtype, pipeline.model.quantization());
        prepare_kernels::<B>(&parts.config, weights, &pipeline.device, 1);
        let sentences = sentences(parts, &self.asked.lead)?;
        let mut progress = Progress::new("findings", self.rows as u64, Unit::Items);
        if file.rows() > 0 {
            let there = file.rows().min(self.rows);
            progress.say(&format!(
                "going on: {there} of {} rows are there already",
                self.rows
            ));
        }
        let mut skipped = 0;
        let mut scored = Vec::with_capacity(self.rows);
        for row in 0..self.rows {
            let context = || format!("`{}`, row {}", self.data.name(), self.data.row(row));
            let pictures = self.data.read(row, parts)?.pictures;
            let images = hash_of(&pictures);
            if let Some(logits) = file.found(row, &images) {
                scored.push(logits.clone());
                skipped += 1;
                progress.skip(skipped);
                progress.set(row as u64 + 1, self.rows as u64);
                continue;
            }
            let logits = if pictures.is_empty() {
                None
            } else {
                let patches = patches(parts, &pictures).with_context(context)?;
                let system = self.asked.system.as_deref();
                let prompt = parts.prompt(system, &self.asked.prompt, patches)?;
                let classes = self.evidence(&pipeline, &sentences, &prompt);
                let classes = classes.with_context(context)?.into_iter();
                let (context, policy) = (self.asked.context, self.uncertain);
                let logits = classes.map(|class| ClassLogits::of(&class, context, policy));
                Some(logits.collect::<Vec<_>>())
            };
            file.add(row, images, logits.clone())?;
            scored.push(logits);
            progress.set(row as u64 + 1, self.rows as u64);
        }
        progress.finish();
        for sentence in self.data.image_remarks().sentences() {
            eprintln!("note: {sentence}");
        }
        Ok((scored, file))
    }
}

impl Scoring {
    /// What the model says of all classes about one image.
    fn evidence<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        sentences: &FindingSentences,
        prompt: &Prompt,
    ) -> Result<Vec<ClassEvidence>> {
        if !self.asked.form.is_of_sentences() {
            let reports = draw(pipeline, prompt, self.asked.draws)?;
            return Ok(of_reports(&self.rules, &reports));
        }
        let (state, report) = match self.asked.context {
            SentenceContext::Start => (pipeline.prompt_state(prompt)?, None),
            SentenceContext::Report => {
                let (state, report) = answered(pipeline, prompt)?;
                (state, Some(report))
            }
        };
        ask(sentences, pipeline, state, report.as_deref())
    }
}

/// The report that `infer` writes without further options, and the prompt to go on from.
fn answered<B: Accelerator>(
    pipeline: &Pipeline<B>,
    prompt: &Prompt,
) -> Result<(PromptState<B>, String)> {
    let prompts = std::slice::from_ref(prompt);
    let settings = GenerationConfig::default();
    let mut kept = Vec::new();
    let (answers, _) =
        pipeline.answer_and_keep(prompts, &settings, &[], Some(&mut kept), &mut |_, _| {})?;
    let state = kept.pop().context("the prompt was not kept")?;
    Ok((state, answers.into_iter().map(|one| one.report).collect()))
}

/// The calibration first, others of the same logits for comparison.
fn table(fits: &[(Calibration, ClassCases)]) -> String {
    let calibration = &fits[0].0;
    let number = |value: f64| {
        if value.is_nan() {
            "–".to_owned()
        } else {
            format!("{value:.3}")
        }
    };
    let threshold =
        |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.4}"));
    let auc = |cases: &ClassCases, finding: &Finding| {
        let cases = cases.get(finding).into_iter().flatten();
        let ranked = Ranked::new(cases.map(|(logit, truth)| (*logit, *truth, 0)).collect());
        number(ranked.auc(&[1.0]))
    };
    let heads = fits
        .iter()
        .map(|(one, _)| format!(" {:>10}", format!("AUC {}", one.model.form)));
    let mut text = format!(
        "{:27} {:>5} {:>5}{} {:>7} {:>9} {:>9} {:>8} {:>6}\n",
        "class",
        "with",
        "none",
        heads.collect::<String>(),
        "bias",
        "absent ≤",
        "present ≥",
        "decided",
        "wrong"
    );
    for (finding, class) in &calibration.classes {
        let aucs = fits
            .iter()
            .map(|(_, cases)| format!(" {:>10}", auc(cases, finding)));
        text.push_str(&format!(
            "{:27} {:>5} {:>5}{} {:>7.2} {:>9} {:>9} {:>8} {:>6}\n",
            finding.key(),
            class.positives,
            class.negatives,
            aucs.collect::<String>(),
            class.bias,
            threshold(class.absent_to),
            threshold(class.present_from),
            class.decided.decided,
            class.decided.errors
        ));
    }
    text.push_str(&format!(
        "\non this set, classes that occur, together     {:>8} {:>8} {:>8} {:>9}\n",
        "loss", "ECE", "Brier", "coverage"
    ));
    for (calibration, _) in fits {
        let form = calibration.model.form;
        for (when, fitness) in [
            ("before", &calibration.before),
            ("after, temperature", &calibration.after),
        ] {
            let Some(Fitness {
                loss,
                ece,
                brier,
                coverage,
            }) = fitness
            else {
                continue;
            };
            let temperature = if when == "before" {
                String::new()
            } else {
                format!(" {:.2}", calibration.temperature)
            };
            let of = match form {
                ScoreForm::Drawn => " reports",
                ScoreForm::Sum | ScoreForm::Mean => " of tokens",
                ScoreForm::Stated => "",
            };
            let label = format!("  {form}{of}, {when}{temperature}");
            text.push_str(&format!(
                "{label:45} {loss:>8.4} {ece:>8.4} {brier:>8.4} {:>7.1} %\n",
                100.0 * coverage
            ));
        }
    }
    text.push_str(&format!(
        "coverage: share of answers that can be given with {:.1} % of them wrong\n",
        100.0 * calibration.target_error
    ));
    text
}

/// What a reader of the result has to know.
fn notes(calibration: &Calibration) -> Vec<String> {
    let mut notes = Vec::new();
    if calibration.useless {
        notes.push(
            "the logits do not rise with the truth: this model does not see these findings, and its probabilities say nothing"
                .to_owned(),
        );
    }
    let few: Vec<&str> = calibration
        .classes
        .iter()
        .filter(|(_, class)| class.positives.min(class.negatives) < FEWEST_CASES)
        .map(|(finding, _)| finding.key())
        .collect();
    if !few.is_empty() {
        notes.push(format!(
            "always undecided, since fewer than {FEWEST_CASES} reports have or lack them: {}",
            few.join(", ")
        ));
    }
    notes
}
