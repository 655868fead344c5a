//! Which images reports are written about: those named, or those of a folder.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use super::{args::InferArgs, task::Task};
use crate::{
    commands::shipped::shipped,
    processor::image::{ENDINGS, has_picture_ending},
    study::counted,
};

/// The image of a run without arguments.
const SAMPLE_IMAGE: &str = "data/sample/demo.png";

/// The images of each report; what a folder holds besides is counted on stderr.
///
/// # Errors
/// A folder that cannot be read, or holds no image.
pub(super) fn list(args: &InferArgs) -> Result<Vec<Task>> {
    let mut images: Vec<PathBuf> = args.images.iter().map(|image| shipped(image)).collect();
    if let Some(dir) = args.images_dir.as_deref().map(shipped).as_deref() {
        let (found, skipped) = in_folder(dir, args.recursive)?;
        let skipped = skipped.sentence();
        if found.is_empty() {
            bail!(
                "`{}` holds no image; expected files ending in {}, or DICOM files of any name{}",
                dir.display(),
                ENDINGS.join(", "),
                skipped.map_or_else(String::new, |skipped| format!("; {skipped}"))
            );
        }
        if let Some(skipped) = skipped {
            eprintln!("`{}`: {skipped}", dir.display());
        }
        images = found;
    }
    if images.is_empty() {
        images.push(shipped(Path::new(SAMPLE_IMAGE)));
    }
    Ok(if args.together {
        vec![Task::about(images)]
    } else {
        images
            .into_iter()
            .map(|image| Task::about(vec![image]))
            .collect()
    })
}

/// What of a folder is not looked at.
#[derive(Debug, Default, PartialEq, Eq)]
struct Skipped {
    folders: usize,
    /// Folders that links lead to a second time.
    again: usize,
    /// Pipes, devices and links that lead nowhere.
    no_files: usize,
    /// Files of no known kind, by ending.
    files: BTreeMap<String, usize>,
}

impl Skipped {
    fn sentence(&self) -> Option<String> {
        let mut parts = Vec::new();
        if self.folders > 0 {
            parts.push(format!(
                "{} (--recursive looks into them)",
                counted(self.folders, "folder", "folders")
            ));
        }
        if self.again > 0 {
            parts.push(format!(
                "{} to folders that were looked into already",
                counted(self.again, "link", "links")
            ));
        }
        if self.no_files > 0 {
            parts.push(counted(
                self.no_files,
                "entry that is no file",
                "entries that are no files",
            ));
        }
        if !self.files.is_empty() {
            // The most frequent first; endings of equal number in alphabetical order.
            let mut endings: Vec<(&String, &usize)> = self.files.iter().collect();
            endings.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
            let listed: Vec<String> = endings
                .iter()
                .map(|(ending, count)| format!("{ending} {count}"))
                .collect();
            parts.push(format!(
                "{} of other kinds: {}",
                counted(self.files.values().sum(), "file", "files"),
                listed.join(", ")
            ));
        }
        (!parts.is_empty()).then(|| format!("skipped {}", parts.join(", ")))
    }
}

/// The images of a folder in order of name; with `recursive`, of those below it too.
fn in_folder(dir: &Path, recursive: bool) -> Result<(Vec<PathBuf>, Skipped)> {
    let mut images = Vec::new();
    let mut skipped = Skipped::default();
    let mut seen = HashSet::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(folder) = todo.pop() {
        let unreadable = || format!("cannot read the folder `{}`", folder.display());
        // Links may lead back; a folder is looked into under the name met first.
        if !seen.insert(fs::canonicalize(&folder).with_context(unreadable)?) {
            skipped.again += 1;
            continue;
        }
        let mut below = Vec::new();
        for entry in fs::read_dir(&folder).with_context(unreadable)? {
            let path = entry.with_context(unreadable)?.path();
            if path.is_dir() {
                below.push(path);
            } else if !path.is_file() {
                skipped.no_files += 1;
            } else if is_image(&path) {
                images.push(path);
            } else {
                *skipped.files.entry(ending(&path)).or_default() += 1;
            }
        }
        if recursive {
            below.sort();
            todo.extend(below.into_iter().rev());
        } else {
            skipped.folders += below.len();
        }
    }
    images.sort();
    Ok((images, skipped))
}

fn ending(path: &Path) -> String {
    path.extension().map_or_else(
        || "without ending".to_owned(),
        |ending| format!(".{}", ending.to_string_lossy().to_lowercase()),
    )
}

/// Endings count; DICOM files are found by their mark as well.
fn is_image(path: &Path) -> bool {
    let known = path
        .file_name()
        .is_some_and(|name| has_picture_ending(&name.to_string_lossy()));
    known || (has_dicom_mark(path) && !is_directory_file(path))
}

/// Whether a file has DICOM's mark, `DICM` after 128 bytes: `.ima`, `.img`, `.dic`, an UID, or no ending.
fn has_dicom_mark(path: &Path) -> bool {
    let mut head = [0; 132];
    File::open(path).is_ok_and(|mut file| file.read_exact(&mut head).is_ok())
        && head.ends_with(b"DICM")
}

/// A DICOMDIR has the mark and no image.
fn is_directory_file(path: &Path) -> bool {
    path.file_stem()
        .is_some_and(|name| name.eq_ignore_ascii_case("DICOMDIR"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, dicom: bool) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut bytes = vec![0; 128];
        bytes.extend_from_slice(if dicom { b"DICM" } else { b"none" });
        fs::write(path, bytes).unwrap();
    }

    fn names(dir: &Path, images: &[PathBuf]) -> Vec<String> {
        images
            .iter()
            .map(|path| path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn dicom_files_are_found_by_their_mark_and_the_rest_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["IM1", "1.2.840.113619", "a.ima", "b.IMG", "c.dic"] {
            write(&dir.path().join(name), true);
        }
        for name in ["DICOMDIR", "dicomdir.dcx"] {
            write(&dir.path().join(name), true);
        }
        for name in [
            "x.xcf",
            "y.txt",
            "z.TXT",
            "notes",
            "d.ima",
            "sub/e.png",
            "f.png",
        ] {
            write(&dir.path().join(name), false);
        }
        let (images, skipped) = in_folder(dir.path(), false).unwrap();
        assert_eq!(
            names(dir.path(), &images),
            ["1.2.840.113619", "IM1", "a.ima", "b.IMG", "c.dic", "f.png"]
        );
        assert_eq!(
            skipped.sentence().unwrap(),
            "skipped 1 folder (--recursive looks into them), \
             7 files of other kinds: .txt 2, without ending 2, .dcx 1, .ima 1, .xcf 1"
        );
        let (images, skipped) = in_folder(dir.path(), true).unwrap();
        assert!(names(dir.path(), &images).contains(&"sub/e.png".to_owned()));
        assert_eq!(skipped.folders, 0);
    }

    #[cfg(unix)]
    #[test]
    fn links_that_lead_back_are_followed_once() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("a/b/x.png"), false);
        std::os::unix::fs::symlink("..", dir.path().join("a/b/up")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("dead.png")).unwrap();
        let (images, skipped) = in_folder(dir.path(), true).unwrap();
        assert_eq!(names(dir.path(), &images), ["a/b/x.png"]);
        assert_eq!((skipped.again, skipped.no_files), (1, 1));
    }
}
