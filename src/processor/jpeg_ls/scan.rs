//! The data of a JPEG-LS scan to numbers.
//!
//! Letters and names of variables are those of ITU-T T.87, annex A.

use super::super::jpeg::JpegError;
use super::JpegLsHeader;

/// A channel of a scan.
#[derive(Debug, Clone, Copy)]
pub(super) struct Component {
    /// Its place in a pixel.
    pub(super) index: usize,
}

/// Parameters of the coding.
#[derive(Debug, Clone, Copy)]
pub(super) struct Coding {
    maxval: i32,
    near: i32,
    thresholds: [i32; 3],
    reset: i32,
    range: i32,
    qbpp: u32,
    limit: u32,
    by_sample: bool,
}

impl Coding {
    /// `None` for parameters that contradict each other. Those of `preset` that are 0 are the default.
    ///
    /// Source: T.87, C.2.4.1.1.
    pub(super) fn new(
        precision: u32,
        near: i32,
        preset: Option<[i32; 5]>,
        by_sample: bool,
    ) -> Option<Self> {
        let highest = (1 << precision) - 1;
        let [maxval, t1, t2, t3, reset] = preset.unwrap_or_default();
        let maxval = if maxval == 0 { highest } else { maxval };
        if maxval > highest || near > 255.min(maxval / 2) {
            return None;
        }
        let clamp = |value: i32, low: i32| {
            if value > maxval || value < low {
                low
            } else {
                value
            }
        };
        let basic = if maxval >= 128 {
            let factor = (maxval.min(4095) + 128) / 256;
            [factor + 2, 4 * factor + 3, 17 * factor + 4].map(|t| (t, 0))
        } else {
            let factor = 256 / (maxval + 1);
            [(3 / factor, 2), (7 / factor, 3), (21 / factor, 4)]
        };
        let default = |at: usize, low: i32| {
            let (value, least) = basic[at];
            clamp((value + (3 + 2 * at as i32) * near).max(least), low)
        };
        let given = |value: i32, default: i32| if value == 0 { default } else { value };
        let t1 = given(t1, default(0, near + 1));
        let t2 = given(t2, default(1, t1));
        let t3 = given(t3, default(2, t2));
        let reset = given(reset, 64);
        if !(near + 1..=maxval).contains(&t1) || t2 < t1 || t3 < t2 || t3 > maxval || reset < 3 {
            return None;
        }
        let range = (maxval + 2 * near) / (2 * near + 1) + 1;
        let bits_of = |count: i32| u32::BITS - (count as u32 - 1).leading_zeros();
        let bpp = bits_of(maxval + 1).max(2);
        Some(Self {
            maxval,
            near,
            thresholds: [t1, t2, t3],
            reset,
            range,
            qbpp: bits_of(range),
            limit: 2 * (bpp + bpp.max(8)),
            by_sample,
        })
    }

    /// A gradient as one of nine regions, -4 to 4.
    fn region(&self, gradient: i32) -> i32 {
        let [t1, t2, t3] = self.thresholds;
        let size = gradient.abs();
        let region = if size <= self.near {
            0
        } else if size < t1 {
            1
        } else if size < t2 {
            2
        } else if size < t3 {
            3
        } else {
            4
        };
        region * gradient.signum()
    }

    /// Refuses errors that no encoder makes.
    fn check(&self, mapped: i32) -> Result<(), JpegError> {
        if mapped > 2 * self.range {
            return Err(JpegError::Damaged("a number is out of range".to_owned()));
        }
        Ok(())
    }

    /// The number at prediction plus error, back in the range of numbers.
    fn reconstruct(&self, prediction: i32, error: i32) -> i32 {
        let step = 2 * self.near + 1;
        let mut number = prediction + error * step;
        if number < -self.near {
            number += self.range * step;
        } else if number > self.maxval + self.near {
            number -= self.range * step;
        }
        number.clamp(0, self.maxval)
    }
}

/// State of one context.
#[derive(Clone, Copy)]
struct Context {
    a: i32,
    b: i32,
    c: i32,
    n: i32,
    /// Negative errors, of the contexts after runs.
    nn: i32,
}

const CONTEXTS: usize = 365;

/// Order of run lengths by index.
const J: [u32; 32] = [
    0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 10, 11, 12, 13,
    14, 15,
];

/// Decodes a scan into the places of its channels in `numbers`, `[height, width, channels]`.
///
/// # Errors
/// Data that end before the picture does, or hold no code.
pub(super) fn decode_scan(
    data: &[u8],
    header: &JpegLsHeader,
    components: &[Component],
    coding: &Coding,
    numbers: &mut [u16],
) -> Result<(), JpegError> {
    let mut decoder = Decoder::new(data, *coding);
    let count = components.len();
    // One number outside at each end.
    let stride = header.width + 2;
    let mut above = vec![0_i32; stride * count];
    let mut line = vec![0_i32; stride * count];
    let mut run_indices = vec![0_usize; count];
    for row in 0..header.height {
        for component in 0..count {
            let first = component * stride;
            above[first + stride - 1] = above[first + stride - 2];
            line[first] = above[first + 1];
        }
        if coding.by_sample && count > 1 {
            decoder.samples(&above, &mut line, stride, count, &mut run_indices[0])?;
        } else {
            for (component, run_index) in run_indices.iter_mut().enumerate() {
                let own = component * stride..(component + 1) * stride;
                decoder.line(&above[own.clone()], &mut line[own], run_index)?;
            }
        }
        for (component, Component { index }) in components.iter().enumerate() {
            let decoded = &line[component * stride + 1..][..header.width];
            let targets = numbers[row * header.width * header.channels + index..].iter_mut();
            for (target, number) in targets.step_by(header.channels).zip(decoded) {
                *target = *number as u16;
            }
        }
        std::mem::swap(&mut above, &mut line);
    }
    Ok(())
}

struct Decoder<'a> {
    bits: Bits<'a>,
    coding: Coding,
    contexts: Vec<Context>,
    /// After a run: between different and between like numbers.
    after_run: [Context; 2],
}

impl<'a> Decoder<'a> {
    fn new(data: &'a [u8], coding: Coding) -> Self {
        let context = Context {
            a: ((coding.range + 32) / 64).max(2),
            b: 0,
            c: 0,
            n: 1,
            nn: 0,
        };
        Self {
            bits: Bits::new(data),
            coding,
            contexts: vec![context; CONTEXTS],
            after_run: [context; 2],
        }
    }

    /// The context's number, with its sign, of a pixel at `x`; 0 where all its gradients are flat.
    fn context_at(&self, above: &[i32], line: &[i32], x: usize) -> i32 {
        let (a, b, c, d) = (line[x - 1], above[x], above[x - 1], above[x + 1]);
        let region = |gradient| self.coding.region(gradient);
        (region(d - b) * 9 + region(b - c)) * 9 + region(c - a)
    }

    /// A line of one channel.
    fn line(
        &mut self,
        above: &[i32],
        line: &mut [i32],
        run_index: &mut usize,
    ) -> Result<(), JpegError> {
        let end = line.len() - 1;
        let mut x = 1;
        while x < end {
            let context = self.context_at(above, line, x);
            if context != 0 {
                line[x] = self.regular(context, line[x - 1], above[x], above[x - 1])?;
                x += 1;
                continue;
            }
            let run = self.run(end - x, run_index)?;
            let value = line[x - 1];
            line[x..x + run].fill(value);
            x += run;
            if x < end {
                let is_alike = (value - above[x]).abs() <= self.coding.near;
                line[x] = self.interruption(value, above[x], is_alike, *run_index)?;
                *run_index = run_index.saturating_sub(1);
                x += 1;
            }
        }
        self.bits.check()
    }

    /// A line of several channels, pixel by pixel.
    fn samples(
        &mut self,
        above: &[i32],
        line: &mut [i32],
        stride: usize,
        count: usize,
        run_index: &mut usize,
    ) -> Result<(), JpegError> {
        let end = stride - 1;
        let mut x = 1;
        while x < end {
            let mut contexts = [0; 4];
            for (component, context) in contexts.iter_mut().enumerate().take(count) {
                let first = component * stride;
                *context = self.context_at(&above[first..], &line[first..], x);
            }
            if contexts != [0; 4] {
                for (component, context) in contexts.iter().enumerate().take(count) {
                    let at = component * stride + x;
                    line[at] = self.regular(*context, line[at - 1], above[at], above[at - 1])?;
                }
                x += 1;
                continue;
            }
            let run = self.run(end - x, run_index)?;
            for component in 0..count {
                let at = component * stride + x;
                let value = line[at - 1];
                line[at..at + run].fill(value);
            }
            x += run;
            if x < end {
                for component in 0..count {
                    let at = component * stride + x;
                    line[at] = self.interruption(line[at - 1], above[at], false, *run_index)?;
                }
                *run_index = run_index.saturating_sub(1);
                x += 1;
            }
        }
        self.bits.check()
    }

    /// A number that is predicted from its neighbours.
    ///
    /// Source: T.87, A.4 to A.6.
    fn regular(&mut self, context: i32, a: i32, b: i32, c: i32) -> Result<i32, JpegError> {
        let coding = self.coding;
        let sign = if context < 0 { -1 } else { 1 };
        let state = &mut self.contexts[context.unsigned_abs() as usize];
        let edge = if c >= a.max(b) {
            a.min(b)
        } else if c <= a.min(b) {
            a.max(b)
        } else {
            a + b - c
        };
        let prediction = (edge + sign * state.c).clamp(0, coding.maxval);
        let k = order(state.n, state.a)?;
        let mapped = self.bits.golomb(k, coding.limit, coding.qbpp)?;
        coding.check(mapped)?;
        let half = mapped >> 1;
        let is_odd = mapped & 1 != 0;
        let error = if coding.near == 0 && k == 0 && 2 * state.b <= -state.n {
            if is_odd { half } else { -half - 1 }
        } else if is_odd {
            -half - 1
        } else {
            half
        };
        state.b += error * (2 * coding.near + 1);
        state.a = state.a.saturating_add(error.abs());
        if state.n == coding.reset {
            state.a >>= 1;
            state.b >>= 1;
            state.n >>= 1;
        }
        state.n += 1;
        if state.b <= -state.n {
            state.b = (state.b + state.n).max(1 - state.n);
            state.c = (state.c - 1).max(-128);
        } else if state.b > 0 {
            state.b = (state.b - state.n).min(0);
            state.c = (state.c + 1).min(127);
        }
        Ok(coding.reconstruct(prediction, sign * error))
    }

    /// The length of a run, `left` at most.
    ///
    /// Source: T.87, A.7.1.
    fn run(&mut self, left: usize, index: &mut usize) -> Result<usize, JpegError> {
        let mut run = 0;
        while self.bits.take(1) == 1 {
            let stretch = 1_usize << J[*index];
            if run + stretch <= left {
                *index = (*index + 1).min(J.len() - 1);
            }
            run = (run + stretch).min(left);
            if run == left {
                return Ok(run);
            }
            self.bits.check()?;
        }
        run += self.bits.take(J[*index]) as usize;
        if run > left {
            self.bits.check()?;
            return Err(JpegError::Damaged(
                "a run is longer than its row".to_owned(),
            ));
        }
        Ok(run)
    }

    /// The number that ends a run.
    ///
    /// Source: T.87, A.7.2.
    fn interruption(
        &mut self,
        a: i32,
        b: i32,
        is_alike: bool,
        run_index: usize,
    ) -> Result<i32, JpegError> {
        let coding = self.coding;
        let alike = i32::from(is_alike);
        let state = &mut self.after_run[usize::from(is_alike)];
        let size = if is_alike {
            state.a.saturating_add(state.n >> 1)
        } else {
            state.a
        };
        let k = order(state.n, size)?;
        let limit = coding.limit - J[run_index] - 1;
        let mapped = self.bits.golomb(k, limit, coding.qbpp)?;
        coding.check(mapped)?;
        let both = mapped + alike;
        let is_odd = both & 1 != 0;
        let magnitude = (both + 1) >> 1;
        let error = if (k != 0 || 2 * state.nn >= state.n) == is_odd {
            -magnitude
        } else {
            magnitude
        };
        if error < 0 {
            state.nn += 1;
        }
        state.a = state.a.saturating_add((mapped + 1 - alike) >> 1);
        if state.n == coding.reset {
            state.a >>= 1;
            state.n >>= 1;
            state.nn >>= 1;
        }
        state.n += 1;
        Ok(if is_alike {
            coding.reconstruct(a, error)
        } else {
            let sign = if a > b { -1 } else { 1 };
            coding.reconstruct(b, sign * error)
        })
    }
}

/// The order of the Golomb code of a context.
fn order(n: i32, a: i32) -> Result<u32, JpegError> {
    (0..24)
        .find(|k| (i64::from(n) << k) >= i64::from(a))
        .ok_or_else(|| JpegError::Damaged("its errors grow without bound".to_owned()))
}

/// Bits of a scan, the highest first; after a byte of ones, one bit is stuffed.
struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    held: u64,
    count: u32,
    /// Bits that were taken after the last.
    missing: u32,
    after_ones: bool,
}

impl<'a> Bits<'a> {
    fn new(data: &'a [u8]) -> Self {
        Self {
            data,
            at: 0,
            held: 0,
            count: 0,
            missing: 0,
            after_ones: false,
        }
    }

    fn fill(&mut self) {
        while self.count <= 48 {
            let Some(byte) = self.data.get(self.at) else {
                return;
            };
            self.at += 1;
            let bits = if self.after_ones { 7 } else { 8 };
            self.held = self.held << bits | u64::from(*byte) & ((1 << bits) - 1);
            self.count += bits;
            self.after_ones = *byte == 0xff;
        }
    }

    /// The next bits, 24 at most; zeros after the last.
    fn take(&mut self, bits: u32) -> u32 {
        if self.count < bits {
            self.fill();
        }
        if self.count < bits {
            let lacking = bits - self.count;
            self.missing = self.missing.saturating_add(lacking);
            self.held <<= lacking;
            self.count = bits;
        }
        self.count -= bits;
        let taken = (self.held >> self.count) & ((1 << bits) - 1);
        self.held &= (1_u64 << self.count) - 1;
        taken as u32
    }

    /// # Errors
    /// [`JpegError::Truncated`] if more bits were taken than there are.
    fn check(&self) -> Result<(), JpegError> {
        if self.missing > 0 {
            return Err(JpegError::Truncated);
        }
        Ok(())
    }

    /// A number in Golomb's code of limited length.
    ///
    /// Source: T.87, A.5.3.
    fn golomb(&mut self, k: u32, limit: u32, qbpp: u32) -> Result<i32, JpegError> {
        let longest = limit.saturating_sub(qbpp + 1);
        let mut zeros = 0;
        while zeros < longest && self.take(1) == 0 {
            zeros += 1;
            if self.missing > 0 {
                return Err(JpegError::Truncated);
            }
        }
        if zeros < longest {
            return Ok((zeros << k | self.take(k)) as i32);
        }
        // The one that ends the zeros.
        if self.take(1) == 0 {
            self.check()?;
            return Err(JpegError::Damaged("a number has no code".to_owned()));
        }
        Ok(self.take(qbpp) as i32 + 1)
    }
}
