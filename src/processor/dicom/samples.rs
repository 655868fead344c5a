//! What every codec gives.

/// The numbers of a frame, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Samples {
    /// `[rows, columns]`: the stored bits of each pixel, the others zero; the sign is not applied.
    Gray(Vec<u16>),
    /// The same of numbers with more than 16 bits.
    Wide(Vec<u32>),
    /// `[rows, columns, 3]`: red, green, blue.
    Rgb(Vec<u8>),
}
