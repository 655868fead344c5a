//! compressed-tensors, as llm-compressor writes them: integers packed in words (`pack-quantized`), bytes
//! (`int-quantized`) and fp8 (`float-quantized`), with a scale for a matrix, row, group or block.
//!
//! Source: `compressed_tensors` 0.20: `compressors/`, `quantization/lifecycle/forward_helpers.py`.

use std::rc::Rc;

use safetensors::Dtype;
use serde_json::json;

use super::super::{
    WeightsError,
    stored::{Decode, Groups, RawTensor, groups_fit},
};
use super::{
    FLOATS, Taken,
    affine::{Affine, GroupOf, unpack},
    config::{Keys, LeftOut, Pattern},
    dims, expect,
    gptq::numbers,
    numbers::{Floats, Round, Slice, field},
    scaled::{Element, Grid, Scaled},
    wrong,
};
use crate::ops::quantised::Format;

/// What the config says.
pub(in super::super) struct CompressedTensors {
    groups: Vec<Group>,
    left_out: LeftOut,
}

/// Layers that are quantised in the same way.
struct Group {
    targets: Vec<String>,
    patterns: Vec<Pattern>,
    weights: Option<Rc<Weights>>,
    has_activations: bool,
}

/// How weights are quantised.
struct Weights {
    bits: usize,
    is_float: bool,
    symmetric: bool,
    strategy: Strategy,
}

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strategy {
    Tensor,
    Channel,
    Group(usize),
    Block([usize; 2]),
}

const FORMATS: [&str; 4] = [
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
];

impl CompressedTensors {
    /// Reads the keys.
    pub(super) fn read(keys: &Keys<'_>) -> Result<Self, WeightsError> {
        // Which of them a matrix has is seen from its tensors.
        let formats: Vec<_> = FORMATS.iter().map(|format| json!(format)).collect();
        let with_mixed: Vec<_> = formats
            .iter()
            .cloned()
            .chain([json!("mixed-precision"), json!("dense")])
            .collect();
        keys.only("format", &with_mixed)?;
        keys.only(
            "quantization_status",
            &[json!("compressed"), json!("frozen")],
        )?;
        keys.without_effect(&[
            "quant_method",
            "global_compression_ratio",
            "version",
            "run_compressed",
            "dequantize",
            "use_optimized_inference",
            // A cache of keys and values in fp8 saves memory at some loss; here `--kv-cache` chooses.
            "kv_cache_scheme",
        ]);
        for key in ["sparsity_config", "transform_config", "moe_sparsity_config"] {
            match keys.object(key)? {
                Some(inner) if !inner.is_idle() => {
                    return Err(keys.value(key, "nothing, or a dense format"));
                }
                _ => {}
            }
        }
        let mut groups = Vec::new();
        for group in keys.objects("config_groups")? {
            group.only("format", &formats)?;
            group.without_effect(&["output_activations"]);
            let targets = group.names("targets")?;
            let patterns = targets
                .iter()
                .map(|target| {
                    Pattern::new(target)
                        .ok_or_else(|| group.value("targets", "names, or expressions after `re:`"))
                })
                .collect::<Result<_, _>>()?;
            let weights = match group.object("weights")? {
                Some(weights) => Some(Rc::new(Weights::read(&weights)?)),
                None => None,
            };
            groups.push(Group {
                targets,
                patterns,
                weights,
                has_activations: group.get("input_activations").is_some(),
            });
            group.finish()?;
        }
        Ok(Self {
            groups,
            left_out: LeftOut::read(keys, "ignore")?,
        })
    }

    /// Whether activations were meant to be quantised too.
    pub(super) fn has_activations(&self) -> bool {
        self.groups.iter().any(|group| group.has_activations)
    }

    /// The way a layer is quantised: a group that names it, else one for all linear layers.
    fn weights_of(&self, layer: &str, tensor: &RawTensor) -> Result<Rc<Weights>, WeightsError> {
        let in_file = tensor.key.rsplit_once('.').map_or("", |(layer, _)| layer);
        let named = |group: &&Group| {
            let mut patterns = group.patterns.iter();
            patterns.any(|pattern| pattern.fits(layer) || pattern.fits(in_file))
        };
        let class = |group: &&Group| group.targets.iter().any(|target| target == "Linear");
        let found = self
            .groups
            .iter()
            .find(named)
            .or(self.groups.iter().find(class));
        found
            .and_then(|group| group.weights.clone())
            .ok_or_else(|| WeightsError::Quantization {
                path: tensor.file.path().to_path_buf(),
                reason: format!(
                    "tensor `{}` is quantised, but no group in `quantization_config.config_groups` says how; do both belong to one checkpoint?",
                    tensor.key
                ),
            })
    }

    /// Puts the matrices together.
    pub(super) fn take(&self, taken: &mut Taken<'_>) -> Result<(), WeightsError> {
        for layer in taken.layers("weight_packed") {
            let packed = taken.part(&layer, "weight_packed")?;
            self.left_out.check(&layer, &packed)?;
            let weights = self.weights_of(&layer, &packed)?;
            weights.packed(taken, &layer, packed)?;
        }
        for layer in taken.layers("weight_scale") {
            let weight = taken.part(&layer, "weight")?;
            self.left_out.check(&layer, &weight)?;
            let weights = self.weights_of(&layer, &weight)?;
            weights.bytes(taken, &layer, weight)?;
        }
        // Scales of activations, and of keys and values, which are not quantised here.
        for ending in [
            "input_scale",
            "input_zero_point",
            "output_scale",
            "k_scale",
            "v_scale",
            "q_scale",
        ] {
            for layer in taken.layers(ending) {
                taken.optional(&layer, ending);
            }
        }
        Ok(())
    }
}

impl Weights {
    fn read(keys: &Keys<'_>) -> Result<Self, WeightsError> {
        let bits = match keys.number("num_bits")? {
            Some(bits @ 1..=8) => bits,
            _ => return Err(keys.value("num_bits", "1 to 8")),
        };
        keys.only("type", &[json!("int"), json!("float")])?;
        let is_float = keys.text("type")?.as_deref() == Some("float");
        if is_float && bits != 8 {
            return Err(keys.value("num_bits", "8 with the type float"));
        }
        keys.only("dynamic", &[json!(false)])?;
        // How the scales were found, and their type, which is in the file.
        keys.without_effect(&[
            "observer",
            "observer_kwargs",
            "actorder",
            "scale_dtype",
            "zp_dtype",
        ]);
        let group = keys.number("group_size")?;
        let block = keys.get("block_structure");
        let sizes = |value: &serde_json::Value| {
            let list: Option<Vec<usize>> = match value {
                serde_json::Value::String(text) => {
                    text.split('x').map(|size| size.parse().ok()).collect()
                }
                other => other.as_array().and_then(|sizes| {
                    sizes
                        .iter()
                        .map(|size| usize::try_from(size.as_u64()?).ok())
                        .collect()
                }),
            };
            match list.as_deref() {
                Some([rows, columns]) if *rows > 0 && *columns > 0 => Some([*rows, *columns]),
                _ => None,
            }
        };
        let strategy = match (keys.text("strategy")?.as_deref(), group) {
            (Some("tensor"), _) => Strategy::Tensor,
            (Some("channel"), _) | (None | Some("group"), Some(usize::MAX)) => Strategy::Channel,
            (None | Some("group"), Some(group)) if group > 0 => Strategy::Group(group),
            (Some("block"), _) => match block.and_then(sizes) {
                Some(block) => Strategy::Block(block),
                None => return Err(keys.value("block_structure", "two sizes, such as [128, 128]")),
            },
            (None, None) => Strategy::Tensor,
            _ => {
                return Err(keys.value(
                    "strategy",
                    "tensor, channel, group (with its size) or block",
                ));
            }
        };
        let symmetric = keys.flag("symmetric")?.unwrap_or(true);
        keys.finish()?;
        Ok(Self {
            bits,
            is_float,
            symmetric,
            strategy,
        })
    }

    /// Blocks of a matrix, and how many there are down and across.
    fn grid(&self, rows: usize, columns: usize) -> (Grid, [usize; 2]) {
        let [block_rows, block_columns] = match self.strategy {
            Strategy::Tensor => [rows, columns],
            Strategy::Channel => [1, columns],
            Strategy::Group(group) => [1, group],
            Strategy::Block(block) => block,
        };
        let (down, across) = (rows.div_ceil(block_rows), columns.div_ceil(block_columns));
        let grid = Grid {
            rows: block_rows,
            columns: block_columns,
            across,
        };
        (grid, [down, across])
    }

    /// The scales of a matrix.
    fn scales(
        &self,
        taken: &mut Taken<'_>,
        layer: &str,
        [down, across]: [usize; 2],
    ) -> Result<Floats, WeightsError> {
        let scales = taken.part(layer, "weight_scale")?;
        let (dtype, shape, _) = scales.stored()?;
        let fits = FLOATS.contains(&dtype)
            && shape.iter().product::<usize>() == down * across
            && (shape.len() < 2 || shape == [down, across]);
        match Floats::of(&scales) {
            Some(floats) if fits => Ok(floats),
            _ => Err(wrong(&scales, format!("floats [{down}, {across}]"))),
        }
    }

    /// Bytes or small floats, stored as `weight`.
    fn bytes(
        &self,
        taken: &mut Taken<'_>,
        layer: &str,
        weight: RawTensor,
    ) -> Result<(), WeightsError> {
        let [rows, columns] = dims(&weight)?;
        let expected: &[Dtype] = match self.is_float {
            true => &[Dtype::F8_E4M3, Dtype::F8_E5M2],
            false => &[Dtype::I8],
        };
        expect(&weight, expected, &[rows, columns])?;
        let (grid, blocks) = self.grid(rows, columns);
        let scales = self.scales(taken, layer, blocks)?;
        let zeros = match taken.optional(layer, "weight_zero_point") {
            Some(zeros) if !self.symmetric && !self.is_float => {
                let (dtype, shape, _) = zeros.stored()?;
                if dtype != Dtype::I8 || shape.iter().product::<usize>() != blocks[0] * blocks[1] {
                    return Err(wrong(&zeros, format!("I8 {blocks:?}")));
                }
                Slice::of(&zeros)
            }
            // Older files hold zeros for symmetric weights too.
            _ => None,
        };
        let element = Element::of(weight.stored()?.0);
        let (Some(values), Some(element)) = (Slice::of(&weight), element) else {
            return Err(wrong(&weight, "bytes"));
        };
        let round = scales.rounding();
        let decoder = Scaled::new(values, columns, element, scales, grid, round).with_zeros(zeros);
        taken.put(layer, &weight, [rows, columns], decoder);
        Ok(())
    }

    /// Integers packed in words, stored as `weight_packed`.
    fn packed(
        &self,
        taken: &mut Taken<'_>,
        layer: &str,
        packed: RawTensor,
    ) -> Result<(), WeightsError> {
        let shape = taken.part(layer, "weight_shape")?;
        let [rows, words] = dims(&packed)?;
        expect(&packed, &[Dtype::I32], &[rows, words])?;
        expect(&shape, &[Dtype::I64, Dtype::I32], &[2])?;
        let sizes = numbers(&shape)?;
        let columns = match sizes.as_slice() {
            [found, columns]
                if *found == rows as i64
                    && (1..=words as i64 * 32).contains(columns)
                    && (*columns as usize * self.bits).div_ceil(32) == words =>
            {
                *columns as usize
            }
            _ => {
                return Err(wrong(
                    &packed,
                    format!("words of {} bits for {sizes:?}", self.bits),
                ));
            }
        };
        if self.is_float || matches!(self.strategy, Strategy::Block(_)) {
            return Err(wrong(&packed, "bytes, as the config says"));
        }
        let (grid, blocks) = self.grid(rows, columns);
        let scales = self.scales(taken, layer, blocks)?;
        let zeros = match taken.optional(layer, "weight_zero_point") {
            Some(zeros) if !self.symmetric => {
                expect(
                    &zeros,
                    &[Dtype::I32],
                    &[(blocks[0] * self.bits).div_ceil(32), blocks[1]],
                )?;
                Slice::of(&zeros)
            }
            None if !self.symmetric => {
                return Err(wrong(&packed, "its `weight_zero_point` beside it"));
            }
            _ => None,
        };
        let order = match taken.optional(layer, "weight_g_idx") {
            None => None,
            Some(g_idx) => {
                expect(&g_idx, &[Dtype::I32, Dtype::I64], &[columns])?;
                let order = numbers(&g_idx)?;
                // -1 everywhere stands for the plain order.
                if order.iter().all(|group| *group == -1) {
                    None
                } else if order
                    .iter()
                    .all(|group| (0..blocks[1] as i64).contains(group))
                {
                    Some(order.into_iter().map(|group| group as u32).collect())
                } else {
                    return Err(wrong(&g_idx, format!("groups below {}", blocks[1])));
                }
            }
        };
        let Some(values) = Slice::of(&packed) else {
            return Err(wrong(&packed, "words"));
        };
        let decoder = Packed {
            bits: self.bits,
            values,
            words,
            columns,
            round: scales.rounding(),
            scales,
            zeros,
            order,
            grid,
        };
        taken.put(layer, &packed, [rows, columns], decoder);
        Ok(())
    }
}

/// `(value - zero) · scale` of integers packed along a row.
struct Packed {
    bits: usize,
    values: Slice,
    words: usize,
    columns: usize,
    scales: Floats,
    round: Round,
    /// Packed along the rows.
    zeros: Option<Slice>,
    /// Group of each column, where they are not in order.
    order: Option<Vec<u32>>,
    grid: Grid,
}

impl Packed {
    /// The zero point of a block of rows in a group.
    fn zero(&self, block: usize, group: usize) -> f32 {
        match &self.zeros {
            Some(zeros) => {
                let at = block * self.bits;
                field(zeros, group, self.grid.across, at, self.bits) as f32
            }
            None => (1u32 << (self.bits - 1)) as f32,
        }
    }
}

impl Decode for Packed {
    fn keeps(&self, format: Format) -> bool {
        self.bits == format.bits()
            && (self.zeros.is_none() || !format.is_symmetric())
            && self.order.is_none()
            && groups_fit(self.grid.columns, self.columns, format)
            && (format == Format::Int8 || self.scales.fit_f16())
    }

    fn levels(&self, row: usize, format: Format, levels: &mut [u32], groups: Groups<'_>) {
        for (column, level) in levels.iter_mut().enumerate() {
            let first = row * self.words;
            *level = field(&self.values, first, 1, column * self.bits, self.bits);
        }
        let block = row / self.grid.rows;
        groups.fill(
            format,
            self.columns,
            |column| {
                let group = column / self.grid.columns;
                self.scales.get(block * self.grid.across + group)
            },
            |column| self.zero(block, column / self.grid.columns),
        );
    }

    fn rows(&self, first: usize, out: &mut [f32]) {
        let mut groups = vec![(0.0, 0.0); self.grid.across];
        let mut numbers = vec![0; self.columns];
        let of = match &self.order {
            Some(order) => GroupOf::Order(order),
            None => GroupOf::Columns(self.grid.columns),
        };
        for (row, out) in (first..).zip(out.chunks_mut(self.columns)) {
            let block = row / self.grid.rows;
            for (at, group) in groups.iter_mut().enumerate() {
                let scale = self.scales.get(block * self.grid.across + at);
                *group = (scale, self.zero(block, at));
            }
            let words = self.values.words(row * self.words, self.words);
            unpack(words, self.bits, &mut numbers);
            Affine::new(self.bits, self.round, &groups, of).values(0, &numbers, out);
        }
    }
}
