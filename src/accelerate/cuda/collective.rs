//! Several CUDA devices, of one process or several: NCCL all-reduce, copies between devices, device memory.
//!
//! cubecl offers a sum and copies through NCCL of its own, but errors there are only logged:
//! a failed sum would leave every device with its own gradients. Here each call returns its
//! error, and a device that waits for a failed one is released.

use std::{
    ffi::c_void,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use burn::{
    backend::{Cuda, cuda::CudaDevice},
    prelude::*,
    tensor::DType,
};
use cubecl_common::future::block_on;
use cudarc::driver::{DriverError, result, sys};

use super::{
    launch::{Buffer, contiguous, empty, tensor},
    nccl::{Communicator, Nccl, UniqueId},
};
use crate::ops::{AllReduce, DeviceMemory, Others};

/// How long a device is polled without sleeping; a sum of adapters' gradients takes less.
const SPIN: Duration = Duration::from_millis(20);

/// Memory of the calling thread's stream: cubecl keeps a pool for each.
pub(super) fn memory_in_use(device: &CudaDevice) -> Option<DeviceMemory> {
    let tensor = Tensor::<Cuda, 1>::empty([1], device);
    let usage = tensor.into_primitive().tensor().client.memory_usage();
    usage.ok().map(|usage| DeviceMemory {
        in_use: usage.bytes_in_use,
        reserved: usage.bytes_reserved,
    })
}

/// Makes a device's context, the one cubecl uses, current for the calling thread.
pub(super) fn enter(device: usize) -> Result<sys::CUcontext, String> {
    let open = || -> Result<sys::CUcontext, DriverError> {
        result::init()?;
        let number = result::device::get(device as i32)?;
        // SAFETY: the device comes from the driver; its primary context is never released.
        #[allow(unsafe_code)]
        unsafe {
            let context = result::primary_ctx::retain(number)?;
            result::ctx::set_current(context)?;
            Ok(context)
        }
    };
    open().map_err(|error| format!("device cuda:{device}: {error}"))
}

/// Addresses of buffers of one device; fetched together, because each request to cubecl's thread of the
/// device waits for it.
pub(super) fn addresses(buffers: &[Buffer]) -> Result<Vec<u64>, String> {
    let Some(first) = buffers.first() else {
        return Ok(Vec::new());
    };
    let device = first.device.index;
    let find = || -> Result<Vec<u64>, String> {
        buffers
            .iter()
            .map(|buffer| {
                let resource = buffer.client.get_resource(buffer.handle.clone());
                resource
                    .map(|resource| resource.resource().ptr)
                    .map_err(|error| format!("no memory on cuda:{device}: {error:?}"))
            })
            .collect()
    };
    let found = first.client.exclusive(find);
    found.map_err(|error| format!("device cuda:{device}: {error:?}"))?
}

/// Synchronises the work of the calling thread on a buffer's device.
pub(super) fn wait(buffer: &Buffer) -> Result<(), String> {
    block_on(buffer.client.sync())
        .map_err(|error| format!("device cuda:{}: {error:?}", buffer.device.index))
}

/// A copy of a tensor on another device: directly where the cards can, else through the host, as the
/// driver sees fit.
///
/// # Panics
/// When the driver fails, for instance out of memory.
pub(super) fn to_other_device<const D: usize>(
    x: Tensor<Cuda, D>,
    device: &CudaDevice,
) -> Tensor<Cuda, D> {
    if x.device() == *device {
        return x;
    }
    let from = contiguous(x);
    copy(&from, device).map_or_else(|reason| panic!("{reason}"), tensor)
}

fn copy(from: &Buffer, device: &CudaDevice) -> Result<Buffer, String> {
    let into = burn_cubecl::ops::numeric::empty_device_contiguous_dtype(
        <cubecl_cuda::CudaRuntime as cubecl::Runtime>::client(device),
        device.clone(),
        from.meta.shape().clone(),
        from.dtype,
    );
    let bytes = from.meta.shape().num_elements() * from.dtype.size();
    if bytes == 0 {
        return Ok(into);
    }
    let source_address = addresses(std::slice::from_ref(from))?[0];
    let target_address = addresses(std::slice::from_ref(&into))?[0];
    wait(from)?;
    wait(&into)?;
    let source = enter(from.device.index)?;
    let target = enter(device.index)?;
    // SAFETY: both buffers are alive, hold as many bytes, and no queued work touches them.
    #[allow(unsafe_code)]
    let copied = unsafe {
        sys::cuMemcpyPeer(target_address, target, source_address, source, bytes)
            .result()
            // The call may return before the last bytes have arrived.
            .and_then(|()| sys::cuCtxSynchronize().result())
    };
    copied.map_err(|error| {
        format!(
            "copying {bytes} bytes from cuda:{} to cuda:{}: {error}",
            from.device.index, device.index
        )
    })?;
    Ok(into)
}

/// A device's part of a group.
struct Member {
    device: usize,
    communicator: Communicator,
    stream: sys::CUstream,
    /// Whether the communicator was destroyed.
    ended: bool,
}

// SAFETY: a member is used by one thread at a time, and each use makes its context current first.
#[allow(unsafe_code)]
unsafe impl Send for Member {}

/// Devices that all-reduce through NCCL.
struct Group {
    nccl: &'static Nccl,
    /// In the order of `devices`.
    members: Vec<Mutex<Member>>,
    devices: Vec<usize>,
    /// Devices that add up together, those of other processes included.
    all: usize,
    patience: Duration,
    given_up: AtomicBool,
}

/// Sums over different devices through NCCL; `None` for one device named several times, which NCCL
/// refuses.
///
/// # Errors
/// When the library is missing, or the devices do not connect.
pub(super) fn all_reduce(
    devices: &[CudaDevice],
    others: Option<&Others<'_>>,
    patience: Duration,
) -> Result<Option<Arc<dyn AllReduce<Cuda>>>, String> {
    let ids: Vec<usize> = devices.iter().map(|device| device.index).collect();
    if (1..ids.len()).any(|at| ids[..at].contains(&ids[at])) {
        return Ok(None);
    }
    let nccl = Nccl::get()?;
    let numbers: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    // NCCL needs the contexts to exist.
    for id in &ids {
        enter(*id)?;
    }
    let all = others.map_or(ids.len(), |others| others.all);
    let communicators = match others {
        None => nccl.communicators(&numbers)?,
        Some(others) => meet(nccl, &ids, others, patience)?,
    };
    let mut members = Vec::with_capacity(ids.len());
    for (device, communicator) in ids.iter().copied().zip(communicators) {
        enter(device)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|error| format!("device cuda:{device}: {error}"))?;
        members.push(Mutex::new(Member {
            device,
            communicator,
            stream,
            ended: false,
        }));
    }
    Ok(Some(Arc::new(Group {
        nccl,
        members,
        devices: ids,
        all,
        patience,
        given_up: AtomicBool::new(false),
    })))
}

/// Communicators with the devices of other processes; all processes call it together.
fn meet(
    nccl: &'static Nccl,
    ids: &[usize],
    others: &Others<'_>,
    patience: Duration,
) -> Result<Vec<Communicator>, String> {
    // Only the first process's address counts.
    let own = match others.first {
        0 => Some(nccl.unique_id()?.bytes().to_vec()),
        _ => None,
    };
    let id = UniqueId::of(&(others.hand_out)(own)?)?;
    let made = nccl.begin_across(ids, [others.first, others.all], id, |device| {
        enter(device).map(|_| ())
    })?;
    let end = Instant::now() + patience;
    let mut failed = None;
    while failed.is_none() {
        let mut is_busy = false;
        for communicator in &made {
            match nccl.is_busy(*communicator) {
                Ok(busy) => is_busy |= busy,
                Err(reason) => failed = Some(reason),
            }
        }
        if !is_busy && failed.is_none() {
            return Ok(made);
        }
        if (others.is_over)() {
            failed = Some("another process ended".into());
        } else if Instant::now() > end {
            failed = Some(format!(
                "the devices of all processes did not connect within {} s; NCCL_SOCKET_IFNAME names the network interface",
                patience.as_secs_f64()
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    for communicator in made {
        nccl.end(communicator, true);
    }
    Err(failed.unwrap_or_default())
}

impl Group {
    fn add(&self, member: &Member, from: &[Buffer], into: &[Buffer]) -> Result<(), String> {
        let places = addresses(from)?.into_iter().zip(addresses(into)?);
        let tensors: Vec<(u64, u64, usize)> = places
            .zip(from)
            .map(|((from, into), buffer)| (from, into, buffer.meta.shape().num_elements()))
            .collect();
        from.first().map_or(Ok(()), wait)?;
        enter(member.device)?;
        // SAFETY: all buffers are alive to the end of this function, which waits for the stream.
        #[allow(unsafe_code)]
        unsafe {
            self.nccl.sum(
                &tensors,
                member.communicator,
                member.stream.cast::<c_void>(),
            )?;
        }
        let started = Instant::now();
        loop {
            // Across processes the sum reaches the stream some time after the call that queues it.
            if !self.nccl.is_busy(member.communicator)? {
                // SAFETY: the stream is the member's own.
                #[allow(unsafe_code)]
                match unsafe { sys::cuStreamQuery(member.stream) } {
                    sys::CUresult::CUDA_SUCCESS => {
                        return self.nccl.is_busy(member.communicator).map(|_| ());
                    }
                    sys::CUresult::CUDA_ERROR_NOT_READY => {}
                    error => return Err(format!("device cuda:{}: {error:?}", member.device)),
                }
            }
            if self.given_up.load(Ordering::Relaxed) {
                return Err("another device failed".to_string());
            }
            match started.elapsed() {
                waited if waited > self.patience => {
                    return Err(format!(
                        "the other devices did not add up within {} s",
                        self.patience.as_secs_f64()
                    ));
                }
                waited if waited > SPIN => std::thread::sleep(Duration::from_micros(200)),
                _ => std::thread::yield_now(),
            }
        }
    }
}

impl AllReduce<Cuda> for Group {
    fn sum(&self, tensors: Vec<Tensor<Cuda, 1>>) -> Result<Vec<Tensor<Cuda, 1>>, String> {
        assert!(tensors.iter().all(|x| x.dtype() == DType::F32));
        let from: Vec<Buffer> = tensors.into_iter().map(contiguous).collect();
        let Some(first) = from.first() else {
            return Ok(Vec::new());
        };
        let place = self.devices.iter().position(|id| *id == first.device.index);
        let mut member = self.members[place.ok_or("a device outside the group")?]
            .lock()
            .unwrap_or_else(|lock| lock.into_inner());
        if member.ended {
            return Err("the devices are no longer together".to_string());
        }
        let into: Vec<Buffer> = from
            .iter()
            .map(|buffer| empty(buffer, [buffer.meta.shape().num_elements()], DType::F32))
            .collect();
        let added = self.add(&member, &from, &into);
        if let Err(reason) = added {
            // The queued sum would hold the buffers and wait for ever.
            member.ended = true;
            self.nccl.end(member.communicator, true);
            return Err(reason);
        }
        Ok(into.into_iter().map(tensor).collect())
    }

    fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    fn len(&self) -> usize {
        self.all
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let abort = self.given_up.load(Ordering::Relaxed);
        for member in &mut self.members {
            let member = member.get_mut().unwrap_or_else(|lock| lock.into_inner());
            if !member.ended && enter(member.device).is_ok() {
                self.nccl.end(member.communicator, abort);
                // SAFETY: nothing is queued on the stream any more.
                #[allow(unsafe_code)]
                let _ = unsafe { result::stream::destroy(member.stream) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> [CudaDevice; 2] {
        [CudaDevice::new(0), CudaDevice::new(1)]
    }

    fn counted(count: usize, factor: f32, device: &CudaDevice) -> Tensor<Cuda, 1> {
        let values: Vec<f32> = (0..count).map(|at| at as f32 * factor).collect();
        Tensor::from_data(TensorData::new(values, [count]), (device, DType::F32))
    }

    #[test]
    #[ignore = "needs two NVIDIA GPUs"]
    fn devices_add_up_to_the_same_bits() {
        let devices = two();
        let patience = Duration::from_secs(60);
        let group = all_reduce(&devices, None, patience).unwrap().unwrap();
        assert_eq!(group.len(), 2);
        for count in [1, 3, 4097, 5_000_000] {
            let sums: Vec<[Vec<f32>; 2]> = std::thread::scope(|scope| {
                let threads: Vec<_> = devices
                    .iter()
                    .enumerate()
                    .map(|(rank, device)| {
                        let group = &group;
                        scope.spawn(move || {
                            let factor = 0.1 + rank as f32;
                            let mine = [count, 7].map(|count| counted(count, factor, device));
                            let started = Instant::now();
                            let sums = group.sum(mine.to_vec()).unwrap();
                            let seconds = started.elapsed().as_secs_f64();
                            println!("rank {rank}: {count} numbers in {:.2} ms", 1e3 * seconds);
                            let mut sums = sums.into_iter().map(|sum| {
                                assert_eq!(sum.device(), *device);
                                sum.into_data().to_vec().unwrap()
                            });
                            [(); 2].map(|()| sums.next().unwrap())
                        })
                    })
                    .collect();
                threads.into_iter().map(|one| one.join().unwrap()).collect()
            });
            assert!(sums[0] == sums[1], "{count} numbers differ");
            assert_eq!((sums[0][0].len(), sums[0][1].len()), (count, 7));
            for sum in &sums[0] {
                for (at, sum) in sum.iter().enumerate() {
                    let (a, b) = (at as f32 * 0.1, at as f32 * 1.1);
                    assert_eq!(*sum, a + b, "number {at} of {count}");
                }
            }
        }
        // A device that comes alone is released.
        group.give_up();
        let alone = group.sum(vec![counted(8, 1.0, &devices[0])]).unwrap_err();
        assert!(alone.contains("another device failed"), "{alone}");
    }

    #[test]
    #[ignore = "needs two NVIDIA GPUs"]
    fn a_copy_on_another_device_has_the_same_bits() {
        let [first, second] = two();
        for count in [1, 1000, 30_000_000] {
            let here = counted(count, 0.37, &first);
            let started = Instant::now();
            let there = to_other_device(here.clone(), &second);
            let seconds = started.elapsed().as_secs_f64();
            println!("{count} numbers in {:.2} ms", 1e3 * seconds);
            assert_eq!(there.device(), second);
            assert!(here.into_data() == there.into_data(), "{count} numbers");
        }
        // A view is copied with its own layout.
        let table = counted(60, 1.0, &first).reshape([6, 10]);
        let transposed = to_other_device(table.clone().transpose(), &second);
        assert_eq!(transposed.into_data(), table.transpose().into_data());
    }
}
