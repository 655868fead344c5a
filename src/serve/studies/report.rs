//! The report of a study: edited, signed, drafted again, removed.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{Extension, Path, State},
    http::HeaderMap,
};
use serde_json::{Value, json};

use super::{identity::Identity, json_body, outgoing, with_store};
use crate::serve::{App, auth::Peer, error::ApiError, fields::Fields};
use crate::store::{Report, StoreError, Study, StudyState, disk::Scope, now};

/// Most letters of a report.
const LONGEST_REPORT: usize = 100_000;

fn report_text(fields: &mut Fields) -> Result<String, ApiError> {
    let found = fields.text("text")?;
    let text = fields.needed("text", found)?;
    if text.trim().is_empty() || text.chars().count() > LONGEST_REPORT {
        let reason = format!("`text` is no report, expected 1 to {LONGEST_REPORT} letters");
        return Err(ApiError::invalid("text", reason));
    }
    Ok(text.trim().to_owned())
}

fn revision(fields: &mut Fields) -> Result<u64, ApiError> {
    let found = fields.count("revision")?;
    Ok(fields.needed("revision", found)? as u64)
}

/// Refuses a change of a study that is not as its reader saw it.
fn unchanged(study: &Study, expected: u64) -> Result<(), StoreError> {
    if study.revision == expected {
        return Ok(());
    }
    let found = study.revision;
    Err(StoreError::Changed { expected, found })
}

fn answer(study: &Study) -> Json<Value> {
    Json(json!({
        "object": "study",
        "id": study.id,
        "state": study.state,
        "revision": study.revision,
        "edited": study.edited,
        "signed": study.signed,
    }))
}

/// `POST /v1/studies/{id}/report`: keeps a text that is not signed yet.
pub(super) async fn edit(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    identity.require(Scope::Edit)?;
    let mut fields = json_body(&app, peer.client, &headers, body).await?;
    let (text, expected) = (report_text(&mut fields)?, revision(&mut fields)?);
    fields.finish(&[], None)?;
    let actor = identity.actor(None);
    let study = with_store(&app, move |store| {
        store.change(&id, "edit", &actor, &mut |study| {
            unchanged(study, expected)?;
            study.edited = Some(Report {
                text: text.clone(),
                by: actor.name.clone(),
                at: now(),
            });
            Ok(())
        })
    })
    .await?;
    Ok(answer(&study))
}

/// `POST /v1/studies/{id}/sign`: the text becomes the report, with name and time. A second signature amends the first,
/// which is kept.
pub(super) async fn sign(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    identity.require(Scope::Sign)?;
    let mut fields = json_body(&app, peer.client, &headers, body).await?;
    let (text, expected) = (report_text(&mut fields)?, revision(&mut fields)?);
    let consent = fields.flag("consent")?;
    let given = fields.text("name")?.map(|name| name.trim().to_owned());
    fields.finish(&[], None)?;
    let name = match (&identity.name, given) {
        (Some(account), None) => account.clone(),
        (Some(account), Some(name)) if *account == name => name,
        (Some(_), Some(_)) => {
            let reason = "`name` is another than that of the account that signs; leave it out";
            return Err(ApiError::invalid("name", reason));
        }
        (None, Some(name)) if !name.is_empty() && name.chars().count() <= 100 => name,
        (None, _) => {
            let reason =
                "`name` is missing: this server has no accounts, so a signature needs a name";
            return Err(ApiError::invalid("name", reason));
        }
    };
    let actor = identity.actor(Some(&name));
    let outbox = app.studies()?.outbox.clone();
    let study = with_store(&app, move |store| {
        store.change(&id, "sign", &actor, &mut |study| {
            unchanged(study, expected)?;
            if matches!(study.state, StudyState::Received | StudyState::Complete) {
                return Err(StoreError::Refused(
                    "the study has no draft yet: films are coming in, or the draft is being written".into(),
                ));
            }
            let at = now();
            study.signed.push(Report {
                text: text.clone(),
                by: name.clone(),
                at,
            });
            if let Some(consent) = consent {
                let text = if consent { "yes" } else { "no" };
                study.consent = Some(Report {
                    text: text.into(),
                    by: name.clone(),
                    at,
                });
            }
            study.state = StudyState::Signed;
            study.edited = None;
            let version = u32::try_from(study.signed.len()).unwrap_or(u32::MAX);
            let sent = outgoing(outbox.as_deref(), study, version);
            study.outbox.extend(sent);
            Ok(())
        })
    })
    .await?;
    Ok(answer(&study))
}

/// `POST /v1/studies/{id}/draft`: has the draft written anew, of a study that is not signed.
pub(super) async fn draft_again(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    identity.require(Scope::Edit)?;
    let actor = identity.actor(None);
    let study = with_store(&app, move |store| {
        store.change(&id, "complete", &actor, &mut |study| {
            if matches!(study.state, StudyState::Signed | StudyState::Sent) {
                return Err(StoreError::Refused(
                    "the study is signed; its draft stays as it was".into(),
                ));
            }
            study.state = StudyState::Complete;
            study.failure = None;
            Ok(())
        })
    })
    .await?;
    Ok(answer(&study))
}

/// `POST /v1/studies/{id}/delete`: removes a study with its films; the audit log keeps the line.
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    identity.require(Scope::Admin)?;
    let actor = identity.actor(None);
    let object = json!({"object": "study", "id": id, "deleted": true});
    with_store(&app, move |store| store.delete(&id, &actor)).await?;
    Ok(Json(object))
}
