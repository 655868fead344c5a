//! Studies over HTTP: bringing them in, the worklist, films, reports, signing, and the worker that has drafts written.
//!
//! Addresses carry ids of ours alone; what is searched for comes in bodies. Who sees what is [`identity`]'s.

mod drafting;
mod export;
mod film;
pub(super) mod identity;
mod list;
mod outgoing_forms;
mod report;
mod upload;
mod zip;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, HeaderName, StatusCode},
    routing::{get, post},
};

use super::{
    App,
    ask::{expect_json, read_json},
    error::ApiError,
    fields::Fields,
};
use crate::exchange::outbox::Outbox;
use crate::store::{Outgoing, StoreError, Study, StudyStore, disk::DiskStore};

pub use drafting::run as draft_studies;

/// Where the server keeps studies, and who may see them.
pub struct Studies {
    /// The store.
    pub store: Arc<dyn StudyStore>,
    /// The same, where it has accounts: then every request needs one.
    pub accounts: Option<Arc<DiskStore>>,
    /// Header in which a trusted proxy names an account.
    pub user_header: Option<HeaderName>,
    /// The prompt of drafts.
    pub prompt: String,
    /// Asks for probabilities of findings with each draft.
    pub findings: bool,
    /// Days after which signed studies are removed, if any.
    pub keep_days: Option<u32>,
    /// Where reports go, and the font of their PDFs.
    pub outbox: Option<Arc<Outbox>>,
}

/// Paths of studies, with the methods they take.
pub(super) const STUDY_ROUTES: [(&str, &str); 16] = [
    ("GET", "/v1/account"),
    ("POST", "/v1/worklist"),
    ("POST", "/v1/worklist.csv"),
    ("POST", "/v1/studies"),
    ("GET", "/v1/studies/{id}"),
    ("GET", "/v1/studies/{id}/films/{film}"),
    ("POST", "/v1/studies/{id}/draft"),
    ("POST", "/v1/studies/{id}/report"),
    ("POST", "/v1/studies/{id}/sign"),
    ("POST", "/v1/studies/{id}/ask"),
    ("GET", "/v1/studies/{id}/report.docx"),
    ("GET", "/v1/studies/{id}/report.pdf"),
    ("GET", "/v1/studies/{id}/report.sr"),
    ("GET", "/v1/studies/{id}/report.fhir"),
    ("GET", "/v1/studies/{id}/report.hl7"),
    ("POST", "/v1/studies/{id}/delete"),
];

/// Forms in which a report can be had at `/v1/studies/{id}/report.FORM`.
pub(super) const EXPORTS: [&str; 5] = ["docx", "pdf", "sr", "fhir", "hl7"];

/// Routes of studies.
pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/account", get(identity::account))
        .route("/v1/worklist", post(list::worklist))
        .route("/v1/worklist.csv", post(export::csv))
        .route("/v1/studies", post(upload::receive))
        .route("/v1/studies/{id}", get(list::study))
        .route("/v1/studies/{id}/films/{film}", get(film::film))
        .route("/v1/studies/{id}/draft", post(report::draft_again))
        .route("/v1/studies/{id}/report", post(report::edit))
        .route("/v1/studies/{id}/sign", post(report::sign))
        .route("/v1/studies/{id}/ask", post(drafting::ask_more))
        .route("/v1/studies/{id}/report.docx", get(export::docx))
        .route("/v1/studies/{id}/report.pdf", get(outgoing_forms::pdf_file))
        .route("/v1/studies/{id}/report.sr", get(outgoing_forms::sr_file))
        .route(
            "/v1/studies/{id}/report.fhir",
            get(outgoing_forms::fhir_file),
        )
        .route("/v1/studies/{id}/report.hl7", get(outgoing_forms::hl7_file))
        .route("/v1/studies/{id}/delete", post(report::delete))
}

/// What is to be sent out about a study as it is now; part of the change that drafts or signs it.
pub(super) fn outgoing(outbox: Option<&Outbox>, study: &Study, version: u32) -> Vec<Outgoing> {
    outbox.map_or_else(Vec::new, |outbox| outbox.outgoing(study, version))
}

impl App {
    /// The studies of this server; a route of theirs is there only with them.
    pub(super) fn studies(&self) -> Result<&Studies, ApiError> {
        self.studies.as_ref().ok_or_else(ApiError::internal)
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let text = error.to_string();
        match error {
            StoreError::Missing(_) => {
                Self::new(StatusCode::NOT_FOUND, text).with_code("study_not_found")
            }
            StoreError::Changed { .. } => {
                Self::new(StatusCode::CONFLICT, text).with_code("study_changed")
            }
            StoreError::Refused(_) => {
                Self::new(StatusCode::CONFLICT, text).with_code("study_refused")
            }
            StoreError::Full(_) => {
                log::error!("{text}");
                Self::new(
                    StatusCode::INSUFFICIENT_STORAGE,
                    "the server's disk is full: nothing was kept; send it again when there is room",
                )
                .with_code("disk_full")
            }
            StoreError::Failed(_) => {
                log::error!("{text}");
                Self::internal()
            }
        }
    }
}

/// Runs `work` on the store, on a thread that may wait for a disk.
pub(super) async fn with_store<T: Send + 'static>(
    app: &App,
    work: impl FnOnce(&dyn StudyStore) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, ApiError> {
    let store = app.studies()?.store.clone();
    let done = tokio::task::spawn_blocking(move || work(store.as_ref()))
        .await
        .map_err(|error| {
            log::error!("work on the store failed: {error}");
            ApiError::internal()
        })?;
    done.map_err(ApiError::from)
}

/// Reads a JSON body.
pub(super) async fn json_body(
    app: &App,
    client: u64,
    headers: &HeaderMap,
    body: Body,
) -> Result<Fields, ApiError> {
    expect_json(headers)?;
    Ok(read_json(app, client, body).await?.0)
}
