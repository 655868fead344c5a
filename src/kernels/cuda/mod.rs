//! The operations on CUDA.

mod collective;

use burn::backend::Cuda;

use super::{AllReduce, DeviceMemory, Kernels};

impl Kernels for Cuda {
    fn memory_in_use(device: &Self::Device) -> Option<DeviceMemory> {
        collective::memory_in_use(device)
    }

    fn all_reduce(devices: &[Self::Device]) -> Result<Option<AllReduce<Self>>, String> {
        collective::all_reduce(devices)
    }
}
