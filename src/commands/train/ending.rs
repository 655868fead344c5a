//! What a run prints at its end: where its files are, what the model writes, what to do next.

use std::{
    io::{Write as _, stdout},
    path::Path,
};

use anyhow::Result;

use super::{
    args::TrainArgs,
    print_line,
    reports::{HeldOutScores, image_remarks, show_examples},
    say,
};
use crate::{
    commands::{
        shell::{program, shell_word},
        shipped::shipped,
    },
    runtime::accelerator::Accelerator,
    train::{
        config::{TrainConfig, Tuner},
        outcome::Ending,
        report_command::Reported,
        run::RunResult,
        words::{clock, counted},
    },
};

/// The model of the published recipe.
const REAL_MODEL: &str = "Qwen/Qwen3-VL-8B-Instruct";

/// Prints how a run ended and where its files are.
pub(super) fn print_end<B: Accelerator>(result: &RunResult<B>, seconds: f64, again: &str) {
    let how = match result.ending {
        Ending::Done => "done".to_string(),
        Ending::EarlyStop => "ended early: the validation stopped getting better".to_string(),
        Ending::RewardsPart => {
            "ended early: the held-out rewards fall while those trained on rise, so these are gamed"
                .to_string()
        }
        Ending::Interrupted => "interrupted and saved".to_string(),
    };
    // The terminal may be gone by now.
    let _ = writeln!(
        stdout(),
        "{how}: {} in {}; checkpoint `{}`, curves `{}`",
        counted(result.state.step, "step", "steps"),
        clock(seconds),
        result.checkpoint.display(),
        result
            .state
            .config
            .output_dir
            .join("training.svg")
            .display()
    );
    if let Some(remark) = result.reported.as_ref().and_then(Reported::remark) {
        say(&format!("note: {remark}"));
    }
    for remark in image_remarks(result) {
        say(&format!("images: {}", remark.sentence()));
    }
    if result.ending == Ending::Interrupted {
        // On a line of its own: a wrapped one is hard to copy.
        let _ = writeln!(stdout(), "continue with: {again}");
    }
}

/// Prints and saves what the trained model writes about held-out studies, and what to do next.
pub(super) fn print_reports<B: Accelerator>(
    result: &RunResult<B>,
    args: &TrainArgs,
    seconds: f64,
    device: &B::Device,
) -> Result<()> {
    if args.show > 0 && result.state.config.validates() {
        show_examples(result, args.show, device)?;
    }
    let scores = HeldOutScores::of(result, device)?;
    scores.save(result, seconds)?;
    if let Some(table) = scores.table() {
        print_line(&format!("\n{table}"));
    }
    print_line(&format!("\nnext: {}", infer_command(result)));
    if args.config.is_none() {
        let recipe = shipped(Path::new("configs/openi-lora.toml"));
        print_line(&format!(
            "with the real model, once `convert` and `check` have seen your data: {} train --config {} --model {REAL_MODEL} --download",
            program(),
            shell_word(&recipe.display().to_string())
        ));
    }
    Ok(())
}

/// What goes on with a run, whatever it was started with: its folder holds its settings.
pub(super) fn resume_command(config: &TrainConfig, random_init: bool) -> String {
    let settings = config.output_dir.join("config.toml");
    format!(
        "{} train --config {} --resume auto{}",
        program(),
        shell_word(&settings.display().to_string()),
        if random_init { " --random-init" } else { "" }
    )
}

/// The command with which a run's model writes about an image: the sample image where the run has none.
fn infer_command<B: Accelerator>(result: &RunResult<B>) -> String {
    let word = |path: &Path| shell_word(&path.display().to_string());
    let image = result
        .validation
        .as_ref()
        .filter(|data| !data.is_empty())
        .and_then(|data| data.text(0).images.into_iter().next())
        .map_or_else(String::new, |image| format!(" {}", word(&image)));
    let checkpoint = word(&result.checkpoint);
    let config = &result.state.config;
    let model = match config.tuner {
        Tuner::Lora => {
            let quantize = config.quantize.as_ref();
            let quantize = quantize.map_or_else(String::new, |text| format!(" --quantize {text}"));
            let parts = [
                ("--mmproj", &config.mmproj),
                ("--tokenizer", &config.tokenizer),
            ];
            let parts = parts.into_iter().filter_map(|(flag, path)| {
                let path = path.as_deref()?;
                Some(format!(" {flag} {}", word(path)))
            });
            let parts: String = parts.collect();
            format!(
                "{}{quantize}{parts} --adapter {checkpoint}",
                word(&config.model)
            )
        }
        Tuner::Full => checkpoint,
    };
    format!("{} infer --model {model}{image}", program())
}
