//! Training: loss and gradients, optimizer, schedule, checkpoints, the loop on Burn's Learner.

pub mod gradients;
pub mod optimizer;
