//! Reports that a run writes about held-out studies: before, after, and with the images of other studies.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, sync::Arc};

use anyhow::Result;
use serde_json::{Value, json};

use super::print_line;

use crate::{
    adapters::lora::merge::merge_unless_quantised,
    base::files::{FileError, write_atomic},
    commands::{
        progress::{Progress, Unit},
        question::{image_counts, question_about},
    },
    dataset::{Dataset, image_remarks::RemarkCount},
    eval::{
        baselines::systems::swapped,
        findings::{
            RuleSet, UncertainPolicy,
            score::{StudyTexts, score},
        },
        text::{rouge::rouge_l, segment::characters},
    },
    phantom::{finding_f1, findings_in_report},
    processor::message::split_thinking,
    qwen3_vl::Qwen3Vl,
    runtime::{
        accelerator::Accelerator,
        generate::{GenerationConfig, Prompt, generate},
        pipeline::TextAndImages,
    },
    train::{
        config::TrainConfig,
        generation::{Generated, GenerationScorer, GenerationScores},
        outcome::TrainError,
        records::{METRICS, Row, read_rows},
        run::RunResult,
        words::counted,
    },
};

/// F1 of findings with side and zone, which the reports of drawn studies state in known words.
const SIDE_AND_ZONE: &str = "eval_finding_side_zone_f1";

/// What the table at the end shows, with its names there.
const SHOWN: [(&str, &str); 5] = [
    ("eval_loss", "loss"),
    ("eval_token_acc", "token accuracy"),
    ("eval_rouge_l", "character ROUGE-L"),
    ("eval_finding_f1", "finding F1"),
    (SIDE_AND_ZONE, "finding F1, side and zone"),
];

/// Generates reports for some rows of a data set, about the images of the rows beside them.
fn generate_reports<B: Accelerator>(
    model: &Qwen3Vl<B>,
    parts: &TextAndImages,
    data: &Dataset,
    rows: &[(usize, usize)],
    max_new_tokens: usize,
    device: &B::Device,
) -> Result<Vec<Generated>, TrainError> {
    let settings = GenerationConfig {
        max_new_tokens,
        eos_token_ids: parts.eos_token_ids.clone(),
        ..GenerationConfig::default()
    };
    let question = |(row, shown): &(usize, usize)| -> Result<(Prompt, String), TrainError> {
        let (prompt, truth) = data.question(*row, parts)?;
        if row == shown {
            return Ok((prompt, truth));
        }
        let prompt = question_about(data, parts, *row, *shown)
            .map_err(|error| TrainError::Other(format!("{error:#}")))?;
        Ok((prompt, truth))
    };
    let (prompts, truths): (Vec<_>, Vec<_>) = rows
        .iter()
        .map(question)
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .unzip();
    let (generations, _) = generate(
        model,
        &parts.config,
        &prompts,
        &settings,
        device,
        &mut |_, _| None,
    )
    .map_err(|error| TrainError::Other(error.to_string()))?;
    let mut all = Vec::with_capacity(generations.len());
    for (generation, truth) in generations.into_iter().zip(truths) {
        let text = parts
            .tokenizer
            .decode(&generation.token_ids, true)
            .map_err(|error| TrainError::Other(error.to_string()))?;
        let (thinking, report) = split_thinking(&text, parts.template.opens_thinking());
        all.push(Generated {
            truth: split_thinking(&truth, false).1,
            thinking,
            report,
        });
    }
    Ok(all)
}

/// The first `count` samples of a data set about their own images, some at a time.
fn batches(data: &Dataset, count: usize, batch_size: usize) -> Vec<Vec<(usize, usize)>> {
    let rows: Vec<(usize, usize)> = (0..count.min(data.len())).map(|row| (row, row)).collect();
    rows.chunks(batch_size.max(1)).map(<[_]>::to_vec).collect()
}

/// Mean character ROUGE-L F1 and finding F1 of some reports; of drawn studies side and zone as well.
fn scores(data: &Dataset, reports: &[Generated]) -> GenerationScores {
    let rouge: f64 = reports
        .iter()
        .map(|one| rouge_l(&characters(&one.report), &characters(&one.truth)))
        .sum::<f64>()
        / reports.len().max(1) as f64;
    let texts: Vec<StudyTexts<'_>> = reports
        .iter()
        .map(|one| StudyTexts {
            truth: &one.truth,
            prediction: &one.report,
            thinking: one.thinking.as_deref(),
        })
        .collect();
    let rules = RuleSet::guess(texts.iter().map(|text| text.truth));
    let findings = score(&rules, &texts, UncertainPolicy::AsPresent);
    let mut all = vec![
        ("eval_rouge_l", rouge),
        ("eval_finding_f1", findings.micro.f1),
    ];
    let name = data.name();
    if name.starts_with("phantom:") || name.contains("data/sample") {
        let stated = |one: &Generated| {
            (
                findings_in_report(&one.truth),
                findings_in_report(&one.report),
            )
        };
        let labels: Vec<_> = reports.iter().map(stated).collect();
        let exact = finding_f1(labels.iter().map(|(truth, stated)| (truth, stated)));
        all.push((SIDE_AND_ZONE, exact.f1()));
    }
    all
}

/// Where a validation's reports are kept.
fn kept_reports(run: &Path, step: usize) -> std::path::PathBuf {
    run.join("generated").join(format!("step-{step}.jsonl"))
}

pub(super) fn scorer<B: Accelerator>(
    config: &TrainConfig,
    parts: &Arc<TextAndImages>,
    data: &Dataset,
) -> GenerationScorer<B> {
    let (parts, data, tokens) = (parts.clone(), data.clone(), config.eval_max_new_tokens);
    let batches = batches(
        &data,
        config.eval_generate,
        config.per_device_eval_batch_size,
    );
    let run = config.output_dir.clone();
    let count = batches.len();
    let scored = data.clone();
    let generate = move |model: &Qwen3Vl<B>, device: &B::Device, batch: usize| {
        generate_reports(model, &parts, &data, &batches[batch], tokens, device)
    };
    let score = move |reports: Vec<Generated>, step| {
        let path = kept_reports(&run, step);
        let folder = path.parent().unwrap_or(&run);
        fs::create_dir_all(folder).map_err(|cause| FileError::write(folder, cause))?;
        write_atomic(&path, |out| {
            for one in &reports {
                serde_json::to_writer(
                    &mut *out,
                    &json!({
                        "truth": one.truth,
                        "report": one.report,
                        "thinking": one.thinking,
                    }),
                )?;
                out.write_all(b"\n")?;
            }
            Ok(())
        })?;
        Ok(scores(&scored, &reports))
    };
    GenerationScorer {
        batches: count,
        generate: Arc::new(generate),
        score: Box::new(score),
    }
}

/// What a run came to on held-out studies.
#[derive(Debug, Default)]
pub(super) struct HeldOutScores {
    /// Reports that were scored.
    reports: usize,
    before: BTreeMap<String, f64>,
    after: BTreeMap<String, f64>,
    swapped: BTreeMap<String, f64>,
    /// The table of words that the findings of the reports are read with; empty without reports.
    rules: String,
}

impl HeldOutScores {
    /// Reads the validations of a run and lets the model write about swapped images.
    pub(super) fn of<B: Accelerator>(result: &RunResult<B>, device: &B::Device) -> Result<Self> {
        let config = &result.state.config;
        let rows = read_rows(&config.output_dir.join(METRICS))?.rows;
        let of_step = |step: usize| {
            let row = rows.iter().rev().find(|row| {
                row.get("eval_loss").is_some() && row.get("step") == Some(&json!(step))
            });
            row.map(numbers).unwrap_or_default()
        };
        let mut outcome = Self {
            before: of_step(0),
            after: of_step(result.state.step),
            ..Self::default()
        };
        let Some(data) = result
            .validation
            .as_ref()
            .filter(|_| config.eval_generate > 0)
        else {
            return Ok(outcome);
        };
        outcome.reports = config.eval_generate.min(data.len());
        let truths: Vec<String> = (0..outcome.reports)
            .map(|row| data.text(row).answer.unwrap_or_default())
            .collect();
        outcome.rules = RuleSet::guess(truths.iter().map(String::as_str)).name;
        let images = image_counts(data, 0..outcome.reports, &result.parts)?;
        // Studies are distinguished by what is true of them: the views of one share its report.
        let studies: Vec<&str> = truths.iter().map(String::as_str).collect();
        let others = swapped(&studies, &images);
        if others.iter().enumerate().all(|(row, other)| row == *other) {
            return Ok(outcome);
        }
        let pairs: Vec<(usize, usize)> = others.into_iter().enumerate().collect();
        let model = merge_unless_quantised(result.model.clone());
        let what = "reports, images swapped between studies";
        let mut progress = Progress::new(what, pairs.len() as u64, Unit::Items);
        let mut reports = Vec::new();
        for rows in pairs.chunks(config.per_device_eval_batch_size) {
            let tokens = config.eval_max_new_tokens;
            reports.extend(generate_reports(
                &model,
                &result.parts,
                data,
                rows,
                tokens,
                device,
            )?);
            progress.set(reports.len() as u64, pairs.len() as u64);
        }
        progress.finish();
        let scores = scores(data, &reports).into_iter();
        outcome.swapped = scores
            .map(|(name, value)| (name.to_string(), value))
            .collect();
        Ok(outcome)
    }

    /// A small table; `None` where nothing was measured but the end.
    pub(super) fn table(&self) -> Option<String> {
        if self.before.is_empty() && self.swapped.is_empty() {
            return None;
        }
        let mut text = format!(
            "{:<26} {:>8} {:>8} {:>15}\n",
            "held-out studies", "before", "after", "images swapped"
        );
        let cell = |values: &BTreeMap<String, f64>, key: &str| {
            let value = values.get(key);
            value.map_or_else(|| "-".to_string(), |value| format!("{value:.3}"))
        };
        for (key, name) in SHOWN {
            if [&self.before, &self.after]
                .iter()
                .any(|all| all.contains_key(key))
            {
                let [before, after, swapped] =
                    [&self.before, &self.after, &self.swapped].map(|values| cell(values, key));
                let _ = writeln!(text, "{name:<26} {before:>8} {after:>8} {swapped:>15}");
            }
        }
        let _ = write!(
            text,
            "reports: {}; loss over the whole validation set",
            self.reports
        );
        if !self.rules.is_empty() {
            let _ = write!(text, "; findings are read with the rules `{}`", self.rules);
        }
        Some(text)
    }

    /// Writes `result.json` into the run's folder.
    pub(super) fn save<B: Accelerator>(&self, result: &RunResult<B>, seconds: f64) -> Result<()> {
        let RunResult { state, ending, .. } = result;
        let values = |values: &BTreeMap<String, f64>| match values.is_empty() {
            true => Value::Null,
            false => json!(values),
        };
        let record = json!({
            "ending": ending.name(),
            "step": state.step,
            "seconds": (seconds * 10.0).round() / 10.0,
            "best": state.best.map(|(step, value)| json!({
                "step": step,
                "metric": state.config.metric_for_best_model,
                "value": value,
            })),
            "held_out": {
                "reports": self.reports,
                "finding_rules": self.rules,
                "before": values(&self.before),
                "after": values(&self.after),
                "images_swapped": values(&self.swapped),
            },
            "report_command": result.reported,
            "image_remarks": image_remarks(result)
                .iter()
                .map(|remark| json!({
                    "code": remark.kind.code(),
                    "images": remark.images,
                    "first": remark.first,
                    "text": remark.text,
                }))
                .collect::<Vec<_>>(),
        });
        write_atomic(&state.config.output_dir.join("result.json"), |out| {
            serde_json::to_writer_pretty(&mut *out, &record)?;
            out.write_all(b"\n")
        })?;
        Ok(())
    }
}

/// What the images of the training and of the validation data gave cause to remark.
pub(super) fn image_remarks<B: Accelerator>(result: &RunResult<B>) -> Vec<RemarkCount> {
    let sets = [Some(&result.data), result.validation.as_ref()];
    sets.into_iter()
        .flatten()
        .flat_map(|data| data.image_remarks().counts())
        .collect()
}

/// The measured values of a validation's row.
fn numbers(row: &Row) -> BTreeMap<String, f64> {
    row.iter()
        .filter(|(name, _)| name.starts_with("eval_") && *name != "eval_seconds")
        .filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)))
        .collect()
}

/// Prints truth beside answer for held-out samples.
pub(super) fn show_examples<B: Accelerator>(
    result: &RunResult<B>,
    count: usize,
    device: &B::Device,
) -> Result<()> {
    let config = &result.state.config;
    let Some(data) = &result.validation else {
        return Ok(());
    };
    let count = count.min(data.len());
    // The last validation has written them already.
    let kept = fs::read_to_string(kept_reports(&config.output_dir, result.state.step));
    let kept: Vec<Value> = kept
        .unwrap_or_default()
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_string();
    let pairs: Vec<(String, String)> = if kept.len() >= count {
        let kept = kept.iter().take(count);
        kept.map(|row| (text(row, "truth"), text(row, "report")))
            .collect()
    } else {
        let model = merge_unless_quantised(result.model.clone());
        let mut all = Vec::new();
        for rows in batches(data, count, config.per_device_eval_batch_size) {
            let tokens = config.eval_max_new_tokens;
            all.extend(generate_reports(
                &model,
                &result.parts,
                data,
                &rows,
                tokens,
                device,
            )?);
        }
        all.into_iter().map(|one| (one.truth, one.report)).collect()
    };
    for (index, (truth, report)) in pairs.iter().enumerate() {
        print_line(&format!("\nheld-out study {}", index + 1));
        print_line(&format!("  truth   {truth}"));
        print_line(&format!("  answer  {report}"));
    }
    if pairs.len() < data.len() {
        print_line(&format!(
            "\n{} shown of {}",
            pairs.len(),
            counted(data.len(), "held-out row", "held-out rows")
        ));
    }
    Ok(())
}
