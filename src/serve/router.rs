//! Routes, and what every request passes on its way to one.

use std::{panic::AssertUnwindSafe, sync::Arc};

use axum::{
    Json, Router,
    body::Body,
    extract::{Extension, Path, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use futures_util::FutureExt;
use serde_json::{Value, json};

use super::{
    App,
    ask::{expect_json, read_json},
    audit::RequestRecord,
    auth::{KeyCheck, Peer, check_origin},
    body::shared,
    chat, completions,
    error::{ApiError, ErrorCode},
    http::check_host,
    metrics::{CONTENT_TYPE, as_gauge},
    models::folder_inside,
    openapi,
    preview::preview,
    responses,
    routes::ROUTES,
    studies::{self, STUDY_ROUTES, identity::identify},
    tokens,
    types::AdapterRequest,
};
use crate::base::panics::panic_text;

/// The web page may load its own files and nothing else.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
     img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'; require-trusted-types-for 'script'";

/// A script of the web page.
macro_rules! script {
    ($name:literal) => {
        (
            concat!("/", $name),
            "text/javascript; charset=utf-8",
            include_str!(concat!("page/", $name)),
        )
    };
}

/// Files of the web page: path, type, content.
const PAGE: [(&str, &str, &str); 12] = [
    (
        "/",
        "text/html; charset=utf-8",
        include_str!("page/index.html"),
    ),
    (
        "/style.css",
        "text/css; charset=utf-8",
        include_str!("page/style.css"),
    ),
    script!("api.js"),
    script!("app.js"),
    script!("dom.js"),
    script!("export.js"),
    script!("film.js"),
    script!("findings.js"),
    script!("history.js"),
    script!("run.js"),
    script!("strings.js"),
    script!("viewer.js"),
];

/// Files of the pages for work with studies.
const WORK_PAGE: [(&str, &str, &str); 11] = [
    (
        "/worklist",
        "text/html; charset=utf-8",
        include_str!("page/work/worklist.html"),
    ),
    (
        "/work/work.css",
        "text/css; charset=utf-8",
        include_str!("page/work/work.css"),
    ),
    script!("work/changes.js"),
    script!("work/desk.js"),
    script!("work/grey.js"),
    script!("work/list.js"),
    script!("work/measure.js"),
    script!("work/report.js"),
    script!("work/study.js"),
    script!("work/words.js"),
    script!("work/work.js"),
];

/// A router whose paths are also taken with a slash at their end.
struct WithSlashes(Router<Arc<App>>);

impl WithSlashes {
    fn route(self, path: &str, methods: MethodRouter<Arc<App>>) -> Self {
        let with_slash = format!("{path}/");
        Self(
            self.0
                .route(path, methods.clone())
                .route(&with_slash, methods),
        )
    }

    /// A path at `/v1`, and the same without that.
    fn route_v1(self, path: &str, methods: MethodRouter<Arc<App>>) -> Self {
        let with_version = format!("/v1{path}");
        self.route(&with_version, methods.clone())
            .route(path, methods)
    }
}

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    let keys = KeyCheck::new(&app.config.api_keys);
    let with_studies = app.studies.is_some();
    let guarded = WithSlashes(Router::new())
        .route_v1("/chat/completions", post(chat::completions))
        .route_v1("/completions", post(completions::completions))
        .route_v1("/responses", post(responses::responses))
        .route_v1("/models", get(models))
        .route_v1("/tokenize", post(tokens::tokenize))
        .route_v1("/detokenize", post(tokens::detokenize))
        .route("/v1/images/preview", post(preview))
        .route("/v1/limits", get(limits))
        .route("/v1/load_lora_adapter", post(load_adapter))
        .route("/v1/unload_lora_adapter", post(unload_adapter))
        .route("/metrics", get(metrics))
        .0
        .route("/v1/models/{*name}", get(model))
        .route("/models/{*name}", get(model));
    let guarded = match with_studies {
        true => guarded.merge(studies::routes()),
        false => guarded,
    };
    let guarded = guarded.layer(from_fn_with_state((app.clone(), keys), identify));
    let open = WithSlashes(Router::new())
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/health", get(ready))
        .route("/ping", get(ready).post(ready))
        .route("/version", get(version))
        .route("/openapi.json", get(description));
    let mut open = open.0;
    let work = WORK_PAGE.into_iter().filter(|_| with_studies);
    for (path, kind, content) in PAGE.into_iter().chain(work) {
        open = open.route(path, get(move || async move { file(kind, content) }));
    }
    guarded
        .merge(open)
        .fallback(nothing_here)
        .method_not_allowed_fallback(|| async {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path takes another method",
            )
        })
        .layer(from_fn_with_state(app.clone(), every_request))
        .with_state(app)
}

/// The error of a path that is not served; it lists those that are.
async fn nothing_here(State(app): State<Arc<App>>) -> ApiError {
    let of_studies = STUDY_ROUTES.iter().filter(|_| app.studies.is_some());
    let routes: Vec<String> = ROUTES
        .iter()
        .chain(of_studies)
        .map(|(method, path)| format!("{method} {path}"))
        .collect();
    ApiError::new(
        StatusCode::NOT_FOUND,
        format!(
            "there is nothing at this path; this server has {}",
            routes.join(", ")
        ),
    )
}

async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// Around every request: origin, panics, counters, headers.
async fn every_request(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let config = &app.config;
    let record = RequestRecord::begin(&app.audit, &request);
    request.extensions_mut().insert(record.clone());
    let origins = &config.allow_origins;
    let allowed = check_host(&request).and_then(|()| {
        let headers = request.headers();
        check_origin(headers, &config.host_names, &config.origin_names, origins)
    });
    let origin = request.headers().get(header::ORIGIN).cloned();
    let preflight = origins.preflight(&request);
    // A client that sends `Expect: 100-continue` sends no body before it gets that response.
    let sends = !request.headers().contains_key(header::EXPECT);
    let (head, body) = request.into_parts();
    let (body, rest) = shared(body);
    let request = Request::from_parts(head, Body::new(body));
    let mut response = match (allowed, preflight) {
        (Err(error), _) => error.into_response(),
        // A browser sends no key with this question.
        (Ok(()), Some(response)) => response,
        // A panic ends its own request; the connection and all others live on.
        (Ok(()), None) => AssertUnwindSafe(next.run(request))
            .catch_unwind()
            .await
            .unwrap_or_else(|payload| {
                log::error!("a handler failed: {}", panic_text(payload.as_ref()));
                ApiError::internal().into_response()
            }),
    };
    let status = response.status();
    let late = status == StatusCode::REQUEST_TIMEOUT;
    if sends && !late && (status.is_client_error() || status.is_server_error()) {
        rest.drain(config.max_body_bytes.saturating_mul(2), config.read_timeout)
            .await;
    }
    app.metrics.response(status.as_u16());
    {
        let mut facts = record.facts();
        facts.status = Some(status.as_u16());
        facts.code = response.extensions().get::<ErrorCode>().map(|code| code.0);
    }
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(record.id()) {
        headers.insert("x-request-id", id);
    }
    origins.mark(origin.as_ref(), headers);
    let fixed = |text| HeaderValue::from_static(text);
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, fixed("nosniff"));
    headers.insert(header::REFERRER_POLICY, fixed("no-referrer"));
    headers.insert(header::X_FRAME_OPTIONS, fixed("DENY"));
    headers.insert("cross-origin-opener-policy", fixed("same-origin"));
    headers.insert("cross-origin-resource-policy", fixed("same-origin"));
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        fixed(CONTENT_SECURITY_POLICY),
    );
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(fixed("no-store"));
    response
}

fn file(kind: &'static str, content: &'static str) -> Response {
    // Revalidated at every use: a new version of the program must not meet an old script.
    (
        [
            (header::CONTENT_TYPE, kind),
            (header::CACHE_CONTROL, "no-cache"),
        ],
        content,
    )
        .into_response()
}

async fn description(State(app): State<Arc<App>>) -> Response {
    file("application/json", openapi::text(app.studies.is_some()))
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    if app.engine.is_stopping() {
        (StatusCode::SERVICE_UNAVAILABLE, "stopping\n").into_response()
    } else {
        "ready\n".into_response()
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let metrics = &app.metrics;
    let memory = app.bodies.bytes_held() + app.pictures.bytes_held();
    metrics.waiting_memory.set(as_gauge(memory));
    metrics.queue.set(as_gauge(app.engine.waiting()));
    let cache_tokens = app.engine.limits().cache_tokens;
    metrics.cache_tokens.set(as_gauge(cache_tokens));
    let text = metrics.text().map_err(|error| {
        log::error!("the metrics could not be written: {error}");
        ApiError::internal()
    })?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
}

/// Limits of a request, for clients that check it before they send it.
async fn limits(State(app): State<Arc<App>>) -> Json<Value> {
    let config = &app.config;
    let mut limits = json!({
        "object": "limits",
        "max_images": config.max_images,
        "max_image_pixels": config.max_image_pixels,
        "max_body_bytes": config.max_body_bytes,
        "max_new_tokens": config.max_new_tokens,
        "max_model_len": app.context(),
        "request_timeout_seconds": config.request_timeout.as_secs(),
        "page_history": config.page_history,
    });
    if app.studies.is_some() {
        limits["studies"] = true.into();
        limits["exports"] = json!(studies::EXPORTS);
    }
    Json(limits)
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let models: Vec<Value> = app
        .models
        .list()
        .into_iter()
        .map(|model| with_length(&app, model))
        .collect();
    Json(json!({"object": "list", "data": models}))
}

async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let model = app.models.describe(name.trim_end_matches('/'))?;
    Ok(Json(with_length(&app, model)))
}

/// A model's object with the tokens of prompt and answer together, as vLLM lists them.
fn with_length(app: &App, mut model: Value) -> Value {
    model["max_model_len"] = app.context().into();
    model
}

async fn load_adapter(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    expect_json(&headers)?;
    let (fields, _) = read_json(&app, peer.client, body).await?;
    let request = AdapterRequest::read(fields)?;
    let root = adapter_dir(&app)?;
    let path = request.lora_path.as_deref().unwrap_or(&request.lora_name);
    let dir = folder_inside(root, path)?;
    app.models
        .load(&app.engine, &request.lora_name, dir)
        .await?;
    log::info!("adapter `{}` was loaded", request.lora_name);
    let message = format!("`{}` is loaded", request.lora_name);
    Ok(Json(json!({"message": message})).into_response())
}

async fn unload_adapter(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    expect_json(&headers)?;
    let (fields, _) = read_json(&app, peer.client, body).await?;
    let request = AdapterRequest::read(fields)?;
    adapter_dir(&app)?;
    app.models.unload(&app.engine, &request.lora_name).await?;
    log::info!("adapter `{}` was unloaded", request.lora_name);
    let message = format!("`{}` is unloaded", request.lora_name);
    Ok(Json(json!({"message": message})).into_response())
}

fn adapter_dir(app: &App) -> Result<&std::path::Path, ApiError> {
    app.config.adapter_dir.as_deref().ok_or_else(|| {
        ApiError::new(
            StatusCode::FORBIDDEN,
            "adapters are not changed at run time; the server was started without --adapter-dir",
        )
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_openapi_document_lists_every_route() {
        for studies in [false, true] {
            let document = openapi::document(studies);
            let mut documented = BTreeSet::new();
            for (path, methods) in document["paths"].as_object().unwrap() {
                for method in methods.as_object().unwrap().keys() {
                    documented.insert((method.to_uppercase(), path.clone()));
                }
            }
            let of_studies = STUDY_ROUTES.iter().filter(|_| studies);
            let listed: BTreeSet<(String, String)> = ROUTES
                .iter()
                .chain(of_studies)
                .filter(|(_, path)| *path != "/")
                .map(|(method, path)| ((*method).to_owned(), (*path).to_owned()))
                .collect();
            assert_eq!(listed, documented);
        }
    }
}
