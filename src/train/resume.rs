//! Where a run goes on, and whether it is the same run.

use std::path::{Path, PathBuf};

use burn::tensor::DType;

use super::{
    checkpoint::{RANDOM_BASE, TrainerState, dtype_text, read_state},
    checkpoint_dir::CheckpointDir,
    config::TrainConfig,
    image_facts::ImageFacts,
    run::{Resume, RunOptions},
    strategy::TrainError,
};
use crate::{dataset::Dataset, lora::base::BaseFingerprint, pipeline::PipelineError};

/// What a run's numbers depend on besides its settings and the rows of its data.
pub(super) struct RunFacts {
    pub(super) images: ImageFacts,
    /// Fingerprint of the base's weights, or [`RANDOM_BASE`].
    pub(super) base: String,
}

impl RunFacts {
    /// Looks at the pictures of the data and at the base.
    pub(super) fn gather(
        config: &TrainConfig,
        random_init: bool,
        data: &Dataset,
    ) -> Result<Self, TrainError> {
        Ok(Self {
            images: ImageFacts::of(data),
            base: if random_init {
                RANDOM_BASE.to_string()
            } else if config.model.is_dir() {
                BaseFingerprint::of(&config.model)?.sha256
            } else {
                return Err(PipelineError::NoModel(config.model.clone()).into());
            },
        })
    }
}

/// Says which pictures are not what the run has learnt from.
///
/// One that no step has seen yet may be another: a run that an unreadable picture ended goes on once
/// the picture is mended.
fn changed_images(
    options: &RunOptions,
    data: &Dataset,
    facts: &RunFacts,
    devices: usize,
    dir: &Path,
    state: &TrainerState,
) -> Option<String> {
    let Some(before) = dir.parent().and_then(ImageFacts::load) else {
        let changed = state.images.as_ref()? != &facts.images.digest();
        return changed.then(|| "images of the training data have changed".to_string());
    };
    let plan = options.config.window_plan(devices);
    let seen = plan.rows_before(state.step, data.len());
    let changed = facts.images.changed_in(&before, data, &seen);
    let first = changed.first()?;
    Some(format!(
        "{} of the images that were learnt from have changed, first `{first}`",
        changed.len()
    ))
}

/// Finds where to go on, checks that it is the same run, and gives the checkpoint's folder.
pub(super) fn find_checkpoint(
    options: &RunOptions,
    data: &Dataset,
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
                // Starting anew would overwrite what may still be saved by hand.
                None => return Err(TrainError::NothingToResume(run.clone())),
            }
        }
        Resume::From(dir) => {
            if !dir.is_dir() {
                return Err(TrainError::NothingToResume(dir.clone()));
            }
            crate::files::verify_folder(dir, crate::files::Depth::Hashes).map_err(|damage| {
                TrainError::Other(format!(
                    "checkpoint `{}` is damaged: {damage}",
                    dir.display()
                ))
            })?;
            dir.clone()
        }
    };
    let state = read_state(&dir)?;
    let mut differences: Vec<String> = state
        .config
        .differences(&options.config)
        .into_iter()
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
        differences.extend(changed_images(options, data, facts, devices, &dir, &state));
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
    Ok(Some((dir, state)))
}
