//! The arguments of commands that several processes may run together.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Result;
use clap::Args;

use super::usage::UsageError;
use crate::{
    base::build_info::COMMIT,
    cluster::{Cluster, Flags, Key, Launch, Meeting},
};

/// Several machines. Without these, what torchrun, SLURM, Kubernetes or MPI put into the environment is read.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Several machines")]
pub struct ClusterArgs {
    /// Number of nodes (processes) that work together; each is started with the same command, but for --node-rank.
    #[arg(long, value_name = "N")]
    pub nnodes: Option<usize>,
    /// Number of this node, from 0; node 0 writes the results.
    #[arg(long, value_name = "N")]
    pub node_rank: Option<usize>,
    /// Where node 0 listens.
    #[arg(long, value_name = "HOST:PORT")]
    pub master: Option<String>,
    /// Secret that all nodes share; without one, whoever reaches the port can take part. Others can see it in the list of
    /// processes: prefer the variable or the file.
    #[arg(
        long,
        value_name = "KEY",
        env = "XRAY_CLUSTER_KEY",
        hide_env_values = true
    )]
    pub cluster_key: Option<String>,
    /// File with the secret.
    #[arg(long, value_name = "FILE", env = "XRAY_CLUSTER_KEY_FILE")]
    pub cluster_key_file: Option<PathBuf>,
    /// Address to listen at, if not the one that --master names (0.0.0.0 listens at all of them).
    #[arg(long, value_name = "ADDRESS", env = "XRAY_CLUSTER_BIND")]
    pub cluster_bind: Option<String>,
}

impl ClusterArgs {
    /// Which process this is, of how many; `None` where it works alone.
    ///
    /// # Errors
    /// [`UsageError`]: flags or variables are wrong or contradict each other.
    pub(super) fn launch(&self) -> Result<Option<Launch>> {
        let flags = Flags {
            nnodes: self.nnodes,
            node_rank: self.node_rank,
            master: self.master.clone(),
        };
        let launch = Launch::read(&flags, &|name| std::env::var(name).ok())
            .map_err(|error| UsageError(error.to_string()))?;
        if let Some(launch) = &launch {
            eprintln!("{}", launch.sentence());
        }
        Ok(launch)
    }

    /// Meets the other processes.
    ///
    /// # Errors
    /// The key, the port, or processes that do not come.
    pub(super) fn meet(
        &self,
        launch: Launch,
        devices: Vec<String>,
        patience: Duration,
    ) -> Result<Arc<Cluster>> {
        let key = Key::load(
            self.cluster_key.as_deref(),
            self.cluster_key_file.as_deref(),
        )
        .map_err(|error| UsageError(error.to_string()))?;
        if key.is_none() && launch.rank == 0 {
            eprintln!(
                "note: no --cluster-key: whoever reaches {} can take part; a key in XRAY_CLUSTER_KEY on all nodes prevents that",
                launch.master
            );
        }
        let cluster = Cluster::meet(Meeting {
            launch,
            key,
            bind: self.cluster_bind.clone(),
            program: format!("xray-qwen3vl {} ({COMMIT})", env!("CARGO_PKG_VERSION")),
            devices,
            patience,
            tell: Arc::new(|line| eprintln!("{line}")),
        })?;
        end_with_the_others(&cluster);
        Ok(cluster)
    }
}

/// How long a process may take to end by itself once the work of all has ended.
const GRACE: Duration = Duration::from_secs(60);

/// A device that waits for another process may wait for ever: the process ends all the same.
fn end_with_the_others(cluster: &Arc<Cluster>) {
    let grace = cluster.patience().min(GRACE);
    cluster.on_end(move |reason| {
        let reason = reason.to_string();
        std::thread::spawn(move || {
            std::thread::sleep(grace);
            eprintln!(
                "error: {reason}; this process did not end by itself within {} s",
                grace.as_secs_f64()
            );
            std::process::exit(1);
        });
    });
}

/// Cards that CUDA shows to this process, as the environment says.
pub(super) fn visible_cards() -> Option<String> {
    std::env::var("CUDA_VISIBLE_DEVICES").ok()
}
