//! What each launcher sets, as its documentation has it.

use std::collections::HashMap;

use super::*;

fn read_with(flags: &Flags, variables: &str) -> Result<Option<Launch>, LaunchError> {
    let variables: HashMap<&str, &str> = variables
        .split_whitespace()
        .filter_map(|pair| pair.split_once('='))
        .collect();
    Launch::read(flags, &|name| {
        variables.get(name).map(|value| value.to_string())
    })
}

fn read(variables: &str) -> Launch {
    read_with(&Flags::default(), variables).unwrap().unwrap()
}

fn refused(flags: &Flags, variables: &str) -> String {
    read_with(flags, variables).unwrap_err().to_string()
}

fn flags(nnodes: usize, node_rank: usize, master: &str) -> Flags {
    Flags {
        nnodes: Some(nnodes),
        node_rank: Some(node_rank),
        master: Some(master.into()),
    }
}

fn place(launch: &Launch) -> (usize, usize, String) {
    (launch.rank, launch.processes, launch.master.to_string())
}

const TORCHRUN: &str = "RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 \
    MASTER_ADDR=n0 MASTER_PORT=29400 TORCHELASTIC_RUN_ID=job TORCHELASTIC_RESTART_COUNT=0";

#[test]
fn every_launcher_is_read() {
    let own = read_with(&flags(2, 1, "n0:7000"), "").unwrap().unwrap();
    assert_eq!(place(&own), (1, 2, "n0:7000".into()));
    assert_eq!(own.local, None);
    let six = read_with(&flags(2, 1, "[fd00::1]:7000"), "")
        .unwrap()
        .unwrap();
    assert_eq!(six.master.to_string(), "[fd00::1]:7000");

    let swift = read("NNODES=2 NODE_RANK=1 MASTER_ADDR=n0 MASTER_PORT=29501 NPROC_PER_NODE=8");
    assert_eq!(place(&swift), (1, 2, "n0:29501".into()));
    assert_eq!((swift.local, swift.devices), (None, Some(8)));

    let kubeflow = read(
        "PET_NNODES=3 PET_NODE_RANK=2 PET_NPROC_PER_NODE=auto PET_MASTER_ADDR=job-node-0-0.job PET_MASTER_PORT=29400",
    );
    assert_eq!(place(&kubeflow), (2, 3, "job-node-0-0.job:29400".into()));
    assert_eq!(kubeflow.devices, None);

    let torchrun = read(TORCHRUN);
    assert_eq!(place(&torchrun), (3, 4, "n0:29400".into()));
    assert_eq!(
        torchrun.local,
        Some(Local {
            rank: 1,
            size: Some(2)
        })
    );
    // Its own store has the port.
    let store = read(&format!("{TORCHRUN} TORCHELASTIC_USE_AGENT_STORE=True"));
    assert_eq!(store.master.port, 29401);
    // torchrun in a Kubeflow container: its processes count, not the nodes.
    let inside = read(&format!("{TORCHRUN} PET_NNODES=2 PET_NODE_RANK=1"));
    assert_eq!(place(&inside), place(&torchrun));

    let dlc =
        read("WORLD_SIZE=2 RANK=1 MASTER_ADDR=dlc-master-0 MASTER_PORT=23456 NPROC_PER_NODE=8");
    assert_eq!(place(&dlc), (1, 2, "dlc-master-0:23456".into()));
    assert_eq!((dlc.local, dlc.devices), (None, Some(8)));

    let slurm = "SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_NTASKS=4 SLURM_NNODES=2 \
        SLURM_JOB_NODELIST=gpu[07-08] SLURM_JOB_ID=123456 SLURM_STEP_ID=0 SLURM_TASKS_PER_NODE=2(x2)";
    let srun = read(slurm);
    assert_eq!(place(&srun), (3, 4, "gpu07:18456".into()));
    assert_eq!(
        srun.local,
        Some(Local {
            rank: 1,
            size: Some(2)
        })
    );
    let a_node = read(
        "SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_NODEID=1 SLURM_NTASKS=2 SLURM_JOB_NODELIST=gpu[07-08] \
        SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_TASKS_PER_NODE=1(x2) MASTER_PORT=29500",
    );
    assert_eq!(a_node.local, None);
    assert_eq!(a_node.master.to_string(), "gpu07:29500");
    // torchrun inside srun: torchrun's processes.
    assert_eq!(
        place(&read(&format!("{slurm} {TORCHRUN}"))),
        place(&torchrun)
    );

    let mpi = read(
        "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=4",
    );
    assert_eq!(place(&mpi), (1, 4, "127.0.0.1:29500".into()));
    let pmi = read("PMI_RANK=1 PMI_SIZE=2 MASTER_ADDR=n0");
    assert_eq!(place(&pmi), (1, 2, "n0:29500".into()));
}

#[test]
fn one_process_alone_is_no_launch() {
    for variables in [
        "",
        "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=n0 MASTER_PORT=1",
        "NNODES=1",
        "PET_NNODES=1 PET_NODE_RANK=0",
        "WORLD_SIZE=1 RANK=0",
        "SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_ID=0",
        // A batch script is not one of its job's tasks.
        "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4 SLURM_JOB_ID=1 SLURM_JOB_NODELIST=n[1-4]",
        "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1",
    ] {
        assert_eq!(
            read_with(&Flags::default(), variables).unwrap(),
            None,
            "{variables}"
        );
    }
    assert_eq!(read_with(&flags(1, 0, "n0:1"), "").unwrap(), None);
}

#[test]
fn contradictions_are_refused_by_name() {
    let none = Flags::default();
    for (flags, variables, pieces) in [
        (flags(2, 2, "n0:1"), "", vec!["number 2 of 2"]),
        (
            flags(2, 1, "n0:1"),
            "NNODES=3",
            vec!["--nnodes is 2", "NNODES is 3"],
        ),
        (
            flags(2, 1, "n0:1"),
            "NODE_RANK=0",
            vec!["--node-rank is 1", "NODE_RANK is 0"],
        ),
        (
            flags(2, 1, "n0:1"),
            TORCHRUN,
            vec!["--nnodes is 2", "WORLD_SIZE 4"],
        ),
        (flags(2, 1, "n0:http"), "", vec!["--master is `n0:http`"]),
        (
            Flags {
                nnodes: Some(2),
                ..Flags::default()
            },
            "",
            vec!["--nnodes is 2 without --node-rank"],
        ),
        (
            Flags {
                node_rank: Some(1),
                ..Flags::default()
            },
            "",
            vec!["add --nnodes"],
        ),
        (none.clone(), "NNODES=2", vec!["NODE_RANK is not set"]),
        (
            none.clone(),
            "NNODES=2 NODE_RANK=1",
            vec!["--master", "MASTER_ADDR"],
        ),
        (
            none.clone(),
            "NNODES=2 PET_NNODES=3 NODE_RANK=0",
            vec!["NNODES is 2", "PET_NNODES is 3"],
        ),
        (
            none.clone(),
            "NNODES=two NODE_RANK=0",
            vec!["NNODES is `two`"],
        ),
        (
            none.clone(),
            "PET_NNODES=1:4 PET_NODE_RANK=0",
            vec!["range `1:4`"],
        ),
        (
            none.clone(),
            "NNODES=2 NODE_RANK=0 WORLD_SIZE=5 MASTER_ADDR=n0",
            vec!["NNODES is 2", "WORLD_SIZE is 5"],
        ),
        (
            none.clone(),
            "RANK=4 LOCAL_RANK=0 WORLD_SIZE=4 MASTER_ADDR=n0 MASTER_PORT=1",
            vec!["number 4 of 4"],
        ),
        (
            none.clone(),
            "RANK=1 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2 WORLD_SIZE=4 MASTER_ADDR=n0",
            vec!["LOCAL_RANK is 2", "LOCAL_WORLD_SIZE is 2"],
        ),
        (
            none.clone(),
            "RANK=1 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 WORLD_SIZE=4 NNODES=3 MASTER_ADDR=n0",
            vec!["NNODES is 3", "WORLD_SIZE is 4"],
        ),
        (none.clone(), "WORLD_SIZE=2 RANK=1", vec!["MASTER_ADDR"]),
        (
            none,
            "WORLD_SIZE=2 RANK=1 MASTER_ADDR=n0 MASTER_PORT=70000",
            vec!["MASTER_PORT is 70000"],
        ),
    ] {
        let text = refused(&flags, variables);
        for piece in pieces {
            assert!(text.contains(piece), "{variables}: {text}");
        }
    }
}

#[test]
fn devices_follow_the_launcher() {
    let names = |names: &[&str]| -> Vec<String> { names.iter().map(|n| n.to_string()).collect() };
    let node = read("NNODES=2 NODE_RANK=1 MASTER_ADDR=n0 NPROC_PER_NODE=2");
    assert_eq!(node.devices(&[], None, true).unwrap(), ["cuda:0", "cuda:1"]);
    assert!(node.devices(&[], None, false).unwrap().is_empty());
    let text = node.devices(&names(&["cuda:0"]), None, true).unwrap_err();
    assert!(text.to_string().contains("NPROC_PER_NODE is 2"), "{text}");

    let card = read(TORCHRUN);
    assert_eq!(card.devices(&[], None, true).unwrap(), ["cuda:1"]);
    assert_eq!(card.devices(&[], Some("0,1"), true).unwrap(), ["cuda:1"]);
    // srun --gpus-per-task=1 shows each its own.
    assert_eq!(card.devices(&[], Some("5"), true).unwrap(), ["cuda:0"]);
    assert_eq!(card.devices(&names(&["cpu"]), None, true).unwrap(), ["cpu"]);
    let both = names(&["cuda:2", "cuda:3"]);
    assert_eq!(card.devices(&both, None, true).unwrap(), ["cuda:3"]);
    let text = card.devices(&names(&["cuda:0"]), None, true).unwrap_err();
    assert!(text.to_string().contains("LOCAL_RANK"), "{text}");
    let three = names(&["cuda:0", "cuda:1", "cuda:2"]);
    let text = card.devices(&three, None, true).unwrap_err();
    assert!(text.to_string().contains("names 3"), "{text}");
}
