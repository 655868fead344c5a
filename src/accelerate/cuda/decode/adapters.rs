//! Unmerged adapters: the addresses of their low-rank matrices, in one table on the device, so that a
//! captured step serves whichever are loaded.

use burn::{prelude::*, tensor::DType};

use super::{
    module::DriverError,
    stream::{Context, DeviceMemory, Stream},
    weights::{ADAPTER_RANK, Addresses},
};
use crate::{
    accelerate::cuda::launch::{Backend, Buffer, Client, contiguous, float_bits},
    ops::cast::to_dtype,
    qwen3_vl::{Qwen3Vl, nn::Linear},
    weights::lora::Lora,
};

/// Most adapters at once.
const PLACES: usize = 64;

/// 64-bit words of an entry, `AdapterMatrix` of `adapter.cuh`.
const ENTRY: usize = 4;

/// The table.
pub(super) struct AdapterTable {
    memory: DeviceMemory,
    matrices: usize,
    /// The buffers that each entry points to.
    places: Vec<Option<Vec<Buffer>>>,
}

impl AdapterTable {
    pub(super) fn new(matrices: usize, context: Context) -> Result<Self, DriverError> {
        Ok(Self {
            memory: DeviceMemory::zeroed(context, PLACES * matrices * ENTRY * size_of::<u64>())?,
            matrices,
            places: vec![None; PLACES],
        })
    }

    pub(super) fn address(&self) -> u64 {
        self.memory.address
    }

    /// Adds the adapter attached to `model`; returns its index.
    ///
    /// # Errors
    /// What the step does not support, or the driver's error.
    pub(super) fn insert(
        &mut self,
        model: &Qwen3Vl<Backend>,
        client: &Client,
        stream: &Stream,
    ) -> Result<usize, String> {
        let place = self.places.iter().position(Option::is_none);
        let place = place
            .ok_or_else(|| format!("{PLACES} adapters are loaded already; unload one first"))?;
        let mut addresses = Addresses::new(client);
        let mut words = Vec::with_capacity(self.matrices * ENTRY);
        for layer in &model.model.language_model.layers {
            for linear in layer.projections() {
                words.extend(entry(linear, &mut addresses)?);
            }
        }
        words.extend(match &model.lm_head {
            Some(head) => entry(head, &mut addresses)?,
            None => [0; ENTRY],
        });
        let synced = cubecl_common::future::block_on(client.sync());
        synced.map_err(|error| format!("{error:?}"))?;
        let at = self.memory.address + (place * self.matrices * ENTRY * size_of::<u64>()) as u64;
        // SAFETY: the table has room for `PLACES` times so many words.
        #[allow(unsafe_code)]
        let sent = unsafe { stream.send(at, &words) };
        sent.and_then(|()| stream.wait())
            .map_err(|error| error.to_string())?;
        self.places[place] = Some(addresses.kept());
        Ok(place)
    }

    /// Frees an entry that no row uses any more.
    pub(super) fn remove(&mut self, place: usize) {
        self.places[place] = None;
    }
}

/// The entry of one layer's adapter; zeros without one.
fn entry(linear: &Linear<Backend>, addresses: &mut Addresses<'_>) -> Result<[u64; ENTRY], String> {
    let Some(lora) = &linear.lora else {
        return Ok([0; ENTRY]);
    };
    let [rank, _] = lora.lora_a.dims();
    let padded = rank.next_multiple_of(8);
    if padded > ADAPTER_RANK {
        return Err(format!(
            "its rank is {rank}, an adapter of a running model may have {ADAPTER_RANK} at most; `merge` makes a merged checkpoint of it"
        ));
    }
    let (a, b) = padded_pair(lora, padded);
    let mut address = |buffer, dtype, shape: &[usize]| {
        let placed = match *shape {
            [length] => addresses.contiguous(buffer, dtype, [length]),
            _ => addresses.contiguous(buffer, dtype, [shape[0], shape[1]]),
        };
        placed.map_err(|error| error.to_string())
    };
    let [width, rows] = [lora.lora_a.dims()[1], lora.lora_b.dims()[0]];
    let scale = match &lora.lora_magnitude_vector {
        Some(magnitude) => {
            let norms = lora.composed_row_norms(linear.weight.val());
            let scale = contiguous(to_dtype(magnitude.val() / norms, DType::F32));
            address(scale, DType::F32, &[rows])?
        }
        None => 0,
    };
    Ok([
        address(a, DType::BF16, &[padded, width])?,
        address(b, DType::BF16, &[rows, padded])?,
        scale,
        padded as u64 | float_bits(lora.scaling()) << 32,
    ])
}

/// `A` `[padded, in]` and `B` `[out, padded]`, bf16, padded with zeros after the rank.
fn padded_pair(lora: &Lora<Backend>, padded: usize) -> (Buffer, Buffer) {
    let (a, b) = (lora.lora_a.val(), lora.lora_b.val());
    let [rank, width] = a.dims();
    let [rows, _] = b.dims();
    let (a, b) = if rank == padded {
        (a, b)
    } else {
        let options = (&a.device(), a.dtype());
        let below = Tensor::zeros([padded - rank, width], options);
        let padding = Tensor::zeros([rows, padded - rank], options);
        (
            Tensor::cat(vec![a, below], 0),
            Tensor::cat(vec![b, padding], 1),
        )
    };
    (
        contiguous(to_dtype(a, DType::BF16)),
        contiguous(to_dtype(b, DType::BF16)),
    )
}
