//! Models that Python's tools, or `pull`, have downloaded before.
//!
//! Hugging Face: `models--OWNER--NAME/{refs,blobs,snapshots/COMMIT}`. ModelScope: since 1.38
//! `models/OWNER--NAME/snapshots/REVISION`; before, `models/OWNER/NAME` and `hub/[models/]OWNER/NAME`, with
//! `___` for the dots of a name.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{
    folder::{Want, lfs_pointer, missing},
    name::{Hub, ModelId},
    settings::HubSettings,
};

/// A model on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cached {
    /// What a checkpoint's folder is named by.
    pub(super) folder: PathBuf,
    /// Whose cache it is in.
    pub(super) hub: Hub,
    /// Commit, branch or tag, where the cache has one.
    pub(super) revision: Option<String>,
    /// Something the user has to know about the choice.
    pub(super) remark: Option<String>,
}

/// Result of a search: the first that is whole, and what kept others from being taken.
#[derive(Debug, Default)]
pub(super) struct Search {
    pub(super) found: Option<Cached>,
    pub(super) looked: Vec<String>,
}

impl Search {
    /// Takes the folder if it is whole, else notes what is missing.
    fn offer(&mut self, folder: &Path, want: Want, hub: Hub, revision: Option<String>) -> bool {
        if !folder.is_dir() {
            return false;
        }
        if let Some(pointer) = lfs_pointer(folder) {
            self.looked.push(format!(
                "`{}` is a git-lfs pointer, not the weights",
                pointer.display()
            ));
            return false;
        }
        if let Some(part) = missing(folder, want) {
            let folder = folder.display();
            self.looked
                .push(format!("`{folder}` is not whole: {part} is missing"));
            return false;
        }
        self.found = Some(Cached {
            folder: folder.to_path_buf(),
            hub,
            revision,
            remark: None,
        });
        true
    }
}

/// Looks for a model in the caches of its hub, or of both, the default one first.
pub(super) fn search(id: &ModelId, want: Want, settings: &HubSettings) -> Search {
    let mut search = Search::default();
    let other = match settings.default_hub {
        Hub::HuggingFace => Hub::ModelScope,
        Hub::ModelScope => Hub::HuggingFace,
    };
    let hubs = match id.hub {
        Some(hub) => vec![hub],
        None => vec![settings.default_hub, other],
    };
    for hub in hubs {
        for cache in &settings.of(hub).caches {
            match hub {
                Hub::HuggingFace => hugging_face(id, want, cache, &mut search),
                Hub::ModelScope => model_scope(id, want, cache, &mut search),
            }
            if search.found.is_some() {
                return search;
            }
        }
    }
    search
}

/// The folder of a model in a cache of Hugging Face.
pub(super) fn hugging_face_folder(cache: &Path, id: &str) -> PathBuf {
    cache.join(format!("models--{}", id.replace('/', "--")))
}

/// The folder of a model in a cache of ModelScope, as its present tools write.
pub(super) fn model_scope_folder(cache: &Path, id: &str) -> PathBuf {
    cache.join("models").join(id.replace('/', "--"))
}

/// Folders of a model in a cache of ModelScope, as its tools wrote before 1.38.
pub(super) fn old_model_scope_folders(cache: &Path, id: &ModelId) -> Vec<PathBuf> {
    let (owner, name) = id.parts();
    let mangled = name.replace('.', "___");
    let mut folders = Vec::new();
    for above in ["models", "hub/models", "hub", ""] {
        for name in [mangled.as_str(), name] {
            let folder = cache.join(above).join(owner).join(name);
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
    }
    folders
}

fn hugging_face(id: &ModelId, want: Want, cache: &Path, search: &mut Search) {
    let repo = hugging_face_folder(cache, &id.id);
    repo_folder(
        &repo,
        id.revision.as_deref(),
        want,
        Hub::HuggingFace,
        search,
    );
}

/// Looks into a folder with `snapshots`, and `refs` if it is Hugging Face's.
pub(super) fn repo_folder(
    repo: &Path,
    revision: Option<&str>,
    want: Want,
    hub: Hub,
    search: &mut Search,
) {
    let snapshots = repo.join("snapshots");
    let named = revision.unwrap_or(hub.default_revision());
    let commit = fs::read_to_string(repo.join("refs").join(named))
        .ok()
        .map(|text| text.trim().to_owned())
        .filter(|text| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric()));
    let first = commit.unwrap_or_else(|| named.to_owned());
    if search.offer(&snapshots.join(&first), want, hub, Some(first.clone())) {
        return;
    }
    let mut others: Vec<(SystemTime, String)> = fs::read_dir(&snapshots)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let changed = entry.metadata().and_then(|data| data.modified());
            let changed = changed.unwrap_or(SystemTime::UNIX_EPOCH);
            Some((changed, entry.file_name().into_string().ok()?))
        })
        .filter(|(_, name)| *name != first)
        .collect();
    others.sort();
    match revision {
        // A commit may be shortened where it stays distinct.
        Some(start) if start.len() >= 7 => {
            others.retain(|(_, name)| name.starts_with(start));
            if let [(_, name)] = others.as_slice() {
                search.offer(&snapshots.join(name), want, hub, Some(name.clone()));
            }
        }
        Some(_) => {}
        None => {
            for (_, name) in others.iter().rev() {
                if search.offer(&snapshots.join(name), want, hub, Some(name.clone())) {
                    if let Some(found) = &mut search.found {
                        found.remark = Some(format!(
                            "revision `{named}` is not downloaded whole, `{name}` is taken"
                        ));
                    }
                    return;
                }
            }
        }
    }
}

fn model_scope(id: &ModelId, want: Want, cache: &Path, search: &mut Search) {
    let revision = id.revision.as_deref();
    let repo = model_scope_folder(cache, &id.id);
    repo_folder(&repo, revision, want, Hub::ModelScope, search);
    for folder in old_model_scope_folders(cache, id) {
        if search.found.is_some() || !folder.is_dir() {
            continue;
        }
        // `Revision:master,CreatedAt:…`, where the download noted it.
        let noted = fs::read_to_string(folder.join(".mv"))
            .ok()
            .and_then(|text| {
                let text = text.split(',').next()?.trim().strip_prefix("Revision:")?;
                Some(text.trim().to_owned())
            });
        if revision.is_some_and(|named| noted.as_deref() != Some(named)) {
            search.looked.push(format!(
                "`{}` is of revision {}",
                folder.display(),
                noted.as_deref().unwrap_or("unknown")
            ));
            continue;
        }
        search.offer(&folder, want, Hub::ModelScope, noted);
    }
}

/// `OWNER/NAME` of a folder in a cache of a hub; `None` for any other folder.
pub fn repo_of_folder(folder: &Path) -> Option<String> {
    let absolute = std::path::absolute(folder).ok()?;
    let mut above = absolute.ancestors().filter_map(Path::file_name);
    let mut next = || above.next()?.to_str().map(str::to_owned);
    let (last, second, third) = (next()?, next()?, next()?);
    if second == "snapshots" {
        let joined = match third.strip_prefix("models--") {
            Some(joined) => joined.to_owned(),
            None if next()? == "models" => third,
            None => return None,
        };
        return Some(joined.replacen("--", "/", 1));
    }
    // Only this form cannot be a folder of the user's own.
    last.contains("___")
        .then(|| format!("{second}/{}", last.replace("___", ".")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_a_cache_has_the_name_of_its_model() {
        for (folder, name) in [
            (
                "/c/hub/models--Qwen--Q-VL/snapshots/01ab",
                Some("Qwen/Q-VL"),
            ),
            ("/m/models/Qwen--Q2.5/snapshots/master", Some("Qwen/Q2.5")),
            ("/m/models/Qwen/Q2___5", Some("Qwen/Q2.5")),
            ("/home/me/model/tiny", None),
            ("/home/snapshots/x", None),
        ] {
            assert_eq!(
                repo_of_folder(Path::new(folder)).as_deref(),
                name,
                "{folder}"
            );
        }
    }
}
