//! Vision tower, language model, positions, batches, checkpoints, adapters.

mod files;

use std::path::PathBuf;

use burn::{
    prelude::*,
    tensor::{DType, Device},
};
use burn_store::{ModuleSnapshot, SafetensorsStore};
use xray_qwen3vl::{
    adapters::lora::{
        config::LoraConfig,
        files::{load_adapter, load_adapter_tensors},
        merge::merge,
    },
    batch::{
        images::ImageInput,
        positions::rope_index,
        text::{Padding, TextInput},
    },
    qwen3_vl::{
        ImageFeatures, Qwen3Vl,
        config::Qwen3VlConfig,
        key_values::KeyValueCache,
        layer::{Eager, Executor, StreamNorm, TextContext, decoder_layer},
        nn::InitOptions,
        patch_positions::{PositionCorners, patch_positions},
        rope::RopeTables,
        vision::{VisionLayout, pixel_tensor},
        weights::{load_checkpoint, parameter_shapes, save_checkpoint},
    },
    runtime::vision::encode_images,
};

use crate::support::{ACTIVATIONS, Reference, assert_close, fixtures, json, values};

use crate::backend::{TestBackend as B, device};

pub struct Loaded {
    pub config: Qwen3VlConfig,
    pub model: Qwen3Vl<B>,
}

pub fn load(name: &str) -> Loaded {
    let (model, config) = load_from(fixtures().join(name));
    Loaded { config, model }
}

pub fn load_from<C: xray_qwen3vl::runtime::accelerator::Accelerator<Device = Device<B>>>(
    dir: PathBuf,
) -> (Qwen3Vl<C>, Qwen3VlConfig) {
    let config = Qwen3VlConfig::from_dir(&dir).unwrap();
    let mut model = Qwen3Vl::new(&config, &InitOptions::default(), &device());
    load_checkpoint(&mut model, &dir, DType::F32, &mut |_, _| {}).unwrap();
    (model, config)
}

/// The images of a sequence of `inputs.json`, patches and grids one after another.
pub fn images_of(names: &[String]) -> ImageInput {
    let inputs = Reference::open("inputs.safetensors");
    let mut all = ImageInput::default();
    for name in names {
        let grid = inputs.ints(&format!("{name}.image_grid_thw"));
        all.extend(&ImageInput {
            pixel_values: inputs.f32s(&format!("{name}.pixel_values")).into(),
            image_grid_thw: vec![[grid[0] as usize, grid[1] as usize, grid[2] as usize]],
        });
    }
    all
}

pub fn sequence_images(sequence: &str) -> Vec<String> {
    json("inputs.json")["sequences"][sequence]["images"]
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap().to_string())
        .collect()
}

fn sequences() -> Vec<String> {
    let inputs = json("inputs.json");
    inputs["sequences"]
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect()
}

/// One unpadded sequence as a batch of one.
pub fn single(ids: Vec<u32>, grids: &[[usize; 3]], config: &Qwen3VlConfig) -> TextInput {
    TextInput::padded(&[ids], &[grids.to_vec()], config, Padding::Right, 0)
        .unwrap()
        .0
}

fn check_sequences(loaded: &Loaded, file: &str, part: &str) {
    let reference = Reference::open(file);
    let mut checked = 0;
    for sequence in sequences() {
        if !reference.has(&format!("{sequence}.logits")) {
            continue;
        }
        let images = images_of(&sequence_images(&sequence));
        let ids = reference
            .id_rows(&format!("{sequence}.input_ids"))
            .remove(0);
        let input = single(ids, &images.image_grid_thw, &loaded.config);
        let logits = loaded
            .model
            .forward(&input, &images, &loaded.config, &device());
        let want = reference.f32s(&format!("{sequence}.logits"));
        let name = format!("{part} {sequence} logits");
        assert_close(&name, &values(logits), &want, ACTIVATIONS.0, ACTIVATIONS.1);
        checked += 1;
    }
    assert!(checked > 0, "{file} holds no sequence");
}

#[test]
fn position_table_corners_and_patch_positions() {
    let reference = Reference::open("pos_interp.safetensors");
    for name in reference.names() {
        let Some(case) = name.strip_suffix(".indices") else {
            continue;
        };
        // side48.grid_32x32
        let (side, grid) = case.split_once(".grid_").unwrap();
        let side: usize = side.strip_prefix("side").unwrap().parse().unwrap();
        let (h, w) = grid.split_once('x').unwrap();
        let grid = [1, h.parse().unwrap(), w.parse().unwrap()];
        let mut corners = PositionCorners::default();
        corners.extend(grid, side, 2);
        let indices: Vec<i64> = corners
            .indices
            .iter()
            .flatten()
            .map(|i| i64::from(*i))
            .collect();
        assert_eq!(indices, reference.ints(&name), "{case} indices");
        let weights: Vec<f32> = corners.weights.iter().flatten().copied().collect();
        // The reference multiplies in another order: a few units in the last place of 1.
        assert_close(
            case,
            &weights,
            &reference.f32s(&format!("{case}.weights")),
            1e-5,
            0.0,
        );
        let positions: Vec<i64> = patch_positions(grid, 2)
            .iter()
            .flatten()
            .map(|p| i64::from(*p))
            .collect();
        assert_eq!(
            positions,
            reference.ints(&format!("{case}.position_ids_hw")),
            "{case} positions"
        );
    }
}

#[test]
fn vision_tower_block_by_block() {
    let Loaded { config, model } = load("model-tiny");
    let reference = Reference::open("vision.safetensors");
    let visual = &model.model.visual;
    for image in json("inputs.json")["images"].as_object().unwrap().keys() {
        let check = |part: &str, ours: Tensor<B, 2>| {
            let want = reference.f32s(&format!("{image}.{part}"));
            assert_close(
                &format!("vision {image} {part}"),
                &values(ours),
                &want,
                1e-4,
                1e-4,
            );
        };
        let input = images_of(std::slice::from_ref(image));
        let layout = VisionLayout::new(&input.image_grid_thw, &config.vision_config, &device());
        let pixels = pixel_tensor::<B>(
            &input,
            config.vision_config.patch_dim(),
            DType::F32,
            &device(),
        );
        check(
            "patch_embed",
            visual.patch_embed.forward(pixels.clone(), None),
        );
        check("pos_embeds", visual.position_embeddings(&layout));
        check("rope_cos", layout.rope.cos.clone());
        check("rope_sin", layout.rope.sin.clone());
        let mut x = visual.embed(pixels, &layout);
        check("blocks_input", x.clone());
        for (index, block) in visual.blocks.iter().enumerate() {
            if index == 0 {
                let attn = block.attn.forward(
                    block.norm1.forward(x.clone()),
                    x.zeros_like(),
                    &layout,
                    None,
                );
                check("block0.attn_out", attn.clone());
                let middle = x.clone() + attn;
                let normed = block.norm2.forward(middle);
                let out = block.mlp.forward(normed, x.zeros_like(), None);
                check("block0.mlp_out", out);
            }
            x = block.forward(x, &layout, None);
            check(&format!("block{index}.out"), x.clone());
        }
        let output = encode_images(&model, &input, &config, &device());
        check("merger_out", output.merged);
        for (index, features) in output.deepstack.into_iter().enumerate() {
            check(&format!("deepstack{index}"), features);
        }
    }
}

#[test]
fn packed_images_equal_the_reference() {
    let Loaded { config, model } = load("model-tiny");
    let reference = Reference::open("vision.safetensors");
    for name in reference.names() {
        let Some(letters) = name
            .strip_prefix("packed_")
            .and_then(|rest| rest.strip_suffix(".merger_out"))
        else {
            continue;
        };
        let names: Vec<String> = letters.chars().map(|c| c.to_string()).collect();
        let output = encode_images(&model, &images_of(&names), &config, &device());
        assert_close(
            &name,
            &values(output.merged),
            &reference.f32s(&name),
            1e-4,
            1e-4,
        );
        let deepstack = format!("packed_{letters}.deepstack0");
        assert_close(
            &deepstack,
            &values(output.deepstack[0].clone()),
            &reference.f32s(&deepstack),
            1e-4,
            1e-4,
        );
    }
}

#[test]
fn positions_of_single_sequences_and_padded_batches() {
    let config = Qwen3VlConfig::from_dir(&fixtures().join("model-tiny")).unwrap();
    let merge = config.vision_config.spatial_merge_size;
    let reference = Reference::open("rope.safetensors");
    for sequence in sequences() {
        let ids = reference
            .id_rows(&format!("{sequence}.input_ids"))
            .remove(0);
        let grids = images_of(&sequence_images(&sequence)).image_grid_thw;
        let (positions, delta) = rope_index(&ids, &grids, config.image_token_id, merge).unwrap();
        assert_eq!(
            positions.axes.concat(),
            reference.ints(&format!("{sequence}.position_ids")),
            "{sequence} positions"
        );
        assert_eq!(
            vec![delta],
            reference.ints(&format!("{sequence}.rope_deltas"))
        );
    }
    for (batch, padding) in [
        ("batch_right", Padding::Right),
        ("batch_left", Padding::Left),
    ] {
        let (rows, grids) = batch_rows(&reference, batch);
        let (input, deltas) = TextInput::padded(&rows, &grids, &config, padding, 0).unwrap();
        assert_eq!(
            input.positions.axes.concat(),
            reference.ints(&format!("{batch}.position_ids")),
            "{batch} positions"
        );
        assert_eq!(
            deltas,
            reference.ints(&format!("{batch}.rope_deltas")),
            "{batch} deltas"
        );
    }
}

/// The real tokens of a padded batch, and each row's images by matching its tokens to a sequence.
fn batch_rows(reference: &Reference, batch: &str) -> (Vec<Vec<u32>>, Vec<Vec<[usize; 3]>>) {
    let ids = reference.id_rows(&format!("{batch}.input_ids"));
    let mask = reference.int_rows(&format!("{batch}.attention_mask"));
    let known = Reference::open("rope.safetensors");
    let mut rows = Vec::new();
    let mut grids = Vec::new();
    for (ids, mask) in ids.into_iter().zip(mask) {
        let row: Vec<u32> = ids
            .into_iter()
            .zip(mask)
            .filter_map(|(id, real)| (real == 1).then_some(id))
            .collect();
        let sequence = sequences()
            .into_iter()
            .find(|name| known.id_rows(&format!("{name}.input_ids"))[0] == row)
            .expect("a row of the batch is one of the sequences");
        grids.push(images_of(&sequence_images(&sequence)).image_grid_thw);
        rows.push(row);
    }
    (rows, grids)
}

fn batch_images(reference: &Reference, batch: &str) -> ImageInput {
    let (rows, _) = batch_rows(reference, batch);
    let known = Reference::open("rope.safetensors");
    let mut all = ImageInput::default();
    for row in rows {
        let sequence = sequences()
            .into_iter()
            .find(|name| known.id_rows(&format!("{name}.input_ids"))[0] == row)
            .unwrap();
        all.extend(&images_of(&sequence_images(&sequence)));
    }
    all
}

#[test]
fn language_model_layer_by_layer() {
    let Loaded { config, model } = load("model-tiny");
    let reference = Reference::open("text.safetensors");
    for sequence in sequences() {
        let check = |part: &str, ours: Tensor<B, 2>| {
            let name = format!("{sequence}.{part}");
            if reference.has(&name) {
                let want = reference.f32s(&name);
                assert_close(&format!("text {name}"), &values(ours), &want, 1e-4, 1e-4);
            }
        };
        let images = images_of(&sequence_images(&sequence));
        let ids = reference
            .id_rows(&format!("{sequence}.input_ids"))
            .remove(0);
        let input = single(ids, &images.image_grid_thw, &config);
        let context = TextContext::<B>::new(&input, &config, None, &device());
        check("rope_cos", context.rope.cos.clone());
        check("rope_sin", context.rope.sin.clone());
        let images = (!images.image_grid_thw.is_empty()).then(|| {
            let vision = encode_images(&model, &images, &config, &device());
            ImageFeatures::new(&input, vision, &device())
        });
        let mut x = model.embed(&input, images.as_ref(), &device());
        check("inputs_embeds", x.clone());
        let layers = &model.model.language_model.layers;
        let uncached = None::<&mut KeyValueCache<B>>;
        let mut run = Eager::new(layers, &context, images.as_ref(), uncached);
        for index in 0..layers.len() {
            run.enter(index);
            if index == 0 {
                let h = run.norm(StreamNorm::Input, &x);
                let heads = run.project_heads(h);
                let heads = run.rotate(heads);
                let y = run.attend(heads);
                let attn = run.project_attended(y, x.zeros_like());
                check("layer0.attn_out", attn.clone());
                let h = run.norm(StreamNorm::PostAttention, &(x.clone() + attn));
                let y = run.swiglu(h);
                check("layer0.mlp_out", run.project_down(y, x.zeros_like()));
            }
            x = decoder_layer(&mut run, x);
            check(&format!("layer{index}.out"), x.clone());
            x = run.add_deepstack(index, x);
            check(&format!("layer{index}.out_after_deepstack"), x.clone());
        }
        let hidden = model.norm(x);
        check("final_norm", hidden.clone());
        check("logits", model.logits(hidden));
    }
}

#[test]
fn padded_batches_equal_the_reference() {
    let Loaded { config, model } = load("model-tiny");
    let reference = Reference::open("batch.safetensors");
    for (batch, padding) in [
        ("batch_right", Padding::Right),
        ("batch_left", Padding::Left),
    ] {
        let (rows, grids) = batch_rows(&reference, batch);
        let (input, _) = TextInput::padded(&rows, &grids, &config, padding, 0).unwrap();
        let logits = model.forward(&input, &batch_images(&reference, batch), &config, &device());
        let [_, vocab] = logits.dims();
        let logits = values(logits);
        let real: Vec<f32> = input
            .segments
            .concat()
            .iter()
            .zip(logits.chunks(vocab))
            .filter(|(segment, _)| **segment >= 0)
            .flat_map(|(_, row)| row.to_vec())
            .collect();
        let want = reference.f32s(&format!("{batch}.logits_valid"));
        assert_close(&format!("{batch} logits"), &real, &want, 1e-4, 1e-4);
    }
}

#[test]
fn prompts_filled_in_some_columns_at_a_time_equal_the_reference() {
    let Loaded { config, model } = load("model-tiny");
    let reference = Reference::open("batch.safetensors");
    let (rows, grids) = batch_rows(&reference, "batch_left");
    let (input, _) = TextInput::padded(&rows, &grids, &config, Padding::Left, 0).unwrap();
    let images = batch_images(&reference, "batch_left");
    let vision = encode_images(&model, &images, &config, &device());
    let logits = reference.f32s("batch_left.logits_valid");
    let vocab = config.text_config.vocab_size;
    let mut want = Vec::new();
    let mut end = 0;
    for row in &rows {
        end += row.len() * vocab;
        want.extend_from_slice(&logits[end - vocab..end]);
    }
    // One and two columns make chunks of padding alone and of image tokens alone.
    for columns in [1, 2, 7, input.seq() - 1, input.seq()] {
        let mut cache = KeyValueCache::new(config.text_config.num_hidden_layers);
        let hidden = model.prefill(
            &input,
            Some(&vision),
            &config,
            &mut cache,
            columns,
            &device(),
        );
        assert_eq!(cache.len(), input.seq());
        let ours = values(model.logits(hidden));
        assert_close(
            &format!("last logits, {columns} columns at a time"),
            &ours,
            &want,
            1e-4,
            1e-4,
        );
    }
}

#[test]
fn packed_samples_equal_the_reference() {
    let Loaded { config, model } = load("model-tiny");
    let reference = Reference::open("text.safetensors");
    let mut samples = Vec::new();
    let mut grids = Vec::new();
    let mut images = ImageInput::default();
    let mut want = Vec::new();
    for sequence in sequences() {
        let own = images_of(&sequence_images(&sequence));
        samples.push(
            reference
                .id_rows(&format!("{sequence}.input_ids"))
                .remove(0),
        );
        grids.push(own.image_grid_thw.clone());
        images.extend(&own);
        want.extend(reference.f32s(&format!("{sequence}.logits")));
    }
    let input = TextInput::packed(&samples, &grids, &config).unwrap();
    let logits = model.forward(&input, &images, &config, &device());
    assert_close("packed logits", &values(logits), &want, 1e-4, 1e-4);
}

#[test]
fn cached_steps_equal_one_full_pass() {
    let Loaded { config, model } = load("model-tiny");
    let reference = Reference::open("text.safetensors");
    for sequence in sequences() {
        let images = images_of(&sequence_images(&sequence));
        let ids = reference
            .id_rows(&format!("{sequence}.input_ids"))
            .remove(0);
        let whole = single(ids, &images.image_grid_thw, &config);
        let vision = (!images.image_grid_thw.is_empty())
            .then(|| encode_images(&model, &images, &config, &device()));
        // All image tokens must be in the first part.
        let last_image = whole.input_ids[0]
            .iter()
            .rposition(|id| *id == config.image_token_id)
            .map_or(1, |at| at + 1);
        let mut cache = KeyValueCache::new(config.text_config.num_hidden_layers);
        let mut logits = Vec::new();
        let seq = whole.seq();
        let cuts = [0, last_image].into_iter().chain(last_image + 1..=seq);
        let cuts: Vec<usize> = cuts.collect();
        for (step, range) in cuts.windows(2).map(|cut| cut[0]..cut[1]).enumerate() {
            let part = TextInput {
                input_ids: vec![whole.input_ids[0][range.clone()].to_vec()],
                segments: vec![whole.segments[0][range.clone()].to_vec()],
                positions: xray_qwen3vl::batch::positions::Positions {
                    axes: whole
                        .positions
                        .axes
                        .clone()
                        .map(|axis| axis[range.clone()].to_vec()),
                },
                image_token_id: config.image_token_id,
            };
            let vision = vision.as_ref().filter(|_| step == 0);
            let hidden =
                model.hidden_states(&part, vision, &config, Some(&mut cache), None, &device());
            logits.extend(values(model.logits(hidden)));
        }
        let want = reference.f32s(&format!("{sequence}.logits"));
        assert_close(
            &format!("{sequence} step by step"),
            &logits,
            &want,
            1e-4,
            1e-4,
        );
    }
}

#[test]
fn rotary_tables_do_not_depend_on_the_weights_dtype() {
    let dir = fixtures().join("model-tiny");
    let config = Qwen3VlConfig::from_dir(&dir).unwrap();
    let (positions, _) = rope_index(&[1, 2, 3], &[], config.image_token_id, 2).unwrap();
    let tables = RopeTables::<B>::text(&positions, &config.text_config, &device());
    assert_eq!(tables.cos.dtype(), DType::F32);
}

#[test]
fn published_sizes_have_the_published_number_of_parameters() {
    // Counted from the published checkpoints' shapes; the names say 2B, 4B, 8B, 32B.
    for (size, billions) in [("2b", 2.13), ("4b", 4.44), ("8b", 8.77), ("32b", 33.36)] {
        let config = Qwen3VlConfig::published(size).unwrap();
        let model = Qwen3Vl::<B>::new(&config, &InitOptions::default(), &device());
        let count: usize = parameter_shapes(&model)
            .values()
            .map(|shape| shape.iter().product::<usize>())
            .sum();
        assert!(
            (count as f64 / 1e9 - billions).abs() < 0.01,
            "{size}: {count}"
        );
    }
}

#[test]
fn vision_features_of_the_tied_model() {
    let Loaded { config, model } = load("model-tiny-tied");
    let reference = Reference::open("tied.safetensors");
    for image in json("inputs.json")["images"].as_object().unwrap().keys() {
        if !reference.has(&format!("{image}.merger_out")) {
            continue;
        }
        let output = encode_images(
            &model,
            &images_of(std::slice::from_ref(image)),
            &config,
            &device(),
        );
        let check = |name: String, ours: Tensor<B, 2>| {
            assert_close(&name, &values(ours), &reference.f32s(&name), 1e-4, 1e-4);
        };
        check(format!("{image}.merger_out"), output.merged);
        for (index, features) in output.deepstack.into_iter().enumerate() {
            check(format!("{image}.deepstack{index}"), features);
        }
    }
}
