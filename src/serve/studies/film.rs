//! `GET /v1/studies/{id}/films/{film}`: all levels of a film, for a viewer with a window of its own.
//!
//! The body is `height · width` unsigned numbers of 16 bits, little endian, in gzip as the transport's encoding; what they
//! mean is JSON in the header `x-film`.

use std::{io::Write, sync::Arc, time::Duration};

use axum::{
    extract::{Extension, Path, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use flate2::{Compression, write::GzEncoder};
use serde_json::json;

use super::{identity::Identity, with_store};
use crate::processor::{
    dicom::{GreyFilm, grey, looks_like_dicom},
    image::DecodeLimits,
    patches::ImageProcessor,
};
use crate::serve::{App, auth::Peer, content::image_error, error::ApiError, share::Full};
use crate::store::disk::Scope;

/// Time to wait for a turn and its memory.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a message calls the film.
const NAME: &str = "the film";

/// A picture of 8 bits as a film: its colours as their luminance.
fn of_picture(bytes: &[u8], images: &ImageProcessor) -> Result<GreyFilm, ApiError> {
    let picture = images.decode(bytes, NAME).map_err(|error| ApiError {
        param: None,
        ..image_error(NAME, &error)
    })?;
    let (width, height) = (picture.width(), picture.height());
    let pixels = picture.into_pixels();
    let level = |rgb: &[u8]| {
        let [red, green, blue] = [rgb[0], rgb[1], rgb[2]].map(u32::from);
        // ITU-R 601, as Pillow's `L`; of a grey pixel its own level.
        ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16) as u16
    };
    Ok(GreyFilm {
        width,
        height,
        numbers: pixels.chunks_exact(3).map(level).collect(),
        first: 0.0,
        step: 1.0,
        window: (255.0, 127.5),
        inverted: false,
        spacing: None,
        view: String::new(),
    })
}

fn read(
    bytes: &[u8],
    images: &ImageProcessor,
    limits: &DecodeLimits,
) -> Result<GreyFilm, ApiError> {
    if looks_like_dicom(&bytes[..bytes.len().min(512)]) {
        match grey(bytes, limits) {
            Ok(Some(film)) => return Ok(film),
            // Colours, and numbers of 32 bits, as the model sees them.
            Ok(None) => {}
            // The picture's own error has more words.
            Err(error) => log::debug!("a film has no levels: {error}"),
        }
    }
    of_picture(bytes, images)
}

fn packed(film: &GreyFilm) -> std::io::Result<Vec<u8>> {
    let bytes: Vec<u8> = film
        .numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&bytes)?;
    encoder.finish()
}

/// Sends a film.
pub(super) async fn film(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    Extension(identity): Extension<Identity>,
    Path((study, film)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    identity.require(Scope::Read)?;
    let bytes = with_store(&app, move |store| store.film(&study, &film)).await?;
    let images = app.parts.images.clone();
    let cost = images
        .decoding_cost(&bytes, NAME)
        .map_err(|error| ApiError {
            param: None,
            ..image_error(NAME, &error)
        })?;
    // The numbers, their bytes, and these packed.
    let needed = cost.bytes + 6 * cost.pixels;
    let busy = || {
        ApiError::new(
            StatusCode::TOO_MANY_REQUESTS,
            "too many films are being read already; try again later",
        )
        .with_code("queue_full")
    };
    let taken = tokio::time::timeout(PATIENCE, async {
        let place = app.previews.take(peer.client, 1, 0).await?;
        let share = app.pictures.take(peer.client, 0, needed).await?;
        Ok::<_, Full>((place, share))
    });
    let share = taken.await.map_err(|_| busy())?.map_err(|_| busy())?;
    let limits = app.config.decode_limits();
    let made = tokio::task::spawn_blocking(move || {
        let _share = share;
        let film = read(&bytes, &images, &limits)?;
        let body = packed(&film).map_err(|error| {
            log::error!("a film could not be packed: {error}");
            ApiError::internal()
        })?;
        let facts = json!({
            "width": film.width,
            "height": film.height,
            "first": film.first,
            "step": film.step,
            "window": film.window.0,
            "level": film.window.1,
            "inverted": film.inverted,
            "spacing": film.spacing.map(|(spacing, _)| spacing),
            "spacing_in_body": film.spacing.map(|(_, body)| body),
            "view": film.view.chars().filter(char::is_ascii_graphic).collect::<String>(),
        });
        Ok::<_, ApiError>((facts.to_string(), body))
    });
    let (facts, body) = made.await.map_err(|_| ApiError::internal())??;
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_ENCODING, "gzip".to_owned()),
        ("x-film".parse().map_err(|_| ApiError::internal())?, facts),
    ];
    Ok((headers, body).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::patches::ImageProcessorConfig;

    #[test]
    fn a_grey_pixel_keeps_its_level_in_a_film_of_8_bits() {
        let images = ImageProcessor::new(ImageProcessorConfig::default()).unwrap();
        let mut png = std::io::Cursor::new(Vec::new());
        let picture = image::GrayImage::from_fn(3, 2, |x, y| image::Luma([(x * 100 + y) as u8]));
        picture.write_to(&mut png, image::ImageFormat::Png).unwrap();
        let film = of_picture(&png.into_inner(), &images).unwrap();
        assert_eq!((film.width, film.height), (3, 2));
        assert_eq!(film.numbers, [0, 100, 200, 1, 101, 201]);
        let mut body = Vec::new();
        let packed = packed(&film).unwrap();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&packed[..]), &mut body)
            .unwrap();
        assert_eq!(body[2..6], [100, 0, 200, 0]);
    }
}
