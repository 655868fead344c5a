//! Training: loss and gradients, optimizer, schedule, checkpoints, the loop on Burn's Learner.

pub mod budget;
pub mod chart;
pub mod checkpoint;
pub mod checkpoint_dir;
pub mod config;
#[cfg(all(test, feature = "cuda", feature = "flex"))]
mod cuda_gradient_tests;
#[cfg(all(test, feature = "cuda", feature = "flex"))]
mod cuda_unwritten_tests;
pub mod data;
mod data_key;
mod gauges;
pub mod generation;
pub mod gradients;
pub mod image_facts;
pub mod learner;
mod lines;
pub mod loss;
pub mod loss_scale;
mod manual_backward;
mod measure;
pub mod objective;
pub mod optimizer;
pub mod options;
pub mod outcome;
pub mod parameters;
pub mod plan;
mod processes;
pub mod ranks;
pub mod records;
mod renderers;
pub mod replicas;
pub mod report_command;
mod resume;
pub mod run;
pub mod scores;
pub mod step_clock;
pub mod step_numbers;
pub mod strategy;
pub mod tape;
pub mod tfevents;

pub mod words;
