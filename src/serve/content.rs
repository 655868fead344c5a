//! Messages and images of a request to a prompt the engine takes.

use std::sync::Arc;

use axum::http::StatusCode;
use base64::{Engine as _, engine::general_purpose};
use hyper::body::Bytes;

use super::{
    App,
    engine::PreparedPrompt,
    error::ApiError,
    fetch::fetch_image,
    models::ModelEntry,
    types::{ChatContent, ChatMessage, ChatPart},
};
use crate::{
    generate::GenerateError,
    pipeline::TextAndImages,
    processor::{
        chat::{ChatError, ChatTemplate, RenderOptions, encode_chat},
        dicom::DicomError,
        image::ImageError,
        message::{Content, Message, Part, Role},
        tokenizer::TokenizerError,
    },
};

/// Most messages of a request.
const MAX_MESSAGES: usize = 256;

/// Where an image of a request comes from.
enum Source {
    Bytes(Vec<u8>),
    Url(String),
}

/// Makes the prompt of `messages` for one model.
///
/// # Errors
/// [`ApiError`] names the message or the image, by number.
pub async fn prepare(
    app: &Arc<App>,
    model: &ModelEntry,
    messages: Vec<ChatMessage>,
) -> Result<PreparedPrompt, ApiError> {
    let (messages, sources) = split(messages, app)?;
    let mut images = Vec::with_capacity(sources.len());
    // Fetched images count like a body of the largest size, taken at once: who holds some memory and
    // waits for more could wait for ever.
    let mut left = app.config.max_body_bytes;
    let fetches = sources
        .iter()
        .any(|source| matches!(source, Source::Url(_)));
    let _memory = match fetches {
        true => Some(app.take_memory(left).await?),
        false => None,
    };
    for (index, source) in sources.into_iter().enumerate() {
        images.push(match source {
            Source::Bytes(bytes) => Bytes::from(bytes),
            Source::Url(url) => {
                let image = fetch_image(&url, left, &image_name(index)).await?;
                left -= image.len().min(left);
                image
            }
        });
    }
    let permit = app.permit_to_decode().await?;
    let (app, template) = (app.clone(), model.template.clone());
    tokio::task::spawn_blocking(move || {
        // Decoding goes on when the request is given up, and counts until it has ended.
        let _permit = permit;
        encode(&app.parts, &template, &messages, &images)
    })
    .await
    .map_err(|error| {
        log::error!("preparing a prompt failed: {error}");
        ApiError::internal()
    })?
}

fn image_name(index: usize) -> String {
    format!("image {}", index + 1)
}

/// Messages as the template takes them, and their images in order.
fn split(messages: Vec<ChatMessage>, app: &App) -> Result<(Vec<Message>, Vec<Source>), ApiError> {
    let wrong = |reason: String| ApiError::invalid("messages", reason);
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        return Err(wrong(format!(
            "`messages` has {} entries, expected 1 to {MAX_MESSAGES}",
            messages.len()
        )));
    }
    let mut sources = Vec::new();
    let mut split = Vec::with_capacity(messages.len());
    for (index, message) in messages.into_iter().enumerate() {
        let role = match message.role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            _ => {
                return Err(wrong(format!(
                    "`messages[{index}].role` is not one of system, developer, user, assistant"
                )));
            }
        };
        let content = match message.content {
            None => Content::Text(String::new()),
            Some(ChatContent::Text(text)) => Content::Text(text),
            Some(ChatContent::Parts(parts)) => {
                let mut taken = Vec::with_capacity(parts.len());
                for part in parts {
                    taken.push(match part {
                        ChatPart::Text { text } => Part::Text { text },
                        ChatPart::ImageUrl { image_url } => {
                            if role != Role::User {
                                return Err(wrong(format!(
                                    "`messages[{index}]` holds an image; only messages of the user may"
                                )));
                            }
                            if sources.len() == app.config.max_images {
                                return Err(wrong(format!(
                                    "the request holds more than {} images",
                                    app.config.max_images
                                )));
                            }
                            let url = image_url.url();
                            sources.push(source(url, sources.len(), app.config.allow_image_urls)?);
                            Part::Image
                        }
                    });
                }
                // Templates tell plain text from pieces, and some take pieces from the user alone.
                if role != Role::User {
                    Content::Text(Content::Parts(taken).text())
                } else {
                    Content::Parts(taken)
                }
            }
        };
        split.push(Message {
            role,
            content,
            reasoning_content: message.reasoning_content,
        });
    }
    Ok((split, sources))
}

fn source(url: &str, index: usize, urls_allowed: bool) -> Result<Source, ApiError> {
    let name = image_name(index);
    let wrong = |reason: &str| {
        ApiError::invalid("messages", format!("{name} {reason}")).with_code("image_url")
    };
    let scheme = |prefix: &str| {
        url.get(..prefix.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    if scheme("data:") {
        let form = "is not of the form data:image/TYPE;base64,…";
        let (kind, data) = url["data:".len()..]
            .split_once(',')
            .ok_or_else(|| wrong(form))?;
        if !kind.to_ascii_lowercase().ends_with(";base64") {
            return Err(wrong(form));
        }
        // What it is the content decides; the declared type may lie.
        let bytes = general_purpose::STANDARD
            .decode(data.trim())
            .or_else(|_| general_purpose::STANDARD_NO_PAD.decode(data.trim()))
            .map_err(|_| wrong("is not valid base64"))?;
        return Ok(Source::Bytes(bytes));
    }
    if scheme("http://") || scheme("https://") {
        if urls_allowed {
            return Ok(Source::Url(url.to_owned()));
        }
        return Err(wrong(
            "is an address, and this server does not fetch images; send it as data:image/TYPE;base64,…",
        ));
    }
    Err(wrong(
        "is not of the form data:image/TYPE;base64,…; other addresses are not read",
    ))
}

fn encode(
    parts: &TextAndImages,
    template: &ChatTemplate,
    messages: &[Message],
    images: &[Bytes],
) -> Result<PreparedPrompt, ApiError> {
    let mut inputs = Vec::with_capacity(images.len());
    let mut grids = Vec::with_capacity(images.len());
    for (index, bytes) in images.iter().enumerate() {
        let name = image_name(index);
        let patches = parts
            .images
            .decode(bytes, &name)
            .and_then(|picture| parts.images.process(&picture))
            .map_err(|error| image_error(&name, &error))?;
        grids.push(patches.grid_thw);
        inputs.push(crate::qwen3_vl::ImageInput {
            pixel_values: patches.pixel_values.into(),
            image_grid_thw: vec![patches.grid_thw],
        });
    }
    let ids = encode_chat(
        &parts.tokenizer,
        template,
        messages,
        RenderOptions::generation(),
        &grids,
        parts.config.vision_config.spatial_merge_size,
    )
    .map_err(chat_error)?;
    PreparedPrompt::new(ids, inputs, &parts.config).map_err(|error| match error {
        GenerateError::Empty => ApiError::invalid("messages", "the prompt is empty"),
        other => {
            log::error!("a prompt could not be made: {other}");
            ApiError::internal()
        }
    })
}

/// Own words for what is wrong with an image: a decoder's may carry what is nobody's business.
pub(super) fn image_error(name: &str, error: &ImageError) -> ApiError {
    let reason = match error {
        ImageError::Empty { .. } => "is empty (0 bytes)".into(),
        ImageError::FileTooLarge { bytes, limit, .. } => {
            format!("has {bytes} bytes, more than the limit of {limit}")
        }
        ImageError::UnknownFormat { .. } => {
            "is not a PNG, JPEG, WebP, BMP, TIFF or DICOM picture".into()
        }
        ImageError::TooManyPixels {
            width,
            height,
            limit,
            ..
        } => format!("is {width} × {height} pixels, more than the limit of {limit} pixels"),
        ImageError::TooMuchMemory { .. } => "needs too much memory to decode".into(),
        ImageError::UnsupportedPixels { format, .. } => format!(
            "is a {format} picture of a kind that is not read; save it as 8 or 16 bit grey or RGB"
        ),
        ImageError::Truncated { format, .. } => {
            format!("is a {format} picture that is cut off before its end")
        }
        ImageError::Damaged { format, .. } => format!("is a damaged {format} picture"),
        ImageError::AspectRatio { width, height } => {
            format!("is {width} × {height} pixels; expected one side at most 200 times the other")
        }
        ImageError::Dicom { cause, .. } => match cause.as_ref() {
            DicomError::ManyFrames { frames } => {
                format!("is a DICOM file of {frames} frames; send one of them")
            }
            // Code words and numbers only: free text of a file may be a patient's name.
            cause => format!("is a DICOM file that {cause}"),
        },
        other => {
            log::error!("an image could not be read: {other}");
            "cannot be read".into()
        }
    };
    let too_large = matches!(
        error,
        ImageError::FileTooLarge { .. }
            | ImageError::TooManyPixels { .. }
            | ImageError::TooMuchMemory { .. }
    );
    ApiError {
        status: if too_large {
            StatusCode::PAYLOAD_TOO_LARGE
        } else {
            StatusCode::BAD_REQUEST
        },
        ..ApiError::invalid("messages", format!("{name} {reason}")).with_code("image")
    }
}

fn chat_error(error: ChatError) -> ApiError {
    let message = match &error {
        ChatError::Control { index, cause, .. } => match cause {
            TokenizerError::ControlToken { token } => {
                format!("`messages[{index}]` holds the control token `{token}`, which is not taken")
            }
            _ => format!("`messages[{index}]` cannot be read"),
        },
        ChatError::Template { reason, .. } => {
            // The template's own words, for instance that the system message must be the first.
            let reason: String = reason.chars().take(200).collect();
            format!("the messages do not fit the model's chat template: {reason}")
        }
        ChatError::NoMessages => "`messages` is empty".into(),
        other => {
            log::error!("messages could not be encoded: {other}");
            return ApiError::internal();
        }
    };
    ApiError::invalid("messages", message)
}
