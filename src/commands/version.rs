//! `version`: what this program was built from, and what it can run on here.

use std::io::{Write, stdout};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use super::shell::unless_closed;
use crate::{
    accelerate::{devices::built_backends, list::list_devices},
    base::build_info::{COMMIT, LONG_VERSION, PROFILE, TARGET, VERSION, features},
};

/// Arguments of `version`.
#[derive(Debug, Args)]
pub struct VersionArgs {
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Runs `version`.
///
/// # Errors
/// It cannot be printed.
pub fn run(args: &VersionArgs) -> Result<()> {
    let (devices, empty) = list_devices();
    let text = if args.json {
        let devices = devices.iter().map(|device| {
            json!({
                "name": device.name.to_string(),
                "hardware": device.hardware,
                "driver": device.driver,
                "memory_bytes": device.memory,
            })
        });
        let missing = empty
            .iter()
            .map(|backend| json!({ "backend": backend.backend, "error": backend.reason }));
        json!({
            "program": "xray-qwen3vl",
            "version": VERSION,
            "commit": COMMIT,
            "features": features(),
            "target": TARGET,
            "profile": PROFILE,
            "burn": "0.21.0",
            "backends": built_backends(),
            "devices": devices.collect::<Vec<_>>(),
            "backends_without_device": missing.collect::<Vec<_>>(),
        })
        .to_string()
    } else {
        let mut lines = vec![format!("xray-qwen3vl {LONG_VERSION}")];
        for device in devices {
            lines.push(format!("device {}: {}", device.name, device.hardware));
        }
        for backend in empty {
            lines.push(format!(
                "no device for {}: {}",
                backend.backend, backend.reason
            ));
        }
        lines.join("\n")
    };
    unless_closed(writeln!(stdout().lock(), "{text}")).context("cannot print the version")
}
