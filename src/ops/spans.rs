//! Attention mask: which keys each query sees, one range a query, the only form of mask there is.
//!
//! Causal attention, packed samples, padding on either side and full attention inside images are
//! all ranges, so a mask costs memory linear in the tokens.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use burn::{
    prelude::*,
    tensor::{DType, TensorData},
};

/// Added to the score of a hidden key. Finite, so that a row with no visible key stays finite.
const HIDDEN: f32 = -1e30;

/// Visible keys of each query of a batch.
///
/// Device tensors are built at the first call and shared by clones.
#[derive(Debug, Clone)]
pub struct AttentionSpans<B: Backend>(Arc<Table<B>>);

#[derive(Debug)]
struct Table<B: Backend> {
    batch: usize,
    queries: usize,
    keys: usize,
    /// `[first, end)` of each query, row after row; `batch × queries` entries each.
    first: Vec<i32>,
    end: Vec<i32>,
    /// Lengths of consecutive blocks of tokens that see each other and nothing else.
    blocks: Option<Vec<usize>>,
    all_visible: bool,
    device: B::Device,
    ranges: OnceLock<[Tensor<B, 1, Int>; 2]>,
    key_ranges: OnceLock<[Tensor<B, 1, Int>; 2]>,
    bias: OnceLock<Tensor<B, 4>>,
}

impl<B: Backend> AttentionSpans<B> {
    fn new(
        [batch, queries, keys]: [usize; 3],
        ranges: Vec<Range<i32>>,
        blocks: Option<Vec<usize>>,
        device: &B::Device,
    ) -> Self {
        let all_visible = ranges
            .iter()
            .all(|range| range.start == 0 && range.end == keys as i32);
        Self(Arc::new(Table {
            batch,
            queries,
            keys,
            first: ranges.iter().map(|range| range.start).collect(),
            end: ranges.iter().map(|range| range.end).collect(),
            blocks,
            all_visible,
            device: device.clone(),
            ranges: OnceLock::new(),
            key_ranges: OnceLock::new(),
            bias: OnceLock::new(),
        }))
    }

    /// Causal attention inside segments.
    ///
    /// `segments[row][key]` names the sample a token belongs to, negative for padding; the tokens
    /// of one sample are contiguous. A token sees itself and what precedes it in its own segment,
    /// padding sees nothing. The queries are the last `keys - first_query` tokens of a row.
    ///
    /// # Panics
    /// If rows differ in length.
    pub fn causal(segments: &[Vec<i32>], first_query: usize, device: &B::Device) -> Self {
        let keys = segments.first().map_or(0, Vec::len);
        let mut ranges = Vec::with_capacity(segments.len() * (keys - first_query));
        for row in segments {
            assert_eq!(row.len(), keys, "rows of segments differ in length");
            let mut start = 0;
            for (token, segment) in row.iter().enumerate() {
                if token > 0 && row[token - 1] != *segment {
                    start = token as i32;
                }
                if token >= first_query {
                    ranges.push(if *segment < 0 {
                        0..0
                    } else {
                        start..token as i32 + 1
                    });
                }
            }
        }
        let shape = [segments.len(), keys - first_query, keys];
        Self::new(shape, ranges, None, device)
    }

    /// Full attention inside consecutive blocks of one row: the images of a batch.
    pub fn blocks(lengths: &[usize], device: &B::Device) -> Self {
        let mut start = 0;
        let mut ranges = Vec::new();
        for length in lengths {
            let end = start + *length as i32;
            ranges.extend(std::iter::repeat_n(start..end, *length));
            start = end;
        }
        let tokens = ranges.len();
        Self::new([1, tokens, tokens], ranges, Some(lengths.to_vec()), device)
    }

    /// `[batch, queries, keys]`.
    pub fn dims(&self) -> [usize; 3] {
        [self.0.batch, self.0.queries, self.0.keys]
    }

    /// Lengths of the blocks, where attention is full inside blocks.
    pub fn block_lengths(&self) -> Option<&[usize]> {
        self.0.blocks.as_deref()
    }

    /// First visible key and one past the last, `[batch × queries]` each.
    pub fn ranges(&self) -> &[Tensor<B, 1, Int>; 2] {
        let table = &self.0;
        table
            .ranges
            .get_or_init(|| [&table.first, &table.end].map(|values| self.upload(values)))
    }

    /// For each key the first query that sees it and one past the last, `[batch × keys]` each.
    pub fn key_ranges(&self) -> &[Tensor<B, 1, Int>; 2] {
        self.0.key_ranges.get_or_init(|| {
            let table = &self.0;
            let count = table.batch * table.keys;
            let (mut first, mut end) = (vec![0; count], vec![0; count]);
            for row in 0..table.batch {
                for query in 0..table.queries {
                    let at = row * table.queries + query;
                    for key in table.first[at]..table.end[at] {
                        let key = row * table.keys + key as usize;
                        if end[key] == 0 {
                            first[key] = query as i32;
                        }
                        end[key] = query as i32 + 1;
                    }
                }
            }
            [&first, &end].map(|values| self.upload(values))
        })
    }

    fn upload(&self, values: &[i32]) -> Tensor<B, 1, Int> {
        let data = TensorData::new(values.to_vec(), [values.len()]);
        Tensor::from_data(data, (&self.0.device, DType::I32))
    }

    /// What is added to the scores, `[batch, 1, queries, keys]`, f32: 0 or a large negative number;
    /// `None` when every query sees every key.
    pub fn bias(&self) -> Option<Tensor<B, 4>> {
        let table = &self.0;
        if table.all_visible {
            return None;
        }
        let bias = table.bias.get_or_init(|| {
            let per_query = |values: &Tensor<B, 1, Int>| -> Tensor<B, 4, Int> {
                values
                    .clone()
                    .reshape([table.batch, 1, table.queries, 1])
                    .expand([table.batch, 1, table.queries, table.keys])
            };
            let [first, end] = self.ranges();
            let keys: Vec<i32> = (0..table.keys as i32).collect();
            let keys = self.upload(&keys).reshape([1, 1, 1, table.keys]).expand([
                table.batch,
                1,
                table.queries,
                table.keys,
            ]);
            let hidden = keys
                .clone()
                .lower(per_query(first))
                .bool_or(keys.greater_equal(per_query(end)));
            Tensor::zeros(
                [table.batch, 1, table.queries, table.keys],
                (&table.device, DType::F32),
            )
            .mask_fill(hidden, HIDDEN)
        });
        Some(bias.clone())
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn_flex::Flex;

    fn visible(spans: &AttentionSpans<Flex>) -> Vec<bool> {
        let bias = spans.bias().unwrap().into_data();
        bias.iter::<f32>().map(|value| value == 0.0).collect()
    }

    #[test]
    fn a_token_sees_its_own_sample_up_to_itself() {
        let spans = AttentionSpans::<Flex>::causal(
            &[vec![0, 0, 1, 1], vec![-1, 0, 0, -1]],
            0,
            &Default::default(),
        );
        let (t, f) = (true, false);
        assert_eq!(
            visible(&spans),
            [
                [t, f, f, f, t, t, f, f, f, f, t, f, f, f, t, t],
                [f, f, f, f, f, t, f, f, f, t, t, f, f, f, f, f],
            ]
            .concat()
        );
        let [first, end] = spans.key_ranges();
        let ints = |tensor: &Tensor<Flex, 1, Int>| -> Vec<i32> {
            tensor.to_data().iter::<i32>().collect()
        };
        assert_eq!(ints(first), [0, 1, 2, 3, 0, 1, 2, 0]);
        assert_eq!(ints(end), [2, 2, 4, 4, 0, 3, 3, 0]);
    }

    #[test]
    fn queries_after_a_cache_see_all_of_it() {
        let segments = [vec![0; 5]];
        let one = AttentionSpans::<Flex>::causal(&segments, 4, &Default::default());
        assert_eq!(one.dims(), [1, 1, 5]);
        assert!(one.bias().is_none());
        let two = AttentionSpans::<Flex>::causal(&segments, 3, &Default::default());
        assert_eq!(
            visible(&two),
            [true, true, true, true, false, true, true, true, true, true]
        );
    }

    #[test]
    fn images_see_themselves_only() {
        let spans = AttentionSpans::<Flex>::blocks(&[1, 2], &Default::default());
        let (t, f) = (true, false);
        assert_eq!(visible(&spans), [t, f, f, f, t, t, f, t, t]);
        assert_eq!(spans.block_lengths(), Some(&[1, 2][..]));
    }
}
