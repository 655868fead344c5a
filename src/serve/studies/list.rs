//! The worklist, and one study with its priors.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{Extension, Path, State},
    http::HeaderMap,
};
use serde_json::{Value, json};

use super::{identity::Identity, json_body, with_store};
use crate::eval::findings::RuleSet;
use crate::serve::{App, auth::Peer, error::ApiError, fields::Fields};
use crate::store::{Line, Query, Study, StudyState, disk::Scope};

/// Most studies of a page.
const MAX_LINES: usize = 200;
const DEFAULT_LINES: usize = 50;

/// Most letters of a search.
const LONGEST_SEARCH: usize = 200;

/// Reads a query of the worklist; `most` is the largest page.
pub(super) fn query(mut fields: Fields, most: usize) -> Result<Query, ApiError> {
    let states = fields.texts("state")?.unwrap_or_default();
    let states = states.iter().map(|name| {
        let known = StudyState::ALL
            .into_iter()
            .find(|state| state.name() == name);
        let names = StudyState::ALL.map(StudyState::name).join(", ");
        known.ok_or_else(|| {
            ApiError::invalid(
                "state",
                format!("`state` has an unknown state, expected some of {names}"),
            )
        })
    });
    let states = states.collect::<Result<_, _>>()?;
    let search = fields.text("search")?.unwrap_or_default();
    if search.chars().count() > LONGEST_SEARCH {
        let reason = format!("`search` is longer than {LONGEST_SEARCH} letters");
        return Err(ApiError::invalid("search", reason));
    }
    let urgent_first = match fields.text("order")?.as_deref() {
        None | Some("urgent") => true,
        Some("newest") => false,
        Some(_) => {
            let reason = "`order` is unknown, expected `urgent` or `newest`";
            return Err(ApiError::invalid("order", reason));
        }
    };
    let offset = fields.count("offset")?.unwrap_or(0);
    let limit = fields.count("limit")?.unwrap_or(DEFAULT_LINES.min(most));
    if limit == 0 || limit > most {
        let reason = format!("`limit` is {limit}, expected 1 to {most}");
        return Err(ApiError::invalid("limit", reason));
    }
    fields.finish(&[], None)?;
    Ok(Query {
        states,
        search,
        urgent_first,
        offset,
        limit,
    })
}

/// The finding that makes a study urgent.
fn urgent_finding(study: &Study) -> Option<Value> {
    let (key, one, chance) = study.urgent_finding()?;
    Some(json!({"key": key, "chinese": one["chinese"], "probability": chance}))
}

fn line(line: &Line) -> Value {
    let study = &line.study;
    json!({
        "id": study.id,
        "state": study.state,
        "failure": study.failure,
        "source": study.source,
        "patient": study.patient,
        "accession": study.accession,
        "date": study.date,
        "description": study.description,
        "received_at": study.received_at,
        "films": study.films.len(),
        "urgency": line.urgency,
        "urgent_finding": urgent_finding(study),
        "edited_by": study.edited.as_ref().map(|one| &one.by),
        "signed_by": study.signed.last().map(|one| &one.by),
        "signed_at": study.signed.last().map(|one| one.at),
    })
}

/// Where a report names findings: the class and the place, counted as browsers count letters.
pub(super) fn mentions(text: &str) -> Vec<Value> {
    let rules = RuleSet::guess([text]);
    let mut found: Vec<Value> = Vec::new();
    for mention in rules.label(text).mentions {
        let Some(finding) = mention.finding else {
            continue;
        };
        let place = |bytes: usize| text[..bytes].encode_utf16().count();
        found.push(json!({
            "finding": finding.key(),
            "chinese": finding.chinese(),
            "status": mention.status,
            "start": place(mention.span.start),
            "end": place(mention.span.end),
        }));
    }
    found.sort_by_key(|mention| mention["start"].as_u64());
    found
}

/// `POST /v1/worklist`: a page of studies.
pub(super) async fn worklist(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    Extension(identity): Extension<Identity>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    identity.require(Scope::Read)?;
    let query = query(
        json_body(&app, peer.client, &headers, body).await?,
        MAX_LINES,
    )?;
    let offset = query.offset;
    let page = with_store(&app, move |store| store.list(&query)).await?;
    let counts = page
        .counts
        .iter()
        .map(|(state, count)| (state.name().to_owned(), json!(count)));
    Ok(Json(json!({
        "object": "worklist",
        "total": page.total,
        "offset": offset,
        "counts": counts.collect::<serde_json::Map<_, _>>(),
        "studies": page.lines.iter().map(line).collect::<Vec<_>>(),
    })))
}

/// `GET /v1/studies/{id}`: the record, and what is known of earlier studies of the patient.
pub(super) async fn study(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    identity.require(Scope::Read)?;
    let actor = identity.actor(None);
    let (study, priors) = with_store(&app, move |store| {
        let study = store.study(&id)?;
        let priors = store.priors(&id)?;
        store.note("look", Some(&id), &actor)?;
        Ok((study, priors))
    })
    .await?;
    let priors = priors.iter().map(|prior| {
        json!({
            "id": prior.id,
            "state": prior.state,
            "date": prior.date,
            "received_at": prior.received_at,
            "text": prior.text(),
            "films": prior.films,
        })
    });
    let priors: Vec<Value> = priors.collect();
    let mut object = json!(study);
    object["object"] = "study".into();
    object["text"] = study.text().into();
    object["mentions"] = mentions(study.text()).into();
    object["priors"] = priors.into();
    Ok(Json(object))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_findings_are_counted_in_utf_16() {
        let text = "\u{1f600}双肺清晰。右侧气胸。";
        let found = mentions(text);
        let one = found
            .iter()
            .find(|one| one["finding"] == "pneumothorax")
            .unwrap();
        let units: Vec<u16> = text.encode_utf16().collect();
        let (start, end) = (one["start"].as_u64().unwrap(), one["end"].as_u64().unwrap());
        let words = String::from_utf16(&units[start as usize..end as usize]).unwrap();
        assert!(words.contains("气胸"), "{words}");
        assert_eq!(one["status"], "present");
    }
}
