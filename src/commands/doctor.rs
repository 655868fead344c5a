//! `doctor`: the devices there are, and which of them compute what they should.

use anyhow::{Result, bail};
use burn::tensor::DType;
use clap::Args;
use serde_json::{Value, json};

use crate::{
    accelerate::{
        devices::{DeviceError, DeviceTask, run_on},
        list::{ListedDevice, list_devices},
    },
    base::device_name::{DeviceName, dtype_text},
    doctor::{Answers, Checkup, Outcome, answers, compare},
    runtime::accelerator::Accelerator,
};

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Check only this device.
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceName>,
    /// Print one JSON object per device.
    #[arg(long)]
    pub json: bool,
}

/// A device and how it does in each of its types.
struct Patient {
    device: ListedDevice,
    checkups: Result<Vec<Checkup>, DeviceError>,
}

impl Patient {
    fn is_good(&self) -> bool {
        self.checkups
            .as_ref()
            .is_ok_and(|checkups| checkups.iter().all(Checkup::is_good))
    }
}

/// Checks the types the device calculates in.
struct Check<'a>(Option<&'a Answers>);

impl DeviceTask for Check<'_> {
    type Output = Vec<Checkup>;

    fn run<B: Accelerator>(self, device: B::Device, _dtype: DType) -> Vec<Checkup> {
        [DType::F32, DType::F16, DType::BF16]
            .into_iter()
            .filter(|dtype| B::supports_dtype(&device, *dtype))
            .map(|dtype| compare(dtype, answers::<B>(&device, dtype), self.0))
            .collect()
    }
}

/// The CPU's answers, which others are compared with.
struct Ask;

impl DeviceTask for Ask {
    type Output = Result<Answers, String>;

    fn run<B: Accelerator>(self, device: B::Device, _dtype: DType) -> Self::Output {
        answers::<B>(&device, DType::F32)
    }
}

/// Runs `doctor`.
///
/// # Errors
/// If a listed device fails, or the named one is not there.
pub fn run(args: DoctorArgs) -> Result<()> {
    let (devices, empty) = list_devices();
    let devices: Vec<ListedDevice> = devices
        .into_iter()
        .filter(|device| args.device.is_none_or(|name| is(device.name, name)))
        .collect();
    let cpu = run_on(Some(DeviceName::Cpu), Some(DType::F32), Ask);
    let cpu = match cpu {
        Ok(answers) => Some(answers.map_err(anyhow::Error::msg)?),
        Err(_) => None,
    };
    let mut bad = Vec::new();
    let found = devices.len();
    for device in devices {
        if !args.json {
            print!("{}", heading(&device));
        }
        let checkups = run_on(Some(device.name), Some(DType::F32), Check(cpu.as_ref()));
        let patient = Patient { device, checkups };
        if args.json {
            println!("{}", to_json(&patient));
        } else {
            print!("{}", to_text(&patient));
        }
        if !patient.is_good() {
            bad.push(patient.device.name.to_string());
        }
    }
    for backend in &empty {
        if args.json {
            println!(
                "{}",
                json!({ "backend": backend.backend, "error": backend.reason })
            );
        } else {
            println!("{}: no device ({})", backend.backend, backend.reason);
        }
    }
    if !args.json && cpu.is_none() {
        println!("The CPU backend is not built in (`--features flex`): nothing to compare with.");
    }
    match args.device {
        Some(name) if found == 0 => {
            bail!(
                "device `{name}` is not among those found; `xray-qwen3vl doctor` without --device lists all"
            )
        }
        _ if !bad.is_empty() => bail!(
            "results are wrong or missing on {}; see above",
            bad.join(", ")
        ),
        _ => Ok(()),
    }
}

/// Whether a device is the one meant: `wgpu` alone means the first of them.
fn is(device: DeviceName, meant: DeviceName) -> bool {
    device == meant
        || matches!(
            (device, meant),
            (DeviceName::Wgpu(Some(0)), DeviceName::Wgpu(None))
        )
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

fn heading(device: &ListedDevice) -> String {
    let mut text = format!("{}  {}", device.name, device.hardware);
    if let Some(memory) = device.memory {
        text += &format!(", {:.1} GiB", gib(memory));
    }
    if let Some(driver) = &device.driver {
        text += &format!(", {}", driver.trim());
    }
    text.push('\n');
    let limits: Vec<String> = device
        .limits
        .iter()
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    if !limits.is_empty() {
        text += &format!("  {}\n", limits.join(", "));
    }
    text
}

fn cell(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Measured(distance, _) if outcome.is_bad() => format!("WRONG {distance:.1e}"),
        Outcome::Measured(distance, _) => format!("{distance:.1e}"),
        Outcome::Failed(_) => "FAILED".to_string(),
        Outcome::Unknown => "-".to_string(),
    }
}

fn to_text(patient: &Patient) -> String {
    let checkups = match &patient.checkups {
        Ok(checkups) => checkups,
        Err(error) => return format!("  cannot be used: {error}\n\n"),
    };
    let mut text = format!(
        "  {:<6}{:>14}{:>14}{:>14}   trust\n",
        "dtype", "forward", "decode", "gradient"
    );
    for checkup in checkups {
        text += &format!(
            "  {:<6}{:>14}{:>14}{:>14}   {}\n",
            dtype_text(checkup.dtype),
            cell(&checkup.forward),
            cell(&checkup.decoding),
            cell(&checkup.gradient),
            if checkup.is_good() { "yes" } else { "NO" }
        );
        if let Outcome::Failed(reason) = &checkup.forward {
            text += &format!("         {reason}\n");
        }
    }
    text.push('\n');
    text
}

fn to_json(patient: &Patient) -> Value {
    let device = &patient.device;
    let part = |outcome: &Outcome| match outcome {
        Outcome::Measured(distance, allowed) => json!({
            "distance": if distance.is_finite() { json!(distance) } else { Value::Null },
            "allowed": allowed,
            "good": !outcome.is_bad(),
        }),
        Outcome::Failed(reason) => json!({ "good": false, "error": reason }),
        Outcome::Unknown => Value::Null,
    };
    let mut object = json!({
        "device": device.name.to_string(),
        "hardware": device.hardware,
        "driver": device.driver,
        "memory_bytes": device.memory,
        "limits": device.limits.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        "good": patient.is_good(),
    });
    match &patient.checkups {
        Ok(checkups) => {
            let dtypes = checkups.iter().map(|checkup| {
                json!({
                    "dtype": dtype_text(checkup.dtype),
                    "forward": part(&checkup.forward),
                    "decode": part(&checkup.decoding),
                    "gradient": part(&checkup.gradient),
                    "good": checkup.is_good(),
                })
            });
            object["dtypes"] = dtypes.collect();
        }
        Err(error) => object["error"] = json!(error.to_string()),
    }
    object
}
