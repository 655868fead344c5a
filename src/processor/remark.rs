//! What a reader of a report should know about the image it was written from.

use std::fmt;

use serde::ser::{Serialize, SerializeStruct, Serializer};

/// A kind of remark, by a code that programs may rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RemarkKind {
    /// The file says that it shows something else than a chest from the front or the side.
    NotAChest,
    /// The file does not say what it shows.
    SubjectNotStated,
    /// The file is meant for further processing and not for reading.
    ForProcessing,
    /// Text is part of the pixels.
    BurnedInAnnotation,
    /// All pixels have one colour.
    OneColour,
    /// There was no image at all.
    NoImage,
    /// The levels fill a part of what their storage can hold; the filled part is shown.
    NarrowRange,
    /// The levels have no range of their own; that of their percentiles is shown.
    PercentileRange,
    /// The window shows no level of the image, or is no window; another range is shown.
    WindowOutsideRange,
    /// The file states a polarity other than that of its photometric interpretation.
    PresentationShape,
    /// The file does not say what its numbers mean.
    PhotometricAssumed,
    /// The file's colour tag and the compressed stream disagree; the stream was followed.
    ColourTag,
    /// Graphics stored beside the pixels are not shown.
    OverlayLeftOut,
    /// The first of several pages or frames is shown.
    FirstOfSeveralPages,
    /// A part of the compressed pixels is damaged.
    Damaged,
    /// The image was rotated or mirrored.
    Turned,
    /// Pixels are not square.
    PixelAspect,
}

impl RemarkKind {
    /// The code in records and answers; it does not change.
    pub fn code(self) -> &'static str {
        match self {
            Self::NotAChest => "not_a_chest",
            Self::SubjectNotStated => "subject_not_stated",
            Self::ForProcessing => "for_processing",
            Self::BurnedInAnnotation => "burned_in_annotation",
            Self::OneColour => "one_colour",
            Self::NoImage => "no_image",
            Self::NarrowRange => "narrow_range",
            Self::PercentileRange => "percentile_range",
            Self::WindowOutsideRange => "window_outside_range",
            Self::PresentationShape => "presentation_shape",
            Self::PhotometricAssumed => "photometric_assumed",
            Self::ColourTag => "colour_tag",
            Self::OverlayLeftOut => "overlay_left_out",
            Self::FirstOfSeveralPages => "first_of_several_pages",
            Self::Damaged => "damaged",
            Self::Turned => "turned",
            Self::PixelAspect => "pixel_aspect",
        }
    }
}

/// Something about an image that is no error.
///
/// The text is about "it", without the file's name, and repeats no free text of a file. As JSON:
/// `{"code": "not_a_chest", "text": "its body part is HAND, …"}`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Remark {
    kind: RemarkKind,
    text: String,
}

impl Remark {
    /// A remark of `kind` in the words of `text`.
    pub fn new(kind: RemarkKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }

    /// What it is about.
    pub fn kind(&self) -> RemarkKind {
        self.kind
    }

    /// The sentence, in lower case and without a full stop.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether writing it once for a whole run is enough; a record of an image carries it always.
    pub fn is_said_once(&self) -> bool {
        self.kind == RemarkKind::SubjectNotStated
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Remark {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("Remark", 2)?;
        object.serialize_field("code", self.kind.code())?;
        object.serialize_field("text", &self.text)?;
        object.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remark_is_a_code_and_a_sentence() {
        let remark = Remark::new(RemarkKind::OneColour, "all its pixels have one colour");
        assert_eq!(
            serde_json::to_string(&remark).unwrap(),
            r#"{"code":"one_colour","text":"all its pixels have one colour"}"#
        );
        assert_eq!(remark.to_string(), "all its pixels have one colour");
    }
}
