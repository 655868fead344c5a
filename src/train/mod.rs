//! Training: loss and gradients, optimizer, schedule, checkpoints, the loop on Burn's Learner.

mod by_hand;
pub mod checkpoint;
pub mod checkpoint_dir;
pub mod config;
pub mod gradients;
pub mod learner;
pub mod optimizer;
pub mod plan;
pub mod records;
pub mod run;
pub mod schedule;
pub mod strategy;
pub mod tfevents;
