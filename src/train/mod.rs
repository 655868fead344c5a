//! Training: loss and gradients, optimizer, schedule, checkpoints, the loop on Burn's Learner.

pub mod budget;
mod by_hand;
pub mod chart;
pub mod checkpoint;
pub mod checkpoint_dir;
pub mod config;
pub mod data;
pub mod gradients;
pub mod image_facts;
pub mod learner;
mod lines;
mod measure;
pub mod optimizer;
pub mod plan;
pub mod ranks;
pub mod records;
mod renderers;
pub mod replicas;
mod resume;
pub mod run;
pub mod schedule;
pub mod step_clock;
pub mod strategy;
pub mod tfevents;
pub mod trace;
pub mod words;
