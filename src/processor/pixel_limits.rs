//! Limits of an image's size that a row of data names.

use serde_json::Value;

use super::{
    row_fault::{RowFault, kind_of, shown},
    row_keys,
};
use crate::base::files::nearest::nearest;

/// Pixel limits of a row's images, in place of those of the run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PixelLimits {
    /// Smallest width times height after scaling.
    pub min_pixels: Option<usize>,
    /// Largest width times height after scaling.
    pub max_pixels: Option<usize>,
}

/// `min_pixels` and `max_pixels` of `chat_template_kwargs`.
pub(super) fn pixel_limits(kwargs: Option<&Value>) -> Result<PixelLimits, RowFault> {
    const KEYS: [&str; 2] = ["min_pixels", "max_pixels"];
    let mut limits = PixelLimits::default();
    let fields = match kwargs {
        None => return Ok(limits),
        Some(value) if row_keys::is_empty(value) => return Ok(limits),
        Some(Value::Object(fields)) => fields,
        Some(other) => {
            let key = "chat_template_kwargs";
            return Err(RowFault::key(key, kind_of(other), "an object"));
        }
    };
    for (name, value) in fields {
        if row_keys::is_empty(value) {
            continue;
        }
        let key = format!("chat_template_kwargs.{name}");
        let limit = match name.as_str() {
            "min_pixels" => &mut limits.min_pixels,
            "max_pixels" => &mut limits.max_pixels,
            _ => match nearest(name, KEYS) {
                Some(nearest) => return Err(RowFault::Slip { key, nearest }),
                None => {
                    let cure = "of these settings only `min_pixels` and `max_pixels` have a meaning in training; take it out";
                    return Err(RowFault::Refused { key, cure });
                }
            },
        };
        let pixels = value
            .as_u64()
            .and_then(|pixels| usize::try_from(pixels).ok());
        *limit =
            Some(pixels.filter(|pixels| *pixels > 0).ok_or_else(|| {
                RowFault::key(key, shown(value), "a whole number of pixels above 0")
            })?);
    }
    Ok(limits)
}
