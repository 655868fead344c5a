//! How attributes are encoded, and whether a file is DICOM at all.

use dicom_core::VR;
use dicom_core::header::DataElementHeader;
use dicom_encoding::decode::Decode;
use dicom_encoding::decode::explicit_be::ExplicitVRBigEndianDecoder;
use dicom_encoding::decode::explicit_le::ExplicitVRLittleEndianDecoder;
use dicom_encoding::decode::implicit_le::StandardImplicitVRLittleEndianDecoder;

use super::error::DicomError;

/// Bytes before the magic word of a DICOM file.
pub(super) const PREAMBLE: usize = 128;
pub(super) const MAGIC: &[u8] = b"DICM";
/// Bytes [`looks_like_dicom`] looks at.
pub(super) const HEAD: usize = PREAMBLE + MAGIC.len();

/// How attributes are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    ImplicitLittle,
    ExplicitLittle,
    ExplicitBig,
}

impl Encoding {
    /// The header at the start of `bytes`, and its length.
    pub(super) fn header(self, mut bytes: &[u8]) -> Result<(DataElementHeader, usize), DicomError> {
        match self {
            Self::ImplicitLittle => {
                StandardImplicitVRLittleEndianDecoder::default().decode_header(&mut bytes)
            }
            Self::ExplicitLittle => {
                ExplicitVRLittleEndianDecoder::default().decode_header(&mut bytes)
            }
            Self::ExplicitBig => ExplicitVRBigEndianDecoder::default().decode_header(&mut bytes),
        }
        // The bytes ended: nothing else can be wrong with a header.
        .map_err(|_| DicomError::Truncated)
    }

    pub(super) fn u16(self, bytes: [u8; 2]) -> u16 {
        match self {
            Self::ExplicitBig => u16::from_be_bytes(bytes),
            _ => u16::from_le_bytes(bytes),
        }
    }

    pub(super) fn u32(self, bytes: [u8; 4]) -> u32 {
        match self {
            Self::ExplicitBig => u32::from_be_bytes(bytes),
            _ => u32::from_le_bytes(bytes),
        }
    }

    /// Guesses from the first attribute, for files whose header does not say.
    pub(super) fn guess(bytes: &[u8]) -> Option<Self> {
        let [g0, g1, e0, e1, v0, v1, l0, l1, ..] = *bytes else {
            return None;
        };
        let explicit = VR::from_binary([v0, v1]).is_some();
        let known = |group, element: u16| matches!(group, 0x0002 | 0x0008) && element < 0x0100;
        let little = known(u16::from_le_bytes([g0, g1]), u16::from_le_bytes([e0, e1]));
        let big = known(u16::from_be_bytes([g0, g1]), u16::from_be_bytes([e0, e1]));
        // The first attribute is a length, a kind or a date: short.
        let length = u32::from_le_bytes([v0, v1, l0, l1]);
        match (little, big, explicit) {
            (true, _, true) => Some(Self::ExplicitLittle),
            (_, true, true) => Some(Self::ExplicitBig),
            (true, _, false) if length <= 0x400 && length % 2 == 0 => Some(Self::ImplicitLittle),
            _ => None,
        }
    }
}

/// Whether a file that begins with `head` (132 bytes are enough) is DICOM, by its content.
///
/// Either the magic word after the preamble, which itself may look like another format, or a first
/// attribute as a data set without preamble has it.
pub fn looks_like_dicom(head: &[u8]) -> bool {
    head.get(PREAMBLE..HEAD) == Some(MAGIC) || Encoding::guess(head).is_some()
}
