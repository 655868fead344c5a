//! From `--model` and `--adapter` to folders: the one place where commands find, and download, what was named.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;

use super::{
    progress::{Progress, Unit},
    shell::{program, shell_word},
    shipped::shipped,
    usage::UsageError,
};
use crate::base::{
    files::size_text,
    hub::{
        HubError, Want,
        name::{Hub, ModelId},
        pull::{FileEvent, PullEvent, PullOptions, Pulled, pull},
        resolve::{Resolved, resolve},
        settings::HubSettings,
    },
};

/// Whether a command may download a model that it is given the name of.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct DownloadArgs {
    /// Download the model and the adapter if they are named by OWNER/NAME and not on this machine.
    ///
    /// Without it nothing is fetched; `pull` downloads beforehand. See `help pull`.
    #[arg(long)]
    pub download: bool,
}

/// The folder of what was named: a folder, or a name on Hugging Face or ModelScope that was downloaded before.
///
/// Remarks on the choice go to stderr.
///
/// # Errors
/// Nothing of that name, with the commands that bring it; or a download that fails.
pub(super) fn find(typed: &Path, want: Want, args: DownloadArgs) -> Result<PathBuf> {
    let settings = HubSettings::from_env();
    let found = match resolve(typed, want, &settings, &shipped) {
        Err(HubError::Absent { id, .. }) if args.download => {
            let options = PullOptions {
                want,
                include: Vec::new(),
                output: None,
            };
            let pulled = download(&id, &options, &settings)?;
            eprintln!("{}", summary(&pulled));
            // What came is looked at like what was there: it may lack a part.
            match resolve(typed, want, &settings, &shipped) {
                Err(HubError::Absent { looked, .. }) => {
                    bail!(
                        "`{id}` was downloaded and is no whole {}: {}",
                        want.noun(),
                        looked.join("; ")
                    )
                }
                found => found,
            }
        }
        found => found,
    };
    let Resolved {
        folder,
        id,
        remarks,
        ..
    } = match found {
        Ok(found) => found,
        Err(HubError::Absent { id, looked }) => {
            let ways = ways(&id, &settings);
            let own = format!("{} pull {}", program(), shell_word(&id.to_string()));
            bail!(
                "{}; download it with `{own}` (or add --download){ways}",
                HubError::Absent { id, looked }
            );
        }
        Err(error) => return Err(usage(error)),
    };
    for remark in &remarks {
        eprintln!("note: {remark}");
    }
    if args.download && id.is_none() && remarks.is_empty() {
        let is_name = typed.to_str().map(ModelId::parse);
        if let Some(Ok(Some(_))) = is_name {
            eprintln!(
                "note: `{}` is a folder here, which is taken; nothing is downloaded",
                typed.display()
            );
        }
    }
    Ok(folder)
}

/// A name that is none was typed wrongly.
pub(super) fn usage(error: HubError) -> anyhow::Error {
    match error {
        HubError::Name(_) => UsageError(error.to_string()).into(),
        error => error.into(),
    }
}

/// The commands of the hubs' own tools, as the end of a list.
fn ways(id: &ModelId, settings: &HubSettings) -> String {
    let hubs = match id.hub {
        Some(hub) => vec![hub],
        None if settings.default_hub == Hub::ModelScope => vec![Hub::ModelScope, Hub::HuggingFace],
        None => vec![Hub::HuggingFace, Hub::ModelScope],
    };
    let revision = id.revision.as_deref();
    let revision = revision.map_or_else(String::new, |name| format!(" --revision {name}"));
    let commands = hubs.into_iter().map(|hub| match hub {
        Hub::HuggingFace => format!("`hf download {}{revision}`", id.id),
        Hub::ModelScope => format!("`modelscope download --model {}{revision}`", id.id),
    });
    let commands: Vec<String> = commands.collect();
    match commands.as_slice() {
        [some @ .., last] if !some.is_empty() => format!(", {} or {last}", some.join(", ")),
        all => format!(" or {}", all.concat()),
    }
}

/// Downloads with progress on stderr.
pub(super) fn download(
    id: &ModelId,
    options: &PullOptions,
    settings: &HubSettings,
) -> Result<Pulled, HubError> {
    let progress = std::sync::Mutex::new(Progress::new("downloading", 0, Unit::Bytes));
    let pulled = pull(id, options, settings, &|event| {
        let mut progress = progress.lock().unwrap_or_else(|lock| lock.into_inner());
        match event {
            PullEvent::Retry { reason, wait } => progress.say(&format!(
                "the hub does not answer ({reason}); again in {:.1} s",
                wait.as_secs_f64()
            )),
            PullEvent::Listed {
                hub,
                revision,
                files,
                bytes,
                folder,
            } => progress.say(&format!(
                "`{}` of {hub}, revision {revision}: {files} files, {}, into `{}`",
                id.id,
                size_text(bytes),
                folder.display()
            )),
            PullEvent::Bytes { done, total, found } => {
                progress.skip(found);
                progress.set(done, total);
            }
            PullEvent::File { file, event } => {
                if let Some(line) = file_line(file, &event) {
                    progress.say(&line);
                }
            }
        }
    });
    let progress = progress.into_inner();
    progress.unwrap_or_else(|lock| lock.into_inner()).finish();
    pulled
}

fn file_line(file: &str, event: &FileEvent) -> Option<String> {
    Some(match event {
        FileEvent::Retry { reason, wait } => {
            format!("{file}: {reason}; again in {:.1} s", wait.as_secs_f64())
        }
        FileEvent::Damaged { what } => {
            format!("{file}: its {what} is not the one the hub lists; deleted, once more")
        }
        FileEvent::Waiting => format!("{file}: another process downloads it; waiting"),
        FileEvent::Replaced => format!("{file}: what was there differs and is replaced"),
        FileEvent::Done => format!("{file}: whole"),
        FileEvent::Bytes(_) | FileEvent::Found(_) => return None,
    })
}

/// What was downloaded, in a sentence.
pub(super) fn summary(pulled: &Pulled) -> String {
    let files = match pulled.files {
        1 => "1 file".to_owned(),
        files => format!("{files} files"),
    };
    format!(
        "{files}, {}, revision {} of {}: {}",
        size_text(pulled.bytes),
        pulled.revision,
        pulled.hub,
        pulled.kind
    )
}
