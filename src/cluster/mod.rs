//! Several processes, on one machine or many, that do one piece of work together.
//!
//! [`launch`] reads from flags and from what a launcher (torchrun, SLURM, MPI, Kubernetes …) puts into the
//! environment which process this is. The first process listens (`hub`); all of them, itself included,
//! connect to it (`member`), prove that they have the same key (`key`), and then take every decision
//! together: each sends its part, all receive all parts in the order of the processes. Heartbeats on the same
//! connections show who is gone. [`chain`] adds up numbers over connections from neighbour to neighbour.
//! This module knows nothing of training.

pub mod chain;
mod errors;
mod hub;
pub mod key;
pub mod launch;
mod meeting;
mod member;
mod peer;
mod pending;
#[cfg(test)]
mod tests;
mod wire;

pub use errors::ClusterError;
pub use key::Key;
pub use launch::{Flags, Launch, LaunchError};
pub use meeting::{Cluster, Meeting};
pub use peer::Peer;
