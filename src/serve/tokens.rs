//! `POST /tokenize` and `POST /detokenize`, in vLLM's form.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{Extension, State},
    http::HeaderMap,
};
use serde_json::{Value, json};

use super::{
    App,
    ask::{expect_json, read_json},
    auth::Peer,
    content::{Asked, Requester, encode_text, prepare},
    error::ApiError,
    fields::Fields,
    share::Share,
    types::{DetokenizeRequest, PromptText, TokenizeInput, TokenizeRequest},
};

async fn body_of(
    app: &App,
    peer: Peer,
    headers: &HeaderMap,
    body: Body,
) -> Result<(Fields, Share), ApiError> {
    expect_json(headers)?;
    read_json(app, peer.client, body).await
}

/// Token ids of a text or a conversation.
///
/// # Errors
/// [`ApiError`].
pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let (fields, memory) = body_of(&app, peer, &headers, body).await?;
    let request = TokenizeRequest::read(fields)?;
    let model = app.models.find(request.model.as_deref())?;
    let ids = match request.input {
        TokenizeInput::Text(text) if text.is_empty() => Vec::new(),
        TokenizeInput::Text(text) => {
            let encoded = encode_text(&app, peer.client, PromptText::Text(text));
            encoded.await?.0
        }
        TokenizeInput::Chat(chat) => {
            let asked = Asked {
                messages: chat.messages,
                tools: chat.tools.described().to_vec(),
                options: chat.prompt,
            };
            let requester = Requester {
                client: peer.client,
                memory,
            };
            let prepared = prepare(&app, &model, asked, requester).await?;
            prepared.prompt.input_ids
        }
    };
    let texts = request.token_strs.then(|| {
        let text = |id: &u32| {
            let bytes = app.parts.tokenizer.bytes_of(*id, false);
            String::from_utf8_lossy(&bytes).into_owned()
        };
        ids.iter().map(text).collect::<Vec<String>>()
    });
    Ok(Json(json!({
        "count": ids.len(),
        "max_model_len": app.context(),
        "tokens": ids,
        "token_strs": texts,
    })))
}

/// The text of token ids.
///
/// # Errors
/// [`ApiError`].
pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let (fields, _memory) = body_of(&app, peer, &headers, body).await?;
    let request = DetokenizeRequest::read(fields)?;
    app.models.find(request.model.as_deref())?;
    let vocab_size = app.parts.config.text_config.vocab_size;
    if let Some(id) = request.tokens.iter().find(|id| **id as usize >= vocab_size) {
        return Err(ApiError::invalid(
            "tokens",
            format!("`tokens` has {id}, expected token ids below {vocab_size}"),
        ));
    }
    let text = app.parts.tokenizer.decode(&request.tokens, false);
    let text = text.map_err(|error| {
        log::error!("token ids could not be decoded: {error}");
        ApiError::internal()
    })?;
    Ok(Json(json!({"prompt": text})))
}
