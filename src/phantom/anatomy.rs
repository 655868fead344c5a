//! The chest of one patient in body coordinates: its shape, and how bright its tissues are.
//!
//! Body coordinates run from -1 to 1 over the undistorted image, `x` to the image's right (the
//! patient's left), `y` down. Brightness runs from 0 (air) to 1 (metal). Only exactly rounded
//! `f32` operations are used; see [`super::canvas`].

use super::{
    canvas::{ellipse_distance, fraction, inside},
    draws::Draws,
    finding::Side,
};

/// -1 on the patient's right (image left), 1 on the patient's left.
pub(super) fn sign(side: Side) -> f32 {
    match side {
        Side::Left => 1.0,
        Side::Right => -1.0,
    }
}

/// Shape and tissue brightness of one patient.
pub(super) struct Chest {
    /// Half width of the rib cage inside, and the ellipse it belongs to.
    pub(super) half_width: f32,
    pub(super) centre_y: f32,
    pub(super) half_height: f32,
    /// Height of the costophrenic angles, by side (left, right), and of the domes above them.
    pub(super) angle_y: [f32; 2],
    pub(super) dome: f32,
    /// Heart: centre, half axes of the tilted ellipse.
    pub(super) heart: (f32, f32),
    heart_axes: (f32, f32),
    pub(super) mediastinum: f32,
    pub(super) knob_y: f32,
    rib_spacing: f32,
    rib_phase: f32,
    rib_slope: f32,
    pub(super) soft_tissue: f32,
    pub(super) lung: f32,
    pub(super) bone: f32,
    pub(super) heart_value: f32,
    pub(super) stomach: Option<(f32, f32)>,
}

/// Sine and cosine of the heart's tilt, about 24 degrees: its tip points to the patient's left.
const HEART_TILT: (f32, f32) = (0.4067, 0.9135);

impl Chest {
    /// Chooses the shape of one patient.
    pub(super) fn sample(enlarged_heart: bool, draws: &mut Draws) -> Self {
        let half_width = draws.between(0.68, 0.77);
        let ratio = if enlarged_heart {
            draws.between(0.58, 0.68)
        } else {
            draws.between(0.37, 0.45)
        };
        let left_angle = draws.between(0.62, 0.72);
        let angle_y = [left_angle, left_angle - draws.between(0.0, 0.05)];
        let dome = draws.between(0.13, 0.19);
        // The heart's half width is the extent of the tilted ellipse along x.
        let half = ratio * half_width;
        let flat = draws.between(0.74, 0.84);
        let (sin, cos) = HEART_TILT;
        let long = half / (cos * cos + flat * flat * sin * sin).sqrt();
        let short = long * flat;
        Self {
            half_width,
            centre_y: draws.between(0.31, 0.37),
            half_height: draws.between(1.08, 1.14),
            angle_y,
            dome,
            heart: (
                half * draws.between(0.30, 0.38),
                left_angle - dome - short * draws.between(0.42, 0.55),
            ),
            heart_axes: (long, short),
            mediastinum: draws.between(0.105, 0.135),
            knob_y: draws.between(-0.36, -0.28),
            rib_spacing: draws.between(0.145, 0.17),
            rib_phase: draws.unit(),
            rib_slope: draws.between(0.24, 0.34),
            soft_tissue: draws.between(0.44, 0.52),
            lung: draws.between(0.21, 0.27),
            bone: draws.between(0.05, 0.08),
            heart_value: draws.between(0.66, 0.72),
            stomach: draws
                .chance(0.5)
                .then(|| (draws.between(0.28, 0.42), draws.between(0.72, 0.78))),
        }
    }

    /// Height of the diaphragm at `x`.
    pub(super) fn diaphragm(&self, x: f32) -> f32 {
        let angle_y = self.angle_y[usize::from(x < 0.0)];
        let middle = 0.46 * self.half_width;
        let t = (x.abs() - middle) / (self.half_width - middle);
        angle_y - self.dome * (1.0 - t * t).max(-0.3)
    }

    /// Inner side of the rib cage at height `y`, as distance from the midline.
    pub(super) fn wall(&self, y: f32) -> f32 {
        let t = (y - self.centre_y) / self.half_height;
        self.half_width * (1.0 - t * t).max(0.0).sqrt()
    }

    /// Distance to the heart's outline, negative inside.
    pub(super) fn heart_distance(&self, x: f32, y: f32) -> f32 {
        let (sin, cos) = HEART_TILT;
        let (dx, dy) = (x - self.heart.0, y - self.heart.1);
        let (a, b) = self.heart_axes;
        ellipse_distance(cos * dx + sin * dy, cos * dy - sin * dx, a, b)
    }

    /// Where the free lung begins at height `y`, as distance from the midline on `side`.
    pub(super) fn inner_edge(&self, side: Side, y: f32) -> f32 {
        let mut edge = self.mediastinum;
        while edge < self.half_width && self.heart_distance(sign(side) * edge, y) < 0.0 {
            edge += 0.02;
        }
        edge
    }

    /// What the ribs add at a point: soft parallel arcs, lower towards the side.
    pub(super) fn rib(&self, x: f32, y: f32) -> f32 {
        let side = x / self.half_width;
        let arc = y - self.rib_slope * side * side;
        let place = arc / self.rib_spacing + self.rib_phase;
        let off = (fraction(place) - 0.5).abs() * self.rib_spacing;
        // The front ends run the other way and are fainter.
        let front = (y + 0.5 * self.rib_slope * side.abs()) / (1.25 * self.rib_spacing);
        let front_off = (fraction(front) - 0.5).abs() * self.rib_spacing;
        let back = self.bone * inside(0.028 - off, 0.016);
        back + 0.35 * self.bone * inside(0.03 - front_off, 0.02)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phantom::draws::Purpose;

    #[test]
    fn heart_sizes_are_apart() {
        for index in 0..200 {
            for (enlarged, range) in [(false, 0.30..0.46), (true, 0.55..0.70)] {
                let mut draws = Draws::new(2, index, Purpose::Drawing);
                let chest = Chest::sample(enlarged, &mut draws);
                let step = |i: i32| i as f32 * 0.01;
                let covered = (-100..100)
                    .filter(|&i| (-100..100).any(|j| chest.heart_distance(step(i), step(j)) < 0.0))
                    .count();
                let ratio = covered as f32 * 0.01 / (2.0 * chest.half_width);
                assert!(range.contains(&ratio), "{ratio} is not in {range:?}");
            }
        }
    }
}
