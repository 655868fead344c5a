//! How pixels are stored: transfer syntaxes by identifier.

use dicom_encoding::transfer_syntax::TransferSyntaxIndex;
use dicom_transfer_syntax_registry::TransferSyntaxRegistry;

use super::encoding::Encoding;
use super::error::DicomError;

/// Whether `text` is an identifier: digits and dots, at most 64.
pub(super) fn is_uid(text: &str) -> bool {
    let known = |c: u8| c.is_ascii_digit() || c == b'.';
    !text.is_empty() && text.len() <= 64 && text.bytes().all(known)
}

/// The transfer syntaxes that are read, the most usual first.
pub(super) const READABLE: [&str; 18] = [
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    DEFLATED,
    EXPLICIT_BIG,
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2.4.53",
    "1.2.840.10008.1.2.4.55",
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.4.201",
    "1.2.840.10008.1.2.4.202",
    "1.2.840.10008.1.2.4.203",
];

/// A transfer syntax.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Syntax {
    uid: String,
    /// `None` for one that is not read.
    codec: Option<Codec>,
}

/// What the pixels have to go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    /// Nothing.
    Native,
    /// Run lengths of bytes.
    Rle,
    /// JPEG, with loss or without.
    Jpeg,
    /// JPEG-LS.
    JpegLs,
    /// JPEG 2000 and its high-throughput form.
    Jpeg2000,
    /// Each frame deflated.
    Deflate,
}

const IMPLICIT_LITTLE: &str = "1.2.840.10008.1.2";
const EXPLICIT_LITTLE: &str = "1.2.840.10008.1.2.1";
const DEFLATED: &str = "1.2.840.10008.1.2.1.99";
const EXPLICIT_BIG: &str = "1.2.840.10008.1.2.2";

impl Syntax {
    pub(super) fn of(uid: &str) -> Self {
        let codec = match uid {
            IMPLICIT_LITTLE | EXPLICIT_LITTLE | DEFLATED | EXPLICIT_BIG => Some(Codec::Native),
            "1.2.840.10008.1.2.5" => Some(Codec::Rle),
            // Baseline; extended, of 8 or 12 bits; two retired forms of progressive; lossless of any and of
            // first order.
            "1.2.840.10008.1.2.4.50"
            | "1.2.840.10008.1.2.4.51"
            | "1.2.840.10008.1.2.4.53"
            | "1.2.840.10008.1.2.4.55"
            | "1.2.840.10008.1.2.4.57"
            | "1.2.840.10008.1.2.4.70" => Some(Codec::Jpeg),
            "1.2.840.10008.1.2.4.80" | "1.2.840.10008.1.2.4.81" => Some(Codec::JpegLs),
            "1.2.840.10008.1.2.4.90"
            | "1.2.840.10008.1.2.4.91"
            | "1.2.840.10008.1.2.4.201"
            | "1.2.840.10008.1.2.4.202"
            | "1.2.840.10008.1.2.4.203" => Some(Codec::Jpeg2000),
            "1.2.840.10008.1.2.8.1" => Some(Codec::Deflate),
            _ => None,
        };
        Self {
            uid: uid.to_owned(),
            codec,
        }
    }

    /// What a file without a header must be.
    pub(super) fn plain(encoding: Encoding) -> Self {
        Self::of(match encoding {
            Encoding::ImplicitLittle => IMPLICIT_LITTLE,
            Encoding::ExplicitLittle => EXPLICIT_LITTLE,
            Encoding::ExplicitBig => EXPLICIT_BIG,
        })
    }

    pub(super) fn encoding(&self) -> Encoding {
        match self.uid.as_str() {
            IMPLICIT_LITTLE => Encoding::ImplicitLittle,
            EXPLICIT_BIG => Encoding::ExplicitBig,
            // All others: PS3.5, A.4.
            _ => Encoding::ExplicitLittle,
        }
    }

    pub(super) fn is_deflated(&self) -> bool {
        self.uid == DEFLATED
    }

    /// What the pixels have to go through.
    ///
    /// # Errors
    /// [`DicomError::TransferSyntax`] for a syntax that is not read.
    pub(super) fn codec(&self) -> Result<Codec, DicomError> {
        self.codec.ok_or_else(|| self.refused())
    }

    /// The error that names this syntax.
    pub(super) fn refused(&self) -> DicomError {
        DicomError::TransferSyntax {
            syntax: self.name().to_owned(),
            uid: self.uid.clone(),
            hint: self.cure(),
        }
    }

    /// How a file of this syntax is made one that is read; only programs that can are named.
    fn cure(&self) -> &'static str {
        match self.uid.as_str() {
            "1.2.840.10008.1.2.4.80" | "1.2.840.10008.1.2.4.81" => {
                "convert it to Explicit VR Little Endian, for instance with `gdcmconv --raw IN OUT` or dcmtk's `dcmdjpls IN OUT`"
            }
            // High-throughput JPEG 2000: neither gdcm nor dcmtk reads it.
            "1.2.840.10008.1.2.4.201" | "1.2.840.10008.1.2.4.202" | "1.2.840.10008.1.2.4.203" => {
                "convert it to Explicit VR Little Endian with pydicom and pylibjpeg-openjpeg: `d = pydicom.dcmread(IN); d.decompress(); d.save_as(OUT)`"
            }
            uid if uid.starts_with("1.2.840.10008.1.2.4.5")
                || uid.starts_with("1.2.840.10008.1.2.4.6") =>
            {
                "convert it to Explicit VR Little Endian, for instance with `gdcmconv --raw IN OUT` or dcmtk's `dcmdjpeg IN OUT`"
            }
            _ => {
                "export it again where it was made, as Explicit VR Little Endian without compression"
            }
        }
    }

    pub(super) fn uid(&self) -> &str {
        &self.uid
    }

    pub(super) fn name(&self) -> &'static str {
        TransferSyntaxRegistry
            .get(&self.uid)
            .map_or("an unknown transfer syntax", |syntax| syntax.name())
    }
}
