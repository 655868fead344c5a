//! What the loop measures and saves: steps, validations, checkpoints, curves.

use std::{fs, path::Path, time::Instant};

use burn::{
    data::dataloader::{DataLoaderIterator, Progress},
    module::AutodiffModule,
    train::{
        EventProcessorTraining, InferenceStep, Learner, LearnerEvent,
        SupervisedTrainingEventProcessor, TrainingItem,
    },
};
use serde_json::json;

use super::{
    chart::{chart_rows, training_chart},
    checkpoint::{self, CheckpointError},
    checkpoint_dir::Best,
    lines::StepWork,
    loss::LossTotals,
    objective::settings::Objective,
    outcome::{Ending, TrainError},
    records::{METRICS, Row, read_rows},
    replicas::{Evaluated, Replicas},
    report_command::Reported,
    step_numbers::{StepNumbers, StepOutput},
    strategy::{Components, LoopState},
    words::{counted, last_checkpoint},
};
use crate::{
    adapters::lora::merge::merge_unless_quantised,
    base::files::{FileError, write_atomic},
    batch::window::Window,
    runtime::accelerator::TrainAccelerator,
};

impl<B: TrainAccelerator> LoopState<B> {
    pub(super) fn note_step(
        &mut self,
        numbers: &StepNumbers,
        work: StepWork,
    ) -> Result<(), TrainError> {
        let step = self.state.step as u64;
        let memory = self.memory.peak();
        let mut row = json!({
            "step": step,
            "epoch": round(self.state.epoch, 6),
            "loss": numbers.loss,
            "token_acc": numbers.token_acc,
            "learning_rate": numbers.learning_rate,
            "grad_norm": (!numbers.skipped).then_some(numbers.grad_norm),
            "samples_per_second": round(numbers.samples_per_second, 3),
            "tokens_per_second": round(numbers.tokens_per_second, 1),
            "memory_gib": memory.map(|peak| round(peak.gib(), 3)),
            "memory_of": memory.map(|peak| peak.place()),
        });
        if let Some(sequences) = &numbers.sequences {
            let pairs = self.state.config.objective == Objective::Dpo;
            let mut values: Row = Row::new();
            for (name, value) in sequences.values(pairs) {
                values.insert(name.into(), value.into());
            }
            let first = self.state.step.saturating_sub(1);
            values.extend(self.rollout_rows.remove(&first).unwrap_or_default());
            for (name, value) in values {
                if let Some(value) = value.as_f64() {
                    self.draw_scalars(step, &[(format!("train/{name}").as_str(), value as f32)])?;
                }
                row[name] = value;
            }
        }
        if let Some(scale) = numbers.loss_scale {
            row["loss_scale"] = scale.into();
            row["skipped"] = numbers.skipped.into();
            self.draw_scalars(step, &[("train/loss_scale", scale as f32)])?;
        }
        let row = row.as_object().cloned().unwrap_or_default();
        let shown = shown_values(&row);
        self.note_row(row)?;
        self.draw_scalars(
            step,
            &[
                ("train/loss", numbers.loss as f32),
                ("train/token_acc", numbers.token_acc as f32),
                ("train/learning_rate", numbers.learning_rate as f32),
                ("train/grad_norm", numbers.grad_norm as f32),
                (
                    "train/samples_per_second",
                    numbers.samples_per_second as f32,
                ),
                ("train/tokens_per_second", numbers.tokens_per_second as f32),
                ("train/memory_gib", numbers.memory_gib as f32),
            ],
        )?;
        let (step, epoch) = (self.state.step, self.state.epoch);
        if let Some(line) = self.lines.add(step, epoch, numbers, work) {
            (self.tell)(&format!("{line}{shown}"));
        }
        Ok(())
    }

    /// Writes a row of `metrics.jsonl` and sends it to `report_command`.
    fn note_row(&mut self, row: Row) -> Result<(), TrainError> {
        self.metrics.append(&row)?;
        if let Some(report) = &mut self.report {
            report.row(&row);
        }
        Ok(())
    }

    fn draw_scalars(&mut self, step: u64, values: &[(&str, f32)]) -> Result<(), TrainError> {
        match &mut self.events {
            Some(events) => Ok(events.scalars(step, values)?),
            None => Ok(()),
        }
    }

    /// Tells `report_command` how the run ended and waits for it.
    pub(super) fn end_report(&mut self, result: &Result<Ending, TrainError>) -> Option<Reported> {
        let report = self.report.take()?;
        let step = self.state.step;
        Some(match result {
            Ok(ending) => report.finish(ending.name(), step, None),
            Err(error) => report.finish("failed", step, Some(&error.to_string())),
        })
    }

    /// Validates and saves; the trained weights are saved even if the validation fails.
    pub(super) fn validate_and_save(
        &mut self,
        learner: &Learner<Components<B>>,
        replicas: Option<&Replicas<B>>,
        processor: &mut SupervisedTrainingEventProcessor<Components<B>>,
    ) -> Result<bool, TrainError> {
        self.state.validation_due = false;
        match self.validate(learner, replicas, processor) {
            Ok(improved) => {
                let due = self.state.config.save_steps;
                let save_due = due > 0 && self.state.step.is_multiple_of(due);
                let last = self.state.step == self.total_steps;
                let patience = self.state.config.early_stopping_patience;
                let ends = patience > 0 && self.state.validations_without_gain >= patience;
                if improved || save_due || last || ends {
                    self.save(learner)?;
                }
                Ok(improved)
            }
            Err(error) => {
                self.state.validation_due = true;
                self.save(learner)?;
                Err(error)
            }
        }
    }

    /// Runs the validation set; says whether the metric for the best checkpoint improved.
    ///
    /// Where there are several devices, each takes a batch in turn. Before the first step there is no
    /// checkpoint that could be the best.
    pub(super) fn validate(
        &mut self,
        learner: &Learner<Components<B>>,
        replicas: Option<&Replicas<B>>,
        processor: &mut SupervisedTrainingEventProcessor<Components<B>>,
    ) -> Result<bool, TrainError> {
        if self.validation.is_empty() {
            return Ok(false);
        }
        let model = learner.model().valid();
        let mut totals = LossTotals::default();
        let started = Instant::now();
        let [_, epochs] = self.steps.progress(self.state.step);
        let at_once = replicas.map_or(1, Replicas::len);
        let mut starts_validation = true;
        let mut of_sets = Vec::new();
        for (label, validation) in &self.validation {
            let mut own = LossTotals::default();
            let mut batches = validation.stream();
            let mut evaluated: Vec<Evaluated> = Vec::new();
            let mut note = |(_, sums, tokens): Evaluated, seconds: f64, progress| {
                own.add(sums);
                let numbers = StepNumbers {
                    loss: sums.loss(),
                    token_acc: sums.token_accuracy(),
                    targets: sums.targets,
                    tokens_per_second: tokens as f64 / seconds,
                    starts_validation: std::mem::take(&mut starts_validation),
                    ..StepNumbers::default()
                };
                processor.process_valid(LearnerEvent::ProcessedItem(TrainingItem::new(
                    StepOutput::Numbers(numbers),
                    progress,
                    epochs.clone(),
                    Some(self.state.step),
                    None,
                )));
            };
            let begun = Instant::now();
            loop {
                let windows: Vec<Window> = batches.by_ref().take(at_once).collect();
                if windows.is_empty() {
                    break;
                }
                let facts: Vec<(usize, usize)> = windows
                    .iter()
                    .map(|window| (window.step, window.tokens))
                    .collect();
                let clock = Instant::now();
                let all_sums = match replicas {
                    Some(replicas) => replicas.evaluate(&learner.model(), windows)?,
                    None => windows
                        .into_iter()
                        .map(|window| InferenceStep::step(&model, window).totals())
                        .collect(),
                };
                let seconds = clock.elapsed().as_secs_f64();
                for (sums, (number, tokens)) in all_sums.into_iter().zip(facts) {
                    let one = (number, sums, tokens);
                    match self.cluster {
                        // In the order of all processes, once they are there.
                        Some(_) => evaluated.push(one),
                        None => note(one, seconds, DataLoaderIterator::progress(&batches)),
                    }
                }
            }
            if let Some(error) = validation.take_error() {
                return Err(error.into());
            }
            let done = DataLoaderIterator::progress(&batches);
            if done.items_processed < done.items_total {
                return Err(TrainError::Thread(
                    "the thread that prepares validation samples ended before its time".to_string(),
                ));
            }
            if let (Some(replicas), Some(_)) = (replicas, &self.cluster) {
                let all = replicas.evaluated(evaluated)?;
                let (count, seconds) = (all.len(), begun.elapsed().as_secs_f64());
                for (place, one) in all.into_iter().enumerate() {
                    note(one, seconds / count as f64, Progress::new(place + 1, count));
                }
            }
            totals.add(own);
            if self.validation.len() > 1 {
                of_sets.push((format!("eval_loss.{label}"), own.loss()));
                of_sets.push((format!("eval_token_acc.{label}"), own.token_accuracy()));
            }
        }
        if totals.targets == 0 {
            return Err(TrainError::NoTargets {
                data: match &self.state.config.val_data {
                    Some(name) => name.clone(),
                    None => format!("{} (held out)", self.state.config.train_data),
                },
            });
        }
        let mut values = vec![
            ("eval_loss", totals.loss()),
            ("eval_token_acc", totals.token_accuracy()),
        ];
        if let Some(scorer) = &self.scorer {
            let reports = match replicas {
                Some(replicas) => replicas.generate(&learner.model(), scorer)?,
                None => {
                    let merged = merge_unless_quantised(model.model.clone());
                    let mut reports = Vec::new();
                    for batch in 0..scorer.batches {
                        reports.extend((scorer.generate)(&merged, &self.devices[0], batch)?);
                    }
                    reports
                }
            };
            values.extend((scorer.score)(reports, self.state.step)?);
        }
        if totals.loss().is_finite() {
            self.good_steps = self.good_steps.max(self.state.step);
        }
        let step = self.state.step as u64;
        let mut row = Row::new();
        row.insert("step".into(), step.into());
        let all = values.iter().map(|(name, value)| (*name, *value));
        let of_sets = of_sets.iter().map(|(name, value)| (name.as_str(), *value));
        let all: Vec<(&str, f64)> = all.chain(of_sets).collect();
        for (name, value) in &all {
            row.insert((*name).into(), (*value).into());
        }
        row.insert(
            "eval_seconds".into(),
            round(started.elapsed().as_secs_f64(), 3).into(),
        );
        self.note_row(row)?;
        let scalars: Vec<(String, f32)> = all
            .iter()
            .map(|(name, value)| (name.replacen("eval_", "eval/", 1), *value as f32))
            .collect();
        let scalars: Vec<(&str, f32)> = scalars
            .iter()
            .map(|(name, value)| (name.as_str(), *value))
            .collect();
        self.draw_scalars(step, &scalars)?;
        let texts: Vec<String> = all
            .iter()
            .map(|(name, value)| format!("{name} {value:.4}"))
            .collect();
        (self.tell)(&format!("validation at step {step}: {}", texts.join("  ")));
        self.draw()?;
        if step == 0 {
            return Ok(false);
        }

        let config = &self.state.config;
        let value = values
            .iter()
            .find(|(name, _)| *name == config.metric_for_best_model)
            .map_or(f64::NAN, |(_, value)| *value);
        let improved = match self.state.best {
            None => value.is_finite(),
            Some((_, best)) if config.more_is_better() => value > best,
            Some((_, best)) => value < best,
        };
        if improved {
            self.state.best = Some((self.state.step, value));
            self.state.validations_without_gain = 0;
        } else {
            self.state.validations_without_gain += 1;
        }
        Ok(improved)
    }

    pub(super) fn save(&self, learner: &Learner<Components<B>>) -> Result<(), TrainError> {
        if !self.writes {
            return Ok(());
        }
        let step = self.state.step as u64;
        let model = learner.model();
        self.checkpoints.save(step, |dir| {
            checkpoint::write(
                dir,
                &model.model,
                &self.model_config,
                &self.lora,
                &self.optimizer,
                &self.state,
            )
            .and_then(|()| self.copy_metrics(dir))
            .map_err(CheckpointError::into_cause)
        })?;
        if let Some((best, value)) = self.state.best
            && self.checkpoints.path(best as u64).exists()
        {
            self.checkpoints.set_best(&Best {
                step: best as u64,
                metric: self.state.config.metric_for_best_model.clone(),
                value,
            })?;
        }
        self.checkpoints
            .prune(self.state.config.save_total_limit, step)?;
        if let Some(cluster) = &self.cluster {
            cluster.set_last(last_checkpoint(&self.checkpoints.path(step)));
        }
        self.draw()
    }

    /// The rows so far go with the checkpoint: a damaged `metrics.jsonl` is mended from them.
    fn copy_metrics(&self, checkpoint: &Path) -> Result<(), CheckpointError> {
        let (from, to) = (&self.output_dir.join(METRICS), checkpoint.join(METRICS));
        fs::copy(from, &to).map_err(|cause| FileError::write(&to, cause))?;
        Ok(())
    }

    /// Nothing is left out in silence.
    pub(super) fn tell_skipped(&self) {
        let skipped = self.loader.skipped();
        if skipped > 0 {
            (self.tell)(&format!(
                "over all epochs {} left out, longer than max_length {}",
                counted(skipped, "sample was", "samples were"),
                self.state.config.max_length
            ));
        }
    }

    pub(super) fn draw(&self) -> Result<(), TrainError> {
        let rows = read_rows(&self.output_dir.join(METRICS))?.rows;
        let svg = training_chart(&chart_rows(rows));
        write_atomic(&self.output_dir.join("training.svg"), |out| {
            out.write_all(svg.as_bytes())
        })?;
        Ok(())
    }
}

/// What a progress line shows of an objective.
fn shown_values(row: &Row) -> String {
    let names = [
        "reward",
        "held_out_reward",
        "kl",
        "entropy",
        "clip_share",
        "completion_tokens",
        "reward_margin",
        "preferred_share",
    ];
    let values = names.iter().filter_map(|name| {
        let value = row.get(*name)?.as_f64()?;
        Some(format!("  {} {value:.4}", name.replace('_', " ")))
    });
    values.collect()
}

fn round(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}
