//! Lengths and hashes of a run's images: enough to notice that one was exchanged.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    base::files::{FileError, write_atomic},
    dataset::Dataset,
};

/// Name of the file in a run's folder, for the training images.
pub const TRAINING: &str = "images.json";

/// The same for those of validation.
pub const VALIDATION: &str = "images-val.json";

/// Bytes of an image file that are read; its length counts besides. Headers of the usual formats and the
/// first rows are in them.
const HEAD_BYTES: u64 = 4096;

/// Length and hash of the first bytes of every image of a data set, by its path in the data set.
///
/// Times do not count: a copied data set is the same one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageFacts(BTreeMap<String, String>);

impl ImageFacts {
    /// Reads all images; one that cannot be read is recorded as such.
    pub fn of(data: &Dataset) -> Self {
        let files: BTreeMap<_, _> = data
            .image_files()
            .into_iter()
            .map(|(_, name, path)| (name, path))
            .collect();
        Self(
            files
                .into_par_iter()
                .map(|(name, path)| {
                    let fact = look(&path).unwrap_or_else(|_| "unreadable".to_string());
                    (name.into_owned(), fact)
                })
                .collect(),
        )
    }

    /// One hash over all; the same for a data set without files.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for (name, fact) in &self.0 {
            hash.update(format!("{name}\0{fact}\0"));
        }
        hex(&hash.finalize())
    }

    /// The images that differ from those in `before`, of those rows that `of` takes.
    pub fn changed_in(
        &self,
        before: &Self,
        data: &Dataset,
        of: impl Fn(usize) -> bool,
    ) -> BTreeSet<String> {
        data.image_files()
            .into_iter()
            .filter(|(row, name, _)| {
                of(*row) && self.0.get(name.as_ref()) != before.0.get(name.as_ref())
            })
            .map(|(_, name, _)| name.into_owned())
            .collect()
    }

    /// Writes them into a run's folder under `name`.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn save(&self, run: &Path, name: &str) -> Result<(), FileError> {
        write_atomic(&run.join(name), |out| {
            serde_json::to_writer_pretty(&mut *out, self)?;
            out.write_all(b"\n")
        })
    }

    /// Those that a run recorded under `name`.
    pub fn load(run: &Path, name: &str) -> Written {
        match fs::read(run.join(name)) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Written::Absent,
            Err(cause) => Written::Damaged(cause.to_string()),
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(facts) => Written::Whole(facts),
                Err(cause) => Written::Damaged(cause.to_string()),
            },
        }
    }
}

/// Result of reading the facts that a run recorded.
#[derive(Debug, PartialEq)]
pub enum Written {
    /// No file: an older run, or another folder.
    Absent,
    /// A file that cannot be read, and why.
    Damaged(String),
    /// The facts.
    Whole(ImageFacts),
}

fn look(path: &Path) -> io::Result<String> {
    // Anything but a file, a pipe for instance, could be waited on for ever.
    let data = fs::metadata(path)?;
    if !data.is_file() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut head = Vec::new();
    File::open(path)?.take(HEAD_BYTES).read_to_end(&mut head)?;
    let hash = hex(&Sha256::digest(&head));
    Ok(format!("{} {}", data.len(), &hash[..16]))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exchanged_picture_is_noticed_in_the_rows_that_show_it() {
        let dir = tempfile::tempdir().unwrap();
        let line = |image: &str| {
            format!(
                "{{\"messages\":[{{\"role\":\"user\",\"content\":\"<image>q\"}},\
                 {{\"role\":\"assistant\",\"content\":\"a\"}}],\"images\":[\"{image}\"]}}\n"
            )
        };
        let rows = dir.path().join("rows.jsonl");
        fs::write(&rows, ["a.png", "b.png", "a.png"].map(line).concat()).unwrap();
        let data = Dataset::open(rows.to_str().unwrap()).unwrap();
        fs::write(dir.path().join("a.png"), [1; 9000]).unwrap();
        let before = ImageFacts::of(&data);
        fs::write(dir.path().join("a.png"), [1; 9000]).unwrap();
        assert_eq!(ImageFacts::of(&data), before);
        fs::write(dir.path().join("b.png"), [2; 10]).unwrap();
        let after = ImageFacts::of(&data);
        assert_ne!(after.digest(), before.digest());
        let changed = |rows: &[usize]| after.changed_in(&before, &data, |row| rows.contains(&row));
        assert!(changed(&[0, 2]).is_empty());
        assert_eq!(changed(&[0, 1]), ["b.png".to_string()].into());
        after.save(dir.path(), TRAINING).unwrap();
        assert_eq!(
            ImageFacts::load(dir.path(), TRAINING),
            Written::Whole(after)
        );
        assert_eq!(ImageFacts::load(dir.path(), VALIDATION), Written::Absent);
        fs::write(dir.path().join(TRAINING), "{\"a.png\": ").unwrap();
        let found = ImageFacts::load(dir.path(), TRAINING);
        assert!(matches!(found, Written::Damaged(_)), "{found:?}");
    }
}
