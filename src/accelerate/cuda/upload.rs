//! Weights to one card or several through page-locked memory.
//!
//! cubecl's own upload copies the bytes of a tensor twice on the host and hands the driver memory that is
//! not page-locked, which it copies once more. Here a ring of page-locked pieces is filled by the
//! caller, on as many threads as it likes, while the cards copy the previous pieces: the slower of the
//! two sets the speed, and a piece is read once for all cards.

use burn::{
    backend::{Cuda, cuda::CudaDevice},
    tensor::ops::FloatTensor,
};
use cubecl::Runtime;
use cubecl_cuda::CudaRuntime;

use super::{
    collective::{addresses, wait},
    launch::Buffer,
    memory::exact,
    module::DriverError,
    stream::{Context, Event, PinnedMemory, Stream},
};
use crate::ops::upload::{Fill, Upload, UploadError};

/// Bytes of a piece: large enough that filling it in parallel pays.
const PIECE_BYTES: usize = 32 << 20;
/// Pieces of the ring: one being filled, the others on their way.
const PIECES: usize = 4;

/// One card's stream. It is synchronised before anything it reads is freed.
struct Lane {
    device: usize,
    context: Context,
    stream: Stream,
    buffers: Vec<Buffer>,
    addresses: Vec<u64>,
}

/// Page-locked memory and, for each lane, the event after its last copy out of it.
struct Piece {
    memory: PinnedMemory,
    events: Vec<Event>,
    underway: bool,
}

/// All that is allocated for one call; freed when it ends, on errors too: the lanes first.
struct Ring {
    lanes: Vec<Lane>,
    pieces: Vec<Piece>,
}

fn on_device(device: usize) -> impl Fn(DriverError) -> UploadError {
    move |error| UploadError(format!("device cuda:{device}, {error}"))
}

impl Lane {
    /// Takes memory for all tensors of a device, of exactly their size: they live as long as the model.
    fn new(device: &CudaDevice, tensors: &[Upload]) -> Result<Self, UploadError> {
        let client = CudaRuntime::client(device);
        let bytes: usize = tensors.iter().map(Upload::byte_len).sum();
        let buffers: Vec<Buffer> = exact(&client, || {
            tensors
                .iter()
                .map(|tensor| {
                    burn_cubecl::ops::numeric::empty_device_contiguous_dtype(
                        client.clone(),
                        device.clone(),
                        tensor.shape.clone(),
                        tensor.dtype,
                    )
                })
                .collect()
        });
        let addresses = addresses(&buffers).map_err(|reason| {
            UploadError(format!(
                "device cuda:{} is out of memory: the weights need {:.1} GiB ({reason})",
                device.index,
                bytes as f64 / (1u64 << 30) as f64
            ))
        })?;
        // The memory may have been another tensor's, whose last use is still queued.
        if let Some(first) = buffers.first() {
            wait(first).map_err(UploadError)?;
        }
        let stream = || -> Result<(Context, Stream), DriverError> {
            let context = Context::of(device.index)?;
            context.enter()?;
            Ok((context, Stream::new(context)?))
        };
        let (context, stream) = stream().map_err(on_device(device.index))?;
        Ok(Self {
            device: device.index,
            context,
            stream,
            buffers,
            addresses,
        })
    }
}

impl Ring {
    fn new(devices: &[CudaDevice], tensors: &[Upload]) -> Result<Self, UploadError> {
        let lanes = devices
            .iter()
            .map(|device| Lane::new(device, tensors))
            .collect::<Result<Vec<_>, _>>()?;
        let most = tensors.iter().map(Upload::byte_len).max().unwrap_or(0);
        let mut pieces = Vec::with_capacity(PIECES);
        for _ in 0..PIECES {
            let first = &lanes[0];
            let memory = PinnedMemory::new(first.context, most.min(PIECE_BYTES));
            let events = lanes.iter().map(|lane| {
                let made = lane.context.enter().and_then(|()| Event::new(lane.context));
                made.map_err(on_device(lane.device))
            });
            pieces.push(Piece {
                memory: memory.map_err(on_device(first.device))?,
                events: events.collect::<Result<_, _>>()?,
                underway: false,
            });
        }
        Ok(Self { lanes, pieces })
    }

    /// Waits until all cards have copied a piece, and has it filled again.
    fn fill<E: From<UploadError>>(
        &mut self,
        piece: usize,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.free(piece)?;
        // SAFETY: no card reads the piece any more.
        #[allow(unsafe_code)]
        let room = unsafe { self.pieces[piece].memory.bytes_mut() };
        fill(&mut room[..bytes])
    }

    /// Waits until all cards have copied a piece.
    fn free(&mut self, piece: usize) -> Result<(), UploadError> {
        let piece = &mut self.pieces[piece];
        if std::mem::take(&mut piece.underway) {
            for (lane, event) in self.lanes.iter().zip(&piece.events) {
                event.wait().map_err(on_device(lane.device))?;
            }
        }
        Ok(())
    }

    /// Queues the copy of the first bytes of a piece to an offset of a tensor, on all cards.
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
            let into = lane.addresses[tensor] + offset as u64;
            // SAFETY: the piece is not written to before its events have passed; the tensor has as many
            // bytes after `offset`.
            #[allow(unsafe_code)]
            let queued = lane.context.enter().and_then(|()| unsafe {
                lane.stream.send(into, &piece.memory.bytes()[..bytes])?;
                event.record(&lane.stream)
            });
            queued.map_err(on_device(lane.device))?;
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

/// The tensors on each of the devices; see [`crate::runtime::accelerator::Accelerator::upload`].
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
            ring.fill(piece, bytes, |room| fill(place, offset, room))?;
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

    /// The bytes read back are those sent, over tensors smaller and larger than a piece, on every device
    /// there is; an error of the source is returned.
    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn bytes_arrive_as_they_were_filled_in() {
        let devices: Vec<CudaDevice> = (0..2)
            .map(CudaDevice::new)
            .take_while(|device| {
                crate::base::panics::quietly(|| {
                    Tensor::<Cuda, 1>::ones([2], device).sum().into_data()
                })
                .is_ok()
            })
            .collect();
        assert!(!devices.is_empty(), "no CUDA device answers");
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
