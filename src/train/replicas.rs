//! Data-parallel training: each device computes the gradients of its share, an all-reduce sums them, all
//! take the same step.
//!
//! The gradients of all trained parameters are summed together, in f32. Where the backend can (NCCL on
//! CUDA) the devices do it among themselves; elsewhere the first one sums the gradients of the others.
//! Every device then clips and steps by itself, from the same sums with the same optimizer state, so that
//! no weights need to be sent; that they stay the same, bit for bit, is checked at every checkpoint and
//! validation. Validation batches are divided among the devices as well.

mod across;
mod flat;
mod rank;
#[cfg(all(test, feature = "flex"))]
mod tests;

use std::{sync::Arc, time::Duration};

use burn::{
    optim::GradientsParams,
    prelude::*,
    tensor::{DType, TensorData},
};

use super::{
    generation::{Generated, GenerationScorer},
    learner::Trainee,
    loss::LossTotals,
    optimizer::AdamW,
    ranks::{RankError, Ranks},
};
use crate::{
    batch::window::Window,
    cluster::Cluster,
    ops::{DeviceOps, Others},
    runtime::accelerator::TrainAccelerator,
};

use across::Across;
use flat::{Flat, lengths, scatter};
use rank::{Adder, Answer, Job, Rank};

pub(super) use across::Evaluated;
pub use rank::{Learnt, Piece};

/// Devices that train one model together.
pub struct Replicas<B: TrainAccelerator> {
    ranks: Ranks<Job<B>, Answer<B>>,
    devices: Vec<B::Device>,
    all_reduce: Option<Adder<B>>,
    /// The other processes of the run.
    across: Option<Across>,
    present: Arc<Vec<bool>>,
    /// Ranks that were sent a step whose end was not waited for.
    stepping: Vec<usize>,
}

impl<B: TrainAccelerator> Replicas<B> {
    /// Copies the model and the optimizer to all devices but the first, where the Learner has them.
    ///
    /// `names` are the devices' names for messages; `cluster` are the processes of the run, where it has several.
    ///
    /// # Errors
    /// [`RankError`]; also when the devices cannot add up among themselves, as CUDA without NCCL.
    pub fn start(
        devices: &[B::Device],
        names: &[String],
        model: &Trainee<B>,
        optimizer: &AdamW<B>,
        max_grad_norm: f64,
        cluster: Option<Arc<Cluster>>,
        patience: Duration,
    ) -> Result<Self, RankError> {
        let name = |rank: usize| match names.get(rank) {
            Some(name) => format!("`{name}` (rank {rank})"),
            None => format!("{:?} (rank {rank})", devices[rank]),
        };
        let all_reduce = match &cluster {
            Some(cluster) => all_reduce_across::<B>(devices, cluster, patience),
            // A device alone has nothing to add up.
            None if devices.len() == 1 => Ok(None),
            None => B::InnerBackend::all_reduce(devices, None, patience),
        }
        .map_err(|reason| RankError::Failed {
            rank: name(0),
            what: "preparing to add up gradients",
            reason,
        })?;
        let across = cluster
            .map(|cluster| Across::join(cluster, all_reduce.is_some()))
            .transpose()?;
        let keeps_parts = across.as_ref().is_some_and(Across::uses_sockets);
        let workers = devices
            .iter()
            .enumerate()
            .map(|(index, device)| {
                let mut rank = Rank::<B>::new(
                    device.clone(),
                    max_grad_norm,
                    all_reduce.clone(),
                    keeps_parts,
                );
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
            across,
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
        self.ranks.collect(what, ranks).map_err(|error| {
            if let Some(all_reduce) = &self.all_reduce {
                all_reduce.give_up();
            }
            match &self.across {
                // Another process is the likely reason: the first one knows.
                Some(across) => across.cluster().verdict(error.to_string()).into(),
                None => error,
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
        let (count, step) = (self.ranks.len(), window.step);
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
        let mut all: Vec<Learnt> = answers
            .into_iter()
            .filter_map(|answer| match answer {
                Answer::Learnt(learnt) => Some(learnt),
                _ => None,
            })
            .collect();
        if let Some(across) = &self.across {
            all = across.learnt(step, all)?;
        }
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
        if self.across.as_ref().is_some_and(Across::uses_sockets) {
            return self.reduce_through_sockets(model, lr);
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
                let copies = Some((copies.collect(), self.present.clone()));
                self.ranks.send(*rank, Job::Step(copies, lr));
            }
            sums
        };
        Ok(scatter(model, sums, &self.present))
    }

    /// [`Replicas::reduce`] over several processes, micro-batch by micro-batch in their order: the bits are those
    /// of one device that learns from all of them.
    fn reduce_through_sockets(
        &mut self,
        model: &Trainee<B>,
        lr: f64,
    ) -> Result<GradientsParams, RankError> {
        let Some(across) = &self.across else {
            return Ok(GradientsParams::new());
        };
        let all = 0..self.ranks.len();
        let jobs = all.clone().map(|rank| (rank, Job::Parts)).collect();
        let answers = self.ranks.ask("handing over gradients", jobs)?;
        let parts = answers.into_iter().flat_map(|answer| match answer {
            Answer::Parts(parts) => parts,
            _ => Vec::new(),
        });
        let parts: Vec<_> = parts.collect();
        let sums = across.sum(&lengths(model), &parts)?;
        drop(parts);
        let present: Arc<Vec<bool>> = Arc::new(sums.iter().map(Option::is_some).collect());
        let on_device = |device: &B::Device| -> Vec<Flat<B>> {
            let rows = sums.iter().flatten().map(|row| {
                let data = TensorData::new(row.clone(), [row.len()]);
                Tensor::from_data(data, (device, DType::F32))
            });
            rows.collect()
        };
        self.stepping = all.skip(1).collect();
        for rank in &self.stepping {
            let copies = Some((on_device(&self.devices[*rank]), present.clone()));
            self.ranks.send(*rank, Job::Step(copies, lr));
        }
        Ok(scatter(model, on_device(&self.devices[0]), &present))
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
        let (first, count) = (self.first(), self.all());
        let jobs = (0..self.ranks.len())
            .map(|rank| {
                let model = (rank == 0).then(|| Box::new(model.clone()));
                let batches = (first + rank..scorer.batches).step_by(count).collect();
                (rank, Job::Generate(model, scorer.generate.clone(), batches))
            })
            .collect();
        let answers = self.ranks.ask("generating reports", jobs)?;
        let mut all: Vec<Vec<Vec<Generated>>> = answers
            .into_iter()
            .filter_map(|answer| match answer {
                Answer::Generated(batches) => Some(batches),
                _ => None,
            })
            .collect();
        if let Some(across) = &self.across {
            all = across.generated(all)?;
        }
        let mut all: Vec<_> = all.into_iter().map(Vec::into_iter).collect();
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
        if let (Some(across), Some(own)) = (&self.across, all.first()) {
            across.compare(own, step)?;
        }
        for (rank, other) in all.iter().enumerate().skip(1) {
            let differing: Vec<usize> = (0..all[0].len().max(other.len()))
                .filter(|place| all[0].get(*place) != other.get(*place))
                .collect();
            if let Some(place) = differing.first() {
                return Err(RankError::Apart {
                    rank: format!("device {}", self.ranks.name(rank)),
                    first: format!("device {}", self.ranks.name(0)),
                    step,
                    count: differing.len(),
                    place: place + 1,
                    all: all[0].len(),
                });
            }
        }
        Ok(())
    }

    /// The validation batches of all processes in their order; those of this one, where it works alone.
    ///
    /// # Errors
    /// [`RankError`].
    pub(super) fn evaluated(&self, own: Vec<Evaluated>) -> Result<Vec<Evaluated>, RankError> {
        match &self.across {
            Some(across) => across.evaluated(&own),
            None => Ok(own),
        }
    }

    /// Says before a step whether this process wants to stop after it.
    pub fn set_stop(&self, stop: bool) {
        if let Some(across) = &self.across {
            across.set_stop(stop);
        }
    }

    /// Whether one of the processes wants to stop after the last step; `None` where there is one process.
    pub fn stops(&self) -> Option<bool> {
        self.across.as_ref().map(Across::stops)
    }

    /// Number of this process's first device among all.
    pub fn first(&self) -> usize {
        let across = self.across.as_ref();
        across.map_or(0, |across| across.cluster().first_device())
    }

    /// Devices of all processes.
    pub fn all(&self) -> usize {
        let across = self.across.as_ref();
        across.map_or(self.devices.len(), |across| across.cluster().devices())
    }

    /// Number of devices of this process.
    pub fn len(&self) -> usize {
        self.devices.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }
}

/// How these devices add up with those of the other processes.
fn all_reduce_across<B: TrainAccelerator>(
    devices: &[B::Device],
    cluster: &Arc<Cluster>,
    patience: Duration,
) -> Result<Option<Adder<B>>, String> {
    let hand_out = |own: Option<Vec<u8>>| {
        let parts = cluster.gather("NCCL's id", &own.unwrap_or_default());
        parts
            .map(|mut parts| parts.swap_remove(0))
            .map_err(|error| error.to_string())
    };
    let others = Others {
        first: cluster.first_device(),
        all: cluster.devices(),
        hand_out: &hand_out,
        is_over: &|| cluster.is_over(),
    };
    let all_reduce = B::InnerBackend::all_reduce(devices, Some(&others), patience)?;
    if let Some(all_reduce) = &all_reduce {
        // Communicators end with the replicas, not with the processes' connection.
        let all_reduce = Arc::downgrade(all_reduce);
        cluster.on_end(move |_| {
            if let Some(all_reduce) = all_reduce.upgrade() {
                all_reduce.give_up();
            }
        });
    }
    Ok(all_reduce)
}

/// The gradients among answers.
fn gradients<B: TrainAccelerator>(answers: Vec<Answer<B>>) -> impl Iterator<Item = Vec<Flat<B>>> {
    answers.into_iter().filter_map(|answer| match answer {
        Answer::Gradients(gradients) => Some(gradients),
        _ => None,
    })
}
