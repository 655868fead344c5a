//! A batch run on several machines: every process answers its share, the first writes the file.

use std::{sync::Arc, time::Duration};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{InferArgs, record::settings_hash, task::Task};
use crate::{
    accelerate::devices::has_cuda,
    adapters::lora::base::BaseFingerprint,
    base::device_name::DeviceName,
    cluster::{Cluster, ClusterError, Launch},
    commands::{cluster_args::visible_cards, usage::UsageError},
};

/// Which process this is; several are for batch runs alone.
pub(super) fn launch(args: &InferArgs) -> Result<Option<Launch>> {
    let launch = args.cluster.launch()?;
    if let Some(launch) = &launch {
        if args.output.is_none() {
            bail!(UsageError(format!(
                "this is {} {} of {}, and several are for batch runs: give --output (node 0 writes it), or start one process alone",
                launch.noun(),
                launch.rank,
                launch.processes
            )));
        }
        if args.server.is_some() || args.show_tags {
            bail!(UsageError(
                "--server and --show-tags are for one process; start it alone".into()
            ));
        }
    }
    let timeout = args.cluster_timeout;
    if !(timeout > 0.0 && timeout.is_finite()) {
        bail!(UsageError(format!(
            "--cluster-timeout is {timeout}, expected seconds above 0"
        )));
    }
    Ok(launch)
}

/// The devices of this process.
pub(super) fn devices(launch: &Launch, named: &[DeviceName]) -> Result<Vec<DeviceName>> {
    let named: Vec<String> = named.iter().map(ToString::to_string).collect();
    let devices = launch
        .devices(&named, visible_cards().as_deref(), has_cuda())
        .map_err(|error| UsageError(error.to_string()))?;
    let devices = devices.iter().map(|name| name.parse());
    Ok(devices.collect::<Result<_, _>>().map_err(UsageError)?)
}

pub(super) fn meet(args: &InferArgs, launch: Launch, devices: usize) -> Result<Arc<Cluster>> {
    let patience = Duration::from_secs_f64(args.cluster_timeout);
    let names = vec!["device".to_string(); devices];
    args.cluster.meet(launch, names, patience)
}

/// What processes compare before they begin.
#[derive(Serialize, Deserialize)]
struct Plan {
    /// Hash of what is to be reported on.
    tasks: String,
    /// Hash of the settings of the answers.
    settings: String,
    /// Fingerprint of the weights.
    weights: String,
    /// Places of the reports that are still to be written; of the first process alone.
    todo: Option<Vec<usize>>,
}

/// The reports to write, which the first process knows from its file.
pub(super) fn agree<'a>(
    cluster: &Cluster,
    args: &InferArgs,
    tasks: &'a [Task],
    todo: Option<Vec<&Task>>,
) -> Result<Vec<&'a Task>> {
    let mut hash = Sha256::new();
    for task in tasks {
        hash.update(format!("{:?}", task.key()));
        if let Some(question) = task.question() {
            hash.update(&question.sha256);
        }
    }
    let places = todo.map(|todo| {
        let is_there = |task: &&Task| todo.iter().any(|other| std::ptr::eq(*other, *task));
        let places = tasks.iter().enumerate();
        places
            .filter(|(_, task)| is_there(task))
            .map(|(place, _)| place)
            .collect()
    });
    let model = args.model.model.as_path();
    let own = Plan {
        tasks: format!("{:x}", hash.finalize()),
        settings: tasks
            .first()
            .map_or_else(String::new, |task| settings_hash(args, task.kind())),
        weights: BaseFingerprint::of(model, &args.model.load.gguf.parts())?.sha256,
        todo: places,
    };
    let parts = cluster.gather("comparing the reports to write", &serde_json::to_vec(&own)?)?;
    let plans = parts
        .iter()
        .map(|part| serde_json::from_slice(part))
        .collect::<Result<Vec<Plan>, _>>()?;
    let first = &plans[0];
    for (rank, plan) in plans.iter().enumerate() {
        let what = match plan {
            plan if plan.tasks != first.tasks => "other images or rows",
            plan if plan.weights != first.weights => "other weights",
            plan if plan.settings != first.settings => "another model name or other settings",
            _ => continue,
        };
        let text = format!(
            "{} has {what} than {}; give all the same command, and the same files under the same names",
            cluster.name(rank),
            cluster.name(0)
        );
        return Err(ClusterError::Apart(text).into());
    }
    let todo = first.todo.iter().flatten();
    Ok(todo.filter_map(|place| tasks.get(*place)).collect())
}

/// The smallest batch of all processes: their groups of reports are the same.
pub(super) fn smallest(cluster: &Cluster, batch_size: usize) -> Result<usize> {
    let parts = cluster.gather("comparing batch sizes", &(batch_size as u64).to_le_bytes())?;
    let sizes = parts
        .iter()
        .filter_map(|part| part.as_slice().try_into().ok().map(u64::from_le_bytes));
    Ok(sizes.min().unwrap_or(1) as usize)
}

/// Leaves with the others, or ends them with this process's error.
pub(super) fn end(cluster: &Cluster, ended: Result<()>) -> Result<()> {
    // Reports that failed are records like the others: the file is whole.
    if let Err(error) = ended {
        let is_end = matches!(error.downcast_ref(), Some(ClusterError::Ended(_)));
        if !is_end {
            cluster.fail(&format!("{error:#}"));
            return Err(error);
        }
        bail!(
            "{error}; the reports written so far are kept, and the same command on all nodes goes on"
        );
    }
    cluster.finish()?;
    if !cluster.is_first() {
        eprintln!("done; {} has written the file", cluster.name(0));
    }
    Ok(())
}
