//! Quantises the language model's layers by what goes through them: calibration.
//!
//! Layer by layer: the inputs of each unit of linear layers are those of the model as it is quantised so
//! far, its vision tower, table and earlier layers included, so each unit also makes up for those before
//! it. Only one layer is there as floats, and the second moments of one unit. Beside it the samples go
//! through the floats and through round-to-nearest, so that what was gained is measured on samples that
//! were not calibrated on.
//!
//! Vision tower, table and head are rounded to nearest: they are kept in 8 or 16 bits.

pub mod budget;
mod layer;
mod moments;
mod report;
pub mod solve;

use std::{
    collections::{BTreeMap, HashMap},
    rc::Rc,
};

use burn::{
    module::Module,
    prelude::*,
    tensor::{DType, TensorData, activation::log_softmax},
};

pub use report::{Compared, LayerReport, MatrixReport, Measures, Report};

use super::{
    Formats,
    load::{fill, pack_tensor, replace_weights},
};
use crate::{
    batch::micro_batch::MicroBatch,
    ops::{
        Ops,
        cast::to_f32,
        quantised::{
            Format, QuantisedWeight,
            pack::{Grid, QuantisedMatrix},
        },
    },
    qwen3_vl::{
        ImageFeatures, Qwen3Vl,
        config::Qwen3VlConfig,
        key_values::KeyValueCache,
        layer::{DecoderLayer, Eager, Executor, Projection, TextContext, decoder_layer},
        nn::InitOptions,
        vision::{VisionLayout, pixel_tensor},
        weights::{Checkpoint, WeightsError, parameter_shapes},
    },
    weights::Weight,
};
use budget::{Choice, TooLarge, choose};
use layer::{Calibrating, Sequences, UNITS, on_host};
use moments::Moments;
use solve::solve;

/// Rows of logits that are measured at once.
const LOGIT_ROWS: usize = 128;

/// Why a model was not calibrated.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// Of the checkpoint.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Of the limit of size.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// Nothing to measure by.
    #[error(
        "the samples have no answers, by which the result is measured; expected rows as for training"
    )]
    NoTargets,
    /// NaN or infinity.
    #[error(
        "the {0} give NaN or infinity for the calibration samples; does `infer` work with this checkpoint?"
    )]
    NotFinite(&'static str),
}

/// Where the samples are in one of the models that are compared: the residual streams before a layer.
#[derive(Clone)]
struct Stream<B: Backend> {
    hidden: Vec<Tensor<B, 2>>,
    images: Vec<Option<ImageFeatures<B>>>,
}

/// For each target the row of the hidden state that predicts it, and its id.
type Targets = Vec<(i32, i32)>;

/// A model that is calibrated.
pub struct Calibration<B: Backend> {
    checkpoint: Rc<Checkpoint>,
    config: Qwen3VlConfig,
    formats: Formats,
    dtype: DType,
    device: B::Device,
    /// Everything but the layers of the language model: as floats, and as it is quantised.
    outside: [Qwen3Vl<B>; 2],
    contexts: Vec<TextContext<B>>,
    targets: Vec<Targets>,
    floats: Stream<B>,
    quantised: Stream<B>,
}

/// What calibration gives.
pub struct Calibrated {
    /// Formats of all matrices, those chosen under a limit included.
    pub formats: Formats,
    /// The calibrated matrices, by parameter.
    pub matrices: HashMap<String, QuantisedMatrix>,
    /// What was measured.
    pub report: Report,
}

/// Floats of a checkpoint under `prefix` for a module; parameters by their path in it.
fn read_floats<B: Ops, M: Module<B>>(
    checkpoint: &Checkpoint,
    module: M,
    prefix: &str,
    dtype: DType,
) -> Result<M, WeightsError> {
    let mut tensors = HashMap::new();
    for (path, shape) in parameter_shapes(&module) {
        let mut bytes = vec![0; shape.iter().product::<usize>() * dtype.size()];
        checkpoint.read_into(&format!("{prefix}{path}"), 0, dtype, &mut bytes)?;
        tensors.insert(path, TensorData::from_bytes_vec(bytes, shape, dtype));
    }
    Ok(fill(module, tensors))
}

/// Path of a layer of the language model.
fn layer_path(index: usize, projection: Projection) -> String {
    format!("model.language_model.layers.{index}.{}", projection.path())
}

impl<B: Ops> Calibration<B> {
    /// Loads what is outside the layers. `formats` says how the model is quantised.
    ///
    /// # Errors
    /// [`WeightsError`] names the file and the tensor.
    pub fn new(
        checkpoint: Rc<Checkpoint>,
        config: &Qwen3VlConfig,
        formats: Formats,
        dtype: DType,
        device: &B::Device,
    ) -> Result<Self, WeightsError> {
        let (mut fresh, _) = Self::fresh(config, dtype, device);
        fresh.model.language_model.layers = Vec::new();
        let floats = read_floats(&checkpoint, fresh, "", dtype)?;
        let quantised = replace_weights(floats.clone(), formats.clone(), |name, dims, format| {
            let matrix = pack_tensor(&checkpoint, name, dims, format)?;
            let [rows, width] = dims;
            Ok::<_, WeightsError>(QuantisedWeight::upload(
                matrix, rows, width, format, dtype, device,
            ))
        })?;
        let stream = || Stream {
            hidden: Vec::new(),
            images: Vec::new(),
        };
        Ok(Self {
            checkpoint,
            config: config.clone(),
            formats,
            dtype,
            device: device.clone(),
            outside: [floats, quantised],
            contexts: Vec::new(),
            targets: Vec::new(),
            floats: stream(),
            quantised: stream(),
        })
    }

    /// A model without weights, and the shapes of all its parameters.
    fn fresh(
        config: &Qwen3VlConfig,
        dtype: DType,
        device: &B::Device,
    ) -> (Qwen3Vl<B>, BTreeMap<String, Vec<usize>>) {
        let options = InitOptions {
            dtype,
            ..InitOptions::default()
        };
        let model = Qwen3Vl::new(config, &options, device);
        let shapes = parameter_shapes(&model);
        (model, shapes)
    }

    /// Adds a sample: its images go through the vision tower now, and are not needed any more.
    pub fn add(&mut self, sample: &MicroBatch) {
        let (device, sizes) = (&self.device, &self.config.vision_config);
        let begin = |outside: &Qwen3Vl<B>, stream: &mut Stream<B>| {
            let grids = &sample.images.image_grid_thw;
            let images = (!grids.is_empty()).then(|| {
                let tower = &outside.model.visual;
                let layout = VisionLayout::new(grids, sizes, device);
                let pixels = pixel_tensor(&sample.images, sizes.patch_dim(), tower.dtype(), device);
                let features = tower.forward(pixels, &layout, None);
                ImageFeatures::new(&sample.text, features, device)
            });
            let hidden = outside.embed(&sample.text, images.as_ref(), device);
            stream.hidden.push(hidden);
            stream.images.push(images);
        };
        begin(&self.outside[0], &mut self.floats);
        begin(&self.outside[1], &mut self.quantised);
        self.contexts
            .push(TextContext::new(&sample.text, &self.config, None, device));
        self.targets.push(sample.targets_with_rows());
    }

    /// Number of times that `run` reports progress.
    pub fn steps(&self, has_limit: bool) -> usize {
        let units = self.config.text_config.num_hidden_layers * UNITS.len();
        if has_limit { 2 * units } else { units }
    }

    /// Quantises all layers; the last `held_out` samples are only measured. With a limit, in bytes of all
    /// weights (floats in 16 bits), layers get int8 where that gains most. `on_step` is called after each unit of
    /// linear layers.
    ///
    /// # Errors
    /// [`CalibrateError`].
    pub fn run(
        mut self,
        held_out: usize,
        limit: Option<usize>,
        on_step: &mut dyn FnMut(),
    ) -> Result<Calibrated, CalibrateError> {
        let calibrated = self.contexts.len().saturating_sub(held_out);
        if self.targets.iter().all(Vec::is_empty) {
            return Err(CalibrateError::NoTargets);
        }
        if let Some(limit) = limit {
            let choices = self.choices(calibrated, on_step)?;
            let (_, shapes) = Self::fresh(&self.config, self.dtype, &self.device);
            self.formats = choose(self.formats.clone(), &choices, &shapes, limit, 2)?;
        }
        let mut floats = self.floats.clone();
        let mut nearest = self.quantised.clone();
        let mut ours = self.quantised.clone();
        let mut matrices = HashMap::new();
        let (mut reports, mut layers) = (Vec::new(), Vec::new());
        let (fresh, _) = Self::fresh(&self.config, self.dtype, &self.device);
        for (index, lazy) in fresh.model.language_model.layers.into_iter().enumerate() {
            let prefix = format!("model.language_model.layers.{index}.");
            let layer = read_floats(&self.checkpoint, lazy, &prefix, self.dtype)?;
            self.pass(&layer, index, &mut floats);
            let mut rounded = layer.clone();
            for projection in Projection::ALL {
                if let Some((name, dims, format)) = self.matrix(&rounded, index, projection) {
                    let matrix = pack_tensor(&self.checkpoint, &name, dims, format)?;
                    self.replace(&mut rounded, projection, matrix, dims, format);
                }
            }
            self.pass(&rounded, index, &mut nearest);

            let sequences = Sequences {
                contexts: &self.contexts,
                images: &ours.images,
                calibrated,
            };
            let mut problem = None;
            let mut on_inputs =
                |unit: &'static [Projection], layer: &mut DecoderLayer<B>, moments| {
                    if problem.is_none() {
                        let solved = self.unit(index, unit, layer, moments, &mut matrices);
                        match solved {
                            Ok(new) => reports.extend(new),
                            Err(error) => problem = Some(error),
                        }
                        on_step();
                    }
                };
            let mut run = Calibrating::new(&sequences, layer, &mut on_inputs);
            let hidden = decoder_layer(&mut run, std::mem::take(&mut ours.hidden));
            ours.hidden = run.add_deepstack(index, hidden);
            if let Some(problem) = problem {
                return Err(problem);
            }
            let from = if held_out > 0 { calibrated } else { 0 };
            layers.push(LayerReport {
                layer: index,
                round_to_nearest: distance(&nearest.hidden[from..], &floats.hidden[from..]),
                calibrated: distance(&ours.hidden[from..], &floats.hidden[from..]),
            });
        }
        let report = self.measure(
            calibrated,
            [&floats, &nearest, &ours].map(|stream| stream.hidden.as_slice()),
            reports,
            layers,
        )?;
        Ok(Calibrated {
            formats: self.formats,
            matrices,
            report,
        })
    }

    /// Name, shape and format of a linear layer's matrix, where it has a format.
    fn matrix(
        &self,
        layer: &DecoderLayer<B>,
        index: usize,
        projection: Projection,
    ) -> Option<(String, [usize; 2], Format)> {
        let name = format!("{}.weight", layer_path(index, projection));
        let dims = layer.projection(projection).weight.lazy_shape().dims();
        let format = self.formats.of(&name)?;
        Some((name, dims, format))
    }

    fn replace(
        &self,
        layer: &mut DecoderLayer<B>,
        projection: Projection,
        matrix: QuantisedMatrix,
        [rows, width]: [usize; 2],
        format: Format,
    ) {
        let (dtype, device) = (self.dtype, &self.device);
        let weight = QuantisedWeight::upload(matrix, rows, width, format, dtype, device);
        for (of, linear) in Projection::ALL.into_iter().zip(layer.projections_mut()) {
            if of == projection {
                linear.weight = Weight::Packed(weight.clone());
            }
        }
    }

    /// All samples through a layer.
    fn pass(&self, layer: &DecoderLayer<B>, index: usize, stream: &mut Stream<B>) {
        for (sample, hidden) in stream.hidden.iter_mut().enumerate() {
            let layers = std::slice::from_ref(layer);
            let cache: Option<&mut KeyValueCache<B>> = None;
            let mut run = Eager::new(layers, &self.contexts[sample], None, cache);
            let out = decoder_layer(&mut run, hidden.clone());
            *hidden = match &stream.images[sample] {
                Some(images) => images.add_deepstack(index, out),
                None => out,
            };
        }
    }

    /// A matrix of the checkpoint as f32.
    fn values(&self, name: &str, [rows, width]: [usize; 2]) -> Result<Vec<f32>, WeightsError> {
        let mut values = vec![0f32; rows * width];
        let bytes = bytemuck::cast_slice_mut(&mut values);
        self.checkpoint.read_into(name, 0, DType::F32, bytes)?;
        Ok(values)
    }

    /// Quantises linear layers that share an input.
    fn unit(
        &self,
        index: usize,
        unit: &[Projection],
        layer: &mut DecoderLayer<B>,
        moments: Tensor<B, 2>,
        matrices: &mut HashMap<String, QuantisedMatrix>,
    ) -> Result<Vec<MatrixReport>, CalibrateError> {
        let width = moments.dims()[0];
        let moments = on_host(moments);
        if moments.iter().any(|value| !value.is_finite()) {
            return Err(CalibrateError::NotFinite("quantised layers"));
        }
        let moments = Moments::new(moments, width);
        let mut reports = Vec::new();
        for projection in unit {
            let Some((name, dims, format)) = self.matrix(layer, index, *projection) else {
                continue;
            };
            // Numbers that another tool chose, by calibration too, stay.
            let kept = self.checkpoint.kept(&name, dims, format)?;
            let matrix = match kept {
                Some(matrix) => matrix,
                None => {
                    let solved = solve(&self.values(&name, dims)?, &moments, format);
                    let relative = |error: f64| (error / solved.size.max(f64::MIN_POSITIVE)).sqrt();
                    reports.push(MatrixReport {
                        layer: layer_path(index, *projection),
                        format: format.spelling(),
                        round_to_nearest: relative(solved.nearest_error),
                        calibrated: relative(solved.error),
                    });
                    solved.matrix
                }
            };
            self.replace(layer, *projection, matrix.clone(), dims, format);
            matrices.insert(name, matrix);
        }
        Ok(reports)
    }

    /// What each unit would lose by its format and by int8, with the inputs of the floats, taken as going
    /// with nothing.
    fn choices(
        &self,
        calibrated: usize,
        on_step: &mut dyn FnMut(),
    ) -> Result<Vec<Choice>, CalibrateError> {
        let mut stream = self.floats.clone();
        let mut choices = Vec::new();
        let (fresh, _) = Self::fresh(&self.config, self.dtype, &self.device);
        for (index, lazy) in fresh.model.language_model.layers.into_iter().enumerate() {
            let prefix = format!("model.language_model.layers.{index}.");
            let layer = read_floats(&self.checkpoint, lazy, &prefix, self.dtype)?;
            let sequences = Sequences {
                contexts: &self.contexts,
                images: &stream.images,
                calibrated,
            };
            let mut problem = None;
            let mut on_inputs = |unit: &'static [Projection],
                                 layer: &mut DecoderLayer<B>,
                                 moments: Tensor<B, 2>| {
                let width = moments.dims()[0];
                let moments = on_host(moments);
                let own: Vec<f32> = (0..width).map(|at| moments[at * width + at]).collect();
                match self.choice(index, unit, layer, &own) {
                    Ok(choice) => choices.push(choice),
                    Err(error) => {
                        problem.get_or_insert(error);
                    }
                }
                on_step();
            };
            let mut run = Calibrating::new(&sequences, layer, &mut on_inputs);
            let hidden = decoder_layer(&mut run, std::mem::take(&mut stream.hidden));
            stream.hidden = run.add_deepstack(index, hidden);
            if let Some(problem) = problem {
                return Err(problem.into());
            }
        }
        Ok(choices)
    }

    fn choice(
        &self,
        index: usize,
        unit: &[Projection],
        layer: &DecoderLayer<B>,
        moments: &[f32],
    ) -> Result<Choice, WeightsError> {
        let mut choice = Choice {
            layers: Vec::new(),
            small: 0.0,
            int8: 0.0,
        };
        let (mut size, mut errors) = (0.0, [0.0; 2]);
        for projection in unit {
            let Some((name, dims, format)) = self.matrix(layer, index, *projection) else {
                continue;
            };
            choice.layers.push(layer_path(index, *projection));
            let values = self.values(&name, dims)?;
            for (error, format) in errors.iter_mut().zip([format, Format::Int8]) {
                *error += rounding_error(&values, moments, format);
            }
            let square = |(at, value): (usize, &f32)| {
                f64::from(moments[at % moments.len()]) * f64::from(value * value)
            };
            size += values.iter().enumerate().map(square).sum::<f64>();
        }
        let size = size.max(f64::MIN_POSITIVE);
        (choice.small, choice.int8) = (errors[0] / size, errors[1] / size);
        Ok(choice)
    }

    /// Perplexity and likeliest tokens of the three models, and the report.
    fn measure(
        &self,
        calibrated: usize,
        streams: [&[Tensor<B, 2>]; 3],
        matrices: Vec<MatrixReport>,
        layers: Vec<LayerReport>,
    ) -> Result<Report, CalibrateError> {
        let outside = [&self.outside[0], &self.outside[1], &self.outside[1]];
        let names = ["floats", "weights rounded to nearest", "calibrated weights"];
        let mut found: [Vec<Vec<(f64, i64, i64)>>; 3] = Default::default();
        for ((outside, stream), (name, found)) in
            (outside.into_iter().zip(streams)).zip(names.into_iter().zip(&mut found))
        {
            for (hidden, targets) in stream.iter().zip(&self.targets) {
                let of_sample = self.predictions(outside, hidden, targets);
                if of_sample.iter().any(|(loss, ..)| !loss.is_finite()) {
                    return Err(CalibrateError::NotFinite(name));
                }
                found.push(of_sample);
            }
        }
        let range = |from: usize, to: usize| {
            let [floats, nearest, ours] = found
                .each_ref()
                .map(|samples| samples[from..to].iter().flatten().collect::<Vec<_>>());
            let measures = |of: &[&(f64, i64, i64)]| Measures::new(of, &floats);
            (!floats.is_empty()).then(|| Compared {
                targets: floats.len(),
                floats: measures(&floats),
                round_to_nearest: measures(&nearest),
                calibrated: measures(&ours),
            })
        };
        Ok(Report {
            formats: self.formats.to_string(),
            calibration_samples: calibrated,
            held_out_samples: self.contexts.len() - calibrated,
            calibration: range(0, calibrated),
            held_out: range(calibrated, self.contexts.len()),
            layers,
            matrices,
        })
    }

    /// For each target its loss, the likeliest token, and itself.
    fn predictions(
        &self,
        outside: &Qwen3Vl<B>,
        hidden: &Tensor<B, 2>,
        targets: &Targets,
    ) -> Vec<(f64, i64, i64)> {
        let mut found = Vec::with_capacity(targets.len());
        for piece in targets.chunks(LOGIT_ROWS) {
            let rows: Vec<i32> = piece.iter().map(|(row, _)| *row).collect();
            let ids: Vec<i32> = piece.iter().map(|(_, id)| *id).collect();
            let rows = Tensor::from_ints(rows.as_slice(), &self.device);
            let logits = outside.logits(outside.norm(hidden.clone().select(0, rows)));
            let ids = Tensor::<B, 1, Int>::from_ints(ids.as_slice(), &self.device);
            let losses = log_softmax(logits.clone(), 1).gather(1, ids.unsqueeze_dim(1));
            let likeliest = logits.argmax(1).into_data();
            let all = on_host(losses).into_iter().zip(likeliest.iter::<i64>());
            for ((loss, likeliest), (_, id)) in all.zip(piece) {
                found.push((-f64::from(loss), likeliest, i64::from(*id)));
            }
        }
        found
    }
}

/// `Σ moment · error²` of a matrix that is rounded to nearest.
fn rounding_error(values: &[f32], moments: &[f32], format: Format) -> f64 {
    let width = moments.len();
    let group = format.group(width);
    let mut error = 0.0;
    for row in values.chunks(width) {
        for (values, moments) in row.chunks(group).zip(moments.chunks(group)) {
            let grid = Grid::of(values, format);
            for (value, moment) in values.iter().zip(moments) {
                let off = grid.nearest(*value) - value;
                error += f64::from(*moment) * f64::from(off * off);
            }
        }
    }
    error
}

/// Euclidean norm of the differences over that of `want`.
fn distance<B: Ops>(ours: &[Tensor<B, 2>], want: &[Tensor<B, 2>]) -> f64 {
    let (mut off, mut size) = (0.0, 0.0);
    let square = |x: Tensor<B, 2>| on_host((x.clone() * x).sum())[0];
    for (ours, want) in ours.iter().zip(want) {
        let [ours, want] = [ours, want].map(|x| to_f32(x.clone()));
        off += f64::from(square(ours - want.clone()));
        size += f64::from(square(want));
    }
    (off / size.max(f64::MIN_POSITIVE)).sqrt()
}
