//! Rollouts: answers drawn for some questions, their rewards, and the windows that learn from them.
//!
//! All of a rollout is a function of the weights, the seed and its number, so that a resumed run draws the same
//! answers. A run stops between rollouts only, and its checkpoints hold none.

use std::{
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use burn::prelude::*;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::{
    advantages::{advantages, share_without_difference},
    reference::Reference,
    rewards::{Answered, RewardTable, Rewards},
    watch::RewardWatch,
};
use crate::{
    base::{
        files::{FileError, write_atomic},
        seeds::mix,
    },
    batch::{
        micro_batch::{IGNORE_INDEX, MicroBatch},
        sequences::{SequenceCounts, Sequences},
        window::Window,
    },
    dataset::{
        Dataset, EncodedSample,
        loader::{Overlong, WindowLoader, dealt_out},
    },
    processor::message::split_thinking,
    qwen3_vl::Qwen3Vl,
    runtime::{
        accelerator::Accelerator,
        generate::{FinishReason, GenerationConfig, Prompt, SamplingConfig, generate},
        pipeline::TextAndImages,
    },
    train::{
        config::{RolloutPlan, TrainConfig},
        generation::GenerationScorer,
        outcome::TrainError,
        records::Row,
        scores::token_scores,
        words::Tell,
    },
};

/// Tells the seeds of draws from those of other random numbers of a run.
const DRAWS: u64 = 0x6f6c_6c6f_7574;

/// Most answers of a rollout that are written to the run's folder.
const WRITTEN: usize = 64;

/// An answer that was drawn.
#[derive(Debug, Clone)]
struct Drawn {
    token_ids: Vec<u32>,
    finish_reason: FinishReason,
}

/// What makes the rollouts of a run.
pub struct Rollouts {
    data: Dataset,
    parts: Arc<TextAndImages>,
    /// Joins answers to micro-batches.
    loader: WindowLoader,
    rewards: Rewards,
    held_out: Rewards,
    config: TrainConfig,
    plan: RolloutPlan,
    devices: usize,
    reference: Reference,
    /// Steps of an epoch.
    an_epoch: usize,
    tell: Tell,
}

/// A rollout, ready to be learnt from.
pub struct Rollout {
    /// A window for each optimizer step.
    pub windows: Vec<Window>,
    /// What it came to, for the row of its first step.
    pub row: Row,
}

/// Answers that are being drawn: the questions in batches, and what was drawn for each.
pub struct Drawing<B: Backend> {
    rows: Vec<usize>,
    prompts: Vec<Prompt>,
    truths: Vec<String>,
    drawn: Arc<Mutex<Vec<Option<Vec<Drawn>>>>>,
    started: Instant,
    /// Draws the answers of a batch; generated reports are none.
    pub scorer: GenerationScorer<B>,
}

fn other(error: impl std::fmt::Display) -> TrainError {
    TrainError::Other(error.to_string())
}

impl Rollouts {
    /// Prepares the rollouts of a run on `devices` devices, whose plan its config gives.
    ///
    /// # Errors
    /// A reward that cannot be prepared.
    pub fn new(
        config: &TrainConfig,
        plan: RolloutPlan,
        data: &Dataset,
        parts: &Arc<TextAndImages>,
        reference: Reference,
        devices: usize,
        tell: Tell,
    ) -> Result<Self, TrainError> {
        /// Reports that tell which table of words reads the findings.
        const LOOKED_AT: usize = 200;
        let truths = (0..data.len().min(LOOKED_AT)).filter_map(|row| data.text(row).answer);
        let truths: Vec<String> = truths.collect();
        let texts = || truths.iter().map(String::as_str);
        let rules = config.reward_rules.as_deref();
        let rewards = |list| Rewards::new(list, rules, texts()).map_err(other);
        let window_plan = config.window_plan(devices);
        Ok(Self {
            data: data.clone(),
            parts: parts.clone(),
            loader: WindowLoader::new(data.clone(), parts.clone(), window_plan, 0, 1),
            rewards: rewards(&config.rewards)?,
            held_out: rewards(&config.held_out_rewards)?,
            config: config.clone(),
            plan,
            devices,
            reference,
            an_epoch: config.steps_per_epoch(data.len(), devices).max(1),
            tell,
        })
    }

    /// Optimizer steps of a rollout.
    pub fn updates(&self) -> usize {
        self.plan.updates
    }

    /// Reads the questions of rollout `number` about `rows`, and says how their answers are drawn.
    ///
    /// # Errors
    /// [`TrainError::Dataset`] names a row that cannot be read, or is too long.
    pub fn draw<B: Accelerator>(
        &self,
        number: usize,
        rows: &[usize],
    ) -> Result<Drawing<B>, TrainError> {
        let started = Instant::now();
        let (data, parts) = (&self.data, &self.parts);
        let questions: Vec<_> = rows
            .par_iter()
            .map(|row| data.question(*row, parts))
            .collect::<Result<_, _>>()?;
        let (most, longest) = (self.config.max_completion_length, self.config.max_length);
        let (mut kept, mut prompts, mut truths) = (Vec::new(), Vec::new(), Vec::new());
        for (row, (prompt, truth)) in rows.iter().zip(questions) {
            let tokens = prompt.input_ids.len();
            if tokens + most > longest {
                let line = self.data.row(*row);
                let text = format!(
                    "`{}`, row {line}: its question has {tokens} tokens, and an answer may have {most} (max_completion_length); together they are longer than max_length {longest}",
                    self.data.name()
                );
                match self.config.overlong {
                    Overlong::Error => return Err(TrainError::Other(text)),
                    Overlong::Skip => {
                        (self.tell)(&format!("note: {text}; it is left out"));
                        continue;
                    }
                }
            }
            kept.push(*row);
            prompts.push(prompt);
            truths.push(split_thinking(&truth, false).1);
        }
        let group = self.config.num_generations;
        // All answers to a question are drawn together: its keys and values are computed once.
        let at_once = (self.config.per_device_eval_batch_size / group).max(1);
        let batches: Vec<Vec<Prompt>> = prompts.chunks(at_once).map(<[Prompt]>::to_vec).collect();
        let count = batches.len();
        let drawn = Arc::new(Mutex::new(vec![None; count]));
        let seed = mix(mix(self.config.seed, DRAWS), number as u64);
        let settings = GenerationConfig {
            max_new_tokens: most,
            eos_token_ids: self.parts.eos_token_ids.clone(),
            sampling: SamplingConfig {
                temperature: self.config.temperature as f32,
                ..SamplingConfig::default()
            },
            num_return_sequences: group,
            ..GenerationConfig::default()
        };
        let (slots, model_config) = (drawn.clone(), self.parts.config.clone());
        let generate = move |model: &Qwen3Vl<B>, device: &B::Device, batch: usize| {
            let prompts = &batches[batch];
            let first = batch * at_once * group;
            let answers = first..first + prompts.len() * group;
            let settings = GenerationConfig {
                seeds: answers.map(|answer| mix(seed, answer as u64)).collect(),
                ..settings.clone()
            };
            let none = &mut |_, _| None;
            let (found, _) =
                generate(model, &model_config, prompts, &settings, device, none).map_err(other)?;
            let found = found.into_iter().map(|one| Drawn {
                token_ids: one.token_ids,
                finish_reason: one.finish_reason,
            });
            let mut slots = slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots[batch] = Some(found.collect());
            Ok(Vec::new())
        };
        Ok(Drawing {
            rows: kept,
            prompts,
            truths,
            drawn,
            started,
            scorer: GenerationScorer {
                batches: count,
                generate: Arc::new(generate),
                score: Box::new(|_, _| Ok(Vec::new())),
            },
        })
    }

    /// Rewards the answers that were drawn, and makes the windows of the steps from `first_step` on.
    ///
    /// `model` is the one that drew them, adapters beside its weights.
    ///
    /// # Errors
    /// A reward that fails; a file that cannot be written.
    pub fn learn_from<B: Accelerator>(
        &mut self,
        drawing: Drawing<B>,
        first_step: usize,
        model: &Qwen3Vl<B>,
        device: &B::Device,
        watch: &mut RewardWatch,
    ) -> Result<Rollout, TrainError> {
        let drawn: Vec<Drawn> = {
            let mut slots = (drawing.drawn.lock()).unwrap_or_else(PoisonError::into_inner);
            slots
                .iter_mut()
                .filter_map(Option::take)
                .flatten()
                .collect()
        };
        let seconds = drawing.started.elapsed().as_secs_f64();
        let group = self.config.num_generations;
        let answered = self.answered(&drawing, &drawn)?;
        let table = self.rewards.of(&answered).map_err(other)?;
        let held_out = self.held_out.of(&answered).map_err(other)?;
        let advantages = advantages(&table.totals, group, self.config.scale_rewards);
        if !self.held_out.is_empty() {
            watch.add(table.mean(), held_out.mean());
        }
        let tokens: usize = drawn.iter().map(|one| one.token_ids.len()).sum();
        let ended = answered.iter().filter(|one| one.ended).count();
        let count = drawn.len().max(1) as f64;
        let mut row = Row::new();
        row.insert("reward".into(), table.mean().into());
        for (name, mean) in table.means() {
            row.insert(format!("reward.{name}"), mean.into());
        }
        if !self.held_out.is_empty() {
            row.insert("held_out_reward".into(), held_out.mean().into());
            for (name, mean) in held_out.means() {
                row.insert(format!("held_out_reward.{name}"), mean.into());
            }
        }
        for (name, value) in [
            ("completion_tokens", tokens as f64 / count),
            ("ended_share", ended as f64 / count),
            (
                "same_reward_share",
                share_without_difference(&table.totals, group),
            ),
            ("rollout_seconds", (seconds * 1000.0).round() / 1000.0),
            (
                "rollout_tokens_per_second",
                (tokens as f64 / seconds).round(),
            ),
        ] {
            row.insert(name.into(), value.into());
        }
        let every = self.config.rollout_steps;
        let last = first_step.checked_sub(self.plan.updates);
        if every > 0 && last.is_none_or(|last| first_step / every > last / every) {
            self.write(first_step, &answered, [&table, &held_out], &advantages)?;
        }
        let windows = self.windows(&drawing, &drawn, &advantages, first_step, model, device)?;
        Ok(Rollout { windows, row })
    }

    fn answered<B: Backend>(
        &self,
        drawing: &Drawing<B>,
        drawn: &[Drawn],
    ) -> Result<Vec<Answered>, TrainError> {
        let group = self.config.num_generations;
        let starts_inside = self.parts.template.opens_thinking();
        let each = drawn.iter().enumerate().map(|(index, one)| {
            let text = self
                .parts
                .tokenizer
                .decode(&one.token_ids, true)
                .map_err(other)?;
            let (thinking, answer) = split_thinking(&text, starts_inside);
            Ok(Answered {
                row: drawing.rows[index / group],
                truth: drawing.truths[index / group].clone(),
                answer,
                thinking,
                ended: one.finish_reason == FinishReason::Stop,
            })
        });
        each.collect()
    }

    /// Writes some answers with their rewards into the run's folder.
    fn write(
        &self,
        step: usize,
        answered: &[Answered],
        [table, held_out]: [&RewardTable; 2],
        advantages: &[f32],
    ) -> Result<(), TrainError> {
        let folder = self.config.output_dir.join("rollouts");
        fs::create_dir_all(&folder).map_err(|cause| FileError::write(&folder, cause))?;
        let path = folder.join(format!("step-{step}.jsonl"));
        let of = |table: &RewardTable, index: usize| -> Value {
            let parts = table.parts.iter();
            parts
                .map(|(name, values)| (name.clone(), json!(values[index])))
                .collect()
        };
        write_atomic(&path, |out| {
            for (index, one) in answered.iter().enumerate().take(WRITTEN) {
                let line = json!({
                    "row": self.data.row(one.row),
                    "truth": one.truth,
                    "answer": one.answer,
                    "thinking": one.thinking,
                    "ended": one.ended,
                    "reward": table.totals[index],
                    "rewards": of(table, index),
                    "held_out_rewards": of(held_out, index),
                    "advantage": advantages[index],
                });
                serde_json::to_writer(&mut *out, &line)?;
                out.write_all(b"\n")?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// The windows of a rollout's steps.
    fn windows<B: Accelerator>(
        &self,
        drawing: &Drawing<B>,
        drawn: &[Drawn],
        advantages: &[f32],
        first_step: usize,
        model: &Qwen3Vl<B>,
        device: &B::Device,
    ) -> Result<Vec<Window>, TrainError> {
        let group = self.config.num_generations;
        let sample = |index: usize| -> (usize, EncodedSample) {
            let (prompt, answer) = (&drawing.prompts[index / group], &drawn[index].token_ids);
            let mut labels = vec![IGNORE_INDEX; prompt.input_ids.len()];
            labels.extend(answer.iter().map(|id| i64::from(*id)));
            let sample = EncodedSample {
                input_ids: [&prompt.input_ids[..], answer].concat(),
                labels,
                images: prompt.images.clone(),
            };
            (drawing.rows[index / group], sample)
        };
        let per_part = drawn.len().div_ceil(self.plan.parts).max(1);
        let mut windows = Vec::with_capacity(self.plan.updates);
        for part in 0..self.plan.parts {
            let range =
                (part * per_part).min(drawn.len())..((part + 1) * per_part).min(drawn.len());
            let groups: Vec<_> = range.clone().map(|index| vec![sample(index)]).collect();
            let made = self.loader.batches(&groups)?;
            let mut sequences = made.sequences;
            for (own, places) in sequences.iter_mut().zip(&made.groups) {
                let own_places = places.iter().map(|place| advantages[range.start + place]);
                own.advantages = own_places.collect();
            }
            self.score(&made.batches, &mut sequences, model, device);
            let counts = SequenceCounts::of(&sequences);
            windows.push(Window {
                step: 0,
                epoch: 0.0,
                rows: groups.iter().map(|group| group[0].0).collect(),
                targets: counts.targets,
                micro_batches: made.batches.len(),
                first_micro_batch: 0,
                tokens: made.tokens,
                parts: dealt_out(made.batches, self.devices),
                sequences: dealt_out(sequences, self.devices),
                counts,
            });
        }
        let steps = (0..self.config.num_iterations).flat_map(|_| windows.clone());
        let numbered = steps.enumerate().map(|(update, window)| Window {
            step: first_step + update,
            epoch: (first_step + update + 1) as f64 / self.an_epoch as f64,
            ..window
        });
        Ok(numbered.collect())
    }

    /// Log-probabilities that later steps of a rollout compare with; with one step they are those of the step.
    fn score<B: Accelerator>(
        &self,
        batches: &[MicroBatch],
        sequences: &mut [Sequences],
        model: &Qwen3Vl<B>,
        device: &B::Device,
    ) {
        if self.plan.updates == 1 {
            return;
        }
        let needs_reference = self.config.reference_weight() > 0.0;
        let reference = needs_reference.then(|| self.reference.apply(model));
        let config = &self.parts.config;
        let scores = |model: &Qwen3Vl<B>, batch: &MicroBatch| {
            let temperature = self.config.temperature;
            B::in_exact_memory(device, Some(&batch.sizes()), || {
                token_scores(model, config, batch, temperature, device).log_probabilities
            })
        };
        for (batch, own) in batches.iter().zip(sequences) {
            own.sampled = scores(model, batch);
            if let Some(reference) = &reference {
                own.reference = scores(reference, batch);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewards_part_when_one_rises_and_the_other_falls() {
        let mut watch = RewardWatch::default();
        for step in 0..20 {
            watch.add(0.5 + 0.01 * f64::from(step), 0.5 + 0.01 * f64::from(step));
        }
        assert_eq!(watch.parted, 0);
        for step in 0..20 {
            watch.add(0.7 + 0.01 * f64::from(step), 0.6 - 0.02 * f64::from(step));
        }
        assert!(watch.parted > 5, "{watch:?}");
        // Both fall: the reward is harder to get, not gamed.
        let mut watch = RewardWatch::default();
        for step in 0..40 {
            watch.add(0.9 - 0.02 * f64::from(step), 0.9 - 0.02 * f64::from(step));
        }
        assert_eq!(watch.parted, 0);
    }
}
