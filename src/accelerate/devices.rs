//! `--device` to a backend type and a device: the one place that knows which backends exist.

use crate::{
    base::{
        device_name::{DeviceName, dtype_text},
        panics::quietly,
    },
    runtime::accelerator::Accelerator,
};

#[cfg(feature = "wgpu")]
use super::wgpu_setup::wgpu_setup;
use burn::{prelude::*, tensor::DType};

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The program was built without the backend.
    #[error(
        "this program was built without `{feature}`, which device `{device}` needs; build it with `--features {feature}`"
    )]
    NotBuilt {
        /// As the user named it.
        device: DeviceName,
        /// The missing feature.
        feature: &'static str,
    },
    /// The device does not answer.
    #[error("device `{device}` is not there: {reason}; choose another with `--device`")]
    NotThere {
        /// As the user named it.
        device: DeviceName,
        /// The driver's message.
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
        /// As the user named it.
        device: DeviceName,
        /// As the user named it.
        dtype: DType,
    },
}

/// Work that runs on whatever backend the device has.
pub trait DeviceTask {
    /// The result.
    type Output;

    /// Whether f16 has too little range for the work, and is used only where the user names it.
    #[cfg_attr(not(feature = "wgpu"), allow(dead_code))]
    fn needs_range(&self) -> bool {
        false
    }

    /// Does the work; `dtype` is the type the user named, or the device's best.
    fn run<B: Accelerator>(self, device: B::Device, dtype: DType) -> Self::Output;
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
    /// The result.
    type Output;

    /// As [`DeviceTask::needs_range`].
    #[cfg_attr(not(feature = "wgpu"), allow(dead_code))]
    fn needs_range(&self) -> bool {
        false
    }

    /// Does the work.
    fn run<B: Accelerator>(self, replicas: Replicas<B>) -> Self::Output;
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

        fn run<B: Accelerator>(self, device: B::Device, dtype: DType) -> Self::Output {
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
    // Only the driver knows which card is the best one: another name may be the same card.
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

/// Whether CUDA is built in and there is a card for it, without opening one.
pub fn has_cuda() -> bool {
    let drivers = ["/dev/nvidiactl", "/dev/dxg"];
    cfg!(feature = "cuda")
        && drivers
            .iter()
            .any(|path| std::path::Path::new(path).exists())
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
                crate::accelerate::cuda::configure();
                let device = burn::backend::cuda::CudaDevice::new(_index);
                start::<burn::backend::Cuda, T>(name, device, dtype, DType::BF16, task)
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
                let adapter = wgpu_setup(&device).map_err(|reason| DeviceError::NotThere {
                    device: name,
                    reason,
                })?;
                let half = !task.needs_range()
                    && !is_software(&adapter)
                    && Vulkan::supports_dtype(&device, DType::F16);
                let best = if half { DType::F16 } else { DType::F32 };
                start::<Vulkan, T>(name, device, dtype, best, task)
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
    crate::accelerate::cuda::configure();
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
    wgpu_setup(&device).is_ok_and(|adapter| !is_software(&adapter))
        && probe::<burn::backend::Vulkan>(&device).is_ok()
}

/// Whether an adapter is a program on the CPU.
#[cfg(feature = "wgpu")]
fn is_software(adapter: &burn::backend::wgpu::WgpuSetup) -> bool {
    // burn does not export the name of the type.
    format!("{:?}", adapter.adapter.get_info().device_type) == "Cpu"
}

fn start<B: Accelerator, T: DeviceTask>(
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
fn probe<B: Accelerator>(device: &B::Device) -> Result<(), String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_vulkan_device_has_no_place_among_several() {
        struct Nothing;
        impl ReplicatedTask for Nothing {
            type Output = ();

            fn run<B: Accelerator>(self, _replicas: Replicas<B>) {}
        }
        for names in [["wgpu", "wgpu:1"], ["wgpu:1", "wgpu"]] {
            let names = names.map(|name| name.parse().unwrap());
            let refused = run_on_all(&names, None, Nothing);
            assert!(matches!(refused, Err(DeviceError::Unnumbered)));
        }
    }
}
