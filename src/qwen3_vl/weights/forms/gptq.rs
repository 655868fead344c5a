//! AutoGPTQ's and GPTQModel's layout: `X.qweight` `[in · bits / 32, out]`, `X.qzeros` `[groups, out · bits /
//! 32]`, `X.scales` `[groups, out]` and, where inputs were ordered by activation, `X.g_idx` `[in]`.
//!
//! Version 1 (`gptq`) stores each zero point less one, version 2 (`gptq_v2`) as it is.
//!
//! Source: `PackableQuantLinear.dequantize_weight` and `convert_gptq_v1_to_v2_format_module`, GPTQModel.

use safetensors::Dtype;
use serde_json::json;

use super::super::{
    WeightsError,
    stored::{Decode, Groups, groups_fit},
};
use super::{
    FLOATS, Taken,
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
    minus_one: bool,
    left_out: LeftOut,
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
        let minus_one = format.as_deref() != Some("gptq_v2");
        if minus_one && bits == 3 {
            return Err(keys.value("checkpoint_format", "`gptq_v2` with 3 bits"));
        }
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
            "sym",
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
            minus_one,
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
            let decoder = Rows {
                bits: self.bits,
                values,
                zeros,
                minus_one: self.minus_one,
                round: floats.rounding(),
                scales: floats,
                order,
                inputs,
                outputs,
                group,
                groups,
            };
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

/// Inputs of all rows that are read before the next.
const AT_ONCE: usize = 128;

struct Rows {
    bits: usize,
    values: Slice,
    zeros: Slice,
    minus_one: bool,
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
    /// word, and carries from a field that is full into the next.
    fn zero(&self, group: usize, output: usize) -> f32 {
        let row = group * (self.outputs * self.bits / 32);
        let at = output * self.bits;
        if !self.minus_one {
            return field(&self.zeros, row, 1, at, self.bits) as f32;
        }
        let mask = (1u32 << self.bits) - 1;
        let word = self.zeros.word(row + at / 32).wrapping_add(u32::MAX / mask);
        ((word >> (at % 32)) & mask) as f32
    }
}

impl Decode for Rows {
    fn keeps(&self, format: Format) -> bool {
        let middle = (1u32 << (self.bits - 1)) as f32;
        let is_symmetric = || {
            let mut all = (0..self.groups)
                .flat_map(|group| (0..self.outputs).map(move |output| (group, output)));
            all.all(|(group, output)| self.zero(group, output) == middle)
        };
        let in_order = |order: &Vec<u32>| {
            let mut order = order.iter().enumerate();
            order.all(|(input, group)| input / self.group == *group as usize)
        };
        self.bits == format.bits()
            && self.order.as_ref().is_none_or(in_order)
            && groups_fit(self.group, self.inputs, format)
            && (format == Format::Int8 || self.scales.fit_f16())
            && (!format.is_symmetric() || is_symmetric())
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
        let scales: Vec<(f32, f32)> = (first..first + count).flat_map(of_output).collect();
        // Neighbours of a word belong to other outputs: some inputs of all of them share the cache.
        for start in (0..self.inputs).step_by(AT_ONCE) {
            let end = (start + AT_ONCE).min(self.inputs);
            for at in 0..count {
                let scales = &scales[at * self.groups..][..self.groups];
                let row = &mut out[at * self.inputs..][..self.inputs];
                for (input, out) in (start..end).zip(&mut row[start..end]) {
                    let group = match &self.order {
                        Some(order) => order[input] as usize,
                        None => input / self.group,
                    };
                    let (scale, zero) = scales[group];
                    let place = input * self.bits;
                    let value = field(&self.values, first + at, self.outputs, place, self.bits);
                    *out = self.round.apply((value as f32 - zero) * scale);
                }
            }
        }
    }
}
