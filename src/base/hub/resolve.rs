//! From what was typed to a folder: a folder of that name first, then what the hubs' tools have downloaded.

use std::path::{Path, PathBuf};

use super::{
    HubError,
    cache::{Search, repo_folder, search},
    folder::{Want, is_meant, lfs_pointer},
    name::{Hub, ModelId, expand_home},
    settings::HubSettings,
};

/// A folder, and how it came to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The folder; also what was typed where that is a path to nothing, for the reader's own message.
    pub folder: PathBuf,
    /// The name on a hub that it was found by.
    pub id: Option<ModelId>,
    /// The hub whose cache it is in, where it was found by a name.
    pub hub: Option<Hub>,
    /// What the user has to know, one sentence each.
    pub remarks: Vec<String>,
}

/// Finds the folder of a model or adapter.
///
/// `typed` is a path or a name on a hub; `place` gives the place of a path, which is beside the program's sources
/// for what comes with them. `~` is the home folder. A name with `hf:` or `ms:` before it is never a path.
///
/// # Errors
/// [`HubError::Name`], [`HubError::Absent`], [`HubError::NoSnapshot`] or [`HubError::LfsPointer`]. No network
/// is used.
pub fn resolve(
    typed: &Path,
    want: Want,
    settings: &HubSettings,
    place: &dyn Fn(&Path) -> PathBuf,
) -> Result<Resolved, HubError> {
    let local = place(&expand_home(typed));
    let id = typed.to_str().map(ModelId::parse).transpose()?.flatten();
    let is_path = id.as_ref().is_none_or(|id| id.hub.is_none());
    if is_path && local.exists() {
        return of_path(&local, id, want, settings);
    }
    let Some(id) = id else {
        return Ok(Resolved {
            folder: local,
            id: None,
            hub: None,
            remarks: Vec::new(),
        });
    };
    let Search { found, looked } = search(&id, want, settings);
    match found {
        Some(found) => {
            let mut remark = format!("`{id}` is `{}`", found.folder.display());
            if id.hub.is_none() && found.hub != settings.default_hub {
                remark.push_str(&format!(", downloaded from {}", found.hub));
            }
            if let Some(more) = found.remark {
                remark.push_str(&format!("; {more}"));
            }
            Ok(Resolved {
                folder: found.folder,
                hub: Some(found.hub),
                id: Some(id),
                remarks: vec![remark],
            })
        }
        // `model/absent` beside other folders of `model`: a path with a typing error, not a name.
        None if is_path && looked.is_empty() && place(id.parts().0.as_ref()).is_dir() => {
            Ok(Resolved {
                folder: local,
                id: None,
                hub: None,
                remarks: Vec::new(),
            })
        }
        None => Err(HubError::Absent { id, looked }),
    }
}

fn of_path(
    local: &Path,
    id: Option<ModelId>,
    want: Want,
    settings: &HubSettings,
) -> Result<Resolved, HubError> {
    let mut folder = local.to_path_buf();
    let mut remarks = Vec::new();
    if !is_meant(local, want) && local.join("snapshots").is_dir() {
        let hub = match local.join("refs").is_dir() || !is_of_model_scope(local) {
            true => Hub::HuggingFace,
            false => Hub::ModelScope,
        };
        let mut search = Search::default();
        repo_folder(local, None, want, hub, &mut search);
        let Some(found) = search.found else {
            return Err(HubError::NoSnapshot {
                folder,
                looked: search.looked,
            });
        };
        let mut remark = format!(
            "`{}` is the folder of a download; `{}` in it is taken",
            local.display(),
            found.folder.display()
        );
        if let Some(more) = found.remark {
            remark.push_str(&format!("; {more}"));
        }
        remarks.push(remark);
        folder = found.folder;
    }
    if let Some(pointer) = lfs_pointer(&folder) {
        return Err(HubError::LfsPointer(pointer));
    }
    // Said where there is something to confuse it with.
    if let Some(id) = &id
        && let Some(other) = search(id, want, settings).found
        && !is_same(&other.folder, &folder)
    {
        remarks.push(format!(
            "`{id}` is a folder here, which is taken; `{}{id}` is the download in `{}`",
            other.hub.prefix(),
            other.folder.display()
        ));
    }
    Ok(Resolved {
        folder,
        id: None,
        hub: None,
        remarks,
    })
}

fn is_of_model_scope(repo: &Path) -> bool {
    repo.parent().and_then(Path::file_name) == Some("models".as_ref())
}

fn is_same(one: &Path, other: &Path) -> bool {
    crate::base::files::is_same_file(one, other)
}
