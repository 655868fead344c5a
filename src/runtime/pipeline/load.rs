//! The weights of a checkpoint on one device or several, and what fits into a memory.

use super::{
    error::PipelineError,
    options::{PipelineOptions, Room},
    parts::TextAndImages,
};
use crate::{
    adapters::quantised::{
        Formats,
        files::formats_of,
        load::{kept_formats, load_packed, quantise},
        memory::bytes_in_formats,
    },
    base::device_name::DeviceKind,
    ops::{
        compact,
        memory::free_memory,
        quantised::{Format, Packing, Quantization},
    },
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        nn::InitOptions,
        weights::{Checkpoint, LoadProgress, WeightsError, load_opened, parameter_shapes},
    },
    runtime::{
        accelerator::Accelerator,
        fit::{CacheWish, Fit, InferenceMemory},
        generate::PREFILL_TOKENS,
    },
};

/// What fits into [`PipelineOptions::memory`] on the fullest of some devices; `None` where there is no limit.
///
/// # Errors
/// [`PipelineError::TooSmall`], [`PipelineError::Budget`].
pub fn fit_memory<B: Accelerator>(
    options: &PipelineOptions,
    parts: &TextAndImages,
    devices: &[B::Device],
) -> Result<Option<Fit>, PipelineError> {
    let (Some(limit), Some(device)) = (&options.memory, devices.first()) else {
        return Ok(None);
    };
    let free = devices.iter().map(free_memory::<B>).min().flatten();
    let gib = limit.budget.gib(free).map_err(PipelineError::Budget)?;
    // On the host all copies share one memory.
    let copies = if B::KIND == DeviceKind::Cpu {
        devices.len()
    } else {
        1
    };
    let budget = (gib / copies as f64 * (1u64 << 30) as f64) as u64;
    let init = InitOptions {
        dtype: options.dtype,
        ..InitOptions::default()
    };
    let shapes = parameter_shapes(&Qwen3Vl::<B>::new(&parts.config, &init, device));
    let memory = InferenceMemory::new(&parts.config, shapes, options.dtype.size(), B::KIND);
    let packed = match (formats_of(&options.model)?, options.quantize) {
        (Some(formats), _) => Some(formats),
        (None, Some(Packing::Keep)) => {
            let checkpoint = Checkpoint::open_with(&options.model, &options.gguf)?;
            Some(kept_formats(&checkpoint))
        }
        (None, _) => None,
    };
    let quantised = [Format::Int8, Format::Int4 { group: 64 }];
    let every = quantised.map(|layers| Some(Quantization { layers }));
    let (memory, allowed) = match (packed, options.quantize) {
        (Some(formats), _) => (memory.with_packed_weights(&formats), vec![None]),
        (None, Some(Packing::To(typed))) => (memory, vec![Some(typed)]),
        (None, _) => (memory, [None].into_iter().chain(every).collect()),
    };
    let images = parts.images.config();
    let patches = images.max_pixels / images.patch_size.pow(2);
    let (tokens, least, at_once) = match limit.room {
        Room::Shared {
            tokens,
            least,
            at_once,
        } => (tokens, least, at_once),
        Room::Answers {
            rows,
            images: count,
            text,
        } => {
            let row = count * patches / images.merge_size.pow(2) + text;
            (rows * row, row, PREFILL_TOKENS.min(rows * row))
        }
    };
    let wish = CacheWish {
        tokens,
        least,
        format: limit.kv_cache,
        at_once,
        patches,
    };
    Ok(Some(memory.choose(budget, &allowed, &wish)?))
}

/// Loads the weights of a checkpoint, adapter aside.
///
/// # Errors
/// [`PipelineError::Weights`], [`PipelineError::Memory`].
pub fn load_model<B: Accelerator>(
    options: &PipelineOptions,
    config: &Qwen3VlConfig,
    device: &B::Device,
    on_progress: LoadProgress<'_>,
) -> Result<Qwen3Vl<B>, PipelineError> {
    let mut models = load_models(options, config, std::slice::from_ref(device), on_progress)?;
    Ok(models.remove(0))
}

/// [`load_model`] on each of some devices: the files are read once.
///
/// # Errors
/// [`PipelineError::Weights`], [`PipelineError::Memory`].
pub fn load_models<B: Accelerator>(
    options: &PipelineOptions,
    config: &Qwen3VlConfig,
    devices: &[B::Device],
    on_progress: LoadProgress<'_>,
) -> Result<Vec<Qwen3Vl<B>>, PipelineError> {
    let init = InitOptions {
        dtype: options.dtype,
        ..InitOptions::default()
    };
    let on_disk = formats_of(&options.model)?;
    // Of files that this program quantised all is kept in any case.
    let wanted = options
        .quantize
        .filter(|wanted| on_disk.is_none() || *wanted != Packing::Keep);
    let checkpoint = match (&on_disk, wanted) {
        (None, Some(_)) => Some(Checkpoint::open_with(&options.model, &options.gguf)?),
        _ => None,
    };
    let formats = match (&on_disk, wanted, &checkpoint) {
        (Some(formats), ..) => Some(formats.clone()),
        (None, Some(Packing::To(quantization)), _) => Some(quantization.into()),
        (None, Some(Packing::Keep), Some(checkpoint)) => Some(kept_formats(checkpoint)),
        _ => None,
    };
    let mut models: Vec<Qwen3Vl<B>> = devices
        .iter()
        .map(|device| Qwen3Vl::new(config, &init, device))
        .collect();
    if let Some(model) = models.first()
        && B::KIND == DeviceKind::Cpu
    {
        let copies = models.len();
        check_host_memory(options, model, formats.as_ref(), copies)?;
    }
    if let Some(formats) = formats {
        if let (Some(Packing::To(wanted)), Some(_)) = (wanted, &on_disk)
            && formats != Formats::from(wanted)
        {
            return Err(PipelineError::Weights(WeightsError::Quantization {
                path: options.model.clone(),
                reason: format!(
                    "the weights are packed as {formats} already; leave out --quantize, or take the checkpoint they were made from"
                ),
            }));
        }
        let dtype = options.dtype;
        for model in &mut models {
            let (fresh, tell) = (model.clone(), &mut *on_progress);
            let formats = formats.clone();
            *model = match &checkpoint {
                Some(checkpoint) => quantise(fresh, checkpoint, formats, dtype, tell)?,
                None => load_packed(fresh, &options.model, formats, dtype, tell)?,
            };
        }
        let arranged = models.into_iter().map(|model| B::arrange(model, config));
        return Ok(arranged.collect());
    }
    let checkpoint = Checkpoint::open_with(&options.model, &options.gguf)?;
    load_opened(&mut models, &checkpoint, options.dtype, on_progress)?;
    Ok(models.into_iter().map(compact).collect())
}

/// The process ends when the CPU's memory runs out, so free memory is checked before.
fn check_host_memory<B: Accelerator>(
    options: &PipelineOptions,
    model: &Qwen3Vl<B>,
    formats: Option<&Formats>,
    copies: usize,
) -> Result<(), PipelineError> {
    const GIB: f64 = (1u64 << 30) as f64;
    // What is wrong with the files is said before what they need.
    Checkpoint::open_with(&options.model, &options.gguf)?;
    let dtype = options.dtype;
    let shapes = parameter_shapes(model);
    let floats = Formats::default();
    let bytes = bytes_in_formats(&shapes, formats.unwrap_or(&floats), dtype.size());
    let need = (bytes * copies) as f64 / GIB;
    match crate::base::system::available_memory() {
        Some(free) if need > free as f64 / GIB => Err(PipelineError::Memory {
            need,
            free: free as f64 / GIB,
            dtype,
        }),
        _ => Ok(()),
    }
}
