//! Buffers of Burn's tensors: their views, their device, and how they are read.

use std::{collections::BTreeMap, sync::Mutex};

use burn::tensor::{Tensor, TensorData, TensorPrimitive};
use burn_cubecl::tensor::CubeTensor;
use cubecl::{client::ComputeClient, server::CopyDescriptor};
use cubecl_cuda::CudaRuntime;

use crate::ops::Reading;

pub(crate) type Backend = burn::backend::Cuda;
pub(crate) type Buffer = CubeTensor<CudaRuntime>;
pub(super) type Client = ComputeClient<CudaRuntime>;

/// The buffer of a tensor, with any strides.
pub(crate) fn strided<const D: usize>(tensor: Tensor<Backend, D>) -> Buffer {
    tensor.into_primitive().tensor()
}

/// The buffer of a tensor, copied if it is not contiguous.
pub(crate) fn contiguous<const D: usize>(tensor: Tensor<Backend, D>) -> Buffer {
    burn_cubecl::kernel::into_contiguous(strided(tensor))
}

/// A tensor over a buffer.
pub(crate) fn tensor<const D: usize>(buffer: Buffer) -> Tensor<Backend, D> {
    Tensor::from_primitive(TensorPrimitive::Float(buffer))
}

/// The device's free memory, in bytes.
pub(super) fn free_memory(device: &burn::backend::cuda::CudaDevice) -> Option<u64> {
    let one = strided(Tensor::<Backend, 1>::empty([1], device));
    // The device's context is current on its own thread only.
    let info = one.client.exclusive(cudarc::driver::result::mem_get_info);
    let (free, _) = info.ok()?.ok()?;
    Some(free as u64)
}

/// The client of a buffer's device, leaked for the program's lifetime: a running copy borrows it.
fn lasting_client(buffer: &Buffer) -> &'static Client {
    static CLIENTS: Mutex<BTreeMap<usize, &'static Client>> = Mutex::new(BTreeMap::new());
    let mut clients = CLIENTS.lock().unwrap_or_else(|lock| lock.into_inner());
    clients
        .entry(buffer.device.index)
        .or_insert_with(|| Box::leak(Box::new(buffer.client.clone())))
}

/// Copies values to the host after all work so far (async read); nothing waits before the result is called.
pub(super) fn read_async(x: Tensor<Backend, 1>) -> Reading {
    let buffer = contiguous(x);
    let descriptor = CopyDescriptor::new(
        buffer.handle.clone().binding(),
        buffer.meta.shape().clone(),
        buffer.meta.strides().clone(),
        buffer.dtype.size(),
    );
    let (shape, dtype) = (buffer.meta.shape().clone(), buffer.dtype);
    let copied = lasting_client(&buffer).read_one_tensor_async(descriptor);
    Box::new(move || {
        let bytes = cubecl::future::block_on(copied).expect("the device copies to the host");
        TensorData::from_bytes(bytes, shape, dtype)
            .iter::<f32>()
            .collect()
    })
}
