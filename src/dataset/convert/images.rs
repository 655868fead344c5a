//! The images of rows: where they are, how large, and how the output names them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use super::corpus::{CorpusRow, ENDINGS, base_name, stem_of};
use super::error::ConvertError;
use super::options::ConvertOptions;
use crate::base::files::{FileError, sha256_bytes, write_atomic};
use crate::processor::image::ImageError;
use crate::processor::patches::ImageProcessor;
use crate::processor::sample::{ending_of, path_of};

/// Folder below the output for images that were in rows or on the web.
const COPIES: &str = "images";

/// An image file that was found.
#[derive(Debug, Clone)]
pub(super) struct FoundImage {
    /// As the output names it.
    pub(super) name: String,
    /// The path that the study is read from: that of the row, or that below the folder of images if it is deeper.
    pub(super) study_path: String,
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) grid: [usize; 3],
}

/// Why a row is left out.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("image not found")]
    NotFound(String),
    #[error("image cannot be used: {1}")]
    Unreadable(String, ImageError),
}

impl Unusable {
    pub(super) fn image(&self) -> &str {
        match self {
            Self::NotFound(image) | Self::Unreadable(image, _) => image,
        }
    }
}

/// Finds the images of rows.
pub(super) struct ImageFinder<'a> {
    options: &'a ConvertOptions,
    output: &'a Path,
    processor: &'a ImageProcessor,
    /// Canonical folders by folder: asking the system for every file is slow.
    folders: BTreeMap<PathBuf, PathBuf>,
    /// Files below the folder of images by their base names; read when a row needs it.
    below: Option<BTreeMap<String, Vec<PathBuf>>>,
    /// The first row that took a file, with the path it gave.
    taken: BTreeMap<PathBuf, (usize, String, bool)>,
}

impl<'a> ImageFinder<'a> {
    pub(super) fn new(
        options: &'a ConvertOptions,
        output: &'a Path,
        processor: &'a ImageProcessor,
    ) -> Self {
        Self {
            options,
            output,
            processor,
            folders: BTreeMap::new(),
            below: None,
            taken: BTreeMap::new(),
        }
    }

    /// The images of a row, or why the row is left out.
    pub(super) fn images(
        &mut self,
        row: &CorpusRow,
    ) -> Result<Result<Vec<FoundImage>, Unusable>, ConvertError> {
        if row.images.is_empty() {
            return Ok(Err(Unusable::NotFound("(the row names none)".into())));
        }
        let mut images = Vec::new();
        for (index, image) in row.images.iter().enumerate() {
            if let Some(kept) = row.kept(index) {
                match self.copied(kept, image)? {
                    Ok(found) => images.push(found),
                    Err(cause) => return Ok(Err(Unusable::Unreadable(image.clone(), cause))),
                }
                continue;
            }
            let Some(path) = self.locate(image, row.number)? else {
                return Ok(Err(Unusable::NotFound(image.clone())));
            };
            match self.size(&path) {
                Ok((width, height, grid)) => images.push(FoundImage {
                    name: self.name(&path)?,
                    study_path: self.study_path(image, &path),
                    width,
                    height,
                    grid,
                }),
                Err(cause) => return Ok(Err(Unusable::Unreadable(image.clone(), cause))),
            }
        }
        Ok(Ok(images))
    }

    /// An image that the corpus holds no file of, copied below the output so that this is whole without the cache.
    fn copied(
        &self,
        kept: &Path,
        image: &str,
    ) -> Result<Result<FoundImage, ImageError>, ConvertError> {
        let (width, height, grid) = match self.size(kept) {
            Ok(size) => size,
            Err(cause) => return Ok(Err(cause)),
        };
        let bytes = std::fs::read(kept).map_err(|cause| ConvertError::Read {
            path: kept.to_owned(),
            cause,
        })?;
        let digest = sha256_bytes(&bytes);
        let ending = ending_of(&bytes).unwrap_or("image");
        let name = format!("{COPIES}/{}.{ending}", &digest[..32]);
        let path = self.output.join(&name);
        if !path.is_file() {
            let folder = self.output.join(COPIES);
            std::fs::create_dir_all(&folder).map_err(|cause| FileError::write(&folder, cause))?;
            write_atomic(&path, |out| out.write_all(&bytes))?;
        }
        Ok(Ok(FoundImage {
            name,
            study_path: image.to_owned(),
            width,
            height,
            grid,
        }))
    }

    /// Width, height and patches of an image.
    fn size(&self, path: &Path) -> Result<(usize, usize, [usize; 3]), ImageError> {
        let (width, height) = self.processor.probe(path)?;
        let grid = self.processor.grid_for(height, width)?;
        Ok((width, height, grid))
    }

    /// Finds the file of an image. Without a folder of images: where the row says, seen from the corpus. With one:
    /// the longest end of the path that is there below it, else a file of this name in any folder below it.
    fn locate(&mut self, image: &str, row: usize) -> Result<Option<PathBuf>, ConvertError> {
        let Some(folder) = self.options.images.clone() else {
            let path = self.options.input.parent().unwrap_or(Path::new(""));
            return Ok(with_ending(&path_of(image, path)));
        };
        let parts = parts(image);
        let found = (0..parts.len()).find_map(|from| {
            let path: PathBuf = parts[from..].iter().collect();
            Some((with_ending(&folder.join(path))?, from == 0))
        });
        let (path, whole) = match (found, parts.last()) {
            (Some(found), _) => found,
            (None, None) => return Ok(None),
            (None, Some(name)) => match &self.elsewhere(&folder, name)[..] {
                [] => return Ok(None),
                [path] => (path.clone(), false),
                [first, second, ..] => {
                    return Err(ConvertError::Ambiguous {
                        path: self.options.input.clone(),
                        row,
                        image: image.to_owned(),
                        what: format!(
                            "is in several folders, `{}` and `{}`",
                            first.display(),
                            second.display()
                        ),
                    });
                }
            },
        };
        let given = parts[..parts.len() - 1].join("/");
        let (other, their, their_whole) = self
            .taken
            .entry(path.clone())
            .or_insert_with(|| (row, given.clone(), whole));
        // The same file under two paths is one image for two studies, unless both paths are its own.
        if *their != given && !(whole && *their_whole) {
            return Err(ConvertError::Ambiguous {
                path: self.options.input.clone(),
                row,
                image: image.to_owned(),
                what: format!(
                    "and an image of row {other} in `{their}` would both be `{}`",
                    path.display()
                ),
            });
        }
        Ok(Some(path))
    }

    /// Files of this name in the folders below `folder`.
    fn elsewhere(&mut self, folder: &Path, name: &str) -> Vec<PathBuf> {
        let below = self.below.get_or_insert_with(|| files_below(folder));
        let names = std::iter::once(name.to_owned())
            .chain(ENDINGS.iter().map(|ending| format!("{name}.{ending}")));
        let found = names.into_iter().find(|name| below.contains_key(name));
        found.map_or_else(Vec::new, |name| below[&name].clone())
    }

    /// The path that says more of the study: the row's own, or that of the file below the folder of images.
    fn study_path(&self, image: &str, path: &Path) -> String {
        let below = self.options.images.as_deref();
        let below = below.and_then(|folder| path.strip_prefix(folder).ok()?.to_str());
        match below {
            Some(below) if parts(below).len() > parts(image).len() => below.replace('\\', "/"),
            _ => image.to_owned(),
        }
    }

    /// How the output names an image.
    fn name(&mut self, path: &Path) -> Result<String, ConvertError> {
        let unreadable = |cause| ConvertError::Read {
            path: path.to_owned(),
            cause,
        };
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let real = match self.folders.get(folder) {
            Some(real) => real.clone(),
            None => {
                let real = folder.canonicalize().map_err(unreadable)?;
                self.folders.insert(folder.to_owned(), real.clone());
                real
            }
        };
        // The file itself may be a link into a store of hashes: its own name is the one that counts.
        let path = path
            .file_name()
            .map_or(real.clone(), |name| real.join(name));
        let name = relative(&path, self.output);
        name.to_str()
            .map(|name| name.replace('\\', "/"))
            .ok_or(ConvertError::PathText(path))
    }
}

/// The parts of a path of any system after its last `..`, without the root.
fn parts(image: &str) -> Vec<&str> {
    let parts = image.split(['/', '\\']);
    let mut found: Vec<&str> = Vec::new();
    for part in parts.filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." {
            found.clear();
        } else {
            found.push(part);
        }
    }
    found
}

/// The file itself, or with the ending of an image after its name: `1_1` and `1.dcm` may mean `1_1.png` and
/// `1.dcm.png`.
fn with_ending(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let itself = std::iter::once(path.to_owned()).filter(|_| stem_of(base_name(name)) != name);
    let longer = ENDINGS
        .iter()
        .map(|ending| path.with_file_name(format!("{name}.{ending}")));
    itself.chain(longer).find(|path| path.is_file())
}

/// All files below `folder`, by base name; links to folders are followed once.
fn files_below(folder: &Path) -> BTreeMap<String, Vec<PathBuf>> {
    let mut found: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut waiting = vec![folder.to_owned()];
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
            if path.is_dir() {
                waiting.push(path);
            } else if let Some(name) = entry.file_name().to_str() {
                found.entry(name.to_owned()).or_default().push(path);
            }
        }
    }
    found.values_mut().for_each(|paths| paths.sort());
    found
}

/// `path` seen from `folder`, both absolute; as it is if they share nothing but the root.
pub(super) fn relative(path: &Path, folder: &Path) -> PathBuf {
    let shared = path
        .components()
        .zip(folder.components())
        .take_while(|(a, b)| a == b);
    let shared: Vec<Component<'_>> = shared.map(|(a, _)| a).collect();
    let common = shared.len();
    if !shared.iter().any(|c| matches!(c, Component::Normal(_))) {
        return path.to_owned();
    }
    let up = folder
        .components()
        .skip(common)
        .map(|_| Component::ParentDir);
    up.chain(path.components().skip(common)).collect()
}
