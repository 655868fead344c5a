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
    conversation::{
        AskedImage, Conversation, Rendered, Source, chat_error, count_tokens, image_name, too_long,
    },
    engine::{Patches, PreparedPrompt},
    error::ApiError,
    fetch::fetch_image,
    models::ModelEntry,
    share::{Full, Share},
    types::{ChatMessage, ImageRemark, ImageSize, PromptOptions, PromptText, Tool},
};
use crate::{
    batch::images::ImageInput,
    processor::{
        chat::{ChatTemplate, expand_image_pads},
        dicom::DicomError,
        image::{ImageError, NAMES as PICTURE_FORMATS, RgbImage},
        patches::ImageProcessor,
        remark::{Remark, RemarkKind},
        sample::PixelLimits,
    },
    runtime::generate::GenerateError,
};

/// Most pixels of an image of OpenAI's `detail: "low"`, within the server's own limits.
const LOW_PIXELS: usize = 512 * 512;

/// Patches, the picture they are made of, and what they are made from meanwhile: bytes of a pixel.
const PATCH_BYTES: u64 = 24;
pub(super) const PICTURE_BYTES: u64 = 3;
const RESIZING_BYTES: u64 = 6;

/// Memory of the tokenizer: for a byte of text, and for a token. A megabyte of short Latin words, half a
/// million tokens, took 280 MB.
const TEXT_BYTES: u64 = 48;
const TOKEN_BYTES: u64 = 700;

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

/// A conversation to be made into a prompt.
pub(super) struct Asked {
    pub(super) messages: Vec<ChatMessage>,
    /// Functions that the prompt describes.
    pub(super) tools: Vec<Tool>,
    pub(super) options: PromptOptions,
}

/// A prompt, and what is known of the answer's beginning.
pub(super) struct Prepared {
    pub(super) prompt: PreparedPrompt,
    /// Whether the answer begins inside of reasoning.
    pub(super) opens_thinking: bool,
    /// Fewest and most pixels of its images; 0 where they differ from image to image.
    pub(super) pixels: [usize; 2],
}

/// Makes the prompt of a conversation for one model.
///
/// # Errors
/// [`ApiError`] names the message or the image, by number.
pub(super) async fn prepare(
    app: &Arc<App>,
    model: &ModelEntry,
    asked: Asked,
    requester: Requester,
) -> Result<Prepared, ApiError> {
    let Requester { client, mut memory } = requester;
    let split = blocking(app, move |app| {
        Conversation::new(asked.messages, &asked.tools, asked.options, app)
    });
    let (conversation, images) = split.await??;
    let text_bytes = conversation.text_bytes();
    check_bytes(app, text_bytes)?;
    let (sources, sizes): (Vec<Source>, Vec<ImageSize>) = images
        .into_iter()
        .map(|AskedImage { source, size }| (source, size))
        .unzip();
    let images = fetch_all(app, client, sources, &mut memory).await?;
    let base = app.parts.images.with_pixels(model.limits);
    let base = base
        .map_err(|error| {
            log::error!("the pixel limits of an adapter cannot be used: {error}");
            ApiError::internal()
        })?
        .into_owned();
    let processors = sizes
        .into_iter()
        .enumerate()
        .map(|(index, size)| processor_for(&base, conversation.options().limits, size, index))
        .collect::<Result<Vec<_>, _>>()?;
    let cost = cost(app, &processors, &images, text_bytes)?;
    let mut share = take_memory(app, client, &cost).await?;
    let template = model.template.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let cancel = CancelOnDrop(stop.clone());
    let prepared = blocking(app, move |app| {
        // Decoding goes on when the request is cancelled, and its memory counts until it has ended.
        let mut prepared = encode(app, &processors, &template, &conversation, images, &stop)?;
        drop(memory);
        share.leave();
        share.shrink_to(cost.patches + cost.kept);
        let patches = share.split(cost.patches);
        prepared.prompt.patch_memory = Mutex::new(Some(Box::new(patches)));
        prepared.prompt.memory = Some(Box::new(share));
        Ok(prepared)
    })
    .await?;
    drop(cancel);
    prepared
}

/// Makes a prompt of a text or of token ids, as they are.
///
/// # Errors
/// [`ApiError`] of status 400, and where there is no memory.
pub(super) async fn prepare_text(
    app: &Arc<App>,
    client: u64,
    text: PromptText,
    truncate: Option<usize>,
) -> Result<PreparedPrompt, ApiError> {
    let (mut ids, share) = encode_text(app, client, text).await?;
    keep_end(app, &mut ids, truncate)?;
    if ids.contains(&app.parts.tokenizer.special().image_pad) {
        return Err(ApiError::invalid(
            "prompt",
            "`prompt` holds the token of an image; send images to /v1/chat/completions",
        ));
    }
    let mut prompt = prompt_of(app, ids, Vec::new(), "prompt")?;
    prompt.memory = Some(Box::new(share));
    Ok(prompt)
}

/// Token ids of a text, and the memory that is counted for them.
///
/// # Errors
/// [`ApiError`] of status 400, and where there is no memory.
pub(super) async fn encode_text(
    app: &Arc<App>,
    client: u64,
    text: PromptText,
) -> Result<(Vec<u32>, Share), ApiError> {
    let bytes = match &text {
        PromptText::Text(text) => text.len(),
        PromptText::Ids(ids) => size_of_val(ids.as_slice()),
    };
    check_bytes(app, bytes)?;
    let cost = cost(app, &[], &[], bytes)?;
    let mut share = take_memory(app, client, &cost).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let cancel = CancelOnDrop(stop.clone());
    let encoded = blocking(app, move |app| {
        let ids = match text {
            PromptText::Ids(ids) => ids,
            PromptText::Text(text) => text_ids(app, &text, &stop)?,
        };
        share.leave();
        share.shrink_to(cost.kept);
        Ok((ids, share))
    })
    .await?;
    drop(cancel);
    encoded
}

/// Token ids of a text, control tokens in it read as such.
///
/// # Errors
/// [`ApiError`] of status 400, where it is too long.
fn text_ids(app: &App, text: &str, stop: &AtomicBool) -> Result<Vec<u32>, ApiError> {
    count_tokens(text, app, stop, &mut 0)?;
    app.parts.tokenizer.encode(text).map_err(|error| {
        log::error!("a text could not be encoded: {error}");
        ApiError::internal()
    })
}

/// Refuses text that has too many tokens whatever they are.
fn check_bytes(app: &App, bytes: usize) -> Result<(), ApiError> {
    let most = app.context() * app.longest_token * LARGEST_COMPOSITION;
    if bytes > most {
        let tokens = bytes / app.longest_token / LARGEST_COMPOSITION;
        return Err(too_long(app, tokens));
    }
    Ok(())
}

async fn take_memory(app: &App, client: u64, cost: &Cost) -> Result<Share, ApiError> {
    match app.pictures.take(client, 1, cost.preparing).await {
        Ok(share) => Ok(share),
        Err(Full::TooManyWait) => Err(crowded()),
        Err(Full::TooLarge) => {
            let message = "the images of the request need more memory together than this server gives \
                           one request; send fewer or smaller ones";
            let error = ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message);
            Err(error.with_code("image"))
        }
    }
}

/// Keeps the last `count` tokens.
///
/// # Errors
/// [`ApiError`] of status 400, where an image would be cut.
fn keep_end(app: &App, ids: &mut Vec<u32>, count: Option<usize>) -> Result<(), ApiError> {
    let Some(cut) = count.map(|count| ids.len().saturating_sub(count)) else {
        return Ok(());
    };
    let special = app.parts.tokenizer.special();
    let of_image = [special.vision_start, special.image_pad, special.vision_end];
    if ids[..cut].iter().any(|id| of_image.contains(id)) {
        let name = "truncate_prompt_tokens";
        return Err(ApiError::invalid(
            name,
            format!(
                "`{name}` would cut an image out of the prompt of {} tokens",
                ids.len()
            ),
        ));
    }
    ids.drain(..cut);
    Ok(())
}

/// The processor of one image, at the sizes the request sets for all (`all`) and for this one.
fn processor_for(
    base: &ImageProcessor,
    all: PixelLimits,
    size: ImageSize,
    index: usize,
) -> Result<ImageProcessor, ApiError> {
    let (param, name) = match size.limits == PixelLimits::default() {
        true => ("mm_processor_kwargs", "`mm_processor_kwargs`".to_owned()),
        false => ("messages", image_name(index)),
    };
    let most = base.config().max_pixels;
    let wrong = || {
        ApiError::invalid(
            param,
            format!(
                "{name} sets a size that cannot be used; expected `min_pixels` of at least one patch, at most \
                 `max_pixels`, and both at most {most}, the limit of this server"
            ),
        )
    };
    let mut limits = PixelLimits {
        min_pixels: size.limits.min_pixels.or(all.min_pixels),
        max_pixels: size.limits.max_pixels.or(all.max_pixels),
    };
    let given = [limits.min_pixels, limits.max_pixels];
    if given.into_iter().flatten().any(|pixels| pixels > most) {
        return Err(wrong());
    }
    if size.low {
        limits.max_pixels = Some(limits.max_pixels.unwrap_or(most).min(LOW_PIXELS));
    }
    let processor = base.with_pixels(limits).map_err(|_| wrong())?;
    Ok(processor.into_owned())
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
    processors: &[ImageProcessor],
    images: &[Bytes],
    text_bytes: usize,
) -> Result<Cost, ApiError> {
    let (mut decoding, mut pixels, mut resizing) = (0, 0, 0);
    for (index, (bytes, processor)) in images.iter().zip(processors).enumerate() {
        let name = image_name(index);
        let most = processor.config().max_pixels as u64;
        let least = processor.config().min_pixels as u64;
        let found = processor.decoding_cost(bytes, &name);
        let found = found.map_err(|error| image_error(&name, &error))?;
        let scaled = found.pixels.clamp(least, most.max(least));
        decoding = found.bytes.max(decoding);
        resizing = resizing.max(scaled * RESIZING_BYTES);
        pixels += scaled;
    }
    let tokens = text_bytes.min(app.context()) as u64;
    // Rounding to whole patches may add a little.
    let patches = pixels * PATCH_BYTES * 9 / 8;
    let kept = pixels * PICTURE_BYTES * 9 / 8 + text_bytes as u64 + 64 * tokens;
    let tokenizing = text_bytes as u64 * TEXT_BYTES + tokens * TOKEN_BYTES;
    Ok(Cost {
        preparing: patches + kept + (decoding + resizing).max(tokenizing),
        patches,
        kept,
    })
}

fn encode(
    app: &App,
    processors: &[ImageProcessor],
    template: &ChatTemplate,
    conversation: &Conversation,
    images: Vec<Bytes>,
    stop: &AtomicBool,
) -> Result<Prepared, ApiError> {
    let parts = &app.parts;
    conversation.check_length(app, stop)?;
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
    for (index, (bytes, processor)) in images.into_iter().zip(processors).enumerate() {
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
    let Rendered {
        text,
        opens_thinking,
    } = conversation.render(&parts.tokenizer, template)?;
    let ids = parts.tokenizer.encode(&text).map_err(|error| {
        log::error!("a prompt could not be encoded: {error}");
        ApiError::internal()
    })?;
    let merge_size = parts.config.vision_config.spatial_merge_size;
    let image_pad = parts.tokenizer.special().image_pad;
    let mut ids = expand_image_pads(&ids, image_pad, &grids, merge_size).map_err(chat_error)?;
    keep_end(app, &mut ids, conversation.options().truncate)?;
    let mut prompt = prompt_of(app, ids, patches, "messages")?;
    prompt.remarks = remarks;
    let limits = processors.iter().map(|processor| {
        let config = processor.config();
        [config.min_pixels, config.max_pixels]
    });
    let pixels = limits.reduce(|all, one| if all == one { all } else { [0; 2] });
    Ok(Prepared {
        prompt,
        opens_thinking,
        pixels: pixels.unwrap_or([0; 2]),
    })
}

/// A checked prompt; `param` is the field it is made of.
fn prompt_of(
    app: &App,
    ids: Vec<u32>,
    patches: Vec<Patches>,
    param: &str,
) -> Result<PreparedPrompt, ApiError> {
    PreparedPrompt::new(ids, patches, &app.parts.config).map_err(|error| match error {
        GenerateError::Empty => ApiError::invalid(param, "the prompt is empty"),
        GenerateError::UnknownToken { id, vocab_size } => ApiError::invalid(
            param,
            format!("`{param}` has {id}, expected token ids below {vocab_size}"),
        ),
        other => {
            log::error!("a prompt could not be made: {other}");
            ApiError::internal()
        }
    })
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
        ImageError::UnknownFormat { .. } => format!("is not a {} picture", PICTURE_FORMATS),
        ImageError::Volume { sides, .. } => {
            format!("is a volume of {sides}; send the slice that is meant")
        }
        ImageError::TooManyPixels {
            width,
            height,
            limit,
            ..
        } => format!("is {width} × {height} pixels, more than the limit of {limit} pixels"),
        ImageError::TooMuchMemory { .. } => "needs too much memory to decode".into(),
        ImageError::UnsupportedPixels { format, .. } => format!(
            "is a {format} picture of a kind that is not read; save it as PNG, in 8 or 16 bit grey or RGB"
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
