//! `serve`: one process that many people use.

mod args;
mod exchange;
mod listen;
mod studies;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Result, bail};
use burn::tensor::DType;

use super::{
    drafts::drafting,
    pipeline_options::pipeline_options,
    progress::{Progress, Unit, prepare_kernels},
    shared_args::{found_adapter, generation_config, one_device},
    usage::UsageError,
};
use crate::{
    accelerate::devices::{DeviceTask, run_on},
    adapters::lora::base::check_base,
    base::{
        hub::{Want, name::expand_home, repo_of_folder},
        system::share_one_heap,
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
        App,
        auth::ApiKey,
        engine::{End, Engine, EngineDrafts, EngineLimits},
        finding_basis::FindingFiles,
        metrics::Metrics,
        models::Models,
    },
};

use args::{api_keys, check, found_loras, loras};
use studies::studies;

pub use args::ServeArgs;

/// Tokens of a cache that let some requests run at once: with less memory the weights are quantised instead.
const LEAST_CACHE_TOKENS: usize = 8192;

/// What the exit codes of `serve` mean, for its help.
pub const EXIT_CODES: &str = "Exit codes: 0 stopped by a signal, 1 could not start or serve, 2 wrong arguments, 3 the device \
                  failed three times in a row, 130 stopped at once by a second signal.";

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
        prepare_kernels::<B>(&parts.config, (dtype, model.quantization()), &device, 0);
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
        // A store that cannot be used ends the start before anything is served.
        let studies = studies(&self.args)?;
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
        let mut app = App::new(engine, parts, models, metrics, config);
        if let Some(studies) = studies {
            app = app.with_studies(studies);
        }
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
            args: *args,
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
}
