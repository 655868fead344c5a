//! Several CUDA devices: NCCL's all-reduce behind the backend's own client, and device memory.
//!
//! Burn's `distributed` feature offers the same operation, but wants it of every backend that trains,
//! and the CPU's has none; so the client is asked here as that feature asks it.

use std::sync::Arc;

use burn::{
    backend::{Cuda, cuda::CudaDevice},
    prelude::*,
    tensor::{DType, TensorPrimitive, backend::DeviceOps},
};
use cubecl::server::ReduceOperation;

use crate::{
    backend::quietly,
    kernels::{AllReduce, DeviceMemory},
};

/// Memory of the calling thread's stream: cubecl keeps a pool for each.
pub(super) fn memory_in_use(device: &CudaDevice) -> Option<DeviceMemory> {
    let tensor = Tensor::<Cuda, 1>::empty([1], device);
    let usage = tensor.into_primitive().tensor().client.memory_usage();
    usage.ok().map(|usage| DeviceMemory {
        in_use: usage.bytes_in_use,
        reserved: usage.bytes_reserved,
    })
}

/// Sums over different devices through NCCL; `None` for one device named several times, which NCCL
/// refuses.
///
/// # Errors
/// When the library is not there.
pub(super) fn all_reduce(devices: &[CudaDevice]) -> Result<Option<AllReduce<Cuda>>, String> {
    let ids: Vec<_> = devices.iter().map(DeviceOps::id).collect();
    if (1..ids.len()).any(|at| ids[..at].contains(&ids[at])) {
        return Ok(None);
    }
    match quietly(cudarc::nccl::result::get_nccl_version) {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Err(format!("NCCL does not answer: {error:?}")),
        Err(reason) => {
            return Err(format!(
                "several CUDA devices need the library NCCL (libnccl.so.2), which is not found: \
                 {reason}; install it, or train on one device with more gradient_accumulation_steps"
            ));
        }
    }
    Ok(Some(Arc::new(move |tensor: Tensor<Cuda, 1>| {
        assert_eq!(tensor.dtype(), DType::F32);
        // The sum is written over the tensor's own buffer, so nobody else may hold it.
        let own = tensor.zeros_like() + tensor;
        let own = own.into_primitive().tensor();
        let mut client = own.client.clone();
        client.all_reduce(
            own.handle.clone(),
            own.handle.clone(),
            own.dtype.into(),
            ids.clone(),
            ReduceOperation::Sum,
        );
        client.sync_collective();
        Tensor::from_primitive(TensorPrimitive::Float(own))
    })))
}
