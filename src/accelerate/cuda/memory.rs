//! Memory whose size follows the work: cubecl's pools take pages by the size of the card.
//!
//! On a card of 139 GiB a tensor of 100 MB is a piece of a page of 2.2 GiB, and one of a gigabyte of a
//! page of 8.7 GiB. Long-lived tensors (weights, moments) and those of a training step therefore get memory
//! of exactly their size, which is kept for the next step of the same sizes and freed when other sizes come.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
};

use burn::backend::cuda::CudaDevice;
use cubecl::Runtime;
use cubecl_cuda::CudaRuntime;
use cubecl_runtime::memory_management::MemoryAllocationMode;
use cudarc::driver::{result, sys};

use super::launch::Client;

thread_local! {
    /// Depth of nested uses of exact memory on this thread.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// The sizes of the latest work on each device.
    static SIZES: RefCell<BTreeMap<usize, Vec<usize>>> = const { RefCell::new(BTreeMap::new()) };
}

/// Ends the use of exact memory also when its work panics.
struct Exact<'a>(&'a Client);

impl<'a> Exact<'a> {
    fn begin(client: &'a Client) -> Self {
        DEPTH.set(DEPTH.get() + 1);
        set(client, MemoryAllocationMode::Persistent);
        Self(client)
    }
}

impl Drop for Exact<'_> {
    fn drop(&mut self) {
        let depth = DEPTH.get() - 1;
        DEPTH.set(depth);
        if depth == 0 {
            set(self.0, MemoryAllocationMode::Auto);
        }
    }
}

fn set(client: &Client, mode: MemoryAllocationMode) {
    // SAFETY: the mode is that of the calling thread's queue alone, in the order of its operations; memory
    // allocated meanwhile is kept until `memory_cleanup`, which `in_exact_memory` calls.
    #[allow(unsafe_code)]
    unsafe {
        client.allocation_mode(mode);
    }
}

/// Tensors made by `work` get allocations of exactly their size, not reused: for long-lived tensors.
pub(super) fn exact<R>(client: &Client, work: impl FnOnce() -> R) -> R {
    let _exact = Exact::begin(client);
    work()
}

/// [`exact`] for repeated work: its freed memory is reused by work of the same `sizes`, and
/// freed before work of other sizes. Without sizes the work belongs to the previous one.
pub(super) fn in_exact_memory<R>(
    device: &CudaDevice,
    sizes: Option<&[usize]>,
    work: impl FnOnce() -> R,
) -> R {
    let client = CudaRuntime::client(device);
    if let Some(sizes) = sizes {
        let before = SIZES.with_borrow_mut(|all| all.insert(device.index, sizes.to_vec()));
        match before {
            Some(before) if before == sizes => {}
            Some(_) => client.memory_cleanup(),
            None => {
                keep_freed_memory(device.index);
                client.memory_cleanup();
            }
        }
    }
    exact(&client, work)
}

/// Lets the driver keep freed memory for the next allocation, rather than return it to the system at
/// the next synchronisation and map it again: 30 GiB of a step take tens of milliseconds.
fn keep_freed_memory(device: usize) {
    let keep = || -> Result<(), result::DriverError> {
        let mut pool = std::ptr::null_mut();
        let mut all = u64::MAX;
        // SAFETY: the pool is the device's own and stays; the attribute is 64 bits wide.
        #[allow(unsafe_code)]
        unsafe {
            let device = result::device::get(device as i32)?;
            sys::cuDeviceGetDefaultMemPool(&mut pool, device).result()?;
            sys::cuMemPoolSetAttribute(
                pool,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                (&raw mut all).cast(),
            )
            .result()
        }
    };
    if let Err(error) = keep() {
        log::debug!("the driver returns freed memory to the system at once: {error}");
    }
}
