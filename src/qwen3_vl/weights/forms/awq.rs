//! AutoAWQ's `gemm` layout: `X.qweight` `[in, out / 8]`, `X.qzeros` `[in / group, out / 8]`, `X.scales`
//! `[in / group, out]`; eight values of a word are of outputs 0, 2, 4, 6, 1, 3, 5, 7.
//!
//! Source: `dequantize_gemm`, AutoAWQ, `awq/utils/packing_utils.py`.

use safetensors::Dtype;
use serde_json::json;

use super::super::{
    WeightsError,
    stored::{Decode, Groups, groups_fit},
};
use super::{
    FLOATS, Taken,
    affine::{Affine, GroupOf},
    config::{Keys, LeftOut},
    dims, expect,
    numbers::{Floats, Round, Slice},
    wrong,
};
use crate::ops::quantised::Format;

/// Place in a word of the value of output `o % 8`.
const PLACE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// What the config says.
pub(in super::super) struct Awq {
    group: usize,
    zero_point: bool,
    left_out: LeftOut,
}

impl Awq {
    /// Reads the keys.
    pub(super) fn read(keys: &Keys<'_>) -> Result<Self, WeightsError> {
        for key in ["bits", "w_bit"] {
            keys.only(key, &[json!(4)])?;
        }
        for key in ["version", "format", "checkpoint_format"] {
            keys.only(key, &[json!("gemm"), json!("GEMM")])?;
        }
        keys.only("pack_dtype", &[json!("int32")])?;
        keys.only("desc_act", &[json!(false)])?;
        // How AutoAWQ, GPTQModel and vLLM compute, and how the weights were found.
        keys.without_effect(&[
            "backend",
            "do_fuse",
            "exllama_config",
            "fuse_max_seq_len",
            "modules_to_fuse",
            "meta",
            "method",
            "quantizer",
            "sym",
            "lm_head",
            "quant_method",
            "act_group_aware",
            "batch_size",
            "block_name_to_quantize",
            "cache_block_outputs",
            "damp_percent",
            "dataset",
            "max_input_length",
            "model_seqlen",
            "module_name_preceding_first_block",
            "modules_in_block_to_quantize",
            "pad_token_id",
            "tokenizer",
            "true_sequential",
            "use_cuda_fp16",
            "exllama_version",
            "disable_exllama",
            "use_exllama",
            "static_groups",
            "uuid",
            "mse",
            "gptaq",
            "hyb_act",
        ]);
        let group = match keys.number("group_size")?.or(keys.number("q_group_size")?) {
            Some(0) => return Err(keys.value("group_size", "a positive number or -1")),
            group => group.unwrap_or(128),
        };
        Ok(Self {
            group,
            zero_point: keys.flag("zero_point")?.unwrap_or(true),
            left_out: LeftOut::read(keys, "modules_to_not_convert")?,
        })
    }

    /// Puts the matrices together.
    pub(super) fn take(&self, taken: &mut Taken<'_>) -> Result<(), WeightsError> {
        for layer in taken.layers("qweight") {
            let qweight = taken.part(&layer, "qweight")?;
            let scales = taken.part(&layer, "scales")?;
            let qzeros = match self.zero_point {
                true => Some(taken.part(&layer, "qzeros")?),
                false => taken.optional(&layer, "qzeros"),
            };
            self.left_out.check(&layer, &qweight)?;
            let [inputs, words] = dims(&qweight)?;
            expect(&qweight, &[Dtype::I32], &[inputs, words])?;
            let outputs = words * 8;
            let group = self.group.min(inputs);
            if inputs % group != 0 {
                return Err(wrong(&qweight, format!("whole groups of {group} inputs")));
            }
            expect(&scales, &FLOATS, &[inputs / group, outputs])?;
            if let Some(qzeros) = &qzeros {
                expect(qzeros, &[Dtype::I32], &[inputs / group, words])?;
            }
            let (Some(values), Some(floats)) = (Slice::of(&qweight), Floats::of(&scales)) else {
                return Err(wrong(&scales, "floats"));
            };
            let decoder = Rows {
                values,
                // Symmetric weights have the middle of the range as their zero.
                zeros: qzeros.as_ref().and_then(Slice::of),
                round: floats.rounding(),
                scales: floats,
                inputs,
                outputs,
                group,
            };
            taken.put(&layer, &qweight, [outputs, inputs], decoder);
        }
        Ok(())
    }
}

struct Rows {
    values: Slice,
    zeros: Option<Slice>,
    scales: Floats,
    round: Round,
    inputs: usize,
    outputs: usize,
    group: usize,
}

impl Rows {
    /// The four bits of an output in a row of words.
    fn nibble(&self, slice: &Slice, row: usize, output: usize) -> u32 {
        let word = slice.word(row * (self.outputs / 8) + output / 8);
        (word >> (4 * PLACE[output % 8])) & 15
    }

    /// The zero point of an output in a group.
    fn zero(&self, group: usize, output: usize) -> f32 {
        match &self.zeros {
            Some(zeros) => self.nibble(zeros, group, output) as f32,
            None => 8.0,
        }
    }

    fn scale(&self, group: usize, output: usize) -> f32 {
        self.scales.get(group * self.outputs + output)
    }
}

impl Decode for Rows {
    fn keeps(&self, format: Format) -> bool {
        let is_symmetric = || {
            let mut all = (0..self.inputs / self.group)
                .flat_map(|group| (0..self.outputs).map(move |output| (group, output)));
            all.all(|(group, output)| self.zero(group, output) == 8.0)
        };
        format.bits() == 4
            && groups_fit(self.group, self.inputs, format)
            && self.scales.fit_f16()
            && (!format.is_symmetric() || is_symmetric())
    }

    fn levels(&self, row: usize, format: Format, levels: &mut [u32], groups: Groups<'_>) {
        for (input, level) in levels.iter_mut().enumerate() {
            *level = self.nibble(&self.values, input, row);
        }
        groups.fill(
            format,
            self.inputs,
            |input| self.scale(input / self.group, row),
            |input| self.zero(input / self.group, row),
        );
    }

    fn rows(&self, first: usize, out: &mut [f32]) {
        let count = out.len() / self.inputs;
        // A word has eight outputs: those of one group of inputs and all outputs are copied together.
        let (start, end) = (first / 8, (first + count).div_ceil(8));
        let mut words = Vec::new();
        let mut numbers = vec![0; self.group];
        for group in 0..self.inputs / self.group {
            let inputs = group * self.group..(group + 1) * self.group;
            words.clear();
            for input in inputs.clone() {
                let row = input * (self.outputs / 8);
                words.extend(self.values.words(row + start, end - start));
            }
            for at in 0..count {
                let output = first + at;
                let shift = 4 * PLACE[output % 8];
                let own = words[output / 8 - start..].iter().step_by(end - start);
                for (number, word) in numbers.iter_mut().zip(own) {
                    *number = (word >> shift & 15) as u8;
                }
                let pair = [(self.scale(group, output), self.zero(group, output))];
                let row = Affine::new(4, self.round, &pair, GroupOf::Columns(self.group));
                row.values(0, &numbers, &mut out[at * self.inputs..][inputs.clone()]);
            }
        }
    }
}
