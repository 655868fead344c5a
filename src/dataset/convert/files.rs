//! The files below the folder of a corpus, by their names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::DirEntry;
use std::path::{Path, PathBuf};

use super::corpus::{ENDINGS, stem_of};
use super::error::ConvertError;

/// A folder with more files is not searched by name.
const MOST_FILES: usize = 2_000_000;

/// Folders in which the paths of a corpus may begin: so deep, and so many.
const BASE_DEPTH: usize = 3;
const MOST_BASES: usize = 200;

/// The files below a folder, read when they are needed.
pub(super) struct FileIndex {
    pub(super) root: PathBuf,
    by_name: Option<BTreeMap<String, Vec<PathBuf>>>,
    bases: Option<Vec<PathBuf>>,
}

impl FileIndex {
    pub(super) fn new(root: PathBuf) -> Self {
        Self {
            root,
            by_name: None,
            bases: None,
        }
    }

    /// The files with the first of these names that any file has.
    ///
    /// # Errors
    /// [`ConvertError::TooManyFiles`].
    pub(super) fn named(
        &mut self,
        names: impl Iterator<Item = String>,
    ) -> Result<Vec<PathBuf>, ConvertError> {
        let files = self.files()?;
        let mut names = names.into_iter();
        Ok(names
            .find_map(|name| files.get(&name).cloned())
            .unwrap_or_default())
    }

    /// Image files that belong to the number of an examination, as paths below the root: `N.png`, `N_1.png`, `N-2.jpg`,
    /// or what a folder `N` holds.
    ///
    /// # Errors
    /// [`ConvertError::TooManyFiles`].
    pub(super) fn of_number(&mut self, number: &str) -> Result<Vec<String>, ConvertError> {
        let root = self.root.clone();
        let files = self.files()?;
        let below = |path: &PathBuf| {
            let below = path.strip_prefix(&root).unwrap_or(path);
            below.to_str().map(|below| below.replace('\\', "/"))
        };
        let is_image = |name: &str| stem_of(name) != name;
        let mut found: Vec<String> = files
            .range(number.to_owned()..)
            .take_while(|(name, _)| name.starts_with(number))
            .filter(|(name, _)| {
                let rest = stem_of(name).strip_prefix(number);
                is_image(name)
                    && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['_', '-']))
            })
            .flat_map(|(_, paths)| paths.iter().filter_map(below))
            .collect();
        if found.is_empty() {
            // Few corpora have folders of this kind, and then one for each row.
            let folder = Path::new(number);
            for base in self.bases() {
                let Ok(entries) = std::fs::read_dir(base.join(folder)) else {
                    continue;
                };
                let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
                let images = paths.filter(|path| {
                    let name = path.file_name().and_then(|name| name.to_str());
                    name.is_some_and(is_image) && path.is_file()
                });
                found.extend(images.filter_map(|path| below(&path)));
                if !found.is_empty() {
                    break;
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// Folders in which the paths of a corpus may begin, the root first.
    pub(super) fn bases(&mut self) -> Vec<PathBuf> {
        let root = &self.root;
        self.bases
            .get_or_insert_with(|| {
                let mut found = vec![root.clone()];
                let mut level = vec![root.clone()];
                for _ in 0..BASE_DEPTH {
                    let mut below = Vec::new();
                    for folder in level {
                        let Ok(entries) = std::fs::read_dir(folder) else {
                            continue;
                        };
                        let entries = entries.filter_map(Result::ok);
                        let folders = entries.filter(is_folder).take(MOST_BASES);
                        below.extend(folders.map(|entry| entry.path()));
                    }
                    below.sort();
                    if found.len() + below.len() > MOST_BASES {
                        break;
                    }
                    found.extend(below.iter().cloned());
                    level = below;
                }
                found
            })
            .clone()
    }

    fn files(&mut self) -> Result<&BTreeMap<String, Vec<PathBuf>>, ConvertError> {
        if self.by_name.is_none() {
            let found = files_below(&self.root).ok_or_else(|| ConvertError::TooManyFiles {
                path: self.root.clone(),
                most: MOST_FILES,
            })?;
            self.by_name = Some(found);
        }
        Ok(self.by_name.get_or_insert_default())
    }
}

/// Whether an entry of a folder is a folder, or a link to one. Other files are not looked at.
pub(super) fn is_folder(entry: &DirEntry) -> bool {
    match entry.file_type() {
        Ok(kind) if kind.is_symlink() => entry.path().is_dir(),
        Ok(kind) => kind.is_dir(),
        Err(_) => false,
    }
}

/// All files below `folder`, by base name; links to folders are followed once. `None` if there are too many.
fn files_below(folder: &Path) -> Option<BTreeMap<String, Vec<PathBuf>>> {
    let mut found: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut waiting = vec![folder.to_owned()];
    let mut count = 0_usize;
    while let Some(folder) = waiting.pop() {
        if !folder.canonicalize().is_ok_and(|real| seen.insert(real)) {
            continue;
        }
        // A folder that cannot be read holds nothing that a row could use.
        let Ok(entries) = std::fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries.filter_map(Result::ok) {
            let path = entry.path();
            if is_folder(&entry) {
                waiting.push(path);
            } else if let Some(name) = entry.file_name().to_str() {
                count += 1;
                if count > MOST_FILES {
                    return None;
                }
                found.entry(name.to_owned()).or_default().push(path);
            }
        }
    }
    found.values_mut().for_each(|paths| paths.sort());
    Some(found)
}

/// The file itself, or with the ending of an image after its name, or instead of its ending: `1_1`, `1.dcm` and
/// `1.jpg` may mean `1_1.png`, `1.dcm.png` and `1.png`. Whether it is the file itself.
pub(super) fn names_like(name: &str) -> impl Iterator<Item = (String, bool)> + '_ {
    let has_ending = stem_of(name) != name;
    let itself = std::iter::once((name.to_owned(), true)).filter(move |_| has_ending);
    let longer = ENDINGS
        .iter()
        .map(move |ending| (format!("{name}.{ending}"), true));
    let other = name
        .rsplit_once('.')
        .filter(|_| has_ending)
        .into_iter()
        .flat_map(|(stem, _)| {
            ENDINGS
                .iter()
                .map(move |ending| (format!("{stem}.{ending}"), false))
        });
    itself.chain(longer).chain(other)
}

/// The file at `path`, or one of [`names_like`] it beside it.
pub(super) fn with_ending(path: &Path) -> Option<(PathBuf, bool)> {
    let name = path.file_name()?.to_str()?;
    names_like(name)
        .map(|(name, itself)| (path.with_file_name(name), itself))
        .find(|(path, _)| path.is_file())
}
