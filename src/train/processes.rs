//! A run in several processes: what they compare before they begin, which checkpoint they continue from, and where
//! those that do not write keep what they need.

use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    checkpoint::{TrainerState, read_state},
    config::TrainConfig,
    data::RunData,
    outcome::TrainError,
    resume::RunFacts,
};
use crate::{
    base::files::{COMPLETE_MARKER, Depth, FileError, verify_folder},
    cluster::{Cluster, ClusterError},
};

/// Keys that may differ between the processes of a run: they change no number of it, and no process waits for
/// another because of them. Files are compared by their contents.
const OWN: &[&str] = &[
    "output_dir",
    "device",
    "logging_steps",
    "report_to",
    "report_command",
    "dataloader_num_workers",
    "memory_budget",
    "gradient_checkpointing",
    "recompute_pointwise",
    "vit_gradient_checkpointing",
    "allow_image_urls",
    "save_total_limit",
    "model",
    "mmproj",
    "tokenizer",
    "adapter",
    "train_data",
    "val_data",
];

/// Bytes of a file that are handed out at once.
const PIECE: u64 = 4 << 20;

/// One thing that has to be the same everywhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Fact {
    /// What it is, the same in all processes.
    key: String,
    /// What the process calls it: the key, or the file that a hash stands for.
    name: String,
    value: String,
    /// Whether the value says something to a reader.
    is_shown: bool,
}

/// Makes sure that all processes have the same settings, data and weights.
///
/// # Errors
/// [`ClusterError::Apart`] names the first process that differs, and in what.
pub(super) fn compare(
    cluster: &Cluster,
    config: &TrainConfig,
    random_init: bool,
    data: &RunData,
    facts: &RunFacts,
) -> Result<(), TrainError> {
    let own = facts_of(config, random_init, data, facts);
    let own = serde_json::to_vec(&own).unwrap_or_default();
    let parts = cluster.gather("comparing settings, data and weights", &own)?;
    let all: Vec<Vec<Fact>> = parts
        .iter()
        .map(|part| serde_json::from_slice(part))
        .collect::<Result<_, _>>()
        .map_err(|error| ClusterError::Apart(format!("facts of a process: {error}")))?;
    let differing = all
        .iter()
        .enumerate()
        .find_map(|(rank, other)| difference(&all[0], other).map(|text| (rank, text)));
    match differing {
        Some((rank, text)) => Err(ClusterError::Apart(format!(
            "{} {}",
            cluster.name(rank),
            text.replace("NODE_0", &cluster.name(0))
        ))
        .into()),
        None => Ok(()),
    }
}

/// In what a process differs from the first, as the rest of a sentence.
fn difference(first: &[Fact], other: &[Fact]) -> Option<String> {
    for fact in first {
        match other.iter().find(|other| other.key == fact.key) {
            Some(same) if same.value == fact.value => {}
            Some(differs) if fact.is_shown => {
                return Some(format!(
                    "has `{}` = {}, and NODE_0 {}; give all the same settings",
                    fact.name, differs.value, fact.value
                ));
            }
            Some(_) => {
                return Some(format!(
                    "has another {} than NODE_0; give all the same files",
                    fact.name
                ));
            }
            None => return Some(format!("has no `{}`, and NODE_0 has", fact.key)),
        }
    }
    let more = other
        .iter()
        .find(|fact| !first.iter().any(|first| first.key == fact.key))?;
    Some(format!("has `{}`, and NODE_0 has none", more.key))
}

fn facts_of(
    config: &TrainConfig,
    random_init: bool,
    data: &RunData,
    facts: &RunFacts,
) -> Vec<Fact> {
    let file = |key: &str, name: &str, value: String| Fact {
        key: key.to_string(),
        name: name.to_string(),
        value,
        is_shown: false,
    };
    let name_of = |data: &str| format!("`{data}`");
    let train = &config.train_data;
    let mut all = vec![
        file(
            "training data",
            &name_of(train),
            data.train.fingerprint().to_string(),
        ),
        file(
            "images",
            &format!("set of images beside `{train}`"),
            facts.images.digest(),
        ),
        file("base model", "base model", facts.base.clone()),
    ];
    if let Some(validation) = &data.validation {
        let name = config.val_data.as_deref().unwrap_or("validation data");
        all.push(file(
            "validation data",
            &format!("`{name}` (validation)"),
            validation.fingerprint().to_string(),
        ));
        all.push(file(
            "validation images",
            "set of validation images",
            facts.val_images.digest(),
        ));
    }
    let table = toml::Table::try_from(config).unwrap_or_default();
    let keys = table
        .iter()
        .filter(|(key, _)| !OWN.contains(&key.as_str()))
        .map(|(key, value)| Fact {
            key: key.clone(),
            name: key.clone(),
            value: value.to_string(),
            is_shown: true,
        });
    all.extend(keys);
    all.push(Fact {
        key: "random_init".into(),
        name: "random_init".into(),
        value: random_init.to_string(),
        is_shown: true,
    });
    all
}

/// A folder of a process that does not write into the run's: removed with it.
#[derive(Debug)]
pub(super) struct Scratch(PathBuf);

impl Scratch {
    /// # Errors
    /// The system's temporary folder cannot be written.
    pub(super) fn create(rank: usize) -> Result<Self, FileError> {
        let name = format!("xray-qwen3vl-{}-rank-{rank}", std::process::id());
        let path = std::env::temp_dir().join(name);
        // Left by a process of the same number that was killed.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).map_err(|cause| FileError::write(&path, cause))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The checkpoint that the first process continues from.
#[derive(Serialize, Deserialize)]
struct Chosen {
    path: PathBuf,
    /// Its list of files with their hashes.
    marker: String,
}

/// The checkpoint that all continue from: the first process has found it in its folder; the others take the same
/// folder if they have it, bit for bit, else what the first one hands out.
///
/// # Errors
/// [`TrainError`].
pub(super) fn same_checkpoint(
    cluster: &Cluster,
    found: Option<(PathBuf, TrainerState)>,
    scratch: &Path,
) -> Result<Option<(PathBuf, TrainerState)>, TrainError> {
    let read = |path: &Path| -> Result<String, TrainError> {
        let marker = path.join(COMPLETE_MARKER);
        let text = fs::read_to_string(&marker);
        Ok(text.map_err(|cause| FileError::read(&marker, cause))?)
    };
    let own = match &found {
        Some((path, _)) => Some(Chosen {
            path: path.clone(),
            marker: read(path)?,
        }),
        None => None,
    };
    let own = serde_json::to_vec(&own).unwrap_or_default();
    let parts = cluster.gather("choosing the checkpoint", &own)?;
    let chosen: Option<Chosen> = serde_json::from_slice(&parts[0])
        .map_err(|error| ClusterError::Apart(format!("the checkpoint's name: {error}")))?;
    let Some(chosen) = chosen else {
        return Ok(None);
    };
    let is_here = cluster.is_first()
        || read(&chosen.path).is_ok_and(|marker| marker == chosen.marker)
            && verify_folder(&chosen.path, Depth::Hashes).is_ok();
    let parts = cluster.gather("looking for the checkpoint", &[u8::from(is_here)])?;
    if parts.iter().all(|part| part.as_slice() == [1]) {
        return match found {
            Some(found) => Ok(Some(found)),
            None => Ok(Some((chosen.path.clone(), read_state(&chosen.path)?))),
        };
    }
    let name = chosen.path.file_name().unwrap_or_default();
    let copy = scratch.join("handed-out").join(name);
    hand_out(cluster, &chosen, (!is_here).then_some(copy.as_path()))?;
    if let Some(found) = found {
        return Ok(Some(found));
    }
    let path = if is_here { chosen.path } else { copy };
    if !is_here {
        verify_folder(&path, Depth::Hashes).map_err(|damage| {
            TrainError::Other(format!(
                "the checkpoint that {} handed out is damaged: {damage}",
                cluster.name(0)
            ))
        })?;
    }
    let state = read_state(&path)?;
    Ok(Some((path, state)))
}

/// Sends the files of a checkpoint, piece by piece, from the first process to all; those that have it let the
/// pieces pass.
fn hand_out(cluster: &Cluster, chosen: &Chosen, into: Option<&Path>) -> Result<(), TrainError> {
    #[derive(Deserialize)]
    struct Marker {
        files: Vec<Listed>,
    }
    #[derive(Deserialize)]
    struct Listed {
        name: String,
        size: u64,
    }
    let marker: Marker = serde_json::from_str(&chosen.marker)
        .map_err(|error| ClusterError::Apart(format!("the checkpoint's list of files: {error}")))?;
    for Listed { name, size } in marker.files {
        let is_inside = Path::new(&name)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if !is_inside {
            return Err(TrainError::Other(format!(
                "the checkpoint lists `{name}`, which is not inside its folder"
            )));
        }
        let source = chosen.path.join(&name);
        let target = into.map(|folder| folder.join(&name));
        let mut out = None;
        if let Some(target) = &target {
            let failed = |cause| FileError::write(target, cause);
            if let Some(folder) = target.parent() {
                fs::create_dir_all(folder).map_err(failed)?;
            }
            out = Some(fs::File::create(target).map_err(failed)?);
        }
        for from in (0..size).step_by(PIECE as usize) {
            let mut own = Vec::new();
            if cluster.is_first() {
                let failed = |cause| FileError::read(&source, cause);
                let mut file = fs::File::open(&source).map_err(failed)?;
                file.seek(SeekFrom::Start(from)).map_err(failed)?;
                file.take(PIECE).read_to_end(&mut own).map_err(failed)?;
            }
            let parts = cluster.gather("handing out the checkpoint", &own)?;
            if let (Some(out), Some(target)) = (&mut out, &target) {
                std::io::Write::write_all(out, &parts[0])
                    .map_err(|cause| FileError::write(target, cause))?;
            }
        }
    }
    if let Some(folder) = into {
        let path = folder.join(COMPLETE_MARKER);
        fs::write(&path, &chosen.marker).map_err(|cause| FileError::write(&path, cause))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(name: &str, value: &str, is_shown: bool) -> Fact {
        Fact {
            key: name
                .trim_matches('`')
                .split('/')
                .next_back()
                .unwrap()
                .into(),
            name: name.into(),
            value: value.into(),
            is_shown,
        }
    }

    #[test]
    fn a_difference_is_named() {
        let first = [
            fact("`train.jsonl`", "aa", false),
            fact("learning_rate", "0.1", true),
        ];
        assert_eq!(difference(&first, &first), None);
        for (other, says) in [
            (
                // The name is that of the first process.
                vec![fact("`other/train.jsonl`", "bb", false), first[1].clone()],
                "has another `train.jsonl` than NODE_0",
            ),
            (
                vec![first[0].clone(), fact("learning_rate", "0.2", true)],
                "has `learning_rate` = 0.2, and NODE_0 0.1",
            ),
            (vec![first[0].clone()], "has no `learning_rate`"),
            (
                [&first[..], &[fact("max_steps", "3", true)]].concat(),
                "has `max_steps`, and NODE_0 has none",
            ),
        ] {
            let text = difference(&first, &other).unwrap();
            assert!(text.contains(says), "{text}");
        }
    }
}
