//! `bench serve`: how a server holds up under many users.
//!
//! Users ask one after another without a pause (`--users`), or requests arrive at random moments of
//! a fixed mean rate whether or not earlier ones are answered (`--rate`): the second is how people
//! come, and shows what waiting does.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
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

use super::{UsageError, shipped};
use crate::serve::client::{EventLines, Server};

/// What is asked in turn when no --prompt is given.
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
    /// Model to ask; the server's base by default.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Users that ask one question after another.
    #[arg(long, value_name = "N", default_value_t = 8, conflicts_with = "rate")]
    pub users: usize,
    /// Mean number of requests a second, in place of users.
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
    /// Most tokens of an answer.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,
    /// Go on behind the end of an answer, so that every answer has --max-new-tokens.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Begin every question with a number of its own, so that nothing is found in the server's cache.
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
    ignore_eos: bool,
    no_cache: bool,
}

/// Runs `bench serve`.
///
/// # Errors
/// When the server cannot be reached, or answers differ under `--check`.
pub fn run(args: &BenchServeArgs) -> Result<()> {
    if args.users == 0 || args.seconds <= 0.0 || args.rate.is_some_and(|rate| rate <= 0.0) {
        bail!(UsageError(
            "--users, --rate and --seconds must be above 0".into()
        ));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(measure(args))
}

async fn measure(args: &BenchServeArgs) -> Result<()> {
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
        server: Server::new(&args.server, args.api_key.clone())?,
        args: BodyArgs {
            model: args.model.clone(),
            max_new_tokens: args.max_new_tokens,
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
    let started = Instant::now();
    match args.rate {
        Some(rate) => arrivals(&bench, rate, args).await,
        None => users(&bench, args).await,
    }
    let seconds = started.elapsed().as_secs_f64();
    let results =
        std::mem::take(&mut *bench.results.lock().unwrap_or_else(PoisonError::into_inner));
    report(args, &results, seconds, kinds, &alone)
}

async fn users(bench: &Arc<Bench>, args: &BenchServeArgs) {
    let end = Instant::now() + Duration::from_secs_f64(args.seconds);
    let tasks: Vec<_> = (0..args.users)
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
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
            "ignore_eos": self.args.ignore_eos,
        });
        if let Some(model) = &self.args.model {
            body["model"] = model.as_str().into();
        }
        body
    }

    /// Asks one question; the inner error is a response that is no answer.
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
        while let Some(frame) = body.frame().await {
            let frame = frame?;
            let Some(bytes) = frame.data_ref() else {
                continue;
            };
            for data in lines.push(bytes) {
                if data == "[DONE]" {
                    sample.total = started.elapsed().as_secs_f64();
                    return Ok(Ok(sample));
                }
                let chunk: Value = serde_json::from_str(&data)?;
                if chunk.get("error").is_some() {
                    return Ok(Err("error in the stream".into()));
                }
                let delta = &chunk["choices"][0]["delta"];
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
    let load = match args.rate {
        Some(rate) => format!("{rate} requests/s"),
        None => format!("{} users", args.users),
    };
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
