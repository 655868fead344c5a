//! Paths of the API.

/// Paths of the API, with the methods they take, as the document and the error of another path list them.
pub(super) const ROUTES: [(&str, &str); 20] = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/images/preview"),
    ("GET", "/v1/limits"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/metrics"),
    ("GET", "/health"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/ping"),
    ("POST", "/ping"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
];

/// Paths of the API for clients that were given the address without `/v1`, or that have another place.
pub(super) const API_ALIASES: [&str; 8] = [
    "/chat/completions",
    "/completions",
    "/responses",
    "/models",
    "/models/{*name}",
    "/tokenize",
    "/detokenize",
    "/v1/tokenize",
];
