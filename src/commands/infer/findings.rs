//! `infer --findings`: probabilities of findings beside the report, and where the two disagree.

use std::{fmt::Write, path::Path, sync::Arc};

use anyhow::{Result, bail};
use burn::tensor::DType;

use super::{
    args::InferArgs,
    findings_args::{Basis, FindingsArgs},
    record::{Record, RecordRemark},
    task::Task,
};
use crate::{
    base::files::{sha256_bytes, sha256_file},
    commands::{
        finding_probabilities::{AskedHow, asked_model},
        pipeline_options::pipeline_options,
        usage::UsageError,
    },
    eval::{
        findings::{RuleSet, Status},
        probability::{
            calibration::{AskedModel, CALIBRATION_FILE, Calibration, CalibrationError},
            evidence::ClassEvidence,
            judged::{CONFLICT, UNCALIBRATED, decision_word, judge, status_word},
            logit::{DRAWN_REPORTS, ScoreForm},
            thresholds::Decision,
        },
    },
    runtime::pipeline::{PipelineOptions, TextAndImages},
};

/// Code of the remark that the calibration is of something else.
const FORCED: &str = "findings_calibration_of_another_model";

/// Finds the calibration; to be called once before records are made.
///
/// # Errors
/// A calibration that is damaged, missing where it was named, or of another model; rules that are none.
pub(super) fn prepare(args: &mut InferArgs, tasks: &[Task]) -> Result<()> {
    if !args.findings.findings {
        return Ok(());
    }
    let asked = asked(args, tasks);
    let rules = match args.findings.rules.as_deref() {
        None => "guessed".to_owned(),
        Some(name) => {
            RuleSet::named(name)?;
            // Another table under the same name reads other findings.
            sha256_file(Path::new(name)).unwrap_or_else(|_| name.to_owned())
        }
    };
    let found = find(args, asked.as_ref())?;
    let key = match &found.calibration {
        Some(calibration) => sha256_bytes(serde_json::to_string(calibration)?.as_bytes()),
        None => format!("uncalibrated {} {DRAWN_REPORTS}", ScoreForm::default()),
    };
    let named = args.findings.rules.as_deref().map(RuleSet::named);
    let named = named.transpose()?;
    let of_calibration = found
        .calibration
        .as_ref()
        .and_then(|one| RuleSet::built_in(&one.model.rules));
    args.findings.basis = Some(Arc::new(Basis {
        key: format!("{rules} {key}"),
        rules: of_calibration.or(named),
        ..found
    }));
    Ok(())
}

/// A question and the system message before it.
type Asked = (String, Option<String>);

/// What all reports are the answer to; `None` if rows ask different things.
fn asked(args: &InferArgs, tasks: &[Task]) -> Option<Asked> {
    let mut asked = tasks.iter().filter_map(|task| match &task.row {
        None => Some((args.prompt().to_owned(), args.system.clone())),
        Some(_) => {
            let question = task.question()?;
            let system = question.system().or(args.system.as_deref());
            Some((question.text(), system.map(str::to_owned)))
        }
    });
    let first = asked.next()?;
    let earlier = |task: &Task| {
        let turns = task
            .question()
            .map(|one| one.sample.conversation.turns.len());
        turns.is_some_and(|turns| turns > 1)
    };
    (asked.all(|other| other == first) && !tasks.iter().any(earlier)).then_some(first)
}

fn find(args: &InferArgs, asked: Option<&Asked>) -> Result<Basis> {
    let none = |text: String| Basis {
        calibration: None,
        remark: Some((UNCALIBRATED, text)),
        key: String::new(),
        rules: None,
    };
    let uncalibrated = "the probabilities of findings are not calibrated and decide nothing";
    let options = pipeline_options(&args.model, DType::F32);
    if args.findings.no_calibration {
        return Ok(none(format!("{uncalibrated}, as --no-calibration says")));
    }
    if let Some(path) = &args.findings.calibration {
        return match Calibration::load(path)? {
            Some(calibration) => checked(args, asked, &options, path, calibration),
            None => bail!(UsageError(format!(
                "--calibration: there is no `{}`; `calibrate` writes one",
                path.display()
            ))),
        };
    }
    let in_folder = |folder: &Path| {
        let path = folder.join(CALIBRATION_FILE);
        Calibration::load(&path).map(|found| found.map(|calibration| (path, calibration)))
    };
    if let Some(adapter) = &options.adapter {
        if let Some((path, calibration)) = in_folder(adapter)? {
            return checked(args, asked, &options, &path, calibration);
        }
        // The base may have one of its own, which says nothing about the adapter.
        let Some((path, calibration)) = in_folder(&options.model)? else {
            return Ok(none(format!(
                "{uncalibrated}: there is no {CALIBRATION_FILE} beside adapter or model; `calibrate` makes one"
            )));
        };
        return match checked(args, asked, &options, &path, calibration) {
            Err(error) if is_of_another(&error) => Ok(none(format!(
                "{uncalibrated}: `{}` is of the model without this adapter; `calibrate --adapter` makes one",
                path.display()
            ))),
            found => found,
        };
    }
    match in_folder(&options.model)? {
        Some((path, calibration)) => checked(args, asked, &options, &path, calibration),
        None => Ok(none(format!(
            "{uncalibrated}: there is no {CALIBRATION_FILE} beside the model; `calibrate` makes one"
        ))),
    }
}

fn is_of_another(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<CalibrationError>();
    matches!(error, Some(CalibrationError::Other { .. }))
}

/// The calibration, if it fits model, adapter and question, or is forced.
fn checked(
    args: &InferArgs,
    asked: Option<&Asked>,
    options: &PipelineOptions,
    path: &Path,
    calibration: Calibration,
) -> Result<Basis> {
    let Some((question, system)) = asked else {
        bail!(UsageError(format!(
            "--findings: `{}` is a calibration for one question, and the rows ask several; leave it out with --no-calibration, or give rows of one question",
            path.display()
        )));
    };
    let parts = TextAndImages::load(options)?;
    let made_for = &calibration.model;
    // A table that is built in is at hand; a file has to be named again.
    let rules = match (RuleSet::built_in(&made_for.rules), &args.findings.rules) {
        (None, Some(name)) => RuleSet::named(name)?.identity().to_owned(),
        (None, None) => "none".to_owned(),
        (Some(_), _) => made_for.rules.clone(),
    };
    let here: AskedModel = asked_model(
        options,
        &parts,
        &AskedHow {
            prompt: question,
            system: system.as_deref(),
            lead: &made_for.lead,
            context: made_for.context,
            form: made_for.form,
            draws: made_for.draws,
            rules: &rules,
        },
    )?;
    let mut remark = None;
    if let Err(error) = calibration.check(path, &here) {
        if !args.findings.any_calibration {
            return Err(error.into());
        }
        let differences = made_for.differences(&here).join(", ");
        let text = format!(
            "the probabilities of findings are calibrated with `{}`, which was made for something else: here {differences}",
            path.display()
        );
        remark = Some((FORCED, text));
    }
    Ok(Basis {
        calibration: Some(calibration),
        remark,
        key: String::new(),
        rules: None,
    })
}

/// Puts probabilities into the record of a report, beside what the report says.
pub(super) fn fill(
    record: &mut Record,
    args: &FindingsArgs,
    rules: Option<&RuleSet>,
    classes: &[ClassEvidence],
) {
    let Some(basis) = &args.basis else {
        return;
    };
    let judged = judge(classes, basis.calibration.as_ref(), &record.report, rules);
    let remark = |code: &str, text: String| RecordRemark {
        code: code.to_owned(),
        text,
        image: None,
    };
    let conflicts = judged.conflicts.into_iter();
    record
        .remarks
        .extend(conflicts.map(|text| remark(CONFLICT, text)));
    if let Some((code, text)) = &basis.remark {
        record.remarks.push(remark(code, text.clone()));
    }
    record.calibrated = Some(basis.calibration.is_some());
    record.findings_rules = Some(judged.rules);
    record.findings = Some(judged.findings);
}

/// The probabilities of a report as lines for people; conflicts first, then from high to low. Classes that both
/// report and probability call absent are counted only.
pub(super) fn text(record: &Record) -> Option<String> {
    let findings = record.findings.as_ref()?;
    let calibrated = record.calibrated == Some(true);
    let mut text = String::from(if calibrated {
        "所见概率 findings, calibrated\n"
    } else {
        "所见概率 findings, NOT calibrated\n"
    });
    let mut shown: Vec<_> = findings
        .iter()
        .filter(|(_, one)| {
            one.conflict
                || one.decision != Some(Decision::Absent)
                || one.in_report > Some(Status::Absent)
        })
        .collect();
    shown.sort_by(|(_, a), (_, b)| {
        let order = b.conflict.cmp(&a.conflict);
        order.then(b.probability.total_cmp(&a.probability))
    });
    // Writing to a string cannot fail.
    for (finding, one) in &shown {
        let _ = writeln!(
            text,
            "  {:5.1} %  {:9}  {:27} report: {:9} {}{}",
            100.0 * one.probability,
            one.decision.map_or("", decision_word),
            finding.key(),
            one.in_report.map_or("", status_word),
            finding.chinese(),
            if one.conflict {
                "  !! 与报告矛盾 CONFLICT"
            } else {
                ""
            }
        );
    }
    let rest = findings.len() - shown.len();
    if rest > 0 {
        let _ = writeln!(text, "  {rest} more: absent in both");
    }
    Some(text.trim_end().to_owned())
}
