//! The likeliest token of each row of logits (argmax): a cube a row.
#![allow(
    clippy::collapsible_if,
    reason = "the outer condition is known when the kernel is compiled"
)]

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::launch::{Buffer, array, elements, empty};

/// Units of a cube, as far as the adapter allows.
const UNITS: u32 = 1024;

#[cube(launch_unchecked)]
#[allow(
    clippy::collapsible_if,
    reason = "the outer condition is decided when the kernel is compiled"
)]
fn find_likeliest(
    logits: &Array<f32>,
    next: &mut Array<i32>,
    for_host: &mut Array<i32>,
    step: &mut Array<u32>,
    vocab: usize,
    table: u32,
    #[comptime] units: usize,
    #[comptime] stepped: bool,
) {
    let unit = UNIT_POS as usize;
    let start = CUBE_POS * vocab;
    let mut best = f32::min_value();
    let mut best_at = unit;
    let mut broken = 0u32;
    for at in range_stepped(unit, vocab, units) {
        let value = logits[start + at];
        // By its bits: a comparison may be compiled as if there were no NaN.
        if u32::reinterpret(value) & 0x7fff_ffffu32 > 0x7f80_0000u32 {
            broken = 1u32;
        }
        if value > best {
            best = value;
            best_at = at;
        }
    }
    let mut values = SharedMemory::<f32>::new(units);
    let mut places = SharedMemory::<u32>::new(units);
    let mut breaks = SharedMemory::<u32>::new(units);
    values[unit] = best;
    places[unit] = best_at as u32;
    breaks[unit] = broken;
    sync_cube();
    let mut width = comptime!(units.next_power_of_two() / 2).runtime();
    while width > 0 {
        if unit < width && unit + width < units {
            let other = values[unit + width];
            let place = places[unit + width];
            // Of equals the first, as on the host.
            if other > values[unit] || (other == values[unit] && place < places[unit]) {
                values[unit] = other;
                places[unit] = place;
            }
            breaks[unit] = breaks[unit] | breaks[unit + width];
        }
        sync_cube();
        width /= 2;
    }
    if unit == 0 {
        // The next step may be queued already: it needs a valid token id in any case.
        let found = min(places[0], vocab as u32 - 1) as i32;
        next[CUBE_POS] = found;
        for_host[CUBE_POS] = select(breaks[0] == 0, found, -1i32);
        if stepped {
            if CUBE_POS == 0 {
                step[0] += 1;
                step[1] += table;
            }
        }
    }
}

/// Tokens that go into the next step, and the same for the host, -1 where the logits hold a NaN;
/// `logits` `[rows, vocab]`, f32.
pub(super) fn likeliest<R: CubeRuntime>(logits: &Buffer<R>) -> [Buffer<R>; 2] {
    let [rows, _] = logits.meta.shape().dims::<2>();
    let both = [(); 2].map(|()| empty(logits, [rows], DType::I32));
    likeliest_into(logits, both.each_ref(), None);
    both
}

/// [`likeliest`] into these buffers; the place of the step on the device moves on to the next one, whose cosines come
/// so many elements later.
pub(super) fn likeliest_into<R: CubeRuntime>(
    logits: &Buffer<R>,
    [next, for_host]: [&Buffer<R>; 2],
    step: Option<(&Buffer<R>, usize)>,
) {
    let [rows, vocab] = logits.meta.shape().dims();
    let most = logits.client.properties().hardware.max_units_per_cube;
    let units = UNITS.min(most).min(vocab.next_power_of_two() as u32);
    // SAFETY: a cube a row of logits.
    #[allow(unsafe_code)]
    unsafe {
        find_likeliest::launch_unchecked::<R>(
            &logits.client,
            CubeCount::Static(rows as u32, 1, 1),
            CubeDim::new_1d(units),
            elements(logits),
            elements(next),
            elements(for_host),
            array(step.map_or(next, |(step, _)| step), 4),
            vocab,
            step.map_or(0, |(_, table)| table as u32),
            units as usize,
            step.is_some(),
        );
    }
}
