//! Resuming: which checkpoint a run continues from, and whether it is the same run.

use std::path::{Path, PathBuf};

use burn::tensor::DType;

use super::{
    checkpoint::{RANDOM_BASE, TrainerState, dtype_text, read_state},
    checkpoint_dir::CheckpointDir,
    config::TrainConfig,
    image_facts::{self, ImageFacts, Written},
    options::{Resume, RunOptions},
    outcome::TrainError,
    words::counted,
};
use crate::{
    adapters::lora::base::BaseFingerprint, dataset::Dataset, ops::quantised::Quantization,
    qwen3_vl::weights::gguf::is_gguf, runtime::pipeline::PipelineError,
};

/// What a run's numbers depend on besides its settings and the rows of its data.
pub(super) struct RunFacts {
    /// Of the training images.
    pub(super) images: ImageFacts,
    /// Of the validation images.
    pub(super) val_images: ImageFacts,
    /// Fingerprint of the base's weights, or [`RANDOM_BASE`].
    pub(super) base: String,
    /// What adapters are trained on; `None` for random weights.
    pub(super) trained_on: Option<BaseFingerprint>,
}

impl RunFacts {
    /// Fingerprints the images of the data and the base.
    pub(super) fn gather(
        config: &TrainConfig,
        random_init: bool,
        quantization: Option<Quantization>,
        data: &Dataset,
        validation: Option<&Dataset>,
    ) -> Result<Self, TrainError> {
        let trained_on = if random_init {
            None
        } else if config.model.is_dir() || is_gguf(&config.model) {
            let parts = config.gguf_parts();
            Some(BaseFingerprint::of_training(
                &config.model,
                &parts,
                quantization,
            )?)
        } else {
            return Err(PipelineError::NoModel(config.model.clone()).into());
        };
        // The weights as they are on the disk.
        let base = trained_on.as_ref().map_or(RANDOM_BASE, |base| {
            base.quantised_sha256.as_deref().unwrap_or(&base.sha256)
        });
        Ok(Self {
            images: ImageFacts::of(data),
            val_images: validation.map(ImageFacts::of).unwrap_or_default(),
            base: base.to_string(),
            trained_on,
        })
    }
}

/// Refuses changed images that the run has trained on, and prints the names of other changed ones.
///
/// One that no step has seen yet may be another: a run that an unreadable image ended continues
/// once the image is repaired.
fn changed_images(
    options: &RunOptions,
    [data, validation]: [Option<&Dataset>; 2],
    facts: &RunFacts,
    devices: usize,
    dir: &Path,
    state: &TrainerState,
) -> Option<String> {
    let (run, data) = (dir.parent()?, data?);
    let damaged = |name: &str, why: &str| {
        (options.tell)(&format!(
            "`{}` is damaged ({why}) and is written anew from the pictures as they are",
            run.join(name).display()
        ));
    };
    let first = |changed: &std::collections::BTreeSet<String>, one: &str, many: &str| {
        let name = changed.first()?;
        Some(format!(
            "{}, first `{name}`",
            counted(changed.len(), one, many)
        ))
    };
    if let Some(validation) = validation {
        match ImageFacts::load(run, image_facts::VALIDATION) {
            Written::Absent => {}
            Written::Damaged(why) => damaged(image_facts::VALIDATION, &why),
            Written::Whole(before) => {
                let changed = facts.val_images.changed_in(&before, validation, |_| true);
                if let Some(changed) = first(&changed, "picture", "pictures") {
                    (options.tell)(&format!(
                        "note: the validation data has changed in {changed}; validations before and after step {} do not compare",
                        state.step
                    ));
                }
            }
        }
    }
    let before = match ImageFacts::load(run, image_facts::TRAINING) {
        Written::Whole(before) => before,
        found => {
            if let Written::Damaged(why) = found {
                damaged(image_facts::TRAINING, &why);
            }
            let changed = state.images.as_ref()? != &facts.images.digest();
            return changed.then(|| "images of the training data have changed".to_string());
        }
    };
    let seen = options.config.rows_before(state.step, data.len(), devices);
    let ahead = facts
        .images
        .changed_in(&before, data, |row| !seen.contains(&row));
    let changed = facts
        .images
        .changed_in(&before, data, |row| seen.contains(&row));
    let ahead = ahead.difference(&changed).cloned().collect();
    if let Some(ahead) = first(&ahead, "picture", "pictures") {
        (options.tell)(&format!(
            "note: the training data has changed in {ahead}, which no step has learnt from yet"
        ));
    }
    let first = changed.first()?;
    Some(format!(
        "{} of the images that were learnt from {} changed, first `{first}`",
        changed.len(),
        if changed.len() == 1 { "has" } else { "have" }
    ))
}

/// Keys that set the length of a run.
const LENGTH: [&str; 2] = ["max_steps", "num_train_epochs"];

/// Says that a finished run is to be taken further, if so.
fn extension(
    options: &RunOptions,
    samples: usize,
    devices: usize,
    state: &TrainerState,
) -> Option<String> {
    let before = state.config.total_steps(samples, devices);
    let now = options.config.total_steps(samples, devices);
    (state.step == before && now > before).then(|| {
        format!(
            "the finished run of {} goes on to step {now}; its learning rate is that of a run of {now} steps from here on",
            counted(before, "step", "steps")
        )
    })
}

/// Finds the checkpoint to resume from, checks that it is the same run, and returns the checkpoint's folder.
pub(super) fn find_checkpoint(
    options: &RunOptions,
    data: &Dataset,
    validation: Option<&Dataset>,
    facts: &RunFacts,
    devices: usize,
    dtype: DType,
) -> Result<Option<(PathBuf, TrainerState)>, TrainError> {
    let run = &options.config.output_dir;
    let dir = match &options.resume {
        Resume::No => {
            let found = CheckpointDir::view(run).list()?;
            return if found.is_empty() {
                Ok(None)
            } else {
                Err(TrainError::RunExists(run.clone()))
            };
        }
        Resume::Auto => {
            if !run.is_dir() {
                return Ok(None);
            }
            let search = CheckpointDir::open(run)?.newest_whole()?;
            for damaged in &search.passed_over {
                (options.tell)(&damaged.to_string());
            }
            match search.found {
                Some(found) => found.path,
                None if search.passed_over.is_empty() => return Ok(None),
                // Starting anew would overwrite what a person may still save.
                None => return Err(TrainError::NothingToResume(run.clone())),
            }
        }
        Resume::From(dir) => {
            if !dir.is_dir() {
                return Err(TrainError::NothingToResume(dir.clone()));
            }
            crate::base::files::verify_folder(dir, crate::base::files::Depth::Hashes).map_err(
                |damage| {
                    TrainError::Other(format!(
                        "checkpoint `{}` is damaged: {damage}",
                        dir.display()
                    ))
                },
            )?;
            dir.clone()
        }
    };
    let state = read_state(&dir)?;
    let extension = extension(options, data.len(), devices, &state);
    let mut differences: Vec<String> = state
        .config
        .differences(&options.config)
        .into_iter()
        .filter(|(key, ..)| extension.is_none() || !LENGTH.contains(&key.as_str()))
        .map(|(key, there, here)| format!("`{key}` was {there}, is {here}"))
        .collect();
    if state.train_data != data.fingerprint() {
        differences.push("the training data has changed".to_string());
    }
    match &state.base {
        Some(base) if *base != facts.base => differences.push(format!(
            "the weights in `{}` have changed (fingerprint was {base}, is {})",
            options.config.model.display(),
            facts.base
        )),
        _ => {}
    }
    if state.train_data == data.fingerprint() {
        let both = [Some(data), validation];
        differences.extend(changed_images(options, both, facts, devices, &dir, &state));
    }
    // The devices may be others, but not more or fewer: they share every window.
    if state.devices != devices {
        differences.push(format!(
            "the number of devices was {}, is {devices}",
            state.devices
        ));
    }
    let dtype = dtype_text(dtype);
    if state.dtype != dtype {
        differences.push(format!("`dtype` was {}, is {dtype}", state.dtype));
    }
    if !differences.is_empty() {
        return Err(TrainError::OtherRun {
            run: dir,
            differences: differences.join("; "),
        });
    }
    if let Some(line) = extension {
        (options.tell)(&line);
    }
    Ok(Some((dir, state)))
}
