//! Data-parallel training: each device computes the gradients of its share, an all-reduce sums them, all
//! take the same step.
//!
//! The gradients of all trained parameters are summed together, in f32. Where the backend can (NCCL on
//! CUDA) the devices do it among themselves; elsewhere the first one sums the gradients of the others.
//! Every device then clips and steps by itself, from the same sums with the same optimizer state, so that
//! no weights need to be sent; that they stay the same, bit for bit, is checked at every checkpoint and
//! validation. Validation batches are divided among the devices as well.

use std::{
    hash::{DefaultHasher, Hasher},
    sync::Arc,
    time::Duration,
};

use burn::{
    module::{AutodiffModule, Module, ModuleVisitor, Param},
    optim::{GradientsParams, Optimizer},
    prelude::*,
    tensor::{DType, backend::AutodiffBackend},
    train::{InferenceStep, TrainStep},
};

use super::{
    gradients::LossTotals,
    learner::{StepReading, Trainee},
    objective::sums::ObjectiveSums,
    optimizer::AdamW,
    ranks::{RankError, Ranks},
    strategy::{GenerateBatch, Generated, GenerationScorer},
};
use crate::{
    adapters::lora::merge::merge_unless_quantised,
    batch::window::Window,
    ops::{AllReduce, DeviceMemory, DeviceOps, cast::to_f32},
    runtime::accelerator::TrainAccelerator,
};

type Flat<B> = Tensor<<B as AutodiffBackend>::InnerBackend, 1>;
type Adder<B> = Arc<dyn AllReduce<<B as AutodiffBackend>::InnerBackend>>;

/// What a rank is to do; in each step in this order.
enum Job<B: TrainAccelerator> {
    /// Take a copy of the model and of the optimizer.
    Load(Box<(Trainee<B>, AdamW<B>)>),
    /// All-reduce of one number: a failure to communicate shows before the first step.
    Meet,
    /// Compute the gradients of a part, or of the one that was sent ahead with the last; the first rank
    /// gets the Learner's model with it. The part of the next step comes along where it is known.
    Learn(
        Option<Box<Trainee<B>>>,
        Option<Box<Window>>,
        Option<Box<Window>>,
    ),
    /// Return the gradients of the parameters that have one anywhere, summed (all-reduce) if the backend can.
    Reduce(Arc<Vec<bool>>),
    /// Clip and step with the sums: those given, or those the rank has of the last [`Job::Reduce`].
    Step(Option<Vec<Flat<B>>>, f64),
    /// Compute the loss of a validation batch; the first rank gets the Learner's model with it.
    Evaluate(Option<Box<Trainee<B>>>, Box<Window>),
    /// Generate reports of some batches; the first rank gets the Learner's model with it.
    Generate(
        Option<Box<Trainee<B>>>,
        Arc<GenerateBatch<B::InnerBackend>>,
        Vec<usize>,
    ),
    /// Hash the weights, to compare them between ranks; the first rank gets the Learner's model with it.
    Digest(Option<Box<Trainee<B>>>),
}

enum Answer<B: TrainAccelerator> {
    Done,
    Learnt(Learnt),
    Gradients(Vec<Flat<B>>),
    Totals(LossTotals),
    Generated(Vec<Vec<Generated>>),
    Digests(Vec<u64>),
}

/// What a rank reports of its part before gradients are summed.
#[derive(Debug, Clone)]
pub struct Learnt {
    /// Loss sums.
    pub totals: LossTotals,
    /// Share of the loss that is minimised.
    pub objective: f64,
    /// What an objective over sequences came to.
    pub sequences: Option<ObjectiveSums>,
    /// Memory of the device, where the backend reports it.
    pub memory: Option<DeviceMemory>,
    /// For each trained parameter whether it has a gradient.
    present: Vec<bool>,
}

/// Devices that train one model together.
pub struct Replicas<B: TrainAccelerator> {
    ranks: Ranks<Job<B>, Answer<B>>,
    devices: Vec<B::Device>,
    all_reduce: Option<Adder<B>>,
    present: Arc<Vec<bool>>,
    /// Ranks that were sent a step whose end was not waited for.
    stepping: Vec<usize>,
}

/// State of one rank's thread.
struct Rank<B: TrainAccelerator> {
    device: B::Device,
    max_grad_norm: f64,
    all_reduce: Option<Adder<B>>,
    model: Option<Trainee<B>>,
    optimizer: Option<AdamW<B>>,
    grads: GradientsParams,
    sums: Vec<Flat<B>>,
    present: Arc<Vec<bool>>,
    /// The part of the next step.
    next: Option<Box<Window>>,
}

impl<B: TrainAccelerator> Replicas<B> {
    /// Copies the model and the optimizer to all devices but the first, where the Learner has them.
    ///
    /// `names` are the devices' names for messages.
    ///
    /// # Errors
    /// [`RankError`]; also when the devices cannot add up among themselves, as CUDA without NCCL.
    pub fn start(
        devices: &[B::Device],
        names: &[String],
        model: &Trainee<B>,
        optimizer: &AdamW<B>,
        max_grad_norm: f64,
        patience: Duration,
    ) -> Result<Self, RankError> {
        let name = |rank: usize| match names.get(rank) {
            Some(name) => format!("`{name}` (rank {rank})"),
            None => format!("{:?} (rank {rank})", devices[rank]),
        };
        let all_reduce =
            B::InnerBackend::all_reduce(devices, patience).map_err(|reason| RankError::Failed {
                rank: name(0),
                what: "preparing to add up gradients",
                reason,
            })?;
        let workers = devices
            .iter()
            .enumerate()
            .map(|(index, device)| {
                let mut rank = Rank::<B> {
                    device: device.clone(),
                    max_grad_norm,
                    all_reduce: all_reduce.clone(),
                    model: None,
                    optimizer: None,
                    grads: GradientsParams::new(),
                    sums: Vec::new(),
                    present: Arc::default(),
                    next: None,
                };
                (name(index), move |job| rank.work(job))
            })
            .collect();
        let ranks = Ranks::start(workers, patience);
        // One after the other: the first device sends each copy.
        for rank in 1..devices.len() {
            let job = Job::Load(Box::new((model.clone(), optimizer.clone())));
            ranks.ask("taking a copy of the model", vec![(rank, job)])?;
        }
        let this = Self {
            ranks,
            devices: devices.to_vec(),
            all_reduce,
            present: Arc::default(),
            stepping: Vec::new(),
        };
        if this.all_reduce.is_some() {
            let jobs = (0..devices.len()).map(|rank| (rank, Job::Meet)).collect();
            this.together("adding up a first number", jobs)?;
        }
        Ok(this)
    }

    /// Runs a job on all ranks together: where one fails, the others are not left waiting for it.
    fn together(
        &self,
        what: &'static str,
        jobs: Vec<(usize, Job<B>)>,
    ) -> Result<Vec<Answer<B>>, RankError> {
        let ranks: Vec<usize> = jobs.iter().map(|(rank, _)| *rank).collect();
        for (rank, job) in jobs {
            self.ranks.send(rank, job);
        }
        self.collect(what, &ranks)
    }

    fn collect(&self, what: &'static str, ranks: &[usize]) -> Result<Vec<Answer<B>>, RankError> {
        self.ranks.collect(what, ranks).inspect_err(|_| {
            if let Some(all_reduce) = &self.all_reduce {
                all_reduce.give_up();
            }
        })
    }

    /// Computes the gradients of a window; they stay with the ranks.
    ///
    /// The micro-batches of the `next` window are taken out of it, so that their images are uploaded while
    /// this one is trained on; it is then the one to be trained on next.
    ///
    /// # Errors
    /// [`RankError`].
    pub fn learn(
        &mut self,
        model: &Trainee<B>,
        window: Window,
        next: Option<&mut Window>,
    ) -> Result<Vec<Learnt>, RankError> {
        let count = self.ranks.len();
        let split = |window: Window| -> Vec<Option<Box<Window>>> {
            let mut parts = window.split().into_iter().map(Box::new);
            (0..count).map(|_| parts.next()).collect()
        };
        let ahead = match next {
            Some(next) if next.targets > 0 => {
                let parts = std::mem::take(&mut next.parts);
                split(Window {
                    parts,
                    ..next.clone()
                })
            }
            _ => vec![None; count],
        };
        let jobs = split(window)
            .into_iter()
            .zip(ahead)
            .enumerate()
            .map(|(rank, (part, ahead))| {
                let model = (rank == 0).then(|| Box::new(model.clone()));
                (rank, Job::Learn(model, part, ahead))
            })
            .collect();
        let answers = self.ranks.ask("working out gradients", jobs)?;
        let all: Vec<Learnt> = answers
            .into_iter()
            .filter_map(|answer| match answer {
                Answer::Learnt(learnt) => Some(learnt),
                _ => None,
            })
            .collect();
        // A parameter without a gradient anywhere is not stepped, as on one device.
        let count = all.first().map_or(0, |learnt| learnt.present.len());
        let anywhere = (0..count)
            .map(|place| all.iter().any(|learnt| learnt.present[place]))
            .collect();
        self.present = Arc::new(anywhere);
        Ok(all)
    }

    /// Sums the gradients of all ranks (all-reduce) and returns the sums on the first device. The other
    /// ranks clip and step with them at once; the caller does so for the first, then calls
    /// [`Replicas::finish_step`].
    ///
    /// # Errors
    /// [`RankError`].
    pub fn reduce(&mut self, model: &Trainee<B>, lr: f64) -> Result<GradientsParams, RankError> {
        if !self.present.contains(&true) {
            return Ok(GradientsParams::new());
        }
        let all: Vec<usize> = (0..self.ranks.len()).collect();
        let jobs = all
            .iter()
            .map(|rank| (*rank, Job::Reduce(self.present.clone())))
            .collect();
        self.stepping = all[1..].to_vec();
        let sums = if self.all_reduce.is_some() {
            for (rank, job) in jobs {
                self.ranks.send(rank, job);
            }
            for rank in &self.stepping {
                self.ranks.send(*rank, Job::Step(None, lr));
            }
            let answers = self.collect("adding up gradients", &all)?;
            gradients(answers).next().unwrap_or_default()
        } else {
            let mut gradients = gradients(self.ranks.ask("adding up gradients", jobs)?);
            let mut sums = gradients.next().unwrap_or_default();
            for other in gradients {
                let added = sums.into_iter().zip(other);
                sums = added
                    .map(|(sum, other)| {
                        sum + B::InnerBackend::to_other_device(other, &self.devices[0])
                    })
                    .collect();
            }
            for rank in &self.stepping {
                let device = &self.devices[*rank];
                let copies = sums.iter().cloned();
                let copies = copies.map(|sum| B::InnerBackend::to_other_device(sum, device));
                self.ranks
                    .send(*rank, Job::Step(Some(copies.collect()), lr));
            }
            sums
        };
        Ok(scatter(model, sums, &self.present))
    }

    /// Waits until all ranks have taken the step, and the first device what the caller gave it to do.
    ///
    /// # Errors
    /// [`RankError`].
    pub fn finish_step(&mut self) -> Result<(), RankError> {
        // What the caller read was made by the first rank's thread, which may use the memory again once
        // it is dropped: not before it has been read.
        let _ = B::sync(&self.devices[0]);
        let stepping = std::mem::take(&mut self.stepping);
        self.collect("taking the step", &stepping)?;
        Ok(())
    }

    /// Loss sums of validation batches, at most one a device.
    ///
    /// # Errors
    /// [`RankError`].
    pub fn evaluate(
        &self,
        model: &Trainee<B>,
        windows: Vec<Window>,
    ) -> Result<Vec<LossTotals>, RankError> {
        let jobs = windows
            .into_iter()
            .enumerate()
            .map(|(rank, window)| {
                let model = (rank == 0).then(|| Box::new(model.clone()));
                (rank, Job::Evaluate(model, Box::new(window)))
            })
            .collect();
        let answers = self.ranks.ask("validating", jobs)?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                Answer::Totals(totals) => Some(totals),
                _ => None,
            })
            .collect())
    }

    /// Reports of all batches of a scorer, which the devices take in turn.
    ///
    /// # Errors
    /// [`RankError`].
    pub fn generate(
        &self,
        model: &Trainee<B>,
        scorer: &GenerationScorer<B::InnerBackend>,
    ) -> Result<Vec<Generated>, RankError> {
        let count = self.ranks.len();
        let jobs = (0..count)
            .map(|rank| {
                let model = (rank == 0).then(|| Box::new(model.clone()));
                let batches = (rank..scorer.batches).step_by(count).collect();
                (rank, Job::Generate(model, scorer.generate.clone(), batches))
            })
            .collect();
        let answers = self.ranks.ask("generating reports", jobs)?;
        let mut all: Vec<_> = answers
            .into_iter()
            .filter_map(|answer| match answer {
                Answer::Generated(batches) => Some(batches.into_iter()),
                _ => None,
            })
            .collect();
        // Back into the order of the batches.
        let ordered = (0..scorer.batches).filter_map(|batch| all[batch % count].next());
        Ok(ordered.flatten().collect())
    }

    /// Makes sure that all devices have the same trained weights after `step` steps, bit for bit.
    ///
    /// # Errors
    /// [`RankError::Apart`] and others.
    pub fn compare(&self, model: &Trainee<B>, step: usize) -> Result<(), RankError> {
        let jobs = (0..self.ranks.len())
            .map(|rank| {
                let model = (rank == 0).then(|| Box::new(model.clone()));
                (rank, Job::Digest(model))
            })
            .collect();
        let answers = self.ranks.ask("comparing the weights", jobs)?;
        let all: Vec<Vec<u64>> = answers
            .into_iter()
            .filter_map(|answer| match answer {
                Answer::Digests(digests) => Some(digests),
                _ => None,
            })
            .collect();
        for (rank, other) in all.iter().enumerate().skip(1) {
            let differing: Vec<usize> = (0..all[0].len().max(other.len()))
                .filter(|place| all[0].get(*place) != other.get(*place))
                .collect();
            if let Some(place) = differing.first() {
                return Err(RankError::Apart {
                    rank: self.ranks.name(rank).to_string(),
                    first: self.ranks.name(0).to_string(),
                    step,
                    count: differing.len(),
                    place: place + 1,
                    all: all[0].len(),
                });
            }
        }
        Ok(())
    }

    /// Number of devices.
    pub fn len(&self) -> usize {
        self.devices.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }
}

impl<B: TrainAccelerator> Rank<B> {
    fn work(&mut self, job: Job<B>) -> Result<Answer<B>, String> {
        const NO_MODEL: &str = "it holds no model";
        match job {
            Job::Load(copied) => {
                let (model, optimizer) = *copied;
                self.model = Some(model.move_to(&self.device));
                self.optimizer = Some(optimizer.copy_to(&self.device));
                self.wait()?;
                Ok(Answer::Done)
            }
            Job::Meet => {
                if let Some(all_reduce) = &self.all_reduce {
                    let one = Tensor::ones([1], (&self.device, DType::F32));
                    let sum = all_reduce.sum(vec![one])?.remove(0);
                    let sum = sum.into_data().iter::<f32>().next();
                    let count = all_reduce.len() as f32;
                    if sum != Some(count) {
                        return Err(format!("ones of {count} devices add up to {sum:?}"));
                    }
                }
                Ok(Answer::Done)
            }
            Job::Learn(model, window, next) => {
                if let Some(model) = model {
                    self.model = Some(*model);
                }
                let model = self.model.as_ref().ok_or(NO_MODEL)?;
                let window = window.or_else(|| self.next.take());
                let output = TrainStep::step(model, *window.ok_or("it has no samples")?);
                let reading = output.item.read_async(None);
                if let Some(next) = next {
                    model.send_ahead(&next);
                    self.next = Some(next);
                }
                let (memory, present) = (
                    B::InnerBackend::memory_in_use(&self.device),
                    presence(model, &output.grads),
                );
                self.grads = output.grads;
                // Reading the sums waits for the device: what went wrong on it shows here, before
                // any other rank waits for this one's gradients.
                let read = reading.map(StepReading::wait).unwrap_or_default();
                self.wait()?;
                Ok(Answer::Learnt(Learnt {
                    totals: read.totals,
                    objective: read.objective,
                    sequences: read.sequences,
                    memory,
                    present,
                }))
            }
            Job::Reduce(present) => {
                let model = self.model.as_ref().ok_or(NO_MODEL)?;
                let grads = std::mem::replace(&mut self.grads, GradientsParams::new());
                let own = gather(model, grads, &present, &self.device);
                let gradients = match &self.all_reduce {
                    Some(all_reduce) => all_reduce.sum(own)?,
                    None => own,
                };
                self.present = present;
                if self.optimizer.is_none() {
                    // The Learner steps the first rank's model: a handle kept here would keep the
                    // weights from before the step alive.
                    self.model = None;
                } else if self.all_reduce.is_some() {
                    self.sums = gradients;
                    return Ok(Answer::Done);
                }
                self.wait()?;
                Ok(Answer::Gradients(gradients))
            }
            Job::Step(sums, lr) => {
                let model = self.model.take().ok_or(NO_MODEL)?;
                let optimizer = self.optimizer.as_mut().ok_or("it holds no optimizer")?;
                let sums = sums.unwrap_or_else(|| std::mem::take(&mut self.sums));
                let grads = scatter(&model, sums, &self.present);
                let clip = optimizer.clip_next(&model, &grads, self.max_grad_norm);
                // All devices have the same sums, and so take or leave out the same steps.
                let leaves_out = model.loss_scale().is_some()
                    && clip.is_some_and(|clip| !norm_of(clip).is_finite());
                self.model = Some(match leaves_out {
                    true => model,
                    false => optimizer.step(lr, model, grads),
                });
                Ok(Answer::Done)
            }
            Job::Evaluate(model, window) => {
                let model = model.as_deref().or(self.model.as_ref()).ok_or(NO_MODEL)?;
                let output = InferenceStep::step(&model.valid(), *window);
                Ok(Answer::Totals(output.totals()))
            }
            Job::Generate(model, generate, batches) => {
                let model = model.as_deref().or(self.model.as_ref()).ok_or(NO_MODEL)?;
                let merged = merge_unless_quantised(model.valid().model);
                let reports = batches
                    .into_iter()
                    .map(|batch| generate(&merged, &self.device, batch))
                    .collect::<Result<_, _>>()
                    .map_err(|error| error.to_string())?;
                Ok(Answer::Generated(reports))
            }
            Job::Digest(model) => {
                let model = model.as_deref().or(self.model.as_ref()).ok_or(NO_MODEL)?;
                Ok(Answer::Digests(digests(model)))
            }
        }
    }

    /// Waits for all work of the device.
    fn wait(&self) -> Result<(), String> {
        B::sync(&self.device).map_err(|error| format!("{error:?}"))
    }
}

/// The norm before clipping, of what [`AdamW::clip_next`] gives; waits for the device.
pub(super) fn norm_of<B: DeviceOps>(clip: Tensor<B, 1>) -> f64 {
    let values = B::read_async(clip)();
    values.first().copied().map_or(0.0, f64::from)
}

/// The gradients among answers.
fn gradients<B: TrainAccelerator>(answers: Vec<Answer<B>>) -> impl Iterator<Item = Vec<Flat<B>>> {
    answers.into_iter().filter_map(|answer| match answer {
        Answer::Gradients(gradients) => Some(gradients),
        _ => None,
    })
}

/// For each trained parameter, in the order of the module tree, a number that its bits decide.
fn digests<B: TrainAccelerator>(model: &Trainee<B>) -> Vec<u64> {
    struct Read(Vec<u64>);
    impl<B: AutodiffBackend> ModuleVisitor<B> for Read {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                let mut hasher = DefaultHasher::new();
                hasher.write(&param.val().into_data().bytes);
                self.0.push(hasher.finish());
            }
        }
    }
    let mut read = Read(Vec::new());
    model.visit(&mut read);
    read.0
}

/// For each trained parameter, in the order of the module tree, whether it has a gradient.
fn presence<B: TrainAccelerator>(model: &Trainee<B>, grads: &GradientsParams) -> Vec<bool> {
    struct Look<'a>(&'a GradientsParams, Vec<bool>);
    impl<B: AutodiffBackend> ModuleVisitor<B> for Look<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                let found = self.0.get::<B::InnerBackend, D>(param.id).is_some();
                self.1.push(found);
            }
        }
    }
    let mut look = Look(grads, Vec::new());
    model.visit(&mut look);
    look.1
}

/// The gradients of the parameters that are `present` somewhere, f32, each in one row; zeros where this
/// rank has none.
fn gather<B: TrainAccelerator>(
    model: &Trainee<B>,
    grads: GradientsParams,
    present: &[bool],
    device: &B::Device,
) -> Vec<Flat<B>> {
    struct Gather<'a, B: AutodiffBackend> {
        grads: GradientsParams,
        present: std::slice::Iter<'a, bool>,
        device: &'a B::Device,
        all: Vec<Flat<B>>,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Gather<'_, B> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if !param.is_require_grad() || self.present.next() != Some(&true) {
                return;
            }
            let count = param.lazy_shape().num_elements();
            self.all
                .push(match self.grads.remove::<B::InnerBackend, D>(param.id) {
                    Some(grad) => to_f32(grad).reshape([count]),
                    None => Tensor::zeros([count], (self.device, DType::F32)),
                });
        }
    }
    let mut gather = Gather::<B> {
        grads,
        present: present.iter(),
        device,
        all: Vec::new(),
    };
    model.visit(&mut gather);
    gather.all
}

/// The inverse of [`gather`].
fn scatter<B: TrainAccelerator>(
    model: &Trainee<B>,
    gradients: Vec<Flat<B>>,
    present: &[bool],
) -> GradientsParams {
    struct Scatter<'a, B: AutodiffBackend> {
        gradients: std::vec::IntoIter<Flat<B>>,
        present: std::slice::Iter<'a, bool>,
        grads: GradientsParams,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Scatter<'_, B> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if !param.is_require_grad() || self.present.next() != Some(&true) {
                return;
            }
            if let Some(gradient) = self.gradients.next() {
                let shape: [usize; D] = param.lazy_shape().dims();
                let gradient: Tensor<B::InnerBackend, D> = gradient.reshape(shape);
                self.grads.register(param.id, gradient);
            }
        }
    }
    let mut scatter = Scatter::<B> {
        gradients: gradients.into_iter(),
        present: present.iter(),
        grads: GradientsParams::new(),
    };
    model.visit(&mut scatter);
    scatter.grads
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::path::Path;

    use burn::backend::Autodiff;

    use super::*;
    use crate::{
        adapters::lora::attach::attach,
        dataset::{Dataset, loader::WindowLoader},
        runtime::pipeline::{PipelineOptions, TextAndImages, load_model},
        train::{config::TrainConfig, learner::StepSettings},
    };

    type AB = Autodiff<burn_flex::Flex>;

    /// The tiny model with fresh adapters, two CPU ranks of it, and a window for both.
    fn two_ranks(patience: Duration) -> (Trainee<AB>, Result<Replicas<AB>, RankError>, Window) {
        let config = TrainConfig {
            gradient_accumulation_steps: 1,
            lora_dropout: 0.0,
            ..TrainConfig::default()
        };
        let options = PipelineOptions {
            model: Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny"),
            adapter: None,
            dtype: DType::F32,
            quantize: None,
            min_pixels: None,
            max_pixels: None,
            gguf: Default::default(),
            memory: None,
        };
        let device = Default::default();
        let parts = TextAndImages::load(&options).unwrap();
        let sizes = parts.config.clone();
        let base = load_model::<AB>(&options, &sizes, &device, &mut |_, _| {}).unwrap();
        let (model, _) = attach(base.no_grad(), &config.lora_config(), 1).unwrap();
        let settings = StepSettings {
            config: sizes,
            train: config.clone(),
            loss_scale: None,
            reference: Default::default(),
        };
        let model = Trainee::new(model, Arc::new(settings));
        let data = Dataset::open("phantom:11:0..8:house").unwrap();
        let loader = WindowLoader::new(data, Arc::new(parts), config.window_plan(2), 0, 1);
        let replicas = Replicas::start(
            &[device, device],
            &["cpu".to_string(), "cpu".to_string()],
            &model,
            &AdamW::new(config.adamw()),
            1.0,
            patience,
        );
        (model, replicas, loader.window(0).unwrap())
    }

    #[test]
    fn a_rank_that_panics_in_the_model_ends_the_step_of_both() {
        let (model, replicas, window) = two_ranks(Duration::from_secs(300));
        let mut replicas = replicas.unwrap();
        let learnt = replicas.learn(&model, window.clone(), None).unwrap();
        assert_eq!(learnt.len(), 2);
        let targets: usize = learnt.iter().map(|part| part.totals.targets).sum();
        assert_eq!(targets, window.targets);
        replicas.compare(&model, 0).unwrap();
        let sums = replicas.reduce(&model, 1e-3).unwrap();
        assert!(!sums.is_empty());
        replicas.finish_step().unwrap();
        // The first rank was left where it was.
        let error = replicas.compare(&model, 1).unwrap_err().to_string();
        assert!(
            error.contains("after step 1 the weights of device `cpu` (rank 1)"),
            "{error}"
        );

        // A window that was sent ahead is trained on as if it had come in its turn.
        let mut ahead = window.clone();
        let first = replicas
            .learn(&model, window.clone(), Some(&mut ahead))
            .unwrap();
        assert_eq!((ahead.parts.len(), ahead.targets), (0, window.targets));
        let second = replicas.learn(&model, ahead, None).unwrap();
        let loss = |all: &[Learnt]| all.iter().map(|part| part.objective).sum::<f64>();
        assert_eq!(loss(&first), loss(&second));

        // No row of the embedding has this number: the second rank's model panics.
        let mut broken = window;
        broken.parts[1][0].text.input_ids[0][0] = 1 << 24;
        let error = replicas.learn(&model, broken, None).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("`cpu` (rank 1) failed while working out gradients: "),
            "{text}"
        );
    }

    #[test]
    fn ranks_that_are_slow_beyond_the_time_out_are_named() {
        // Now and then both are done before anybody looks.
        let slow = || two_ranks(Duration::from_nanos(1)).1.err();
        let error = (0..50).find_map(|_| slow()).unwrap().to_string();
        assert!(
            error.contains("`cpu` (rank 1) did not end taking a copy of the model"),
            "{error}"
        );
    }
}
