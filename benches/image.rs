//! Image preprocessing: how long from bytes to patches?

mod harness;

use harness::{measure, picture, report};
use xray_qwen3vl::processor::patches::{ImageProcessor, ImageProcessorConfig};

fn png(side: usize) -> Vec<u8> {
    let picture = picture(side);
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_raw(side as u32, side as u32, picture.into_pixels())
        .expect("three bytes a pixel")
        .write_to(&mut bytes, image::ImageFormat::Png)
        .expect("memory takes it");
    bytes.into_inner()
}

fn main() {
    let processor = ImageProcessor::new(ImageProcessorConfig::default()).expect("defaults fit");
    let small = ImageProcessor::new(ImageProcessorConfig {
        max_pixels: 384 * 384,
        ..ImageProcessorConfig::default()
    })
    .expect("limits fit");
    let (png_512, png_2048) = (png(512), png(2048));
    let whole = |processor: &ImageProcessor, bytes: &[u8]| {
        let picture = processor.decode(bytes, "bench").expect("a good file");
        processor.process(&picture).expect("a square picture")
    };
    let decoded = picture(512);
    report(
        "image",
        &[
            measure("png_512_to_patches", 25, || whole(&processor, &png_512)),
            measure("png_512_scaled_to_384", 25, || whole(&small, &png_512)),
            measure("png_2048_scaled_to_992", 9, || whole(&processor, &png_2048)),
            measure("patches_only_512", 25, || processor.process(&decoded)),
        ],
    );
}
