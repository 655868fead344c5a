//! A matmul with quantised weights in fragment order: which kernel, with which tiles.

use std::cmp::Reverse;

use super::super::{
    launch::{Kernel, float_bits},
    plan::Device,
};
use crate::ops::quantised::Format;

const SCALAR: &str = include_str!("../scalar.cuh");
const ADAPTER: &str = include_str!("../decode/adapter.cuh");
const OVERLAP: &str = include_str!("../decode/overlap.cuh");
const FRAGMENTS: &str = include_str!("fragments.cuh");
const FEW_ROWS: &[&str] = &[
    SCALAR,
    ADAPTER,
    OVERLAP,
    FRAGMENTS,
    include_str!("few_rows.cu"),
];
const MORE_ROWS: &[&str] = &[
    SCALAR,
    ADAPTER,
    OVERLAP,
    FRAGMENTS,
    include_str!("more_rows.cu"),
];

/// Most vectors of `few_rows.cu`; either kernel takes any number of them.
const FEW: usize = 16;

/// Most vectors of either kernel.
pub(in super::super) const MOST_VECTORS: usize = 64;

/// Columns of a turn.
const TURN: usize = 128;

/// Tiles of 16 rows that a block of `more_rows.cu` may have: even, for gate and up.
const BLOCK_TILES: [usize; 2] = [12, 8];

/// Turns of vectors at once and of weights ahead that `more_rows.cu` is made for, the best first.
const STAGES: [[usize; 2]; 6] = [[4, 5], [4, 4], [4, 3], [2, 3], [2, 2], [1, 2]];

/// Shared memory that `more_rows.cu` declares itself, and what the driver takes.
const STATIC_SHARED: usize = 2048;

/// A matmul of some vectors with the matrices of one input.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct FragmentMatmul {
    pub format: Format,
    /// Inputs.
    pub k: usize,
    /// Rows of each matrix; zeros where there are fewer than three.
    pub rows: [usize; 3],
    /// Two matrices: `silu(first) · second`.
    pub gate: bool,
    /// Rows of the batch.
    pub vectors: usize,
}

/// What is fused before and after a matmul: `fragments.cuh`.
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct Fused {
    pub norm: bool,
    pub next: bool,
    pub bias: bool,
    pub residual: bool,
    pub out_f32: bool,
    pub adapters: bool,
}

/// Shared memory of `more_rows.cu`.
#[derive(Debug, Clone, Copy)]
struct Stages {
    vector_turns: usize,
    stages: usize,
    bytes: usize,
}

/// A launch of one of the kernels.
pub(in super::super) struct FragmentLaunch {
    pub kernel: Kernel,
    pub grid: [usize; 3],
    /// Whether it takes `partial` and `counters`.
    pub splits: bool,
}

impl FragmentMatmul {
    /// Width of the output.
    pub(in super::super) fn width(&self) -> usize {
        match self.gate {
            true => self.rows[0],
            false => self.rows.iter().sum(),
        }
    }

    fn matrices(&self) -> usize {
        1 + usize::from(self.gate)
    }

    /// Contiguous chunks of K that are summed separately. Many where there are few blocks: the sums of a
    /// chunk are one warp's.
    fn chunks(&self, device: &Device) -> usize {
        let few = !self.gate && self.width() / 16 <= 2 * device.processors;
        if few { 16 } else { 8 }
    }

    /// Cost of a split of the matrix into blocks of so many tiles and so many parts of K: waves times the
    /// work of a block.
    fn cost(&self, block_tiles: usize, splits: usize, device: &Device) -> usize {
        let blocks = self.blocks(block_tiles) * splits;
        blocks.div_ceil(device.processors) * block_tiles * (8 / splits)
    }

    fn blocks(&self, block_tiles: usize) -> usize {
        (self.width() / 16).div_ceil(block_tiles / self.matrices())
    }

    /// Parts of K that blocks share between them where there are many vectors. With the chunks it fixes the order
    /// of all sums, so it must not depend on the number of vectors.
    fn splits(&self, device: &Device) -> usize {
        let choices = [1, 2, 4, 8]
            .into_iter()
            .flat_map(|splits| BLOCK_TILES.map(|tiles| (self.cost(tiles, splits, device), splits)));
        choices.min().map_or(1, |(_, splits)| splits)
    }

    /// What `more_rows.cu` keeps in shared memory with these tiles, the most that fits.
    fn stages(&self, block_tiles: usize, device: &Device) -> Option<Stages> {
        let (pieces, scales) = match self.format {
            Format::Int8 => (4, 0),
            _ => (2, TURN / self.format.group(self.k) * 32),
        };
        let turn = self.vectors.div_ceil(8) * 8 * TURN * 2;
        let weights = block_tiles * (pieces * 512 + scales);
        let room = device.shared_bytes - STATIC_SHARED;
        STAGES.into_iter().find_map(|[vector_turns, stages]| {
            let bytes = 2 * vector_turns * turn + stages * weights;
            (bytes <= room).then_some(Stages {
                vector_turns,
                stages,
                bytes,
            })
        })
    }

    /// Floats of `partial`, the sums that blocks exchange.
    pub(in super::super) fn partial(&self, device: &Device) -> usize {
        match self.splits(device) {
            1 => 0,
            splits => splits * self.matrices() * self.vectors.div_ceil(8) * 8 * self.width(),
        }
    }

    /// Blocks of one part of K: a counter each.
    pub(in super::super) fn counters(&self) -> usize {
        self.width().div_ceil(16)
    }

    /// The launch for these vectors.
    ///
    /// # Panics
    /// If there are more than [`MOST_VECTORS`].
    pub(in super::super) fn launch(&self, fused: Fused, device: &Device) -> FragmentLaunch {
        assert!((1..=MOST_VECTORS).contains(&self.vectors), "{self:?}");
        let (chunks, splits) = (self.chunks(device), self.splits(device));
        let tiles = self.vectors.div_ceil(8);
        let group = match self.format {
            Format::Int8 => 0,
            _ => self.format.group(self.k),
        };
        let matrices = self.rows.iter().filter(|rows| **rows > 0).count();
        let is = |flag: bool| i64::from(flag);
        let mut defines = vec![
            ("SCALAR_BF16", 1),
            ("BITS", self.format.bits() as i64),
            ("GROUP", group as i64),
            ("WHOLE", is(self.k.is_multiple_of(TURN))),
            ("TILES", tiles as i64),
            ("CHUNKS", chunks as i64),
            ("SPLITS", splits as i64),
            ("WEIGHTS", matrices as i64),
            ("GATE", is(self.gate)),
            ("NORM", is(fused.norm)),
            ("NEXT", is(fused.next)),
            ("BIAS", is(fused.bias)),
            ("RESIDUAL", is(fused.residual)),
            ("OUT_F32", is(fused.out_f32)),
            ("ADAPTERS", is(fused.adapters)),
        ];
        // A piece of 8 bits is half as much work to unpack: with two tiles of vectors, blocks that share them do more.
        let shares = self.format == Format::Int8 && splits == 1 && tiles == 2;
        if self.vectors <= FEW && !shares {
            let warps = if tiles == 1 { chunks } else { 8 };
            defines.extend([("SPLIT_BLOCKS", 0), ("BLOCK_WARPS", warps as i64)]);
            return FragmentLaunch {
                kernel: Kernel::new("few_rows", FEW_ROWS, defines, 32 * warps as u32),
                grid: [self.width() / 16, 1, 1],
                splits: false,
            };
        }
        let fitting = BLOCK_TILES.into_iter().filter_map(|block_tiles| {
            let stages = self.stages(block_tiles, device)?;
            Some((self.cost(block_tiles, splits, device), block_tiles, stages))
        });
        let (_, block_tiles, stages) = fitting
            .min_by_key(|(cost, tiles, _)| (*cost, Reverse(*tiles)))
            .expect("two stages of eight tiles fit on every card since Ampere");
        defines.extend([
            ("SPLIT_BLOCKS", is(splits > 1)),
            ("BLOCK_TILES", block_tiles as i64),
            ("VECTOR_TURNS", stages.vector_turns as i64),
            ("STAGES", stages.stages as i64),
        ]);
        let sums = tiles * 8 * (block_tiles * 16 + 4) * size_of::<f32>();
        let kernel = Kernel::new("more_rows", MORE_ROWS, defines, 32 * block_tiles as u32)
            .with_shared(stages.bytes.max(sums));
        FragmentLaunch {
            kernel,
            grid: [self.blocks(block_tiles), splits, 1],
            splits: splits > 1,
        }
    }

    /// The kernel's parameters; `adapter` is the place of the matrices in the table of adapters.
    pub(in super::super) fn parameters(
        &self,
        epsilon: f64,
        adapter: Option<[usize; 2]>,
    ) -> Vec<u64> {
        let [first, second, third] = self.rows;
        let sizes = [self.k, first, second, third, self.vectors];
        let adapter = adapter.into_iter().flatten().map(|place| place as u64);
        sizes
            .into_iter()
            .map(|size| size as u64)
            .chain([float_bits(epsilon)])
            .chain(adapter)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::super::plan::Instructions, *};

    fn card(processors: usize, kib: usize) -> Device {
        Device {
            capability: 80,
            instructions: Instructions::Mma,
            processors,
            shared_bytes: kib * 1024,
        }
    }

    /// The matmuls of the 8B's step.
    fn step(format: Format, vectors: usize) -> [FragmentMatmul; 5] {
        let one = |format, k, rows, gate| FragmentMatmul {
            format,
            k,
            rows,
            gate,
            vectors,
        };
        [
            one(format, 4096, [4096, 1024, 1024], false),
            one(format, 4096, [4096, 0, 0], false),
            one(format, 4096, [12_288, 12_288, 0], true),
            one(format, 12_288, [4096, 0, 0], false),
            one(Format::Int8, 4096, [151_936, 0, 0], false),
        ]
    }

    /// Sums are added in one order for every number of vectors, and every card takes every matmul.
    #[test]
    fn the_order_of_sums_is_the_matrix_own() {
        for device in [card(132, 227), card(108, 163), card(82, 99), card(128, 99)] {
            for format in [
                Format::Int8,
                Format::Int4 { group: 32 },
                Format::Int4 { group: 64 },
            ] {
                let orders = |vectors| {
                    step(format, vectors).map(|one| (one.chunks(&device), one.splits(&device)))
                };
                for vectors in [1, 9, 17, 40, 64] {
                    assert_eq!(orders(vectors), orders(1));
                    for one in step(format, vectors) {
                        let launch = one.launch(Fused::default(), &device);
                        assert!(launch.kernel.shared_bytes() <= device.shared_bytes - 1024);
                        assert!(one.chunks(&device).is_multiple_of(one.splits(&device)));
                    }
                }
            }
        }
    }

    #[test]
    fn few_blocks_share_the_inputs_of_a_row() {
        let device = card(132, 227);
        let splits = step(Format::Int8, 32).map(|one| one.splits(&device));
        assert_eq!(splits, [4, 4, 1, 4, 1]);
        let grids = step(Format::Int8, 32).map(|one| one.launch(Fused::default(), &device).grid);
        assert_eq!(grids[2], [128, 1, 1]);
        assert_eq!(grids[1], [32, 4, 1]);
    }
}
