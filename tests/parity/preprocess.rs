//! Pictures: size, scaled pixels and patches against Pillow and the published image processors.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;
use sha2::{Digest, Sha256};
use xray_qwen3vl::processor::image::RgbImage;
use xray_qwen3vl::processor::patches::{ImagePatches, ImageProcessor, ImageProcessorConfig};
use xray_qwen3vl::processor::resize::{ResizeRule, smart_resize};

use crate::support::{Reference, assert_close, fixtures, json};

/// Two levels of 255 on the scale of `pixel_values`: as far as torchvision's own bicubic filter is
/// from Pillow's (README of the fixtures).
const TWO_LEVELS: f32 = 2.0 / 127.5 + 1e-6;

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn sha256_f32(values: &[f32]) -> String {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    sha256(&bytes)
}

fn size(value: &Value) -> usize {
    value.as_u64().expect("a size") as usize
}

fn sizes<const N: usize>(value: &Value) -> [usize; N] {
    std::array::from_fn(|index| size(&value[index]))
}

fn cases(file: &Value) -> impl Iterator<Item = (&String, &Value)> {
    file.as_object().expect("an object of cases").iter()
}

fn u8_tensor(name: &str) -> Option<(Vec<usize>, Vec<u8>)> {
    let bytes = std::fs::read(fixtures().join("preprocess.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let view = tensors.tensor(name).ok()?;
    Some((view.shape().to_vec(), view.data().to_vec()))
}

fn processor(min_pixels: usize, max_pixels: usize, resize_rule: ResizeRule) -> ImageProcessor {
    let config = ImageProcessorConfig {
        min_pixels,
        max_pixels,
        resize_rule,
        ..Default::default()
    };
    ImageProcessor::new(config).unwrap()
}

fn case_processor(case: &Value, rule: ResizeRule) -> ImageProcessor {
    processor(size(&case["min_pixels"]), size(&case["max_pixels"]), rule)
}

/// The case's picture as Pillow's `convert("RGB")` gives it: the alpha channel is lost.
fn without_alpha(path: &Path) -> RgbImage {
    let rgba = image::open(path).unwrap().into_rgba8();
    let (width, height) = (rgba.width() as usize, rgba.height() as usize);
    let pixels = rgba
        .pixels()
        .flat_map(|pixel| [pixel.0[0], pixel.0[1], pixel.0[2]])
        .collect();
    RgbImage::from_rgb(width, height, pixels).unwrap()
}

fn picture(case: &Value) -> PathBuf {
    fixtures().join(case["image"].as_str().expect("a path"))
}

fn assert_same_bytes(part: &str, ours: &[u8], want: &[u8]) {
    let floats = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| f32::from(*byte))
            .collect::<Vec<_>>()
    };
    assert_close(part, &floats(ours), &floats(want), 0.0, 0.0);
}

fn assert_same_bits(part: &str, ours: &[f32], want: &[f32]) {
    assert_close(part, ours, want, 0.0, 0.0);
}

#[test]
fn smart_resize_equals_both_references() {
    let rows = json("smart_resize.json");
    let rules = [
        ("hf", ResizeRule::Transformers),
        ("qwen_vl_utils", ResizeRule::QwenVlUtils),
    ];
    let config = ImageProcessorConfig::default();
    for row in rows.as_array().expect("rows") {
        for (key, rule) in rules {
            let [height, width, min_pixels, max_pixels] =
                ["h", "w", "min_pixels", "max_pixels"].map(|key| size(&row[key]));
            let ours = smart_resize(height, width, config.factor(), min_pixels, max_pixels, rule);
            let want = row[key].is_array().then(|| sizes(&row[key]).into());
            assert_eq!(ours.ok(), want, "{key} {row}");
        }
    }
}

#[test]
fn the_training_path_gives_its_pixels() {
    let file = json("preprocess.json");
    for (name, case) in cases(&file) {
        let processor = case_processor(case, ResizeRule::QwenVlUtils);
        let want = &case["backends"]["qwen_vl_utils"];
        let picture = processor.load(&picture(case)).unwrap();
        assert_eq!(
            [picture.width(), picture.height()],
            sizes(&case["size_wh"]),
            "{name}"
        );
        let resized = processor.resize(&picture).unwrap();
        let tensors = [
            format!("{name}.qwen_vl_utils.resized_u8"),
            format!("{name}.pil.resized_u8"),
        ];
        // Pillow's own backend differs from the training path where there is alpha.
        let same =
            want["resized_u8_hwc_sha256"] == case["backends"]["pil"]["resized_u8_hwc_sha256"];
        for tensor in tensors.iter().take(if same { 2 } else { 1 }) {
            if let Some((shape, bytes)) = u8_tensor(tensor) {
                assert_eq!(
                    [resized.height(), resized.width(), 3],
                    shape[..],
                    "{tensor}"
                );
                assert_same_bytes(tensor, resized.pixels(), &bytes);
            }
        }
        let patches = checked_patches(name, &processor, &picture, want);
        assert_eq!(
            processor
                .grid_for(picture.height(), picture.width())
                .unwrap(),
            patches.grid_thw
        );
    }
}

/// The patches of a picture, whose scaled pixels and grid are those of `want`.
fn checked_patches(
    name: &str,
    processor: &ImageProcessor,
    picture: &RgbImage,
    want: &Value,
) -> ImagePatches {
    assert_eq!(
        sha256(processor.resize(picture).unwrap().pixels()),
        want["resized_u8_hwc_sha256"],
        "{name}: sha256 of the scaled pixels"
    );
    let patches = processor.process(picture).unwrap();
    assert_eq!(
        patches.grid_thw,
        sizes::<3>(&want["grid_thw"]),
        "{name}: grid"
    );
    patches
}

#[test]
fn pillows_backend_gives_its_pixels_and_patches() {
    let file = json("preprocess.json");
    let reference = Reference::open("preprocess.safetensors");
    for (name, case) in cases(&file) {
        let processor = case_processor(case, ResizeRule::Transformers);
        let want = &case["backends"]["pil"];
        let picture = without_alpha(&picture(case));
        let resized = processor.resize(&picture).unwrap();
        let tensor = format!("{name}.pil.resized_u8");
        if let Some((_, bytes)) = u8_tensor(&tensor) {
            assert_same_bytes(&tensor, resized.pixels(), &bytes);
        }
        let patches = checked_patches(name, &processor, &picture, want);
        let sample = format!("{name}.pil.pixel_values_flat_every_997");
        let ours: Vec<f32> = patches.pixel_values.iter().copied().step_by(997).collect();
        // This backend divides by 255 before it normalises, which rounds once more.
        assert_close(&sample, &ours, &reference.f32s(&sample), 1e-6, 0.0);
    }
}

#[test]
fn equal_pixels_give_equal_patches_bit_for_bit() {
    let file = json("preprocess.json");
    let reference = Reference::open("preprocess.safetensors");
    let mut compared = 0;
    for (name, case) in cases(&file) {
        let processor = case_processor(case, ResizeRule::Transformers);
        let [height, width] = sizes(&case["resized_hw"]);
        // torchvision's pixels: from the fixture, or ours where they happen to be the same.
        let ours = processor
            .resize(&without_alpha(&picture(case)))
            .unwrap()
            .into_owned();
        let theirs = u8_tensor(&format!("{name}.resized_u8"))
            .map(|(_, bytes)| RgbImage::from_rgb(width, height, bytes).unwrap());
        let same = sha256(ours.pixels()) == case["resized_u8_hwc_sha256"];
        // The patches of already scaled pixels: one is the smallest limit, so nothing is scaled.
        let cutter = processor_without_scaling();
        let patches = cutter.process(&ours).unwrap();
        let sample = format!("{name}.pixel_values_flat_every_997");
        let every: Vec<f32> = patches.pixel_values.iter().copied().step_by(997).collect();
        assert_close(&sample, &every, &reference.f32s(&sample), TWO_LEVELS, 0.0);
        let Some(pixels) = theirs.or(same.then_some(ours)) else {
            continue;
        };
        let patches = cutter.process(&pixels).unwrap();
        assert_eq!(
            patches.grid_thw,
            sizes::<3>(&case["grid_thw"]),
            "{name}: grid"
        );
        let shape = [patches.grid_thw.iter().product(), cutter.config().row_len()];
        assert_eq!(
            shape,
            sizes::<2>(&case["pixel_values_shape"]),
            "{name}: shape"
        );
        let full = format!("{name}.pixel_values");
        if reference.has(&full) {
            assert_same_bits(&full, &patches.pixel_values, &reference.f32s(&full));
        }
        assert_eq!(
            sha256_f32(&patches.pixel_values),
            case["pixel_values_sha256_f32le"],
            "{name}: sha256 of pixel_values"
        );
        compared += 1;
    }
    assert!(
        compared > 0,
        "no case of preprocess.json holds the scaled pixels"
    );
}

fn processor_without_scaling() -> ImageProcessor {
    let factor = ImageProcessorConfig::default().factor();
    processor(factor * factor, 100_000_000, ResizeRule::QwenVlUtils)
}

#[test]
fn the_models_pictures_give_its_inputs() {
    let inputs = json("inputs.json");
    let reference = Reference::open("inputs.safetensors");
    for (name, case) in cases(&inputs["images"]) {
        let dir = fixtures().join("model-tiny");
        let processor = ImageProcessor::new(ImageProcessorConfig {
            min_pixels: processor_without_scaling().config().min_pixels,
            ..ImageProcessorConfig::from_dir(&dir).unwrap()
        })
        .unwrap();
        let picture = processor.load(&picture(case)).unwrap();
        let patches = processor.process(&picture).unwrap();
        assert_eq!(
            patches.grid_thw,
            sizes::<3>(&case["grid_thw"]),
            "{name}: grid"
        );
        assert_eq!(
            processor.num_tokens(patches.grid_thw),
            size(&case["tokens"]),
            "{name}: tokens"
        );
        let tensor = format!("{name}.pixel_values");
        let want = reference.f32s(&tensor);
        // The reference scales with torchvision; without scaling there is nothing to differ in.
        let [_, rows, columns] = patches.grid_thw;
        let patch = processor.config().patch_size;
        let scaled = [rows * patch, columns * patch] != [picture.height(), picture.width()];
        let tolerance = if scaled { TWO_LEVELS } else { 0.0 };
        assert_close(&tensor, &patches.pixel_values, &want, tolerance, 0.0);
    }
}

#[test]
fn published_limits_are_read_and_the_recipe_overrides_them() {
    for model in ["model-tiny", "model-tiny-tied"] {
        let dir = fixtures().join(model);
        let file = json(&format!("{model}/preprocessor_config.json"));
        let published = ImageProcessorConfig::published(&dir).unwrap();
        assert_eq!(
            published.min_pixels,
            size(&file["size"]["shortest_edge"]),
            "{model}"
        );
        assert_eq!(
            published.max_pixels,
            size(&file["size"]["longest_edge"]),
            "{model}"
        );
        assert_eq!(published.patch_size, size(&file["patch_size"]), "{model}");
        assert_eq!(published.merge_size, size(&file["merge_size"]), "{model}");
        let recipe = ImageProcessorConfig::default();
        let ours = ImageProcessorConfig::from_dir(&dir).unwrap();
        assert_eq!(
            (ours.min_pixels, ours.max_pixels),
            (recipe.min_pixels, recipe.max_pixels)
        );
    }
}

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn real_radiographs_give_the_references_patches() {
    let folder = std::env::var_os("XRAY_OPENI_DIR")
        .map(PathBuf::from)
        .expect("XRAY_OPENI_DIR is set");
    let text = std::fs::read_to_string(folder.join("preprocess.json")).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    for (name, want) in cases(&file) {
        // `<file>.min<pixels>_max<pixels>`
        let (file, limits) = name.rsplit_once(".min").expect("limits in the name");
        let (min_pixels, max_pixels) = limits.split_once("_max").expect("two limits");
        let (min_pixels, max_pixels) = (min_pixels.parse().unwrap(), max_pixels.parse().unwrap());
        let processor = processor(min_pixels, max_pixels, ResizeRule::QwenVlUtils);
        let path = folder.join("images").join(file);
        let picture = processor.load(&path).unwrap();
        assert_eq!(
            processor.probe(&path).unwrap(),
            (picture.width(), picture.height()),
            "{name}"
        );
        let patches = processor.process(&picture).unwrap();
        assert_eq!(
            patches.grid_thw,
            sizes::<3>(&want["image_grid_thw"]),
            "{name}: grid"
        );
        let every = want["every_9973"].as_array().expect("a sample");
        let every: Vec<f32> = every.iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let ours: Vec<f32> = patches.pixel_values.iter().copied().step_by(9973).collect();
        assert_same_bits(name, &ours, &every);
        let resized = processor.resize(&picture).unwrap();
        assert_eq!(
            sha256(resized.pixels()),
            want["resized_u8_sha256"],
            "{name}: pixels"
        );
        assert_eq!(
            sha256_f32(&patches.pixel_values),
            want["pixel_values_sha256"],
            "{name}: patches"
        );
    }
}
