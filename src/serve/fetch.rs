//! Images from addresses on the web, where `--allow-image-urls` allows that.

use std::time::Duration;

use hyper::body::Bytes;

use super::{body::append, error::ApiError, share::Share};
use crate::base::web::fetch::{FetchError, Sink, fetch, is_public};

/// Time for one image, redirects included.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Fetches the image at `url`, of at most `max_bytes`; `name` is its name in messages, and `memory`
/// grows with what has come.
///
/// # Errors
/// [`ApiError`] of status 400, which gives no reason why an address could not be reached, or of status 503
/// where there is no memory for the image.
pub(super) async fn fetch_image(
    url: &str,
    max_bytes: usize,
    name: &str,
    memory: &mut Share,
) -> Result<Bytes, ApiError> {
    let mut image = SharedMemory {
        bytes: Vec::new(),
        max_bytes,
        memory,
    };
    let refuse = |reason: &str| {
        ApiError::invalid("messages", format!("{name} {reason}")).with_code("image_url")
    };
    match fetch(url, max_bytes, TIMEOUT, is_public, &mut image).await {
        Ok(()) => Ok(image.bytes.into()),
        Err(FetchError::Sink(error)) => Err(error),
        Err(FetchError::Unreachable) => Err(refuse(
            "could not be fetched; expected an image at a public address that can be reached from the server",
        )),
        Err(error) => Err(refuse(&error.to_string())),
    }
}

/// Bytes that count into the memory of a request.
struct SharedMemory<'a> {
    bytes: Vec<u8>,
    max_bytes: usize,
    memory: &'a mut Share,
}

impl Sink for SharedMemory<'_> {
    type Error = ApiError;

    async fn take(&mut self, data: &[u8]) -> Result<(), ApiError> {
        append(&mut self.bytes, data, self.max_bytes, self.memory).await
    }
}
