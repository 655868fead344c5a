//! Huffman codes, and the bits they are read from.

/// No code of the table, or data that end too early.
pub(super) struct Broken;

/// A table of Huffman codes.
pub(super) struct HuffmanTable {
    /// By the next [`FAST_BITS`] bits: length of the code in the high byte, value in the low; 0 for
    /// a longer code.
    fast: Vec<u16>,
    /// By length: one more than the highest code, aligned to 16 bits.
    ends: [u32; 17],
    /// By length: what to add to a code to find its value.
    offsets: [i32; 17],
    values: Vec<u8>,
}

const FAST_BITS: u32 = 9;

impl HuffmanTable {
    /// `counts` codes of each length from 1 on, for `values` in order; `None` for more than there
    /// can be.
    pub(super) fn new(counts: &[u8; 16], values: &[u8]) -> Option<Self> {
        let mut table = Self {
            fast: vec![0; 1 << FAST_BITS],
            ends: [0; 17],
            offsets: [0; 17],
            values: values.to_vec(),
        };
        let mut code = 0_u32;
        let mut index = 0;
        for (length, count) in (1..).zip(counts) {
            table.offsets[length] = index as i32 - code as i32;
            for _ in 0..*count {
                if code >> length != 0 {
                    return None;
                }
                if length as u32 <= FAST_BITS {
                    let free = FAST_BITS - length as u32;
                    let first = (code << free) as usize;
                    let entry = (length as u16) << 8 | u16::from(values[index]);
                    table.fast[first..first + (1 << free)].fill(entry);
                }
                code += 1;
                index += 1;
            }
            if code > 1 << length {
                return None;
            }
            table.ends[length] = code << (16 - length);
            code <<= 1;
        }
        Some(table)
    }
}

/// Bits of the data between two restart marks.
pub(super) struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    /// The next bits, highest first.
    held: u64,
    count: u32,
    /// How many of the held bits are made up, after the end.
    made_up: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self {
            data,
            at: 0,
            held: 0,
            count: 0,
            made_up: 0,
        }
    }

    fn fill(&mut self) {
        while self.count <= 56 {
            let byte = self.data.get(self.at).copied();
            // A zero is stuffed after 0xff.
            self.at += if byte == Some(0xff) { 2 } else { 1 };
            if byte.is_none() {
                self.made_up += 8;
            }
            self.held |= u64::from(byte.unwrap_or(0)) << (56 - self.count);
            self.count += 8;
        }
    }

    fn skip(&mut self, count: u32) -> Result<(), Broken> {
        self.held <<= count;
        self.count -= count;
        if self.count < self.made_up {
            return Err(Broken);
        }
        Ok(())
    }

    /// The next `count` bits, 16 at most.
    pub(super) fn take(&mut self, count: u32) -> Result<u32, Broken> {
        if count == 0 {
            return Ok(0);
        }
        if self.count < count {
            self.fill();
        }
        let bits = (self.held >> (64 - count)) as u32;
        self.skip(count).map(|()| bits)
    }

    /// A number of `size` bits with its sign. Source: T.81, F.2.2.1.
    pub(super) fn signed(&mut self, size: u32) -> Result<i32, Broken> {
        let bits = self.take(size)? as i32;
        Ok(if size > 0 && bits < 1 << (size - 1) {
            bits - (1 << size) + 1
        } else {
            bits
        })
    }

    /// The next symbol of a table.
    pub(super) fn symbol(&mut self, table: &HuffmanTable) -> Result<u8, Broken> {
        if self.count < 16 {
            self.fill();
        }
        let entry = table.fast[(self.held >> (64 - FAST_BITS)) as usize];
        if entry != 0 {
            return self.skip(u32::from(entry >> 8)).map(|()| entry as u8);
        }
        let bits = (self.held >> 48) as u32;
        let length = (1..=16)
            .find(|length| bits < table.ends[*length])
            .ok_or(Broken)?;
        let index = (bits >> (16 - length)) as i32 + table.offsets[length];
        let value = usize::try_from(index).ok();
        let value = value.and_then(|index| table.values.get(index).copied());
        self.skip(length as u32)?;
        value.ok_or(Broken)
    }

    /// Whole bytes that were not taken, about: stuffed zeros may count or not.
    pub(super) fn left(&self) -> &'a [u8] {
        let held = (self.count.saturating_sub(self.made_up) / 8) as usize;
        let from = self.at.min(self.data.len()).saturating_sub(held);
        &self.data[from..]
    }
}
