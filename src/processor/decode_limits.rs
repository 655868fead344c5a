//! What a picture from outside may cost.

/// What a picture from outside may cost, checked before the cost is paid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Largest file, in bytes.
    pub max_file_bytes: u64,
    /// Largest width times height in a header.
    pub max_decoded_pixels: u64,
    /// Largest buffer of decoded pixels, in bytes.
    pub max_decoded_bytes: u64,
}

impl Default for DecodeLimits {
    /// 512 MiB of file, 200 million pixels, 1 GiB decoded: room for any radiograph, and a scan of
    /// 20,000 × 10,000 pixels in 8-bit colour.
    fn default() -> Self {
        Self {
            max_file_bytes: 512 << 20,
            max_decoded_pixels: 200_000_000,
            max_decoded_bytes: 1 << 30,
        }
    }
}
