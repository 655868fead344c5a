//! AutoGPTQ's and GPTQModel's layout: `X.qweight` `[in · bits / 32, out]`, `X.qzeros` `[groups, out · bits /
//! 32]`, `X.scales` `[groups, out]` and, where inputs were ordered by activation, `X.g_idx` `[in]`.
//!
//! Version 1 (`gptq`) stores each zero point less one, version 2 (`gptq_v2`) as it is. With 3 bits there are two
//! versions 1: GPTQModel before 6.1 took other numbers off its words, and files that it wrote need these back.
//!
//! Source: `PackableQuantLinear.dequantize_weight` and `convert_gptq_v1_to_v2_format_module`, GPTQModel 7.3; its
//! release 6.0 for the older files of 3 bits.

use safetensors::Dtype;
use serde_json::json;

use super::super::{
    WeightsError,
    stored::{Decode, Groups, groups_fit},
};
use super::{
    FLOATS, Taken,
    affine::{Affine, GroupOf, unpack},
    config::{Keys, LeftOut},
    dims, expect,
    numbers::{Floats, Round, Slice, field},
    wrong,
};
use crate::ops::quantised::Format;

/// What the config says.
pub(in super::super) struct Gptq {
    /// Bits of a value.
    pub(super) bits: usize,
    group: usize,
    zeros: ZeroPoints,
    /// Symmetric weights have the middle of the range as their zero, which tells the two versions 1 apart.
    symmetric: bool,
    left_out: LeftOut,
}

/// How zero points are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ZeroPoints {
    /// As they are (version 2).
    AsTheyAre,
    /// Each less one (version 1).
    LessOne,
    /// Words of 3-bit fields less [`OLDER_3_BITS`].
    OlderWords,
}

/// What GPTQModel before 6.1 took off the words of 3-bit zero points, three words in turn. It meant one of each
/// field, but the first and the last are exchanged.
const OLDER_3_BITS: [u32; 3] = [0x2492_4924, 0x9249_2492, 0x4924_9249];

/// The first release of GPTQModel that takes one off each field of 3 bits.
const LOGICAL_3_BITS: [usize; 2] = [6, 1];

/// Whether a release of GPTQModel before [`LOGICAL_3_BITS`] is among the programs in `meta.quantizer`, which are
/// `name:version`.
fn older_gptqmodel(meta: Option<&serde_json::Value>) -> bool {
    let programs = match meta.and_then(|meta| meta.get("quantizer")) {
        Some(serde_json::Value::Array(programs)) => programs.clone(),
        Some(one) => vec![one.clone()],
        None => Vec::new(),
    };
    programs.iter().filter_map(|one| one.as_str()).any(|one| {
        let Some(version) = one.strip_prefix("gptqmodel:") else {
            return false;
        };
        let mut numbers = version.split(['.', '-', '+']).map(str::parse::<usize>);
        let mut number = || numbers.next().and_then(Result::ok).unwrap_or(0);
        [number(), number()] < LOGICAL_3_BITS
    })
}

impl Gptq {
    /// Reads the keys.
    pub(super) fn read(keys: &Keys<'_>) -> Result<Self, WeightsError> {
        let bits = match keys.number("bits")? {
            Some(bits @ (2 | 3 | 4 | 8)) => bits,
            _ => return Err(keys.value("bits", "2, 3, 4 or 8")),
        };
        let group = match keys.number("group_size")? {
            Some(0) => return Err(keys.value("group_size", "a positive number or -1")),
            group => group.unwrap_or(128),
        };
        let formats = [json!("gptq"), json!("gptq_v2")];
        keys.only("format", &formats)?;
        keys.only("checkpoint_format", &formats)?;
        keys.only("pack_dtype", &[json!("int32")])?;
        keys.only("is_marlin_format", &[json!(false)])?;
        let format = keys.text("checkpoint_format")?.or(keys.text("format")?);
        let zeros = match format.as_deref() {
            Some("gptq_v2") => ZeroPoints::AsTheyAre,
            _ if bits == 3 && older_gptqmodel(keys.get("meta")) => ZeroPoints::OlderWords,
            _ => ZeroPoints::LessOne,
        };
        let symmetric = keys.flag("sym")?.unwrap_or(false);
        // Exceptions of single layers: those that are left out have no `qweight`; others need their own sizes.
        if let Some(dynamic) = keys.get("dynamic") {
            let leaves_out = |(name, rule): (&String, &serde_json::Value)| {
                name.starts_with("-:") || rule.as_object().is_some_and(serde_json::Map::is_empty)
            };
            if !dynamic
                .as_object()
                .is_some_and(|rules| rules.iter().all(leaves_out))
            {
                return Err(keys.value("dynamic", "only layers that are left out (`-:…`)"));
            }
        }
        // How the weights were found, and how other programs compute. Symmetry and the order of inputs are
        // in the tensors.
        keys.without_effect(&[
            "quant_method",
            "desc_act",
            "static_groups",
            "true_sequential",
            "damp_percent",
            "damp_auto_increment",
            "lm_head",
            "meta",
            "mse",
            "dataset",
            "tokenizer",
            "batch_size",
            "backend",
            "use_cuda_fp16",
            "model_seqlen",
            "block_name_to_quantize",
            "module_name_preceding_first_block",
            "modules_in_block_to_quantize",
            "pad_token_id",
            "max_input_length",
            "cache_block_outputs",
            "act_group_aware",
            "exllama_config",
            "disable_exllama",
            "use_exllama",
            "model_name_or_path",
            "model_file_base_name",
            "method",
            "quantizer",
            "hyb_act",
            "gptaq",
            "uuid",
            "fail_safe",
            "offload_to_disk",
            "offload_to_disk_path",
            "rotation",
            "adapter",
            "parallel_packing",
            "hyb_act_group",
            // AutoRound, writing this layout.
            "autoround_version",
            "enable_minmax_tuning",
            "enable_norm_bias_tuning",
            "enable_quanted_input",
            "gradient_accumulate_steps",
            "iters",
            "low_gpu_mem_usage",
            "lr",
            "minmax_lr",
            "nsamples",
            "scale_dtype",
            "seqlen",
            "to_quant_block_names",
        ]);
        Ok(Self {
            bits,
            group,
            zeros,
            symmetric,
            left_out: LeftOut::read(keys, "modules_to_not_convert")?,
        })
    }

    /// Puts the matrices together.
    pub(super) fn take(&self, taken: &mut Taken<'_>) -> Result<(), WeightsError> {
        for layer in taken.layers("qweight") {
            let qweight = taken.part(&layer, "qweight")?;
            let qzeros = taken.part(&layer, "qzeros")?;
            let scales = taken.part(&layer, "scales")?;
            let g_idx = taken.optional(&layer, "g_idx");
            self.left_out.check(&layer, &qweight)?;
            let [words, outputs] = dims(&qweight)?;
            expect(&qweight, &[Dtype::I32], &[words, outputs])?;
            let inputs = words.saturating_mul(32) / self.bits;
            let group = self.group.min(inputs);
            let groups = inputs.div_ceil(group);
            if inputs * self.bits != words * 32 || !(outputs * self.bits).is_multiple_of(32) {
                return Err(wrong(
                    &qweight,
                    format!("whole words of {} bits", self.bits),
                ));
            }
            expect(&scales, &FLOATS, &[groups, outputs])?;
            expect(&qzeros, &[Dtype::I32], &[groups, outputs * self.bits / 32])?;
            let order = match &g_idx {
                None => None,
                Some(g_idx) => {
                    expect(g_idx, &[Dtype::I32, Dtype::I64], &[inputs])?;
                    let order = numbers(g_idx)?;
                    if let Some(bad) = order
                        .iter()
                        .find(|number| !(0..groups as i64).contains(number))
                    {
                        return Err(wrong(g_idx, format!("groups below {groups}, not {bad}")));
                    }
                    Some(order.into_iter().map(|group| group as u32).collect())
                }
            };
            let (Some(values), Some(zeros), Some(floats)) =
                (Slice::of(&qweight), Slice::of(&qzeros), Floats::of(&scales))
            else {
                return Err(wrong(&scales, "floats"));
            };
            let mut decoder = Rows {
                bits: self.bits,
                values,
                zeros,
                stored: self.zeros,
                round: floats.rounding(),
                scales: floats,
                order,
                inputs,
                outputs,
                group,
                groups,
            };
            if self.symmetric && self.bits == 3 && self.zeros != ZeroPoints::AsTheyAre {
                // What `meta` says may be of a program that only copied the file.
                let ways = [self.zeros, ZeroPoints::LessOne, ZeroPoints::OlderWords];
                let fits = ways.into_iter().find(|way| {
                    decoder.stored = *way;
                    decoder.is_symmetric()
                });
                if fits.is_none() {
                    return Err(wrong(
                        &qzeros,
                        "the zero point 4 everywhere, as `sym` is true",
                    ));
                }
            }
            taken.put(&layer, &qweight, [outputs, inputs], decoder);
        }
        Ok(())
    }
}

/// The whole numbers of a tensor.
pub(super) fn numbers(tensor: &super::RawTensor) -> Result<Vec<i64>, WeightsError> {
    let (dtype, _, bytes) = tensor.stored()?;
    Ok(match dtype {
        Dtype::I64 => bytes
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
            .collect(),
        Dtype::I32 => bytes
            .chunks_exact(4)
            .map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            .collect(),
        _ => return Err(wrong(tensor, "I32 or I64")),
    })
}

/// Inputs of all rows that are read before the next; their fields fill whole words, whatever their bits.
const AT_ONCE: usize = 128;

struct Rows {
    bits: usize,
    values: Slice,
    zeros: Slice,
    stored: ZeroPoints,
    scales: Floats,
    round: Round,
    /// Group of each input, where they are not in order.
    order: Option<Vec<u32>>,
    inputs: usize,
    outputs: usize,
    group: usize,
    groups: usize,
}

impl Rows {
    /// The zero point of an output in a group. The conversion of version 1 adds one to each field of a
    /// word, and carries from a field that is full into the next; of 3 bits, to each field by itself.
    fn zero(&self, group: usize, output: usize) -> f32 {
        let row = group * (self.outputs * self.bits / 32);
        let (at, mask) = (output * self.bits, (1u32 << self.bits) - 1);
        let plain = || field(&self.zeros, row, 1, at, self.bits);
        let value = match self.stored {
            ZeroPoints::AsTheyAre => plain(),
            ZeroPoints::LessOne if self.bits == 3 => (plain() + 1) & mask,
            ZeroPoints::LessOne => {
                let word = self.zeros.word(row + at / 32).wrapping_add(u32::MAX / mask);
                (word >> (at % 32)) & mask
            }
            ZeroPoints::OlderWords => {
                let word = |number: usize| {
                    let word = self.zeros.word(row + number);
                    u64::from(word.wrapping_add(OLDER_3_BITS[number % 3]))
                };
                let (number, shift) = (at / 32, at % 32);
                let next = if shift > 29 { word(number + 1) } else { 0 };
                ((word(number) | next << 32) >> shift) as u32 & mask
            }
        };
        value as f32
    }

    /// Whether all zero points are the middle of the range.
    fn is_symmetric(&self) -> bool {
        let middle = (1u32 << (self.bits - 1)) as f32;
        let mut all =
            (0..self.groups).flat_map(|group| (0..self.outputs).map(move |output| (group, output)));
        all.all(|(group, output)| self.zero(group, output) == middle)
    }
}

impl Decode for Rows {
    fn keeps(&self, format: Format) -> bool {
        let in_order = |order: &Vec<u32>| {
            let mut order = order.iter().enumerate();
            order.all(|(input, group)| input / self.group == *group as usize)
        };
        self.bits == format.bits()
            && self.order.as_ref().is_none_or(in_order)
            && groups_fit(self.group, self.inputs, format)
            && (format == Format::Int8 || self.scales.fit_f16())
            && (!format.is_symmetric() || self.is_symmetric())
    }

    fn levels(&self, row: usize, format: Format, levels: &mut [u32], groups: Groups<'_>) {
        for (input, level) in levels.iter_mut().enumerate() {
            *level = field(
                &self.values,
                row,
                self.outputs,
                input * self.bits,
                self.bits,
            );
        }
        groups.fill(
            format,
            self.inputs,
            |input| self.scales.get(input / self.group * self.outputs + row),
            |input| self.zero(input / self.group, row),
        );
    }

    fn rows(&self, first: usize, out: &mut [f32]) {
        let count = out.len() / self.inputs;
        let of_output = |output: usize| {
            (0..self.groups).map(move |group| {
                let scale = self.scales.get(group * self.outputs + output);
                (scale, self.zero(group, output))
            })
        };
        let groups: Vec<(f32, f32)> = (first..first + count).flat_map(of_output).collect();
        let of = match &self.order {
            Some(order) => GroupOf::Order(order),
            None => GroupOf::Columns(self.group),
        };
        let rows: Vec<Affine<'_>> = groups
            .chunks_exact(self.groups)
            .map(|groups| Affine::new(self.bits, self.round, groups, of))
            .collect();
        // Neighbours of a word belong to other outputs: words of some inputs and all outputs are copied together.
        let mut words = Vec::new();
        let mut numbers = [0; AT_ONCE];
        for start in (0..self.inputs).step_by(AT_ONCE) {
            let end = (start + AT_ONCE).min(self.inputs);
            words.clear();
            for word in start * self.bits / 32..(end * self.bits).div_ceil(32) {
                words.extend(self.values.words(word * self.outputs + first, count));
            }
            let numbers = &mut numbers[..end - start];
            for (at, row) in rows.iter().enumerate() {
                unpack(
                    words[at..].iter().step_by(count).copied(),
                    self.bits,
                    numbers,
                );
                let out = &mut out[at * self.inputs..][start..end];
                row.values(start, numbers, out);
            }
        }
    }
}
