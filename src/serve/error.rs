//! Errors of the API, in OpenAI's form.
//!
//! A message names the field and what was expected, never a path, an address or a cause of ours:
//! those go to the log.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::engine::{Failure, Refusal};

/// Code of a response's error, for the log.
#[derive(Debug, Clone, Copy)]
pub(super) struct ErrorCode(pub(super) &'static str);

/// One refused or failed request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// For people.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<&'static str>,
}

impl ApiError {
    /// An error with a status and a message.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code: None,
        }
    }

    /// An invalid request: 400, with the field at fault.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::new(StatusCode::BAD_REQUEST, message)
        }
    }

    /// A failure of the server itself: 500, without its cause.
    pub fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the request failed inside the server; its log knows more",
        )
    }

    /// Sets the code for programs.
    #[must_use]
    pub fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// OpenAI's error object.
    pub fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            503 => "service_unavailable_error",
            504 => "timeout_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Busy(_) => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!("{refusal}; try again later"),
            )
            .with_code("queue_full"),
            Refusal::Stopping => Self::new(StatusCode::SERVICE_UNAVAILABLE, refusal.to_string()),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Deadline => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "the answer was not ready in the time this server gives a request",
            )
            .with_code("deadline"),
            Failure::Stopping => Self::from(Refusal::Stopping),
            Failure::Unloaded => Self {
                status: StatusCode::NOT_FOUND,
                message: "the model was unloaded before its answer began".into(),
                param: Some("model".into()),
                code: Some("model_not_found"),
            },
            Failure::Internal | Failure::NotFinite => Self::internal(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(code) = self.code {
            response.extensions_mut().insert(ErrorCode(code));
        }
        let headers = response.headers_mut();
        if matches!(self.status.as_u16(), 429 | 503) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
