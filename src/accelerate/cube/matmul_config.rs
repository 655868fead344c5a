//! The configuration of a matmul of one to eight rows: how matrices are stored and how units share the work.

use cubecl::prelude::*;

use super::{launch::cubes, sums::Group, words::Packing};

/// Where the outputs of a group of units come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Matrices {
    /// One matrix.
    One,
    /// The first half from one matrix, the second half, of the same columns, from another.
    Pair,
    /// One of three, whose outputs are concatenated.
    Three,
}

/// How the values of a matrix are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Stored {
    /// Floats.
    Floats(Packing),
    /// Quantised levels of so many bits, to be multiplied by a scale.
    Levels {
        /// Bits of a value.
        bits: usize,
        /// Sixteen-byte pieces that share a scale.
        group_vectors: usize,
    },
}

/// The comptime configuration of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct MatmulConfig {
    /// How the values of the matrices are stored.
    pub stored: Stored,
    /// Rows of the input.
    pub rows: usize,
    /// Matrices of the matmul.
    pub matrices: Matrices,
    /// Outputs of a group of units, of all its matrices.
    pub outputs: usize,
    /// Sixteen-byte pieces of a row of the matrix.
    pub vectors: usize,
    /// Units that compute some outputs together.
    pub group: Group,
    /// Groups of a cube.
    pub groups: usize,
    /// Whether a norm comes before the matmul.
    pub norm: bool,
    /// Whether a bias is added.
    pub bias: bool,
    /// Whether a residual is added.
    pub residual: bool,
    /// Whether an adapter's low-rank part is added.
    pub adapter: bool,
}

/// Outputs of a matrix from which groups of units take four each; of fewer, too few groups would read.
const MANY_OUTPUTS: usize = 8192;

impl MatmulConfig {
    /// For matmuls of `rows` rows with matrices of `width` outputs and rows of `vectors` pieces; nothing
    /// comes before or is added.
    pub(super) fn new(
        stored: Stored,
        [rows, width]: [usize; 2],
        matrices: Matrices,
        vectors: usize,
        group: Group,
    ) -> Self {
        // More outputs of a group where several rows are read again for each, and where groups are many.
        let many = group.plane && (rows > 2 || width >= MANY_OUTPUTS);
        // A unit of the group for each result.
        let fits = 4 * rows <= group.lanes;
        Self {
            stored,
            rows,
            matrices,
            outputs: if (many && fits) || matrices == Matrices::Pair {
                4
            } else {
                2
            },
            vectors,
            group,
            groups: group.in_a_cube(),
            norm: false,
            bias: false,
            residual: false,
            adapter: false,
        }
    }

    /// Cubes for so many columns.
    pub(super) fn count(&self, columns: usize) -> CubeCount {
        cubes(columns.div_ceil(self.columns() * self.groups))
    }

    /// Units of a cube.
    pub(super) fn dim(&self) -> CubeDim {
        CubeDim::new_1d((self.group.lanes * self.groups) as u32)
    }

    /// Columns of the result that a group of units computes.
    pub(super) fn columns(&self) -> usize {
        match self.matrices {
            Matrices::Pair => self.outputs / 2,
            Matrices::One | Matrices::Three => self.outputs,
        }
    }

    /// Whether the matrix is quantised (holds levels).
    pub(super) fn is_quantised(&self) -> bool {
        matches!(self.stored, Stored::Levels { .. })
    }

    /// How floats of the matrix are stored.
    pub(super) fn packing(&self) -> Packing {
        match self.stored {
            Stored::Floats(packing) => packing,
            Stored::Levels { .. } => unreachable!("only float matrices have a packing"),
        }
    }

    /// Bits of a level.
    pub(super) fn bits(&self) -> usize {
        match self.stored {
            Stored::Floats(_) => unreachable!("only quantised matrices have levels"),
            Stored::Levels { bits, .. } => bits,
        }
    }

    /// Pieces that share a scale.
    pub(super) fn group_vectors(&self) -> usize {
        match self.stored {
            Stored::Floats(_) => self.vectors,
            Stored::Levels { group_vectors, .. } => group_vectors,
        }
    }

    /// Quads of the input that a piece of the matrix is multiplied with.
    pub(super) fn quads(&self) -> usize {
        match self.stored {
            Stored::Floats(packing) => packing.piece() / 4,
            Stored::Levels { bits, .. } => 128 / bits / 4,
        }
    }

    /// Scales of a row of the matrix.
    pub(super) fn scales(&self) -> usize {
        self.vectors / self.group_vectors()
    }

    /// Word of a piece that holds the levels of a quad.
    pub(super) fn word(&self, quad: usize) -> usize {
        4 * quad * self.bits() / 32
    }

    /// Lowest bit of a level of a quad there.
    pub(super) fn bit(&self, quad: usize, value: usize) -> usize {
        (4 * quad + value) * self.bits() % 32
    }

    /// The bits of a level of a quad there.
    pub(super) fn mask(&self, quad: usize, value: usize) -> u32 {
        ((1 << self.bits()) - 1) << self.bit(quad, value)
    }

    /// The scale of the input that replaces shifting the level down.
    pub(super) fn shrink(&self, quad: usize, value: usize) -> f32 {
        (-(self.bit(quad, value) as f32)).exp2()
    }

    /// The offset that levels are stored with.
    pub(super) fn offset(&self) -> f32 {
        (1 << (self.bits() - 1)) as f32
    }
}
