//! Messages and images of a request to a prompt the engine takes.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use axum::http::StatusCode;
use hyper::body::Bytes;

use super::{
    App,
    body::crowded,
    engine::{Patches, PreparedPrompt},
    error::ApiError,
    fetch::fetch_image,
    models::ModelEntry,
    share::{Full, Share},
    types::{ChatContent, ChatMessage, ChatPart, ImageRemark},
};
use crate::{
    base::base64_text::base64_bytes,
    batch::images::ImageInput,
    processor::{
        chat::{ChatError, ChatTemplate, RenderOptions, encode_chat},
        dicom::DicomError,
        image::{ImageError, RgbImage},
        message::{Content, Message, Part, Role},
        patches::ImageProcessor,
        remark::{Remark, RemarkKind},
        tokenizer::TokenizerError,
    },
    runtime::generate::GenerateError,
};

/// Most messages of a request.
const MAX_MESSAGES: usize = 256;

/// Where an image of a request comes from.
enum Source {
    Bytes(Vec<u8>),
    Url(String),
}

/// Patches, the picture they are made of, and what they are made from meanwhile: bytes of a pixel.
const PATCH_BYTES: u64 = 24;
pub(super) const PICTURE_BYTES: u64 = 3;
const RESIZING_BYTES: u64 = 6;

/// Memory of the tokenizer: for a byte of text, and for a token. A megabyte of short Latin words, half a
/// million tokens, took 280 MB.
const TEXT_BYTES: u64 = 48;
const TOKEN_BYTES: u64 = 700;

/// Text is tokenised in parts of this many bytes where it has to be counted first.
const PART_BYTES: usize = 64 << 10;

/// NFC makes at most one byte of so many.
const LARGEST_COMPOSITION: usize = 3;

/// What the largest picture takes of the memory for pictures, in bytes.
pub(super) fn largest_picture(pixels: u64, patch_pixels: u64) -> u64 {
    pixels.saturating_mul(8 + 3) + patch_pixels * (PATCH_BYTES + PICTURE_BYTES + RESIZING_BYTES)
}

/// The client of a request, and the memory taken for it so far.
pub(super) struct Requester {
    /// The client.
    pub(super) client: u64,
    /// Memory of the body.
    pub(super) memory: Share,
}

/// Set when a request is cancelled: work on other threads ends at its next check.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a request takes of the memory for pictures and prompts, in bytes.
struct Cost {
    /// While it is prepared.
    preparing: u64,
    /// Until its prompt is in the cache.
    patches: u64,
    /// Until it is answered.
    kept: u64,
}

/// Makes the prompt of `messages` for one model.
///
/// # Errors
/// [`ApiError`] names the message or the image, by number.
pub(super) async fn prepare(
    app: &Arc<App>,
    model: &ModelEntry,
    messages: Vec<ChatMessage>,
    requester: Requester,
) -> Result<PreparedPrompt, ApiError> {
    let Requester { client, mut memory } = requester;
    let (messages, sources) = blocking(app, move |app| split(messages, app)).await??;
    let text_bytes = text_bytes(&messages);
    let most = app.context() * app.longest_token * LARGEST_COMPOSITION;
    if text_bytes > most {
        return Err(too_long(
            app,
            text_bytes / app.longest_token / LARGEST_COMPOSITION,
        ));
    }
    let images = fetch_all(app, client, sources, &mut memory).await?;
    let processor = app.parts.images.with_pixels(model.limits);
    let processor = processor
        .map_err(|error| {
            log::error!("the pixel limits of an adapter cannot be used: {error}");
            ApiError::internal()
        })?
        .into_owned();
    let cost = cost(app, &processor, &images, text_bytes)?;
    let mut share = match app.pictures.take(client, 1, cost.preparing).await {
        Ok(share) => share,
        Err(Full::TooManyWait) => return Err(crowded()),
        Err(Full::TooLarge) => {
            let message = "the images of the request need more memory together than this server gives \
                           one request; send fewer or smaller ones";
            let error = ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message);
            return Err(error.with_code("image"));
        }
    };
    let template = model.template.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let cancel = CancelOnDrop(stop.clone());
    let prompt = blocking(app, move |app| {
        // Decoding goes on when the request is cancelled, and its memory counts until it has ended.
        let mut prompt = encode(app, &processor, &template, &messages, images, &stop)?;
        drop(memory);
        share.leave();
        share.shrink_to(cost.patches + cost.kept);
        let patches = share.split(cost.patches);
        prompt.patch_memory = Mutex::new(Some(Box::new(patches)));
        prompt.memory = Some(Box::new(share));
        Ok(prompt)
    })
    .await?;
    drop(cancel);
    prompt
}

/// Runs work that takes a while on a thread of its own.
async fn blocking<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&App) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let app = app.clone();
    tokio::task::spawn_blocking(move || work(&app))
        .await
        .map_err(|error| {
            log::error!("preparing a prompt failed: {error}");
            ApiError::internal()
        })
}

/// The bytes of all images; those that are fetched are fetched at once, and take memory as they come.
async fn fetch_all(
    app: &App,
    client: u64,
    sources: Vec<Source>,
    memory: &mut Share,
) -> Result<Vec<Bytes>, ApiError> {
    let limit = app.config.max_body_bytes;
    let fetches = sources
        .into_iter()
        .enumerate()
        .map(|(index, source)| async move {
            let url = match source {
                Source::Bytes(bytes) => return Ok((Bytes::from(bytes), None)),
                Source::Url(url) => url,
            };
            let name = image_name(index);
            let place = app.fetches.take(client, 1, 0).await;
            let _place = place.map_err(|_| crowded())?;
            let taken = app.bodies.take(client, 0, 1).await;
            let mut taken = taken.map_err(|_| crowded())?;
            let image = fetch_image(&url, limit, &name, &mut taken).await?;
            Ok::<_, ApiError>((image, Some(taken)))
        });
    let (mut images, mut fetched) = (Vec::new(), 0);
    for (image, taken) in futures_util::future::try_join_all(fetches).await? {
        if let Some(taken) = taken {
            fetched += image.len();
            memory.merge(taken);
        }
        images.push(image);
    }
    if fetched > limit {
        return Err(ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the images have {fetched} bytes together, more than the limit of {limit}"),
        ));
    }
    Ok(images)
}

/// What a request will take, by the headers of its images and the length of its text.
fn cost(
    app: &App,
    processor: &ImageProcessor,
    images: &[Bytes],
    text_bytes: usize,
) -> Result<Cost, ApiError> {
    let most = processor.config().max_pixels as u64;
    let least = processor.config().min_pixels as u64;
    let (mut decoding, mut pixels) = (0, 0);
    for (index, bytes) in images.iter().enumerate() {
        let name = image_name(index);
        let found = processor.decoding_cost(bytes, &name);
        let found = found.map_err(|error| image_error(&name, &error))?;
        let scaled = found.pixels.clamp(least, most.max(least));
        decoding = found.bytes.max(decoding);
        pixels += scaled;
    }
    let tokens = text_bytes.min(app.context()) as u64;
    // Rounding to whole patches may add a little.
    let patches = pixels * PATCH_BYTES * 9 / 8;
    let kept = pixels * PICTURE_BYTES * 9 / 8 + text_bytes as u64 + 64 * tokens;
    let resizing = pixels.min(most) * RESIZING_BYTES;
    let tokenizing = text_bytes as u64 * TEXT_BYTES + tokens * TOKEN_BYTES;
    Ok(Cost {
        preparing: patches + kept + (decoding + resizing).max(tokenizing),
        patches,
        kept,
    })
}

fn text_bytes(messages: &[Message]) -> usize {
    let of_content = |content: &Content| match content {
        Content::Text(text) => text.len(),
        Content::Parts(parts) => parts
            .iter()
            .map(|part| match part {
                Part::Text { text } => text.len(),
                Part::Image => 0,
            })
            .sum(),
    };
    messages
        .iter()
        .map(|message| {
            let reasoning = message.reasoning_content.as_deref();
            of_content(&message.content) + reasoning.map_or(0, str::len)
        })
        .sum()
}

fn too_long(app: &App, tokens: usize) -> ApiError {
    let context = app.context();
    ApiError::invalid(
        "messages",
        format!(
            "the prompt has more than {tokens} tokens; this server takes {context} with the answer"
        ),
    )
    .with_code("context_length_exceeded")
}

/// Counts the tokens of long text part by part, so that what does not fit ends early: what the
/// tokenizer takes for all of it at once is some hundred times the text.
fn check_length(app: &App, messages: &[Message], stop: &AtomicBool) -> Result<(), ApiError> {
    if text_bytes(messages) <= PART_BYTES {
        return Ok(());
    }
    // A cut may make a token into a few.
    const OF_A_CUT: usize = 4;
    let mut tokens = 0usize;
    for message in messages {
        let content = message.content.text();
        let reasoning = message.reasoning_content.as_deref().unwrap_or_default();
        for mut text in [content.as_str(), reasoning] {
            while !text.is_empty() {
                if stop.load(Ordering::Relaxed) {
                    return Err(ApiError::internal());
                }
                let mut end = text.len().min(PART_BYTES);
                while !text.is_char_boundary(end) {
                    end += 1;
                }
                let (part, rest) = text.split_at(end);
                text = rest;
                let found = app.parts.tokenizer.encode_plain(part);
                tokens += found.map_or(0, |ids| ids.len()).saturating_sub(OF_A_CUT);
                if tokens >= app.context() {
                    return Err(too_long(app, tokens));
                }
            }
        }
    }
    Ok(())
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
                // Templates treat plain text and pieces differently; some take pieces from the user alone.
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
        // The content decides the format; the declared type may be wrong.
        let bytes = base64_bytes(data).ok_or_else(|| wrong("is not valid base64"))?;
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
    app: &App,
    processor: &ImageProcessor,
    template: &ChatTemplate,
    messages: &[Message],
    images: Vec<Bytes>,
    stop: &AtomicBool,
) -> Result<PreparedPrompt, ApiError> {
    let parts = &app.parts;
    check_length(app, messages, stop)?;
    let mut patches = Vec::with_capacity(images.len());
    let mut grids = Vec::with_capacity(images.len());
    let mut remarks = Vec::new();
    if images.is_empty() {
        let text = "the request holds no image: what is said of one is made up";
        remarks.push(ImageRemark {
            image: None,
            remark: Remark::new(RemarkKind::NoImage, text),
        });
    }
    for (index, bytes) in images.into_iter().enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Err(ApiError::internal());
        }
        let name = image_name(index);
        let picture = processor
            .decode_with_remarks(&bytes, &name)
            .and_then(|reading| {
                remarks.extend(reading.remarks.into_iter().map(|remark| ImageRemark {
                    image: Some(index + 1),
                    remark,
                }));
                Ok(processor.resize(&reading.picture)?.into_owned())
            })
            .map_err(|error| image_error(&name, &error))?;
        drop(bytes);
        let made = patches_of(processor, &picture).map_err(|error| image_error(&name, &error))?;
        grids.extend_from_slice(&made.image_grid_thw);
        let images = processor.clone();
        patches.push(Patches::new(made, move || {
            patches_of(&images, &picture).expect("the same picture was cut into patches before")
        }));
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
    let mut prompt =
        PreparedPrompt::new(ids, patches, &parts.config).map_err(|error| match error {
            GenerateError::Empty => ApiError::invalid("messages", "the prompt is empty"),
            other => {
                log::error!("a prompt could not be made: {other}");
                ApiError::internal()
            }
        })?;
    prompt.remarks = remarks;
    Ok(prompt)
}

fn patches_of(images: &ImageProcessor, picture: &RgbImage) -> Result<ImageInput, ImageError> {
    let patches = images.process(picture)?;
    Ok(ImageInput {
        pixel_values: patches.pixel_values.into(),
        image_grid_thw: vec![patches.grid_thw],
    })
}

/// Describes what is wrong with an image in words of our own: a decoder's may repeat parts of the file.
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
