//! Trained and held-out rewards over a run, to see when they part.

use serde::{Deserialize, Serialize};

/// Trained and held-out rewards over the rollouts of a run, to see when they part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RewardWatch {
    /// Rollouts so far.
    rollouts: usize,
    /// Moving averages, trained and held out.
    averages: [f64; 2],
    /// Both when the held-out average was best.
    best: Option<[f64; 2]>,
    /// Rollouts in a row since the two have parted.
    pub parted: usize,
}

impl RewardWatch {
    /// Share of the past in the moving averages.
    const DECAY: f64 = 0.9;

    /// How far below its best the held-out average counts as fallen.
    const FALLEN: f64 = 0.01;

    /// Adds a rollout.
    pub(super) fn add(&mut self, trained: f64, held_out: f64) {
        let past = match self.rollouts {
            0 => 0.0,
            _ => Self::DECAY,
        };
        self.rollouts += 1;
        for (average, value) in self.averages.iter_mut().zip([trained, held_out]) {
            *average = past * *average + (1.0 - past) * value;
        }
        let [now, held] = self.averages;
        match self.best {
            Some([_, best]) if held <= best => {}
            _ => self.best = Some(self.averages),
        }
        let [then, best] = self.best.unwrap_or(self.averages);
        let apart = held < best - Self::FALLEN && now > then;
        self.parted = if apart { self.parted + 1 } else { 0 };
    }
}
