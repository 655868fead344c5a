//! A study's report in the forms in which it goes out, for whoever fetches it: PDF, DICOM SR, FHIR, HL7.

use std::sync::Arc;

use axum::{
    extract::{Extension, Path, State},
    http::StatusCode,
    response::Response,
};

use super::{export::attachment, identity::Identity, with_store};
use crate::exchange::report::{Outgone, diagnostic_report, message, pdf, structured_report};
use crate::serve::{App, error::ApiError};
use crate::store::{Study, disk::Scope};

/// The study, for an export that the audit log notes.
async fn exported(app: &App, identity: &Identity, id: String) -> Result<Study, ApiError> {
    identity.require(Scope::Read)?;
    let actor = identity.actor(None);
    with_store(app, move |store| {
        let study = store.study(&id)?;
        store.note("export", Some(&id), &actor)?;
        Ok(study)
    })
    .await
}

/// The report as it is valid now: the last signature, else the draft.
fn current(study: &Study) -> Result<Outgone<'_>, ApiError> {
    let version = u32::try_from(study.signed.len()).unwrap_or(u32::MAX);
    Outgone::new(study, version).ok_or_else(|| {
        ApiError::new(
            StatusCode::CONFLICT,
            "the study has no report yet: its draft is being written, or it failed",
        )
        .with_code("study_refused")
    })
}

fn failed(reason: &str) -> ApiError {
    log::error!("a report could not be written: {reason}");
    ApiError::internal()
}

/// `GET /v1/studies/{id}/report.pdf`.
pub(super) async fn pdf_file(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let study = exported(&app, &identity, id).await?;
    let outbox = app.studies()?.outbox.clone();
    let made = tokio::task::spawn_blocking(move || {
        let font = outbox.as_ref().and_then(|outbox| outbox.font.as_ref()).ok_or_else(|| {
            ApiError::new(
                StatusCode::NOT_IMPLEMENTED,
                "this machine has no font with Chinese letters for a PDF; start `serve` with --pdf-font FILE",
            )
            .with_code("no_font")
        })?;
        let bytes = pdf(&current(&study)?, font).map_err(|error| failed(&error.to_string()))?;
        Ok::<_, ApiError>((study.id, bytes))
    });
    let (id, bytes) = made.await.map_err(|_| ApiError::internal())??;
    Ok(attachment(
        &format!("report-{id}.pdf"),
        "application/pdf",
        bytes,
    ))
}

/// `GET /v1/studies/{id}/report.sr`: a DICOM file.
pub(super) async fn sr_file(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let study = exported(&app, &identity, id).await?;
    let bytes = structured_report(&current(&study)?).map_err(|reason| failed(&reason))?;
    Ok(attachment(
        &format!("report-{}.dcm", study.id),
        "application/dicom",
        bytes,
    ))
}

/// `GET /v1/studies/{id}/report.fhir`: a DiagnosticReport.
pub(super) async fn fhir_file(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let study = exported(&app, &identity, id).await?;
    let text = format!("{:#}\n", diagnostic_report(&current(&study)?));
    let name = format!("report-{}.json", study.id);
    Ok(attachment(
        &name,
        "application/fhir+json",
        text.into_bytes(),
    ))
}

/// `GET /v1/studies/{id}/report.hl7`: a message of HL7 v2.
pub(super) async fn hl7_file(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let study = exported(&app, &identity, id).await?;
    let text = message(&current(&study)?);
    let name = format!("report-{}.hl7", study.id);
    Ok(attachment(
        &name,
        "x-application/hl7-v2+er7; charset=utf-8",
        text.into_bytes(),
    ))
}
