//! Files in a run's folder: its settings, its facts, and what steps are written to.

use std::{collections::BTreeMap, fs, path::Path};

use crate::{
    base::files::{FileError, write_atomic},
    dataset::DataFacts,
    ops::quantised::Quantization,
    train::{
        config::{Reporter, TrainConfig},
        outcome::TrainError,
        records::{METRICS, MetricsLog},
        renderers::RunSteps,
        report_command::{ReportCommand, Start},
        tfevents::EventWriter,
        words::Tell,
    },
};

/// Writes the resolved settings: what `--config` takes to resume.
pub(super) fn write_config(config: &TrainConfig) -> Result<(), TrainError> {
    write_atomic(&config.output_dir.join("config.toml"), |out| {
        out.write_all(config.to_toml().as_bytes())
    })?;
    Ok(())
}

/// Writes versions, data hashes and what to know of the data sets (training, then validation) before the
/// first step.
pub(super) fn write_run_facts(
    config: &TrainConfig,
    data: &BTreeMap<&str, String>,
    quantization: Option<Quantization>,
    data_facts: &[DataFacts],
) -> Result<(), TrainError> {
    let dir = &config.output_dir;
    let facts = serde_json::json!({
        "program": concat!("xray-qwen3vl ", env!("CARGO_PKG_VERSION")),
        "commit": crate::base::build_info::COMMIT,
        "burn": "0.21.0",
        "seed": config.seed,
        "data": data,
        "quantization": quantization.map(|quantization| quantization.to_string()),
        "data_facts": data_facts,
        "arguments": std::env::args().collect::<Vec<_>>(),
    });
    write_atomic(&dir.join("run.json"), |out| {
        serde_json::to_writer_pretty(&mut *out, &facts)?;
        out.write_all(b"\n")
    })?;
    Ok(())
}

/// Puts aside what Burn's logs hold of the epoch that a run goes on in: they begin a file anew.
pub(super) fn keep_part_of_epoch(run: &Path, steps: &RunSteps) -> Result<(), TrainError> {
    if steps.before == 0 || steps.before.is_multiple_of(steps.an_epoch.max(1)) {
        return Ok(());
    }
    let epoch = steps.epoch(steps.before);
    for split in ["train", "valid"] {
        let from = run.join(split).join(format!("epoch-{epoch}"));
        let name = format!("part-of-epoch-{epoch}-before-step-{}", steps.before + 1);
        let to = run.join(split).join(name);
        if from.is_dir() && !to.exists() {
            fs::rename(&from, &to).map_err(|cause| FileError::write(&to, cause))?;
        }
    }
    Ok(())
}

/// What the steps of a run are written to.
pub(super) struct Writers {
    /// `metrics.jsonl`.
    pub(super) metrics: MetricsLog,
    /// TensorBoard's file, if the run reports there.
    pub(super) events: Option<EventWriter>,
    /// The program of `report_command`, if the run has one.
    pub(super) report: Option<ReportCommand>,
}

impl Writers {
    /// Begins them, or goes on from the checkpoint `resumed` after `step` steps.
    pub(super) fn open(
        config: &TrainConfig,
        resumed: Option<&Path>,
        step: usize,
        total_steps: usize,
        tell: Tell,
    ) -> Result<Self, TrainError> {
        let metrics_path = config.output_dir.join(METRICS);
        let metrics = match resumed {
            Some(dir) => {
                let copy = dir.join(METRICS);
                let (log, summary) = MetricsLog::resume(&metrics_path, step as u64, &copy)?;
                if let Some(warning) = summary.warning(&metrics_path, &copy) {
                    tell(&warning);
                }
                log
            }
            None => MetricsLog::create(&metrics_path)?,
        };
        let resumed_step = resumed.map(|_| step as u64);
        let reports_to = |reporter| config.report_to.contains(&reporter);
        let events = reports_to(Reporter::Tensorboard)
            .then(|| EventWriter::create(&config.output_dir.join("tensorboard"), resumed_step))
            .transpose()?;
        let report = reports_to(Reporter::Command)
            .then(|| {
                let start = Start {
                    run: &config.output_dir,
                    config: serde_json::json!(config),
                    step,
                    total_steps,
                    resumed: resumed.is_some(),
                };
                ReportCommand::start(&config.report_command, &start, tell)
            })
            .transpose()?;
        Ok(Self {
            metrics,
            events,
            report,
        })
    }
}
