//! What a run is to write about: images, or the question of a row of a data file.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{base::files::name, dataset::Question};

/// One report to write.
#[derive(Debug, Clone)]
pub(crate) struct Task {
    /// The image files, in the order of their places.
    pub(crate) images: Vec<PathBuf>,
    /// The row that asks; without one the question is that of the run.
    pub(crate) row: Option<RowTask>,
}

/// A row of a data file.
#[derive(Debug, Clone)]
pub(crate) struct RowTask {
    /// The data file as it was named.
    pub(crate) file: Arc<Path>,
    /// Its number there, from 1.
    pub(crate) number: usize,
    /// The question, or why it is none.
    pub(crate) question: Result<Arc<Question>, Arc<str>>,
}

/// The key of a record: unique in its run.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum TaskKey {
    /// Where the images are, however they were named.
    Images(Vec<PathBuf>),
    /// Where the data file is, and the number of the row.
    Row(PathBuf, usize),
}

/// What kind of tasks a run has: all are of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TaskKind {
    /// Reports about so many images each.
    Images(usize),
    /// Rows of data files.
    Rows,
}

impl Task {
    /// A report about images alone.
    pub(crate) fn about(images: Vec<PathBuf>) -> Self {
        Self { images, row: None }
    }

    pub(super) fn key(&self) -> TaskKey {
        match &self.row {
            Some(row) => TaskKey::Row(name::place_of(&row.file), row.number),
            None => TaskKey::Images(
                self.images
                    .iter()
                    .map(|path| name::place_of(path))
                    .collect(),
            ),
        }
    }

    pub(super) fn kind(&self) -> TaskKind {
        match self.row {
            Some(_) => TaskKind::Rows,
            None => TaskKind::Images(self.images.len()),
        }
    }

    /// The question of the row.
    pub(crate) fn question(&self) -> Option<&Question> {
        let row = self.row.as_ref()?;
        row.question.as_deref().ok()
    }

    /// What a record calls an image of this task.
    pub(crate) fn image_name(&self, index: usize) -> String {
        match self.question() {
            Some(question) => question.sample.images[index].clone(),
            None => name::text_of(&self.images[index..=index]).0,
        }
    }
}
