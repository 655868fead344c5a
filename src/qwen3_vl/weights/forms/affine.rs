//! Whole numbers of few bits as floats: `(value - zero) · scale`, rounded as the tool rounds.

use super::numbers::Round;

/// Numbers that a table of values is worth while for: those of 4 bits.
const TABLE: usize = 16;

/// The group that a column belongs to.
#[derive(Debug, Clone, Copy)]
pub(super) enum GroupOf<'a> {
    /// Groups of so many columns follow each other.
    Columns(usize),
    /// As listed.
    Order(&'a [u32]),
}

/// How the numbers of one row become floats.
pub(super) struct Affine<'a> {
    bits: usize,
    round: Round,
    /// Scale and zero point of each group.
    groups: &'a [(f32, f32)],
    of: GroupOf<'a>,
    /// Values of all numbers of all groups, where columns of a group are scattered and numbers are few.
    tables: Vec<[f32; TABLE]>,
}

impl<'a> Affine<'a> {
    /// Of a row with these groups.
    pub(super) fn new(
        bits: usize,
        round: Round,
        groups: &'a [(f32, f32)],
        of: GroupOf<'a>,
    ) -> Self {
        let tables = match of {
            GroupOf::Order(_) if bits <= 4 => {
                groups.iter().map(|group| table(*group, round)).collect()
            }
            _ => Vec::new(),
        };
        Self {
            bits,
            round,
            groups,
            of,
            tables,
        }
    }

    /// The values of the columns from `first` on, one for each of `numbers`.
    pub(super) fn values(&self, first: usize, numbers: &[u8], out: &mut [f32]) {
        match self.of {
            GroupOf::Columns(size) => {
                let (mut at, end) = (first, first + numbers.len());
                while at < end {
                    let group = at / size;
                    let next = (group + 1).saturating_mul(size).min(end);
                    let part = at - first..next - first;
                    self.run(self.groups[group], &numbers[part.clone()], &mut out[part]);
                    at = next;
                }
            }
            GroupOf::Order(order) => {
                let order = &order[first..first + numbers.len()];
                if self.tables.is_empty() {
                    for ((number, group), out) in numbers.iter().zip(order).zip(&mut *out) {
                        let (scale, zero) = self.groups[*group as usize];
                        *out = (f32::from(*number) - zero) * scale;
                    }
                    self.round.all(out);
                } else {
                    for ((number, group), out) in numbers.iter().zip(order).zip(out) {
                        *out = self.tables[*group as usize][usize::from(*number) % TABLE];
                    }
                }
            }
        }
    }

    /// Numbers of one group.
    fn run(&self, group: (f32, f32), numbers: &[u8], out: &mut [f32]) {
        if self.bits <= 4 && numbers.len() >= 2 * TABLE {
            let table = table(group, self.round);
            look_up(&table, numbers, out);
            return;
        }
        let (scale, zero) = group;
        for (number, out) in numbers.iter().zip(&mut *out) {
            *out = (f32::from(*number) - zero) * scale;
        }
        self.round.all(out);
    }
}

/// What the numbers of 4 bits stand for in a group.
fn table((scale, zero): (f32, f32), round: Round) -> [f32; TABLE] {
    let mut table = std::array::from_fn(|number| (number as f32 - zero) * scale);
    round.all(&mut table);
    table
}

/// `table[number]` of each number.
pub(super) fn look_up(table: &[f32; TABLE], numbers: &[u8], out: &mut [f32]) {
    for (number, out) in numbers.iter().zip(out) {
        *out = table[usize::from(*number) % TABLE];
    }
}

/// Fields of `bits` bits that follow each other in words without gaps, from the first word's lowest bit on.
pub(super) fn unpack(words: impl IntoIterator<Item = u32>, bits: usize, out: &mut [u8]) {
    let mask = (1u32 << bits) - 1;
    if 32usize.is_multiple_of(bits) {
        let per_word = 32 / bits;
        for (word, out) in words.into_iter().zip(out.chunks_mut(per_word)) {
            for (place, out) in out.iter_mut().enumerate() {
                *out = (word >> (place * bits) & mask) as u8;
            }
        }
        return;
    }
    let (mut held, mut count) = (0u64, 0);
    let mut words = words.into_iter();
    for out in out {
        if count < bits {
            held |= u64::from(words.next().unwrap_or(0)) << count;
            count += 32;
        }
        *out = (held as u32 & mask) as u8;
        held >>= bits;
        count -= bits;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_every_width_follow_each_other() {
        let words: [u32; 8] = std::array::from_fn(|at| 0x9e37_79b9u32.wrapping_mul(at as u32 + 1));
        for bits in 1..=8 {
            let count = 8 * 32 / bits;
            let mut out = vec![0; count];
            unpack(words, bits, &mut out);
            for (at, found) in out.iter().enumerate() {
                let expected = (0..bits).fold(0u8, |value, bit| {
                    let place = at * bits + bit;
                    value | ((words[place / 32] >> (place % 32) & 1) as u8) << bit
                });
                assert_eq!(*found, expected, "{bits} bits, {at}");
            }
        }
    }

    #[test]
    fn tables_and_plain_arithmetic_agree() {
        let groups = [(0.013, 7.0), (0.002_1, 3.0), (1.7, 8.0)];
        let order: Vec<u32> = (0..96).map(|at| at * 7 % 3).collect();
        let numbers: Vec<u8> = (0..96).map(|at| (at * 5 % 16) as u8).collect();
        for round in [Round::F32, Round::F16, Round::BF16] {
            for of in [
                GroupOf::Columns(32),
                GroupOf::Columns(40),
                GroupOf::Order(&order),
            ] {
                let both = [4, 8].map(|bits| {
                    let affine = Affine::new(bits, round, &groups, of);
                    let mut out = vec![0.0; 90];
                    affine.values(6, &numbers[6..], &mut out);
                    out
                });
                assert_eq!(both[0], both[1], "{round:?} {of:?}");
                for (at, value) in (6..).zip(&both[0]) {
                    let group = match of {
                        GroupOf::Columns(size) => at / size,
                        GroupOf::Order(order) => order[at] as usize,
                    };
                    let (scale, zero) = groups[group];
                    let plain = round.apply((f32::from(numbers[at]) - zero) * scale);
                    assert_eq!(*value, plain, "{round:?} {of:?} {at}");
                }
            }
        }
    }
}
