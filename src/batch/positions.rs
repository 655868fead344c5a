//! Three-axis positions of tokens (M-RoPE), computed on the host.

/// Positions of every token on the three axes (time, height, width), `[axis][token]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Positions {
    /// One vector of token positions an axis.
    pub axes: [Vec<i64>; 3],
}

impl Positions {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.axes[0].len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.axes[0].is_empty()
    }

    /// Appends one token.
    pub fn push(&mut self, position: [i64; 3]) {
        for (axis, value) in self.axes.iter_mut().zip(position) {
            axis.push(value);
        }
    }

    /// The positions of tokens `range`.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Self {
        Self {
            axes: self
                .axes
                .each_ref()
                .map(|axis| axis[range.clone()].to_vec()),
        }
    }

    /// Appends all tokens of `other`.
    pub fn extend(&mut self, other: &Self) {
        for (axis, more) in self.axes.iter_mut().zip(&other.axes) {
            axis.extend_from_slice(more);
        }
    }
}

/// What does not fit between a prompt and its images.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PositionError {
    /// More image tokens than the images have, or fewer.
    #[error(
        "the prompt holds {found} image tokens, its {images} image(s) need {expected}; one placeholder an image is expanded to its number of merged patches"
    )]
    ImageTokens {
        /// Image tokens in the prompt.
        found: usize,
        /// Tokens the images need.
        expected: usize,
        /// Number of images.
        images: usize,
    },
    /// An image's tokens are interrupted by text.
    #[error("image {image} has {found} image tokens in a row, expected {expected}")]
    Interrupted {
        /// Index of the image.
        image: usize,
        /// Tokens found in a row.
        found: usize,
        /// Tokens expected.
        expected: usize,
    },
}

/// Position ids of one unpadded sequence, and the next free position less its length.
///
/// Text counts up on all axes alike; an image's tokens share one time position and carry their row
/// and column; text after an image continues after the largest position so far. `grids` holds each
/// image's patches as `(time, height, width)`.
///
/// # Errors
/// [`PositionError`] when image tokens and grids do not agree.
///
/// Source: `Qwen3VLModel.get_rope_index`, transformers.
pub fn rope_index(
    input_ids: &[u32],
    grids: &[[usize; 3]],
    image_token_id: u32,
    merge: usize,
) -> Result<(Positions, i64), PositionError> {
    let mut positions = Positions::default();
    let mut next: i64 = 0;
    let mut image = 0;
    let mut at = 0;
    let mismatch = || PositionError::ImageTokens {
        found: input_ids.iter().filter(|id| **id == image_token_id).count(),
        expected: grids
            .iter()
            .map(|[t, h, w]| t * h * w / (merge * merge))
            .sum(),
        images: grids.len(),
    };
    while at < input_ids.len() {
        if input_ids[at] != image_token_id {
            positions.push([next; 3]);
            next += 1;
            at += 1;
            continue;
        }
        let [t, h, w] = *grids.get(image).ok_or_else(mismatch)?;
        let (rows, columns) = (h / merge, w / merge);
        let expected = t * rows * columns;
        let found = input_ids[at..]
            .iter()
            .take(expected)
            .take_while(|id| **id == image_token_id)
            .count();
        if found < expected {
            if input_ids[at + found..].contains(&image_token_id) {
                return Err(PositionError::Interrupted {
                    image,
                    found,
                    expected,
                });
            }
            return Err(mismatch());
        }
        for frame in 0..t {
            for row in 0..rows {
                for column in 0..columns {
                    positions.push([next + frame as i64, next + row as i64, next + column as i64]);
                }
            }
        }
        next += t.max(rows).max(columns) as i64;
        at += expected;
        image += 1;
    }
    if image != grids.len() {
        return Err(mismatch());
    }
    let delta = next - input_ids.len() as i64;
    Ok((positions, delta))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_continues_after_the_larger_side_of_an_image() {
        // One text token, a 2×3 image of merged patches, two text tokens.
        let ids = [1, 9, 9, 9, 9, 9, 9, 2, 3];
        let (positions, delta) = rope_index(&ids, &[[1, 4, 6]], 9, 2).unwrap();
        assert_eq!(positions.axes[0], [0, 1, 1, 1, 1, 1, 1, 4, 5]);
        assert_eq!(positions.axes[1], [0, 1, 1, 1, 2, 2, 2, 4, 5]);
        assert_eq!(positions.axes[2], [0, 1, 2, 3, 1, 2, 3, 4, 5]);
        assert_eq!(delta, -3);
    }

    #[test]
    fn image_tokens_and_grids_must_agree() {
        let count = rope_index(&[9, 9], &[[1, 4, 6]], 9, 2).unwrap_err();
        assert!(count.to_string().contains("need 6"), "{count}");
        let none = rope_index(&[1, 9], &[], 9, 2).unwrap_err();
        assert!(none.to_string().contains("holds 1 image tokens"), "{none}");
        let unused = rope_index(&[1, 2], &[[1, 2, 2]], 9, 2).unwrap_err();
        assert!(unused.to_string().contains("holds 0"), "{unused}");
        let split = rope_index(&[9, 1, 9, 9], &[[1, 2, 6]], 9, 2).unwrap_err();
        assert_eq!(
            split,
            PositionError::Interrupted {
                image: 0,
                found: 1,
                expected: 3
            }
        );
    }
}
