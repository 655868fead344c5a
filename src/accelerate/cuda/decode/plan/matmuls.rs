//! The matmuls of a decode step, with what is fused before and after them.

use burn::tensor::DType;

use super::{ADAPTER, Builder, OVERLAP, SCALAR, STEP, small};
use crate::accelerate::cuda::{
    decode::{step_io::Field, weights::Matrix},
    fragments::{FragmentLaunch, FragmentMatmul, Fused},
    launch::{Defines, Kernel, float_bits},
    plan::card,
    rows,
};

const GEMV: &[&str] = &[SCALAR, OVERLAP, include_str!("../gemv.cu")];

const SKINNY: &[&str] = &[SCALAR, ADAPTER, include_str!("../skinny.cu")];

/// Options of a matmul: what is fused before and after it.
#[derive(Default, Clone, Copy)]
pub(super) struct Matmul {
    pub(super) norm: Option<(u64, f64)>,
    pub(super) gate: bool,
    pub(super) residual: Option<u64>,
    /// Weight of the norm that is applied to the result.
    pub(super) next: Option<u64>,
    pub(super) out_f32: bool,
    /// Index of its first matrix among those that may have an adapter.
    pub(super) matrix: usize,
}

impl Builder<'_> {
    /// `y = x [W…]ᵀ`, `x` `[rows, k]`.
    pub(super) fn matmul(&mut self, x: u64, k: usize, matrices: &[Matrix], y: u64, matmul: Matmul) {
        if let Some(of) = FragmentMatmul::of(matrices, k, matmul.gate, self.io.rows) {
            self.quantised_matmul(x, matrices, y, matmul, of);
            return;
        }
        let mut defines: Defines = vec![
            ("SCALAR_BF16", 1),
            ("WEIGHTS", matrices.len() as i64),
            ("GATE", i64::from(matmul.gate)),
            ("RESIDUAL", i64::from(matmul.residual.is_some())),
            ("OUT_F32", i64::from(matmul.out_f32)),
        ];
        let rows_of = |at: usize| matrices.get(at).map_or(0, |matrix| matrix.rows as u64);
        let count: usize = if matmul.gate {
            matrices[0].rows
        } else {
            matrices.iter().map(|matrix| matrix.rows).sum()
        };
        let addresses = matrices.iter().map(|matrix| matrix.address);
        let mut parameters = vec![k as u64, rows_of(0), rows_of(1), rows_of(2)];
        let rows = self.io.rows;
        if self.io.gemv && rows == 1 {
            defines.push(("NORM", i64::from(matmul.norm.is_some())));
            let pointers = [x]
                .into_iter()
                .chain(matmul.norm.map(|norm| norm.0))
                .chain(addresses)
                .chain(matmul.residual)
                .chain([y])
                .collect();
            parameters.push(float_bits(matmul.norm.map_or(0.0, |norm| norm.1)));
            let kernel = Kernel::new("gemv", GEMV, defines, 256);
            let a_block = if matmul.gate { 2 } else { 4 };
            let grid = [count.div_ceil(a_block), 1, 1];
            self.push_early(kernel, grid, pointers, parameters);
            return;
        }
        let mut input = x;
        if let Some((weight, epsilon)) = matmul.norm {
            input = self.scratch.normed;
            self.push(
                rows::kernel("rms_norm", "NORM_RMS", k, DType::BF16),
                [rows, 1, 1],
                vec![x, weight, input],
                vec![rows as u64, float_bits(epsilon)],
            );
        }
        let mut adapter = Vec::new();
        parameters.push(rows as u64);
        if let Some(table) = self.io.adapters {
            let place = self.adapter_place(matmul);
            parameters.extend(place.map(|place| place as u64));
            adapter = self.shrink(input, k, matrices.len(), table, place, None);
        }
        defines.push(("ADAPTERS", i64::from(!adapter.is_empty())));
        defines.push(("TILES", rows.div_ceil(8) as i64));
        // A sum's order depends on the warps: they are chosen by the matrix, never by the batch.
        let few = !matmul.gate && count / 16 <= 2 * self.weights.processors;
        let warps = if few { 8 } else { 4 };
        defines.push(("BLOCK_WARPS", warps));
        defines.push(("WHOLE", i64::from(k.is_multiple_of(128))));
        let pointers = [input]
            .into_iter()
            .chain(addresses)
            .chain(matmul.residual)
            .chain(adapter)
            .chain([y])
            .collect();
        let kernel = Kernel::new("skinny", SKINNY, defines, 32 * warps as u32);
        self.push(kernel, [count / 16, 1, 1], pointers, parameters);
    }

    /// [`Builder::matmul`] with quantised matrices: the norm before it is part of it, and the one after it of the
    /// result's epilogue (`fragments.cuh`).
    fn quantised_matmul(
        &mut self,
        x: u64,
        matrices: &[Matrix],
        y: u64,
        matmul: Matmul,
        of: FragmentMatmul,
    ) {
        let scratch = self.scratch;
        let fused = Fused {
            norm: matmul.norm.is_some(),
            next: matmul.next.is_some(),
            bias: false,
            residual: matmul.residual.is_some(),
            out_f32: matmul.out_f32,
            adapters: self.io.adapters.is_some(),
        };
        let input = if fused.norm { scratch.normed } else { x };
        let squares = fused.norm.then_some(scratch.squares);
        let epsilon = matmul.norm.map_or(0.0, |(_, epsilon)| epsilon);
        let mut adapter = Vec::new();
        let place = self.adapter_place(matmul);
        if let Some(table) = self.io.adapters {
            let norm = squares.map(|squares| (squares, epsilon));
            adapter = self.shrink(input, of.k, matrices.len(), table, place, norm);
        }
        let FragmentLaunch {
            kernel,
            grid,
            splits,
        } = of.launch(fused, &card(self.weights.device));
        let matrices = matrices.iter().flat_map(|matrix| {
            let scales = matrix.quantised.map(|(scales, _)| scales);
            [matrix.address].into_iter().chain(scales)
        });
        let exchanged = splits.then_some([scratch.sums, scratch.counters]);
        let next = matmul
            .next
            .map(|weight| [weight, scratch.normed, scratch.squares]);
        let pointers = [input]
            .into_iter()
            .chain(matrices)
            .chain(squares)
            .chain(matmul.residual)
            .chain(adapter)
            .chain(exchanged.into_iter().flatten())
            .chain([y])
            .chain(next.into_iter().flatten())
            .collect();
        let parameters = of.parameters(epsilon, fused.adapters.then_some(place));
        self.push_early(kernel, grid, pointers, parameters);
    }

    /// Number of matrices of a table of adapters, and the index of a matmul's first.
    fn adapter_place(&self, matmul: Matmul) -> [usize; 2] {
        [self.weights.matrices(), matmul.matrix]
    }

    /// `x Aᵀ` of each row's adapter for the matmuls of one input, with the factor of a norm where one is applied to `x`.
    /// Returns what a matmul's epilogue reads.
    fn shrink(
        &mut self,
        x: u64,
        k: usize,
        matmuls: usize,
        table: u64,
        place: [usize; 2],
        norm: Option<(u64, f64)>,
    ) -> Vec<u64> {
        let adapter_of = self.io.field(Field::Adapter);
        let low = self.scratch.low;
        let epsilon = norm.map_or(0.0, |(_, epsilon)| epsilon);
        let mut parameters = small(k, [0; 2], [0; 3], epsilon, 0);
        parameters.extend(place.map(|place| place as u64));
        let pointers = [x, table, adapter_of]
            .into_iter()
            .chain(norm.map(|(squares, _)| squares))
            .chain([low])
            .collect();
        let defines = vec![
            ("SHRINK", 1),
            ("SCALAR_BF16", 1),
            ("NORMED", i64::from(norm.is_some())),
        ];
        let kernel = Kernel::new("SHRINK", STEP, defines, 256);
        let grid = [4, matmuls, self.io.rows];
        self.push_early(kernel, grid, pointers, parameters);
        vec![table, adapter_of, low]
    }
}
