//! `POST /v1/studies`: films come in as JSON, each as base64 or a data: address.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{Extension, State},
    http::{HeaderMap, StatusCode},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{identity::Identity, with_store};
use crate::serve::{
    App,
    ask::{expect_json, read_json},
    auth::Peer,
    error::ApiError,
    fields::Fields,
};
use crate::store::{Arrival, Film, Patient, Study, StudyState, disk::Scope};

/// Most letters of a field about a patient or study.
const LONGEST: usize = 1024;

fn short(fields: &mut Fields, name: &'static str) -> Result<String, ApiError> {
    let text = fields.text(name)?.unwrap_or_default();
    if text.chars().count() > LONGEST {
        let name = fields.name(name);
        let reason = format!("`{name}` is longer than {LONGEST} letters");
        return Err(ApiError::invalid(name, reason));
    }
    Ok(text)
}

/// A date as DICOM writes it.
fn date(fields: &mut Fields, name: &'static str) -> Result<String, ApiError> {
    let text = short(fields, name)?;
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    if text.is_empty() || (digits && matches!(text.len(), 8 | 14)) {
        return Ok(text);
    }
    let name = fields.name(name);
    let reason = format!("`{name}` is no date, expected YYYYMMDD");
    Err(ApiError::invalid(name, reason))
}

fn patient(fields: &mut Fields) -> Result<Patient, ApiError> {
    let Some(mut fields) = fields.object("patient")? else {
        return Ok(Patient::default());
    };
    let patient = Patient {
        id: short(&mut fields, "id")?,
        name: short(&mut fields, "name")?,
        birth_date: date(&mut fields, "birth_date")?,
        sex: short(&mut fields, "sex")?,
        age: short(&mut fields, "age")?,
    };
    fields.finish(&[], None)?;
    Ok(patient)
}

fn film(value: Value, index: usize) -> Result<(Film, Vec<u8>), ApiError> {
    let mut fields = Fields::of(value, &format!("films[{index}]"))?;
    let found = fields.text("file")?;
    let text = fields.needed("file", found)?;
    let encoded = match text.strip_prefix("data:") {
        Some(rest) => rest.split_once(";base64,").map(|(_, data)| data),
        None => Some(text.as_str()),
    };
    let bytes = encoded.and_then(|text| STANDARD.decode(text.trim()).ok());
    let name = fields.name("file");
    let bytes = bytes.filter(|bytes| !bytes.is_empty()).ok_or_else(|| {
        ApiError::invalid(
            &name,
            format!("`{name}` is no file, expected base64 or a data: address of it"),
        )
    })?;
    let film = Film {
        instance_uid: short(&mut fields, "instance_uid")?,
        series_uid: short(&mut fields, "series_uid")?,
        view: short(&mut fields, "view")?.to_uppercase(),
        date: date(&mut fields, "date")?,
        ..Film::default()
    };
    fields.finish(&[], None)?;
    Ok((film, bytes))
}

/// Takes films of one study; a draft is written once `complete` is not `false`.
pub(super) async fn receive(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    Extension(identity): Extension<Identity>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    identity.require(Scope::Upload)?;
    expect_json(&headers)?;
    // The memory of the body is held until its films are kept.
    let (mut fields, memory) = read_json(&app, peer.client, body).await?;
    let said = Study {
        id: short(&mut fields, "study")?,
        study_uid: short(&mut fields, "study_uid")?,
        source: "upload".into(),
        patient: patient(&mut fields)?,
        accession: short(&mut fields, "accession")?,
        date: date(&mut fields, "date")?,
        description: short(&mut fields, "description")?,
        indication: short(&mut fields, "indication")?,
        ..Study::default()
    };
    let complete = fields.flag("complete")?.unwrap_or(true);
    let list = fields.list("films")?;
    let list = fields.needed("films", list)?;
    fields.finish(&[], None)?;
    if list.is_empty() {
        return Err(ApiError::invalid(
            "films",
            "`films` is empty, expected at least one film",
        ));
    }
    let films = list
        .into_iter()
        .enumerate()
        .map(|(index, value)| film(value, index));
    let films = films.collect::<Result<Vec<_>, _>>()?;
    // A film that nobody can read is refused while its sender listens.
    for (index, (_, bytes)) in films.iter().enumerate() {
        let name = format!("films[{index}].file");
        let readable = app.parts.images.decoding_cost(bytes, &name);
        readable.map_err(|error| crate::serve::content::image_error(&name, &error))?;
    }
    let actor = identity.actor(None);
    let (id, ids, state) = with_store(&app, move |store| {
        let _memory = memory;
        let mut said = said;
        let mut ids = Vec::with_capacity(films.len());
        let mut again = true;
        for (film, bytes) in films {
            let arrival = Arrival {
                study: said.clone(),
                film,
                bytes,
            };
            let received = store.receive(arrival, &actor)?;
            again &= received.again;
            said.id = received.study;
            ids.push(received.film);
        }
        let mut state = store.study(&said.id)?.state;
        // What was there already is not drafted again.
        if complete && !(again && state != StudyState::Received) {
            let done = store.change(&said.id, "complete", &actor, &mut |study| {
                study.state = StudyState::Complete;
                Ok(())
            })?;
            state = done.state;
        }
        Ok((said.id, ids, state))
    })
    .await?;
    let object = json!({"object": "study", "id": id, "films": ids, "state": state});
    Ok((StatusCode::CREATED, Json(object)))
}
