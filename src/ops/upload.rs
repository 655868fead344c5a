//! Upload of tensors from host memory to one device or several, filled in the buffer that is copied.

use burn::{
    prelude::Backend,
    tensor::{Bytes, DType, Shape, TensorData, ops::FloatTensor},
};

/// Bytes on their way to a device before the host waits for it: a device takes copies faster than it
/// empties them, and each holds host memory.
pub(crate) const UNDERWAY_BYTES: usize = 512 << 20;

/// Why tensors did not come to a device.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct UploadError(pub String);

/// Shape and type of a tensor that is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    /// Shape.
    pub shape: Shape,
    /// f32, bf16 or f16.
    pub dtype: DType,
}

impl Upload {
    /// Bytes of all elements.
    pub fn byte_len(&self) -> usize {
        self.shape.num_elements() * self.dtype.size()
    }
}

/// Writes bytes of a tensor: its place in the list, the offset of the first byte, and where they go.
/// The pieces of a tensor come in order, and start and end between elements.
pub type Fill<'a, E> = &'a mut dyn FnMut(usize, usize, &mut [u8]) -> Result<(), E>;

/// Sends through Burn's own `from_data`, each tensor in one piece.
pub(super) fn through_tensor_data<B: Backend, E>(
    devices: &[B::Device],
    tensors: &[Upload],
    fill: Fill<'_, E>,
) -> Result<Vec<Vec<FloatTensor<B>>>, E> {
    let mut sent: Vec<Vec<FloatTensor<B>>> = devices.iter().map(|_| Vec::new()).collect();
    let mut underway = 0;
    for (place, tensor) in tensors.iter().enumerate() {
        let bytes = filled(place, tensor, fill)?;
        underway += bytes.len();
        if underway > UNDERWAY_BYTES {
            underway = bytes.len();
            devices.iter().for_each(|device| {
                let _ = B::sync(device);
            });
        }
        let data = TensorData::from_bytes(bytes, tensor.shape.clone(), tensor.dtype);
        // The last device takes the bytes themselves.
        if let [others @ .., last] = devices {
            for (device, sent) in others.iter().zip(&mut sent) {
                sent.push(B::float_from_data(data.clone(), device));
            }
            sent[others.len()].push(B::float_from_data(data, last));
        }
    }
    Ok(sent)
}

/// The bytes of a tensor, aligned as its elements are.
fn filled<E>(place: usize, tensor: &Upload, fill: Fill<'_, E>) -> Result<Bytes, E> {
    let count = tensor.shape.num_elements();
    Ok(if tensor.dtype.size() == 4 {
        let mut words = vec![0u32; count];
        fill(place, 0, bytemuck::cast_slice_mut(&mut words))?;
        Bytes::from_elems(words)
    } else {
        let mut words = vec![0u16; count];
        fill(place, 0, bytemuck::cast_slice_mut(&mut words))?;
        Bytes::from_elems(words)
    })
}
