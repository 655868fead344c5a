//! Python's `random.Random`, as far as the published conversion uses it.
//!
//! The published training and validation rows came of `random.seed(42)`, `random.choice` and
//! `random.shuffle`; with the same stream they can be had again, row by row.
//!
//! Source: MT19937 of Matsumoto and Nishimura; `seed`, `choice`, `shuffle` and
//! `_randbelow_with_getrandbits`, CPython 3, `Lib/random.py`.

const SIZE: usize = 624;
const SHIFT: usize = 397;

/// The stream that `random.seed(SEED)` starts.
#[derive(Debug, Clone)]
pub(super) struct PythonRandom {
    state: [u32; SIZE],
    next: usize,
}

impl PythonRandom {
    pub(super) fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        let words = [low, high];
        let key = if high == 0 { &words[..1] } else { &words[..] };
        let mut state = [0; SIZE];
        state[0] = 19_650_218;
        for i in 1..SIZE {
            state[i] = mixed(state[i - 1], 1_812_433_253).wrapping_add(i as u32);
        }
        let (mut i, mut j) = (1, 0);
        let wrap = |state: &mut [u32; SIZE], i: &mut usize| {
            *i += 1;
            if *i == SIZE {
                state[0] = state[SIZE - 1];
                *i = 1;
            }
        };
        for _ in 0..SIZE {
            state[i] = (state[i] ^ mixed(state[i - 1], 1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            wrap(&mut state, &mut i);
            j = (j + 1) % key.len();
        }
        for _ in 1..SIZE {
            state[i] = (state[i] ^ mixed(state[i - 1], 1_566_083_941)).wrapping_sub(i as u32);
            wrap(&mut state, &mut i);
        }
        state[0] = 1 << 31;
        Self { state, next: SIZE }
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == SIZE {
            for i in 0..SIZE {
                let bits =
                    (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % SIZE] & 0x7fff_ffff);
                let twist = if bits & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + SHIFT) % SIZE] ^ (bits >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut value = self.state[self.next];
        self.next += 1;
        value ^= value >> 11;
        value ^= (value << 7) & 0x9d2c_5680;
        value ^= (value << 15) & 0xefc6_0000;
        value ^ (value >> 18)
    }

    /// A whole number below `limit`, which is above 0; as `choice` picks a place.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        // Rows are counted in 32 bits: a corpus of four thousand million lines does not come here.
        let limit = u32::try_from(limit).unwrap_or(u32::MAX).max(1);
        let unused = limit.leading_zeros();
        loop {
            let value = self.next_u32() >> unused;
            if value < limit {
                return value as usize;
            }
        }
    }

    /// Brings `items` into a new order, as `shuffle` does.
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last + 1);
            items.swap(last, other);
        }
    }
}

fn mixed(previous: u32, factor: u32) -> u32 {
    (previous ^ (previous >> 30)).wrapping_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values printed by CPython 3.
    #[test]
    fn the_stream_is_that_of_python() {
        let mut random = PythonRandom::new(42);
        let first: Vec<u32> = (0..4).map(|_| random.next_u32()).collect();
        assert_eq!(first, [2746317213, 478163327, 107420369, 3184935163]);
        let mut random = PythonRandom::new((1 << 40) + 5);
        let first: Vec<u32> = (0..3).map(|_| random.next_u32()).collect();
        assert_eq!(first, [2166296868, 2220160828, 1153647273]);
    }

    #[test]
    fn choice_and_shuffle_are_those_of_python() {
        let mut random = PythonRandom::new(42);
        let chosen: Vec<usize> = (0..6).map(|_| random.below(12)).collect();
        assert_eq!(chosen, [10, 1, 0, 11, 4, 3]);
        let mut items: Vec<u8> = (0..10).collect();
        random.shuffle(&mut items);
        assert_eq!(items, [9, 7, 8, 0, 4, 6, 5, 1, 2, 3]);
    }
}
