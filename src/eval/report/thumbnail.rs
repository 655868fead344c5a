//! Images small enough for a page that needs nothing beside it.

use base64::{Engine, engine::general_purpose::STANDARD};
use image::{
    ExtendedColorType, ImageEncoder, RgbImage as Pixels, codecs::jpeg::JpegEncoder, imageops,
};

use crate::processor::image::RgbImage;

/// Quality of the JPEG, 1 to 100: a radiograph of 320 pixels is then about 10 kB.
const QUALITY: u8 = 82;

/// `image` as a `data:` URL of a JPEG whose longer side is at most `longest` pixels; grey where the image is.
/// `None` if it cannot be encoded.
pub fn data_url(image: &RgbImage, longest: u32) -> Option<String> {
    let (width, height) = (image.width() as u32, image.height() as u32);
    let pixels = Pixels::from_raw(width, height, image.pixels().to_vec())?;
    let scale = f64::from(longest) / f64::from(width.max(height).max(1));
    let small = if scale < 1.0 {
        let side = |side: u32| ((f64::from(side) * scale).round() as u32).max(1);
        imageops::thumbnail(&pixels, side(width), side(height))
    } else {
        pixels
    };
    let (width, height) = small.dimensions();
    let grey = small.pixels().all(|p| p[0] == p[1] && p[1] == p[2]);
    let (bytes, color) = if grey {
        let bytes = small.pixels().map(|p| p[0]).collect();
        (bytes, ExtendedColorType::L8)
    } else {
        (small.into_raw(), ExtendedColorType::Rgb8)
    };
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, QUALITY)
        .write_image(&bytes, width, height, color)
        .ok()?;
    Some(format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_scaled_down_and_stay_grey() {
        let grey: Vec<u8> = (0..60 * 40).map(|at| (at % 251) as u8).collect();
        let source = RgbImage::from_gray(60, 40, &grey).expect("an image");
        let url = data_url(&source, 30).expect("it is encoded");
        let jpeg = url.strip_prefix("data:image/jpeg;base64,").expect("a JPEG");
        let jpeg = STANDARD.decode(jpeg).expect("base64");
        let read = image::load_from_memory(&jpeg).expect("a JPEG");
        assert_eq!((read.width(), read.height()), (30, 20));
        assert_eq!(read.color(), image::ColorType::L8);
    }
}
