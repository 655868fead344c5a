//! Replicas in several processes: what they tell each other, and sums of gradients through sockets where the
//! devices cannot add up by themselves.

use std::{
    hash::{DefaultHasher, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::rank::{Learnt, Piece};
use crate::{
    cluster::{
        Cluster, ClusterError,
        chain::{Chain, Part},
    },
    train::{
        generation::Generated, loss::LossTotals, objective::sums::ObjectiveSums, ranks::RankError,
    },
};

/// The other processes of a run.
pub(super) struct Across {
    cluster: Arc<Cluster>,
    /// Where sums go through sockets.
    chain: Option<Chain>,
    /// Whether this process wants to stop after the step, and then whether one of all does.
    stop: Mutex<bool>,
}

/// What a process says of a step before gradients are added up.
#[derive(Serialize, Deserialize)]
struct Report {
    devices: Vec<DeviceReport>,
    stop: bool,
    /// The last checkpoint; of the first process.
    last: String,
}

#[derive(Serialize, Deserialize)]
struct DeviceReport {
    /// Bits of the loss sum, of the right predictions, and of the share of the objective; targets.
    pieces: Vec<[u64; 4]>,
    /// Bits of what an objective came to, for each piece.
    sequences: Vec<Option<Vec<u64>>>,
    present: Vec<bool>,
}

impl DeviceReport {
    fn of(learnt: &Learnt) -> Self {
        let pieces = learnt.pieces.iter().map(|piece| {
            [
                piece.totals.nll.to_bits(),
                piece.totals.correct.to_bits(),
                piece.objective.to_bits(),
                piece.totals.targets as u64,
            ]
        });
        let sequences = learnt.pieces.iter().map(|piece| {
            let fields = piece.sequences?.fields();
            Some(fields.iter().map(|field| field.to_bits()).collect())
        });
        Self {
            sequences: sequences.collect(),
            pieces: pieces.collect(),
            present: learnt.present.clone(),
        }
    }

    fn learnt(self) -> Learnt {
        let pieces = self.pieces.into_iter().zip(self.sequences).map(
            |([nll, correct, objective, targets], sequences)| Piece {
                totals: LossTotals {
                    nll: f64::from_bits(nll),
                    correct: f64::from_bits(correct),
                    targets: targets as usize,
                },
                objective: f64::from_bits(objective),
                sequences: sequences.map(|bits| {
                    let fields: Vec<f64> = bits.into_iter().map(f64::from_bits).collect();
                    ObjectiveSums::of_fields(&fields)
                }),
            },
        );
        Learnt {
            pieces: pieces.collect(),
            memory: None,
            present: self.present,
        }
    }
}

/// Loss sums of validation batches, by number.
pub(in crate::train) type Evaluated = (usize, LossTotals, usize);

impl Across {
    /// Joins the processes: through sockets, where the devices of no process can add up by themselves.
    pub(super) fn join(cluster: Arc<Cluster>, add_up_themselves: bool) -> Result<Self, RankError> {
        let parts = cluster.gather("how gradients are added up", &[u8::from(add_up_themselves)])?;
        let other = parts
            .iter()
            .position(|part| part.as_slice() != [u8::from(add_up_themselves)]);
        if let Some(other) = other {
            let how = |themselves| {
                if themselves {
                    "through NCCL"
                } else {
                    "through sockets"
                }
            };
            return Err(ClusterError::Apart(format!(
                "{} adds up gradients {} and {} {}; give all processes devices of one kind",
                cluster.name(cluster.rank()),
                how(add_up_themselves),
                cluster.name(other),
                how(!add_up_themselves),
            ))
            .into());
        }
        let chain = match add_up_themselves {
            true => None,
            false => Some(Chain::open(&cluster)?),
        };
        Ok(Self {
            cluster,
            chain,
            stop: Mutex::new(false),
        })
    }

    pub(super) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Whether parts are kept one by one, to be added up in their order.
    pub(super) fn uses_sockets(&self) -> bool {
        self.chain.is_some()
    }

    pub(super) fn set_stop(&self, stop: bool) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = stop;
    }

    pub(super) fn stops(&self) -> bool {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What all devices of all processes have learnt from a step, in their order; `own` are this process's.
    pub(super) fn learnt(&self, step: usize, own: Vec<Learnt>) -> Result<Vec<Learnt>, RankError> {
        let report = Report {
            devices: own.iter().map(DeviceReport::of).collect(),
            stop: self.stops(),
            last: match self.cluster.is_first() {
                true => self.cluster.last(),
                false => String::new(),
            },
        };
        let what = format!("the gradients of step {}", step + 1);
        let reports: Vec<Report> = self.exchange(&what, &report)?;
        self.set_stop(reports.iter().any(|report| report.stop));
        self.cluster.set_last(reports[0].last.clone());
        let mut own = Some(own);
        let mut all = Vec::new();
        for (rank, report) in reports.into_iter().enumerate() {
            match own.take_if(|_| rank == self.cluster.rank()) {
                Some(own) => all.extend(own),
                None => all.extend(report.devices.into_iter().map(DeviceReport::learnt)),
            }
        }
        Ok(all)
    }

    /// The sums of the parts of all processes.
    pub(super) fn sum(&self, lengths: &[usize], own: &[Part]) -> Result<Part, RankError> {
        match &self.chain {
            Some(chain) => Ok(chain.sum(&self.cluster, lengths, own)?),
            None => Err(ClusterError::Ended("no connection for sums".into()).into()),
        }
    }

    /// The validation batches of all processes, in their order.
    pub(super) fn evaluated(&self, own: &[Evaluated]) -> Result<Vec<Evaluated>, RankError> {
        let own: Vec<[u64; 5]> = own
            .iter()
            .map(|(number, totals, tokens)| {
                [
                    *number as u64,
                    totals.nll.to_bits(),
                    totals.correct.to_bits(),
                    totals.targets as u64,
                    *tokens as u64,
                ]
            })
            .collect();
        let all: Vec<Vec<[u64; 5]>> = self.exchange("the validation", &own)?;
        let mut all: Vec<Evaluated> = all
            .into_iter()
            .flatten()
            .map(|[number, nll, correct, targets, tokens]| {
                let totals = LossTotals {
                    nll: f64::from_bits(nll),
                    correct: f64::from_bits(correct),
                    targets: targets as usize,
                };
                (number as usize, totals, tokens as usize)
            })
            .collect();
        all.sort_by_key(|(number, ..)| *number);
        Ok(all)
    }

    /// The reports of all processes in the order of their batches; `own` are those of this one's devices.
    pub(super) fn generated(
        &self,
        own: Vec<Vec<Vec<Generated>>>,
    ) -> Result<Vec<Vec<Vec<Generated>>>, RankError> {
        let all: Vec<Vec<Vec<Vec<Generated>>>> = self.exchange("the generated reports", &own)?;
        Ok(all.into_iter().flatten().collect())
    }

    /// Makes sure that all processes have the same weights.
    pub(super) fn compare(&self, own: &[u64], step: usize) -> Result<(), RankError> {
        let mut hash = DefaultHasher::new();
        own.iter().for_each(|digest| hash.write_u64(*digest));
        let all: Vec<(u64, Vec<u64>)> =
            self.exchange("comparing the weights", &(hash.finish(), own.to_vec()))?;
        let first = &all[0].1;
        for (rank, (_, other)) in all.iter().enumerate().skip(1) {
            let differing: Vec<usize> = (0..first.len().max(other.len()))
                .filter(|place| first.get(*place) != other.get(*place))
                .collect();
            if let Some(place) = differing.first() {
                return Err(RankError::Apart {
                    rank: self.cluster.name(rank),
                    first: self.cluster.name(0),
                    step,
                    count: differing.len(),
                    place: place + 1,
                    all: first.len(),
                });
            }
        }
        Ok(())
    }

    fn exchange<T: Serialize + DeserializeOwned>(
        &self,
        what: &str,
        own: &T,
    ) -> Result<Vec<T>, RankError> {
        let damaged = |error: serde_json::Error| {
            ClusterError::Apart(format!("{what} of the processes cannot be read: {error}"))
        };
        let own = serde_json::to_vec(own).map_err(damaged)?;
        let parts = self.cluster.gather(what, &own)?;
        let parts = parts
            .iter()
            .map(|part| serde_json::from_slice(part).map_err(damaged));
        Ok(parts.collect::<Result<_, _>>()?)
    }
}
