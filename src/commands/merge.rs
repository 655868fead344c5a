//! `merge`: a base and its adapter as one checkpoint, proven before it is called done.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use burn::{prelude::*, tensor::DType};
use clap::Args;

use super::{
    logits::{probe, read, relative_distance},
    models::{DownloadArgs, find},
    shared_args::{GgufArgs, found_adapter},
    shell::expect_new,
};
use crate::{
    accelerate::devices::{DeviceTask, run_on},
    adapters::{
        lora::{
            base::{BaseFingerprint, check_base},
            config::LoraConfig,
            files::{attach_adapter, trained_pixel_limits},
            merge::merge,
        },
        quantised::files::of_checkpoint,
    },
    base::{
        device_name::{DeviceName, DtypeName},
        files::FolderWriter,
        hub::{Want, repo_of_folder},
    },
    ops::cast::to_dtype,
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        weights::{Checkpoint, gguf::GgufParts, stored_dtype},
    },
    runtime::{accelerator::Accelerator, pipeline::PipelineOptions},
    train::checkpoint::save_model,
};

/// Arguments of `merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// Folder or name of the base checkpoint, or a GGUF file, as in `infer`.
    #[arg(long, value_name = "DIR|ID|FILE.gguf", default_value = "model/tiny")]
    pub model: PathBuf,
    /// Files that go with a GGUF.
    #[command(flatten)]
    pub gguf: GgufArgs,
    /// Folder or name of a PEFT adapter, or the folder of a run, whose best checkpoint is used.
    #[arg(long, value_name = "DIR|ID")]
    pub adapter: Option<PathBuf>,
    /// Downloads.
    #[command(flatten)]
    pub download: DownloadArgs,
    /// Merge even if the adapter was trained on, or its config names, a different base model.
    #[arg(long)]
    pub any_base: bool,
    /// Folder to write; must not exist.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Dtype of the written weights; the default is that of the base.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Device used for merging.
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceName>,
}

/// Runs `merge`.
///
/// # Errors
/// Anything that kept the checkpoint from being written whole and proven; nothing is left then.
pub fn run(mut args: MergeArgs) -> Result<()> {
    expect_new(&args.output)?;
    args.model = find(&args.model, Want::Checkpoint, args.download)?;
    if let Some(adapter) = &mut args.adapter {
        *adapter = found_adapter(&find(adapter, Want::Adapter, args.download)?);
    }
    let dtype = args.dtype.map(DType::from);
    run_on(
        args.device,
        dtype,
        Merge {
            args,
            typed_dtype: dtype,
        },
    )?
}

struct Merge {
    args: MergeArgs,
    typed_dtype: Option<DType>,
}

impl DeviceTask for Merge {
    type Output = Result<()>;

    fn needs_range(&self) -> bool {
        // A checkpoint in bf16 may hold what f16 cannot.
        true
    }

    fn run<B: Accelerator>(self, device: B::Device, dtype: DType) -> Result<()> {
        // The base is read as precisely as it can be; the typed dtype is what is written.
        let read_dtype = match self.typed_dtype {
            Some(_) => DType::F32,
            None => dtype,
        };
        let options = PipelineOptions {
            adapter: self.args.adapter.clone(),
            gguf: self.args.gguf.parts(),
            ..PipelineOptions::new(self.args.model.clone(), read_dtype)
        };
        let stored = stored_dtype(&options.model, &options.gguf)?;
        let written = self.typed_dtype.or(stored).unwrap_or(dtype);
        let limits = match &self.args.adapter {
            Some(dir) => trained_pixel_limits(dir)?,
            None => None,
        };
        let mut config = Qwen3VlConfig::from_model(&options.model, &options.gguf)?;
        tell_remarks((&options.model, &options.gguf), &config)?;
        if let Some(quantization) = of_checkpoint(&options.model)? {
            bail!(
                "`{}` is quantised ({quantization}): an adapter cannot be merged into packed weights, and they are not written in another type; merge into the checkpoint it was made from, then run `quantize`",
                options.model.display()
            );
        }
        if let Some(dir) = &self.args.adapter
            && !self.args.any_base
        {
            check_base(dir, &options.model, &options.gguf)?;
            check_name(dir, &options.model)?;
        }
        let base = read::<B>(&options, &config, &device)?;
        let adapted = match &self.args.adapter {
            Some(dir) => {
                let adapted = attach_adapter(base, dir)?;
                for note in &adapted.notes {
                    println!("note: {note}");
                }
                check_biases(&adapted.model, &config, dir)?;
                adapted.model
            }
            None => base,
        };
        // An adapter may part a tied head from the embedding.
        config.tie_word_embeddings &= adapted.lm_head.is_none();
        let before = probe(&adapted, &config, &device);

        // First the arithmetic, in the type it was done in; rounding to the written type comes after.
        let merged = merge(adapted);
        let in_place = relative_distance(&probe(&merged, &config, &device), &before);
        let merged = cast(merged, written);
        let expected = probe(&merged, &config, &device);
        let parent = FolderWriter::new(&self.args.output)?;
        let base = (options.model.as_path(), &options.gguf);
        save_model(&merged, &config, base, limits, parent.path())?;
        drop(merged);

        // What counts is what is on the disk.
        let again = PipelineOptions::new(parent.path().to_path_buf(), written);
        let reread = read::<B>(&again, &config, &device)?;
        let answer = probe(&reread, &config, &device);
        // In f32 only the order of sums differs; a base that was read in a half type rounds every
        // merged weight once.
        let allowed = match read_dtype {
            DType::F32 => 1e-3,
            _ => 5e-2,
        };
        if in_place.is_nan() || in_place > allowed {
            bail!(
                "merged weights answer differently from base plus adapter: relative distance of the logits {in_place:.2e}, allowed {allowed:.0e}; nothing was written"
            );
        }
        if !expected.iter().all(|logit| logit.is_finite()) {
            bail!(
                "the merged weights do not answer with numbers in {written:?}; nothing was kept, take a `--dtype` with more room"
            );
        }
        // The same weights in the same type: not a bit may differ.
        if answer != expected {
            bail!(
                "the written checkpoint reads back differently from what was merged (relative distance of the logits {:.2e}); nothing was kept, is the disk sound?",
                relative_distance(&answer, &expected)
            );
        }
        let distance = relative_distance(&answer, &before);
        parent.finish()?;
        println!(
            "wrote `{}` ({written:?}); logits on the probe differ from base plus adapter by {distance:.1e} relative",
            self.args.output.display()
        );
        Ok(())
    }
}

/// Prints what is to know about how the base is read.
pub(super) fn tell_remarks(
    (model, parts): (&Path, &GgufParts),
    config: &Qwen3VlConfig,
) -> Result<()> {
    let checkpoint = Checkpoint::open_with(model, parts)?;
    let head = config.head_remark(model);
    for remark in checkpoint.remarks().iter().chain(&head) {
        eprintln!("{remark}");
    }
    Ok(())
}

/// For adapters that hold no fingerprint of their base: names distinguish two bases as well.
fn check_name(adapter: &Path, model: &Path) -> Result<()> {
    let last = |path: &Path| -> Option<String> {
        let name = path.file_name()?.to_string_lossy().to_lowercase();
        Some(name)
    };
    if BaseFingerprint::load(adapter)?.is_some() {
        return Ok(());
    }
    let made_for = LoraConfig::from_dir(adapter)?.base_model_name_or_path;
    let made_for = made_for.as_deref().map(Path::new).and_then(|made_for| {
        match repo_of_folder(made_for).filter(|_| made_for.is_absolute()) {
            Some(name) => last(Path::new(&name)),
            None => last(made_for),
        }
    });
    let given = match repo_of_folder(model) {
        Some(name) => last(Path::new(&name)),
        None => model.canonicalize().ok().as_deref().and_then(last),
    };
    match (made_for, given) {
        (Some(made_for), Some(given)) if made_for != given => bail!(
            "`{}` was made for another base model: its config names `{made_for}`, the base is `{given}`; if they are the same under two names, add --any-base",
            adapter.display()
        ),
        _ => Ok(()),
    }
}

/// Refuses biases that a checkpoint has no place for: `B` may have one where the layer itself has none.
fn check_biases<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    adapter: &Path,
) -> Result<()> {
    let fresh = Qwen3Vl::<B>::new(config, &Default::default(), &B::Device::default());
    let without: Vec<String> = fresh
        .linears()
        .into_iter()
        .filter(|(_, linear)| linear.bias.is_none())
        .map(|(path, _)| path)
        .chain(["lm_head".to_owned()])
        .collect();
    let found = model
        .linears()
        .into_iter()
        .find(|(path, linear)| linear.bias.is_some() && without.contains(path));
    match found {
        Some((path, _)) => bail!(
            "`{}` brings a bias (`lora_bias`) for `{path}`, which has none in a checkpoint, so that it cannot be merged, as in PEFT; use it with --adapter",
            adapter.display()
        ),
        None => Ok(()),
    }
}

fn cast<B: Accelerator>(model: Qwen3Vl<B>, dtype: DType) -> Qwen3Vl<B> {
    struct Cast(DType);
    impl<B: Backend> burn::module::ModuleMapper<B> for Cast {
        fn map_float<const D: usize>(
            &mut self,
            param: burn::module::Param<Tensor<B, D>>,
        ) -> burn::module::Param<Tensor<B, D>> {
            param.map(|tensor| to_dtype(tensor, self.0))
        }
    }
    model.map(&mut Cast(dtype))
}
