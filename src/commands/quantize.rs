//! `quantize`: a checkpoint with quantised weights, which loads without the one it was made from.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use clap::Args;

use super::{
    logits::{probe, read},
    merge::tell_remarks,
    models::{DownloadArgs, find},
    pipeline_options::checkpoint_alone,
    shared_args::GgufArgs,
    shell::expect_new,
    usage::UsageError,
};
use crate::{
    accelerate::devices::{DeviceTask, run_on},
    adapters::{
        lora::base::BaseFingerprint,
        quantised::{memory::weight_bytes, save::write_quantised},
    },
    base::{
        device_name::{DeviceName, dtype_text},
        files::{FolderWriter, size_text},
        hub::Want,
    },
    ops::quantised::{Format, Quantization},
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        nn::InitOptions,
        weights::{MAX_SHARD_BYTES, parameter_shapes},
    },
    runtime::accelerator::Accelerator,
    train::checkpoint::copy_side_files,
};

/// Arguments of `quantize`.
#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// Folder or name of a checkpoint, as in `infer`, or a GGUF file. Weights that another tool quantised are dequantised
    /// first, so 16 bits lose less.
    #[arg(long, value_name = "DIR|ID|FILE.gguf", default_value = "model/tiny")]
    pub model: PathBuf,
    /// Files that go with a GGUF.
    #[command(flatten)]
    pub gguf: GgufArgs,
    /// Downloads.
    #[command(flatten)]
    pub download: DownloadArgs,
    /// Folder to write; must not exist.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// 8: half the memory, almost the same answers. 4: a quarter of the memory, answers can differ.
    #[arg(long, value_name = "N")]
    pub bits: usize,
    /// With 4 bits, number of weights per scale, 32, 64 or 128; 32 is more precise and 6 % larger [default: 64].
    #[arg(long, value_name = "N")]
    pub group: Option<usize>,
    /// With 4 bits, a zero point beside each scale: no nearer than without, 6 % larger, and slower on GPUs, whose
    /// kernels cover symmetric weights alone.
    #[arg(long)]
    pub zero_points: bool,
    /// Device used to test the result.
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceName>,
}

/// Runs `quantize`.
///
/// # Errors
/// Anything that kept the checkpoint from being written whole and read back; nothing is left then.
pub fn run(mut args: QuantizeArgs) -> Result<()> {
    expect_new(&args.output)?;
    let layers = Format::new(args.bits, args.group, args.zero_points).map_err(UsageError)?;
    let quantization = Quantization { layers };
    args.model = find(&args.model, Want::Checkpoint, args.download)?;
    let (device, task) = (args.device, Quantize { args, quantization });
    run_on(device, None, task)?
}

struct Quantize {
    args: QuantizeArgs,
    quantization: Quantization,
}

impl DeviceTask for Quantize {
    type Output = Result<()>;

    fn run<B: Accelerator>(self, device: B::Device, dtype: DType) -> Result<()> {
        let from = self.args.model.clone();
        let parts = self.args.gguf.parts();
        let config = Qwen3VlConfig::from_model(&from, &parts)?;
        tell_remarks((&from, &parts), &config)?;
        let shapes = {
            let model = Qwen3Vl::<B>::new(&config, &InitOptions::default(), &device);
            parameter_shapes(&model)
        };
        let size = |quantization| size_text(weight_bytes(&shapes, quantization, 2) as u64);
        eprintln!(
            "quantising {} of 16-bit weights to {}",
            size(None),
            self.quantization
        );
        let folder = FolderWriter::new(&self.args.output)?;
        let to = folder.path();
        write_quantised(
            (&from, &parts),
            to,
            &shapes,
            self.quantization,
            MAX_SHARD_BYTES,
        )
        .with_context(|| format!("cannot quantise `{}`", from.display()))?;
        copy_side_files(&from, &parts, to)?;
        // Adapters name the base they were trained on; they fit what was made from it.
        BaseFingerprint::of(&from, &parts)?.save(to)?;

        // Every byte has been read back; that a model comes of them is the last thing to know.
        let options = checkpoint_alone(to.to_path_buf(), dtype);
        let model = read::<B>(&options, &config, &device)?;
        if !probe(&model, &config, &device)
            .iter()
            .all(|logit| logit.is_finite())
        {
            bail!(
                "the quantised model gives NaN or infinity in {} for a test input, and was not kept; does `xray-qwen3vl infer --model {}` work?",
                dtype_text(dtype),
                from.display()
            );
        }
        drop(model);
        folder.finish()?;
        println!(
            "wrote `{}`: {}, {}",
            self.args.output.display(),
            self.quantization,
            size(Some(self.quantization))
        );
        Ok(())
    }
}
