//! `merge`: a base and its adapter as one checkpoint, proven before it is called done.

use std::path::Path;

use anyhow::{Context, Result, bail};
use burn::{prelude::*, tensor::DType};

use super::{
    UsageError,
    progress::{Progress, Unit},
    shipped,
};
use crate::{
    accelerate::devices::{DeviceTask, run_on},
    adapters::{
        lora::{
            base::{BaseFingerprint, check_base},
            config::LoraConfig,
            files::{load_adapter, trained_pixel_limits},
            merge::merge,
        },
        quantised::files::of_checkpoint,
    },
    base::files::FolderWriter,
    batch::{
        images::ImageInput,
        text::{Padding, TextInput},
    },
    cli::MergeArgs,
    ops::cast::to_dtype,
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, weights::stored_dtype},
    runtime::{
        accelerator::Accelerator,
        pipeline::{PipelineOptions, load_model},
    },
    train::checkpoint::save_model,
};

/// Runs `merge`.
///
/// # Errors
/// Anything that kept the checkpoint from being written whole and proven; nothing is left then.
pub fn run(args: MergeArgs) -> Result<()> {
    if args.output.exists() {
        bail!(UsageError(format!(
            "`{}` is there already; name a new folder with --output",
            args.output.display()
        )));
    }
    let dtype = args.dtype.map(DType::from);
    run_on(args.device, dtype, Merge { args, asked: dtype })?
}

struct Merge {
    args: MergeArgs,
    asked: Option<DType>,
}

impl DeviceTask for Merge {
    type Output = Result<()>;

    fn needs_range(&self) -> bool {
        // A checkpoint in bf16 may hold what f16 cannot.
        true
    }

    fn run<B: Accelerator>(self, device: B::Device, dtype: DType) -> Result<()> {
        let options = PipelineOptions {
            model: shipped(&self.args.model),
            adapter: self.args.adapter.clone(),
            // The base is read as precisely as it can be; what is asked for is what is written.
            dtype: if self.asked.is_some() {
                DType::F32
            } else {
                dtype
            },
            quantize: None,
            min_pixels: None,
            max_pixels: None,
        };
        let options_dtype = options.dtype;
        let stored = stored_dtype(&options.model)?;
        let written = self.asked.or(stored).unwrap_or(dtype);
        let limits = match &self.args.adapter {
            Some(dir) => trained_pixel_limits(dir)?,
            None => None,
        };
        let config = Qwen3VlConfig::from_dir(&options.model)?;
        if let Some(quantization) = of_checkpoint(&options.model)? {
            bail!(
                "`{}` is quantised ({quantization}): an adapter cannot be merged into packed weights, and they are not written in another type; merge into the checkpoint it was made from, then run `quantize`",
                options.model.display()
            );
        }
        if let Some(dir) = &self.args.adapter
            && !self.args.any_base
        {
            check_base(dir, &options.model)?;
            check_name(dir, &options.model)?;
        }
        let base = read::<B>(&options, &config, &device)?;
        let adapted = match &self.args.adapter {
            Some(dir) => load_adapter(base, dir)?.0,
            None => base,
        };
        let before = probe(&adapted, &config, &device);

        // First the arithmetic, in the type it was done in; rounding to the written type comes after.
        let merged = merge(adapted);
        let in_place = distance(&before, &probe(&merged, &config, &device));
        let merged = cast(merged, written);
        let expected = probe(&merged, &config, &device);
        let parent = FolderWriter::new(&self.args.output)?;
        save_model(&merged, &config, &options.model, limits, parent.path())?;
        drop(merged);

        // What counts is what lies on the disk.
        let again = PipelineOptions {
            model: parent.path().to_path_buf(),
            adapter: None,
            dtype: written,
            ..options
        };
        let reread = read::<B>(&again, &config, &device)?;
        let answer = probe(&reread, &config, &device);
        // In f32 only the order of sums differs; a base that was read in a half type rounds every
        // merged weight once.
        let allowed = match options_dtype {
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
                distance(&expected, &answer)
            );
        }
        let distance = distance(&before, &answer);
        parent.finish()?;
        println!(
            "wrote `{}` ({written:?}); logits on the probe differ from base plus adapter by {distance:.1e} relative",
            self.args.output.display()
        );
        Ok(())
    }
}

/// For adapters that hold no fingerprint of their base: names tell two bases apart as well.
fn check_name(adapter: &Path, model: &Path) -> Result<()> {
    let last = |path: &Path| -> Option<String> {
        let name = path.file_name()?.to_string_lossy().to_lowercase();
        Some(name)
    };
    if BaseFingerprint::load(adapter)?.is_some() {
        return Ok(());
    }
    let made_for = LoraConfig::from_dir(adapter)?.base_model_name_or_path;
    let made_for = made_for.as_deref().map(Path::new).and_then(last);
    let given = model.canonicalize().ok().as_deref().and_then(last);
    match (made_for, given) {
        (Some(made_for), Some(given)) if made_for != given => bail!(
            "`{}` was made for another base model: its config names `{made_for}`, the base is `{given}`; if they are the same under two names, add --any-base",
            adapter.display()
        ),
        _ => Ok(()),
    }
}

pub(super) fn read<B: Accelerator>(
    options: &PipelineOptions,
    config: &Qwen3VlConfig,
    device: &B::Device,
) -> Result<Qwen3Vl<B>> {
    let mut progress = Progress::new("loading", 0, Unit::Bytes);
    let model = load_model::<B>(options, config, device, &mut |done, total| {
        progress.set(done, total);
    })
    .with_context(|| format!("cannot load `{}`", options.model.display()))?;
    progress.finish();
    Ok(model)
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

/// Logits for a fixed prompt with an image of smooth stripes; exercises both towers.
pub(super) fn probe<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    device: &B::Device,
) -> Vec<f32> {
    let vision = &config.vision_config;
    let merge = vision.spatial_merge_size;
    let grid = [1, 4 * merge, 3 * merge];
    let patches = grid[1] * grid[2];
    let values = patches * vision.patch_dim();
    let images = ImageInput {
        pixel_values: (0..values).map(|i| (i as f32 * 0.013).sin()).collect(),
        image_grid_thw: vec![grid],
    };
    let text = |i: usize| (i * 7919 % config.image_token_id.max(2) as usize) as u32;
    let mut ids: Vec<u32> = (0..8).map(text).collect();
    ids.extend(std::iter::repeat_n(
        config.image_token_id,
        patches / (merge * merge),
    ));
    ids.extend((8..24).map(text));
    match TextInput::padded(&[ids], &[vec![grid]], config, Padding::Right, 0) {
        Ok((input, _)) => {
            let logits = model.forward(&input, &images, config, device);
            logits.into_data().iter::<f32>().collect()
        }
        Err(_) => vec![f32::NAN],
    }
}

/// Relative Euclidean distance.
fn distance(want: &[f32], ours: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = want.iter().zip(ours).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = want.iter().map(|a| square(*a)).sum();
    if want.len() != ours.len() {
        return f64::NAN;
    }
    (difference / norm.max(f64::MIN_POSITIVE)).sqrt()
}
