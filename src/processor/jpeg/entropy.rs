//! Huffman-coded data to coefficients, and how much of them is damaged.

use super::{
    frame::{Frame, ZIGZAG},
    huffman::{Bits, Broken, HuffmanTable},
};

/// A component of a scan and its tables.
pub(super) struct ScanComponent<'a> {
    pub(super) index: usize,
    pub(super) dc: Option<&'a HuffmanTable>,
    pub(super) ac: Option<&'a HuffmanTable>,
    /// The highest DC coefficient that pixels can give; a higher one is damage.
    pub(super) highest_dc: i32,
}

/// What the blocks of a scan hold.
#[derive(Debug, Clone, Copy)]
enum ScanKind {
    /// All coefficients.
    Sequential,
    /// The first bits of the DC coefficient, shifted.
    FirstDc { low: u8 },
    /// One more bit of it.
    RefineDc { low: u8 },
    /// The first bits of other coefficients.
    FirstAc(Band),
    /// One more bit of these.
    RefineAc(Band),
}

/// The AC coefficients of a progressive scan: the places `from` to `to`, from bit `low` on.
#[derive(Debug, Clone, Copy)]
struct Band {
    from: usize,
    to: usize,
    low: u8,
}

/// A scan.
pub(super) struct Scan<'a> {
    pub(super) components: Vec<ScanComponent<'a>>,
    kind: ScanKind,
}

/// What is carried from block to block.
struct ScanState {
    /// Last DC coefficient of each component of the scan.
    predicted: [i32; 4],
    /// Blocks that still have nothing.
    empty_run: u32,
}

impl<'a> Scan<'a> {
    /// `None` if a table is missing.
    pub(super) fn sequential(components: Vec<ScanComponent<'a>>) -> Option<Self> {
        let complete = components
            .iter()
            .all(|component| component.dc.is_some() && component.ac.is_some());
        (complete && components.len() <= 4).then_some(Self {
            components,
            kind: ScanKind::Sequential,
        })
    }

    /// `None` if a table is missing.
    pub(super) fn progressive(
        components: Vec<ScanComponent<'a>>,
        (from, to): (u8, u8),
        high: u8,
        low: u8,
    ) -> Option<Self> {
        let band = Band {
            from: from.into(),
            to: to.into(),
            low,
        };
        let kind = match (from, high) {
            (0, 0) => ScanKind::FirstDc { low },
            (0, _) => ScanKind::RefineDc { low },
            (_, 0) => ScanKind::FirstAc(band),
            _ => ScanKind::RefineAc(band),
        };
        let complete = components.iter().all(|component| match kind {
            ScanKind::FirstDc { .. } => component.dc.is_some(),
            ScanKind::RefineDc { .. } => true,
            _ => component.ac.is_some(),
        });
        (complete && components.len() <= 4).then_some(Self { components, kind })
    }

    /// First and last coefficient of the scan.
    pub(super) fn range(&self) -> (usize, usize) {
        match self.kind {
            ScanKind::Sequential => (0, 63),
            ScanKind::FirstDc { .. } | ScanKind::RefineDc { .. } => (0, 0),
            ScanKind::FirstAc(band) | ScanKind::RefineAc(band) => (band.from, band.to),
        }
    }

    /// Decodes `data` into `frame`; gives the share of the scan that is damaged.
    pub(super) fn decode(&self, frame: &mut Frame, data: &[u8], interval: usize) -> f64 {
        // One component comes block by block as far as it has pixels, several in whole units.
        let (across, down) = match &self.components[..] {
            [one] => frame.components[one.index].blocks,
            _ => {
                let (h, v) = frame.most();
                (frame.width.div_ceil(8 * h), frame.height.div_ceil(8 * v))
            }
        };
        let units = across * down;
        let interval = if interval == 0 { units } else { interval };
        let mut sound = 0;
        for (place, piece) in pieces(data) {
            let first = place.saturating_mul(interval);
            let end = first.saturating_add(interval).min(units);
            if first < end {
                sound += self.piece(frame, piece, first..end, across);
            }
        }
        1.0 - (sound.min(units) as f64) / (units as f64)
    }

    /// Decodes what is between two restart marks; gives how many units are sound.
    ///
    /// After a changed bit the decoder loses the code boundaries and finds them again, and the result is
    /// another picture. It shows later or at the end, so then nothing of the piece is trusted.
    fn piece(
        &self,
        frame: &mut Frame,
        data: &[u8],
        units: std::ops::Range<usize>,
        across: usize,
    ) -> usize {
        let mut bits = Bits::new(data);
        let mut state = ScanState {
            predicted: [0; 4],
            empty_run: 0,
        };
        for unit in units.clone() {
            if self
                .unit(frame, &mut bits, &mut state, unit % across, unit / across)
                .is_err()
            {
                return 0;
            }
        }
        // Encoders may pad by a byte or two, and some leave a few; more are lost blocks.
        const PADDING: usize = 2;
        const MOST_LEFT: usize = 16;
        let left = bits.left();
        if left.len() > MOST_LEFT {
            return 0;
        }
        let is_padding = |byte: &u8| matches!(byte, 0 | 0xff);
        if left.len() > PADDING || !left.iter().all(is_padding) {
            return units.len() - 1;
        }
        units.len()
    }

    fn unit(
        &self,
        frame: &mut Frame,
        bits: &mut Bits<'_>,
        state: &mut ScanState,
        column: usize,
        row: usize,
    ) -> Result<(), Broken> {
        let is_single = self.components.len() == 1;
        for (place, own) in self.components.iter().enumerate() {
            let component = &mut frame.components[own.index];
            let (horizontal, vertical) = if is_single {
                (1, 1)
            } else {
                (component.horizontal, component.vertical)
            };
            for down in 0..vertical {
                for across in 0..horizontal {
                    let at =
                        (row * vertical + down) * component.stride + column * horizontal + across;
                    let block = component.coefficients.as_chunks_mut::<64>().0.get_mut(at);
                    let block = block.ok_or(Broken)?;
                    self.block(
                        own,
                        block,
                        bits,
                        &mut state.predicted[place],
                        &mut state.empty_run,
                    )?;
                }
            }
        }
        Ok(())
    }

    fn block(
        &self,
        own: &ScanComponent<'_>,
        block: &mut [i16; 64],
        bits: &mut Bits<'_>,
        predicted: &mut i32,
        empty_run: &mut u32,
    ) -> Result<(), Broken> {
        match self.kind {
            ScanKind::Sequential => {
                block[0] = dc_coefficient(own, bits, predicted, 0)?;
                let table = own.ac.ok_or(Broken)?;
                let mut at = 1;
                while at < 64 {
                    let symbol = bits.symbol(table)?;
                    let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
                    if size == 0 {
                        if run != 15 {
                            break;
                        }
                        at += 16;
                        continue;
                    }
                    at += run;
                    let place = ZIGZAG.get(at).ok_or(Broken)?;
                    block[usize::from(*place)] = bits.signed(size)? as i16;
                    at += 1;
                }
                Ok(())
            }
            ScanKind::FirstDc { low } => {
                block[0] = dc_coefficient(own, bits, predicted, low)?;
                Ok(())
            }
            ScanKind::RefineDc { low } => {
                if bits.take(1)? == 1 {
                    block[0] |= 1 << low;
                }
                Ok(())
            }
            ScanKind::FirstAc(band) => band.first(own.ac.ok_or(Broken)?, block, bits, empty_run),
            ScanKind::RefineAc(band) => band.refine(own.ac.ok_or(Broken)?, block, bits, empty_run),
        }
    }
}

/// The DC coefficient of a block, stored as the difference to the one before, shifted by `low`.
fn dc_coefficient(
    own: &ScanComponent<'_>,
    bits: &mut Bits<'_>,
    predicted: &mut i32,
    low: u8,
) -> Result<i16, Broken> {
    let size = u32::from(bits.symbol(own.dc.ok_or(Broken)?)?);
    if size > 15 {
        return Err(Broken);
    }
    *predicted = predicted.wrapping_add(bits.signed(size)?);
    let coefficient = predicted.wrapping_shl(low.into());
    if coefficient.unsigned_abs() > own.highest_dc.unsigned_abs() {
        return Err(Broken);
    }
    i16::try_from(coefficient).map_err(|_| Broken)
}

impl Band {
    /// Reads the first bits of a block.
    ///
    /// Source: T.81, G.1.2.2.
    fn first(
        self,
        table: &HuffmanTable,
        block: &mut [i16; 64],
        bits: &mut Bits<'_>,
        empty_run: &mut u32,
    ) -> Result<(), Broken> {
        if *empty_run > 0 {
            *empty_run -= 1;
            return Ok(());
        }
        let mut at = self.from;
        while at <= self.to {
            let symbol = bits.symbol(table)?;
            let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
            if size == 0 {
                if run < 15 {
                    *empty_run = (1 << run) - 1 + bits.take(run)?;
                    break;
                }
                at += 16;
                continue;
            }
            at += run as usize;
            if at > self.to {
                return Err(Broken);
            }
            block[usize::from(ZIGZAG[at])] = (bits.signed(size)? << self.low) as i16;
            at += 1;
        }
        Ok(())
    }

    /// Reads one more bit of a block.
    ///
    /// Source: T.81, G.1.2.3.
    fn refine(
        self,
        table: &HuffmanTable,
        block: &mut [i16; 64],
        bits: &mut Bits<'_>,
        empty_run: &mut u32,
    ) -> Result<(), Broken> {
        let bit = 1_i16 << self.low;
        let mut at = self.from;
        let end = self.to;
        if *empty_run == 0 {
            while at <= end {
                let symbol = bits.symbol(table)?;
                let (mut run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
                let mut value = 0;
                match size {
                    0 if run < 15 => {
                        *empty_run = (1 << run) + bits.take(run)?;
                        break;
                    }
                    0 => {}
                    1 => value = if bits.take(1)? == 1 { bit } else { -bit },
                    _ => return Err(Broken),
                }
                // Over `run` coefficients that are zero so far; the others get their next bit.
                while at <= end {
                    let coefficient = &mut block[usize::from(ZIGZAG[at])];
                    if *coefficient != 0 {
                        refine_coefficient(coefficient, bits, bit)?;
                    } else if run == 0 {
                        if value != 0 {
                            *coefficient = value;
                        }
                        at += 1;
                        break;
                    } else {
                        run -= 1;
                    }
                    at += 1;
                }
            }
        }
        if *empty_run > 0 {
            for place in ZIGZAG.iter().take(end + 1).skip(at) {
                let coefficient = &mut block[usize::from(*place)];
                if *coefficient != 0 {
                    refine_coefficient(coefficient, bits, bit)?;
                }
            }
            *empty_run -= 1;
        }
        Ok(())
    }
}

/// Reads the next bit of a coefficient that is not zero.
fn refine_coefficient(coefficient: &mut i16, bits: &mut Bits<'_>, bit: i16) -> Result<(), Broken> {
    if bits.take(1)? == 1 && *coefficient & bit == 0 {
        let step = if *coefficient > 0 { bit } else { -bit };
        *coefficient = coefficient.wrapping_add(step);
    }
    Ok(())
}

/// Length of the coded data at the start of `rest`: up to a marker that is no restart.
pub(super) fn data_length(rest: &[u8]) -> usize {
    let is_end = |pair: &[u8]| pair[0] == 0xff && !matches!(pair[1], 0 | 0xd0..=0xd7 | 0xff);
    rest.windows(2).position(is_end).unwrap_or(rest.len())
}

/// The data between restart marks, each with its place in the scan.
///
/// The number of a mark, modulo 8, shows how many pieces are missing before it.
fn pieces(data: &[u8]) -> Vec<(usize, &[u8])> {
    let mut pieces = Vec::new();
    let (mut from, mut place, mut at) = (0, 0, 0);
    while at + 1 < data.len() {
        if data[at] == 0xff && matches!(data[at + 1], 0xd0..=0xd7) {
            pieces.push((place, &data[from..at]));
            let number = usize::from(data[at + 1] - 0xd0);
            place += 1 + (number + 8 - place % 8) % 8;
            from = at + 2;
            at += 1;
        }
        at += 1;
    }
    pieces.push((place, &data[from..]));
    pieces
}
