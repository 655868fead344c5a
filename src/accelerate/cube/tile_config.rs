//! Shapes of the tiles of [`super::tiles`], and the devices that multiply them.

use burn::tensor::DType;
use cubecl::{
    features::MmaConfig,
    ir::{ElemType, FloatKind, StorageType},
    prelude::*,
};

use super::{
    matmul_config::{Matrices, Stored},
    sums::Group,
};

/// Side of a cooperative matrix.
pub(super) const SIDE: usize = 16;

/// Elements of one.
pub(super) const AREA: usize = SIDE * SIDE;

/// Inputs in a piece of shared memory.
pub(super) const HALVES: usize = 8;

/// Most rows that a cube normalises itself: for more, reading all of every row again in each cube costs more
/// than a launch.
pub(super) const NORMED: usize = 16;

/// Shared memory that all shapes of tile fit into.
const SHARED: usize = 48 << 10;

/// Outputs of the widest tile.
pub(super) const WIDEST: usize = 128;

/// Units of a plane.
pub(super) const LANES: usize = 32;

/// Planes of a cube.
pub(super) const PLANES: usize = 8;

/// Units of a cube.
pub(super) const UNITS: usize = LANES * PLANES;

/// The comptime configuration of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct TileConfig {
    /// How the values of the matrices are stored.
    pub(super) stored: Stored,
    /// Whether a row of the matrix has one scale, which the sums are multiplied by.
    pub(super) row_scale: bool,
    /// Matrices of the matmul; of a pair, a tile has sixteen columns of each.
    pub(super) matrices: Matrices,
    /// Rows of a tile.
    pub(super) rows: usize,
    /// Outputs of a tile.
    pub(super) outputs: usize,
    /// Inputs of a stage.
    pub(super) depth: usize,
    /// Planes that share the rows, the outputs and the inputs of a stage.
    pub(super) planes: [usize; 3],
    /// Whether the device multiplies cooperative matrices; else its units do, each some elements of one.
    pub(super) cooperative: bool,
    /// Whether a norm comes before the matmul.
    pub(super) norm: bool,
    /// Whether a bias is added.
    pub(super) bias: bool,
    /// Whether a residual is added.
    pub(super) residual: bool,
}

/// Whether the device multiplies f16 matrices of sixteen by sixteen with sums in f32, through SPIR-V: the
/// matrices are loaded from arrays of whole pieces, which CUDA C++ does not take.
pub(super) fn cooperative<R: Runtime>(client: &ComputeClient<R>) -> bool {
    let float = |kind| StorageType::Scalar(ElemType::Float(kind));
    let [half, single] = [FloatKind::F16, FloatKind::F32].map(float);
    let properties = client.properties();
    let side = SIDE as u32;
    let group = Group::of(client);
    R::name(client) == "wgpu<spirv>"
        && group.plane
        && group.lanes == LANES
        && properties.hardware.max_units_per_cube >= UNITS as u32
        && properties.hardware.max_shared_memory_size >= SHARED
        && properties.features.matmul.cmma.contains(&MmaConfig {
            a_type: half,
            b_type: half,
            cd_type: single,
            m: side,
            n: side,
            k: side,
        })
}

/// Whether rows of the input can be read: f16 in whole pieces.
pub(super) fn reads(dtype: DType, d_input: usize) -> bool {
    dtype == DType::F16 && d_input.is_multiple_of(HALVES)
}

impl TileConfig {
    /// For `rows` rows and `width` outputs, of each matrix where there are two, and all where there are
    /// three; a cube has so many bytes of `shared` memory.
    pub(super) fn new(
        stored: Stored,
        row_scale: bool,
        [rows, width]: [usize; 2],
        matrices: Matrices,
        cooperative: bool,
        shared: usize,
    ) -> Self {
        let pair = matrices == Matrices::Pair;
        let large = rows.div_ceil(128) * width.div_ceil(WIDEST) >= 96;
        // A stage of four bits has half the pieces.
        let many = if matches!(stored, Stored::Levels { bits: 4, .. }) {
            64
        } else {
            32
        };
        let (tile, depth, planes) = match rows {
            ..=16 if pair || width >= 8192 => ([16, 32], 256, [1, 2, 4]),
            ..=16 => ([16, 16], 512, [1, 1, 8]),
            17..=32 => ([32, 32], 128, [2, 2, 2]),
            33..=64 => ([64, 32], 128, [4, 2, 1]),
            _ if pair => ([128, 32], many, [4, 2, 1]),
            // Tiles enough for most multiprocessors of a large card.
            _ if large => ([128, WIDEST], many, [2, 4, 1]),
            _ => ([128, 64], many, [4, 2, 1]),
        };
        let mut config = Self {
            stored,
            row_scale,
            matrices,
            rows: tile[0],
            outputs: tile[1],
            depth,
            planes,
            cooperative,
            norm: false,
            bias: false,
            residual: false,
        };
        // A piece of the matrix and a step of every plane must stay.
        while config.shared() > shared && config.depth > 32.max(SIDE * config.planes[2]) {
            config.depth /= 2;
        }
        config
    }

    /// Bytes of shared memory of a cube.
    fn shared(&self) -> usize {
        16 * (self.rows + self.outputs) * self.stride() + 4 * PLANES * AREA
    }

    /// Tiles of `rows` rows and `width` outputs, of each matrix where there are two.
    pub(super) fn count(&self, [rows, width]: [usize; 2]) -> CubeCount {
        let columns = match self.matrices {
            Matrices::Pair => self.outputs / 2,
            Matrices::One | Matrices::Three => self.outputs,
        };
        // Tiles of the same outputs follow each other, so that the cache still has their weights.
        let (rows, columns) = (rows.div_ceil(self.rows), width.div_ceil(columns));
        CubeCount::Static(rows as u32, columns as u32, 1)
    }

    /// Units of a cube.
    pub(super) fn dim(&self) -> CubeDim {
        CubeDim::new_1d(UNITS as u32)
    }

    /// Inputs in a piece of the matrix.
    pub(super) fn piece(&self) -> usize {
        match self.stored {
            Stored::Floats(packing) => packing.piece(),
            Stored::Levels { bits, .. } => 128 / bits,
        }
    }

    /// Bits of a level; 0 for floats.
    pub(super) fn bits(&self) -> usize {
        match self.stored {
            Stored::Floats(_) => 0,
            Stored::Levels { bits, .. } => bits,
        }
    }

    /// Pieces of the matrix that share a scale, where a row has several.
    pub(super) fn group_pieces(&self) -> usize {
        match self.stored {
            Stored::Floats(_) => 1,
            Stored::Levels { group_vectors, .. } => group_vectors,
        }
    }

    /// Whether pieces have scales of their own.
    pub(super) fn has_groups(&self) -> bool {
        self.bits() > 0 && !self.row_scale
    }

    /// Pieces of shared memory from a row of a stage to the next: one more than a row has, so that the
    /// same columns of neighbouring rows are in different banks.
    pub(super) fn stride(&self) -> usize {
        self.depth / HALVES + 1
    }

    /// Pieces of the matrix in a stage.
    pub(super) fn matrix_pieces(&self) -> usize {
        self.outputs * self.depth / self.piece()
    }

    /// Pieces of the input in a stage.
    pub(super) fn input_pieces(&self) -> usize {
        self.rows * self.depth / HALVES
    }

    /// Pieces of the matrix that a unit loads a stage.
    pub(super) fn matrix_loads(&self) -> usize {
        self.matrix_pieces().div_ceil(UNITS)
    }

    /// Pieces of the input that a unit loads a stage.
    pub(super) fn input_loads(&self) -> usize {
        self.input_pieces().div_ceil(UNITS)
    }

    /// Cooperative matrices of a plane along the rows.
    pub(super) fn high(&self) -> usize {
        self.rows / SIDE / self.planes[0]
    }

    /// Cooperative matrices of a plane along the outputs.
    pub(super) fn wide(&self) -> usize {
        self.outputs / SIDE / self.planes[1]
    }

    /// Steps of a plane along the inputs of a stage.
    pub(super) fn steps(&self) -> usize {
        self.depth / SIDE / self.planes[2]
    }

    /// Planes that compute different elements.
    pub(super) fn spread(&self) -> usize {
        self.planes[0] * self.planes[1]
    }
}
