//! Which tile a matmul gets: the one whose waves over the card cost least. Nothing is autotuned.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use cudarc::driver::{result, sys::CUdevice_attribute as Attribute};

use super::buffer::Buffer;

/// Which instructions a matmul uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instructions {
    /// Warpgroup matmul (wgmma) fed by the tensor memory accelerator: Hopper.
    Wgmma,
    /// Warp matmul (mma) fed by asynchronous copies: Ampere and later.
    Mma,
}

/// Properties of a card: the choice of kernels and tiles depends on them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Device {
    /// Compute capability, as major × 10 + minor; 0 where the driver does not answer.
    pub capability: usize,
    /// Instructions.
    pub instructions: Instructions,
    /// Multiprocessors.
    pub processors: usize,
    /// Most shared memory of a block, bytes.
    pub shared_bytes: usize,
}

impl Device {
    /// Whether the card has what the kernels are written for: bf16 mma and asynchronous copies.
    /// Older cards run the plain operations.
    pub(super) fn is_supported(&self) -> bool {
        self.capability >= 80
    }

    /// Whether a kernel may begin before the previous one has ended (programmatic dependent launch).
    pub(super) fn begins_early(&self) -> bool {
        self.capability >= 90 && !ampere_is_forced()
    }
}

/// Set to 1 to use the Ampere kernels on any card.
pub(super) const FORCE_AMPERE: &str = "XRAY_CUDA_SM80";

/// Whether the kernels of newer cards are disabled.
fn ampere_is_forced() -> bool {
    std::env::var(FORCE_AMPERE).is_ok_and(|value| value == "1")
}

/// The card of this number; cards of several kinds may share a machine. The driver is queried once for each.
pub(super) fn card(index: usize) -> Device {
    static CARDS: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    let mut cards = CARDS.lock().unwrap_or_else(PoisonError::into_inner);
    *cards.entry(index).or_insert_with(|| query(index))
}

/// A card's properties from the driver.
fn query(index: usize) -> Device {
    let attribute = |which: Attribute| -> Option<usize> {
        result::init().ok()?;
        let device = result::device::get(index as i32).ok()?;
        // SAFETY: `device` comes from the driver.
        #[allow(unsafe_code)]
        let value = unsafe { result::device::get_attribute(device, which) };
        value.ok().map(|value| value as usize)
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    let forced = ampere_is_forced();
    let capability = major
        .zip(minor)
        .map_or(0, |(major, minor)| major * 10 + minor);
    Device {
        capability,
        instructions: if capability == 90 && !forced {
            Instructions::Wgmma
        } else {
            Instructions::Mma
        },
        processors: processors.unwrap_or(1),
        // An A800's shared memory, where its kernels are selected.
        shared_bytes: if forced {
            163 * 1024
        } else {
            shared.unwrap_or(48 * 1024)
        },
    }
}

/// The card that holds a buffer.
pub(super) fn device(buffer: &Buffer) -> Device {
    card(buffer.device.index)
}

/// Columns of the tiles of `gemm_wgmma.cu`.
const WGMMA_COLUMNS: [usize; 5] = [256, 192, 128, 96, 64];

/// A tile of `gemm_wgmma.cu`: 128 rows and these columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WgmmaTile {
    pub columns: usize,
    pub stages: usize,
    pub blocks: usize,
    pub shared_bytes: usize,
}

/// The tile of an `m × n` matmul over `k`.
pub(super) fn wgmma(m: usize, n: usize, k: usize, transposed: bool, device: &Device) -> WgmmaTile {
    // Time of a tile grows with its columns and has a fixed part, measured in columns.
    const FIXED: usize = 40;
    let tiles = |columns: usize| m.div_ceil(128) * n.div_ceil(columns);
    let columns = WGMMA_COLUMNS
        .into_iter()
        // A transposed weight is loaded in blocks of 64 columns: a tile of 96 would waste a third.
        .filter(|columns| !transposed || columns.is_multiple_of(64))
        .min_by_key(|columns| tiles(*columns).div_ceil(device.processors) * (columns + FIXED))
        .unwrap_or(128);
    let tile = wgmma_tile(columns, k, transposed, device);
    WgmmaTile {
        blocks: tiles(columns).min(device.processors),
        ..tile
    }
}

/// A tile of these columns, for one block.
fn wgmma_tile(columns: usize, k: usize, transposed: bool, device: &Device) -> WgmmaTile {
    let stage_columns = if transposed {
        columns.next_multiple_of(64)
    } else {
        columns
    };
    let stage_bytes = (128 + stage_columns) * 128;
    let slabs = k.div_ceil(64);
    let stages = ((device.shared_bytes - 1024) / (stage_bytes + 16)).clamp(2, 7.min(slabs.max(2)));
    WgmmaTile {
        columns,
        stages,
        blocks: 1,
        shared_bytes: stages * (stage_bytes + 16) + 1024,
    }
}

/// A tile of `gemm_mma.cu` and the part of it a warp computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MmaTile {
    pub rows: usize,
    pub columns: usize,
    pub warp_rows: usize,
    pub warp_columns: usize,
    pub stages: usize,
    pub blocks_per_processor: usize,
}

impl MmaTile {
    pub(super) fn threads(&self) -> u32 {
        (self.rows / self.warp_rows * (self.columns / self.warp_columns) * 32) as u32
    }

    pub(super) fn shared_bytes(&self) -> usize {
        self.stages * (self.rows + self.columns) * 128
    }

    pub(super) fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.rows) * n.div_ceil(self.columns)
    }
}

const MMA_TILES: [MmaTile; 4] = [
    MmaTile {
        rows: 128,
        columns: 256,
        warp_rows: 64,
        warp_columns: 64,
        stages: 3,
        blocks_per_processor: 1,
    },
    MmaTile {
        rows: 128,
        columns: 128,
        warp_rows: 64,
        warp_columns: 64,
        stages: 3,
        blocks_per_processor: 1,
    },
    MmaTile {
        rows: 64,
        columns: 128,
        warp_rows: 32,
        warp_columns: 64,
        stages: 3,
        blocks_per_processor: 2,
    },
    MmaTile {
        rows: 64,
        columns: 64,
        warp_rows: 32,
        warp_columns: 32,
        stages: 4,
        blocks_per_processor: 2,
    },
];

/// The tile of an `m × n` matmul.
pub(super) fn mma(m: usize, n: usize, device: &Device) -> MmaTile {
    let cost = |tile: &MmaTile| {
        // Percent of the largest tile's rate, measured on an H100 at 5,888 rows: smaller tiles reuse
        // less of what they load. Blocks that share a processor run one after another.
        let efficiency = match tile.rows * tile.columns {
            32_768 => 100,
            16_384 => 87,
            8192 => 74,
            _ => 63,
        };
        let at_once = device.processors * tile.blocks_per_processor;
        let waves = tile.tiles(m, n).div_ceil(at_once);
        waves * tile.blocks_per_processor * tile.rows * tile.columns * 100 / efficiency
    };
    MMA_TILES
        .into_iter()
        .filter(|tile| tile.shared_bytes() <= device.shared_bytes)
        .min_by_key(cost)
        .unwrap_or(MMA_TILES[3])
}

/// A tile of either kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tile {
    Wgmma(WgmmaTile),
    Mma(MmaTile),
}

/// The tile of an `m × n` matmul over `k`; `transposed` where the weight is `[k, n]`.
pub(super) fn tile([m, n, k]: [usize; 3], transposed: bool, device: &Device) -> Tile {
    match device.instructions {
        Instructions::Wgmma => Tile::Wgmma(wgmma(m, n, k, transposed, device)),
        Instructions::Mma => Tile::Mma(mma(m, n, device)),
    }
}

/// All tiles that a matmul over a long `k` may get.
pub(super) fn forward_tiles(device: &Device) -> Vec<Tile> {
    const LONG: usize = 4096;
    match device.instructions {
        Instructions::Wgmma => WGMMA_COLUMNS
            .map(|columns| Tile::Wgmma(wgmma_tile(columns, LONG, false, device)))
            .to_vec(),
        Instructions::Mma => MMA_TILES
            .into_iter()
            .filter(|tile| tile.shared_bytes() <= device.shared_bytes)
            .map(Tile::Mma)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Device = Device {
        capability: 90,
        instructions: Instructions::Wgmma,
        processors: 132,
        shared_bytes: 232_448,
    };

    #[test]
    fn few_tiles_fill_the_card_with_narrow_ones() {
        let short = wgmma(384, 4096, 4096, false, &H100);
        assert_eq!((short.columns, short.blocks), (96, 129));
        let long = wgmma(5888, 12_288, 4096, false, &H100);
        assert_eq!((long.columns, long.blocks), (256, 132));
        for tile in [short, long, wgmma(1, 8, 8, true, &H100)] {
            assert!(tile.shared_bytes <= H100.shared_bytes && tile.stages >= 2);
        }
    }

    #[test]
    fn an_ampere_card_gets_tiles_that_fit() {
        let a800 = Device {
            capability: 80,
            instructions: Instructions::Mma,
            processors: 108,
            shared_bytes: 163 * 1024,
        };
        assert_eq!(mma(5888, 12_288, &a800).columns, 256);
        assert!(mma(64, 4096, &a800).rows == 64);
        for (m, n) in [(1, 8), (368, 4096), (5888, 12_288)] {
            assert!(mma(m, n, &a800).shared_bytes() <= a800.shared_bytes);
        }
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn cards_of_several_kinds_are_distinguished() {
        // A missing card is not supported, and does not change the entries of the others.
        assert!(!card(63).is_supported());
        let seen = query(0);
        let kept = card(0);
        assert_eq!(
            (seen.capability, seen.processors, seen.shared_bytes),
            (kept.capability, kept.processors, kept.shared_bytes)
        );
    }
}
