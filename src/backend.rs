//! `--device` to a backend type and a device: the one place that knows which backends exist.

pub mod list;

use crate::kernels::Kernels;
use std::{fmt, panic, str::FromStr, sync::Mutex};

use burn::{prelude::*, tensor::DType};

/// A device by its name on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// The CPU (pure Rust).
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
    /// The discrete GPU of this number through Vulkan, or the best adapter there is.
    Wgpu(Option<usize>),
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Wgpu(None) => f.write_str("wgpu"),
            Self::Wgpu(Some(index)) => write!(f, "wgpu:{index}"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, index) = match text.split_once(':') {
            Some((kind, index)) => {
                let index = index
                    .parse::<usize>()
                    .map_err(|_| format!("`{index}` is not a device number"))?;
                (kind, Some(index))
            }
            None => (text, None),
        };
        match (kind, index) {
            ("cpu", None) => Ok(Self::Cpu),
            ("cuda", index) => Ok(Self::Cuda(index.unwrap_or(0))),
            ("wgpu", index) => Ok(Self::Wgpu(index)),
            _ => Err(format!(
                "`{text}` is not a device; expected cpu, cuda, cuda:N, wgpu or wgpu:N"
            )),
        }
    }
}

/// Types the weights can be held and multiplied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DtypeName {
    /// bfloat16.
    Bf16,
    /// float16.
    F16,
    /// float32.
    F32,
}

impl From<DtypeName> for DType {
    fn from(name: DtypeName) -> Self {
        match name {
            DtypeName::Bf16 => Self::BF16,
            DtypeName::F16 => Self::F16,
            DtypeName::F32 => Self::F32,
        }
    }
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The program was built without the backend.
    #[error(
        "this program was built without `{feature}`, which device `{device}` needs; build it with `--features {feature}`"
    )]
    NotBuilt {
        /// As given.
        device: DeviceName,
        /// The missing feature.
        feature: &'static str,
    },
    /// The device does not answer.
    #[error("device `{device}` is not there: {reason}; choose another with `--device`")]
    NotThere {
        /// As given.
        device: DeviceName,
        /// What the driver said.
        reason: String,
    },
    /// Several devices that cannot work together.
    #[error("devices `{0}` and `{1}` belong to different backends; name devices of one kind")]
    Mixed(DeviceName, DeviceName),
    /// The best Vulkan device among several.
    #[error(
        "`wgpu` among several devices has no number; name each as wgpu:N, `xray-qwen3vl doctor` lists them"
    )]
    Unnumbered,
    /// The device cannot calculate in the type.
    #[error("device `{device}` does not calculate in {}; try `--dtype f32`", dtype_text(*.dtype))]
    Dtype {
        /// As given.
        device: DeviceName,
        /// As given.
        dtype: DType,
    },
}

/// A type as `--dtype` takes it.
pub fn dtype_text(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

/// Work that runs on whatever backend the device has.
pub trait DeviceTask {
    /// What comes of it.
    type Output;

    /// Whether f16 is too narrow for the work, and not taken unless asked for.
    fn needs_range(&self) -> bool {
        false
    }

    /// Does the work; `dtype` is the type asked for, or the device's best.
    fn run<B: Kernels>(self, device: B::Device, dtype: DType) -> Self::Output;
}

/// Devices of one backend that hold the same model.
pub struct Replicas<B: Backend> {
    /// At least one.
    pub devices: Vec<B::Device>,
    /// Type of the weights.
    pub dtype: DType,
}

/// Work on several devices of one backend.
pub trait ReplicatedTask {
    /// What comes of it.
    type Output;

    /// As [`DeviceTask::needs_range`].
    fn needs_range(&self) -> bool {
        false
    }

    /// Does the work.
    fn run<B: Kernels>(self, replicas: Replicas<B>) -> Self::Output;
}

/// Runs `task` on all named devices together; on the best one when none is named.
///
/// # Errors
/// [`DeviceError`]; [`DeviceError::Mixed`] when the names belong to different backends.
pub fn run_on_all<T: ReplicatedTask>(
    names: &[DeviceName],
    dtype: Option<DType>,
    task: T,
) -> Result<T::Output, DeviceError> {
    struct First<T> {
        task: T,
        names: Vec<DeviceName>,
    }
    impl<T: ReplicatedTask> DeviceTask for First<T> {
        type Output = Result<T::Output, DeviceError>;

        fn needs_range(&self) -> bool {
            self.task.needs_range()
        }

        fn run<B: Kernels>(self, device: B::Device, dtype: DType) -> Self::Output {
            let same = |name: &DeviceName| match name {
                DeviceName::Cpu => device.clone(),
                // Numbers count within the kind of device the first one is.
                DeviceName::Cuda(index) | DeviceName::Wgpu(Some(index)) => {
                    let id = burn::tensor::backend::DeviceOps::id(&device);
                    burn::tensor::Device::<B>::from_id(burn::tensor::backend::DeviceId {
                        index_id: *index as u16,
                        ..id
                    })
                }
                DeviceName::Wgpu(None) => device.clone(),
            };
            let devices = if self.names.is_empty() {
                vec![device.clone()]
            } else {
                self.names.iter().map(same).collect()
            };
            // The first one answered already.
            for (name, other) in self.names.iter().zip(&devices).skip(1) {
                if *other != device {
                    probe::<B>(other).map_err(|reason| DeviceError::NotThere {
                        device: *name,
                        reason,
                    })?;
                }
            }
            Ok(self.task.run(Replicas::<B> { devices, dtype }))
        }
    }
    // Which card the best one is, only its driver knows: another name may be the same card.
    if names.len() > 1 && names.contains(&DeviceName::Wgpu(None)) {
        return Err(DeviceError::Unnumbered);
    }
    if let Some(other) = names
        .iter()
        .find(|name| std::mem::discriminant(*name) != std::mem::discriminant(&names[0]))
    {
        return Err(DeviceError::Mixed(names[0], *other));
    }
    let first = First {
        task,
        names: names.to_vec(),
    };
    run_on(names.first().copied(), dtype, first)?
}

/// What the program was built with, best first.
pub fn built_backends() -> Vec<&'static str> {
    let mut names = Vec::new();
    if cfg!(feature = "cuda") {
        names.push("cuda");
    }
    if cfg!(feature = "wgpu") {
        names.push("wgpu");
    }
    if cfg!(feature = "flex") {
        names.push("cpu");
    }
    names
}

/// Runs `task` on the named device, or on the best one that answers.
///
/// # Errors
/// [`DeviceError`].
pub fn run_on<T: DeviceTask>(
    name: Option<DeviceName>,
    dtype: Option<DType>,
    task: T,
) -> Result<T::Output, DeviceError> {
    let name = match name {
        Some(name) => name,
        None => best_device(),
    };
    match name {
        DeviceName::Cpu => {
            #[cfg(feature = "flex")]
            return start::<burn_flex::Flex, T>(name, Default::default(), dtype, DType::F32, task);
            #[cfg(not(feature = "flex"))]
            Err(not_built(name, "flex"))
        }
        DeviceName::Cuda(_index) => {
            #[cfg(feature = "cuda")]
            {
                crate::kernels::cuda::configure();
                let device = burn::backend::cuda::CudaDevice::new(_index);
                return start::<burn::backend::Cuda, T>(name, device, dtype, DType::BF16, task);
            }
            #[cfg(not(feature = "cuda"))]
            Err(not_built(name, "cuda"))
        }
        DeviceName::Wgpu(_index) => {
            #[cfg(feature = "wgpu")]
            {
                use burn::{backend::wgpu::WgpuDevice, tensor::backend::Backend as _};
                type Vulkan = burn::backend::Vulkan;
                let device = _index.map_or(WgpuDevice::DefaultDevice, WgpuDevice::DiscreteGpu);
                let adapter = wgpu_adapter(&device).map_err(|reason| DeviceError::NotThere {
                    device: name,
                    reason,
                })?;
                let half = !task.needs_range()
                    && !is_software(&adapter)
                    && Vulkan::supports_dtype(&device, DType::F16);
                let best = if half { DType::F16 } else { DType::F32 };
                return start::<Vulkan, T>(name, device, dtype, best, task);
            }
            #[cfg(not(feature = "wgpu"))]
            Err(not_built(name, "wgpu"))
        }
    }
}

#[allow(dead_code, reason = "unused when every backend is built in")]
fn not_built(device: DeviceName, feature: &'static str) -> DeviceError {
    DeviceError::NotBuilt { device, feature }
}

/// The best device that is built in and answers: CUDA, then Vulkan, then the CPU.
fn best_device() -> DeviceName {
    #[cfg(feature = "cuda")]
    crate::kernels::cuda::configure();
    #[cfg(feature = "cuda")]
    if probe::<burn::backend::Cuda>(&burn::backend::cuda::CudaDevice::new(0)).is_ok() {
        return DeviceName::Cuda(0);
    }
    #[cfg(feature = "wgpu")]
    {
        // A software Vulkan device is slower than the CPU backend.
        if !cfg!(feature = "flex") || has_vulkan_gpu() {
            return DeviceName::Wgpu(None);
        }
    }
    if cfg!(feature = "flex") {
        DeviceName::Cpu
    } else {
        DeviceName::Cuda(0)
    }
}

/// Whether the best Vulkan adapter is a GPU that answers.
#[cfg(feature = "wgpu")]
fn has_vulkan_gpu() -> bool {
    let device = burn::backend::wgpu::WgpuDevice::DefaultDevice;
    wgpu_adapter(&device).is_ok_and(|adapter| !is_software(&adapter))
        && probe::<burn::backend::Vulkan>(&device).is_ok()
}

/// The adapter behind a device, opened once: its driver is asked for more than burn tells.
///
/// # Errors
/// What a missing driver or adapter said.
#[cfg(feature = "wgpu")]
fn wgpu_adapter(
    device: &burn::backend::wgpu::WgpuDevice,
) -> Result<burn::backend::wgpu::WgpuSetup, String> {
    use burn::backend::wgpu::{
        RuntimeOptions, WgpuDevice, WgpuSetup, graphics::AutoGraphicsApi, init_setup,
    };
    type Opened = Vec<(WgpuDevice, Result<WgpuSetup, String>)>;
    static OPENED: Mutex<Opened> = Mutex::new(Vec::new());
    let mut opened = OPENED.lock().unwrap_or_else(|lock| lock.into_inner());
    if let Some((_, adapter)) = opened.iter().find(|(name, _)| name == device) {
        return adapter.clone();
    }
    let adapter = quietly(|| init_setup::<AutoGraphicsApi>(device, RuntimeOptions::default()));
    opened.push((device.clone(), adapter.clone()));
    adapter
}

/// Whether an adapter is a program on the CPU.
#[cfg(feature = "wgpu")]
fn is_software(adapter: &burn::backend::wgpu::WgpuSetup) -> bool {
    // The type's own name is not burn's to give.
    format!("{:?}", adapter.adapter.get_info().device_type) == "Cpu"
}

fn start<B: Kernels, T: DeviceTask>(
    name: DeviceName,
    device: B::Device,
    dtype: Option<DType>,
    best: DType,
    task: T,
) -> Result<T::Output, DeviceError> {
    probe::<B>(&device).map_err(|reason| DeviceError::NotThere {
        device: name,
        reason,
    })?;
    let dtype = dtype.unwrap_or(best);
    if !B::supports_dtype(&device, dtype) {
        return Err(DeviceError::Dtype {
            device: name,
            dtype,
        });
    }
    Ok(task.run::<B>(device, dtype))
}

/// Does one sum on the device; drivers that are missing panic, and the message is the reason.
fn probe<B: Kernels>(device: &B::Device) -> Result<(), String> {
    let sum = quietly(|| {
        let one = Tensor::<B, 1>::ones([2], device);
        one.sum().into_data().iter::<f32>().next()
    })?;
    if sum == Some(2.0) {
        Ok(())
    } else {
        Err(match sum {
            Some(sum) => format!("1 + 1 gave {sum}"),
            None => "1 + 1 gave no number".to_string(),
        })
    }
}

static PANIC_HOOK: Mutex<()> = Mutex::new(());

/// Runs `work` and gives a panic's first line in place of printing it.
pub fn quietly<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let _guard = PANIC_HOOK.lock().unwrap_or_else(|lock| lock.into_inner());
    let hook = panic::take_hook();
    panic::set_hook(Box::new(crate::out_of_memory::note));
    let result = panic::catch_unwind(panic::AssertUnwindSafe(work));
    panic::set_hook(hook);
    result.map_err(|payload| panic_text(payload.as_ref()))
}

/// The first line of what a panic said.
pub fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no reason given");
    let line = text.lines().next().unwrap_or_default().trim();
    missing_library(line).unwrap_or_else(|| line.to_string())
}

/// A sentence in place of the list of file names that cudarc tried.
fn missing_library(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("Unable to dynamically load the \"")?;
    let (name, _) = rest.split_once('"')?;
    Some(match name {
        "cuda" | "nvcuda" => "no NVIDIA driver was found (its library is `libcuda.so`)".to_string(),
        name => format!(
            "the library `lib{name}.so` was not found; install the CUDA toolkit, or name its folder in LD_LIBRARY_PATH"
        ),
    })
}

/// What a device's failure means, where its driver's thread keeps the reason to itself: a request for
/// memory that is refused there shows as an answer that never comes.
pub fn device_reason(reason: &str) -> String {
    if reason.contains("CallError") || reason.contains("Resource to exist") {
        format!(
            "the device did not do its work, most likely because it is out of memory ({reason})"
        )
    } else {
        reason.to_string()
    }
}

/// The queue that a thread's operations go through: GPU backends give every thread one, with memory of
/// its own, which a thread that ends leaves behind.
#[derive(Debug, Clone, Copy)]
pub struct Queue {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    stream: cubecl_common::stream_id::StreamId,
}

impl Queue {
    /// That of the calling thread.
    pub fn current() -> Self {
        Self {
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            stream: cubecl_common::stream_id::StreamId::current(),
        }
    }

    /// Runs `work` with its operations in this queue, whatever the thread.
    pub fn run<R>(self, work: impl FnOnce() -> R) -> R {
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        return self.stream.executes(work);
        #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
        work()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_vulkan_device_has_no_place_among_several() {
        struct Nothing;
        impl ReplicatedTask for Nothing {
            type Output = ();

            fn run<B: Kernels>(self, _replicas: Replicas<B>) {}
        }
        for names in [["wgpu", "wgpu:1"], ["wgpu:1", "wgpu"]] {
            let names = names.map(|name| name.parse().unwrap());
            let refused = run_on_all(&names, None, Nothing);
            assert!(matches!(refused, Err(DeviceError::Unnumbered)));
        }
    }

    #[test]
    fn a_missing_library_is_one_sentence() {
        let text = |name: &str| {
            let choices = vec!["cuda"; 40];
            let panic = format!(
                "Unable to dynamically load the \"{name}\" shared library - searched for library names: {choices:?}."
            );
            panic_text(&panic)
        };
        assert_eq!(
            text("cuda"),
            "no NVIDIA driver was found (its library is `libcuda.so`)"
        );
        assert!(text("nvrtc").starts_with("the library `libnvrtc.so` was not found; "));
    }

    #[test]
    fn device_names_read_and_print() {
        for (text, name) in [
            ("cpu", DeviceName::Cpu),
            ("cuda:1", DeviceName::Cuda(1)),
            ("wgpu", DeviceName::Wgpu(None)),
            ("wgpu:2", DeviceName::Wgpu(Some(2))),
        ] {
            assert_eq!(text.parse::<DeviceName>().unwrap(), name);
            assert_eq!(name.to_string(), text);
        }
        assert_eq!("cuda".parse::<DeviceName>().unwrap(), DeviceName::Cuda(0));
        for bad in ["gpu", "cpu:1", "cuda:x", ""] {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad}");
        }
    }
}
