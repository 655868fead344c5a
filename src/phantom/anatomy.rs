//! Draws the film: a frontal chest in body coordinates, findings over it, then exposure and noise.
//!
//! Body coordinates run from -1 to 1 over the undistorted film, `x` to the image's right (the
//! patient's left), `y` down. Brightness runs from 0 (air) to 1 (metal). Only exactly rounded
//! `f32` operations are used; see the canvas.

use std::collections::BTreeSet;

use image::{GrayImage, Luma};

use super::{
    Finding, Side,
    canvas::{
        PIXELS_PER_UNIT, Pose, SIZE, Stroke, bezier, blur, ellipse_distance, fraction, inside, mix,
        smoothstep,
    },
    draws::Draws,
    lesion::Lesion,
};

/// Width and height of every phantom, in pixels.
pub const PHANTOM_SIZE: u32 = 128;

/// Draws one film with `findings`.
pub(super) fn draw_chest(findings: &BTreeSet<Finding>, draws: &mut Draws) -> GrayImage {
    let chest = Chest::sample(findings.contains(&Finding::Cardiomegaly), draws);
    let pose = Pose::sample(draws);
    let lesions: Vec<Lesion> = findings
        .iter()
        .filter_map(|&finding| Lesion::sample(finding, &chest, draws))
        .collect();

    let mut film = vec![0.0; SIZE * SIZE];
    let mut lung_share = vec![0.0; SIZE * SIZE];
    for row in 0..SIZE {
        for column in 0..SIZE {
            let (x, y) = pose.to_body(column as f32 + 0.5, row as f32 + 0.5);
            let (value, share) = chest.brightness(x, y, &lesions);
            film[row * SIZE + column] = value;
            lung_share[row * SIZE + column] = share;
        }
    }
    draw_vessels(&mut film, &lung_share, &chest, &pose, draws);
    draw_clavicles(&mut film, &chest, &pose, draws);
    for lesion in &lesions {
        if let Lesion::Pacemaker { lead, .. } = lesion {
            for pair in lead.windows(2) {
                let stroke = Stroke::new(&pose, pair[0], pair[1], 1.1);
                stroke.paint(&mut film, |value, cover, _| mix(value, 0.97, cover));
            }
        }
    }
    expose(film, draws)
}

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
    mediastinum: f32,
    knob_y: f32,
    rib_spacing: f32,
    rib_phase: f32,
    rib_slope: f32,
    soft_tissue: f32,
    lung: f32,
    bone: f32,
    heart_value: f32,
    stomach: Option<(f32, f32)>,
}

/// Sine and cosine of the heart's tilt, about 24 degrees: its tip points to the patient's left.
const HEART_TILT: (f32, f32) = (0.4067, 0.9135);

impl Chest {
    fn sample(enlarged_heart: bool, draws: &mut Draws) -> Self {
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
    fn diaphragm(&self, x: f32) -> f32 {
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
    fn heart_distance(&self, x: f32, y: f32) -> f32 {
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

    /// Brightness at a point, and how much free lung is there (0 to 1).
    fn brightness(&self, x: f32, y: f32, lesions: &[Lesion]) -> (f32, f32) {
        let beside = x.abs();
        let mut value = 0.03;

        // Body: neck, sloping shoulders, straight sides.
        let slope = ((beside - 0.22) / 0.68).max(0.0);
        let shoulder = y - (-0.93 + 0.42 * slope * slope);
        let torso = (0.93 - beside).min(if beside < 0.22 { 1.0 } else { shoulder });
        let body = inside(torso, 0.035);
        if body == 0.0 {
            return (value, 0.0);
        }
        value = mix(value, self.soft_tissue - 0.06 * (beside - 0.5), body);
        // The abdomen is thicker than the chest wall.
        value += 0.12 * body * smoothstep(0.35, 0.9, y);

        let cage = -ellipse_distance(x, y - self.centre_y, self.half_width, self.half_height);
        let below = self.diaphragm(x) - y;
        let lung = inside(cage, 0.022) * inside(below, 0.022);
        value = mix(value, self.lung, lung);
        let abdomen = inside(cage + 0.04, 0.05) * inside(-below, 0.03);
        value = mix(value, 0.64, 0.7 * abdomen);
        if let Some((stomach_x, stomach_y)) = self.stomach
            && abdomen > 0.0
        {
            let bubble = -ellipse_distance(x - stomach_x, y - stomach_y, 0.13, 0.06);
            value = mix(value, 0.36, inside(bubble, 0.03) * abdomen);
        }

        for lesion in lesions {
            value = lesion.under_ribs(value, x, y, lung, self);
        }
        // The thick abdomen hides most of them.
        value += self.rib(x, y) * inside(cage + 0.05, 0.03) * (1.0 - 0.6 * abdomen);

        // Mediastinum with the aortic knob on the patient's left, spine, windpipe.
        let widening = 0.08 * smoothstep(-0.15, 0.3, y);
        let band = inside(self.mediastinum + widening - beside, 0.035);
        let knob = inside(
            -ellipse_distance(x - 0.09, y - self.knob_y, 0.105, 0.11),
            0.03,
        );
        let heart = inside(-self.heart_distance(x, y), 0.028);
        let middle = band.max(knob) * smoothstep(-1.2, -0.75, y);
        value = mix(value, self.heart_value - 0.06, middle * 0.9);
        value = mix(value, self.heart_value, heart.min(inside(cage, 0.03)));
        value += 0.035 * inside(0.07 - beside, 0.04) * body;
        let windpipe = inside(0.045 - beside, 0.03) * smoothstep(-0.2, -0.32, y);
        value -= 0.11 * windpipe * body;

        let free_lung = lung * (1.0 - middle) * (1.0 - heart);
        for lesion in lesions {
            value = lesion.over_ribs(value, (x, y), cage, free_lung, self);
        }
        (value, free_lung)
    }

    /// What the ribs add at a point: soft parallel arcs, lower towards the side.
    fn rib(&self, x: f32, y: f32) -> f32 {
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

/// Faint branches from each hilum into the lung.
fn draw_vessels(film: &mut [f32], lung: &[f32], chest: &Chest, pose: &Pose, draws: &mut Draws) {
    for side in [-1.0, 1.0] {
        let root = (
            side * (chest.mediastinum + 0.06),
            draws.between(-0.06, 0.04),
        );
        for (radius, strength) in [(5.5, 0.05), (3.5, 0.06)] {
            let end = (root.0 + side * 0.02, root.1 + 0.08);
            Stroke::new(pose, root, end, radius).paint(film, |value, cover, pixel| {
                value + strength * cover * lung[pixel]
            });
        }
        for branch in 0..7 {
            // From nearly straight up to nearly straight down.
            let rise = (branch as f32 - 3.0) / 3.0 + draws.between(-0.12, 0.12);
            let reach = draws.between(0.22, 0.4);
            let out = (1.05 - 0.7 * rise.abs()).max(0.15);
            let knee = (
                root.0 + side * 0.5 * reach * out,
                root.1 + 0.55 * reach * rise + draws.between(-0.04, 0.04),
            );
            let tip = (root.0 + side * reach * out, root.1 + 1.2 * reach * rise);
            let strength = draws.between(0.04, 0.075);
            for (from, to, radius) in [(root, knee, 1.3), (knee, tip, 0.8)] {
                Stroke::new(pose, from, to, radius).paint(film, |value, cover, pixel| {
                    value + strength * cover * lung[pixel]
                });
            }
        }
    }
}

/// Two bars over the lung tips.
fn draw_clavicles(film: &mut [f32], chest: &Chest, pose: &Pose, draws: &mut Draws) {
    let height = draws.between(-0.60, -0.54);
    let strength = chest.bone + 0.05;
    for side in [-1.0, 1.0] {
        let lift = draws.between(0.06, 0.14);
        let inner = (side * 0.10, height + 0.03);
        let outer = (side * 0.70, height - lift);
        let over = (side * 0.38, height - 0.02);
        let radius = draws.between(2.0, 2.6);
        for i in 0..8 {
            let (from, to) = (
                bezier(inner, over, outer, i),
                bezier(inner, over, outer, i + 1),
            );
            Stroke::new(pose, from, to, radius).paint(film, |value, cover, _| {
                // Bright tissue saturates, so that the joints of the bar do not add up.
                value + (strength * cover).min((0.62 - value).max(0.0)) * 0.7
            });
        }
    }
}

/// Blur, exposure and grain; to bytes.
fn expose(mut film: Vec<f32>, draws: &mut Draws) -> GrayImage {
    for _ in 0..1 + draws.below(2) {
        film = blur(&film);
    }
    let gain = draws.between(0.90, 1.06);
    let offset = draws.between(-0.02, 0.04);
    let toe = draws.between(-0.15, 0.15);
    let tilt = (draws.between(-0.03, 0.03), draws.between(-0.03, 0.03));
    let grain = draws.between(0.010, 0.022);
    let mut image = GrayImage::new(PHANTOM_SIZE, PHANTOM_SIZE);
    for (pixel, value) in film.into_iter().enumerate() {
        let (row, column) = (pixel / SIZE, pixel % SIZE);
        let x = column as f32 / PIXELS_PER_UNIT - 1.0;
        let y = row as f32 / PIXELS_PER_UNIT - 1.0;
        let value = value + tilt.0 * x + tilt.1 * y;
        // Bends the curve in the middle and leaves black and white in place.
        let value = value + toe * value * (1.0 - value);
        let value = (value * gain + offset + grain * draws.bell()).clamp(0.0, 1.0);
        // 64 grey levels are as good to read, and the files are half the size.
        let level = ((value * 63.0 + 0.5) as u8).min(63) * 4;
        image.put_pixel(column as u32, row as u32, Luma([level]));
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phantom::{Study, Zone};

    /// Mean grey level of the columns `from..to` below the middle of the film.
    fn lower_mean(finding: Option<Finding>, columns: std::ops::Range<u32>) -> f64 {
        let mut sum = 0.0;
        for index in 0..10 {
            let image = Study::with_findings(1, index, finding.into_iter().collect()).image;
            for row in 75..90 {
                for column in columns.clone() {
                    sum += f64::from(image.get_pixel(column, row)[0]);
                }
            }
        }
        sum / (10 * 15 * columns.len()) as f64
    }

    #[test]
    fn the_left_of_the_patient_is_on_the_right_of_the_image() {
        let effusion = Some(Finding::PleuralEffusion(Side::Left));
        assert!(lower_mean(effusion, 90..105) > lower_mean(None, 90..105) + 20.0);
        assert!((lower_mean(effusion, 23..38) - lower_mean(None, 23..38)).abs() < 15.0);
    }

    #[test]
    fn heart_sizes_are_apart() {
        for index in 0..200 {
            for (enlarged, range) in [(false, 0.30..0.46), (true, 0.55..0.70)] {
                let mut draws = Draws::new(2, index, crate::phantom::draws::Purpose::Drawing);
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

    #[test]
    fn the_drawing_has_the_same_bytes_everywhere() {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for finding in [Finding::Nodule(Side::Left, Zone::Upper), Finding::Pacemaker] {
            for byte in Study::with_findings(1, 2, [finding].into()).image.as_raw() {
                // FNV-1a.
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
        assert_eq!(hash, 0x5ae3_6662_0b23_5629, "{hash:#x}");
    }
}
