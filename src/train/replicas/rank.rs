//! One device's share of data-parallel training: a thread's jobs and what it answers.

use std::sync::Arc;

use burn::{
    module::AutodiffModule,
    optim::{GradientsParams, Optimizer},
    prelude::*,
    tensor::{DType, backend::AutodiffBackend},
    train::{InferenceStep, TrainStep},
};

use super::flat::{Flat, digests, gather, on_host, presence, scatter};
use crate::{
    adapters::lora::merge::merge_unless_quantised,
    batch::window::Window,
    cluster::chain::Part,
    ops::{AllReduce, DeviceMemory, DeviceOps},
    runtime::accelerator::TrainAccelerator,
    train::{
        generation::{GenerateBatch, Generated},
        learner::Trainee,
        loss::LossTotals,
        objective::sums::ObjectiveSums,
        optimizer::{AdamW, norm_of},
        step_numbers::StepReading,
    },
};

/// Sums of gradients, and which parameters have one.
pub(super) type Sums<B> = (Vec<Flat<B>>, Arc<Vec<bool>>);

/// Adds up gradients among the devices.
pub(super) type Adder<B> = Arc<dyn AllReduce<<B as AutodiffBackend>::InnerBackend>>;

/// What a rank is to do; in each step in this order.
pub(super) enum Job<B: TrainAccelerator> {
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
    /// Return the gradients of each micro-batch, on the host.
    Parts,
    /// Clip and step with the sums: those given, or those the rank has of the last [`Job::Reduce`].
    Step(Option<Sums<B>>, f64),
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

pub(super) enum Answer<B: TrainAccelerator> {
    Done,
    Learnt(Learnt),
    Gradients(Vec<Flat<B>>),
    Parts(Vec<Part>),
    Totals(LossTotals),
    Generated(Vec<Vec<Generated>>),
    Digests(Vec<u64>),
}

/// What a rank reports of its part before gradients are summed.
#[derive(Debug, Clone)]
pub struct Learnt {
    /// Of each micro-batch where their gradients are kept one by one, else of all together.
    pub pieces: Vec<Piece>,
    /// Memory of the device, where the backend reports it.
    pub memory: Option<DeviceMemory>,
    /// For each trained parameter whether it has a gradient.
    pub(super) present: Vec<bool>,
}

/// Loss of some samples.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Loss sums.
    pub totals: LossTotals,
    /// Share of the loss that is minimised.
    pub objective: f64,
    /// What an objective over sequences came to.
    pub sequences: Option<ObjectiveSums>,
}

/// State of one rank's thread.
pub(super) struct Rank<B: TrainAccelerator> {
    device: B::Device,
    max_grad_norm: f64,
    all_reduce: Option<Adder<B>>,
    model: Option<Trainee<B>>,
    optimizer: Option<AdamW<B>>,
    grads: GradientsParams,
    /// Whether the gradients of each micro-batch are kept one by one, to be added up in their order.
    keeps_parts: bool,
    parts: Vec<Part>,
    sums: Vec<Flat<B>>,
    present: Arc<Vec<bool>>,
    /// The part of the next step.
    next: Option<Box<Window>>,
}

impl<B: TrainAccelerator> Rank<B> {
    /// A rank without a model.
    pub(super) fn new(
        device: B::Device,
        max_grad_norm: f64,
        all_reduce: Option<Adder<B>>,
        keeps_parts: bool,
    ) -> Self {
        Self {
            device,
            max_grad_norm,
            all_reduce,
            model: None,
            optimizer: None,
            grads: GradientsParams::new(),
            keeps_parts,
            parts: Vec::new(),
            sums: Vec::new(),
            present: Arc::default(),
            next: None,
        }
    }

    /// Does a job.
    pub(super) fn work(&mut self, job: Job<B>) -> Result<Answer<B>, String> {
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
                let window = *window.ok_or("it has no samples")?;
                if self.keeps_parts {
                    self.next = next;
                    return self.learn_one_by_one(window).map(Answer::Learnt);
                }
                let output = TrainStep::step(model, window);
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
                    pieces: vec![Piece {
                        totals: read.totals,
                        objective: read.objective,
                        sequences: read.sequences,
                    }],
                    memory,
                    present,
                }))
            }
            Job::Parts => {
                if self.optimizer.is_none() {
                    // As in a reduction: the Learner's weights.
                    self.model = None;
                }
                Ok(Answer::Parts(std::mem::take(&mut self.parts)))
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
                let (sums, present) = match sums {
                    Some((sums, present)) => (sums, present),
                    None => (std::mem::take(&mut self.sums), self.present.clone()),
                };
                let grads = scatter(&model, sums, &present);
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

    /// Computes the gradients of a window's micro-batches one after the other and keeps each.
    fn learn_one_by_one(&mut self, window: Window) -> Result<Learnt, String> {
        let model = self.model.as_ref().ok_or("it holds no model")?;
        let mut learnt = Learnt {
            pieces: Vec::new(),
            memory: None,
            present: presence(model, &GradientsParams::new()),
        };
        self.parts.clear();
        let mut sequences = window.sequences.iter().flatten();
        for (place, batch) in window.parts.iter().flatten().enumerate() {
            let own = sequences.next().cloned();
            if batch.targets() == 0 {
                continue;
            }
            let output = TrainStep::step(
                model,
                Window {
                    parts: vec![vec![batch.clone()]],
                    sequences: vec![own.into_iter().collect()],
                    rows: Vec::new(),
                    first_micro_batch: window.first_micro_batch + place,
                    ..window
                },
            );
            let reading = output.item.read_async(None);
            let read = reading.map(StepReading::wait).unwrap_or_default();
            learnt.pieces.push(Piece {
                totals: read.totals,
                objective: read.objective,
                sequences: read.sequences,
            });
            let part = on_host(model, output.grads);
            for (present, row) in learnt.present.iter_mut().zip(&part) {
                *present |= row.is_some();
            }
            self.parts.push(part);
        }
        self.wait()?;
        learnt.memory = B::InnerBackend::memory_in_use(&self.device);
        Ok(learnt)
    }

    /// Waits for all work of the device.
    fn wait(&self) -> Result<(), String> {
        B::sync(&self.device).map_err(|error| format!("{error:?}"))
    }
}
