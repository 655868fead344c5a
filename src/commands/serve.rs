//! `serve`: one process that many people use.

use std::{
    future::Future,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use clap::Args;
use tokio::net::TcpListener;

use super::{
    drafts::drafting,
    models::find,
    pipeline_options::pipeline_options,
    progress::{Progress, Unit, prepare_kernels},
    shared_args::{GenerationArgs, ModelArgs, found_adapter, generation_config, one_device},
    usage::UsageError,
};
use crate::{
    accelerate::devices::{DeviceTask, run_on},
    adapters::lora::base::check_base,
    base::{
        hub::{Want, name::expand_home, repo_of_folder},
        system::{open_files_limit, share_one_heap},
    },
    bench::SEED,
    ops::quantised::Packing,
    processor::tokenizer::Tokenizer,
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, weights::gguf::GgufParts},
    runtime::{
        accelerator::Accelerator,
        generate::{
            GenerationConfig,
            backend::{DecodeBackend, ServingDecoder, ServingLimits},
            slots::PlainDecoder,
        },
        pipeline::{LimitsFrom, Pipeline, PipelineOptions, Room, TextAndImages, fit_memory},
        synthetic::weights::{RandomSize, draw},
    },
    serve::{
        App, ServeConfig,
        auth::{ApiKey, KeyError},
        cors::AllowedOrigins,
        engine::{End, Engine, EngineDrafts, EngineLimits},
        findings::FindingFiles,
        http::{self, Transport},
        metrics::Metrics,
        models::{MAX_ADAPTERS, Models, check_name},
        router::router,
    },
};

/// Tokens of a cache that let some requests run at once: with less memory the weights are quantised instead.
const LEAST_CACHE_TOKENS: usize = 8192;

/// The environment's name for `--api-key`.
const API_KEY: &str = "XRAY_API_KEY";

/// What the exit codes of `serve` mean, for its help.
pub const EXIT_CODES: &str = "Exit codes: 0 stopped by a signal, 1 could not start or serve, 2 wrong arguments, 3 the device \
                  failed three times in a row, 130 stopped at once by a second signal.";

/// Arguments of `serve`. Those of the network may come from the environment as well.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Address to listen on; any address other than loopback needs --api-key or --no-auth.
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), env = "XRAY_HOST")]
    pub host: IpAddr,
    /// Port to listen on; 0 selects a free one, which is printed.
    #[arg(long, value_name = "PORT", default_value_t = 7860, env = "XRAY_PORT")]
    pub port: u16,
    /// Key that clients have to send; can be given several times, or as a list with commas in the
    /// environment.
    #[arg(
        long,
        value_name = "KEY",
        env = API_KEY,
        hide_env_values = true,
        value_delimiter = ','
    )]
    pub api_key: Vec<String>,
    /// Accept requests without a key from anybody who reaches the address.
    #[arg(long, conflicts_with = "api_key")]
    pub no_auth: bool,
    /// Host name that clients use, if it is not the address: with a reverse proxy, or for a server without keys;
    /// can be given several times.
    #[arg(long, value_name = "NAME")]
    pub host_name: Vec<String>,
    /// Origin whose web pages may use the server from a browser, such as `https://viewer.example`, `null`, or
    /// `*` for any; can be given several times. Without it only the server's own page may.
    #[arg(long, value_name = "ORIGIN", num_args = 1..)]
    pub allow_origin: Vec<String>,
    /// Certificate chain, PEM; switches TLS on.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Key of the certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Name of the base model in requests; the default is its OWNER/NAME if it was downloaded, else the name
    /// of its folder.
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Adapter on the base model, by folder or by its name on a hub, selected by `model` in a request; can be given several
    /// times. The folder of a run means its best checkpoint.
    #[arg(long, value_name = "NAME=DIR|ID")]
    pub lora: Vec<String>,
    /// Folder whose subfolders can be loaded as adapters at run time.
    #[arg(long, value_name = "DIR")]
    pub adapter_dir: Option<PathBuf>,
    /// Maximum number of loaded adapters, those of --lora included.
    #[arg(long, value_name = "N", default_value_t = MAX_ADAPTERS)]
    pub max_adapters: usize,
    /// Ignore fields of a request that the server does not know or cannot honour, instead of refusing the
    /// request; the answer lists them in `ignored_fields` and in the header `x-ignored-fields`.
    #[arg(long)]
    pub lenient: bool,
    /// Whether the page keeps a history of reports in the browser, unless its user decides otherwise; the
    /// default is only when it is opened on the server's own machine.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub page_history: Option<bool>,
    /// Maximum number of requests answered at the same time.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub max_running: usize,
    /// Maximum number of waiting requests; more get status 429. An eighth is reserved for clients that have
    /// fewer than that waiting.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_queue: usize,
    /// Tokens of the KV cache, which all requests share.
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    pub cache_tokens: usize,
    /// Tokens of a long prompt that are processed between two steps of the other requests.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub prefill_chunk: usize,
    /// Drop a request's tokens from the cache when it ends; a second question about an image then starts from
    /// the beginning.
    #[arg(long)]
    pub no_prefix_cache: bool,
    /// Draft tokens also from the answers that this server has written since its start, those of all clients; up to
    /// 262,144 tokens of them are kept in memory and nowhere else.
    ///
    /// Answers stay the same, but how fast one comes tells whether its like was written before.
    #[arg(long)]
    pub drafts_grow: bool,
    /// Maximum number of tokens that a request may ask for; --max-new-tokens is the default.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub max_new_tokens_limit: usize,
    /// Maximum number of images of a request.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub max_images: usize,
    /// Largest body of a request, images included.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub max_body_mib: usize,
    /// Largest image, in millions of pixels.
    #[arg(long, value_name = "MEGAPIXELS", default_value_t = 64)]
    pub max_image_megapixels: u64,
    /// Memory for waiting requests: a quarter for bodies, the rest for images and prompts. Requests beyond it
    /// wait; those whose body does not fit get status 503.
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    pub max_waiting_memory_mib: usize,
    /// Maximum number of open connections; more get status 503, except on `/healthz`, `/readyz` and
    /// `/metrics`.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_connections: usize,
    /// Maximum number of open connections of one address; more get the same status.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_connections_per_address: usize,
    /// Address of a proxy whose `X-Forwarded-For` header has the client's address: clients then share the
    /// server fairly, and the proxy may open any number of connections; can be given several times.
    #[arg(long, value_name = "ADDRESS")]
    pub trusted_proxy: Vec<IpAddr>,
    /// Time for a request from its arrival to its last token.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub request_timeout_seconds: u64,
    /// Time for a client to send a request's head, and again for its body.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub read_timeout_seconds: u64,
    /// Time for a client to take what is ready to be sent.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub write_timeout_seconds: u64,
    /// Time for running requests to finish after SIGTERM, SIGHUP or Ctrl-C; a second signal ends the server
    /// at once.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_seconds: u64,
    /// Fetch images from public http(s):// addresses.
    #[arg(long)]
    pub allow_image_urls: bool,
    /// Serve a model of this size with random weights, for measurements, with the tokenizer of `--model`.
    #[arg(long, value_enum, value_name = "SIZE", conflicts_with_all = ["adapter", "lora", "adapter_dir"])]
    pub random_weights: Option<RandomSize>,
    /// Model and device.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Defaults of requests.
    #[command(flatten)]
    pub generation: GenerationArgs,
}

/// Runs `serve` until a signal stops it.
///
/// # Errors
/// Whatever keeps it from starting.
pub fn run(mut args: ServeArgs) -> Result<()> {
    let defaults = generation_config(&args.generation)?;
    args.adapter_dir = args.adapter_dir.as_deref().map(expand_home);
    check(&args)?;
    args.model.find(match args.random_weights {
        Some(_) => Want::Description,
        None => Want::Checkpoint,
    })?;
    args.lora = found_loras(&args)?;
    share_one_heap();
    let api_keys = api_keys(&args)?;
    super::log_lines::init_timed(log::LevelFilter::Info);
    let found = loras(&args)?
        .into_iter()
        .map(|(name, dir)| format!("{name}={}", found_adapter(dir).display()))
        .collect();
    args.lora = found;
    let device = one_device(&args.model.device)?;
    let dtype = args.model.load.dtype.map(DType::from);
    run_on(
        device,
        dtype,
        Serve {
            args,
            api_keys,
            defaults,
            drafts: EngineDrafts::default(),
        },
    )?
}

/// The device does not work any more; ends with exit code 3.
#[derive(Debug, thiserror::Error)]
#[error(
    "the device failed several times in a row and does not work any more; the log above has its error; start the server again"
)]
pub struct DeviceLost;

/// Checks the arguments before a model is loaded.
fn check(args: &ServeArgs) -> Result<()> {
    let wrong = |text: String| -> Result<()> { bail!(UsageError(text)) };
    let count = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    if !args.host.is_loopback() && args.api_key.is_empty() && !args.no_auth {
        return wrong(format!(
            "--host {} can be reached from other machines; give an --api-key, or --no-auth to let everybody in",
            args.host
        ));
    }
    for (name, value) in [
        ("--max-running", args.max_running),
        ("--max-queue", args.max_queue),
        ("--prefill-chunk", args.prefill_chunk),
        ("--max-new-tokens-limit", args.max_new_tokens_limit),
        ("--max-body-mib", args.max_body_mib),
        ("--max-images", args.max_images),
        ("--max-image-megapixels", count(args.max_image_megapixels)),
        (
            "--request-timeout-seconds",
            count(args.request_timeout_seconds),
        ),
        ("--read-timeout-seconds", count(args.read_timeout_seconds)),
        ("--write-timeout-seconds", count(args.write_timeout_seconds)),
        ("--max-connections", args.max_connections),
        (
            "--max-connections-per-address",
            args.max_connections_per_address,
        ),
    ] {
        if value == 0 {
            return wrong(format!("{name} is 0, expected at least 1"));
        }
    }
    if args.max_body_mib > 4096 {
        return wrong(format!(
            "--max-body-mib is {}, expected at most 4096",
            args.max_body_mib
        ));
    }
    if args.cache_tokens < 512 {
        return wrong(format!(
            "--cache-tokens is {}, expected at least 512",
            args.cache_tokens
        ));
    }
    if !args.generation.stop.is_empty() {
        return wrong("--stop belongs to a request here; send it as `stop`".into());
    }
    if let Some(dir) = &args.adapter_dir
        && !dir.is_dir()
    {
        bail!("--adapter-dir `{}` is not a folder", dir.display());
    }
    if let Err(error) = AllowedOrigins::new(&args.allow_origin) {
        return wrong(format!("--allow-origin: {error}"));
    }
    loras(args)?;
    #[cfg(not(feature = "tls"))]
    if args.tls_cert.is_some() {
        bail!("this program was built without `tls`; build it with `--features tls`");
    }
    Ok(())
}

/// The keys, of the command line or the environment.
fn api_keys(args: &ServeArgs) -> Result<Vec<ApiKey>> {
    let given = args.api_key.iter().map(String::as_str);
    let from_environment = std::env::var(API_KEY).is_ok_and(|text| given.eq(text.split(',')));
    let source = if from_environment {
        API_KEY
    } else {
        "--api-key"
    };
    let several = args.api_key.len() > 1;
    args.api_key
        .iter()
        .enumerate()
        .map(|(index, text)| {
            ApiKey::new(text).map_err(|error| {
                let which = match several {
                    true => format!("key {} of {source}", index + 1),
                    false => source.to_owned(),
                };
                let cure = match error {
                    KeyError::Empty if from_environment && !several => {
                        "unset it, or give it a key, for instance of `openssl rand -hex 24`"
                    }
                    KeyError::Empty => "leave it out, or give a key",
                    _ => "take another, for instance of `openssl rand -hex 24`",
                };
                UsageError(format!("{which} {error}; {cure}")).into()
            })
        })
        .collect()
}

fn loras(args: &ServeArgs) -> Result<Vec<(&str, &Path)>> {
    if args.lora.len() > args.max_adapters {
        bail!(UsageError(format!(
            "--lora is given {} times and --max-adapters is {}; raise it",
            args.lora.len(),
            args.max_adapters
        )));
    }
    args.lora
        .iter()
        .map(|text| match text.split_once('=') {
            Some((name, dir)) if !dir.is_empty() => match check_name(name) {
                Ok(()) => Ok((name, Path::new(dir))),
                Err(reason) => bail!(UsageError(format!("the name of --lora `{text}` {reason}"))),
            },
            _ => bail!(UsageError(format!(
                "--lora `{text}` is not of the form NAME=DIR or NAME=ID"
            ))),
        })
        .collect()
}

/// `--lora` with folders in place of names.
fn found_loras(args: &ServeArgs) -> Result<Vec<String>> {
    let loras = loras(args)?.into_iter();
    loras
        .map(|(name, dir)| {
            let dir = find(dir, Want::Adapter, args.model.download)
                .with_context(|| format!("--lora {name}"))?;
            let dir = dir
                .to_str()
                .with_context(|| format!("--lora {name}: `{}` is not UTF-8", dir.display()))?;
            Ok(format!("{name}={dir}"))
        })
        .collect()
}

struct Serve {
    args: ServeArgs,
    api_keys: Vec<ApiKey>,
    defaults: GenerationConfig,
    /// Known when the tokenizer is.
    drafts: EngineDrafts,
}

impl DeviceTask for Serve {
    type Output = Result<()>;

    fn run<B: Accelerator>(mut self, device: B::Device, dtype: DType) -> Result<()> {
        let mut options = pipeline_options(&self.args.model, dtype);
        if let Some(limit) = &mut options.memory {
            limit.room = Room::Shared {
                tokens: self.args.cache_tokens,
                least: self.args.cache_tokens.min(LEAST_CACHE_TOKENS),
                at_once: self.args.prefill_chunk,
            };
            limit.kv_cache = Some(self.defaults.kv_cache);
        }
        let checks_base = self.args.random_weights.is_none() && !self.args.model.adapter.any_base;
        let loras = loras(&self.args)?.into_iter().map(|(_, dir)| dir);
        for adapter in options.adapter.as_deref().into_iter().chain(loras) {
            if checks_base {
                check_base(adapter, &options.model, &options.gguf)?;
            }
        }
        let adapter = options.adapter.clone();
        let Pipeline {
            model,
            mut parts,
            device,
            notes,
            fit,
        } = match self.args.random_weights {
            Some(size) => random::<B>(size, &options, device)?,
            None => {
                let mut progress = Progress::new("loading", 0, Unit::Bytes);
                let pipeline = Pipeline::<B>::load(&options, device, &mut |done, total| {
                    progress.set(done, total);
                })?;
                progress.finish();
                pipeline
            }
        };
        parts.remarks.extend(notes);
        if let Some(fit) = fit {
            self.args.cache_tokens = fit.cache_tokens;
        }
        prepare_kernels::<B>(&parts.config, dtype, &device, 0);
        let drafting_args = &self.args.generation.drafting;
        let drafting = drafting(
            drafting_args,
            adapter.as_deref(),
            &options.model,
            &parts.tokenizer,
        )?;
        self.drafts = EngineDrafts {
            base: drafting.drafts,
            beside_adapters: drafting.found,
            most: drafting_args.draft_tokens,
            grow: self.args.drafts_grow,
        };
        if let Some(note) = drafting.note {
            log::info!("{note}");
        }
        let decoder = self.decoder(model, &parts.config, device, &self.engine_limits())?;
        let files = FindingFiles {
            model: self
                .args
                .random_weights
                .is_none()
                .then(|| options.model.clone()),
            gguf: options.gguf.clone(),
            merged: options.adapter.clone(),
            quantize: options
                .quantize
                .or(fit.and_then(|fit| fit.quantization.map(Packing::To)))
                .map(|format| format.to_string()),
        };
        let base = checks_base.then_some((options.model, options.gguf));
        self.answer(decoder, parts, base, files)
    }
}

impl Serve {
    fn engine_limits(&self) -> EngineLimits {
        EngineLimits {
            max_running: self.args.max_running,
            cache_tokens: self.args.cache_tokens,
            max_queue: self.args.max_queue,
            prefill_chunk: self.args.prefill_chunk,
            prefix_cache: !self.args.no_prefix_cache,
            drafts: self.drafts.clone(),
        }
    }

    /// Answers requests until the server is stopped or `decoder` fails for good. Adapters are only taken
    /// where they were trained on `base`, if it is given.
    fn answer<D>(
        self,
        decoder: D,
        parts: TextAndImages,
        base: Option<(PathBuf, GgufParts)>,
        files: FindingFiles,
    ) -> Result<()>
    where
        D: DecodeBackend + Send + 'static,
    {
        let name = match &self.args.served_model_name {
            Some(name) => name.clone(),
            None => base_name(&self.args.model.model),
        };
        let metrics = Arc::new(Metrics::default());
        let limits = self.engine_limits();
        let (engine, worker) =
            Engine::start(decoder, parts.tokenizer.clone(), limits, metrics.clone())?;
        let mut models =
            Models::new(name, parts.template.clone()).with_max_adapters(self.args.max_adapters);
        // Before the first request: a calibration that is damaged is an error.
        models = models.with_calibrations(files)?;
        if parts.limits_from == LimitsFrom::Options {
            models = models.with_one_size();
        }
        models = models.with_remarks(parts.remarks.clone());
        log::info!("{}", parts.pixel_limits());
        for remark in &parts.remarks {
            log::info!("{remark}");
        }
        if let Some((base, gguf)) = base {
            models = models.only_for(base, gguf);
        }
        let config = self.config();
        let patch_pixels = parts.images.config().max_pixels as u64;
        if let Err(needed) = config.check_waiting_memory(patch_pixels) {
            bail!(UsageError(format!(
                "--max-waiting-memory-mib is {}, expected at least {} for the largest body and image; \
                 raise it, or lower --max-body-mib, --max-image-megapixels or --max-pixels",
                self.args.max_waiting_memory_mib,
                needed.div_ceil(1 << 20)
            )));
        }
        let app = App::new(engine, parts, models, metrics, config);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()?;
        let app = Arc::new(app);
        let served = runtime.block_on(self.serve(app.clone()));
        // Whatever ended the server, the worker has nobody left to work for.
        app.engine.abort();
        runtime.shutdown_timeout(Duration::from_secs(1));
        let _ = worker.join();
        if app.engine.end() == Some(End::DeviceLost) {
            bail!(DeviceLost);
        }
        served
    }
}

/// A model with weights that were drawn, under the tokenizer and template of a folder.
fn random<B: Accelerator>(
    size: RandomSize,
    options: &PipelineOptions,
    device: B::Device,
) -> Result<Pipeline<B>> {
    let mut config = size.config(None).map_err(anyhow::Error::msg)?;
    let special = Tokenizer::from_folder(&options.model)?.special();
    config.image_token_id = special.image_pad;
    config.vision_start_token_id = special.vision_start;
    config.vision_end_token_id = special.vision_end;
    let parts = TextAndImages::load_for(options, config)?;
    let fit = fit_memory::<B>(options, &parts, std::slice::from_ref(&device))?;
    let quantization = match options.quantize {
        None if fit.is_some() => fit.and_then(|fit| fit.quantization),
        Some(Packing::To(quantization)) => Some(quantization),
        None => None,
        Some(Packing::Keep) => bail!(UsageError(
            "--quantize keep: weights that are drawn have no form to keep; give a format".into()
        )),
    };
    let model = draw::<B>(&parts.config, SEED, options.dtype, quantization, &device);
    let _ = B::sync(&device);
    Ok(Pipeline {
        model,
        parts,
        device,
        notes: fit.iter().map(ToString::to_string).collect(),
        fit,
    })
}

/// Files beside the connections: those of the process itself, of images that are fetched, and spare ones.
const OTHER_FILES: u64 = 64 + http::SPARE_CONNECTIONS as u64;

/// Connections of `wanted` for which `files` open files are enough; a quarter of few.
fn connections_with(files: u64, wanted: usize) -> usize {
    let most = files.saturating_sub(OTHER_FILES).max(files / 4).max(1);
    usize::try_from(most).map_or(wanted, |most| most.min(wanted))
}

fn lowercase(names: &[String]) -> Vec<String> {
    names.iter().map(|name| name.to_ascii_lowercase()).collect()
}

/// The model's name on its hub, if the folder is in a hub's cache, else the folder's own.
fn base_name(dir: &Path) -> String {
    if let Some(name) = repo_of_folder(dir) {
        return name;
    }
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    dir.file_name().map_or_else(
        || "model".into(),
        |name| name.to_string_lossy().into_owned(),
    )
}

impl Serve {
    /// The backend's own engine where it has one for the model, else plain operations.
    fn decoder<B: Accelerator>(
        &self,
        model: Qwen3Vl<B>,
        config: &Qwen3VlConfig,
        device: B::Device,
        limits: &EngineLimits,
    ) -> Result<ServingDecoder<B>> {
        let kv_cache = self.defaults.kv_cache;
        let mut progress = Progress::new("preparing", 0, Unit::Items);
        let room = ServingLimits {
            // One sequence has rows for its drafts.
            rows: limits.max_running.max(1 + limits.drafts.most),
            cache_tokens: limits.cache_tokens,
            prefill_chunk: limits.prefill_chunk,
            adapters: !self.args.lora.is_empty() || self.args.adapter_dir.is_some(),
            kv_cache,
            warm_up: true,
        };
        let own = B::serving_decoder(&model, config, &room, &mut |done, total| {
            progress.set(done as u64, total as u64);
        });
        Ok(match own.map_err(anyhow::Error::msg)? {
            Some(decoder) => {
                progress.finish();
                decoder
            }
            None => {
                let decoder = PlainDecoder::new(model, config.clone(), device);
                Box::new(decoder.with_cache(kv_cache))
            }
        })
    }

    fn config(&self) -> ServeConfig {
        let args = &self.args;
        ServeConfig {
            max_body_bytes: args.max_body_mib << 20,
            max_image_pixels: args.max_image_megapixels.saturating_mul(1_000_000),
            max_images: args.max_images,
            max_choices: args.max_running.min(args.max_queue).min(8),
            default_new_tokens: self.defaults.max_new_tokens,
            max_new_tokens: args.max_new_tokens_limit,
            sampling: self.defaults.sampling.clone(),
            stop_on_repetition: self.defaults.stop_on_repetition,
            request_timeout: Duration::from_secs(args.request_timeout_seconds),
            read_timeout: Duration::from_secs(args.read_timeout_seconds),
            write_timeout: Duration::from_secs(args.write_timeout_seconds),
            max_connections: self.connections(),
            max_connections_per_address: args.max_connections_per_address,
            trusted_proxies: args
                .trusted_proxy
                .iter()
                .map(IpAddr::to_canonical)
                .collect(),
            waiting_memory_bytes: (args.max_waiting_memory_mib as u64) << 20,
            allow_image_urls: args.allow_image_urls,
            api_keys: self.api_keys.clone(),
            adapter_dir: args.adapter_dir.clone(),
            lenient: args.lenient,
            page_history: args.page_history,
            host_names: self.host_names(),
            origin_names: lowercase(&args.host_name),
            // Checked at the start.
            allow_origins: AllowedOrigins::new(&args.allow_origin).unwrap_or_default(),
        }
    }

    /// Connections that can be open, with a warning where the system allows fewer than `--max-connections`.
    fn connections(&self) -> usize {
        let wanted = self.args.max_connections;
        let Some(files) = open_files_limit() else {
            return wanted;
        };
        let taken = connections_with(files, wanted);
        if taken < wanted {
            eprintln!(
                "warning: this process may open {files} files, so {taken} connections are taken instead of {wanted}; \
                 `ulimit -n {}` allows all",
                wanted as u64 + OTHER_FILES
            );
        }
        taken
    }

    /// Names a server without keys answers to; any, when everybody was let in on purpose.
    fn host_names(&self) -> Vec<String> {
        let args = &self.args;
        if !args.api_key.is_empty() || !args.host.is_loopback() {
            return Vec::new();
        }
        let mut names: Vec<String> = ["localhost", "127.0.0.1", "[::1]"].map(Into::into).into();
        names.push(match args.host {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        });
        names.extend(lowercase(&args.host_name));
        names
    }

    fn transport(&self) -> Result<(Transport, &'static str)> {
        #[cfg(feature = "tls")]
        if let (Some(certificate), Some(key)) = (&self.args.tls_cert, &self.args.tls_key) {
            let acceptor = crate::serve::tls::acceptor(certificate, key)?;
            return Ok((Transport::Tls(acceptor), "https"));
        }
        Ok((Transport::Plain, "http"))
    }

    async fn serve(&self, app: Arc<App>) -> Result<()> {
        for (name, dir) in loras(&self.args)? {
            app.models
                .load(&app.engine, name, dir.to_path_buf())
                .await
                .with_context(|| format!("--lora {name}={}", dir.display()))?;
        }
        let (transport, scheme) = self.transport()?;
        let address = SocketAddr::new(self.args.host, self.args.port);
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!("cannot listen at {address}; is the port in use? --port takes another")
        })?;
        let address = listener.local_addr()?;
        let stop = stop_signal()?;
        eprintln!(
            "`{}` at {scheme}://{address}, the API at {scheme}://{address}/v1",
            app.models.base()
        );
        if self.args.no_auth && !self.args.host.is_loopback() {
            eprintln!("warning: everybody who reaches {address} can use it");
        }
        if app.config.allow_origins.any() && self.api_keys.is_empty() {
            eprintln!(
                "warning: every web page that is opened where {address} can be reached can use it; give an --api-key"
            );
        }
        let drain = Duration::from_secs(self.args.drain_seconds);
        http::serve(listener, transport, router(app.clone()), app, stop, drain).await?;
        Ok(())
    }
}

/// Ends with Ctrl-C, SIGTERM or SIGHUP; the next of them ends the process.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    #[cfg(unix)]
    let mut signals = {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        async move || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {}
            }
        }
    };
    #[cfg(not(unix))]
    let mut signals = async || {
        let _ = tokio::signal::ctrl_c().await;
    };
    Ok(async move {
        signals().await;
        tokio::spawn(async move {
            signals().await;
            eprintln!("a second signal to stop: answers are broken off");
            std::process::exit(130);
        });
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;
    use crate::{
        adapters::lora::config::AdapterError,
        batch::images::ImageInput,
        cli::{Cli, Command},
        commands::exit_code,
        runtime::generate::backend::{AdapterId, Chunk, LoadedAdapter, SlotId, StepRow, Stepped},
        serve::client::Server,
    };

    /// A device of which every call fails.
    struct Broken;

    impl DecodeBackend for Broken {
        type Features = ();

        fn encode_image(&mut self, _: AdapterId, _: &ImageInput) {
            panic!("the device is gone")
        }

        fn start(&mut self, _: AdapterId, _: usize) -> SlotId {
            SlotId(0)
        }

        fn fork(&mut self, _: SlotId, _: usize, _: usize) -> SlotId {
            SlotId(0)
        }

        fn prefill(&mut self, _: SlotId, _: &Chunk<'_, ()>) -> Option<Vec<f32>> {
            panic!("the device is gone")
        }

        fn step(&mut self, _: &[StepRow]) -> Vec<Stepped> {
            panic!("the device is gone")
        }

        fn truncate(&mut self, _: SlotId, _: usize) {}

        fn cheap_rows(&self) -> usize {
            1
        }

        fn free(&mut self, _: SlotId) {}

        fn load_adapter(&mut self, _: &Path) -> Result<LoadedAdapter, AdapterError> {
            panic!("the device is gone")
        }

        fn unload_adapter(&mut self, _: AdapterId) {}
    }

    #[test]
    fn three_failed_steps_end_the_server_with_exit_code_3() {
        // The port of a listener that is closed again is free for a while.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let typed = [
            "xray",
            "serve",
            "--device",
            "cpu",
            "--port",
            &port.to_string(),
        ]
        .join(" ");
        let Command::Serve(args) = Cli::parse_from(typed.split(' ')).command else {
            panic!("no `serve`");
        };
        let parts = TextAndImages::load(&pipeline_options(&args.model, DType::F32)).unwrap();
        let serve = Serve {
            defaults: generation_config(&args.generation).unwrap(),
            drafts: EngineDrafts::default(),
            api_keys: Vec::new(),
            args,
        };
        let ended =
            std::thread::spawn(move || serve.answer(Broken, parts, None, FindingFiles::default()));
        let server = Server::new(&format!("http://127.0.0.1:{port}"), None).unwrap();
        let body = json!({"messages": [{"role": "user", "content": "?"}]}).to_string();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            for _ in 0..500 {
                if server.call("/healthz", None).await.is_ok() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            for _ in 0..3 {
                let body = body.clone().into_bytes();
                let answer = server.call("/v1/chat/completions", Some(body)).await;
                assert_eq!(answer.unwrap().0, 500);
            }
        });
        let error = ended.join().unwrap().unwrap_err();
        assert_eq!(exit_code(&error), 3, "{error:#}");
    }

    #[test]
    fn connections_fit_the_files_that_may_be_open() {
        assert_eq!(connections_with(1 << 20, 1024), 1024);
        assert_eq!(connections_with(1024 + OTHER_FILES, 1024), 1024);
        assert_eq!(connections_with(1024, 1024), 928);
        assert_eq!(connections_with(64, 1024), 16);
        assert_eq!(connections_with(64, 4), 4);
        assert_eq!(connections_with(0, 4), 1);
    }
}
