//! Draws the image: the chest, findings over it, then exposure and noise.
//!
//! Only exactly rounded `f32` operations are used; see [`super::canvas`].

use std::collections::BTreeSet;

use image::{GrayImage, Luma};

use super::{
    anatomy::Chest,
    canvas::{
        PHANTOM_SIZE, PIXELS_PER_UNIT, Pose, SIZE, Stroke, bezier, blur, ellipse_distance, inside,
        mix, smoothstep,
    },
    draws::Draws,
    finding::Finding,
    lesion::Lesion,
};

/// Draws one radiograph with `findings`.
pub(super) fn draw_chest(findings: &BTreeSet<Finding>, draws: &mut Draws) -> GrayImage {
    let chest = Chest::sample(findings.contains(&Finding::Cardiomegaly), draws);
    let pose = Pose::sample(draws);
    let lesions: Vec<Lesion> = findings
        .iter()
        .filter_map(|&finding| Lesion::sample(finding, &chest, draws))
        .collect();

    let mut pixels = vec![0.0; SIZE * SIZE];
    let mut lung_share = vec![0.0; SIZE * SIZE];
    for row in 0..SIZE {
        for column in 0..SIZE {
            let (x, y) = pose.to_body(column as f32 + 0.5, row as f32 + 0.5);
            let (value, share) = brightness(&chest, x, y, &lesions);
            pixels[row * SIZE + column] = value;
            lung_share[row * SIZE + column] = share;
        }
    }
    draw_vessels(&mut pixels, &lung_share, &chest, &pose, draws);
    draw_clavicles(&mut pixels, &chest, &pose, draws);
    for lesion in &lesions {
        if let Lesion::Pacemaker { lead, .. } = lesion {
            for pair in lead.windows(2) {
                let stroke = Stroke::new(&pose, pair[0], pair[1], 1.1);
                stroke.paint(&mut pixels, |value, cover, _| mix(value, 0.97, cover));
            }
        }
    }
    expose(pixels, draws)
}

/// Brightness at a point, and how much free lung is there (0 to 1).
fn brightness(chest: &Chest, x: f32, y: f32, lesions: &[Lesion]) -> (f32, f32) {
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
    value = mix(value, chest.soft_tissue - 0.06 * (beside - 0.5), body);
    // The abdomen is thicker than the chest wall.
    value += 0.12 * body * smoothstep(0.35, 0.9, y);

    let cage = -ellipse_distance(x, y - chest.centre_y, chest.half_width, chest.half_height);
    let below = chest.diaphragm(x) - y;
    let lung = inside(cage, 0.022) * inside(below, 0.022);
    value = mix(value, chest.lung, lung);
    let abdomen = inside(cage + 0.04, 0.05) * inside(-below, 0.03);
    value = mix(value, 0.64, 0.7 * abdomen);
    if let Some((stomach_x, stomach_y)) = chest.stomach
        && abdomen > 0.0
    {
        let bubble = -ellipse_distance(x - stomach_x, y - stomach_y, 0.13, 0.06);
        value = mix(value, 0.36, inside(bubble, 0.03) * abdomen);
    }

    for lesion in lesions {
        value = lesion.under_ribs(value, x, y, lung, chest);
    }
    // The thick abdomen hides most of them.
    value += chest.rib(x, y) * inside(cage + 0.05, 0.03) * (1.0 - 0.6 * abdomen);

    // Mediastinum with the aortic knob on the patient's left, spine, windpipe.
    let widening = 0.08 * smoothstep(-0.15, 0.3, y);
    let band = inside(chest.mediastinum + widening - beside, 0.035);
    let knob = inside(
        -ellipse_distance(x - 0.09, y - chest.knob_y, 0.105, 0.11),
        0.03,
    );
    let heart = inside(-chest.heart_distance(x, y), 0.028);
    let middle = band.max(knob) * smoothstep(-1.2, -0.75, y);
    value = mix(value, chest.heart_value - 0.06, middle * 0.9);
    value = mix(value, chest.heart_value, heart.min(inside(cage, 0.03)));
    value += 0.035 * inside(0.07 - beside, 0.04) * body;
    let windpipe = inside(0.045 - beside, 0.03) * smoothstep(-0.2, -0.32, y);
    value -= 0.11 * windpipe * body;

    let free_lung = lung * (1.0 - middle) * (1.0 - heart);
    for lesion in lesions {
        value = lesion.over_ribs(value, (x, y), cage, free_lung, chest);
    }
    (value, free_lung)
}

/// Faint branches from each hilum into the lung.
fn draw_vessels(pixels: &mut [f32], lung: &[f32], chest: &Chest, pose: &Pose, draws: &mut Draws) {
    for side in [-1.0, 1.0] {
        let root = (
            side * (chest.mediastinum + 0.06),
            draws.between(-0.06, 0.04),
        );
        for (radius, strength) in [(5.5, 0.05), (3.5, 0.06)] {
            let end = (root.0 + side * 0.02, root.1 + 0.08);
            Stroke::new(pose, root, end, radius).paint(pixels, |value, cover, pixel| {
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
                Stroke::new(pose, from, to, radius).paint(pixels, |value, cover, pixel| {
                    value + strength * cover * lung[pixel]
                });
            }
        }
    }
}

/// Two bars over the lung tips.
fn draw_clavicles(pixels: &mut [f32], chest: &Chest, pose: &Pose, draws: &mut Draws) {
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
            Stroke::new(pose, from, to, radius).paint(pixels, |value, cover, _| {
                // Bright tissue saturates, so that the joints of the bar do not add up.
                value + (strength * cover).min((0.62 - value).max(0.0)) * 0.7
            });
        }
    }
}

/// Blur, exposure and grain; to bytes.
fn expose(mut pixels: Vec<f32>, draws: &mut Draws) -> GrayImage {
    for _ in 0..1 + draws.below(2) {
        pixels = blur(&pixels);
    }
    let gain = draws.between(0.90, 1.06);
    let offset = draws.between(-0.02, 0.04);
    let toe = draws.between(-0.15, 0.15);
    let tilt = (draws.between(-0.03, 0.03), draws.between(-0.03, 0.03));
    let grain = draws.between(0.010, 0.022);
    let mut image = GrayImage::new(PHANTOM_SIZE, PHANTOM_SIZE);
    for (pixel, value) in pixels.into_iter().enumerate() {
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
    use crate::phantom::{
        finding::{Side, Zone},
        study::Study,
    };

    /// Mean grey level of the columns `from..to` below the middle of the image.
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
