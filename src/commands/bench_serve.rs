//! `bench serve`: how a server holds up under many users.
//!
//! Users ask one after another without a pause (`--users`), or requests arrive at random moments of
//! a fixed mean rate whether or not earlier ones are answered (`--rate`): the second is how people
//! come, and shows what waiting does.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::Args;
use http_body_util::BodyExt;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};

use super::{shipped::shipped, usage::UsageError};
use crate::{
    base::device_name::DeviceName,
    runtime::synthetic::weights::RandomSize,
    serve::client::{EventLines, Server},
};

/// Prompts in turn when no --prompt is given.
const PROMPTS: [&str; 6] = [
    "通过这张胸部X光影像可以诊断出什么？",
    "这张胸片有什么异常？",
    "有胸腔积液吗？",
    "心影是否增大？",
    "有没有气胸？",
    "请写一份报告。",
];

/// Arguments of `bench serve`.
#[derive(Debug, Args)]
pub struct BenchServeArgs {
    /// Address of the server.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7860")]
    pub server: String,
    /// Key of the server.
    #[arg(long, value_name = "KEY", env = "XRAY_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Model of the requests; the server's base by default.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Start a server with a model of this size and random weights for the time of the measurement.
    #[arg(long, value_enum, value_name = "SIZE", conflicts_with_all = ["server", "api_key", "model"])]
    pub random_weights: Option<RandomSize>,
    /// Folder whose tokenizer and chat template the random model has.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "model/tiny",
        requires = "random_weights"
    )]
    pub tokenizer: PathBuf,
    /// Device of the random model.
    #[arg(long, value_name = "DEVICE", requires = "random_weights")]
    pub device: Option<DeviceName>,
    /// Users that ask one question after another; several numbers are measured one after another.
    #[arg(
        long,
        value_name = "N,N",
        value_delimiter = ',',
        default_value = "8",
        conflicts_with = "rate"
    )]
    pub users: Vec<usize>,
    /// Mean number of requests per second, instead of users.
    #[arg(long, value_name = "F")]
    pub rate: Option<f64>,
    /// How long requests are sent; those under way are waited for.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub seconds: f64,
    /// Image of the questions; may be given several times.
    #[arg(long, value_name = "IMAGE", default_value = "data/sample/demo.png")]
    pub image: Vec<PathBuf>,
    /// Question; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// Maximum number of tokens to generate per answer.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,
    /// As in `infer`; a question has its own seed.
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub temperature: f32,
    /// As in `infer`.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// As in `infer`.
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    pub top_p: f32,
    /// Continue after the end of an answer, so that every answer has --max-new-tokens.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Begin every question with a unique number, so that the server's cache is not used.
    #[arg(long, conflicts_with = "check")]
    pub no_cache: bool,
    /// Ask every question alone first and compare all answers with these.
    #[arg(long)]
    pub check: bool,
    /// Seed of the arrivals.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// One answered request.
#[derive(Debug, Clone, Default)]
struct Sample {
    text: String,
    tokens: usize,
    /// Seconds to the first text.
    first: f64,
    /// Seconds to the end.
    total: f64,
}

/// What came of all requests.
#[derive(Debug, Default)]
struct Results {
    samples: Vec<(usize, Sample)>,
    /// Responses that were no answers, by status or reason.
    refused: BTreeMap<String, usize>,
}

struct Bench {
    server: Server,
    args: BodyArgs,
    images: Vec<String>,
    prompts: Vec<String>,
    results: Mutex<Results>,
    sent: AtomicUsize,
}

struct BodyArgs {
    model: Option<String>,
    max_new_tokens: usize,
    temperature: f32,
    top_k: usize,
    top_p: f32,
    ignore_eos: bool,
    no_cache: bool,
}

/// Runs `bench serve`.
///
/// # Errors
/// When the server cannot be reached, or answers differ under `--check`.
pub fn run(args: &BenchServeArgs) -> Result<()> {
    if args.users.contains(&0) || args.seconds <= 0.0 || args.rate.is_some_and(|rate| rate <= 0.0) {
        bail!(UsageError(
            "--users, --rate and --seconds must be above 0".into()
        ));
    }
    let started = args
        .random_weights
        .map(|size| OwnServer::start(size, args))
        .transpose()?;
    let server = started.as_ref().map_or(&args.server, |own| &own.url);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(measure(args, server))
}

/// A server of our own, stopped when this is dropped.
struct OwnServer {
    process: Child,
    url: String,
}

impl OwnServer {
    fn start(size: RandomSize, args: &BenchServeArgs) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["serve", "--port", "0", "--random-weights", size.name()])
            .arg("--model")
            .arg(&args.tokenizer)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if let Some(device) = args.device {
            command.arg("--device").arg(device.to_string());
        }
        let mut process = command.spawn().context("cannot start a server")?;
        let lines = process.stderr.take().map(BufReader::new);
        let mut lines = lines.into_iter().flat_map(BufRead::lines);
        let mut last = String::new();
        while let Some(Ok(line)) = lines.next() {
            if let Some(url) = address_in(&line) {
                // The log would stop the server if nobody read it.
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(Self { process, url });
            }
            last = line;
        }
        let _ = process.wait();
        bail!("the server did not start: {last}")
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The address in the line that a server prints when it is ready.
fn address_in(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("` at ")?;
    let (url, _) = rest.split_once(',')?;
    Some(url.to_owned())
}

async fn measure(args: &BenchServeArgs, server: &str) -> Result<()> {
    let images = args
        .image
        .iter()
        .map(|path| {
            let path = shipped(path);
            let bytes = std::fs::read(&path)
                .with_context(|| format!("cannot read `{}`", path.display()))?;
            Ok(format!("data:image/png;base64,{}", STANDARD.encode(bytes)))
        })
        .collect::<Result<Vec<String>>>()?;
    let prompts = if args.prompt.is_empty() {
        PROMPTS.map(str::to_owned).to_vec()
    } else {
        args.prompt.clone()
    };
    let bench = Arc::new(Bench {
        server: Server::new(server, args.api_key.clone())?,
        args: BodyArgs {
            model: args.model.clone(),
            max_new_tokens: args.max_new_tokens,
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            ignore_eos: args.ignore_eos,
            no_cache: args.no_cache,
        },
        images,
        prompts,
        results: Mutex::default(),
        sent: AtomicUsize::new(0),
    });
    // One question shows whether the server is there, and warms it.
    let mut alone = HashMap::new();
    let kinds = bench.images.len() * bench.prompts.len();
    for kind in 0..if args.check { kinds } else { 1 } {
        let sample = match bench.ask(kind, 0).await? {
            Ok(sample) => sample,
            Err(reason) => bail!("the server refused the first question: {reason}"),
        };
        alone.insert(kind, sample.text);
    }
    let loads: Vec<Load> = match args.rate {
        Some(rate) => vec![Load::Rate(rate)],
        None => args.users.iter().copied().map(Load::Users).collect(),
    };
    for load in loads {
        let started = Instant::now();
        match load {
            Load::Rate(rate) => arrivals(&bench, rate, args).await,
            Load::Users(count) => users(&bench, count, args).await,
        }
        let seconds = started.elapsed().as_secs_f64();
        let results =
            std::mem::take(&mut *bench.results.lock().unwrap_or_else(PoisonError::into_inner));
        report(args, load, &results, seconds, kinds, &alone)?;
    }
    Ok(())
}

/// How requests arrive.
#[derive(Debug, Clone, Copy)]
enum Load {
    /// So many, one question after another each.
    Users(usize),
    /// So many questions a second.
    Rate(f64),
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Users(count) => write!(f, "{count} users"),
            Self::Rate(rate) => write!(f, "{rate} requests/s"),
        }
    }
}

async fn users(bench: &Arc<Bench>, count: usize, args: &BenchServeArgs) {
    let end = Instant::now() + Duration::from_secs_f64(args.seconds);
    let tasks: Vec<_> = (0..count)
        .map(|_| {
            let bench = bench.clone();
            tokio::spawn(async move {
                while Instant::now() < end {
                    bench.one().await;
                }
            })
        })
        .collect();
    for task in tasks {
        let _ = task.await;
    }
}

async fn arrivals(bench: &Arc<Bench>, rate: f64, args: &BenchServeArgs) {
    let mut random = SmallRng::seed_from_u64(args.seed);
    let started = Instant::now();
    let mut tasks = Vec::new();
    let mut at = 0.0;
    loop {
        // Times between independent arrivals are exponential.
        at -= (1.0 - random.random::<f64>()).ln() / rate;
        if at > args.seconds {
            break;
        }
        tokio::time::sleep_until((started + Duration::from_secs_f64(at)).into()).await;
        let bench = bench.clone();
        tasks.push(tokio::spawn(async move { bench.one().await }));
    }
    for task in tasks {
        let _ = task.await;
    }
}

impl Bench {
    async fn one(&self) {
        let number = self.sent.fetch_add(1, Ordering::Relaxed);
        let kind = number % (self.images.len() * self.prompts.len());
        let answered = self.ask(kind, number + 1).await;
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        match answered {
            Ok(Ok(sample)) => results.samples.push((kind, sample)),
            Ok(Err(reason)) => *results.refused.entry(reason).or_default() += 1,
            Err(_) => *results.refused.entry("broken".into()).or_default() += 1,
        }
    }

    fn body(&self, kind: usize, number: usize) -> Value {
        let image = &self.images[kind / self.prompts.len()];
        let prompt = &self.prompts[kind % self.prompts.len()];
        let picture = json!({"type": "image_url", "image_url": {"url": image}});
        let text = json!({"type": "text", "text": prompt});
        let content = if self.args.no_cache {
            json!([{"type": "text", "text": format!("{number}. ")}, picture, text])
        } else {
            json!([picture, text])
        };
        let mut body = json!({
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.args.max_new_tokens,
            "temperature": self.args.temperature,
            "top_k": self.args.top_k,
            "top_p": self.args.top_p,
            // The same question has the same answer alone and in company.
            "seed": kind,
            "stream": true,
            "stream_options": {"include_usage": true},
            "ignore_eos": self.args.ignore_eos,
        });
        if let Some(model) = &self.args.model {
            body["model"] = model.as_str().into();
        }
        body
    }

    /// Sends one request; the inner error is a response that is no answer.
    async fn ask(&self, kind: usize, number: usize) -> Result<Result<Sample, String>> {
        let body = serde_json::to_vec(&self.body(kind, number))?;
        let started = Instant::now();
        let mut connection = self.server.connect().await?;
        let request = self.server.request("/v1/chat/completions", Some(body))?;
        let response = connection.send(request).await?;
        let status = response.status();
        if !status.is_success() {
            return Ok(Err(status.as_u16().to_string()));
        }
        let mut body = response.into_body();
        let mut lines = EventLines::default();
        let mut sample = Sample::default();
        let mut started_at = None;
        while let Some(frame) = body.frame().await {
            let frame = frame?;
            let Some(bytes) = frame.data_ref() else {
                continue;
            };
            for data in lines.push(bytes) {
                if data == "[DONE]" {
                    sample.total = started.elapsed().as_secs_f64();
                    if sample.text.is_empty() {
                        // Nothing of the answer could be shown: random tokens, for one.
                        sample.first = started_at.unwrap_or(sample.total);
                    }
                    return Ok(Ok(sample));
                }
                let chunk: Value = serde_json::from_str(&data)?;
                if chunk.get("error").is_some() {
                    return Ok(Err("error in the stream".into()));
                }
                let delta = &chunk["choices"][0]["delta"];
                if delta.is_object() && started_at.is_none() {
                    started_at = Some(started.elapsed().as_secs_f64());
                }
                for key in ["reasoning_content", "content"] {
                    if let Some(text) = delta[key].as_str().filter(|text| !text.is_empty()) {
                        if sample.text.is_empty() {
                            sample.first = started.elapsed().as_secs_f64();
                        }
                        sample.text.push_str(text);
                    }
                }
                if let Some(tokens) = chunk["usage"]["completion_tokens"].as_u64() {
                    sample.tokens = tokens as usize;
                }
            }
        }
        Ok(Err("cut off".into()))
    }
}

/// Median, 90th and 99th percentile and the largest, in milliseconds.
fn percentiles(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let place = (share * values.len() as f64).ceil() as usize;
        let value = values.get(place.max(1) - 1).copied().unwrap_or(0.0);
        (value * 1e5).round() / 100.0
    };
    json!({"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0)})
}

fn report(
    args: &BenchServeArgs,
    load: Load,
    results: &Results,
    seconds: f64,
    kinds: usize,
    alone: &HashMap<usize, String>,
) -> Result<()> {
    let samples: Vec<&Sample> = results.samples.iter().map(|(_, sample)| sample).collect();
    let tokens: usize = samples.iter().map(|sample| sample.tokens).sum();
    let first = percentiles(samples.iter().map(|sample| sample.first).collect());
    let total = percentiles(samples.iter().map(|sample| sample.total).collect());
    let per_token = percentiles(
        samples
            .iter()
            .filter(|sample| sample.tokens > 1)
            .map(|sample| (sample.total - sample.first) / (sample.tokens - 1) as f64)
            .collect(),
    );
    let different = results
        .samples
        .iter()
        .filter(|(kind, sample)| alone.get(kind).is_some_and(|text| *text != sample.text))
        .count();
    let load = load.to_string();
    println!("{load}, {seconds:.1} s, {kinds} different questions");
    println!(
        "answered {} ({:.1}/s), refused {:?}",
        samples.len(),
        samples.len() as f64 / seconds,
        results.refused
    );
    println!("tokens   {tokens} ({:.1}/s)", tokens as f64 / seconds);
    for (name, values) in [
        ("first text", &first),
        ("per token", &per_token),
        ("whole", &total),
    ] {
        println!(
            "{name:10} p50 {} ms, p90 {} ms, p99 {} ms, max {} ms",
            values["p50"], values["p90"], values["p99"], values["max"]
        );
    }
    if args.check {
        println!("different from the same question alone: {different}");
    }
    println!(
        "{}",
        json!({
            "load": load,
            "seconds": (seconds * 100.0).round() / 100.0,
            "answered": samples.len(),
            "refused": results.refused,
            "tokens_per_second": (tokens as f64 / seconds * 10.0).round() / 10.0,
            "first_text_ms": first,
            "per_token_ms": per_token,
            "whole_ms": total,
            "different": args.check.then_some(different),
        })
    );
    if args.check && different > 0 {
        bail!("{different} answers differ from the same question alone");
    }
    if samples.is_empty() {
        bail!("nothing was answered");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=100).rev().map(|ms| f64::from(ms) / 1000.0).collect();
        let found = percentiles(values);
        assert_eq!(
            found,
            json!({"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0})
        );
        assert_eq!(percentiles(Vec::new())["max"], 0.0);
    }
}
