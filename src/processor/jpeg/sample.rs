//! Planes of colour at full and lower resolution to red, green and blue.

/// What the three channels of a JPEG mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::processor) enum Colour {
    Rgb,
    YCbCr,
}

/// One channel of a picture.
pub(super) struct Plane {
    pub(super) width: usize,
    pub(super) height: usize,
    /// How many pixels one level covers, across and down; `None` if that is no whole number.
    pub(super) across: Option<usize>,
    pub(super) down: Option<usize>,
    pub(super) levels: Vec<u16>,
}

impl Plane {
    fn line(&self, row: usize) -> &[u16] {
        let row = row.min(self.height - 1);
        &self.levels[row * self.width..][..self.width]
    }

    /// Fills `line` with row `row` at full resolution; `None` for ratios that are no whole numbers.
    ///
    /// Levels stored at half size are interpolated, others repeated.
    ///
    /// Source: `h2v1_fancy_upsample`, `h1v2_fancy_upsample`, `h2v2_fancy_upsample` and
    /// `int_upsample`, libjpeg-turbo, `jdsample.c`.
    fn full_line(&self, row: usize, sums: &mut Vec<u32>, line: &mut [u16]) -> Option<()> {
        let (across, down) = (self.across?, self.down?);
        let own = row / down;
        // The row of levels that is second nearest; the first and last have none outside.
        let near = if row.is_multiple_of(down) {
            own.saturating_sub(1)
        } else {
            own + 1
        };
        match (across, down) {
            (2, 1) if self.width > 2 => {
                sums.clear();
                sums.extend(self.line(own).iter().map(|level| u32::from(*level)));
                interpolate(sums, line, 2, [1, 2]);
            }
            (2, 2) if self.width > 2 => {
                let pairs = self.line(own).iter().zip(self.line(near));
                sums.clear();
                sums.extend(pairs.map(|(own, near)| 3 * u32::from(*own) + u32::from(*near)));
                interpolate(sums, line, 4, [8, 7]);
            }
            (1, 2) => {
                let bias = if row.is_multiple_of(2) { 1 } else { 2 };
                let pairs = self.line(own).iter().zip(self.line(near));
                for (target, (own, near)) in line.iter_mut().zip(pairs) {
                    *target = ((3 * u32::from(*own) + u32::from(*near) + bias) >> 2) as u16;
                }
            }
            _ => {
                for (target, level) in line.chunks_mut(across).zip(self.line(own)) {
                    target.fill(*level);
                }
            }
        }
        Some(())
    }
}

/// Twice as many levels as `sums`: three parts of the nearest and one of the next, the ends whole;
/// `bits` are shifted out, rounded by `bias` on the left and on the right of a level.
fn interpolate(sums: &[u32], line: &mut [u16], bits: u32, bias: [u32; 2]) {
    let last = sums.len() - 1;
    for (at, targets) in line.chunks_mut(2).enumerate() {
        let own = sums[at.min(last)];
        let neighbours = [
            if at == 0 { own } else { sums[at - 1] },
            if at >= last { own } else { sums[at + 1] },
        ];
        for ((target, near), bias) in targets.iter_mut().zip(neighbours).zip(bias) {
            *target = ((3 * own + near + bias) >> bits) as u16;
        }
    }
}

/// Red, green and blue of three planes; `None` for sampling ratios that are no whole numbers.
pub(super) fn rgb(
    planes: &[Plane],
    width: usize,
    height: usize,
    colour: Colour,
) -> Option<Vec<u8>> {
    let [first, second, third] = planes else {
        return None;
    };
    let mut pixels = vec![0; width * height * 3];
    let mut lines = [vec![0; width], vec![0; width], vec![0; width]];
    let mut sums = Vec::new();
    for (row, target) in pixels.chunks_mut(3 * width).enumerate() {
        for (plane, line) in [first, second, third].into_iter().zip(&mut lines) {
            plane.full_line(row, &mut sums, line)?;
        }
        let [first, second, third] = &lines;
        let channels = first.iter().zip(second).zip(third);
        for (pixel, ((a, b), c)) in target.as_chunks_mut::<3>().0.iter_mut().zip(channels) {
            *pixel = match colour {
                Colour::Rgb => [*a as u8, *b as u8, *c as u8],
                Colour::YCbCr => from_ycbcr(*a, *b, *c),
            };
        }
    }
    Some(pixels)
}

/// Source: `build_ycc_rgb_table` and `ycc_rgb_convert`, libjpeg-turbo, `jdcolor.c`.
fn from_ycbcr(y: u16, blue: u16, red: u16) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    let (y, blue, red) = (i32::from(y), i32::from(blue) - 128, i32::from(red) - 128);
    [
        y + ((91_881 * red + HALF) >> 16),
        y + ((-22_554 * blue - 46_802 * red + HALF) >> 16),
        y + ((116_130 * blue + HALF) >> 16),
    ]
    .map(|value| value.clamp(0, 255) as u8)
}
