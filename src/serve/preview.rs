//! `POST /v1/images/preview`: a film that a browser cannot show, as a PNG that it can.
//!
//! What comes back is what the model's image processor reads, scaled down where it is very large.
//! Nothing is kept.

use std::{io::Cursor, sync::Arc};

use axum::{
    body::Body,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use image::{DynamicImage, ImageFormat, imageops::FilterType};

use super::{App, chat::read_body, content::image_error, error::ApiError};
use crate::processor::image::RgbImage;

/// Longest side of a preview, in pixels.
const LONGEST_SIDE: u32 = 2048;

/// Makes the preview of the image in the body.
///
/// # Errors
/// [`ApiError`], with the words a chat request with this image would get.
pub async fn preview(State(app): State<Arc<App>>, body: Body) -> Result<Response, ApiError> {
    let (bytes, _memory) = read_body(&app, body).await?;
    let permit = app.permit_to_decode().await?;
    let images = app.parts.images.clone();
    let png = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let name = "the image";
        let picture = images.decode(&bytes, name).map_err(|error| ApiError {
            param: None,
            ..image_error(name, &error)
        })?;
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
