//! Arguments to library calls, one command a file. Only here and in `main` is anything printed.

pub mod bench;
pub mod bench_serve;
pub mod check;
pub mod clean;
pub mod convert;
pub mod doctor;
pub mod eval;
pub mod infer;
mod infer_server;
pub mod init_tiny;
pub mod log_lines;
pub mod merge;
pub mod phantoms;
pub mod plan;
mod progress;
pub mod quantize;
pub mod serve;
pub mod studies;
mod tags;
pub mod train;

use anyhow::{Result, bail};

use crate::{
    base::device_name::DeviceName,
    cli::{GenerationArgs, ModelArgs},
    runtime::{
        generate::{GenerationConfig, SamplingConfig},
        pipeline::PipelineOptions,
    },
    study::counted,
};
use burn::tensor::DType;
use std::path::{Path, PathBuf};

/// A path that comes with the repository: as given, or beside the sources the program was built from.
fn shipped(path: &Path) -> PathBuf {
    if path.exists() || path.is_absolute() {
        return path.to_path_buf();
    }
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if beside.exists() {
        beside
    } else {
        path.to_path_buf()
    }
}

/// A reader that has seen enough, such as `head`, is no failure.
fn unless_closed(printed: std::io::Result<()>) -> std::io::Result<()> {
    match printed {
        Err(cause) if cause.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// The program as it was called, for commands that are printed to be typed.
fn program() -> String {
    let called = std::env::args_os().next();
    let called = called.map(|name| name.to_string_lossy().into_owned());
    shell_word(&called.unwrap_or_else(|| "xray-qwen3vl".to_string()))
}

/// A word as a shell takes it, in quotes where it has to be.
fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+:,=@%~".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_string()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// The device of a command that works on one.
fn one_device(devices: &[DeviceName]) -> Result<Option<DeviceName>> {
    match devices {
        [] => Ok(None),
        [device] => Ok(Some(*device)),
        [..] => bail!(UsageError(
            "--device names several devices, expected one".into()
        )),
    }
}

fn pipeline_options(args: &ModelArgs, dtype: DType) -> PipelineOptions {
    PipelineOptions {
        model: shipped(&args.model),
        adapter: args.adapter.clone(),
        dtype,
        quantize: args.quantize,
        min_pixels: args.min_pixels,
        max_pixels: args.max_pixels,
    }
}

fn generation_config(args: &GenerationArgs) -> Result<GenerationConfig> {
    let sampling = SamplingConfig {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
    };
    if let Err(reason) = sampling.check() {
        bail!(UsageError(reason));
    }
    if args.max_new_tokens == 0 {
        bail!(UsageError(
            "--max-new-tokens is 0, expected at least 1".into()
        ));
    }
    Ok(GenerationConfig {
        max_new_tokens: args.max_new_tokens,
        sampling,
        stop_on_repetition: !args.no_repetition_stop,
        kv_cache: args.kv_cache,
        ..GenerationConfig::default()
    })
}

/// What was typed cannot be meant; ends with exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);
