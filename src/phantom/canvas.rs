//! The drawing surface: soft shapes, strokes, blur, and the way from body to pixels.
//!
//! Only exactly rounded `f32` operations are used, so that an image has the same bytes everywhere.

use super::draws::Draws;

/// Width and height of every phantom, in pixels.
pub const PHANTOM_SIZE: u32 = 128;
/// [`PHANTOM_SIZE`] as a length.
pub(super) const SIZE: usize = PHANTOM_SIZE as usize;
/// Body units to pixels.
pub(super) const PIXELS_PER_UNIT: f32 = SIZE as f32 / 2.0;

/// Hermite step from 0 at `low` to 1 at `high`.
#[inline]
pub(super) fn smoothstep(low: f32, high: f32, x: f32) -> f32 {
    // A product: with constant edges the quotient is worked out at compile time.
    let t = ((x - low) * (1.0 / (high - low))).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// What is left of `x`, above -64, over the whole number below it.
pub(super) fn fraction(x: f32) -> f32 {
    // `floor` is a slow call on processors without an instruction for it.
    let shifted = x + 64.0;
    shifted - (shifted as i32) as f32
}

/// `from` where `share` is 0, `to` where it is 1.
#[inline]
pub(super) fn mix(from: f32, to: f32, share: f32) -> f32 {
    from + (to - from) * share
}

/// 1 well inside (`depth` > 0), 0 well outside, over an edge of `softness` on each side.
#[inline]
pub(super) fn inside(depth: f32, softness: f32) -> f32 {
    smoothstep(-softness, softness, depth)
}

/// Distance to the ellipse with half axes `a`, `b`, to first order; negative inside.
#[inline]
pub(super) fn ellipse_distance(dx: f32, dy: f32, a: f32, b: f32) -> f32 {
    let (over_a, over_b) = (1.0 / a, 1.0 / b);
    let (p, q) = (dx * over_a, dy * over_b);
    let square = p * p + q * q;
    let (u, v) = (p * over_a, q * over_b);
    let slope = u * u + v * v;
    if slope < 1e-8 {
        return -a.min(b);
    }
    (square - square.sqrt()) / slope.sqrt()
}

/// `(sin, cos)` for angles below a quarter radian, by their series.
fn small_sin_cos(angle: f32) -> (f32, f32) {
    let square = angle * angle;
    (
        angle * (1.0 - square / 6.0 * (1.0 - square / 20.0)),
        1.0 - square / 2.0 * (1.0 - square / 12.0),
    )
}

/// Position of the patient before the detector: small shift, rotation and magnification.
pub(super) struct Pose {
    sin: f32,
    cos: f32,
    scale: f32,
    shift: (f32, f32),
}

impl Pose {
    /// Draws a pose.
    pub(super) fn sample(draws: &mut Draws) -> Self {
        let (sin, cos) = small_sin_cos(draws.between(-0.06, 0.06));
        Self {
            sin,
            cos,
            scale: draws.between(0.93, 1.05),
            shift: (draws.between(-0.06, 0.06), draws.between(-0.05, 0.05)),
        }
    }

    /// Pixel position to body coordinates.
    pub(super) fn to_body(&self, column: f32, row: f32) -> (f32, f32) {
        let x = (column / PIXELS_PER_UNIT - 1.0 - self.shift.0) / self.scale;
        let y = (row / PIXELS_PER_UNIT - 1.0 - self.shift.1) / self.scale;
        (self.cos * x + self.sin * y, self.cos * y - self.sin * x)
    }

    /// Body coordinates to pixel position.
    fn to_pixel(&self, (x, y): (f32, f32)) -> (f32, f32) {
        let column = (self.cos * x - self.sin * y) * self.scale + self.shift.0;
        let row = (self.sin * x + self.cos * y) * self.scale + self.shift.1;
        (
            (column + 1.0) * PIXELS_PER_UNIT,
            (row + 1.0) * PIXELS_PER_UNIT,
        )
    }
}

/// Point `i` of 8 on the curve from `from` to `to` drawn towards `over`.
pub(super) fn bezier(from: (f32, f32), over: (f32, f32), to: (f32, f32), i: u8) -> (f32, f32) {
    let t = f32::from(i) / 8.0;
    let blend = |a: f32, b: f32, c: f32| mix(mix(a, b, t), mix(b, c, t), t);
    (blend(from.0, over.0, to.0), blend(from.1, over.1, to.1))
}

/// A straight line with round ends, in pixels.
pub(super) struct Stroke {
    from: (f32, f32),
    to: (f32, f32),
    radius: f32,
}

impl Stroke {
    /// `from` and `to` in body coordinates, `radius` in pixels.
    pub(super) fn new(pose: &Pose, from: (f32, f32), to: (f32, f32), radius: f32) -> Self {
        Self {
            from: pose.to_pixel(from),
            to: pose.to_pixel(to),
            radius,
        }
    }

    /// Replaces each value under the stroke by `paint(value, cover, pixel)`.
    pub(super) fn paint(&self, pixels: &mut [f32], paint: impl Fn(f32, f32, usize) -> f32) {
        let reach = self.radius + 1.0;
        let span = |a: f32, b: f32| {
            let low = (a.min(b) - reach).clamp(0.0, SIZE as f32) as usize;
            let high = (a.max(b) + reach + 1.0).clamp(0.0, SIZE as f32) as usize;
            low..high
        };
        let (dx, dy) = (self.to.0 - self.from.0, self.to.1 - self.from.1);
        let length = (dx * dx + dy * dy).max(1e-6);
        for row in span(self.from.1, self.to.1) {
            for column in span(self.from.0, self.to.0) {
                let px = column as f32 + 0.5 - self.from.0;
                let py = row as f32 + 0.5 - self.from.1;
                let along = ((px * dx + py * dy) / length).clamp(0.0, 1.0);
                let (ex, ey) = (px - along * dx, py - along * dy);
                let distance = (ex * ex + ey * ey).sqrt();
                let cover = inside(self.radius - distance, 0.8);
                let pixel = row * SIZE + column;
                pixels[pixel] = paint(pixels[pixel], cover, pixel);
            }
        }
    }
}

/// Binomial 3×3 blur, edges repeated.
pub(super) fn blur(pixels: &[f32]) -> Vec<f32> {
    let weigh = |before: f32, here: f32, after: f32| 0.25 * before + 0.5 * here + 0.25 * after;
    let mut across = Vec::with_capacity(pixels.len());
    for row in pixels.chunks_exact(SIZE) {
        across.extend((0..SIZE).map(|column| {
            let after = row[(column + 1).min(SIZE - 1)];
            weigh(row[column.saturating_sub(1)], row[column], after)
        }));
    }
    let mut down = Vec::with_capacity(pixels.len());
    for row in 0..SIZE {
        let line = |row: usize| &across[row * SIZE..(row + 1) * SIZE];
        let (above, here, below) = (
            line(row.saturating_sub(1)),
            line(row),
            line((row + 1).min(SIZE - 1)),
        );
        down.extend((0..SIZE).map(|column| weigh(above[column], here[column], below[column])));
    }
    down
}
