//! Drafts: a worker asks the model about each complete study, as a request to `/v1/chat/completions` would; and
//! further questions in the same conversation.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    body::Body,
    extract::{Extension, Path, Request, State},
    http::{HeaderMap, StatusCode},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::stream::{self, StreamExt};
use serde_json::{Value, json};

use super::{identity::Identity, json_body, outgoing, with_store};
use crate::serve::{
    App,
    ask::{Call, ask},
    audit::RequestRecord,
    auth::Peer,
    body::take,
    chat::collect,
    error::ApiError,
    findings::FIELD,
    types::{ChatContent, ChatMessage, ChatPart, ChatRequest, ImageSize, ImageUrl},
};
use crate::store::{
    Actor, Draft, StoreError, Study, StudyState, StudyStore, disk::Scope, films_to_read, now,
};

/// Drafts that are generated at the same time.
const AT_ONCE: usize = 4;

/// Time between two looks for work.
const PAUSE: Duration = Duration::from_millis(500);

/// Time to wait where the model has no room, and where the store failed.
const BUSY_PAUSE: Duration = Duration::from_secs(5);

/// Time between two removals of old studies.
const REMOVAL_PAUSE: Duration = Duration::from_secs(3600);

/// Most questions after the draft that are sent along.
const MAX_TURNS: usize = 16;
const LONGEST_QUESTION: usize = 4000;

/// The films of a study that the model reads, as parts of a message, and their ids.
fn parts(
    store: &dyn StudyStore,
    study: &Study,
    most: usize,
) -> Result<(Vec<ChatPart>, Vec<String>), StoreError> {
    let films = films_to_read(study);
    if films.is_empty() {
        return Err(StoreError::Refused(
            "the study has no film that the model reads".into(),
        ));
    }
    let mut parts = Vec::new();
    let mut ids = Vec::new();
    for film in films.into_iter().take(most) {
        let bytes = store.film(&study.id, &film.id)?;
        parts.push(ChatPart::ImageUrl {
            image_url: ImageUrl {
                url: format!(
                    "data:application/octet-stream;base64,{}",
                    STANDARD.encode(bytes)
                ),
                size: ImageSize::default(),
            },
        });
        ids.push(film.id.clone());
    }
    Ok((parts, ids))
}

fn message(role: &str, content: ChatContent) -> ChatMessage {
    ChatMessage {
        role: role.into(),
        content: Some(content),
        ..ChatMessage::default()
    }
}

/// Asks the model and returns the first choice of the answer, with the answer's remarks.
async fn asked(
    app: &Arc<App>,
    client: u64,
    request: ChatRequest,
    prefix: &str,
) -> Result<(Value, Vec<Value>), ApiError> {
    let bytes: usize = request
        .messages
        .iter()
        .flat_map(|message| match &message.content {
            Some(ChatContent::Parts(parts)) => &parts[..],
            _ => &[],
        })
        .map(|part| match part {
            ChatPart::ImageUrl { image_url } => image_url.url.len(),
            ChatPart::Text { text } => text.len(),
        })
        .sum();
    let busy = |_| {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "no memory for the films now",
        )
    };
    let mut memory = app.bodies.take(client, 0, 1).await.map_err(busy)?;
    take(&mut memory, bytes).await?;
    let call = Call {
        client,
        record: RequestRecord::begin(&app.audit, &Request::new(Body::empty())),
        started: Instant::now(),
    };
    let answers = ask(app, &call, request, memory, prefix).await?;
    let mut answer = collect(answers).await?;
    let remarks = answer["remarks"].as_array().cloned().unwrap_or_default();
    Ok((answer["choices"][0].take(), remarks))
}

fn text_of(choice: &Value, key: &str) -> String {
    choice["message"][key]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

/// The draft of a study.
async fn draft(app: &Arc<App>, study: Study) -> Result<Draft, ApiError> {
    let studies = app.studies()?;
    let most = app.config.max_images;
    let films = study
        .films
        .iter()
        .filter(|film| film.kept_out.is_none())
        .count();
    let (parts, ids) = with_store(app, move |store| parts(store, &study, most)).await?;
    let mut remarks = Vec::new();
    if films > ids.len() {
        let text = format!(
            "the study has {films} films, and the model read {} (--max-images)",
            ids.len()
        );
        remarks.push(json!({"image": null, "code": "films_left_out", "text": text}));
    }
    let request = |findings: bool| {
        let text = studies.prompt.clone();
        let parts = [&parts[..], &[ChatPart::Text { text }]].concat();
        ChatRequest {
            messages: vec![message("user", ChatContent::Parts(parts))],
            findings,
            ..ChatRequest::default()
        }
    };
    let answer = match asked(app, 0, request(studies.findings), "draft-").await {
        // A report without probabilities is better than none, and says so.
        Err(error) if error.param.as_deref() == Some(FIELD) => {
            let code = "findings_left_out";
            remarks.push(json!({"image": null, "code": code, "text": error.message}));
            asked(app, 0, request(false), "draft-").await
        }
        other => other,
    };
    let (choice, more) = answer?;
    remarks.extend(more);
    let reason = choice["stop_reason"]
        .as_str()
        .or(choice["finish_reason"].as_str());
    Ok(Draft {
        model: app.models.base().to_owned(),
        program: env!("CARGO_PKG_VERSION").into(),
        prompt: studies.prompt.clone(),
        text: text_of(&choice, "content").trim().to_owned(),
        reasoning: text_of(&choice, "reasoning_content"),
        finish_reason: reason.unwrap_or_default().to_owned(),
        findings: choice[FIELD].clone(),
        remarks,
        at: now(),
        films: ids,
        prior: None,
    })
}

/// Whether the same request may succeed later.
fn passes(error: &ApiError) -> bool {
    matches!(error.status.as_u16(), 429 | 503 | 504)
}

/// Has the draft of one study written; `false` where there is no room for it now.
async fn draft_one(app: &Arc<App>, id: &str) -> Result<bool, ApiError> {
    let wanted = id.to_owned();
    let study = with_store(app, move |store| store.study(&wanted)).await?;
    if study.state != StudyState::Complete {
        return Ok(true);
    }
    let films = study.films.len();
    let drafted = match draft(app, study).await {
        Err(error) if passes(&error) || app.engine.is_stopping() => return Ok(false),
        other => other,
    };
    let id = id.to_owned();
    let outbox = app.studies()?.outbox.clone();
    let kept = with_store(app, move |store| {
        let action = if drafted.is_ok() { "draft" } else { "fail" };
        store.change(&id, action, &Actor::server(), &mut |study| {
            // A film that came meanwhile makes the draft one of less than the study.
            if study.state != StudyState::Complete || study.films.len() != films {
                return Err(StoreError::Changed {
                    expected: films as u64,
                    found: study.films.len() as u64,
                });
            }
            match &drafted {
                Ok(draft) => {
                    study.draft = Some(draft.clone());
                    study.state = StudyState::Drafted;
                    study.failure = None;
                    let sent = outgoing(outbox.as_deref(), study, 0);
                    study.outbox.extend(sent);
                }
                Err(error) => {
                    study.state = StudyState::Failed;
                    study.failure = Some(error.message.clone());
                }
            }
            Ok(())
        })
    })
    .await;
    match kept {
        Err(error) if error.status != StatusCode::CONFLICT => Err(error),
        _ => Ok(true),
    }
}

/// Has drafts of complete studies written until the server ends, and removes studies that are old enough.
pub async fn run(app: Arc<App>) {
    let Some(studies) = &app.studies else {
        return;
    };
    let mut removed: Option<Instant> = None;
    while !app.engine.is_stopping() {
        let due = removed.is_none_or(|at| at.elapsed() >= REMOVAL_PAUSE);
        if let (Some(days), Some(store), true) = (studies.keep_days, &studies.accounts, due) {
            removed = Some(Instant::now());
            let store = store.clone();
            let states = [StudyState::Signed, StudyState::Sent];
            let done = tokio::task::spawn_blocking(move || {
                store.delete_older(days, &states, &Actor::server())
            });
            match done.await {
                Ok(Ok(0)) => {}
                Ok(Ok(count)) => log::info!("{count} studies older than {days} days were removed"),
                Ok(Err(error)) => log::error!("old studies could not be removed: {error}"),
                Err(error) => log::error!("old studies could not be removed: {error}"),
            }
        }
        let waiting = with_store(&app, |store| store.waiting(StudyState::Complete, now())).await;
        let drafted = stream::iter(waiting.unwrap_or_default()).map(|id| {
            let app = &app;
            async move {
                draft_one(app, &id).await.unwrap_or_else(|error| {
                    log::error!("study {id} could not be drafted: {error}");
                    false
                })
            }
        });
        let all = drafted
            .buffer_unordered(AT_ONCE)
            .all(|done| async move { done })
            .await;
        let pause = if all { PAUSE } else { BUSY_PAUSE };
        tokio::time::sleep(pause).await;
    }
}

/// `POST /v1/studies/{id}/ask`: a further question about the films, after the draft and the questions before it.
pub(super) async fn ask_more(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    identity.require(Scope::Read)?;
    identity.require(Scope::Ask)?;
    let mut fields = json_body(&app, peer.client, &headers, body).await?;
    let found = fields.text("question")?;
    let question = fields.needed("question", found)?.trim().to_owned();
    let turns = fields.texts("before")?.unwrap_or_default();
    fields.finish(&[], None)?;
    if question.is_empty() || question.chars().count() > LONGEST_QUESTION {
        let reason = format!("`question` is none, expected 1 to {LONGEST_QUESTION} letters");
        return Err(ApiError::invalid("question", reason));
    }
    if turns.len() % 2 != 0 || turns.len() > 2 * MAX_TURNS {
        let reason =
            format!("`before` has questions and answers by turns, at most {MAX_TURNS} of each");
        return Err(ApiError::invalid("before", reason));
    }
    let most = app.config.max_images;
    let actor = identity.actor(None);
    let (study, mut first) = with_store(&app, move |store| {
        let study = store.study(&id)?;
        store.note("ask", Some(&id), &actor)?;
        let (parts, _) = parts(store, &study, most)?;
        Ok((study, parts))
    })
    .await?;
    let draft = study.draft.as_ref();
    let prompt = draft.map_or_else(|| question.clone(), |draft| draft.prompt.clone());
    first.push(ChatPart::Text { text: prompt });
    let mut messages = vec![message("user", ChatContent::Parts(first))];
    if let Some(draft) = draft {
        messages.push(message("assistant", ChatContent::Text(draft.text.clone())));
        let roles = ["user", "assistant"].into_iter().cycle();
        for (role, text) in roles.zip(turns) {
            messages.push(message(role, ChatContent::Text(text)));
        }
        messages.push(message("user", ChatContent::Text(question)));
    }
    let request = ChatRequest {
        messages,
        ..ChatRequest::default()
    };
    let (choice, remarks) = asked(&app, peer.client, request, "ask-").await?;
    Ok(Json(json!({
        "object": "answer",
        "text": text_of(&choice, "content"),
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice["stop_reason"],
        "remarks": remarks,
    })))
}
