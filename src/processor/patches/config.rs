//! Sizes, limits and normalisation of an image processor, and the checkpoint files that hold them.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    base::files::{FileError, write_atomic},
    processor::{image::ImageError, resize::ResizeRule},
};

/// Most pixels a picture may be scaled to.
const MAX_SCALED_PIXELS: usize = 100_000_000;

/// Where published checkpoints keep the image processor's keys.
pub const PREPROCESSOR_FILE: &str = "preprocessor_config.json";

/// Where transformers 5 keeps them.
pub const PROCESSOR_FILE: &str = "processor_config.json";

/// Red, green and blue.
pub(super) const CHANNELS: usize = 3;

/// How pictures are scaled, normalised and cut; names as in `preprocessor_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageProcessorConfig {
    /// Side of a square patch in pixels.
    pub patch_size: usize,
    /// Frames in one patch; a still picture repeats its one frame.
    pub temporal_patch_size: usize,
    /// Patches per side that the patch merger joins into one token.
    pub merge_size: usize,
    /// Smallest width times height after scaling.
    pub min_pixels: usize,
    /// Largest width times height after scaling.
    pub max_pixels: usize,
    /// Mean of red, green and blue on the scale from 0 to 1.
    pub image_mean: [f32; 3],
    /// Standard deviation of red, green and blue on the scale from 0 to 1.
    pub image_std: [f32; 3],
    /// Which published function chooses the size.
    pub resize_rule: ResizeRule,
}

impl Default for ImageProcessorConfig {
    /// Qwen3-VL's patches with the pixel limits of the training recipe: 4 to 980 tokens a picture.
    fn default() -> Self {
        Self {
            patch_size: 16,
            temporal_patch_size: 2,
            merge_size: 2,
            min_pixels: 4096,
            max_pixels: 1_003_520,
            image_mean: [0.5; 3],
            image_std: [0.5; 3],
            resize_rule: ResizeRule::default(),
        }
    }
}

/// The keys of `preprocessor_config.json` that matter here, in all published forms.
#[derive(Deserialize)]
struct PreprocessorFile {
    patch_size: Option<usize>,
    temporal_patch_size: Option<usize>,
    merge_size: Option<usize>,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
    rescale_factor: Option<f64>,
    min_pixels: Option<usize>,
    max_pixels: Option<usize>,
    size: Option<PreprocessorSize>,
}

#[derive(Deserialize)]
struct PreprocessorSize {
    shortest_edge: Option<usize>,
    longest_edge: Option<usize>,
}

/// Where transformers 5 keeps the image processor's keys: under `image_processor`.
#[derive(Deserialize)]
struct ProcessorFile {
    image_processor: Option<PreprocessorFile>,
}

/// The file of `model_dir` that holds the image processor's keys: `processor_config.json` where it has an
/// `image_processor`, as transformers 5 writes it, else `preprocessor_config.json`.
///
/// # Errors
/// [`ImageError::ConfigRead`] names `preprocessor_config.json` where neither is there,
/// [`ImageError::ConfigParse`].
///
/// Source: `get_image_processor_dict`, transformers 5, `image_processing_base.py`.
fn read_keys(model_dir: &Path) -> Result<(PathBuf, PreprocessorFile), ImageError> {
    let nested = model_dir.join(PROCESSOR_FILE);
    if let Ok(text) = fs::read_to_string(&nested) {
        let file: ProcessorFile =
            serde_json::from_str(&text).map_err(|cause| ImageError::ConfigParse {
                path: nested.clone(),
                cause,
            })?;
        if let Some(keys) = file.image_processor {
            return Ok((nested, keys));
        }
    }
    let path = model_dir.join(PREPROCESSOR_FILE);
    let text = fs::read_to_string(&path).map_err(|cause| ImageError::ConfigRead {
        path: path.clone(),
        cause,
    })?;
    match serde_json::from_str(&text) {
        Ok(keys) => Ok((path, keys)),
        Err(cause) => Err(ImageError::ConfigParse { path, cause }),
    }
}

/// Writes pixel limits into the processor files of the checkpoint folder `dir`, so that whoever loads the
/// folder later, here or in transformers, shows the model images of the sizes it was trained on.
///
/// # Errors
/// [`FileError`] names the file.
pub fn write_pixel_limits(
    dir: &Path,
    min_pixels: usize,
    max_pixels: usize,
) -> Result<(), FileError> {
    for name in [PREPROCESSOR_FILE, PROCESSOR_FILE] {
        let path = dir.join(name);
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        let Ok(mut tree) = serde_json::from_str::<Value>(&text) else {
            continue;
        };
        let keys = match name {
            PROCESSOR_FILE => tree.get_mut("image_processor"),
            _ => Some(&mut tree),
        };
        let Some(keys) = keys.and_then(Value::as_object_mut) else {
            continue;
        };
        // The flat keys win where both forms are there.
        if keys.contains_key("min_pixels") || keys.contains_key("max_pixels") {
            keys.insert("min_pixels".into(), min_pixels.into());
            keys.insert("max_pixels".into(), max_pixels.into());
        }
        keys.insert(
            "size".into(),
            json!({"longest_edge": max_pixels, "shortest_edge": min_pixels}),
        );
        write_atomic(&path, |out| {
            serde_json::to_writer_pretty(&mut *out, &tree)?;
            out.write_all(b"\n")
        })?;
    }
    Ok(())
}

impl ImageProcessorConfig {
    /// Reads the image processor of a checkpoint, pixel limits and all: `processor_config.json` or
    /// `preprocessor_config.json` in `model_dir`.
    ///
    /// The limits are the published model's (`min_pixels` and `max_pixels`, or `size` with
    /// `shortest_edge` and `longest_edge`, which count pixels in spite of their names). The training
    /// recipe has its own: [`Self::from_dir`] puts them in their place.
    ///
    /// # Errors
    /// [`ImageError::ConfigRead`], [`ImageError::ConfigParse`] or [`ImageError::ConfigValue`].
    pub fn published(model_dir: &Path) -> Result<Self, ImageError> {
        let (_, file) = read_keys(model_dir)?;
        if let Some(found) = file
            .rescale_factor
            .filter(|found| (found * 255.0 - 1.0).abs() > 1e-6)
        {
            let (key, found) = ("rescale_factor", found.to_string());
            return Err(ImageError::ConfigValue {
                key,
                found,
                expected: "1/255",
            });
        }
        let fallback = Self::default();
        let (shortest, longest) = file
            .size
            .map_or((None, None), |size| (size.shortest_edge, size.longest_edge));
        let config = Self {
            patch_size: file.patch_size.unwrap_or(fallback.patch_size),
            temporal_patch_size: file
                .temporal_patch_size
                .unwrap_or(fallback.temporal_patch_size),
            merge_size: file.merge_size.unwrap_or(fallback.merge_size),
            min_pixels: file.min_pixels.or(shortest).unwrap_or(fallback.min_pixels),
            max_pixels: file.max_pixels.or(longest).unwrap_or(fallback.max_pixels),
            image_mean: file.image_mean.unwrap_or(fallback.image_mean),
            image_std: file.image_std.unwrap_or(fallback.image_std),
            resize_rule: fallback.resize_rule,
        };
        config.validate()?;
        Ok(config)
    }

    /// As [`Self::published`], with the pixel limits of the training recipe.
    ///
    /// # Errors
    /// [`ImageError::ConfigRead`], [`ImageError::ConfigParse`] or [`ImageError::ConfigValue`].
    pub fn from_dir(model_dir: &Path) -> Result<Self, ImageError> {
        let Self {
            min_pixels,
            max_pixels,
            ..
        } = Self::default();
        Ok(Self {
            min_pixels,
            max_pixels,
            ..Self::published(model_dir)?
        })
    }

    /// Checks the values alone and against each other.
    ///
    /// # Errors
    /// [`ImageError::ConfigValue`] with the first key that cannot be used.
    pub fn validate(&self) -> Result<(), ImageError> {
        let sizes = [
            ("patch_size", self.patch_size),
            ("temporal_patch_size", self.temporal_patch_size),
            ("merge_size", self.merge_size),
        ];
        for (key, found) in sizes {
            if !(1..=256).contains(&found) {
                let found = found.to_string();
                return Err(ImageError::ConfigValue {
                    key,
                    found,
                    expected: "1 to 256",
                });
            }
        }
        let refuse = |key, found: String, expected| {
            Err(ImageError::ConfigValue {
                key,
                found,
                expected,
            })
        };
        if self.max_pixels < self.factor().pow(2) {
            return refuse(
                "max_pixels",
                self.max_pixels.to_string(),
                "room for one token, the square of `patch_size` times `merge_size`",
            );
        }
        // A scaled picture takes 24 bytes a pixel as patches.
        if self.max_pixels > MAX_SCALED_PIXELS {
            return refuse(
                "max_pixels",
                self.max_pixels.to_string(),
                "at most 100,000,000",
            );
        }
        if self.min_pixels > self.max_pixels {
            return refuse(
                "min_pixels",
                self.min_pixels.to_string(),
                "at most `max_pixels`",
            );
        }
        if self.image_mean.iter().any(|mean| !mean.is_finite()) {
            return refuse(
                "image_mean",
                format!("{:?}", self.image_mean),
                "three numbers",
            );
        }
        if self
            .image_std
            .iter()
            .any(|std| !std.is_finite() || *std <= 0.0)
        {
            let found = format!("{:?}", self.image_std);
            return refuse("image_std", found, "three numbers above zero");
        }
        Ok(())
    }

    /// Both sides of a scaled picture are multiples of this many pixels.
    pub fn factor(&self) -> usize {
        self.patch_size * self.merge_size
    }

    /// Length of one row of `ImagePatches::pixel_values`.
    pub fn row_len(&self) -> usize {
        CHANNELS * self.temporal_patch_size * self.patch_size * self.patch_size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_file_of_transformers_5_is_read_and_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write(
            PROCESSOR_FILE,
            r#"{"processor_class": "Qwen3VLProcessor", "image_processor":
                {"image_mean": [0.4, 0.5, 0.6], "size": {"shortest_edge": 5000, "longest_edge": 6000}}}"#,
        );
        let read = || ImageProcessorConfig::published(dir.path()).unwrap();
        assert_eq!(read().image_mean, [0.4, 0.5, 0.6]);
        assert_eq!((read().min_pixels, read().max_pixels), (5000, 6000));
        write(PREPROCESSOR_FILE, r#"{"image_mean": [0.1, 0.1, 0.1]}"#);
        assert_eq!(read().image_mean, [0.4, 0.5, 0.6]);
        write_pixel_limits(dir.path(), 4096, 8192).unwrap();
        assert_eq!((read().min_pixels, read().max_pixels), (4096, 8192));
        assert_eq!(read().image_mean, [0.4, 0.5, 0.6]);
        // A processor file without an image processor leaves the other file in force.
        write(PROCESSOR_FILE, r#"{"processor_class": "Qwen3VLProcessor"}"#);
        assert_eq!(read().image_mean, [0.1, 0.1, 0.1]);
        assert_eq!((read().min_pixels, read().max_pixels), (4096, 8192));
        write(PROCESSOR_FILE, "{");
        let error = ImageProcessorConfig::published(dir.path()).unwrap_err();
        assert!(error.to_string().contains(PROCESSOR_FILE), "{error}");
    }

    #[test]
    fn both_forms_of_the_limits_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            fs::write(dir.path().join("preprocessor_config.json"), text).unwrap();
            ImageProcessorConfig::published(dir.path())
        };
        let limits = |config: ImageProcessorConfig| (config.min_pixels, config.max_pixels);
        let size = r#"{"size": {"shortest_edge": 65536, "longest_edge": 16777216}}"#;
        assert_eq!(limits(read(size).unwrap()), (65536, 16777216));
        let flat = r#"{"min_pixels": 5000, "max_pixels": 6000, "size": {"height": 3}}"#;
        assert_eq!(limits(read(flat).unwrap()), (5000, 6000));
        assert!(matches!(read("[]"), Err(ImageError::ConfigParse { .. })));
        for (text, key) in [
            (r#"{"patch_size": 0}"#, "patch_size"),
            (r#"{"max_pixels": 1023}"#, "max_pixels"),
            (r#"{"min_pixels": 9000, "max_pixels": 8000}"#, "min_pixels"),
            (r#"{"image_std": [0.5, 0.0, 0.5]}"#, "image_std"),
            (r#"{"rescale_factor": 1.0}"#, "rescale_factor"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
        let error = ImageProcessorConfig::from_dir(Path::new("no/model")).unwrap_err();
        assert!(
            error.to_string().contains("preprocessor_config.json"),
            "{error}"
        );
    }
}
