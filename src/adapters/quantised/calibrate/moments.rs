//! Second moments of a layer's inputs, and the Cholesky factor of them.

use rayon::prelude::*;

/// Added to the diagonal, as a share of its mean: keeps directions without inputs from moving freely.
const DAMPING: f32 = 0.01;

/// Rows of the factor that are eliminated before the rest is updated.
const PANEL: usize = 48;

/// Sum of products; eight sums side by side, which the compiler makes vectors of.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8
        .remainder()
        .iter()
        .zip(b8.remainder())
        .map(|(a, b)| a * b)
        .sum();
    let mut sums = [0.0f32; 8];
    for (a, b) in a8.zip(b8) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// `y += factor · x`.
pub(super) fn add_scaled(y: &mut [f32], factor: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// Second moments of a layer's inputs, and what is derived from them.
pub struct Moments {
    pub(super) width: usize,
    /// `[width, width]`, the mean of `x xᵀ`.
    pub(super) moments: Vec<f32>,
    pub(super) damping: f32,
    /// Inputs by their moments, the smallest first; columns are rounded from the last to the first.
    pub(super) order: Vec<usize>,
    /// `U` of `UᵀU`, the damped moments in that order; row-major, its lower half unused.
    pub(super) factor: Vec<f32>,
}

impl Moments {
    /// Of the means of `x xᵀ` `[width, width]`, row-major.
    ///
    /// # Panics
    /// If the length is not `width²`.
    pub fn new(moments: Vec<f32>, width: usize) -> Self {
        assert_eq!(moments.len(), width * width, "second moments");
        let of = |input: usize| moments[input * width + input];
        let mean = (0..width).map(|input| f64::from(of(input))).sum::<f64>() / width as f64;
        // Where there was no input at all, everything is as good as anything.
        let mean = if mean > 0.0 { mean as f32 } else { 1.0 };
        let mut order: Vec<usize> = (0..width).collect();
        order.sort_by(|a, b| of(*a).total_cmp(&of(*b)));
        let mut damping = DAMPING * mean;
        let factor = loop {
            if let Some(factor) = cholesky(&moments, &order, damping) {
                break factor;
            }
            // Sums in f32 can leave a direction slightly negative.
            damping *= 4.0;
        };
        Self {
            width,
            moments,
            damping,
            order,
            factor,
        }
    }

    pub(super) fn row(&self, input: usize) -> &[f32] {
        &self.moments[input * self.width..][..self.width]
    }

    /// `eᵀ H e`.
    pub fn error(&self, change: &[f32]) -> f64 {
        (0..self.width)
            .filter(|input| change[*input] != 0.0)
            .map(|input| f64::from(change[input]) * f64::from(dot(self.row(input), change)))
            .sum::<f64>()
            .max(0.0)
    }
}

/// `U` with `UᵀU = P H Pᵀ + damping`, `P` the order; `None` if that is not positive.
fn cholesky(moments: &[f32], order: &[usize], damping: f32) -> Option<Vec<f32>> {
    let width = order.len();
    let mut factor = vec![0.0; width * width];
    factor
        .par_chunks_mut(width)
        .enumerate()
        .for_each(|(row, out)| {
            let from = &moments[order[row] * width..][..width];
            for (column, out) in out.iter_mut().enumerate().skip(row) {
                *out = from[order[column]];
            }
            out[row] += damping;
        });
    for start in (0..width).step_by(PANEL) {
        let end = width.min(start + PANEL);
        let (above, below) = factor.split_at_mut(end * width);
        let panel = &mut above[start * width..];
        for row in start..end {
            let (done, current) = panel.split_at_mut((row - start) * width);
            let current = &mut current[..width];
            for before in done.chunks(width) {
                add_scaled(&mut current[row..], -before[row], &before[row..]);
            }
            let diagonal = current[row];
            if !(diagonal > 0.0 && diagonal.is_finite()) {
                return None;
            }
            let inverse = 1.0 / diagonal.sqrt();
            for value in &mut current[row..] {
                *value *= inverse;
            }
        }
        let panel = &above[start * width..];
        below
            .par_chunks_mut(width)
            .enumerate()
            .for_each(|(at, current)| {
                let row = end + at;
                for before in panel.chunks(width) {
                    add_scaled(&mut current[row..], -before[row], &before[row..]);
                }
            });
    }
    Some(factor)
}
