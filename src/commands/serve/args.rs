//! The arguments of `serve`, checked before a model is loaded.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::exchange::ExchangeArgs;
use crate::{
    base::hub::Want,
    commands::{
        models::find,
        shared_args::{GenerationArgs, ModelArgs},
        usage::UsageError,
    },
    runtime::synthetic::weights::RandomSize,
    serve::{
        auth::{ApiKey, KeyError},
        cors::AllowedOrigins,
        models::{MAX_ADAPTERS, check_name},
    },
};

/// The environment's name for `--api-key`.
const API_KEY: &str = "XRAY_API_KEY";

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
    /// Answers do not change, but their speed reveals to a client whether similar text was generated before.
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
    /// Folder in which studies and reports are kept; switches the worklist on. Everybody then needs an account: `store
    /// key add` makes one. Without it nothing outlives a request.
    #[arg(long, value_name = "FOLDER", env = "XRAY_STORE")]
    pub store: Option<PathBuf>,
    /// File with the key that a store is encrypted with; XRAY_STORE_KEY may have the key itself. A store that is
    /// begun with a key is encrypted, one that is begun without is not.
    #[arg(long, value_name = "FILE", requires = "store")]
    pub store_key_file: Option<PathBuf>,
    /// Header in which a --trusted-proxy names the account of whoever it let in.
    #[arg(
        long,
        value_name = "HEADER",
        requires = "store",
        requires = "trusted_proxy"
    )]
    pub user_header: Option<String>,
    /// Prompt of the drafts of reports [default: 通过这张胸部X光影像可以诊断出什么？].
    #[arg(long, value_name = "TEXT", requires = "store")]
    pub draft_prompt: Option<String>,
    /// Write drafts without probabilities of findings; the worklist has no order of urgency then.
    #[arg(long, requires = "store")]
    pub no_draft_findings: bool,
    /// Remove signed studies that have not changed for so many days.
    #[arg(long, value_name = "DAYS", requires = "store")]
    pub keep_days: Option<u32>,
    /// Fetch images from public http(s):// addresses.
    #[arg(long)]
    pub allow_image_urls: bool,
    /// Serve a model of this size with random weights, for measurements, with the tokenizer of `--model`.
    #[arg(long, value_enum, value_name = "SIZE", conflicts_with_all = ["adapter", "lora", "adapter_dir"])]
    pub random_weights: Option<RandomSize>,
    /// Model and device.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Studies in, reports out.
    #[command(flatten)]
    pub exchange: ExchangeArgs,
    /// Defaults of requests.
    #[command(flatten)]
    pub generation: GenerationArgs,
}

/// Checks the arguments before a model is loaded.
pub(super) fn check(args: &ServeArgs) -> Result<()> {
    let wrong = |text: String| -> Result<()> { bail!(UsageError(text)) };
    let count = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    // The accounts of a store let nobody else in.
    let open = args.api_key.is_empty() && args.store.is_none();
    if !args.host.is_loopback() && open && !args.no_auth {
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
    args.exchange.check(args.store.is_some())?;
    loras(args)?;
    #[cfg(not(feature = "tls"))]
    if args.tls_cert.is_some() {
        bail!("this program was built without `tls`; build it with `--features tls`");
    }
    Ok(())
}

/// The keys, of the command line or the environment.
pub(super) fn api_keys(args: &ServeArgs) -> Result<Vec<ApiKey>> {
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

pub(super) fn loras(args: &ServeArgs) -> Result<Vec<(&str, &Path)>> {
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
pub(super) fn found_loras(args: &ServeArgs) -> Result<Vec<String>> {
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
