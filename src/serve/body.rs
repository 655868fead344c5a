//! Bodies of requests: read within the limits of size, time and memory, and read to their end when a
//! request is refused before.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::StatusCode,
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use super::{
    App,
    error::ApiError,
    share::{Full, Share},
};

/// How long a body waits for memory.
const PATIENCE: Duration = Duration::from_secs(2);

/// Most values of a JSON body: each takes some hundred times the bytes of its text.
const MAX_VALUES: usize = 100_000;

/// The bodies of too many requests are in memory.
pub(super) fn crowded() -> ApiError {
    ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "too many large bodies come at once; try again in a moment",
    )
    .with_code("too_many_bodies")
}

/// Takes memory until `share` has `bytes`, for a limited time.
///
/// # Errors
/// [`ApiError`] of status 503.
pub(super) async fn take(share: &mut Share, bytes: usize) -> Result<(), ApiError> {
    match tokio::time::timeout(PATIENCE, share.grow_to(bytes as u64)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Full::TooManyWait | Full::TooLarge)) | Err(_) => Err(crowded()),
    }
}

/// Appends what has come to `bytes`, after taking memory for it: for that, not for what was announced.
///
/// # Errors
/// [`ApiError`] of status 503 where there is no memory, and as [`take`].
pub(super) async fn append(
    bytes: &mut Vec<u8>,
    data: &[u8],
    limit: usize,
    memory: &mut Share,
) -> Result<(), ApiError> {
    let needed = bytes.len() + data.len();
    if needed > bytes.capacity() {
        let capacity = needed.max((2 * bytes.capacity()).min(limit)).max(4096);
        take(memory, capacity).await?;
        bytes.reserve_exact(capacity - bytes.len());
    }
    bytes.extend_from_slice(data);
    Ok(())
}

/// Reads the body of a request of `client`; the share is for the memory it takes.
///
/// # Errors
/// [`ApiError`]: too large, too slow, broken off, or no memory for it.
pub(super) async fn read_body(
    app: &App,
    client: u64,
    body: Body,
) -> Result<(Bytes, Share), ApiError> {
    let limit = app.config.max_body_bytes;
    let too_large = || {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body has more than {limit} bytes"),
        )
    };
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    let late = || {
        ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "the body did not come in the time this server gives it",
        )
    };
    // Waiting for memory is no fault of the body: it has a time of its own.
    let mut memory = tokio::time::timeout(PATIENCE, app.bodies.take(client, 0, 1))
        .await
        .map_err(|_| crowded())?
        .map_err(|_| crowded())?;
    tokio::time::timeout(app.config.read_timeout, async {
        let mut body = Limited::new(body, limit);
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                if error.is::<LengthLimitError>() {
                    too_large()
                } else {
                    ApiError::new(StatusCode::BAD_REQUEST, "the body broke off")
                }
            })?;
            if let Some(data) = frame.data_ref() {
                append(&mut bytes, data, limit, &mut memory).await?;
            }
        }
        Ok((bytes.into(), memory))
    })
    .await
    .map_err(|_| late())?
}

/// Refuses JSON that is small as text and large in memory: many values of a few letters.
///
/// # Errors
/// [`ApiError`] of status 400.
pub(super) fn check_json_size(json: &[u8]) -> Result<(), ApiError> {
    let (mut values, mut in_text, mut escaped) = (0usize, false, false);
    for byte in json {
        match (in_text, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => in_text = !in_text,
            (false, b',' | b'[' | b'{') => values += 1,
            _ => {}
        }
    }
    if values > MAX_VALUES {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body is JSON of more than {MAX_VALUES} values"),
        ));
    }
    Ok(())
}

/// A body of which a second handle keeps what was not read.
pub(super) struct Shared(Arc<Mutex<Body>>);

/// What may be left of a body.
pub(super) struct Rest(Arc<Mutex<Body>>);

/// Two handles on one body: for the handler, and for what it leaves.
pub(super) fn shared(body: Body) -> (Shared, Rest) {
    let body = Arc::new(Mutex::new(body));
    (Shared(body.clone()), Rest(body))
}

fn poll(
    body: &Mutex<Body>,
    context: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
    let mut body = body.lock().unwrap_or_else(PoisonError::into_inner);
    Pin::new(&mut *body).poll_frame(context)
}

impl HttpBody for Shared {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        poll(&self.0, context)
    }

    fn is_end_stream(&self) -> bool {
        let body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        body.size_hint()
    }
}

impl Rest {
    /// Reads and drops at most `bytes` of what is left, for at most `time`.
    ///
    /// Many clients look for the answer only when their body is sent; a connection that is closed before
    /// takes the status with it.
    pub(super) async fn drain(self, bytes: usize, time: Duration) {
        let read = async {
            let mut left = bytes;
            while let Some(Ok(frame)) = std::future::poll_fn(|context| poll(&self.0, context)).await
            {
                let length = frame.data_ref().map_or(0, Bytes::len);
                match left.checked_sub(length) {
                    Some(rest) => left = rest,
                    None => return,
                }
            }
        };
        let _ = tokio::time::timeout(time, read).await;
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::share::{Gate, GateLimits},
        *,
    };

    #[test]
    fn many_small_values_are_refused_and_long_texts_are_not() {
        let many = format!("[{}0]", "0,".repeat(MAX_VALUES));
        assert!(check_json_size(many.as_bytes()).is_err());
        let text = format!("{{\"a\": \"{}\\\"{}\"}}", ",[{".repeat(MAX_VALUES), ",");
        assert!(check_json_size(text.as_bytes()).is_ok());
    }

    #[test]
    fn memory_is_taken_for_what_has_come_and_who_finds_none_is_told_so() {
        let gate = Gate::new(GateLimits {
            places: 0,
            spare_places: 0,
            bytes: 100_000,
            spare_bytes: 0,
            max_waiting: 8,
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut memory = gate.take(1, 0, 1).await.unwrap();
            let mut bytes = Vec::new();
            for part in 1..=10 {
                append(&mut bytes, &[7; 1000], 90_000, &mut memory)
                    .await
                    .unwrap();
                assert_eq!(bytes.len(), part * 1000);
                assert!(gate.bytes_held() <= 16_384, "{}", gate.bytes_held());
            }
            let _other = gate.take(2, 0, 100_000 - gate.bytes_held()).await.unwrap();
            let error = append(&mut bytes, &[7; 20_000], 90_000, &mut memory)
                .await
                .unwrap_err();
            assert_eq!(error.status, StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(error.code, Some("too_many_bodies"));
        });
    }

    #[test]
    fn what_a_handler_leaves_is_read_to_its_end() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (handler, rest) = shared(Body::from(vec![0; 1000]));
            let kept = rest.0.clone();
            drop(handler);
            rest.drain(2000, Duration::from_secs(1)).await;
            assert!(kept.lock().unwrap().is_end_stream());
        });
    }
}
