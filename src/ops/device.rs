//! Operations of a device besides arithmetic: memory, transfers, all-reduce over several.

use std::{sync::Arc, time::Duration};

use burn::{
    prelude::*,
    tensor::{DType, ops::FloatTensor},
};

use super::upload::{self, Fill, Upload, UploadError};
use crate::base::device_name::DeviceKind;

/// Memory of a device that this process holds, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In tensors that are alive.
    pub in_use: u64,
    /// Taken from the device; pages are kept for later tensors, so this is what was needed at most.
    pub reserved: u64,
}

/// Adds up tensors over devices.
pub trait AllReduce<B: Backend>: Send + Sync {
    /// The sum of each tensor, on the device of `tensors`. Every device calls it, each from a thread of
    /// its own, with as many f32 tensors of the same lengths; it returns once all have.
    ///
    /// # Errors
    /// What the driver or the library says; that another device did not come. The devices cannot add
    /// up any more then.
    fn sum(&self, tensors: Vec<Tensor<B, 1>>) -> Result<Vec<Tensor<B, 1>>, String>;

    /// Lets devices that wait for others end with an error.
    fn give_up(&self);

    /// Number of devices.
    fn len(&self) -> usize;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Processes whose devices add up together with those of this one.
pub struct Others<'a> {
    /// Devices of the processes before this one.
    pub first: usize,
    /// Devices of all of them.
    pub all: usize,
    /// Gives every process the bytes that the first one brings; all call it together.
    pub hand_out: &'a (dyn Fn(Option<Vec<u8>>) -> Result<Vec<u8>, String> + Sync),
    /// Whether one of them has ended.
    pub is_over: &'a (dyn Fn() -> bool + Sync),
}

/// Values that are on their way to the host.
pub type Reading = Box<dyn FnOnce() -> Vec<f32> + Send>;

/// Operations of a device besides arithmetic: memory, transfers, all-reduce.
pub trait DeviceOps: Backend + Sized {
    /// What the backend works on.
    const KIND: DeviceKind;

    /// A buffer for keys or values of a cache. What no token was written to is read, and masked, by the
    /// default attention: there it must not be NaN.
    fn cache_buffer(shape: [usize; 4], dtype: DType, device: &Self::Device) -> Tensor<Self, 4> {
        Tensor::zeros(shape, (device, dtype))
    }

    /// Whether [`DeviceOps::read_async`] returns before the device has finished the work queued so far.
    const READS_ASYNC: bool = false;

    /// Starts the copy of a few values `[n]` to the host, as they are now; calling the result waits for
    /// them.
    fn read_async(x: Tensor<Self, 1>) -> Reading {
        Box::new(move || x.into_data().iter::<f32>().collect())
    }

    /// The same tensor with contiguous elements: a weight that is read again and again should not have to
    /// be copied into that form each time.
    fn contiguous<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        x
    }

    /// Memory that the calling thread's work holds on the device; `None` where the backend does not report it.
    fn memory_in_use(_device: &Self::Device) -> Option<DeviceMemory> {
        None
    }

    /// Free memory of the device, in bytes; `None` where the backend does not report it.
    fn free_memory(_device: &Self::Device) -> Option<u64> {
        None
    }

    /// Runs work whose tensors are allocated at their exact size, where a backend's pools would take pages
    /// that grow with the card. Memory that the work leaves is used again by work of the same `sizes` and
    /// freed before work of others; without sizes the work belongs to that before it.
    fn in_exact_memory<R>(
        _device: &Self::Device,
        _sizes: Option<&[usize]>,
        work: impl FnOnce() -> R,
    ) -> R {
        work()
    }

    /// How these devices sum tensors among themselves, and with those of `others`; `None` where tensors have to
    /// be copied to one. `patience` bounds the wait of a device for the others.
    ///
    /// # Errors
    /// What is missing on a machine whose devices could.
    fn all_reduce(
        _devices: &[Self::Device],
        _others: Option<&Others<'_>>,
        _patience: Duration,
    ) -> Result<Option<Arc<dyn AllReduce<Self>>>, String> {
        Ok(None)
    }

    /// The same tensor on another device of this process.
    fn to_other_device<const D: usize>(
        x: Tensor<Self, D>,
        device: &Self::Device,
    ) -> Tensor<Self, D> {
        x.to_device(device)
    }

    /// New contiguous tensors on each of some devices, from bytes that `fill` writes:
    /// all pieces of one tensor, then all of the next. What it reads is read once for all devices.
    ///
    /// # Errors
    /// The first of `fill`, or that a device has no room.
    fn upload<E: From<UploadError>>(
        devices: &[Self::Device],
        tensors: &[Upload],
        fill: Fill<'_, E>,
    ) -> Result<Vec<Vec<FloatTensor<Self>>>, E> {
        upload::through_tensor_data::<Self, E>(devices, tensors, fill)
    }
}
