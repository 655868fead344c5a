//! `quantize`: a checkpoint with quantised weights, which loads without the one it was made from.

mod calibrate;

use std::{io::Write, path::PathBuf, rc::Rc};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use clap::Args;

use super::{
    logits::{probe, read},
    merge::tell_remarks,
    models::{DownloadArgs, find},
    shared_args::GgufArgs,
    shell::expect_new,
    usage::UsageError,
};
use crate::{
    accelerate::devices::{DeviceTask, run_on},
    adapters::{
        lora::base::BaseFingerprint,
        quantised::{
            Formats,
            load::pack_tensor,
            memory::bytes_in_formats,
            save::{MatrixSource, open_floats, write_matrices},
        },
    },
    base::{
        device_name::{DeviceName, dtype_text},
        files::{FolderWriter, size_text, write_atomic},
        hub::Want,
    },
    ops::quantised::{Format, Quantization},
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        nn::InitOptions,
        weights::{MAX_SHARD_BYTES, parameter_shapes},
    },
    runtime::{accelerator::Accelerator, pipeline::PipelineOptions},
    train::checkpoint::copy_side_files,
};

pub use calibrate::CalibrateArgs;

/// What calibration found, beside the weights.
const REPORT_FILE: &str = "quantization.json";

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
    /// Bits of the vision tower's layers, 16, 8 or 4: by default 8 with --calibrate, else as --bits.
    #[arg(long, value_name = "N")]
    pub vision_bits: Option<usize>,
    /// Calibration.
    #[command(flatten)]
    pub calibrate: CalibrateArgs,
    /// Device used to calibrate, and to test the result.
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
    let vision = match (args.vision_bits, &args.calibrate.calibrate) {
        (Some(16), _) => None,
        (Some(8), _) | (None, Some(_)) => Some(Format::Int8),
        (Some(4), _) if args.bits == 4 => Some(layers),
        (None, None) => Some(layers),
        (Some(bits), _) => {
            let reason = format!("--vision-bits {bits}: expected 16 or 8, or 4 with --bits 4");
            return Err(UsageError(reason).into());
        }
    };
    let (device, task) = (
        args.device,
        Quantize {
            args,
            quantization,
            vision,
        },
    );
    run_on(device, None, task)?
}

struct Quantize {
    args: QuantizeArgs,
    quantization: Quantization,
    /// Format of the vision tower's layers.
    vision: Option<Format>,
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
        let mut formats = Formats::from(self.quantization);
        for path in shapes.keys() {
            let layer = path.strip_suffix(".weight").unwrap_or(path);
            if layer.starts_with("model.visual.") && formats.of(path).is_some() {
                formats.set(layer, self.vision);
            }
        }
        let size = |formats: &Formats| size_text(bytes_in_formats(&shapes, formats, 2) as u64);
        eprintln!(
            "quantising {} of 16-bit weights to {formats}",
            size(&Formats::default())
        );
        let checkpoint = Rc::new(open_floats(&from, &parts)?);
        let mut calibrated = match &self.args.calibrate.calibrate {
            Some(data) => Some(calibrate::calibrate::<B>(
                &self.args.calibrate,
                data,
                (&from, &checkpoint),
                &config,
                formats.clone(),
                (&device, dtype),
            )?),
            None => None,
        };
        let report = calibrated.as_ref().map(|found| found.report.clone());
        let mut matrices = std::collections::HashMap::new();
        if let Some(found) = &mut calibrated {
            formats = found.formats.clone();
            matrices = std::mem::take(&mut found.matrices);
        }
        let folder = FolderWriter::new(&self.args.output)?;
        let to = folder.path();
        let source: MatrixSource = {
            let checkpoint = checkpoint.clone();
            Rc::new(move |path, dims, format| match matrices.get(path) {
                Some(matrix) => Ok(matrix.clone()),
                None => pack_tensor(&checkpoint, path, dims, format),
            })
        };
        write_matrices(
            (&checkpoint, &parts),
            to,
            &shapes,
            &formats,
            &source,
            MAX_SHARD_BYTES,
        )
        .with_context(|| format!("cannot quantise `{}`", from.display()))?;
        if let Some(report) = &report {
            write_atomic(&to.join(REPORT_FILE), |out: &mut dyn Write| {
                serde_json::to_writer_pretty(&mut *out, report)?;
                out.write_all(b"\n")
            })?;
        }
        copy_side_files(&from, &parts, to)?;
        // Adapters name the base they were trained on; they fit what was made from it.
        BaseFingerprint::of(&from, &parts)?.save(to)?;

        // Every byte has been read back; that a model comes of them is the last thing to know.
        let options = PipelineOptions::new(to.to_path_buf(), dtype);
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
            "wrote `{}`: {formats}, {}",
            self.args.output.display(),
            size(&formats)
        );
        for line in report.iter().flat_map(|report| report.lines()) {
            println!("{line}");
        }
        Ok(())
    }
}
