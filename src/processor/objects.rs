//! Names and boxes of objects, written in place of `<ref-object>` and `<bbox>`.
//!
//! Boxes are written as Qwen3-VL writes them: `[x1, y1, x2, y2]` in thousandths of the image's
//! width and height, in plain digits. That is ms-swift's `QWENVL_BBOX_FORMAT=new`; its older default
//! wraps them in control tokens, which a report does not show.
//!
//! Source: `normalize_bbox`, ms-swift 4.6, `template/base.py`; `_check_objects`,
//! `dataset/preprocessor/core.py`; `Qwen2VLTemplate.replace_bbox`, `template/templates/qwen.py`.

use serde_json::Value;

use super::row_fault::{RowFault, kind_of, shown};
use super::row_keys;
use crate::base::files::nearest::nearest;

/// Width and height of the grid that coordinates are rounded to.
const GRID: f64 = 1000.0;

/// Keys of `objects`.
const KEYS: [&str; 4] = ["ref", "bbox", "bbox_type", "image_id"];

/// What coordinates are counted in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Unit {
    /// Pixels of the image as it is shown.
    #[default]
    Pixels,
    /// Shares of its sides, from 0 to 1.
    Shares,
    /// Thousandths of its sides, as they are written.
    Thousandths,
}

/// The objects of one row, taken in the order of their tags.
#[derive(Debug, Default)]
pub(super) struct Objects {
    names: Vec<String>,
    /// Two or four coordinates each.
    boxes: Vec<Vec<f64>>,
    unit: Unit,
    /// Image of each box.
    images: Vec<usize>,
    next_name: usize,
    next_box: usize,
}

impl Objects {
    /// Reads `objects` of a row with `images` images.
    pub(super) fn read(value: Option<&Value>, images: usize) -> Result<Self, RowFault> {
        let fields = match value {
            None => return Ok(Self::default()),
            Some(value) if row_keys::is_empty(value) => return Ok(Self::default()),
            Some(Value::Object(fields)) => fields,
            Some(other) => {
                let expected = "an object with `ref` and `bbox`";
                return Err(RowFault::key("objects", kind_of(other), expected));
            }
        };
        for (name, value) in fields {
            if KEYS.contains(&name.as_str()) || row_keys::is_empty(value) {
                continue;
            }
            let key = format!("objects.{name}");
            return Err(match nearest(name, KEYS) {
                Some(nearest) => RowFault::Slip { key, nearest },
                None => RowFault::Refused {
                    key,
                    cure: "of objects `ref`, `bbox`, `bbox_type` and `image_id` are read; take it out",
                },
            });
        }
        let list = |name: &str| match fields.get(name) {
            None | Some(Value::Null) => Ok(&[][..]),
            Some(Value::Array(entries)) => Ok(entries.as_slice()),
            Some(other) => Err(RowFault::key(
                format!("objects.{name}"),
                kind_of(other),
                "a list",
            )),
        };
        let mut objects = Self::default();
        for (index, name) in list("ref")?.iter().enumerate() {
            let name = name.as_str().ok_or_else(|| {
                RowFault::key(format!("objects.ref[{index}]"), kind_of(name), "a text")
            })?;
            objects.names.push(name.to_owned());
        }
        for (index, corners) in list("bbox")?.iter().enumerate() {
            let numbers = corners.as_array().and_then(|corners| {
                let numbers: Option<Vec<f64>> = corners.iter().map(Value::as_f64).collect();
                numbers.filter(|numbers| matches!(numbers.len(), 2 | 4))
            });
            let mut numbers = numbers.ok_or_else(|| {
                RowFault::key(
                    format!("objects.bbox[{index}]"),
                    corners.to_string().chars().take(60).collect::<String>(),
                    "`[x, y]` or `[x1, y1, x2, y2]`",
                )
            })?;
            if let [x1, y1, x2, y2] = numbers.as_mut_slice() {
                if *x1 > *x2 {
                    std::mem::swap(x1, x2);
                }
                if *y1 > *y2 {
                    std::mem::swap(y1, y2);
                }
            }
            objects.boxes.push(numbers);
        }
        objects.unit = match fields.get("bbox_type") {
            None | Some(Value::Null) => Unit::Pixels,
            Some(Value::String(kind)) if kind == "real" => Unit::Pixels,
            Some(Value::String(kind)) if kind == "norm1" => Unit::Shares,
            Some(Value::String(kind)) if kind == "norm1000" => Unit::Thousandths,
            Some(other) => {
                let expected = "`real` (pixels), `norm1` (shares of the sides) or `norm1000` (thousandths of them)";
                return Err(RowFault::key("objects.bbox_type", shown(other), expected));
            }
        };
        for (index, image) in list("image_id")?.iter().enumerate() {
            let place = image.as_u64().and_then(|place| usize::try_from(place).ok());
            objects
                .images
                .push(place.filter(|place| *place < images).ok_or_else(|| {
                    RowFault::key(
                        format!("objects.image_id[{index}]"),
                        shown(image),
                        "the place of an image of the row, from 0",
                    )
                })?);
        }
        if !objects.boxes.is_empty() && objects.unit == Unit::Pixels && images == 0 {
            let expected = "a picture to measure it in, or `bbox_type` `norm1` or `norm1000`";
            return Err(RowFault::key(
                "objects.bbox",
                "given in pixels, without a picture",
                expected,
            ));
        }
        Ok(objects)
    }

    /// The name for the next `<ref-object>`, in the text under `key`.
    pub(super) fn next_reference(&mut self, key: &str) -> Result<String, RowFault> {
        let name = self.names.get(self.next_name).cloned();
        self.next_name += 1;
        name.ok_or_else(|| RowFault::Tag {
            key: key.to_owned(),
            tag: "<ref-object>".to_owned(),
            expected: "expected a name in `objects.ref` for each",
        })
    }

    /// The text for the next `<bbox>`, in the text under `key`; the tag itself without `sizes`.
    pub(super) fn next_box(
        &mut self,
        key: &str,
        sizes: Option<&[(usize, usize)]>,
    ) -> Result<String, RowFault> {
        let index = self.next_box;
        self.next_box += 1;
        let corners = self.boxes.get(index).ok_or_else(|| RowFault::Tag {
            key: key.to_owned(),
            tag: "<bbox>".to_owned(),
            expected: "expected a box in `objects.bbox` for each",
        })?;
        let Some(sizes) = sizes else {
            return Ok("<bbox>".to_owned());
        };
        let (width, height) = match self.unit {
            Unit::Shares => (1, 1),
            Unit::Thousandths => (GRID as usize, GRID as usize),
            Unit::Pixels => {
                let image = self.images.get(index).copied().unwrap_or(0);
                sizes.get(image).copied().unwrap_or((1, 1))
            }
        };
        let mut text = Vec::new();
        for (at, value) in corners.iter().enumerate() {
            let side = if at % 2 == 0 { width } else { height };
            // Python rounds halves to the even number.
            let place = (value / side as f64 * GRID).round_ties_even();
            if !(0.0..=GRID).contains(&place) {
                let unit = match self.unit {
                    Unit::Shares => "the range from 0 to 1 of `bbox_type` `norm1`".to_owned(),
                    Unit::Thousandths => {
                        "the range from 0 to 1000 of `bbox_type` `norm1000`".to_owned()
                    }
                    Unit::Pixels => format!("its picture of {width} × {height} pixels"),
                };
                return Err(RowFault::key(
                    format!("objects.bbox[{index}]"),
                    format!("`{}`, outside {unit}", Value::from(corners.as_slice())),
                    "a box inside, in pixels of the picture as it is shown, or shares or thousandths of its sides with `bbox_type` `norm1` or `norm1000`",
                ));
            }
            text.push(format!("{place}"));
        }
        Ok(format!("[{}]", text.join(", ")))
    }

    /// Refuses names and boxes that no tag of the row takes.
    pub(super) fn check_all_used(&self) -> Result<(), RowFault> {
        for (key, tag, given, used) in [
            (
                "objects.ref",
                "<ref-object>",
                self.names.len(),
                self.next_name,
            ),
            ("objects.bbox", "<bbox>", self.boxes.len(), self.next_box),
        ] {
            if used < given {
                return Err(RowFault::key(
                    key,
                    format!("a list of {given}, but the messages hold {used} `{tag}`"),
                    "as many of one as of the other",
                ));
            }
        }
        Ok(())
    }
}
