//! Weights to one card or several through page-locked memory.
//!
//! cubecl's own way copies the bytes of a tensor twice on the host and hands the driver memory that is
//! not page-locked, which it copies once more. Here a ring of page-locked pieces is filled by the
//! caller, on as many threads as it likes, while the cards fetch the pieces before: the slower of the
//! two is the speed of the whole, and a piece is read once for all cards.

use std::ffi::c_void;

use burn::{
    backend::{Cuda, cuda::CudaDevice},
    tensor::ops::FloatTensor,
};
use cubecl::Runtime;
use cubecl_cuda::CudaRuntime;
use cudarc::driver::{DriverError, result, sys};

use super::{
    collective::{address, enter, wait},
    launch::Buffer,
};
use crate::kernels::upload::{Fill, Upload, UploadError};

/// Bytes of a piece: large enough that filling it in parallel pays.
const PIECE_BYTES: usize = 32 << 20;
/// Pieces of the ring: one being filled, the others on their way.
const PIECES: usize = 4;

/// A card's side.
struct Lane {
    device: usize,
    context: sys::CUcontext,
    stream: sys::CUstream,
    buffers: Vec<Buffer>,
    addresses: Vec<u64>,
}

/// Page-locked memory and, for each lane, the event behind its last copy out of it.
struct Piece {
    memory: *mut u8,
    events: Vec<sys::CUevent>,
    underway: bool,
}

/// All that is made for one call; given back when it ends, however it ends.
struct Ring {
    lanes: Vec<Lane>,
    pieces: Vec<Piece>,
}

fn said(device: usize, doing: &str) -> impl Fn(DriverError) -> UploadError {
    move |error| UploadError(format!("device cuda:{device}, {doing}: {error}"))
}

impl Lane {
    /// Takes memory for all tensors of a device.
    fn new(device: &CudaDevice, tensors: &[Upload]) -> Result<Self, UploadError> {
        let client = CudaRuntime::client(device);
        let bytes: usize = tensors.iter().map(Upload::byte_len).sum();
        let mut buffers = Vec::with_capacity(tensors.len());
        let mut addresses = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let buffer = burn_cubecl::ops::numeric::empty_device_contiguous_dtype(
                client.clone(),
                device.clone(),
                tensor.shape.clone(),
                tensor.dtype,
            );
            let place = address(&buffer).map_err(|reason| {
                UploadError(format!(
                    "device cuda:{} is out of memory: the weights need {:.1} GiB ({reason})",
                    device.index,
                    bytes as f64 / (1u64 << 30) as f64
                ))
            })?;
            addresses.push(place);
            buffers.push(buffer);
        }
        // The memory may have been another tensor's, whose last use is still queued.
        if let Some(first) = buffers.first() {
            wait(first).map_err(UploadError)?;
        }
        let context = enter(device.index).map_err(UploadError)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(said(device.index, "making a stream"))?;
        Ok(Self {
            device: device.index,
            context,
            stream,
            buffers,
            addresses,
        })
    }

    fn enter(&self) -> Result<(), UploadError> {
        // SAFETY: the context is the device's primary one, which is never given back.
        #[allow(unsafe_code)]
        unsafe { result::ctx::set_current(self.context) }
            .map_err(said(self.device, "choosing the device"))
    }
}

impl Ring {
    fn new(devices: &[CudaDevice], tensors: &[Upload]) -> Result<Self, UploadError> {
        let mut ring = Self {
            lanes: Vec::new(),
            pieces: Vec::new(),
        };
        for device in devices {
            ring.lanes.push(Lane::new(device, tensors)?);
        }
        let most = tensors.iter().map(Upload::byte_len).max().unwrap_or(0);
        let piece_bytes = most.min(PIECE_BYTES);
        for _ in 0..PIECES {
            // SAFETY: plain driver calls; `drop` gives everything back.
            #[allow(unsafe_code)]
            let memory =
                unsafe { result::malloc_host(piece_bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) }
                    .map_err(said(ring.lanes[0].device, "taking page-locked memory"))?;
            // SAFETY: the memory is ours and as long; as a slice it must be initialised.
            #[allow(unsafe_code)]
            unsafe {
                memory.cast::<u8>().write_bytes(0, piece_bytes);
            }
            ring.pieces.push(Piece {
                memory: memory.cast(),
                events: Vec::new(),
                underway: false,
            });
        }
        for lane in &ring.lanes {
            lane.enter()?;
            for piece in &mut ring.pieces {
                let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                    .map_err(said(lane.device, "making an event"))?;
                piece.events.push(event);
            }
        }
        Ok(ring)
    }

    /// Waits until all cards have fetched what a piece held.
    fn free(&mut self, piece: usize) -> Result<(), UploadError> {
        let piece = &mut self.pieces[piece];
        if std::mem::take(&mut piece.underway) {
            for (lane, event) in self.lanes.iter().zip(&piece.events) {
                // SAFETY: the event was made above and is not destroyed before `drop`.
                #[allow(unsafe_code)]
                unsafe { result::event::synchronize(*event) }
                    .map_err(said(lane.device, "waiting for a copy"))?;
            }
        }
        Ok(())
    }

    /// Lets all cards fetch `bytes` bytes of a piece to an offset of a tensor.
    fn send(
        &mut self,
        piece: usize,
        tensor: usize,
        offset: usize,
        bytes: usize,
    ) -> Result<(), UploadError> {
        let piece = &mut self.pieces[piece];
        piece.underway = true;
        for (lane, event) in self.lanes.iter().zip(&piece.events) {
            lane.enter()?;
            // SAFETY: the piece holds as many bytes and is not written to before its events have
            // passed; the tensor has as many behind `offset`.
            #[allow(unsafe_code)]
            let queued = unsafe {
                let from = std::slice::from_raw_parts(piece.memory, bytes);
                let into = lane.addresses[tensor] + offset as u64;
                result::memcpy_htod_async(into, from, lane.stream)
                    .and_then(|()| result::event::record(*event, lane.stream))
            };
            queued.map_err(said(lane.device, "copying"))?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<Vec<Buffer>>, UploadError> {
        (0..self.pieces.len()).try_for_each(|piece| self.free(piece))?;
        Ok(self
            .lanes
            .iter_mut()
            .map(|lane| std::mem::take(&mut lane.buffers))
            .collect())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: every stream is waited for before what it reads is given back. Errors are not acted
        // on: there is nothing left to do with the handles.
        #[allow(unsafe_code)]
        unsafe {
            for (place, lane) in self.lanes.iter().enumerate() {
                if lane.enter().is_err() {
                    continue;
                }
                let _ = result::stream::synchronize(lane.stream);
                for piece in &self.pieces {
                    if let Some(event) = piece.events.get(place) {
                        let _ = result::event::destroy(*event);
                    }
                }
                let _ = result::stream::destroy(lane.stream);
            }
            for piece in &self.pieces {
                let _ = result::free_host(piece.memory.cast::<c_void>());
            }
        }
    }
}

/// The tensors on each of the devices; see [`crate::kernels::Kernels::upload`].
pub(super) fn upload<E: From<UploadError>>(
    devices: &[CudaDevice],
    tensors: &[Upload],
    fill: Fill<'_, E>,
) -> Result<Vec<Vec<FloatTensor<Cuda>>>, E> {
    if devices.is_empty() || tensors.is_empty() {
        return Ok(devices.iter().map(|_| Vec::new()).collect());
    }
    let mut ring = Ring::new(devices, tensors)?;
    let mut next = 0;
    for (place, tensor) in tensors.iter().enumerate() {
        let all = tensor.byte_len();
        for offset in (0..all).step_by(PIECE_BYTES) {
            let bytes = PIECE_BYTES.min(all - offset);
            let piece = next % PIECES;
            next += 1;
            ring.free(piece)?;
            // SAFETY: the piece has at least as many bytes, initialised, and no card reads them any more.
            #[allow(unsafe_code)]
            let room = unsafe { std::slice::from_raw_parts_mut(ring.pieces[piece].memory, bytes) };
            fill(place, offset, room)?;
            ring.send(piece, place, offset, bytes)?;
        }
    }
    Ok(ring.finish()?)
}

#[cfg(test)]
mod tests {
    use burn::{
        prelude::*,
        tensor::{DType, Shape, TensorPrimitive},
    };

    use super::*;

    /// What comes back is what was sent, over tensors smaller and larger than a piece, on every device
    /// there is; an error of the source is handed on.
    #[test]
    fn bytes_arrive_as_they_were_filled_in() {
        let devices: Vec<CudaDevice> = (0..2)
            .map(CudaDevice::new)
            .take_while(|device| {
                crate::backend::quietly(|| Tensor::<Cuda, 1>::ones([2], device).sum().into_data())
                    .is_ok()
            })
            .collect();
        if devices.is_empty() {
            println!("SKIPPED: no CUDA device answers, so nothing is sent");
            return;
        }
        let rows = [1, 7, 1000, 3 * PIECE_BYTES / 4 / 64 + 5];
        let tensors: Vec<Upload> = rows
            .iter()
            .flat_map(|rows| [(64, DType::F32), (33, DType::BF16)].map(|one| (*rows, one)))
            .map(|(rows, (columns, dtype))| Upload {
                shape: Shape::from([rows, columns]),
                dtype,
            })
            .collect();
        let byte = |place: usize, at: usize| ((at * 31 + at / 251 + place) % 0x3f) as u8;
        let sent = upload::<UploadError>(&devices, &tensors, &mut |place, offset, out| {
            for (at, out) in out.iter_mut().enumerate() {
                *out = byte(place, offset + at);
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(sent.len(), devices.len());
        for (device, sent) in devices.iter().zip(sent) {
            for (place, (buffer, tensor)) in sent.into_iter().zip(&tensors).enumerate() {
                let tensor_here = Tensor::<Cuda, 2>::from_primitive(TensorPrimitive::Float(buffer));
                assert_eq!(tensor_here.device(), *device);
                let data = tensor_here.into_data();
                assert_eq!((&data.shape, data.dtype), (&tensor.shape, tensor.dtype));
                let wrong = data
                    .bytes
                    .iter()
                    .enumerate()
                    .find(|(at, found)| **found != byte(place, *at));
                assert_eq!(wrong, None, "tensor {place}");
            }
        }
        println!(
            "sent {} tensors to {} device(s)",
            tensors.len(),
            devices.len()
        );
        let refused = upload::<UploadError>(&devices, &tensors, &mut |place, _, _| match place {
            3 => Err(UploadError("no such byte".to_string())),
            _ => Ok(()),
        });
        assert_eq!(refused.unwrap_err().to_string(), "no such byte");
    }
}
