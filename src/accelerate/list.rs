//! The devices that the compiled backends find, and what their drivers report of them.

use crate::base::device_name::DeviceName;

/// A device that `--device` can name.
#[derive(Debug, Clone, PartialEq)]
pub struct ListedDevice {
    /// As `--device` takes it.
    pub name: DeviceName,
    /// The hardware.
    pub hardware: String,
    /// The driver and its version.
    pub driver: Option<String>,
    /// Its memory, in bytes; the host's for the CPU.
    pub memory: Option<u64>,
    /// Limits that decide what runs: a name and a value with its unit.
    pub limits: Vec<(&'static str, String)>,
}

/// A backend that is built in and has no device, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmptyBackend {
    /// `cuda` or `wgpu`.
    pub backend: &'static str,
    /// The driver's message.
    pub reason: String,
}

/// All devices of the compiled backends, best first.
pub fn list_devices() -> (Vec<ListedDevice>, Vec<EmptyBackend>) {
    #[allow(unused_mut, reason = "nothing is added when no backend is built in")]
    let (mut devices, mut empty) = (Vec::new(), Vec::new());
    #[cfg(feature = "cuda")]
    add(cuda::list(), "cuda", &mut devices, &mut empty);
    #[cfg(feature = "wgpu")]
    add(vulkan::list(), "wgpu", &mut devices, &mut empty);
    #[cfg(feature = "flex")]
    devices.push(ListedDevice {
        name: DeviceName::Cpu,
        hardware: crate::base::system::cpu_name(),
        driver: None,
        memory: crate::base::system::total_memory(),
        limits: Vec::new(),
    });
    (devices, empty)
}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn add(
    found: Result<Vec<ListedDevice>, String>,
    backend: &'static str,
    devices: &mut Vec<ListedDevice>,
    empty: &mut Vec<EmptyBackend>,
) {
    match found {
        Ok(found) => devices.extend(found),
        Err(reason) => empty.push(EmptyBackend { backend, reason }),
    }
}

#[cfg(feature = "wgpu")]
fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}

#[cfg(feature = "cuda")]
mod cuda {
    use cudarc::driver::{CudaContext, sys::CUdevice_attribute as Attribute};

    use super::{DeviceName, ListedDevice};
    use crate::base::panics::quietly;

    pub(super) fn list() -> Result<Vec<ListedDevice>, String> {
        let count = quietly(CudaContext::device_count)?.map_err(|error| error.to_string())?;
        if count == 0 {
            return Err("the driver finds no card".to_string());
        }
        (0..count as usize).map(device).collect()
    }

    fn device(index: usize) -> Result<ListedDevice, String> {
        let context = quietly(|| CudaContext::new(index))?.map_err(|error| error.to_string())?;
        let attribute = |which| context.attribute(which).unwrap_or_default();
        let (major, minor) = context.compute_capability().unwrap_or_default();
        Ok(ListedDevice {
            name: DeviceName::Cuda(index),
            hardware: context.name().unwrap_or_else(|_| "unknown".to_string()),
            driver: None,
            memory: context.total_mem().ok().map(|bytes| bytes as u64),
            limits: vec![
                ("compute capability", format!("{major}.{minor}")),
                (
                    "processors",
                    attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).to_string(),
                ),
                (
                    "shared memory",
                    format!(
                        "{} KiB",
                        attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
                            / 1024
                    ),
                ),
            ],
        })
    }
}

#[cfg(feature = "wgpu")]
mod vulkan {
    use burn::backend::wgpu::{WgpuDevice, WgpuRuntime, WgpuSetup};
    use cubecl::{Runtime, ir::StorageType};

    use super::{DeviceName, ListedDevice, gib};
    use crate::accelerate::wgpu_setup::wgpu_setup;

    /// Discrete cards by number; where there is none, the best adapter.
    pub(super) fn list() -> Result<Vec<ListedDevice>, String> {
        let mut devices = Vec::new();
        for index in 0.. {
            let device = WgpuDevice::DiscreteGpu(index);
            match wgpu_setup(&device) {
                Ok(setup) => {
                    let name = DeviceName::Wgpu(Some(index));
                    devices.push(describe(name, &setup, &device));
                }
                Err(_) => break,
            }
        }
        if devices.is_empty() {
            let device = WgpuDevice::DefaultDevice;
            let setup = wgpu_setup(&device)
                .map_err(|_| "no Vulkan adapter; is a Vulkan driver installed?".to_string())?;
            devices.push(describe(DeviceName::Wgpu(None), &setup, &device));
        }
        Ok(devices)
    }

    fn describe(name: DeviceName, setup: &WgpuSetup, device: &WgpuDevice) -> ListedDevice {
        let info = setup.adapter.get_info();
        let client = WgpuRuntime::client(device);
        let properties = client.properties();
        let hardware = &properties.hardware;
        let half: StorageType = cubecl::ir::ElemType::Float(cubecl::ir::FloatKind::F16).into();
        let tile = properties
            .features
            .matmul
            .cmma
            .iter()
            .filter(|tile| tile.a_type == half)
            .max_by_key(|tile| tile.m * tile.n * tile.k);
        let planes = if hardware.plane_size_min == hardware.plane_size_max {
            hardware.plane_size_max.to_string()
        } else {
            format!("{} to {}", hardware.plane_size_min, hardware.plane_size_max)
        };
        ListedDevice {
            name,
            hardware: format!("{} ({:?})", info.name, info.device_type),
            driver: Some(format!("{} {}", info.driver, info.driver_info)),
            memory: memory(setup),
            limits: vec![
                (
                    "largest tensor",
                    gib(setup.device.limits().max_storage_buffer_binding_size),
                ),
                (
                    "shared memory",
                    format!("{} KiB", hardware.max_shared_memory_size / 1024),
                ),
                ("workgroup", hardware.max_units_per_cube.to_string()),
                ("subgroup", planes),
                (
                    "f16 matrix units",
                    tile.map_or("none".to_string(), |tile| {
                        format!("{} x {} x {}", tile.m, tile.n, tile.k)
                    }),
                ),
            ],
        }
    }

    /// The adapter's own memory, where the driver reports it.
    #[cfg(not(target_os = "macos"))]
    #[allow(unsafe_code)]
    fn memory(setup: &WgpuSetup) -> Option<u64> {
        const DEVICE_LOCAL: u32 = 1;
        // SAFETY: the adapter outlives the call, and the call only reads the properties of a physical device.
        unsafe {
            let adapter = setup.adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
            let instance = adapter.shared_instance().raw_instance();
            let properties =
                instance.get_physical_device_memory_properties(adapter.raw_physical_device());
            properties.memory_heaps[..properties.memory_heap_count as usize]
                .iter()
                .filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0)
                .map(|heap| heap.size)
                .max()
        }
    }

    #[cfg(target_os = "macos")]
    fn memory(_setup: &WgpuSetup) -> Option<u64> {
        None
    }
}
