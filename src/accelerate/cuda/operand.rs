//! Buffers as a kernel's header names them, checked before the kernel is launched.
//!
//! Kernels check nothing themselves: a wrong type or a missing row would be read as whatever the memory holds.

use burn::tensor::DType;
use cubecl::{
    prelude::*,
    server::{TensorMapBinding, TensorMapMeta},
    zspace::metadata::Metadata,
};

use super::buffer::Buffer;

/// A buffer of a launch whose type, shape, layout and length have been compared with what the kernel
/// reads or writes. There is no other way to hand a buffer to [`super::launch::launch`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand<'a>(&'a Buffer);

/// A row-major bf16 matrix that a kernel copies tile by tile into 128-byte swizzled shared memory; elements
/// outside read as zero.
#[derive(Debug, Clone, Copy)]
pub(super) struct MatrixMap<'a> {
    pub(super) operand: Operand<'a>,
    /// Rows and columns.
    pub(super) shape: [usize; 2],
    /// Rows and columns of a tile.
    pub(super) tile: [usize; 2],
}

impl<'a> MatrixMap<'a> {
    /// A whole matrix, cut into tiles of rows and columns.
    #[track_caller]
    pub(super) fn new(buffer: &'a Buffer, shape: [usize; 2], tile: [usize; 2]) -> Self {
        Self {
            operand: Operand::contiguous(buffer, DType::BF16, shape),
            shape,
            tile,
        }
    }

    /// What cubecl's server gets.
    pub(super) fn binding(&self) -> TensorMapBinding {
        let [rows, columns] = self.shape;
        let [tile_rows, tile_columns] = self.tile;
        TensorMapBinding {
            binding: self.operand.buffer().handle.clone().binding(),
            map: TensorMapMeta {
                format: TensorMapFormat::Tiled(TiledArgs {
                    tile_size: [tile_rows, tile_columns].into(),
                }),
                metadata: Metadata::new([rows, columns], [columns, 1]),
                elem_stride: [1usize, 1].into(),
                interleave: TensorMapInterleave::None,
                swizzle: TensorMapSwizzle::B128,
                prefetch: TensorMapPrefetch::B256,
                oob_fill: OobFill::Zero,
                storage_ty: half::bf16::as_type_native_unchecked().storage_type(),
            },
        }
    }
}

/// What a kernel relies on in the strides of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// All elements are contiguous.
    Contiguous,
    /// The last axis is contiguous; the kernel takes the strides of the others.
    ContiguousRows,
    /// The kernel takes all strides.
    Strided,
}

impl<'a> Operand<'a> {
    /// Contiguous elements of one type.
    ///
    /// # Panics
    /// If the buffer has another type, shape, layout or length; so do the others below.
    #[track_caller]
    pub(super) fn contiguous<const D: usize>(
        buffer: &'a Buffer,
        dtype: DType,
        shape: [usize; D],
    ) -> Self {
        Self::checked(buffer, dtype, &shape, Layout::Contiguous)
    }

    /// Contiguous rows; the rows may have any stride.
    #[track_caller]
    pub(super) fn contiguous_rows<const D: usize>(
        buffer: &'a Buffer,
        dtype: DType,
        shape: [usize; D],
    ) -> Self {
        Self::checked(buffer, dtype, &shape, Layout::ContiguousRows)
    }

    /// Elements in any strides.
    #[track_caller]
    pub(super) fn strided<const D: usize>(
        buffer: &'a Buffer,
        dtype: DType,
        shape: [usize; D],
    ) -> Self {
        Self::checked(buffer, dtype, &shape, Layout::Strided)
    }

    /// What fills the place of an operand that this configuration of the kernel does not touch.
    pub(super) fn unused(buffer: &'a Buffer) -> Self {
        Self(buffer)
    }

    /// A buffer that has just been made, taken as bytes.
    pub(super) fn fresh(buffer: &'a Buffer) -> Self {
        Self(buffer)
    }

    /// The buffer.
    pub(super) fn buffer(&self) -> &'a Buffer {
        self.0
    }

    #[track_caller]
    fn checked(buffer: &'a Buffer, dtype: DType, shape: &[usize], layout: Layout) -> Self {
        let (found, strides) = (&buffer.meta.shape()[..], &buffer.meta.strides()[..]);
        assert!(
            buffer.dtype == dtype && found == shape,
            "a kernel takes {dtype:?} {shape:?} here, not {:?} {found:?}",
            buffer.dtype
        );
        let fits = fits(shape, strides, layout);
        assert!(
            fits,
            "a kernel takes {layout:?} elements here, not strides {strides:?} of {shape:?}"
        );
        let bytes = extent(shape, strides) * dtype.size();
        let held = buffer.handle.size_in_used();
        assert!(
            bytes as u64 <= held,
            "a kernel takes {bytes} bytes here, the buffer has {held}"
        );
        Self(buffer)
    }
}

/// Whether the strides of a shape are those a kernel relies on.
fn fits(shape: &[usize], strides: &[usize], layout: Layout) -> bool {
    let mut contiguous = 1;
    for (axis, (size, stride)) in shape.iter().zip(strides).enumerate().rev() {
        let inner = axis + 1 == shape.len();
        // The stride of an axis of one element is never used.
        let wanted = match layout {
            Layout::Contiguous => Some(contiguous),
            Layout::ContiguousRows => inner.then_some(1),
            Layout::Strided => None,
        };
        if *size > 1 && wanted.is_some_and(|wanted| wanted != *stride) {
            return false;
        }
        contiguous *= size;
    }
    true
}

/// Elements from the first to the last one of a shape in memory.
fn extent(shape: &[usize], strides: &[usize]) -> usize {
    if shape.contains(&0) {
        return 0;
    }
    1 + (shape.iter().zip(strides))
        .map(|(size, stride)| (size - 1) * stride)
        .sum::<usize>()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Tensor};

    use super::{super::launch::strided, *};
    use crate::base::panics::quietly;

    #[test]
    fn layouts_are_distinguished() {
        let transposed = ([3, 4], [1, 3]);
        assert!(!fits(&transposed.0, &transposed.1, Layout::Contiguous));
        assert!(!fits(&transposed.0, &transposed.1, Layout::ContiguousRows));
        assert!(fits(&transposed.0, &transposed.1, Layout::Strided));
        // Part of the columns of a wider matrix.
        assert!(!fits(&[3, 4], &[16, 1], Layout::Contiguous));
        assert!(fits(&[3, 4], &[16, 1], Layout::ContiguousRows));
        // An axis of one element may have any stride.
        assert!(fits(&[1, 4, 1], &[99, 1, 7], Layout::Contiguous));
        assert_eq!(extent(&[3, 4], &[16, 1]), 36);
        assert_eq!(extent(&[3, 0], &[16, 1]), 0);
    }

    /// Every operand of a launch is compared, in its type, its shape and its layout.
    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn operands_of_another_type_or_shape_are_refused() {
        let device = super::super::tests::device();
        let x = Tensor::<super::super::Cuda, 2>::zeros([3, 8], (&device, DType::BF16));
        let buffer = strided(x.clone());
        assert!(
            quietly(|| Operand::contiguous(&buffer, DType::BF16, [3, 8])
                .buffer()
                .dtype)
            .is_ok()
        );
        for (dtype, shape) in [(DType::F32, [3, 8]), (DType::BF16, [4, 8])] {
            let refused = quietly(|| Operand::contiguous(&buffer, dtype, shape).buffer().dtype);
            assert!(refused.unwrap_err().contains("not BF16 [3, 8]"));
        }
        let transposed = strided(x.transpose());
        let refused = quietly(|| {
            Operand::contiguous_rows(&transposed, DType::BF16, [8, 3])
                .buffer()
                .dtype
        });
        assert!(refused.unwrap_err().contains("strides"));
    }
}
