//! Blocks of `float8_e4m3fn`, as Qwen and DeepSeek publish them: `X.weight` and `X.weight_scale_inv`, a
//! scale for 128 × 128 weights.
//!
//! Source: `Fp8Dequantize`, transformers 5, `integrations/finegrained_fp8.py`.

use serde_json::json;

use super::super::WeightsError;
use super::{
    FLOATS, Taken,
    config::{Keys, LeftOut},
    dims, expect,
    numbers::{Floats, Round, Slice},
    scaled::{Element, Grid, Scaled},
    wrong,
};
use safetensors::Dtype;

/// What the config says.
pub(in super::super) struct Fp8 {
    /// Rows and columns of a block; `None` for one scale a matrix.
    block: Option<[usize; 2]>,
    left_out: LeftOut,
}

impl Fp8 {
    /// Reads the keys.
    pub(super) fn read(keys: &Keys<'_>) -> Result<Self, WeightsError> {
        keys.only("fmt", &[json!("e4m3"), json!("float8_e4m3fn")])?;
        keys.only("activation_scheme", &[json!("dynamic"), json!("static")])?;
        keys.only("scale_fmt", &[json!("float"), json!("ue8m0")])?;
        // Of mixtures of experts, and of transformers itself; a list of more to convert is seen from tensors.
        keys.without_effect(&["expert_dtype", "dequantize", "modules_to_convert"]);
        let block = match keys.get("weight_block_size") {
            None => None,
            Some(value) => {
                let sizes: Option<Vec<usize>> = value.as_array().and_then(|sizes| {
                    sizes
                        .iter()
                        .map(|size| {
                            usize::try_from(size.as_u64()?)
                                .ok()
                                .filter(|size| *size > 0)
                        })
                        .collect()
                });
                match sizes.as_deref() {
                    Some([rows, columns]) => Some([*rows, *columns]),
                    _ => {
                        return Err(
                            keys.value("weight_block_size", "two sizes, such as [128, 128]")
                        );
                    }
                }
            }
        };
        let mut left_out = LeftOut::read(keys, "modules_to_not_convert")?;
        left_out.extend(LeftOut::read(keys, "ignored_layers")?);
        Ok(Self { block, left_out })
    }

    /// Puts the matrices together.
    pub(super) fn take(&self, taken: &mut Taken<'_>) -> Result<(), WeightsError> {
        for ending in ["weight_scale_inv", "weight_scale"] {
            for layer in taken.layers(ending) {
                let scales = taken.part(&layer, ending)?;
                let weight = taken.part(&layer, "weight")?;
                // Scales of activations, which are not quantised here.
                taken.optional(&layer, "input_scale");
                taken.optional(&layer, "activation_scale");
                let [rows, columns] = dims(&weight)?;
                expect(&weight, &[Dtype::F8_E4M3], &[rows, columns])?;
                self.left_out.check(&layer, &weight)?;
                let [block_rows, block_columns] = self.block.unwrap_or([rows, columns]);
                let down = rows.div_ceil(block_rows);
                let across = columns.div_ceil(block_columns);
                let (_, shape, _) = scales.stored()?;
                if shape.iter().product::<usize>() != down * across
                    || self.block.is_some() && shape != [down, across]
                {
                    return Err(wrong(&scales, format!("[{down}, {across}]")));
                }
                let (Some(values), Some(floats)) = (Slice::of(&weight), Floats::of(&scales)) else {
                    return Err(wrong(&scales, "F32, F16, BF16 or F8_E8M0"));
                };
                let grid = Grid {
                    rows: block_rows,
                    columns: block_columns,
                    across,
                };
                let decoder = Scaled::new(values, columns, Element::E4M3, floats, grid, Round::F32);
                taken.put(&layer, &weight, [rows, columns], decoder);
            }
        }
        let bare = taken.raw.values().find(|tensor| {
            tensor
                .stored()
                .is_ok_and(|(dtype, _, _)| dtype == Dtype::F8_E4M3)
        });
        match bare {
            Some(tensor) => Err(wrong(
                tensor,
                format!(
                    "its scales beside it (`{}_scale_inv`), or floats ({FLOATS:?})",
                    tensor.key
                ),
            )),
            None => Ok(()),
        }
    }
}
