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
    runtime::accelerator::Accelerator,
};

use answers::{DeviceAnswers, answers};
use checkup::{Agreement, Checkup, compare};

mod answers;
mod checkup;

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
struct CheckedDevice {
    device: ListedDevice,
    checkups: Result<Vec<Checkup>, DeviceError>,
}

impl CheckedDevice {
    fn is_good(&self) -> bool {
        self.checkups
            .as_ref()
            .is_ok_and(|checkups| checkups.iter().all(Checkup::is_good))
    }
}

/// Checks the types the device calculates in.
struct CheckDtypes<'a>(Option<&'a DeviceAnswers>);

impl DeviceTask for CheckDtypes<'_> {
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
struct AnswersOfCpu;

impl DeviceTask for AnswersOfCpu {
    type Output = Result<DeviceAnswers, String>;

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
    let cpu = run_on(Some(DeviceName::Cpu), Some(DType::F32), AnswersOfCpu);
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
        let checkups = run_on(
            Some(device.name),
            Some(DType::F32),
            CheckDtypes(cpu.as_ref()),
        );
        let checked = CheckedDevice { device, checkups };
        if args.json {
            println!("{}", to_json(&checked));
        } else {
            print!("{}", to_text(&checked));
        }
        if !checked.is_good() {
            bad.push(checked.device.name.to_string());
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

fn cell(agreement: &Agreement) -> String {
    match agreement {
        Agreement::Measured(distance, _) if agreement.is_bad() => format!("WRONG {distance:.1e}"),
        Agreement::Measured(distance, _) => format!("{distance:.1e}"),
        Agreement::Failed(_) => "FAILED".to_string(),
        Agreement::Unknown => "-".to_string(),
    }
}

fn to_text(checked: &CheckedDevice) -> String {
    let checkups = match &checked.checkups {
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
        if let Agreement::Failed(reason) = &checkup.forward {
            text += &format!("         {reason}\n");
        }
    }
    text.push('\n');
    text
}

fn to_json(checked: &CheckedDevice) -> Value {
    let device = &checked.device;
    let part = |agreement: &Agreement| match agreement {
        Agreement::Measured(distance, allowed) => json!({
            "distance": if distance.is_finite() { json!(distance) } else { Value::Null },
            "allowed": allowed,
            "good": !agreement.is_bad(),
        }),
        Agreement::Failed(reason) => json!({ "good": false, "error": reason }),
        Agreement::Unknown => Value::Null,
    };
    let mut object = json!({
        "device": device.name.to_string(),
        "hardware": device.hardware,
        "driver": device.driver,
        "memory_bytes": device.memory,
        "limits": device.limits.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        "good": checked.is_good(),
    });
    match &checked.checkups {
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
