//! The longest common subsequence of two texts: its length, the tokens of one, and a fast form for
//! one against many.

/// Length of the longest common subsequence, by the plain table.
#[must_use]
pub fn length<T: Eq>(left: &[T], right: &[T]) -> usize {
    let mut row = vec![0_usize; right.len() + 1];
    for token in left {
        let mut diagonal = 0;
        for (at, other) in right.iter().enumerate() {
            let above = row[at + 1];
            row[at + 1] = if token == other {
                diagonal + 1
            } else {
                above.max(row[at])
            };
            diagonal = above;
        }
    }
    row[right.len()]
}

/// The tokens of a longest common subsequence, last first.
///
/// Of several it gives the one that the `rouge` package walks back to, whose score depends on it.
pub(super) fn tokens<'a, T: Eq>(left: &'a [T], right: &[T]) -> Vec<&'a T> {
    let width = right.len() + 1;
    let mut table = vec![0_usize; (left.len() + 1) * width];
    for (i, token) in left.iter().enumerate() {
        for (j, other) in right.iter().enumerate() {
            table[(i + 1) * width + j + 1] = if token == other {
                table[i * width + j] + 1
            } else {
                table[i * width + j + 1].max(table[(i + 1) * width + j])
            };
        }
    }
    let (mut i, mut j) = (left.len(), right.len());
    let mut found = Vec::with_capacity(table[i * width + j]);
    while i > 0 && j > 0 {
        if left[i - 1] == right[j - 1] {
            found.push(&left[i - 1]);
            i -= 1;
            j -= 1;
        } else if table[(i - 1) * width + j] > table[i * width + j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
    found
}

/// One text prepared for comparison with many: 64 cells of the table in one step.
///
/// Source: H. Hyyrö, Bit-parallel LCS-length computation revisited, AWOCA 2004.
#[derive(Debug)]
pub struct Pattern {
    blocks: usize,
    /// By token, then block: where the text has the token.
    positions: Vec<u64>,
}

impl Pattern {
    /// Prepares `text`, whose token numbers are below `vocabulary`.
    ///
    /// # Panics
    /// If a number is not below `vocabulary`.
    #[must_use]
    pub fn new(text: &[u32], vocabulary: usize) -> Self {
        let blocks = text.len().div_ceil(64);
        let mut positions = vec![0; vocabulary * blocks];
        for (at, &token) in text.iter().enumerate() {
            positions[token as usize * blocks + at / 64] |= 1 << (at % 64);
        }
        Self { blocks, positions }
    }

    /// Length of the longest common subsequence with `other`, numbers of the same vocabulary.
    ///
    /// # Panics
    /// If a number is not below the vocabulary's size.
    #[must_use]
    pub fn length_with(&self, other: &[u32]) -> usize {
        let mut state = vec![u64::MAX; self.blocks];
        for &token in other {
            let from = token as usize * self.blocks;
            let mut carry = false;
            for (cell, &mask) in state
                .iter_mut()
                .zip(&self.positions[from..from + self.blocks])
            {
                let (sum, over) = cell.overflowing_add(*cell & mask);
                let (sum, again) = sum.overflowing_add(u64::from(carry));
                carry = over || again;
                *cell = sum | (*cell & !mask);
            }
        }
        // Bits past the end of the text stay set: no token has a position there.
        state.iter().map(|cell| cell.count_zeros() as usize).sum()
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn lengths_by_hand() {
        assert_eq!(length(&[1, 2, 3, 4], &[2, 4, 3]), 2);
        assert_eq!(length::<u32>(&[], &[1]), 0);
        assert_eq!(tokens(&[1, 2, 3, 4], &[2, 4, 3]).len(), 2);
    }

    #[test]
    fn the_fast_form_equals_the_table() {
        let mut rng = SmallRng::seed_from_u64(3);
        for _ in 0..300 {
            let mut text = || -> Vec<u32> {
                let size = rng.random_range(0..200);
                (0..size).map(|_| rng.random_range(0..5)).collect()
            };
            let (left, right) = (text(), text());
            assert_eq!(
                Pattern::new(&left, 5).length_with(&right),
                length(&left, &right)
            );
            assert_eq!(tokens(&left, &right).len(), length(&left, &right));
        }
    }
}
