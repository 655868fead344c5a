//! Where patches are in their image, in the order in which the vision tower takes them; on the host, without tensors.

/// For each patch the four rows of the position table around it and their bilinear weights.
#[derive(Debug, Clone, Default)]
pub struct PositionCorners {
    /// Rows of the table, `[n][4]`: top left, top right, bottom left, bottom right.
    pub indices: Vec<[u32; 4]>,
    /// Weights, `[n][4]`.
    pub weights: Vec<[f32; 4]>,
}

impl PositionCorners {
    /// Appends the patches of one image in merge-block order; corners of the table and of the image
    /// coincide.
    ///
    /// Source: `Qwen3VLVisionModel.fast_pos_embed_interpolate`, transformers.
    pub fn extend(&mut self, [t, h, w]: [usize; 3], side: usize, merge: usize) {
        let rows = linspace(side, h);
        let columns = linspace(side, w);
        let start = self.indices.len();
        for (row, column) in merge_block_order(h, w, merge) {
            let (y, x) = (rows[row], columns[column]);
            let (top, left) = (y as usize, x as usize);
            let bottom = (top + 1).min(side - 1);
            let right = (left + 1).min(side - 1);
            let (dy, dx) = (y - top as f32, x - left as f32);
            let at = |row, column| (row * side + column) as u32;
            self.indices.push([
                at(top, left),
                at(top, right),
                at(bottom, left),
                at(bottom, right),
            ]);
            self.weights.push([
                (1.0 - dy) * (1.0 - dx),
                (1.0 - dy) * dx,
                dy * (1.0 - dx),
                dy * dx,
            ]);
        }
        for _ in 1..t {
            self.indices.extend_from_within(start..start + h * w);
            self.weights.extend_from_within(start..start + h * w);
        }
    }
}

/// `steps` evenly spaced values from 0 to `side - 1`, both included, as `torch.linspace` in f32:
/// from the left in the first half, from the right in the second.
fn linspace(side: usize, steps: usize) -> Vec<f32> {
    let end = (side - 1) as f32;
    if steps == 1 {
        return vec![0.0];
    }
    let step = end / (steps - 1) as f32;
    (0..steps)
        .map(|i| {
            if i < steps / 2 {
                step * i as f32
            } else {
                end - step * (steps - 1 - i) as f32
            }
        })
        .collect()
}

/// `(row, column)` of the patches of one frame, merged square after merged square.
fn merge_block_order(h: usize, w: usize, merge: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..h / merge).flat_map(move |block_row| {
        (0..w / merge).flat_map(move |block_column| {
            (0..merge).flat_map(move |row| {
                (0..merge)
                    .map(move |column| (block_row * merge + row, block_column * merge + column))
            })
        })
    })
}

/// `[row, column]` of every patch of an image in merge-block order, frame after frame.
pub fn patch_positions([t, h, w]: [usize; 3], merge: usize) -> Vec<[u32; 2]> {
    let frame: Vec<[u32; 2]> = merge_block_order(h, w, merge)
        .map(|(row, column)| [row as u32, column as u32])
        .collect();
    frame.repeat(t)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_of_one_square_are_contiguous() {
        assert_eq!(
            patch_positions([1, 2, 4], 2),
            [
                [0, 0],
                [0, 1],
                [1, 0],
                [1, 1],
                [0, 2],
                [0, 3],
                [1, 2],
                [1, 3]
            ]
        );
    }

    #[test]
    fn position_corners_touch_the_corners_of_the_table() {
        let mut corners = PositionCorners::default();
        corners.extend([1, 4, 4], 48, 2);
        assert_eq!(corners.indices[0][0], 0);
        assert_eq!(corners.weights[0], [1.0, 0.0, 0.0, 0.0]);
        assert_eq!(corners.indices[15][0], 48 * 48 - 1);
        for weights in &corners.weights {
            assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
    }
}
