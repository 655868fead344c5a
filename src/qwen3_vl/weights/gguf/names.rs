//! llama.cpp's names of tensors.
//!
//! Source: `Qwen3VLTextModel` and `Qwen3VLVisionModel`, `convert_hf_to_gguf.py`, and `TENSOR_NAMES`,
//! `gguf-py/gguf/constants.py`.

/// Parts of a decoder layer.
const TEXT: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Parts of a block of the vision tower.
const VISION: [(&str, &str); 6] = [
    ("ln1", "norm1"),
    ("ln2", "norm2"),
    ("attn_qkv", "attn.qkv"),
    ("attn_out", "attn.proj"),
    ("ffn_up", "mlp.linear_fc1"),
    ("ffn_down", "mlp.linear_fc2"),
];

/// Parts of a merger of DeepStack.
const DEEPSTACK: [(&str, &str); 3] = [
    ("norm", "norm"),
    ("fc1", "linear_fc1"),
    ("fc2", "linear_fc2"),
];

fn look_up<'a>(table: &[(&str, &'a str)], name: &str) -> Option<&'a str> {
    table
        .iter()
        .find(|(ours, _)| *ours == name)
        .map(|(_, theirs)| *theirs)
}

/// `N.PART.weight` with the part looked up in `table`.
fn numbered(rest: &str, table: &[(&str, &str)]) -> Option<(usize, String)> {
    let (number, rest) = rest.split_once('.')?;
    let (part, ending) = rest.rsplit_once('.')?;
    let part = look_up(table, part)?;
    ["weight", "bias"].contains(&ending).then_some(())?;
    Some((number.parse().ok()?, format!("{part}.{ending}")))
}

/// The name in the module tree of a tensor of the text file.
pub(super) fn text(name: &str) -> Option<String> {
    if let Some(rest) = name.strip_prefix("blk.") {
        let (layer, part) = numbered(rest, &TEXT)?;
        return Some(format!("model.language_model.layers.{layer}.{part}"));
    }
    Some(
        match name {
            "token_embd.weight" => "model.language_model.embed_tokens.weight",
            "output_norm.weight" => "model.language_model.norm.weight",
            "output.weight" => "lm_head.weight",
            _ => return None,
        }
        .to_string(),
    )
}

/// The name in the module tree of a tensor of the mmproj file. `deepstack` are the blocks with a merger of
/// their own, which llama.cpp names by the block.
pub(super) fn vision(name: &str, deepstack: &[usize]) -> Option<String> {
    if let Some(rest) = name.strip_prefix("v.blk.") {
        let (block, part) = numbered(rest, &VISION)?;
        return Some(format!("model.visual.blocks.{block}.{part}"));
    }
    if let Some(rest) = name.strip_prefix("v.deepstack.") {
        let (block, part) = numbered(rest, &DEEPSTACK)?;
        let place = deepstack.iter().position(|index| *index == block)?;
        return Some(format!("model.visual.deepstack_merger_list.{place}.{part}"));
    }
    let (part, ending) = name.rsplit_once('.')?;
    let part = match part {
        "v.patch_embd" => "patch_embed.proj",
        "v.position_embd" => "pos_embed",
        "v.post_ln" => "merger.norm",
        "mm.0" => "merger.linear_fc1",
        "mm.2" => "merger.linear_fc2",
        _ => return None,
    };
    ["weight", "bias"]
        .contains(&ending)
        .then(|| format!("model.visual.{part}.{ending}"))
}
