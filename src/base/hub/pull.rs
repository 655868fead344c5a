//! Downloads of models: the files that are needed, each checked, into the caches of Python's tools or a folder.

use std::{
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

pub use super::transfer::FileEvent;
use super::{
    HubError,
    cache::{hugging_face_folder, model_scope_folder, old_model_scope_folders},
    client::{Attempts, Client, Failure},
    folder::{Want, WeightsKind, shards, weights_kind},
    listing::{Entry, Listing},
    name::{Hub, ModelId},
    place::Place,
    select::{Selection, select},
    settings::HubSettings,
    transfer::Transfer,
};
use crate::base::files::FileError;

/// Files fetched at the same time.
const WORKERS: usize = 4;

/// Room to leave on a disk.
const SPARE: u64 = 64 << 20;

/// What to download.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// What the folder has to hold.
    pub want: Want,
    /// Patterns with `*` and `?` of the files to take, in place of those that `want` needs.
    pub include: Vec<String>,
    /// A folder in place of the hub's cache.
    pub output: Option<PathBuf>,
}

/// What a download does.
#[derive(Debug)]
pub enum PullEvent<'a> {
    /// A request failed and is repeated.
    Retry {
        /// Why it failed.
        reason: &'a str,
        /// The wait before the next request.
        wait: Duration,
    },
    /// The files are known.
    Listed {
        /// The hub.
        hub: Hub,
        /// Commit, or the requested revision.
        revision: &'a str,
        /// How many files are taken.
        files: usize,
        /// Their bytes.
        bytes: u64,
        /// The folder they go to.
        folder: &'a std::path::Path,
    },
    /// Bytes that are there, of all.
    Bytes {
        /// There.
        done: u64,
        /// All.
        total: u64,
        /// Of those there, what was there before.
        found: u64,
    },
    /// Of one file.
    File {
        /// Its path in the repository.
        file: &'a str,
        /// What happened.
        event: FileEvent,
    },
}

/// A downloaded model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// Its folder.
    pub folder: PathBuf,
    /// The hub it came from.
    pub hub: Hub,
    /// Commit on Hugging Face, branch or tag on ModelScope.
    pub revision: String,
    /// Files that were taken, or were there.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// The form of its weights.
    pub kind: WeightsKind,
}

/// Downloads a model; what is there, whole or in part, is not fetched again.
///
/// # Errors
/// [`HubError`]; what has come stays and is gone on with by the next call.
pub fn pull(
    id: &ModelId,
    options: &PullOptions,
    settings: &HubSettings,
    tell: &(dyn Fn(PullEvent<'_>) + Sync),
) -> Result<Pulled, HubError> {
    if let Some(variable) = settings.offline {
        return Err(HubError::Offline {
            id: id.clone(),
            variable,
        });
    }
    let hub = id.hub.unwrap_or(settings.default_hub);
    let client = Client::new(hub, settings)?;
    let revision = id.revision.as_deref().unwrap_or(hub.default_revision());
    let listing = persist(&client, tell, || Listing::fetch(&client, &id.id, revision))?;
    let nothing = |reason: String| HubError::Nothing {
        id: id.to_string(),
        reason,
    };
    let chosen = select(&listing.files, options.want, &options.include).map_err(nothing)?;
    let place = place_of(id, hub, &listing, options, settings)?;
    let mut run = Run {
        client: &client,
        listing: &listing,
        place: &place,
        tell,
        done: AtomicI64::new(0),
        found: AtomicI64::new(0),
        total: 0,
    };
    let Selection {
        descriptions,
        weights,
        index,
    } = chosen;
    let descriptions = run.complete(descriptions)?;
    let mut weights = run.complete(weights)?;
    let size = |files: &[Entry]| files.iter().filter_map(|entry| entry.size).sum::<u64>();
    let all = size(&descriptions) + size(&weights);
    check_space(&place, &[&descriptions, &weights], options, settings, hub)?;
    let mut files = descriptions.len() + weights.len();
    run.total = all;
    tell(PullEvent::Listed {
        hub,
        revision: &listing.revision,
        files,
        bytes: all,
        folder: &place.folder(),
    });
    run.fetch(&descriptions)?;
    if let Some(index) = index {
        let path = place.folder().join(&index);
        let named = shards(&path)
            .ok_or_else(|| nothing(format!("its `{index}` is no index of weights")))?;
        let listed = |shard: &String| weights.iter().any(|entry| entry.path == *shard);
        if let Some(absent) = named.iter().find(|shard| !listed(shard)) {
            return Err(nothing(format!(
                "its `{index}` names `{absent}`, which it does not hold"
            )));
        }
        // Weights under a second name are not read.
        weights.retain(|entry| named.contains(&entry.path));
        files = descriptions.len() + weights.len();
        run.total = size(&descriptions) + size(&weights);
    }
    run.fetch(&weights)?;
    place.finish(revision)?;
    Ok(Pulled {
        folder: place.folder(),
        hub,
        files,
        bytes: run.total,
        kind: weights_kind(&place.folder()),
        revision: listing.revision.clone(),
    })
}

fn place_of(
    id: &ModelId,
    hub: Hub,
    listing: &Listing,
    options: &PullOptions,
    settings: &HubSettings,
) -> Result<Place, HubError> {
    if let Some(folder) = &options.output {
        return Ok(Place::Plain {
            folder: folder.clone(),
            cache: None,
        });
    }
    let caches = &settings.of(hub).caches;
    let cache = caches.first().cloned().ok_or_else(|| HubError::Nothing {
        id: id.to_string(),
        reason: "no home folder is known to keep it in; name one with --output, or HF_HOME (MODELSCOPE_CACHE)".into(),
    })?;
    Ok(match hub {
        Hub::HuggingFace => Place::HuggingFace {
            repo: hugging_face_folder(&cache, &id.id),
            cache,
            commit: listing.revision.clone(),
        },
        Hub::ModelScope => {
            // A folder of older tools is gone on with, as the present ones do: weights are there once.
            let old = old_model_scope_folders(&cache, id)
                .into_iter()
                .find(|folder| {
                    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
                })
                .filter(|_| id.revision.is_none());
            let new = model_scope_folder(&cache, &id.id)
                .join("snapshots")
                .join(&listing.revision);
            Place::Plain {
                folder: old.unwrap_or(new),
                cache: Some((cache, id.id.clone())),
            }
        }
    })
}

/// Refuses a download that the disk has no room for.
fn check_space(
    place: &Place,
    parts: &[&[Entry]],
    options: &PullOptions,
    settings: &HubSettings,
    hub: Hub,
) -> Result<(), HubError> {
    let mut needed = 0;
    for entry in parts.iter().copied().flatten() {
        let spot = place.spot(entry);
        if !spot.is_placed(entry.size) && !spot.has_whole(entry.size) {
            let have = std::fs::metadata(&spot.partial).map_or(0, |data| data.len());
            needed += entry.size.unwrap_or(0).saturating_sub(have);
        }
    }
    let folder = match &options.output {
        Some(folder) => Some(folder),
        None => settings.of(hub).caches.first(),
    };
    let Some(folder) = folder.filter(|_| needed > 0) else {
        return Ok(());
    };
    std::fs::create_dir_all(folder).map_err(|cause| FileError::write(folder, cause))?;
    match fs4::available_space(folder) {
        Ok(free) if free < needed + SPARE => Err(HubError::Space {
            folder: folder.clone(),
            needed: needed + SPARE,
            free,
        }),
        // Where the system does not tell, the write itself will.
        _ => Ok(()),
    }
}

/// Asks until the hub answers or is given up.
fn persist<T>(
    client: &Client,
    tell: &(dyn Fn(PullEvent<'_>) + Sync),
    ask: impl Fn() -> Result<T, Failure>,
) -> Result<T, HubError> {
    let mut attempts = Attempts::default();
    loop {
        let (reason, named) = match ask() {
            Ok(answer) => return Ok(answer),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Again { reason, wait }) => (reason, wait),
        };
        let Some(wait) = attempts.next_wait(named) else {
            return Err(HubError::Unreachable {
                hub: client.hub,
                endpoint: client.endpoint.clone(),
                reason,
            });
        };
        tell(PullEvent::Retry {
            reason: &reason,
            wait,
        });
        thread::sleep(wait);
    }
}

struct Run<'a> {
    client: &'a Client,
    listing: &'a Listing,
    place: &'a Place,
    tell: &'a (dyn Fn(PullEvent<'_>) + Sync),
    done: AtomicI64,
    found: AtomicI64,
    total: u64,
}

impl Run<'_> {
    fn complete(&self, entries: Vec<Entry>) -> Result<Vec<Entry>, HubError> {
        let complete = |entry| {
            persist(self.client, self.tell, || {
                self.listing.complete(self.client, entry)
            })
        };
        entries.iter().map(complete).collect()
    }

    /// Fetches files side by side; the first that fails for good ends all.
    fn fetch(&self, entries: &[Entry]) -> Result<(), HubError> {
        let next = AtomicUsize::new(0);
        let stopped = AtomicBool::new(false);
        let failed: Mutex<Option<HubError>> = Mutex::new(None);
        let work = || {
            while !stopped.load(Ordering::Relaxed) {
                let Some(entry) = entries.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    return;
                };
                if let Err(error) = self.fetch_one(entry, &stopped) {
                    // Before the others are stopped: their end is no cause.
                    let mut failed = failed.lock().unwrap_or_else(|lock| lock.into_inner());
                    failed.get_or_insert(error);
                    stopped.store(true, Ordering::Relaxed);
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..WORKERS.min(entries.len()) {
                scope.spawn(work);
            }
        });
        match failed.into_inner().unwrap_or_else(|lock| lock.into_inner()) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn fetch_one(&self, entry: &Entry, stopped: &AtomicBool) -> Result<(), HubError> {
        let transfer = Transfer {
            client: self.client,
            id: &self.listing.id,
            url: self.listing.url(self.client, &entry.path),
            entry,
            spot: self.place.spot(entry),
            verifies: matches!(self.place, Place::Plain { .. }),
            stopped,
        };
        let count = |count: i64, found: i64| {
            let whole = |value| u64::try_from(value).unwrap_or(0);
            let done = self.done.fetch_add(count, Ordering::Relaxed) + count;
            let found = self.found.fetch_add(found, Ordering::Relaxed) + found;
            (self.tell)(PullEvent::Bytes {
                done: whole(done),
                total: self.total,
                found: whole(found),
            });
        };
        let result = transfer.run(&|event| match event {
            FileEvent::Bytes(bytes) => count(bytes, 0),
            FileEvent::Found(bytes) => count(bytes, bytes),
            event => (self.tell)(PullEvent::File {
                file: &entry.path,
                event,
            }),
        });
        result.map_err(|error| match error {
            HubError::Denied { hub, reason, .. } => HubError::Denied {
                hub,
                id: self.listing.id.clone(),
                reason,
            },
            HubError::NotFound {
                hub,
                endpoint,
                hint,
                ..
            } => HubError::NotFound {
                hub,
                endpoint,
                what: format!("`{}` of `{}`", entry.path, self.listing.id),
                hint,
            },
            other => other,
        })
    }
}
