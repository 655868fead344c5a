//! Sequences of token ids, padded or packed to one length.

use super::positions::{PositionError, Positions, rope_index};

/// One batch of sequences, on the host: every row padded to one length.
#[derive(Debug, Clone, PartialEq)]
pub struct TextInput {
    /// Token ids, `[batch][seq]`.
    pub input_ids: Vec<Vec<u32>>,
    /// The sample each token belongs to, `[batch][seq]`, negative for padding. Several samples may
    /// share a row; attention stays inside each.
    pub segments: Vec<Vec<i32>>,
    /// Positions of all tokens, row after row.
    pub positions: Positions,
    /// Placeholder token of an image patch.
    pub image_token_id: u32,
}

/// How images show among the tokens of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageTokens {
    /// Placeholder token of a merged square of patches.
    pub image_token_id: u32,
    /// Side of that square, in patches.
    pub merge: usize,
}

/// Side on which short rows are padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// For generation: every row ends in its last token.
    Left,
    /// For training.
    Right,
}

impl TextInput {
    /// A padded batch of independent sequences.
    ///
    /// `grids` holds the images of each row; padding has position 0. Returns the batch and each
    /// row's next position less its number of tokens.
    ///
    /// # Errors
    /// [`PositionError`] when image tokens and grids of a row do not agree.
    pub fn padded(
        rows: &[Vec<u32>],
        grids: &[Vec<[usize; 3]>],
        image_tokens: impl Into<ImageTokens>,
        padding: Padding,
        pad_token_id: u32,
    ) -> Result<(Self, Vec<i64>), PositionError> {
        let seq = rows.iter().map(Vec::len).max().unwrap_or(0);
        let ImageTokens {
            image_token_id,
            merge,
        } = image_tokens.into();
        let mut batch = Self {
            input_ids: Vec::with_capacity(rows.len()),
            segments: Vec::with_capacity(rows.len()),
            positions: Positions::default(),
            image_token_id,
        };
        let mut deltas = Vec::with_capacity(rows.len());
        for (ids, grids) in rows.iter().zip(grids) {
            let (positions, delta) = rope_index(ids, grids, image_token_id, merge)?;
            let pad = seq - ids.len();
            let (before, after) = match padding {
                Padding::Left => (pad, 0),
                Padding::Right => (0, pad),
            };
            let fill = |count| std::iter::repeat_n(pad_token_id, count);
            batch.input_ids.push(
                fill(before)
                    .chain(ids.iter().copied())
                    .chain(fill(after))
                    .collect(),
            );
            let hidden = |count| std::iter::repeat_n(-1, count);
            batch.segments.push(
                hidden(before)
                    .chain(std::iter::repeat_n(0, ids.len()))
                    .chain(hidden(after))
                    .collect(),
            );
            (0..before).for_each(|_| batch.positions.push([0; 3]));
            batch.positions.extend(&positions);
            (0..after).for_each(|_| batch.positions.push([0; 3]));
            deltas.push(delta);
        }
        Ok((batch, deltas))
    }

    /// Several samples in one row, one after another; attention and positions stay inside each.
    ///
    /// # Errors
    /// [`PositionError`] when image tokens and grids of a sample do not agree.
    pub fn packed(
        samples: &[Vec<u32>],
        grids: &[Vec<[usize; 3]>],
        image_tokens: impl Into<ImageTokens>,
    ) -> Result<Self, PositionError> {
        let ImageTokens {
            image_token_id,
            merge,
        } = image_tokens.into();
        let mut positions = Positions::default();
        let mut segments = Vec::new();
        for (index, (ids, grids)) in samples.iter().zip(grids).enumerate() {
            positions.extend(&rope_index(ids, grids, image_token_id, merge)?.0);
            segments.extend(std::iter::repeat_n(index as i32, ids.len()));
        }
        Ok(Self {
            input_ids: vec![samples.concat()],
            segments: vec![segments],
            positions,
            image_token_id,
        })
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.input_ids.len()
    }

    /// Tokens in a row.
    pub fn seq(&self) -> usize {
        self.input_ids.first().map_or(0, Vec::len)
    }

    /// The tokens in the columns `range` of every row.
    pub fn columns(&self, range: std::ops::Range<usize>) -> Self {
        let mut positions = Positions::default();
        for row in 0..self.batch() {
            let start = row * self.seq();
            let tokens = start + range.start..start + range.end;
            positions.extend(&self.positions.slice(tokens));
        }
        Self {
            input_ids: cut(&self.input_ids, &range),
            segments: cut(&self.segments, &range),
            positions,
            image_token_id: self.image_token_id,
        }
    }

    /// For each token the row of `[one zero row; image features]` that belongs to it.
    pub fn image_rows(&self) -> Vec<i32> {
        let mut next = 0;
        self.input_ids
            .iter()
            .flatten()
            .map(|id| {
                if *id == self.image_token_id {
                    next += 1;
                    next
                } else {
                    0
                }
            })
            .collect()
    }
}

/// The columns `range` of some rows.
fn cut<T: Clone>(rows: &[Vec<T>], range: &std::ops::Range<usize>) -> Vec<Vec<T>> {
    let cut = |row: &Vec<T>| row[range.clone()].to_vec();
    rows.iter().map(cut).collect()
}
