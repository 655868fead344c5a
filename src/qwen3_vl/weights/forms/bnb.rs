//! bitsandbytes. 4 bits: `X.weight` holds two codes a byte, `X.weight.absmax` a scale a block, itself
//! quantised where `nested_absmax` is there, and `X.weight.quant_state.bitsandbytes__nf4` a JSON text with
//! sizes. 8 bits: `X.weight` in bytes and `X.SCB`, the largest size of each row.
//!
//! Source: `QuantState`, `dequantize_4bit` and `int8_vectorwise_dequant`, bitsandbytes 0.50.

use safetensors::Dtype;
use serde::Deserialize;

use super::super::{
    WeightsError,
    stored::{Decode, RawTensor},
};
use super::{
    Taken,
    affine::look_up,
    config::{Keys, LeftOut},
    dims, expect,
    numbers::{Floats, Round, Slice},
    scaled::{Element, Grid, Scaled},
    wrong,
};

/// 1/127 as bitsandbytes writes it (7.874015718698502e-3), in f32.
const PER_127: f32 = 7.874_016e-3;

/// What the config says.
pub(in super::super) struct BitsAndBytes {
    /// Bits of a value.
    pub(super) bits: usize,
    left_out: LeftOut,
}

impl BitsAndBytes {
    /// Reads the keys.
    pub(super) fn read(keys: &Keys<'_>) -> Result<Self, WeightsError> {
        let either = |first: &str, second: &str| -> Result<bool, WeightsError> {
            let (first, second) = (keys.flag(first)?, keys.flag(second)?);
            Ok(first == Some(true) || second == Some(true))
        };
        let four = either("load_in_4bit", "_load_in_4bit")?;
        let eight = either("load_in_8bit", "_load_in_8bit")?;
        if four == eight {
            return Err(keys.value("load_in_4bit", "true, or `load_in_8bit` true, but not both"));
        }
        keys.only("llm_int8_has_fp16_weight", &[false.into()])?;
        keys.only("bnb_4bit_quant_type", &["nf4".into(), "fp4".into()])?;
        // The rest is in each tensor's own state, or says how bitsandbytes computes.
        keys.without_effect(&[
            "quant_method",
            "bnb_4bit_compute_dtype",
            "bnb_4bit_quant_storage",
            "bnb_4bit_use_double_quant",
            "llm_int8_enable_fp32_cpu_offload",
            "llm_int8_threshold",
        ]);
        Ok(Self {
            bits: if four { 4 } else { 8 },
            left_out: LeftOut::read(keys, "llm_int8_skip_modules")?,
        })
    }

    /// Puts the matrices together.
    pub(super) fn take(&self, taken: &mut Taken<'_>) -> Result<(), WeightsError> {
        for kind in ["nf4", "fp4"] {
            let ending = format!("weight.quant_state.bitsandbytes__{kind}");
            for layer in taken.layers(&ending) {
                let state = taken.part(&layer, &ending)?;
                self.four_bits(taken, &layer, kind, &state)?;
            }
        }
        for layer in taken.layers("SCB") {
            let sizes = taken.part(&layer, "SCB")?;
            let weight = taken.part(&layer, "weight")?;
            let format = taken.optional(&layer, "weight_format");
            self.left_out.check(&layer, &weight)?;
            let [rows, columns] = dims(&weight)?;
            expect(&weight, &[Dtype::I8], &[rows, columns])?;
            expect(&sizes, &[Dtype::F32], &[rows])?;
            // The rows in order; other orders were of kernels of old.
            if let Some(format) = &format
                && !format.stored()?.2.iter().all(|byte| *byte == 0)
            {
                return Err(wrong(format, "0, weights row by row"));
            }
            let (Some(values), Some(scales)) = (Slice::of(&weight), Floats::of(&sizes)) else {
                return Err(wrong(&weight, "bytes"));
            };
            let grid = Grid {
                rows: 1,
                columns,
                across: 1,
            };
            let decoder = Scaled::new(values, columns, Element::I8, scales, grid, Round::F32)
                .with_factor(PER_127);
            taken.put(&layer, &weight, [rows, columns], decoder);
        }
        Ok(())
    }

    fn four_bits(
        &self,
        taken: &mut Taken<'_>,
        layer: &str,
        kind: &str,
        state: &RawTensor,
    ) -> Result<(), WeightsError> {
        let weight = taken.part(layer, "weight")?;
        self.left_out.check(layer, &weight)?;
        let (_, _, text) = state.stored()?;
        let parsed: State = serde_json::from_slice(text)
            .map_err(|cause| wrong(state, format!("sizes as JSON ({cause})")))?;
        let [rows, columns] = match parsed.shape.as_slice() {
            [rows, columns] if *rows > 0 && *columns > 0 => [*rows, *columns],
            _ => return Err(wrong(state, "the shape of a matrix")),
        };
        let count = rows
            .checked_mul(columns)
            .ok_or_else(|| wrong(state, "a smaller shape"))?;
        let round = match parsed.dtype.as_str() {
            "bfloat16" => Round::BF16,
            "float16" => Round::F16,
            "float32" => Round::F32,
            other => return Err(wrong(state, format!("a known dtype, not `{other}`"))),
        };
        if parsed.quant_type != kind || parsed.blocksize == 0 {
            return Err(wrong(state, format!("`{kind}` and a block size")));
        }
        // Codes may be stored as words of any type; it is their bytes that count.
        let (_, _, codes) = weight.stored()?;
        if codes.len() != count.div_ceil(2) {
            return Err(wrong(
                &weight,
                format!("{} bytes for {count} codes", count.div_ceil(2)),
            ));
        }
        let map = taken.part(layer, "weight.quant_map")?;
        expect(&map, &[Dtype::F32], &[16])?;
        let blocks = count.div_ceil(parsed.blocksize);
        let absmax = taken.part(layer, "weight.absmax")?;
        let scales = match (parsed.nested_blocksize, absmax.stored()?.0) {
            (Some(blocksize), Dtype::U8) if blocksize > 0 => {
                expect(&absmax, &[Dtype::U8], &[blocks])?;
                let nested = taken.part(layer, "weight.nested_absmax")?;
                expect(&nested, &[Dtype::F32], &[blocks.div_ceil(blocksize)])?;
                let code = taken.part(layer, "weight.nested_quant_map")?;
                expect(&code, &[Dtype::F32], &[256])?;
                let (Some(codes), Some(absmax), Some(code)) =
                    (Slice::of(&absmax), Floats::of(&nested), Floats::of(&code))
                else {
                    return Err(wrong(&absmax, "bytes"));
                };
                Scales::Nested {
                    codes,
                    code: (0..256).map(|at| code.get(at)).collect(),
                    absmax,
                    blocksize,
                    offset: parsed
                        .nested_offset
                        .ok_or_else(|| wrong(state, "a `nested_offset`"))?,
                }
            }
            _ => {
                expect(&absmax, &[Dtype::F32], &[blocks])?;
                Scales::Plain(Floats::of(&absmax).ok_or_else(|| wrong(&absmax, "F32"))?)
            }
        };
        let (Some(codes), Some(map)) = (Slice::of(&weight), Floats::of(&map)) else {
            return Err(wrong(&weight, "bytes"));
        };
        let decoder = Codes {
            codes,
            map: std::array::from_fn(|at| map.get(at)),
            scales,
            blocksize: parsed.blocksize,
            columns,
            round,
        };
        taken.put(layer, &weight, [rows, columns], decoder);
        Ok(())
    }
}

/// The JSON text beside a matrix of 4 bits.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    #[serde(rename = "nested_dtype")]
    _nested_dtype: Option<String>,
    nested_offset: Option<f32>,
}

/// Scales of blocks.
enum Scales {
    Plain(Floats),
    /// `code[codes] · absmax + offset`.
    Nested {
        codes: Slice,
        code: Vec<f32>,
        absmax: Floats,
        blocksize: usize,
        offset: f32,
    },
}

impl Scales {
    fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(floats) => floats.get(block),
            Self::Nested {
                codes,
                code,
                absmax,
                blocksize,
                offset,
            } => {
                let code = code[usize::from(codes.bytes()[block])];
                code * absmax.get(block / blocksize) + offset
            }
        }
    }
}

/// Codes of 4 bits, the first in the upper half of a byte.
struct Codes {
    codes: Slice,
    map: [f32; 16],
    scales: Scales,
    blocksize: usize,
    columns: usize,
    round: Round,
}

impl Decode for Codes {
    fn rows(&self, first: usize, out: &mut [f32]) {
        let bytes = self.codes.bytes();
        let mut codes = vec![0; self.blocksize.min(out.len())];
        let (mut at, end) = (first * self.columns, first * self.columns + out.len());
        let mut rest = out;
        while at < end {
            let block = at / self.blocksize;
            let next = (block + 1).saturating_mul(self.blocksize).min(end);
            let (out, after) = rest.split_at_mut(next - at);
            let codes = &mut codes[..next - at];
            for (place, code) in (at..next).zip(&mut *codes) {
                // The first of two is in the upper half.
                *code = bytes[place / 2] >> (4 * (1 - place % 2));
            }
            let scale = self.scales.get(block);
            let mut table = self.map.map(|value| value * scale);
            self.round.all(&mut table);
            look_up(&table, codes, out);
            (rest, at) = (after, next);
        }
    }
}
