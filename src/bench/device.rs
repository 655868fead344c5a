//! What a device is and how fast it can be at best: names, memory, measured ceilings.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Instant,
};

use burn::{
    prelude::*,
    tensor::{DType, Distribution, backend::DeviceOps},
};

use crate::{
    base::{device_name::DeviceKind, system::cpu_name},
    qwen3_vl::nn::{InitOptions, Linear},
    runtime::accelerator::Accelerator,
};

/// Published peaks of a card: dense bf16 and memory. Labels beside what is measured, nothing more.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PublishedPeak {
    /// What the driver's name for the card holds.
    pub card: &'static str,
    /// Dense bf16 matmuls, TFLOP/s.
    pub tflops: f64,
    /// Device memory, GB/s.
    pub gb_per_second: f64,
}

/// Data sheets of NVIDIA for the 80 GB SXM forms (H200: 141 GB).
pub const PUBLISHED_PEAKS: &[PublishedPeak] = &[
    PublishedPeak {
        card: "H200",
        tflops: 989.0,
        gb_per_second: 4800.0,
    },
    PublishedPeak {
        card: "H100",
        tflops: 989.0,
        gb_per_second: 3350.0,
    },
    PublishedPeak {
        card: "A800",
        tflops: 312.0,
        gb_per_second: 2039.0,
    },
    PublishedPeak {
        card: "A100",
        tflops: 312.0,
        gb_per_second: 2039.0,
    },
];

/// Who a device is.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceFacts {
    /// As `--device` takes it.
    pub device: String,
    /// The hardware's name; `unknown` where it is not known.
    pub name: String,
    /// The GPU driver's version.
    pub driver: Option<String>,
    /// The card's data sheet.
    pub published: Option<PublishedPeak>,
    /// What `nvidia-smi -i` takes, for a CUDA device.
    smi: Option<String>,
}

impl DeviceFacts {
    /// Queries the system about a device.
    pub fn of<B: Accelerator>(device: &B::Device) -> Self {
        let backend = B::name(device);
        let index = usize::from(device.id().index_id);
        let (label, smi) = if B::KIND == DeviceKind::Cpu {
            ("cpu".to_string(), None)
        } else if B::KIND == DeviceKind::Cuda {
            (format!("cuda:{index}"), Some(visible_card(index)))
        } else {
            (format!("wgpu:{index}"), None)
        };
        let reported = smi
            .as_deref()
            .and_then(|card| query(card, "name,driver_version"));
        let (name, driver) = match reported.as_deref().and_then(|text| text.split_once(", ")) {
            Some((name, driver)) => (name.to_string(), Some(driver.to_string())),
            None if label == "cpu" => (cpu_name(), None),
            None => (backend, None),
        };
        let published = PUBLISHED_PEAKS
            .iter()
            .find(|peak| name.contains(peak.card))
            .copied();
        Self {
            device: label,
            name,
            driver,
            published,
            smi,
        }
    }
}

/// The card that CUDA calls `index`: it counts the cards of `CUDA_VISIBLE_DEVICES` only.
fn visible_card(index: usize) -> String {
    std::env::var("CUDA_VISIBLE_DEVICES")
        .ok()
        .and_then(|list| {
            list.split(',')
                .nth(index)
                .map(|card| card.trim().to_string())
        })
        .filter(|card| !card.is_empty())
        .unwrap_or_else(|| index.to_string())
}

fn query(card: &str, what: &str) -> Option<String> {
    let output = Command::new("nvidia-smi")
        .args(["-i", card, "--format=csv,noheader,nounits"])
        .arg(format!("--query-gpu={what}"))
        .stdin(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().next().map(|line| line.trim().to_string())
}

/// Watches how much of the card's memory is in use, by all processes.
///
/// `nvidia-smi` reports ten times a second. The backend keeps what it has once taken, so a peak
/// between two reports still shows in the next.
#[derive(Debug)]
pub struct MemoryWatch {
    card: Option<String>,
    peak_mib: Arc<AtomicU64>,
    reporter: Option<(Child, JoinHandle<()>)>,
}

impl MemoryWatch {
    /// Starts to watch the device; of devices without `nvidia-smi` nothing is known.
    pub fn start(facts: &DeviceFacts) -> Self {
        let peak_mib = Arc::new(AtomicU64::new(0));
        let reporter = facts.smi.as_deref().and_then(|card| {
            let mut child = Command::new("nvidia-smi")
                .args(["-i", card, "--query-gpu=memory.used"])
                .args(["--format=csv,noheader,nounits", "-lms", "100"])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .ok()?;
            let lines = BufReader::new(child.stdout.take()?).lines();
            let peak = peak_mib.clone();
            let reader = std::thread::spawn(move || {
                for used in lines
                    .map_while(Result::ok)
                    .filter_map(|l| l.trim().parse().ok())
                {
                    peak.fetch_max(used, Ordering::Relaxed);
                }
            });
            Some((child, reader))
        });
        Self {
            card: facts.smi.clone(),
            peak_mib,
            reporter,
        }
    }

    /// Most memory in use since the last call, in GiB.
    pub fn take_peak_gib(&self) -> Option<f64> {
        let now = self
            .card
            .as_deref()
            .and_then(|card| query(card, "memory.used")?.parse::<u64>().ok());
        let watched = self.peak_mib.swap(0, Ordering::Relaxed);
        let mib = watched.max(now.unwrap_or(0));
        (mib > 0).then(|| mib as f64 / 1024.0)
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        if let Some((mut child, reader)) = self.reporter.take() {
            let _ = child.kill();
            let _ = child.wait();
            let _ = reader.join();
        }
    }
}

/// The best the device reached in this very run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// A large square matmul through the model's own linear layer, TFLOP/s.
    pub tflops: f64,
    /// One elementwise pass over a large tensor, bytes read and written, GB/s; `None` where the device
    /// did not do it.
    pub gb_per_second: Option<f64>,
}

/// Measures both ceilings, in the weights' type.
///
/// The matmul goes through [`Linear`], so it is the fastest that the program knows, and its share of
/// the data sheet's peak says how much the program's own matmuls leave unused.
pub fn measure_ceilings<B: Accelerator>(dtype: DType, device: &B::Device) -> Ceilings {
    const SMALL: usize = 1024;
    const LARGE: usize = 8192;
    /// A device that takes longer than this for the small matmul takes seconds for the large one.
    const SLOW_SECONDS: f64 = 2e-3;

    let mut side = SMALL;
    let mut matmul_seconds = square_matmul::<B>(side, dtype, device);
    if B::KIND != DeviceKind::Cpu && matmul_seconds < SLOW_SECONDS {
        side = LARGE;
        matmul_seconds = square_matmul::<B>(side, dtype, device);
    }

    // Larger than any cache there; other backends may limit a buffer to 128 MiB.
    let bytes: usize = if B::KIND == DeviceKind::Cuda {
        256 << 20
    } else {
        64 << 20
    };
    let elements = bytes / dtype.size();
    let x = Tensor::<B, 1>::ones([elements], (device, dtype));
    let copy_seconds = fastest::<B>(device, || {
        let _ = x.clone() + 1.0;
    });
    // A device that refuses the buffer says so in its own thread and is very fast.
    let last = (x + 1.0).narrow(0, elements - 1, 1).into_data();
    let done = last.iter::<f32>().eq([2.0]);
    Ceilings {
        tflops: 2.0 * (side as f64).powi(3) / matmul_seconds / 1e12,
        gb_per_second: done.then(|| 2.0 * bytes as f64 / copy_seconds / 1e9),
    }
}

/// Seconds of a square matmul through the model's own linear layer, at best.
fn square_matmul<B: Accelerator>(side: usize, dtype: DType, device: &B::Device) -> f64 {
    let options = InitOptions {
        dtype,
        ..InitOptions::default()
    };
    let layer = Linear::<B>::new(side, side, false, &options, device);
    let x = Tensor::<B, 2>::random(
        [side, side],
        Distribution::Normal(0.0, 1.0),
        (device, dtype),
    );
    fastest::<B>(device, || {
        let _ = layer.forward(x.clone(), None);
    })
}

/// Seconds of one call, at best: several rounds of calls in a row, so that waiting for the device
/// weighs little.
fn fastest<B: Accelerator>(device: &B::Device, mut work: impl FnMut()) -> f64 {
    const CALLS: usize = 8;
    const ROUNDS: usize = 5;
    let mut round = |calls: usize| {
        let start = Instant::now();
        (0..calls).for_each(|_| work());
        let _ = B::sync(device);
        start.elapsed().as_secs_f64() / calls as f64
    };
    // Compiles and tunes.
    round(2);
    (0..ROUNDS).map(|_| round(CALLS)).fold(f64::MAX, f64::min)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_named_and_has_ceilings() {
        let device = Default::default();
        let facts = DeviceFacts::of::<burn_flex::Flex>(&device);
        assert_eq!(facts.device, "cpu");
        assert!(facts.name.contains("cores"), "{facts:?}");
        assert_eq!(MemoryWatch::start(&facts).take_peak_gib(), None);
        let ceilings = measure_ceilings::<burn_flex::Flex>(DType::F32, &device);
        assert!(
            ceilings.tflops > 1e-4 && ceilings.tflops < 100.0,
            "{ceilings:?}"
        );
        let copy = ceilings.gb_per_second.unwrap();
        assert!(copy > 0.01 && copy < 5000.0, "{copy}");
    }
}
