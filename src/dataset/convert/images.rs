//! The images of rows: where they are, how large, and how the output names them.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::corpus::{Row, locate};
use super::{ConvertError, ConvertOptions};
use crate::processor::image::ImageError;
use crate::processor::patches::ImageProcessor;

/// An image that is there.
#[derive(Debug, Clone)]
pub(super) struct Picture {
    /// As the output names it.
    pub(super) name: String,
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) grid: [usize; 3],
}

/// Why a row is left out.
#[derive(Debug, thiserror::Error)]
pub(super) enum LeftOut {
    #[error("image not found")]
    NoImage(String),
    #[error("image cannot be used: {1}")]
    Unusable(String, ImageError),
}

impl LeftOut {
    pub(super) fn image(&self) -> &str {
        match self {
            Self::NoImage(image) | Self::Unusable(image, _) => image,
        }
    }
}

/// Finds the images of rows.
pub(super) struct Finder<'a> {
    options: &'a ConvertOptions,
    output: &'a Path,
    processor: &'a ImageProcessor,
    /// Canonical folders by folder: asking the system for every file is slow.
    folders: BTreeMap<PathBuf, PathBuf>,
}

impl<'a> Finder<'a> {
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
        }
    }

    pub(super) fn pictures(
        &mut self,
        row: &Row,
    ) -> Result<Result<Vec<Picture>, LeftOut>, ConvertError> {
        if row.images.is_empty() {
            return Ok(Err(LeftOut::NoImage("(the row names none)".into())));
        }
        let mut pictures = Vec::new();
        for image in &row.images {
            let Some(path) = locate(image, self.options.images.as_deref(), &self.options.input)
            else {
                return Ok(Err(LeftOut::NoImage(image.clone())));
            };
            let size = self.processor.probe(&path).and_then(|(width, height)| {
                let grid = self.processor.grid_for(height, width)?;
                Ok((width, height, grid))
            });
            match size {
                Ok((width, height, grid)) => pictures.push(Picture {
                    name: self.name(&path)?,
                    width,
                    height,
                    grid,
                }),
                Err(cause) => return Ok(Err(LeftOut::Unusable(image.clone(), cause))),
            }
        }
        Ok(Ok(pictures))
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
