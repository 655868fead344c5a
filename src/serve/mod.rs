//! `serve`: one process that many people use. OpenAI's API, a web page, one batched engine.
//!
//! The way of a request: [`http`] accepts the connection and holds it to its limits; [`router`] checks
//! who asks and from where; [`chat`] takes a place in the queue, reads the body, has the images made
//! into patches on other threads ([`content`]) and hands the prompt to the [`engine`], whose events
//! become a response or a stream. Handlers see no tensor; the engine sees no HTTP.
//!
//! Uploads live in memory only, and the log holds ids and sizes, never content.

mod audit;
pub mod auth;
pub mod chat;
pub mod client;
pub mod content;
mod data_url;
pub mod engine;
pub mod error;
pub mod fetch;
mod fields;
pub mod grammar;
pub mod http;
pub mod metrics;
pub mod models;
pub mod preview;
pub mod reasoning;
mod request;
pub mod router;
mod schema;
pub mod settings;
mod stream;
#[cfg(feature = "tls")]
pub mod tls;
pub mod types;

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

use crate::{generate::SamplingConfig, pipeline::TextAndImages, processor::image::DecodeLimits};
use audit::Audit;
use auth::ApiKey;
use engine::Engine;
use error::ApiError;
use grammar::GrammarFactory;
use metrics::Metrics;
use models::Models;

/// What a request may ask for, and what it gets when it does not ask.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Largest body of a request, in bytes.
    pub max_body_bytes: usize,
    /// Largest image, in pixels of its header.
    pub max_image_pixels: u64,
    /// Most images of a request.
    pub max_images: usize,
    /// Most answers to a request.
    pub max_choices: usize,
    /// Tokens of an answer when the request names no number.
    pub default_new_tokens: usize,
    /// Most tokens of an answer that a request may ask for.
    pub max_new_tokens: usize,
    /// How tokens are chosen when the request does not say.
    pub sampling: SamplingConfig,
    /// Time for a whole request.
    pub request_timeout: Duration,
    /// Time for a request's headers, and again for its body.
    pub read_timeout: Duration,
    /// Most open connections.
    pub max_connections: usize,
    /// Fetches images from public addresses.
    pub allow_image_urls: bool,
    /// Keys of which one must be shown; none: everybody is let in.
    pub api_keys: Vec<ApiKey>,
    /// Folder whose folders may be loaded as adapters at run time.
    pub adapter_dir: Option<PathBuf>,
    /// Passes over unknown fields of a request, and names them in the answer, instead of refusing it.
    pub lenient: bool,
    /// Whether the page keeps a history of reports in the browser without being told to; where nothing is
    /// said, the page does so on the server's own machine only.
    pub page_history: Option<bool>,
    /// Names the server goes by, for the check of the `Host` header; empty: any.
    pub host_names: Vec<String>,
    /// Names a page may come from besides the `Host` itself, as behind a proxy that replaces it.
    pub origin_names: Vec<String>,
}

impl ServeConfig {
    /// What a picture from outside may cost.
    pub fn decode_limits(&self) -> DecodeLimits {
        DecodeLimits {
            max_file_bytes: self.max_body_bytes as u64,
            max_decoded_pixels: self.max_image_pixels,
            // 16-bit colour with alpha.
            max_decoded_bytes: self.max_image_pixels.saturating_mul(8),
        }
    }
}

/// Everything the handlers share.
pub struct App {
    /// The worker.
    pub engine: Engine,
    /// Tokenizer, template and image processor of the base.
    pub parts: TextAndImages,
    /// Base and adapters by name.
    pub models: Models,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Limits and defaults.
    pub config: ServeConfig,
    /// Images that are decoded at once.
    preparing: Arc<Semaphore>,
    /// Kibibytes of bodies in memory at once.
    body_kib: Semaphore,
    grammar: OnceLock<Option<GrammarFactory>>,
    /// Lines of the log about requests.
    audit: Arc<Audit>,
}

impl App {
    /// Puts the parts together; images are held to the config's limits from here on.
    pub fn new(
        engine: Engine,
        mut parts: TextAndImages,
        models: Models,
        metrics: Arc<Metrics>,
        config: ServeConfig,
    ) -> Self {
        parts.images = parts.images.with_limits(config.decode_limits());
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        // Eight of the largest bodies; smaller ones fit in greater number.
        let body_kib = (config.max_body_bytes / 1024 + 1).saturating_mul(8);
        Self {
            engine,
            parts,
            models,
            metrics,
            preparing: Arc::new(Semaphore::new(cores)),
            body_kib: Semaphore::new(body_kib.min(Semaphore::MAX_PERMITS)),
            config,
            grammar: OnceLock::new(),
            audit: Arc::default(),
        }
    }

    /// Takes memory for `bytes` of a body; waits while too many bodies are being read.
    async fn take_memory(&self, bytes: usize) -> Result<SemaphorePermit<'_>, ApiError> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        self.body_kib
            .acquire_many(kib)
            .await
            .map_err(|_| ApiError::internal())
    }

    /// Leave to decode images of one request.
    async fn permit_to_decode(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        let permit = self.preparing.clone().acquire_owned().await;
        permit.map_err(|_| ApiError::internal())
    }

    /// Tokens of prompt and answer together.
    pub fn context(&self) -> usize {
        self.parts
            .config
            .text_config
            .max_position_embeddings
            .min(self.engine.limits().cache_tokens)
    }

    /// The maker of JSON constraints; `None` when the vocabulary cannot be used for it.
    ///
    /// Reads the whole vocabulary at its first use.
    fn grammar(&self) -> Option<&GrammarFactory> {
        self.grammar
            .get_or_init(|| {
                let vocab = self.parts.config.text_config.vocab_size;
                GrammarFactory::new(&self.parts.tokenizer, vocab)
                    .inspect_err(|reason| log::error!("grammar: {reason}"))
                    .ok()
            })
            .as_ref()
    }
}
