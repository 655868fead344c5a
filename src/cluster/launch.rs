//! Which process this is, of how many: from flags, or from what a launcher puts into the environment.
//!
//! The same names mean different things under different launchers: `WORLD_SIZE` counts processes under torchrun
//! and nodes on Alibaba's PAI-DLC. A process that has a `LOCAL_RANK` is one of several on its machine; one
//! that has none stands for its whole machine.

mod devices;
mod slurm;
#[cfg(test)]
mod tests;

use std::fmt;

/// Default rendezvous port of torch's launchers.
const DEFAULT_PORT: u16 = 29500;

/// What is wrong with the flags or the variables.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LaunchError(String);

fn wrong(text: impl Into<String>) -> LaunchError {
    LaunchError(text.into())
}

/// The flags of this program.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// `--nnodes`.
    pub nnodes: Option<usize>,
    /// `--node-rank`.
    pub node_rank: Option<usize>,
    /// `--master`.
    pub master: Option<String>,
}

/// Where the first process listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Name or number.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Place among the processes of one machine, where a launcher starts several there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local {
    /// From 0.
    pub rank: usize,
    /// How many there are, where the launcher says so.
    pub size: Option<usize>,
}

/// Which process this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// How many there are, two or more.
    pub processes: usize,
    /// This one, from 0.
    pub rank: usize,
    /// Where the first one listens.
    pub master: Address,
    /// Place on the machine; `None` where a process stands for its machine.
    pub local: Option<Local>,
    /// Cards that the launcher says a node has.
    pub devices: Option<usize>,
    /// What it was read from.
    pub source: String,
    /// What the launcher calls this start, the same in all processes.
    pub id: Option<String>,
}

/// Variables by name.
type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A variable's value where it is set to something.
fn text(env: Env<'_>, name: &str) -> Option<String> {
    env(name)
        .map(|value| value.trim().to_string())
        .filter(|value| !value.is_empty())
}

fn number(env: Env<'_>, name: &str) -> Result<Option<usize>, LaunchError> {
    let Some(value) = text(env, name) else {
        return Ok(None);
    };
    match value.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(wrong(format!(
            "{name} is `{value}`, expected a whole number"
        ))),
    }
}

/// A number of nodes; torchrun also takes a range, which is a fixed number where both ends are equal.
fn nodes(env: Env<'_>, name: &str) -> Result<Option<usize>, LaunchError> {
    let Some(value) = text(env, name) else {
        return Ok(None);
    };
    let number = match value.split_once(':') {
        Some((least, most)) if least == most => least.parse(),
        Some(_) => {
            return Err(wrong(format!(
                "{name} is the range `{value}`, and a run has a fixed number of nodes; set one number"
            )));
        }
        None => value.parse(),
    };
    number.map(Some).map_err(|_| {
        wrong(format!(
            "{name} is `{value}`, expected a whole number of nodes"
        ))
    })
}

/// Cards a node: torchrun's words for "as many as there are" say nothing that counts here.
fn cards(env: Env<'_>, name: &str) -> Result<Option<usize>, LaunchError> {
    match text(env, name).as_deref() {
        Some("auto" | "gpu" | "cpu") => Ok(None),
        _ => number(env, name),
    }
}

/// A value that is named in several places: they have to agree.
#[derive(Default)]
struct Same {
    found: Option<(String, usize)>,
}

impl Same {
    fn add(&mut self, name: &str, value: Option<usize>) -> Result<(), LaunchError> {
        match (&self.found, value) {
            (Some((first, known)), Some(value)) if *known != value => Err(wrong(format!(
                "{first} is {known} and {name} is {value}; leave one of them out, or make them the same"
            ))),
            (None, Some(value)) => {
                self.found = Some((name.to_string(), value));
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Launch {
    /// Which process this is; `None` where it works alone.
    ///
    /// Flags come first, then a launcher that starts one process a card (torchrun), `NNODES` and `NODE_RANK`,
    /// `PET_NNODES` (Kubeflow), `WORLD_SIZE` and `RANK` without a `LOCAL_RANK` (PAI-DLC, PyTorchJob), SLURM, Open
    /// MPI and MPICH.
    ///
    /// # Errors
    /// [`LaunchError`] names what is missing, out of range, or contradicts something else.
    pub fn read(flags: &Flags, env: Env<'_>) -> Result<Option<Self>, LaunchError> {
        let found = match Self::of_flags(flags, env)? {
            Some(found) => Some(found),
            None => {
                let sources = [
                    Self::of_torchrun,
                    Self::of_nodes,
                    Self::of_ranks,
                    Self::of_slurm,
                    Self::of_mpi,
                ];
                let mut found = None;
                for source in sources {
                    if found.is_none() {
                        found = source(flags, env)?;
                    }
                }
                found
            }
        };
        let Some(launch) = found else {
            return match flags.master.is_some() || flags.node_rank.is_some() {
                true => Err(wrong(
                    "--master or --node-rank is given, and nothing says how many nodes there are; add --nnodes",
                )),
                false => Ok(None),
            };
        };
        if launch.rank >= launch.processes {
            return Err(wrong(format!(
                "{}: this is number {} of {}, and numbers start at 0",
                launch.source, launch.rank, launch.processes
            )));
        }
        Ok((launch.processes > 1).then_some(launch))
    }

    /// What to say of it.
    pub fn sentence(&self) -> String {
        let what = if self.local.is_some() {
            "process"
        } else {
            "node"
        };
        format!(
            "{what} {} of {} (numbers start at 0), from {}; the first one is at {}",
            self.rank, self.processes, self.source, self.master
        )
    }

    /// What messages call a process of this launch.
    pub fn noun(&self) -> &'static str {
        if self.local.is_some() {
            "process"
        } else {
            "node"
        }
    }

    fn of_flags(flags: &Flags, env: Env<'_>) -> Result<Option<Self>, LaunchError> {
        let Some(nnodes) = flags.nnodes else {
            return Ok(None);
        };
        if let (Some(rank), Some(world)) = (number(env, "RANK")?, number(env, "WORLD_SIZE")?)
            && number(env, "LOCAL_RANK")?.is_some()
            && (world != nnodes || flags.node_rank.is_some_and(|own| own != rank))
        {
            return Err(wrong(format!(
                "--nnodes is {nnodes}, and a launcher started this process as RANK {rank} of WORLD_SIZE {world}; leave out --nnodes and --node-rank, the launcher's numbers are read"
            )));
        }
        let mut count = Same::default();
        count.add("--nnodes", Some(nnodes))?;
        count.add("NNODES", nodes(env, "NNODES")?)?;
        count.add("PET_NNODES", nodes(env, "PET_NNODES")?)?;
        if nnodes == 0 {
            return Err(wrong("--nnodes is 0, expected at least 1"));
        }
        let mut rank = Same::default();
        rank.add("--node-rank", flags.node_rank)?;
        rank.add("NODE_RANK", number(env, "NODE_RANK")?)?;
        rank.add("PET_NODE_RANK", number(env, "PET_NODE_RANK")?)?;
        let rank = match rank.found {
            Some((_, rank)) => rank,
            None if nnodes == 1 => 0,
            None => {
                return Err(wrong(format!(
                    "--nnodes is {nnodes} without --node-rank; give each node its number, from 0 to {}",
                    nnodes - 1
                )));
            }
        };
        if nnodes == 1 && rank == 0 {
            return Ok(Some(Self::alone("--nnodes")));
        }
        Ok(Some(Self {
            processes: nnodes,
            rank,
            master: master(flags, env, &["MASTER_ADDR", "PET_MASTER_ADDR"], None)?,
            local: None,
            devices: first(cards(env, "NPROC_PER_NODE")?, || {
                cards(env, "PET_NPROC_PER_NODE")
            })?,
            source: "--nnodes and --node-rank".into(),
            id: None,
        }))
    }

    fn alone(source: &str) -> Self {
        Self {
            processes: 1,
            rank: 0,
            master: Address {
                host: "127.0.0.1".into(),
                port: DEFAULT_PORT,
            },
            local: None,
            devices: None,
            source: source.into(),
            id: None,
        }
    }

    /// `RANK`, `WORLD_SIZE` and `LOCAL_RANK`: one of several processes of its machine.
    fn of_torchrun(flags: &Flags, env: Env<'_>) -> Result<Option<Self>, LaunchError> {
        let numbers = (
            number(env, "RANK")?,
            number(env, "WORLD_SIZE")?,
            number(env, "LOCAL_RANK")?,
        );
        let (Some(rank), Some(processes), Some(local_rank)) = numbers else {
            return Ok(None);
        };
        let size = number(env, "LOCAL_WORLD_SIZE")?;
        if let Some(size) = size.filter(|size| local_rank >= *size) {
            return Err(wrong(format!(
                "LOCAL_RANK is {local_rank} and LOCAL_WORLD_SIZE is {size}"
            )));
        }
        let group = text(env, "NNODES").filter(|value| !value.contains(':'));
        if let (Some(size), Some(_)) = (size, group)
            && let Some(nodes) = nodes(env, "NNODES")?
            && nodes * size != processes
        {
            return Err(wrong(format!(
                "NNODES is {nodes} and LOCAL_WORLD_SIZE is {size}, which makes {}, but WORLD_SIZE is {processes}",
                nodes * size
            )));
        }
        if processes == 1 && rank == 0 {
            return Ok(Some(Self::alone("torchrun")));
        }
        let mut master = master(flags, env, &["MASTER_ADDR"], None)?;
        let mut source = "torchrun's RANK, WORLD_SIZE and LOCAL_RANK".to_string();
        // torchrun's own store listens at MASTER_PORT then.
        let is_taken = text(env, "TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True");
        if is_taken && flags.master.is_none() {
            master.port = master.port.checked_add(1).unwrap_or(DEFAULT_PORT);
            source.push_str(" (the port after MASTER_PORT, where torchrun itself listens)");
        }
        Ok(Some(Self {
            processes,
            rank,
            master,
            local: Some(Local {
                rank: local_rank,
                size,
            }),
            devices: None,
            source,
            id: text(env, "TORCHELASTIC_RUN_ID"),
        }))
    }

    /// `NNODES` and `NODE_RANK`, or the same with `PET_`: one process a node.
    fn of_nodes(flags: &Flags, env: Env<'_>) -> Result<Option<Self>, LaunchError> {
        let mut count = Same::default();
        count.add("NNODES", nodes(env, "NNODES")?)?;
        count.add("PET_NNODES", nodes(env, "PET_NNODES")?)?;
        let Some((name, processes)) = count.found else {
            return Ok(None);
        };
        let mut rank = Same::default();
        rank.add("--node-rank", flags.node_rank)?;
        rank.add("NODE_RANK", number(env, "NODE_RANK")?)?;
        rank.add("PET_NODE_RANK", number(env, "PET_NODE_RANK")?)?;
        let prefix = if name == "NNODES" { "" } else { "PET_" };
        let rank = match rank.found {
            Some((_, rank)) => rank,
            None if processes == 1 => 0,
            None => {
                return Err(wrong(format!(
                    "{name} is {processes} and {prefix}NODE_RANK is not set; give each node its number, from 0"
                )));
            }
        };
        let devices = first(cards(env, "NPROC_PER_NODE")?, || {
            cards(env, "PET_NPROC_PER_NODE")
        })?;
        // PAI-DLC's names beside ms-swift's.
        if let Some(world) = number(env, "WORLD_SIZE")?
            && world != processes
            && Some(world) != devices.map(|devices| devices * processes)
        {
            return Err(wrong(format!(
                "{name} is {processes} and WORLD_SIZE is {world}, which is neither the nodes nor their cards; unset one of them"
            )));
        }
        if processes == 1 && rank == 0 {
            return Ok(Some(Self::alone(&name)));
        }
        Ok(Some(Self {
            processes,
            rank,
            master: master(flags, env, &["MASTER_ADDR", "PET_MASTER_ADDR"], None)?,
            local: None,
            devices,
            source: format!("{name} and {prefix}NODE_RANK"),
            id: None,
        }))
    }

    /// `WORLD_SIZE` and `RANK` without a place on the machine: they count nodes.
    fn of_ranks(flags: &Flags, env: Env<'_>) -> Result<Option<Self>, LaunchError> {
        let (Some(rank), Some(processes)) = (number(env, "RANK")?, number(env, "WORLD_SIZE")?)
        else {
            return Ok(None);
        };
        if processes == 1 && rank == 0 {
            return Ok(Some(Self::alone("WORLD_SIZE")));
        }
        Ok(Some(Self {
            processes,
            rank,
            master: master(flags, env, &["MASTER_ADDR"], None)?,
            local: None,
            devices: cards(env, "NPROC_PER_NODE")?,
            source: "WORLD_SIZE and RANK, which count nodes as there is no LOCAL_RANK (PAI-DLC, PyTorchJob)"
                .into(),
            id: None,
        }))
    }

    fn of_slurm(flags: &Flags, env: Env<'_>) -> Result<Option<Self>, LaunchError> {
        // Only `srun` sets the number of a step: a batch script is one process, whatever it asked for.
        let Some(step) = first_text(env, &["SLURM_STEP_ID", "SLURM_STEPID"]) else {
            return Ok(None);
        };
        let processes = first(number(env, "SLURM_STEP_NUM_TASKS")?, || {
            number(env, "SLURM_NTASKS")
        })?;
        let (Some(rank), Some(processes)) = (number(env, "SLURM_PROCID")?, processes) else {
            return Ok(None);
        };
        if processes == 1 && rank == 0 {
            return Ok(Some(Self::alone("SLURM")));
        }
        let node = number(env, "SLURM_NODEID")?.unwrap_or(0);
        let tasks = first_text(env, &["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"]);
        let size = match tasks {
            Some(tasks) => slurm::tasks_of(&tasks, node)?,
            None => number(env, "SLURM_NTASKS_PER_NODE")?,
        };
        let local = match (number(env, "SLURM_LOCALID")?, size) {
            (Some(0) | None, Some(1)) | (None, None) => None,
            (rank, size) => Some(Local {
                rank: rank.unwrap_or(0),
                size,
            }),
        };
        let host = match first_text(env, &["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"]) {
            Some(list) => Some(slurm::first_host(&list)?),
            None => None,
        };
        let job = text(env, "SLURM_JOB_ID");
        let mut master = master(flags, env, &["MASTER_ADDR"], host)?;
        if text(env, "MASTER_PORT").is_none() && flags.master.is_none() {
            master.port = slurm::port(job.as_deref());
        }
        Ok(Some(Self {
            processes,
            rank,
            master,
            local,
            devices: None,
            source: format!("SLURM step {}.{step}", job.as_deref().unwrap_or("?")),
            id: job.map(|job| {
                let restarts = text(env, "SLURM_RESTART_COUNT").unwrap_or_else(|| "0".into());
                format!("{job}.{step}, restart {restarts}")
            }),
        }))
    }

    fn of_mpi(flags: &Flags, env: Env<'_>) -> Result<Option<Self>, LaunchError> {
        let launchers = [
            (
                "Open MPI",
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
            ),
            (
                "MPI's PMI",
                "PMI_RANK",
                "PMI_SIZE",
                "MPI_LOCALRANKID",
                "MPI_LOCALNRANKS",
            ),
        ];
        for (source, rank, size, local_rank, local_size) in launchers {
            let (Some(rank), Some(processes)) = (number(env, rank)?, number(env, size)?) else {
                continue;
            };
            if processes == 1 && rank == 0 {
                return Ok(Some(Self::alone(source)));
            }
            let size = number(env, local_size)?;
            let here = (size == Some(processes)).then(|| "127.0.0.1".to_string());
            let local = match (number(env, local_rank)?, size) {
                (Some(0), Some(1)) | (None, _) => None,
                (Some(rank), size) => Some(Local { rank, size }),
            };
            return Ok(Some(Self {
                processes,
                rank,
                master: master(flags, env, &["MASTER_ADDR"], here)?,
                local,
                devices: None,
                source: source.into(),
                id: None,
            }));
        }
        Ok(None)
    }
}

/// The first value, or the other where it is not set.
fn first(
    value: Option<usize>,
    other: impl FnOnce() -> Result<Option<usize>, LaunchError>,
) -> Result<Option<usize>, LaunchError> {
    match value {
        Some(value) => Ok(Some(value)),
        None => other(),
    }
}

fn first_text(env: Env<'_>, names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| text(env, name))
}

/// `HOST:PORT`, `[V6]:PORT` or a host alone.
fn address(text: &str) -> Result<Address, LaunchError> {
    let refuse = || {
        wrong(format!(
            "--master is `{text}`, expected HOST:PORT, such as 10.0.0.1:29500"
        ))
    };
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(refuse)?;
            match rest.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if rest.is_empty() => (host, None),
                None => return Err(refuse()),
            }
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let port = match port {
        Some(port) => port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(refuse)?,
        None => DEFAULT_PORT,
    };
    if host.is_empty() {
        return Err(refuse());
    }
    Ok(Address {
        host: host.to_string(),
        port,
    })
}

/// Where the first process listens.
fn master(
    flags: &Flags,
    env: Env<'_>,
    names: &[&str],
    known: Option<String>,
) -> Result<Address, LaunchError> {
    if let Some(text) = &flags.master {
        return address(text);
    }
    let Some(host) = first_text(env, names).or(known) else {
        return Err(wrong(format!(
            "nothing says where the first process is; give --master HOST:PORT, or set {} and MASTER_PORT",
            names[0]
        )));
    };
    let mut port = number(env, "MASTER_PORT")?.map(|port| ("MASTER_PORT", port));
    if port.is_none() && names.contains(&"PET_MASTER_ADDR") {
        port = number(env, "PET_MASTER_PORT")?.map(|port| ("PET_MASTER_PORT", port));
    }
    let port = match port {
        None => DEFAULT_PORT,
        Some((name, port)) => u16::try_from(port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| wrong(format!("{name} is {port}, expected 1 to 65535")))?,
    };
    Ok(Address { host, port })
}
