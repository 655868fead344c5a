//! Findings as shapes: where they are on one image, and what they do to its brightness.

use super::{
    anatomy::{Chest, sign},
    canvas::{PIXELS_PER_UNIT, bezier, ellipse_distance, inside, mix, smoothstep},
    draws::Draws,
    finding::{Finding, Side, Zone},
};

/// A finding with its place and size on one image.
pub(super) enum Lesion {
    Nodule {
        centre: (f32, f32),
        radius: f32,
        value: f32,
    },
    /// Overlapping soft discs: `(x, y, radius)`.
    Consolidation {
        discs: [(f32, f32, f32); 6],
        value: f32,
    },
    Effusion {
        side: f32,
        /// Height of the fluid at the heart, and how much higher it is at the chest wall.
        level: f32,
        rise: f32,
    },
    Pneumothorax {
        side: f32,
        /// Width of the rim beside the lung and above it.
        beside: f32,
        above: f32,
    },
    Pacemaker {
        centre: (f32, f32),
        half: (f32, f32),
        lead: Vec<(f32, f32)>,
    },
}

impl Lesion {
    /// Chooses place and size; nothing for an enlarged heart, which is part of the [`Chest`].
    pub(super) fn sample(finding: Finding, chest: &Chest, draws: &mut Draws) -> Option<Self> {
        Some(match finding {
            Finding::Cardiomegaly => return None,
            Finding::Nodule(side, zone) => {
                let radius = draws.between(4.2, 7.0) / PIXELS_PER_UNIT;
                Self::Nodule {
                    centre: place_in_lung(side, zone, radius + 0.02, chest, draws),
                    radius,
                    value: draws.between(0.74, 0.86),
                }
            }
            Finding::Consolidation(side, zone) => {
                let radius = draws.between(9.5, 12.5) / PIXELS_PER_UNIT;
                let (x, y) = place_in_lung(side, zone, 0.7 * radius, chest, draws);
                // A ragged cloud: one disc in the middle, the others scattered round it.
                let discs = std::array::from_fn(|i| {
                    let scatter = if i == 0 { 0.0 } else { 0.6 * radius };
                    (
                        x + draws.between(-scatter, scatter),
                        y + draws.between(-scatter, scatter),
                        radius * draws.between(0.5, 0.78),
                    )
                });
                Self::Consolidation {
                    discs,
                    value: draws.between(0.57, 0.65),
                }
            }
            Finding::PleuralEffusion(side) => Self::Effusion {
                side: sign(side),
                level: chest.angle_y[usize::from(side == Side::Right)] - chest.dome
                    + draws.between(-0.30, 0.02),
                rise: draws.between(0.16, 0.30),
            },
            Finding::Pneumothorax(side) => Self::Pneumothorax {
                side: sign(side),
                beside: draws.between(0.13, 0.23),
                above: draws.between(0.16, 0.32),
            },
            Finding::Pacemaker => {
                let centre = (draws.between(0.38, 0.52), draws.between(-0.58, -0.46));
                let half = (draws.between(0.10, 0.13), draws.between(0.075, 0.10));
                let start = (centre.0 - half.0, centre.1);
                let vein = (draws.between(0.02, 0.06), draws.between(-0.45, -0.35));
                let tip = (
                    chest.heart.0 + draws.between(0.04, 0.14),
                    chest.heart.1 + draws.between(0.06, 0.14),
                );
                let atrium = (draws.between(-0.12, -0.06), chest.heart.1 - 0.10);
                let lead = [(start, (0.12, start.1 - 0.05), vein), (vein, atrium, tip)]
                    .into_iter()
                    .flat_map(|(from, over, to)| (0..=8).map(move |i| bezier(from, over, to, i)))
                    .collect();
                Self::Pacemaker { centre, half, lead }
            }
        })
    }

    /// Applies what is in the pleural space, under the ribs.
    pub(super) fn under_ribs(&self, value: f32, x: f32, y: f32, lung: f32, chest: &Chest) -> f32 {
        match *self {
            Self::Pneumothorax {
                side,
                beside,
                above,
            } if x * side > 0.0 => {
                let edge = ellipse_distance(
                    x,
                    y - chest.centre_y,
                    chest.half_width - beside,
                    chest.half_height - above,
                );
                // The lung stays attached near the diaphragm.
                let edge = edge - 0.10 * smoothstep(0.35, 0.65, y);
                let collapsed = mix(value, value + 0.05, lung * inside(-edge, 0.02));
                let free_air = mix(collapsed, 0.05, lung * inside(edge, 0.014));
                let line = inside(0.017 - edge.abs(), 0.012);
                mix(free_air, 0.58, 0.9 * line * lung)
            }
            _ => value,
        }
    }

    /// Applies what is drawn over ribs and heart; `cage` is the depth inside the rib cage.
    pub(super) fn over_ribs(
        &self,
        value: f32,
        (x, y): (f32, f32),
        cage: f32,
        free_lung: f32,
        chest: &Chest,
    ) -> f32 {
        match *self {
            Self::Nodule {
                centre,
                radius,
                value: bright,
            } => {
                let (dx, dy) = (x - centre.0, y - centre.1);
                let distance = (dx * dx + dy * dy).sqrt();
                mix(value, bright, inside(radius - distance, 0.02))
            }
            Self::Consolidation {
                ref discs,
                value: bright,
            } => {
                let clear = discs.iter().fold(1.0, |clear, &(cx, cy, radius)| {
                    let (dx, dy) = (x - cx, y - cy);
                    let distance = (dx * dx + dy * dy).sqrt();
                    clear * (1.0 - 0.7 * smoothstep(1.2 * radius, 0.1 * radius, distance))
                });
                mix(value, bright, (1.0 - clear) * free_lung)
            }
            Self::Effusion { side, level, rise } if x * side > 0.0 => {
                let wall = chest.wall(y).max(0.3);
                let across = (x.abs() / wall).min(1.0);
                let surface = level - rise * across * across * across;
                let fluid = inside(y - surface, 0.03) * inside(cage, 0.025);
                // Fades out under the heart, which stays visible.
                mix(
                    value,
                    0.74,
                    0.95 * fluid * smoothstep(0.0, 0.2, x.abs()) * smoothstep(1.0, 0.7, y),
                )
            }
            Self::Pacemaker { centre, half, .. } => {
                let dx = ((x - centre.0).abs() - half.0 + 0.03).max(0.0);
                let dy = ((y - centre.1).abs() - half.1 + 0.03).max(0.0);
                let distance = (dx * dx + dy * dy).sqrt() - 0.03;
                mix(value, 1.0, inside(-distance, 0.012))
            }
            _ => value,
        }
    }
}

/// A point in the middle of `zone`, `margin` away from heart and chest wall where there is room.
fn place_in_lung(
    side: Side,
    zone: Zone,
    margin: f32,
    chest: &Chest,
    draws: &mut Draws,
) -> (f32, f32) {
    let centre_y = match zone {
        Zone::Upper => -0.46,
        Zone::Middle => -0.06,
        Zone::Lower => 0.32,
    };
    let y = centre_y + draws.between(-0.07, 0.07);
    let from = chest.inner_edge(side, y) + margin;
    let to = chest.wall(y) - margin;
    let share = draws.unit();
    let x = if from < to {
        mix(from, to, share)
    } else {
        0.5 * (from + to)
    };
    (sign(side) * x, y)
}
