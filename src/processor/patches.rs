//! RGB pictures to the vision tower's input: scaled, normalised, cut into patches in its order.
//!
//! Patches come in blocks of `merge_size` × `merge_size`, because the patch merger joins rows that
//! lie next to each other in the sequence. A still picture is a film of `temporal_patch_size` equal
//! frames. This module knows nothing of tensors, tokens or prompts; it yields plain vectors.
//!
//! Shape letters: `patches` = grid time × height × width, `row` = channels × `temporal_patch_size` ×
//! `patch_size` × `patch_size`.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::base::files::write_atomic;

use super::image::{self, DecodeLimits, ImageError, Reading, RgbImage};
use super::resize::{ResizeRule, resize_bicubic, smart_resize};
use super::sample::PixelLimits;

/// Most pixels a picture may be scaled to.
const MAX_SCALED_PIXELS: usize = 100_000_000;

/// Where published checkpoints keep the image processor's keys.
pub const PREPROCESSOR_FILE: &str = "preprocessor_config.json";

/// Where transformers 5 keeps them.
pub const PROCESSOR_FILE: &str = "processor_config.json";

/// Red, green and blue.
const CHANNELS: usize = 3;

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
/// [`FileError`](crate::base::files::FileError) names the file.
pub fn write_pixel_limits(
    dir: &Path,
    min_pixels: usize,
    max_pixels: usize,
) -> Result<(), crate::base::files::FileError> {
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

    /// Length of one row of [`ImagePatches::pixel_values`].
    pub fn row_len(&self) -> usize {
        CHANNELS * self.temporal_patch_size * self.patch_size * self.patch_size
    }
}

/// One picture, ready for the patch embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct ImagePatches {
    /// `[patches, row]`, row-major; a row is `[channels, temporal, patch, patch]`.
    pub pixel_values: Vec<f32>,
    /// Time, height and width in patches.
    pub grid_thw: [usize; 3],
}

/// Makes [`ImagePatches`] of pictures; cheap to share between threads.
#[derive(Debug, Clone)]
pub struct ImageProcessor {
    config: ImageProcessorConfig,
    limits: DecodeLimits,
    /// Normalised value of every level, per channel.
    levels: [[f32; 256]; CHANNELS],
}

impl ImageProcessor {
    /// Checks `config` and prepares its tables; pictures are held to [`DecodeLimits::default`].
    ///
    /// # Errors
    /// [`ImageError::ConfigValue`] if the configuration cannot be used.
    pub fn new(config: ImageProcessorConfig) -> Result<Self, ImageError> {
        config.validate()?;
        let levels = std::array::from_fn(|channel| {
            // The reference folds 1/255 into both numbers before it rounds to f32.
            let mean = config.image_mean[channel] * 255.0;
            let std = config.image_std[channel] * 255.0;
            std::array::from_fn(|level| (level as f32 - mean) / std)
        });
        Ok(Self {
            config,
            limits: DecodeLimits::default(),
            levels,
        })
    }

    /// Holds pictures to other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: DecodeLimits) -> Self {
        self.limits = limits;
        self
    }

    /// This processor at a row's own pixel limits.
    ///
    /// Where only one limit is given and the other contradicts it, the given one holds for both.
    ///
    /// # Errors
    /// [`ImageError::ConfigValue`] if the limits cannot be used.
    pub fn with_pixels(&self, limits: PixelLimits) -> Result<Cow<'_, Self>, ImageError> {
        if limits == PixelLimits::default() {
            return Ok(Cow::Borrowed(self));
        }
        let mut own = self.clone();
        let config = &mut own.config;
        config.max_pixels = limits.max_pixels.unwrap_or(config.max_pixels);
        config.min_pixels = limits.min_pixels.unwrap_or(config.min_pixels);
        if limits.min_pixels.is_none() {
            config.min_pixels = config.min_pixels.min(config.max_pixels);
        }
        if limits.max_pixels.is_none() {
            config.max_pixels = config.max_pixels.max(config.min_pixels);
        }
        own.config.validate()?;
        Ok(Cow::Owned(own))
    }

    /// The sizes this processor works with.
    pub fn config(&self) -> &ImageProcessorConfig {
        &self.config
    }

    /// Reads and decodes the picture at `path`; see [`image::load`].
    ///
    /// # Errors
    /// As [`image::load`]; each names the file.
    pub fn load(&self, path: &Path) -> Result<RgbImage, ImageError> {
        image::load(path, &self.limits)
    }

    /// Reads a frame of the picture at `path`, and what to know of it; see [`image::read`].
    ///
    /// # Errors
    /// As [`image::read`]; each names the file.
    pub fn read(&self, path: &Path, frame: Option<usize>) -> Result<Reading, ImageError> {
        image::read(path, frame, &self.limits)
    }

    /// Decodes the picture in `bytes`, called `name` in messages; see [`image::decode`].
    ///
    /// # Errors
    /// As [`image::decode`]; each carries `name`.
    pub fn decode(&self, bytes: &[u8], name: &str) -> Result<RgbImage, ImageError> {
        image::decode(bytes, name, &self.limits)
    }

    /// What decoding the picture in `bytes` takes; see [`image::decoding_cost`].
    ///
    /// # Errors
    /// As [`image::decoding_cost`]; each carries `name`.
    pub fn decoding_cost(
        &self,
        bytes: &[u8],
        name: &str,
    ) -> Result<image::DecodingCost, ImageError> {
        image::decoding_cost(bytes, name, &self.limits)
    }

    /// As [`Self::decode`], with what a reader of a report should know about the picture.
    ///
    /// # Errors
    /// As [`image::decode`]; each carries `name`.
    pub fn decode_with_remarks(&self, bytes: &[u8], name: &str) -> Result<Reading, ImageError> {
        image::decode_frame(bytes, name, None, &self.limits)
    }

    /// Width and height of the picture at `path`, from its header alone; see [`image::probe`].
    ///
    /// # Errors
    /// As [`image::probe`]; each names the file.
    pub fn probe(&self, path: &Path) -> Result<(usize, usize), ImageError> {
        image::probe(path, &self.limits)
    }

    /// The grid `[time, height, width]`, in patches, of a picture of `height` × `width` pixels.
    ///
    /// # Errors
    /// [`ImageError::AspectRatio`] if one side is more than 200 times the other.
    pub fn grid_for(&self, height: usize, width: usize) -> Result<[usize; 3], ImageError> {
        let (height, width) = self.size_for(height, width)?;
        Ok([
            1,
            height / self.config.patch_size,
            width / self.config.patch_size,
        ])
    }

    /// Tokens that a picture of grid `grid_thw` takes in the decoder's sequence.
    pub fn num_tokens(&self, grid_thw: [usize; 3]) -> usize {
        grid_thw.iter().product::<usize>() / self.config.merge_size.pow(2)
    }

    /// `picture` at the size the model sees; borrowed if it has that size already.
    ///
    /// # Errors
    /// [`ImageError::AspectRatio`] if one side is more than 200 times the other.
    pub fn resize<'a>(&self, picture: &'a RgbImage) -> Result<Cow<'a, RgbImage>, ImageError> {
        let (height, width) = self.size_for(picture.height(), picture.width())?;
        if (height, width) == (picture.height(), picture.width()) {
            return Ok(Cow::Borrowed(picture));
        }
        resize_bicubic(picture, width, height).map(Cow::Owned)
    }

    /// Scales `picture`, normalises it and cuts it into patches.
    ///
    /// # Errors
    /// [`ImageError::AspectRatio`] if one side is more than 200 times the other.
    ///
    /// Source: `Qwen2VLImageProcessor`, transformers.
    pub fn process(&self, picture: &RgbImage) -> Result<ImagePatches, ImageError> {
        let picture = self.resize(picture)?;
        let patch = self.config.patch_size;
        let grid_thw = [1, picture.height() / patch, picture.width() / patch];
        Ok(ImagePatches {
            pixel_values: self.cut(&picture),
            grid_thw,
        })
    }

    fn size_for(&self, height: usize, width: usize) -> Result<(usize, usize), ImageError> {
        let ImageProcessorConfig {
            min_pixels,
            max_pixels,
            resize_rule,
            ..
        } = self.config;
        smart_resize(
            height,
            width,
            self.config.factor(),
            min_pixels,
            max_pixels,
            resize_rule,
        )
    }

    /// Patches of a picture whose sides are multiples of the factor.
    fn cut(&self, picture: &RgbImage) -> Vec<f32> {
        let ImageProcessorConfig {
            patch_size: patch,
            merge_size: merge,
            ..
        } = self.config;
        let frames = self.config.temporal_patch_size;
        let (stride, area) = (picture.width() * CHANNELS, patch * patch);
        let (rows, columns) = (picture.height() / patch, picture.width() / patch);
        let row_len = self.config.row_len();
        let mut pixel_values = vec![0.0; rows * columns * row_len];
        // A block of merge × merge patches is contiguous in the output, and blocks follow each other
        // in reading order.
        for (index, out) in pixel_values.chunks_exact_mut(row_len).enumerate() {
            let (block, inside) = (index / (merge * merge), index % (merge * merge));
            let blocks_across = columns / merge;
            let top = (block / blocks_across * merge + inside / merge) * patch;
            let left = (block % blocks_across * merge + inside % merge) * patch;
            for y in 0..patch {
                let start = (top + y) * stride + left * CHANNELS;
                let source = picture.pixels()[start..start + patch * CHANNELS]
                    .as_chunks::<3>()
                    .0;
                for (channel, levels) in self.levels.iter().enumerate() {
                    let start = channel * frames * area + y * patch;
                    for (value, rgb) in out[start..start + patch].iter_mut().zip(source) {
                        *value = levels[usize::from(rgb[channel])];
                    }
                }
            }
            for frame in out.chunks_exact_mut(frames * area) {
                let (first, others) = frame.split_at_mut(area);
                others
                    .chunks_exact_mut(area)
                    .for_each(|other| other.copy_from_slice(first));
            }
        }
        pixel_values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_come_in_blocks_and_frames_repeat() {
        let config = ImageProcessorConfig {
            patch_size: 2,
            min_pixels: 16,
            max_pixels: 1024,
            ..Default::default()
        };
        let processor = ImageProcessor::new(config).unwrap();
        // 4 × 8 pixels of 2 × 4 patches; red counts pixels, green is 0, blue is 255.
        let pixels = (0..32).flat_map(|index| [index, 0, 255]).collect();
        let picture = RgbImage::from_rgb(8, 4, pixels).unwrap();
        let patches = processor.process(&picture).unwrap();
        assert_eq!(patches.grid_thw, [1, 2, 4]);
        assert_eq!(processor.num_tokens(patches.grid_thw), 2);
        let rows: Vec<&[f32]> = patches.pixel_values.chunks(24).collect();
        let red = |row: &[f32]| {
            row.iter()
                .map(|v| (v * 127.5 + 127.5).round())
                .collect::<Vec<_>>()
        };
        // The block on the left: two patches above, two below; then the block on the right.
        let corners: Vec<f32> = rows.iter().map(|row| red(row)[0]).collect();
        assert_eq!(corners, [0.0, 2.0, 16.0, 18.0, 4.0, 6.0, 20.0, 22.0]);
        assert_eq!(red(&rows[0][..8]), [0.0, 1.0, 8.0, 9.0, 0.0, 1.0, 8.0, 9.0]);
        assert!(rows[0][8..16].iter().all(|value| *value == -1.0));
        assert!(rows[0][16..].iter().all(|value| *value == 1.0));
    }

    #[test]
    fn a_single_pixel_becomes_the_smallest_picture() {
        let processor = ImageProcessor::new(ImageProcessorConfig::default()).unwrap();
        let pixel = RgbImage::from_gray(1, 1, &[255]).unwrap();
        let patches = processor.process(&pixel).unwrap();
        assert_eq!(patches.grid_thw, [1, 4, 4]);
        assert!(patches.pixel_values.iter().all(|value| *value == 1.0));
        let line = RgbImage::from_gray(201, 1, &[0; 201]).unwrap();
        let error = processor.process(&line).unwrap_err().to_string();
        assert!(error.contains("201 × 1"), "{error}");
    }

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
