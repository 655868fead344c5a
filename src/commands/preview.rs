//! `preview`: what the model sees of an image, as a picture, an array and sizes.

use std::io::{Cursor, Write, stdout};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use clap::Args;
use image::ImageFormat;
use serde_json::{Value, json};

use super::models::{DownloadArgs, find};
use super::pipeline_options::with_adapter;
use super::shared_args::{AdapterArgs, LoadArgs};
use super::shell::unless_closed;
use super::usage::UsageError;
use crate::{
    base::files::{expect_file, name::text_of, sha256_bytes, sha256_file, write_atomic},
    base::hub::Want,
    processor::{
        image::{Reading, RgbImage},
        patches::ImageProcessorConfig,
    },
    runtime::pipeline::TextAndImages,
};

/// Arguments of `preview`.
#[derive(Debug, Args)]
pub struct PreviewArgs {
    /// Image of any format that `infer` reads.
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
    /// PNG to write.
    #[arg(long, value_name = "FILE.png", required_unless_present_any = ["npy", "pixel_values", "json"])]
    pub output: Option<PathBuf>,
    /// Show the image at the size the model sees; this is the default.
    #[arg(long, conflicts_with = "original")]
    pub resized: bool,
    /// Show the image upright and with its grey levels, but as large as it is.
    #[arg(long)]
    pub original: bool,
    /// Draw the borders of the image's tokens (2 × 2 patches each) into the PNG.
    #[arg(long, conflicts_with = "original", requires = "output")]
    pub patches: bool,
    /// Write the shown pixels as a NumPy array, uint8 [height, width, 3], without borders.
    #[arg(long, value_name = "FILE.npy")]
    pub npy: Option<PathBuf>,
    /// Write what the vision tower reads as a NumPy array, float32 [patches, 1536], in the order of
    /// transformers' `pixel_values`.
    #[arg(long, value_name = "FILE.npy")]
    pub pixel_values: Option<PathBuf>,
    /// Print one JSON object: sizes, `image_grid_thw`, tokens, SHA-256 of the shown pixels, remarks.
    #[arg(long)]
    pub json: bool,
    /// Frame of a multi-frame DICOM file or page of a multi-page TIFF file, counted from 1.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub frame: Option<u32>,
    /// Folder or name of the checkpoint whose image processor is used; weights are not read.
    #[arg(long, value_name = "DIR|ID", default_value = "model/tiny")]
    pub model: PathBuf,
    /// Folder or name of an adapter, whose training may have set other pixel limits.
    #[arg(long, value_name = "DIR|ID")]
    pub adapter: Option<PathBuf>,
    /// Smallest size the image is scaled to, in pixels; by default that of the adapter's training, else the
    /// checkpoint's.
    #[arg(long, value_name = "PIXELS")]
    pub min_pixels: Option<usize>,
    /// Largest size the image is scaled to, in pixels, by default likewise.
    #[arg(long, value_name = "PIXELS")]
    pub max_pixels: Option<usize>,
}

/// Colour of the borders of tokens, which no film has.
const BORDER: [u8; 3] = [255, 160, 0];

/// Runs `preview`.
///
/// # Errors
/// An image that cannot be used, or files that cannot be read or written.
pub fn run(args: &PreviewArgs) -> Result<()> {
    let targets = [&args.output, &args.npy, &args.pixel_values];
    let given: Vec<&PathBuf> = targets.into_iter().flatten().collect();
    for (at, target) in given.iter().enumerate() {
        if given[..at].contains(target) || **target == args.image {
            bail!(UsageError(format!(
                "`{}` is named twice; give each file a name of its own",
                target.display()
            )));
        }
    }
    let parts = parts(args)?;
    expect_file(&args.image)?;
    let frame = args.frame.map(|frame| frame as usize);
    let Reading { picture, remarks } = parts.images.read(&args.image, frame)?;
    let resized = parts
        .images
        .resize(&picture)
        .with_context(|| format!("`{}`", args.image.display()))?;
    let shown: &RgbImage = if args.original { &picture } else { &resized };
    let config = parts.images.config();
    if let Some(path) = &args.npy {
        let shape = [shown.height(), shown.width(), 3];
        write_npy(path, "|u1", &shape, shown.pixels())?;
    }
    if let Some(path) = &args.pixel_values {
        let patches = parts.images.process(&picture)?;
        let count = patches.grid_thw.iter().product();
        let values = patches.pixel_values.iter();
        let bytes: Vec<u8> = values.flat_map(|value| value.to_le_bytes()).collect();
        write_npy(path, "<f4", &[count, config.row_len()], &bytes)?;
    }
    if let Some(path) = &args.output {
        let pixels = if args.patches {
            with_borders(shown, config.factor())
        } else {
            shown.pixels().to_vec()
        };
        write_png(path, shown.width(), shown.height(), pixels)?;
    }
    let grid = parts.images.grid_for(picture.height(), picture.width())?;
    let found = Found {
        original: &picture,
        resized: &resized,
        shown,
        grid,
        tokens: parts.images.num_tokens(grid),
    };
    let mut out = stdout().lock();
    let printed = if args.json {
        let mut object = found.object(args, config)?;
        object["remarks"] = json!(remarks);
        writeln!(out, "{object}")
    } else {
        let lines = found.lines(&parts);
        let remarks = remarks.iter().map(|remark| format!("remark: {remark}\n"));
        let text: String = std::iter::once(lines).chain(remarks).collect();
        out.write_all(text.as_bytes())
    };
    unless_closed(printed).context("cannot write to stdout")
}

/// Everything of the checkpoint but its weights.
fn parts(args: &PreviewArgs) -> Result<TextAndImages> {
    let mut adapter = AdapterArgs {
        adapter: args.adapter.clone(),
        any_base: false,
    };
    adapter.find(DownloadArgs::default())?;
    let model = find(&args.model, Want::Description, DownloadArgs::default())?;
    let load = LoadArgs {
        dtype: None,
        quantize: None,
        memory: None,
        min_pixels: args.min_pixels,
        max_pixels: args.max_pixels,
        mmproj: None,
        tokenizer: None,
    };
    let options = with_adapter(&model, &adapter, &load, DType::F32);
    Ok(TextAndImages::load(&options)?)
}

/// Sizes of an image on its way to the model.
struct Found<'a> {
    original: &'a RgbImage,
    resized: &'a RgbImage,
    shown: &'a RgbImage,
    grid: [usize; 3],
    tokens: usize,
}

impl Found<'_> {
    fn lines(&self, parts: &TextAndImages) -> String {
        let [_, rows, columns] = self.grid;
        format!(
            "{} × {} pixels, seen as {} × {}: {columns} × {rows} patches, {} tokens\n{}\n",
            self.original.width(),
            self.original.height(),
            self.resized.width(),
            self.resized.height(),
            self.tokens,
            parts.pixel_limits(),
        )
    }

    fn object(&self, args: &PreviewArgs, config: &ImageProcessorConfig) -> Result<Value> {
        let size = |image: &RgbImage| json!([image.width(), image.height()]);
        let (name, encoding) = text_of(&[&args.image]);
        let mut object = json!({
            "image": name,
            "image_sha256": sha256_file(&args.image)?,
            "size_wh": size(self.original),
            "resized_wh": size(self.resized),
            "shown_wh": size(self.shown),
            "shown_sha256": sha256_bytes(self.shown.pixels()),
            "image_grid_thw": self.grid,
            "image_tokens": self.tokens,
            "patch_size": config.patch_size,
            "temporal_patch_size": config.temporal_patch_size,
            "merge_size": config.merge_size,
            "min_pixels": config.min_pixels,
            "max_pixels": config.max_pixels,
            "image_mean": config.image_mean,
            "image_std": config.image_std,
        });
        if let Some(encoding) = encoding {
            object["image_encoding"] = encoding.into();
        }
        for (key, path) in [
            ("output", &args.output),
            ("npy", &args.npy),
            ("pixel_values", &args.pixel_values),
        ] {
            if let Some(path) = path {
                object[key] = text_of(&[path]).0.into();
            }
        }
        Ok(object)
    }
}

/// The pixels with the upper and left border of each square of `side` pixels.
fn with_borders(image: &RgbImage, side: usize) -> Vec<u8> {
    let mut pixels = image.pixels().to_vec();
    for (at, pixel) in pixels.as_chunks_mut::<3>().0.iter_mut().enumerate() {
        let (x, y) = (at % image.width(), at / image.width());
        if x.is_multiple_of(side) || y.is_multiple_of(side) {
            *pixel = BORDER;
        }
    }
    pixels
}

fn write_png(path: &Path, width: usize, height: usize, pixels: Vec<u8>) -> Result<()> {
    let buffer = image::RgbImage::from_raw(width as u32, height as u32, pixels);
    let buffer = buffer.context("the pixels do not fill the image")?;
    let mut png = Cursor::new(Vec::new());
    buffer.write_to(&mut png, ImageFormat::Png)?;
    Ok(write_atomic(path, |out| out.write_all(png.get_ref()))?)
}

/// Writes a NumPy array in row-major order.
///
/// Source: `numpy.lib.format`, version 1.0.
fn write_npy(path: &Path, dtype: &str, shape: &[usize], bytes: &[u8]) -> Result<()> {
    /// Magic word, version and length of the header.
    const PREFIX: usize = 10;
    const ALIGNMENT: usize = 64;
    let sides: String = shape.iter().map(|side| format!("{side}, ")).collect();
    let sides = sides.trim_end_matches([',', ' ']);
    let mut header =
        format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({sides}), }}");
    let length = (PREFIX + header.len() + 1).next_multiple_of(ALIGNMENT) - PREFIX;
    header.extend(std::iter::repeat_n(' ', length - 1 - header.len()));
    header.push('\n');
    Ok(write_atomic(path, |out| {
        out.write_all(b"\x93NUMPY\x01\0")?;
        out.write_all(&(header.len() as u16).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        out.write_all(bytes)
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_are_drawn_around_each_token() {
        let image = RgbImage::from_gray(4, 4, &[7; 16]).unwrap();
        let drawn = with_borders(&image, 2);
        let levels: Vec<u8> = drawn.iter().copied().step_by(3).collect();
        assert_eq!(
            levels,
            [
                255, 255, 255, 255, 255, 7, 255, 7, 255, 255, 255, 255, 255, 7, 255, 7
            ]
        );
    }

    #[test]
    fn a_numpy_file_has_an_aligned_header() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy");
        write_npy(&path, "|u1", &[2, 3], &[1, 2, 3, 4, 5, 6]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let (header, numbers) = bytes.split_at(bytes.len() - 6);
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
        assert!(header.len().is_multiple_of(64) && header.ends_with(b"\n"));
        let text = String::from_utf8_lossy(&header[10..]);
        assert!(text.contains("'shape': (2, 3), }"), "{text}");
    }
}
