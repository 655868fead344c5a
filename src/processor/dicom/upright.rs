//! Which way up a radiograph is hung: head up, and the patient's left on the viewer's right.

use dicom_dictionary_std::tags;
use image::metadata::Orientation;

use super::reader::DataSet;

/// A direction in the patient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Left,
    Right,
    Front,
    Back,
    Head,
    Feet,
}

impl Direction {
    /// The direction that counts most of such as `LA` (left, and a little to the front).
    fn of(text: &str) -> Option<Self> {
        match text.as_bytes().first()? {
            b'L' => Some(Self::Left),
            b'R' => Some(Self::Right),
            b'A' => Some(Self::Front),
            b'P' => Some(Self::Back),
            b'H' => Some(Self::Head),
            b'F' => Some(Self::Feet),
            _ => None,
        }
    }

    fn is_vertical(self) -> bool {
        matches!(self, Self::Head | Self::Feet)
    }
}

/// How the stored picture has to be rotated or mirrored, by Patient Orientation (0020,0020).
///
/// Its two values say where rows run to and where columns run to. Frontal views are shown with
/// columns running to the feet and rows to the patient's left, so also mirrored ones are put right;
/// lateral views are rotated head up and never mirrored, since both ways of hanging them are usual.
/// Without the attribute, or if neither value is head or feet, the picture stays as it is.
pub(super) fn orientation(set: &DataSet<'_>) -> Orientation {
    use Direction::{Feet, Head, Left, Right};
    let sides: Vec<Option<Direction>> = set
        .codes(tags::PATIENT_ORIENTATION)
        .into_iter()
        .map(Direction::of)
        .collect();
    let [Some(rows), Some(columns)] = sides[..] else {
        return Orientation::NoTransforms;
    };
    if rows.is_vertical() == columns.is_vertical() {
        return Orientation::NoTransforms;
    }
    match (rows, columns) {
        (Right, Head) => Orientation::Rotate180,
        (Right, _) => Orientation::FlipHorizontal,
        (Left, Head) => Orientation::FlipVertical,
        // A lateral view upside down.
        (_, Head) => Orientation::Rotate180,
        // Rows that run to the feet have to run down: a quarter clockwise, columns then run left.
        (Feet, Left) => Orientation::Rotate90FlipH,
        (Feet, _) => Orientation::Rotate90,
        (Head, Right) => Orientation::Rotate270FlipH,
        (Head, _) => Orientation::Rotate270,
        _ => Orientation::NoTransforms,
    }
}
