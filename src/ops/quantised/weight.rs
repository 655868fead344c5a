//! A quantised matrix of the model on a device.

use burn::{
    prelude::*,
    tensor::{DType, TensorData, backend::AutodiffBackend},
};

use super::{Format, fragments, pack::QuantisedMatrix};

use crate::ops::cast::{to_dtype, to_f32};

/// Bytes of floats that are dequantised at once for a matmul.
pub const UNPACKED_BYTES: usize = 32 << 20;

/// Rows of a whole tile of a matmul.
const TILE: usize = 64;

/// Order of a matrix's words and scales in tensors of one shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Row by row.
    Rows,
    /// The fragments of tensor cores (see [`super::fragments`]).
    Fragments,
}

/// A quantised matrix `[out, in]` on a device.
#[derive(Debug, Clone)]
pub struct QuantisedWeight<B: Backend> {
    /// `[out, words of a row]`, i32: bit patterns.
    words: Tensor<B, 2, Int>,
    /// `[out, scales of a row]`, f16 or f32.
    scales: Tensor<B, 2>,
    /// As `scales`, where the format has zero points.
    zeros: Option<Tensor<B, 2>>,
    order: Order,
    format: Format,
    d_input: usize,
    dtype: DType,
}

impl<B: Backend> QuantisedWeight<B> {
    /// Takes tensors that are quantised already; `dtype` is the type the values count as.
    ///
    /// # Shapes
    /// - `words`: `[out, words of a row]`
    /// - `scales`: `[out, scales of a row]`
    ///
    /// # Panics
    /// If the shapes are not those of `format` for `d_input` inputs, or it has zero points.
    pub fn new(
        words: Tensor<B, 2, Int>,
        scales: Tensor<B, 2>,
        format: Format,
        d_input: usize,
        dtype: DType,
    ) -> Self {
        Self::with_zeros(words, scales, None, format, d_input, dtype)
    }

    /// [`Self::new`] with zero points, whole numbers 0 to 15 in the type of the scales.
    ///
    /// # Shapes
    /// - `words`: `[out, words of a row]`
    /// - `scales` and `zeros`: `[out, scales of a row]`
    ///
    /// # Panics
    /// If the shapes are not those of `format` for `d_input` inputs, or zero points are missing or too many.
    pub fn with_zeros(
        words: Tensor<B, 2, Int>,
        scales: Tensor<B, 2>,
        zeros: Option<Tensor<B, 2>>,
        format: Format,
        d_input: usize,
        dtype: DType,
    ) -> Self {
        let [rows, _] = words.dims();
        assert_eq!(words.dims(), [rows, format.words(d_input)], "packed words");
        assert_eq!(scales.dims(), [rows, format.scales(d_input)], "scales");
        assert_eq!(zeros.is_none(), format.is_symmetric(), "zero points");
        if let Some(zeros) = &zeros {
            assert_eq!(zeros.dims(), scales.dims(), "zero points");
        }
        Self {
            words,
            scales,
            zeros,
            order: Order::Rows,
            format,
            d_input,
            dtype,
        }
    }

    /// Copies a quantised matrix `[rows, d_input]` to the device; int4's scales stay f16 where it has that.
    pub fn upload(
        matrix: QuantisedMatrix,
        rows: usize,
        d_input: usize,
        format: Format,
        dtype: DType,
        device: &B::Device,
    ) -> Self {
        let held = scale_dtype::<B>(format, device);
        let words = TensorData::new(matrix.words, [rows, format.words(d_input)]);
        let of_groups = |values: Vec<f32>| {
            TensorData::new(values, [rows, format.scales(d_input)]).convert_dtype(held)
        };
        let zeros = (!format.is_symmetric()).then(|| of_groups(matrix.zeros));
        let data = (words, of_groups(matrix.scales), zeros);
        let (words, scales, zeros) =
            persistent::<B, _, _>(device, data, |(words, scales, zeros)| {
                let floats = |data| Tensor::from_data(data, (device, held));
                (
                    Tensor::from_data(words, (device, DType::I32)),
                    floats(scales),
                    zeros.map(floats),
                )
            });
        Self::with_zeros(words, scales, zeros, format, d_input, dtype)
    }

    /// `[out, in]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.words.dims()[0], self.d_input]
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Type the values count as: that of the model's other weights.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `[out, words of a row]`, i32.
    ///
    /// # Panics
    /// If the matrix is arranged: whoever reads words row by row has to ask first.
    pub fn words(&self) -> &Tensor<B, 2, Int> {
        assert!(!self.is_arranged(), "words in fragment order");
        &self.words
    }

    /// `[out, scales of a row]`, f16 or f32.
    ///
    /// # Panics
    /// As [`QuantisedWeight::words`].
    pub fn scales(&self) -> &Tensor<B, 2> {
        assert!(!self.is_arranged(), "scales in fragment order");
        &self.scales
    }

    /// Zero points, in shape and type as the scales; `None` where the format is symmetric.
    pub fn zeros(&self) -> Option<&Tensor<B, 2>> {
        self.zeros.as_ref()
    }

    /// Whether words and scales are in fragment order.
    pub fn is_arranged(&self) -> bool {
        self.order == Order::Fragments
    }

    /// Words and scales in fragment order, where the matrix is arranged.
    pub fn fragments(&self) -> Option<(&Tensor<B, 2, Int>, &Tensor<B, 2>)> {
        self.is_arranged().then_some((&self.words, &self.scales))
    }

    /// The same matrix in fragment order; `arrange` gets words and scales row by row and returns them so.
    ///
    /// # Panics
    /// If it is arranged already, or `arrange` changes a shape.
    pub fn arrange(
        self,
        arrange: impl FnOnce(Tensor<B, 2, Int>, Tensor<B, 2>) -> (Tensor<B, 2, Int>, Tensor<B, 2>),
    ) -> Self {
        assert!(!self.is_arranged(), "arranged twice");
        let shapes = (self.words.dims(), self.scales.dims());
        let (words, scales) = arrange(self.words, self.scales);
        assert_eq!((words.dims(), scales.dims()), shapes);
        Self {
            words,
            scales,
            order: Order::Fragments,
            ..self
        }
    }

    /// The same matrix row by row: itself, or for an arranged one a copy.
    pub fn by_rows(&self) -> Self {
        if !self.is_arranged() {
            return self.clone();
        }
        Self {
            words: fragments::words_by_rows(self.words.clone(), self.format),
            scales: fragments::scales_by_rows(self.scales.clone(), self.format),
            order: Order::Rows,
            ..self.clone()
        }
    }

    /// Device that it is stored on.
    pub fn device(&self) -> B::Device {
        self.words.device()
    }

    /// Adds the device that it is stored on.
    pub fn collect_devices(&self, devices: burn::module::Devices<B>) -> burn::module::Devices<B> {
        self.words.collect_devices(devices)
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        let floats = |tensor: &Tensor<B, 2>| tensor.shape().num_elements() * tensor.dtype().size();
        self.words.shape().num_elements() * 4
            + floats(&self.scales)
            + self.zeros.as_ref().map_or(0, floats)
    }

    /// Rows `start .. start + count`: `[count, in]`.
    pub fn rows(&self, start: usize, count: usize) -> Self {
        let this = self.by_rows();
        Self {
            words: this.words.clone().narrow(0, start, count),
            scales: this.scales.clone().narrow(0, start, count),
            zeros: (this.zeros.clone()).map(|zeros| zeros.narrow(0, start, count)),
            ..this
        }
    }

    /// Some rows, in the order of `indices`: a matrix `[n, in]`.
    ///
    /// # Shapes
    /// - `indices`: `[n]`
    pub fn select(&self, indices: Tensor<B, 1, Int>) -> Self {
        let this = self.by_rows();
        Self {
            words: this.words.clone().select(0, indices.clone()),
            scales: this.scales.clone().select(0, indices.clone()),
            zeros: this.zeros.clone().map(|zeros| zeros.select(0, indices)),
            ..this
        }
    }

    /// Dequantises: the values as floats, `[out, in]`, in plain Burn.
    pub fn unpack(&self, dtype: DType) -> Tensor<B, 2> {
        if self.is_arranged() {
            return self.by_rows().unpack(dtype);
        }
        let [rows, words] = self.words.dims();
        let format = self.format;
        let mask = (1i32 << format.bits()) - 1;
        let places = (0..format.per_word()).map(|place| {
            let shift = (place * format.bits()) as i32;
            // The shift repeats the sign, which the mask takes off again.
            self.words
                .clone()
                .bitwise_right_shift_scalar(shift.elem())
                .bitwise_and_scalar(mask.elem())
        });
        let levels: Tensor<B, 3, Int> = Tensor::stack(places.collect(), 2);
        let levels = to_f32(levels.reshape([rows, words * format.per_word()]).float());
        let group = format.group(self.d_input);
        let of_groups = |levels: Tensor<B, 2>| -> Tensor<B, 3> {
            levels.reshape([rows as i32, -1, group as i32])
        };
        let values = match &self.zeros {
            Some(zeros) => of_groups(levels) - to_f32(zeros.clone()).unsqueeze_dim(2),
            None => of_groups(levels - format.offset() as f64),
        };
        let values: Tensor<B, 3> = values * to_f32(self.scales.clone()).unsqueeze_dim(2);
        let values: Tensor<B, 2> = values.reshape([rows as i32, -1]);
        to_dtype(values.narrow(1, 0, self.d_input), dtype)
    }

    /// The rows in pieces of at most [`UNPACKED_BYTES`] of floats of `dtype`: first row and number of rows.
    pub fn row_pieces(&self, dtype: DType) -> impl Iterator<Item = (usize, usize)> + use<B> {
        let [out, _] = self.dims();
        let at_once = self.rows_at_once(dtype);
        (0..out)
            .step_by(at_once)
            .map(move |start| (start, at_once.min(out - start)))
    }

    /// Rows of floats of `dtype` that are dequantised at once.
    pub fn rows_at_once(&self, dtype: DType) -> usize {
        let row = self.format.padded(self.d_input) * dtype.size();
        let rows = UNPACKED_BYTES / row;
        // Whole tiles of a matmul.
        if rows > TILE {
            rows / TILE * TILE
        } else {
            rows.max(1)
        }
    }
}

impl<B: Backend> QuantisedWeight<B> {
    /// The same matrix on another device, by way of the host.
    pub fn to_device(self, device: &B::Device) -> Self {
        if self.device() == *device {
            return self;
        }
        let zeros = self.zeros.map(Tensor::into_data);
        let data = (self.words.into_data(), self.scales.into_data(), zeros);
        let (words, scales, zeros) =
            persistent::<B, _, _>(device, data, |(words, scales, zeros)| {
                let (of_words, of_scales) = (words.dtype, scales.dtype);
                (
                    Tensor::from_data(words, (device, of_words)),
                    Tensor::from_data(scales, (device, of_scales)),
                    zeros.map(|zeros| {
                        let dtype = zeros.dtype;
                        Tensor::from_data(zeros, (device, dtype))
                    }),
                )
            });
        Self {
            words,
            scales,
            zeros,
            ..self
        }
    }
}

impl<B: AutodiffBackend> QuantisedWeight<B> {
    /// The same matrix without autodiff.
    pub fn inner(&self) -> QuantisedWeight<B::InnerBackend> {
        QuantisedWeight {
            words: self.words.clone().inner(),
            scales: self.scales.clone().inner(),
            zeros: self.zeros.clone().map(Tensor::inner),
            order: self.order,
            format: self.format,
            d_input: self.d_input,
            dtype: self.dtype,
        }
    }

    /// The same matrix under autodiff; it never gets a gradient.
    pub fn from_inner(inner: QuantisedWeight<B::InnerBackend>) -> Self {
        Self {
            words: Tensor::from_inner(inner.words),
            scales: Tensor::from_inner(inner.scales),
            zeros: inner.zeros.map(Tensor::from_inner),
            order: inner.order,
            format: inner.format,
            d_input: inner.d_input,
            dtype: inner.dtype,
        }
    }
}

/// Makes tensors that stay: they are allocated at their exact size, where pages of a backend's pool
/// would leave gaps between the matrices of a model.
pub fn persistent<B: Backend, Input: Send, Output: Send>(
    device: &B::Device,
    input: Input,
    make: impl Fn(Input) -> Output + Send,
) -> Output {
    B::memory_persistent_allocations(device, input, make)
}

/// Type of the scales on a device: as stored, or f32 where there is no f16.
pub fn scale_dtype<B: Backend>(format: Format, device: &B::Device) -> DType {
    let stored = format.scale_dtype();
    if B::supports_dtype(device, stored) {
        stored
    } else {
        DType::F32
    }
}
