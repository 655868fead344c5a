//! `POST /v1/images/preview`: an image that a browser cannot show, as a PNG that it can.
//!
//! What comes back is what the model's image processor reads, scaled down where it is very large.
//! Nothing is kept.

use std::{io::Cursor, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Extension, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use image::{DynamicImage, ImageFormat, imageops::FilterType};

use super::{
    App,
    auth::Peer,
    body::read_body,
    content::{PICTURE_BYTES, image_error},
    error::ApiError,
    share::Full,
};
use crate::processor::image::{ImageError, RgbImage};

/// Longest side of a preview, in pixels.
const LONGEST_SIDE: u32 = 2048;

/// Time to wait for a turn and its memory.
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes of a pixel of a row while it is scaled: four channels of f32.
const SCALING_BYTES: u64 = 16;

/// Makes the preview of the image in the body.
///
/// # Errors
/// [`ApiError`], with the words a chat request with this image would get; of status 429 where too many
/// previews wait.
pub async fn preview(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    body: Body,
) -> Result<Response, ApiError> {
    let (bytes, memory) = read_body(&app, peer.client, body).await?;
    let name = "the image";
    let wrong = move |error: &ImageError| ApiError {
        param: None,
        ..image_error(name, error)
    };
    let images = app.parts.images.clone();
    let cost = images
        .decoding_cost(&bytes, name)
        .map_err(|error| wrong(&error))?;
    let side = u64::from(LONGEST_SIDE);
    // Rows of the picture at their new height; the longer side is at least the root.
    let scaling = cost.pixels.isqrt() * side * SCALING_BYTES;
    let needed = cost.bytes + scaling + 2 * PICTURE_BYTES * side * side;
    let busy = || {
        ApiError::new(
            StatusCode::TOO_MANY_REQUESTS,
            "too many previews wait already; try again later",
        )
        .with_code("queue_full")
    };
    // Previews have places of their own: reports do not wait for them.
    let taken = tokio::time::timeout(PATIENCE, async {
        let place = app.previews.take(peer.client, 1, 0).await?;
        let share = app.pictures.take(peer.client, 0, needed).await?;
        Ok((place, share))
    });
    let share = match taken.await {
        Ok(Ok(share)) => share,
        Ok(Err(Full::TooManyWait)) | Err(_) => return Err(busy()),
        Ok(Err(Full::TooLarge)) => {
            let limit = app.pictures.largest();
            return Err(wrong(&ImageError::TooMuchMemory {
                name: name.into(),
                limit,
            }));
        }
    };
    let png = tokio::task::spawn_blocking(move || {
        let _taken = (share, memory);
        let picture = images.decode(&bytes, name).map_err(|error| wrong(&error))?;
        drop(bytes);
        encode(picture)
    })
    .await
    .map_err(|error| {
        log::error!("a preview failed: {error}");
        ApiError::internal()
    })??;
    Ok(([(header::CONTENT_TYPE, "image/png")], png).into_response())
}

fn encode(picture: RgbImage) -> Result<Vec<u8>, ApiError> {
    let (width, height) = (picture.width() as u32, picture.height() as u32);
    let pixels = image::RgbImage::from_raw(width, height, picture.into_pixels())
        .ok_or_else(ApiError::internal)?;
    let mut picture = DynamicImage::from(pixels);
    if width.max(height) > LONGEST_SIDE {
        picture = picture.resize(LONGEST_SIDE, LONGEST_SIDE, FilterType::Triangle);
    }
    let mut png = Cursor::new(Vec::new());
    picture
        .write_to(&mut png, ImageFormat::Png)
        .map_err(|error| {
            log::error!("a preview could not be written: {error}");
            ApiError::internal()
        })?;
    Ok(png.into_inner())
}
