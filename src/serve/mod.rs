//! `serve`: one process that many people use. OpenAI's API, a web page, one batched engine.
//!
//! The way of a request: [`http`] accepts the connection and holds it to its limits; [`router`] checks
//! key, `Host` and `Origin`; a handler ([`chat`] and its like) reads the body; `ask` takes a place in the
//! queue, has the images made into patches on other threads ([`content`]) and hands the prompt to the
//! [`engine`], whose events become a response or a stream. Handlers see no tensor; the engine sees no HTTP.
//!
//! All that waits takes its memory from one budget (`share`): bodies a quarter, pictures and prompts the
//! rest, counted from a picture's header before it is decoded.
//!
//! Uploads live in memory only, and the log holds ids and sizes, never content.

mod answer;
mod ask;
mod audit;
pub mod auth;
mod body;
pub mod chat;
pub mod client;
mod completions;
pub mod content;
mod conversation;
pub mod cors;
pub mod engine;
pub mod error;
pub mod fetch;
mod fields;
pub mod finding_basis;
pub mod findings;
mod form_parser;
mod gbnf;
pub mod grammar;
pub mod http;
pub mod metrics;
pub mod models;
mod openapi;
pub mod preview;
pub mod reasoning;
mod request;
mod responses;
pub mod router;
mod routes;
mod schema;
pub mod settings;
mod share;
mod stream;
pub mod studies;
#[cfg(feature = "tls")]
pub mod tls;
pub mod token_rules;
mod tokens;
pub mod tool_calls;
mod tool_grammar;
pub mod types;
mod wire;

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use crate::{
    processor::image::DecodeLimits,
    runtime::{generate::SamplingConfig, pipeline::TextAndImages},
};
use audit::Audit;
use auth::ApiKey;
use cors::AllowedOrigins;
use engine::Engine;
use grammar::GrammarFactory;
use metrics::Metrics;
use models::Models;
use share::{Gate, GateLimits};
use studies::Studies;

/// Most requests that wait for memory; the engine's queue is shorter.
const MAX_WAITING: usize = 4096;

fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

/// Limits of a request, and defaults of what it leaves out.
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
    /// Largest `max_tokens` of a request.
    pub max_new_tokens: usize,
    /// How tokens are chosen unless the request sets it.
    pub sampling: SamplingConfig,
    /// Ends answers that repeat themselves.
    pub stop_on_repetition: bool,
    /// Time for a whole request.
    pub request_timeout: Duration,
    /// Time for a request's headers, and again for its body.
    pub read_timeout: Duration,
    /// Time for a client to take what is ready to be sent.
    pub write_timeout: Duration,
    /// Most open connections.
    pub max_connections: usize,
    /// Most open connections of one address.
    pub max_connections_per_address: usize,
    /// Addresses of proxies whose `X-Forwarded-For` is trusted.
    pub trusted_proxies: Vec<IpAddr>,
    /// Memory of bodies, pictures and prompts that wait, in bytes.
    pub waiting_memory_bytes: u64,
    /// Fetches images from public addresses.
    pub allow_image_urls: bool,
    /// Keys of which one must be shown; none: everybody is let in.
    pub api_keys: Vec<ApiKey>,
    /// Folder whose folders may be loaded as adapters at run time.
    pub adapter_dir: Option<PathBuf>,
    /// Passes over unknown fields of a request, and names them in the answer, instead of refusing it.
    pub lenient: bool,
    /// Whether the page keeps a history of reports in the browser by default; `None`: on the server's own
    /// machine only.
    pub page_history: Option<bool>,
    /// Names the server goes by, for the check of the `Host` header; empty: any.
    pub host_names: Vec<String>,
    /// Names a page may come from besides the `Host` itself, as with a proxy that replaces it.
    pub origin_names: Vec<String>,
    /// Other origins whose pages may use the server.
    pub allow_origins: AllowedOrigins,
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

    /// Whether an address is that of a proxy whose `X-Forwarded-For` is trusted.
    fn is_proxy(&self, address: IpAddr) -> bool {
        self.trusted_proxies.contains(&address.to_canonical())
    }

    /// Places and bytes for the bodies of requests.
    fn body_limits(&self) -> GateLimits {
        let bytes = self.waiting_memory_bytes / 4;
        GateLimits {
            places: 0,
            spare_places: 0,
            bytes,
            spare_bytes: bytes / 2,
            max_waiting: MAX_WAITING,
        }
    }

    /// Places and bytes for pictures that are decoded, and prompts that wait or run.
    fn picture_limits(&self) -> GateLimits {
        let bytes = self.waiting_memory_bytes - self.waiting_memory_bytes / 4;
        GateLimits {
            places: cores() + 1,
            spare_places: 1,
            bytes,
            spare_bytes: bytes / 4,
            max_waiting: MAX_WAITING,
        }
    }

    /// Whether the largest body and the largest picture fit into the memory for them.
    ///
    /// # Errors
    /// The number of bytes that would be enough.
    pub fn check_waiting_memory(&self, patch_pixels: u64) -> Result<(), u64> {
        let bodies = 16 * self.max_body_bytes as u64;
        // 16-bit colour with alpha, the RGB made of it, and patches.
        let picture = content::largest_picture(self.max_image_pixels, patch_pixels);
        let needed = bodies.max(picture.saturating_mul(16).div_ceil(9));
        if self.waiting_memory_bytes < needed {
            return Err(needed);
        }
        Ok(())
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
    /// Bodies in memory.
    bodies: Arc<Gate>,
    /// Requests whose pictures are decoded at once, and the memory of pictures and prompts.
    pictures: Arc<Gate>,
    /// Previews that are made at once.
    previews: Arc<Gate>,
    /// Images that are fetched at once.
    fetches: Arc<Gate>,
    /// Bytes of the tokenizer's longest token.
    longest_token: usize,
    grammar: OnceLock<Option<GrammarFactory>>,
    /// Lines of the log about requests.
    audit: Arc<Audit>,
    /// Where studies are kept, if they are.
    studies: Option<Studies>,
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
        let places = |places, spare_places, max_waiting| {
            Gate::new(GateLimits {
                places,
                spare_places,
                bytes: 0,
                spare_bytes: 0,
                max_waiting,
            })
        };
        Self {
            engine,
            longest_token: parts.tokenizer.longest_token_bytes(),
            parts,
            models,
            metrics,
            bodies: Gate::new(config.body_limits()),
            pictures: Gate::new(config.picture_limits()),
            // Reports come before previews: half of the cores.
            previews: places((cores() / 2).max(1) + 1, 1, 32),
            fetches: places(32, 8, MAX_WAITING),
            config,
            grammar: OnceLock::new(),
            audit: Arc::default(),
            studies: None,
        }
    }

    /// Keeps studies, and serves the worklist.
    #[must_use]
    pub fn with_studies(mut self, studies: Studies) -> Self {
        self.studies = Some(studies);
        self
    }

    /// The studies of this server, if it keeps any.
    pub fn kept_studies(&self) -> Option<&Studies> {
        self.studies.as_ref()
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
