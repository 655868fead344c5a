//! The images of rows: where they are, how large, and how the output names them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use super::corpus::CorpusRow;
use super::error::ConvertError;
use super::files::{FileIndex, names_like, with_ending};
use crate::base::files::{FileError, sha256_bytes, write_atomic};
use crate::processor::image::ImageError;
use crate::processor::patches::ImageProcessor;
use crate::processor::sample::{ending_of, path_of};

/// Folder below the output for images that were in rows or on the web.
const COPIES: &str = "images";

/// So many images may be missing from all folders before paths are looked for in the images' folder alone.
const MOST_MISSES: usize = 16;

/// A file, and whether it has the very name that was looked for, or one with another ending.
type NamedFile = (PathBuf, bool);

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
    #[error("image not found, and its name is in several folders, `{}` and `{}`", .1.display(), .2.display())]
    Several(String, PathBuf, PathBuf),
    #[error("image cannot be used: {1}")]
    Unreadable(String, ImageError),
}

impl Unusable {
    pub(super) fn image(&self) -> &str {
        match self {
            Self::NotFound(image) | Self::Several(image, ..) | Self::Unreadable(image, _) => image,
        }
    }
}

/// Finds the images of rows.
pub(super) struct ImageFinder<'a> {
    corpus: &'a Path,
    /// Folder of the rows' paths where they are looked for nowhere else.
    beside: Option<PathBuf>,
    index: &'a mut FileIndex,
    output: &'a Path,
    processor: &'a ImageProcessor,
    /// Canonical folders by folder: asking the system for every file is slow.
    folders: BTreeMap<PathBuf, PathBuf>,
    /// Images that were found by their whole paths, and whether under the very name.
    by_path: HashMap<String, NamedFile>,
    /// The files of these.
    owned: BTreeSet<PathBuf>,
    /// The first row that took a file, with the path it gave.
    taken: BTreeMap<PathBuf, (usize, String, bool)>,
}

impl<'a> ImageFinder<'a> {
    /// `corpus` names the corpus in errors. With `beside`, a row's paths are taken as they are, seen from there.
    pub(super) fn new(
        corpus: &'a Path,
        beside: Option<PathBuf>,
        index: &'a mut FileIndex,
        output: &'a Path,
        processor: &'a ImageProcessor,
    ) -> Self {
        Self {
            corpus,
            beside,
            index,
            output,
            processor,
            folders: BTreeMap::new(),
            by_path: HashMap::new(),
            owned: BTreeSet::new(),
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
            let path = match self.locate(image, row.number)? {
                Ok(path) => path,
                Err(unusable) => return Ok(Err(unusable)),
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

    /// Looks for all images of `rows` by their whole paths, so that none of these files is taken for an image of the
    /// same name that is missing.
    ///
    /// # Errors
    /// [`ConvertError::Ambiguous`] if a path begins in several folders.
    pub(super) fn look_up(&mut self, rows: &[CorpusRow]) -> Result<(), ConvertError> {
        if self.beside.is_some() {
            return Ok(());
        }
        let mut base: Option<PathBuf> = None;
        let mut misses = 0;
        for row in rows {
            for image in &row.images {
                let parts = parts(image);
                if self.by_path.contains_key(image) || parts.is_empty() {
                    continue;
                }
                let whole: PathBuf = parts.iter().collect();
                let near = std::iter::once(self.index.root.clone()).chain(base.clone());
                let mut found = near
                    .into_iter()
                    .find_map(|base| with_ending(&base.join(&whole)));
                // A bare name is looked for in all folders, so that it is not taken from the first of several.
                if found.is_none() && parts.len() > 1 && misses < MOST_MISSES {
                    match self.in_bases(image, &whole, row.number)? {
                        Some((folder, file)) => {
                            base = Some(folder);
                            found = Some(file);
                        }
                        None => misses += 1,
                    }
                }
                if let Some(found) = found {
                    self.owned.insert(found.0.clone());
                    self.by_path.insert(image.clone(), found);
                }
            }
        }
        Ok(())
    }

    /// The one base below which `whole` is there, and the file.
    fn in_bases(
        &mut self,
        image: &str,
        whole: &Path,
        row: usize,
    ) -> Result<Option<(PathBuf, NamedFile)>, ConvertError> {
        let bases = self.index.bases().into_iter();
        let mut found: Vec<_> = bases
            .filter_map(|base| Some((base.clone(), with_ending(&base.join(whole))?)))
            .collect();
        if found.iter().any(|(_, (_, itself))| *itself) {
            found.retain(|(_, (_, itself))| *itself);
        }
        if let [(_, (first, _)), (_, (second, _)), ..] = &found[..] {
            return Err(self.ambiguous(
                image,
                row,
                format!(
                    "is in several folders, `{}` and `{}`",
                    first.display(),
                    second.display()
                ),
            ));
        }
        Ok(found.pop())
    }

    fn ambiguous(&self, image: &str, row: usize, what: String) -> ConvertError {
        ConvertError::Ambiguous {
            path: self.corpus.to_owned(),
            row,
            image: image.to_owned(),
            what,
        }
    }

    /// Finds the file of an image: where the row says, seen from the corpus; else below the folder of images the whole
    /// path, in this folder or one of the first below it; else the longest end of the path; else the one file of this
    /// name in any folder.
    fn locate(
        &mut self,
        image: &str,
        row: usize,
    ) -> Result<Result<PathBuf, Unusable>, ConvertError> {
        let missing = || Ok(Err(Unusable::NotFound(image.to_owned())));
        if let Some(beside) = &self.beside {
            return match exact(&path_of(image, beside)) {
                Some(path) => Ok(Ok(path)),
                None => missing(),
            };
        }
        let parts = parts(image);
        let Some(name) = parts.last() else {
            return missing();
        };
        let found = match self.by_path.get(image) {
            Some(found) => Some(found.clone()),
            None => (1..parts.len()).find_map(|from| {
                let path: PathBuf = parts[from..].iter().collect();
                Some((with_ending(&self.index.root.join(path))?.0, false))
            }),
        };
        let (path, whole) = match found {
            Some(found) => found,
            None => {
                let mut files = self.index.named(names_like(name).map(|(name, _)| name))?;
                if parts.len() > 1 {
                    files.retain(|file| !self.owned.contains(file));
                }
                match &files[..] {
                    [] => return missing(),
                    [path] => (path.clone(), false),
                    [first, second, ..] if parts.len() > 1 => {
                        let (first, second) = (first.clone(), second.clone());
                        return Ok(Err(Unusable::Several(image.to_owned(), first, second)));
                    }
                    [first, second, ..] => {
                        let what = format!(
                            "is in several folders, `{}` and `{}`",
                            first.display(),
                            second.display()
                        );
                        return Err(self.ambiguous(image, row, what));
                    }
                }
            }
        };
        let given = parts.join("/");
        let (other, their, their_whole) = self
            .taken
            .entry(path.clone())
            .or_insert_with(|| (row, given.clone(), whole));
        // The same file under two paths is one image for two studies, unless both paths are its own.
        if *their != given && !(whole && *their_whole) {
            let what = format!(
                "and the image `{their}` of row {other} would both be `{}`",
                path.display()
            );
            return Err(self.ambiguous(image, row, what));
        }
        Ok(Ok(path))
    }

    /// The path that says more of the study: the row's own, or that of the file below the folder of images.
    fn study_path(&self, image: &str, path: &Path) -> String {
        let searched = self.beside.is_none();
        let below = path.strip_prefix(&self.index.root).ok();
        match below.and_then(Path::to_str).filter(|_| searched) {
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

/// The file at `path`, or with the ending of an image after its name.
fn exact(path: &Path) -> Option<PathBuf> {
    with_ending(path)
        .filter(|(_, itself)| *itself)
        .map(|(path, _)| path)
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
