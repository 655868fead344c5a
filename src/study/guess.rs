//! The study of an image from its path, for rows that do not name it.
//!
//! Forms that are clear by themselves come first (MIMIC-CXR, CheXpert, BIDS, DICOM's UIDs, NIH). What is left is
//! looked at together: `0.png` in twenty folders says that the folder is the study, `0001_1.png` and `0001_2.png`
//! in one that the name is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use regex::Regex;

use super::row::StudyRow;

/// A folder or a name shared by more images than this, on average, is no study.
const MOST_VIEWS: usize = 8;

/// Endings of image files, which are no part of a name.
const ENDINGS: [&str; 24] = [
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif", "tif", "tiff", "jp2", "j2k", "j2c",
    "jpc", "jls", "pbm", "pgm", "ppm", "pnm", "nii", "nrrd", "dcm", "dicom", "gz",
];

/// The form of path that gave a study.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PathForm {
    /// A folder of a patient, and within it one of a study.
    PatientFolders,
    /// A folder that is named by a DICOM UID.
    UidFolder,
    /// `00000001_000`: patient and follow-up.
    FollowUp,
    /// A name that ends with a view.
    NameAndView,
    /// The folder.
    Folder,
    /// The whole name.
    Name,
    /// Nothing: the row itself.
    Row,
}

impl PathForm {
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::PatientFolders => "folders `PATIENT/STUDY`",
            Self::UidFolder => "folders named by a UID",
            Self::FollowUp => "file names `PATIENT_FOLLOWUP`",
            Self::NameAndView => "file names `STUDY_VIEW`",
            Self::Folder => "folders",
            Self::Name => "whole file names, one study a name",
            Self::Row => "rows, for want of images",
        }
    }
}

/// What the path of an image says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GuessedStudy {
    /// The study; it differs between folders unless the form distinguishes studies by itself.
    pub(super) id: String,
    /// The study without its folder.
    pub(super) name: String,
    pub(super) patient: Option<String>,
    pub(super) form: PathForm,
    /// Whether the form distinguishes studies.
    pub(super) certain: bool,
}

fn pattern(text: &str) -> Regex {
    Regex::new(text)
        .expect("the patterns of this file are constants, and each is compiled in a test")
}

static PATIENT: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"^(?i:p|pt|pat|patient|pid|subj|subject|患者|病人)[-_ ]?\d+$|^sub-[0-9A-Za-z]+$")
});
static STUDY: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"^(?i:s|study|exam|visit|检查)[-_ ]?\d+$|^ses-[0-9A-Za-z]+$|^\d[\d.-]*$")
});
static UID: LazyLock<Regex> = LazyLock::new(|| pattern(r"^[0-2](?:\.\d+){5,}$"));
static FOLLOW_UP: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(\d{8})_\d{3}$"));
/// The Indiana collection: `1_IM-0001-4001`, `CXR1_1_IM-0001-3001`, and folders `CXR1_IM-0001`.
static INDIANA: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(?:CXR)?(\d+)_(?:\d+_)?IM-\d+"));
/// PadChest: a number too long to be counted up, and the image's own.
static LONG_NUMBER: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(\d{20,})_.+$"));
/// A view at the end of a name, after a separator or, in Chinese, without one.
static VIEW: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"(?i:[-_. ](?:pa|ap|lat|lateral|ll|rl|front|frontal|oblique|obl|(?:view|image|img)[-_]?\d{0,2}|v\d{1,2}))$|[-_. ]?(?:后前位|前后位|正侧位|正位|侧位|斜位|正|侧)片?$",
    )
});
static INDEX: LazyLock<Regex> = LazyLock::new(|| pattern(r"_\d{1,2}$"));
/// A part of a name that does not distinguish studies.
static WORD: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"^(?:\D*|\d{1,3}|(?i:view|image|img|scan|film|pic|v)\d{1,2})$"));
static WORD_AND_NUMBER: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"^(?i:view|image|img|scan|film|pic|v)[-_]?\d{1,2}$"));
/// A folder that is a part of a collection, with a number or without.
static COLLECTION: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?i:images?|imgs?|pictures?|films?|data|dataset|train|val|valid|validation|test|dev|part|batch|split|fold|set|png|jpe?g|dicom)[-_ ]?\d*$",
    )
});
static HASH: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"^(?:[0-9a-fA-F]{16,}|[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4,12}){4})$"));
/// What a view that is counted apart may look like: a short number or a letter after the name proper.
static APART: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"^(.*\d.*?)(?:[-_. ]\d{1,2}|[-_. ]?[A-Za-z])$"));

/// The path seen from where the program runs: `/` between its parts, without `.` and `..` where they can go.
pub(super) fn joined(folder: &str, image: &str) -> String {
    let image = image.replace('\\', "/");
    let drive = image.as_bytes().get(1) == Some(&b':');
    let whole = if image.starts_with('/') || drive || folder.is_empty() {
        image
    } else {
        format!("{}/{image}", folder.replace('\\', "/"))
    };
    let mut parts: Vec<&str> = Vec::new();
    for part in whole.split('/') {
        match part {
            "." => {}
            "" if !parts.is_empty() => {}
            ".." if parts
                .last()
                .is_some_and(|last| !last.is_empty() && *last != "..") =>
            {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Folder and name of a path as [`joined`] gives it, the name without the endings of image files.
pub(super) fn folder_and_stem(path: &str) -> (&str, &str) {
    let (folder, mut stem) = path.rsplit_once('/').unwrap_or(("", path));
    while let Some((shorter, ending)) = stem.rsplit_once('.')
        && ENDINGS.contains(&ending.to_lowercase().as_str())
        && !shorter.is_empty()
    {
        stem = shorter;
    }
    (folder, stem)
}

/// An image whose path alone does not say its study.
struct Image {
    row: usize,
    /// From the first folder that not all images share.
    folder: String,
    /// The folder it is in, which all may share.
    last_folder: String,
    stem: String,
}

impl Image {
    fn in_folder(&self, name: &str) -> String {
        if self.folder.is_empty() {
            name.to_owned()
        } else {
            format!("{}/{name}", self.folder)
        }
    }

    /// Whether the name does not distinguish studies: words, a view, a small number.
    fn is_weak(&self) -> bool {
        let parts = || self.stem.split(['_', '-', ' ', '.']);
        parts().all(|part| WORD.is_match(part)) && before_view(&self.stem, true).is_none()
    }

    /// Whether the folder is numbered as a study may be, and not as a part of a collection.
    fn is_in_numbered_folder(&self) -> bool {
        self.last_folder.bytes().any(|byte| byte.is_ascii_digit())
            && !COLLECTION.is_match(&self.last_folder)
    }

    /// The folder as a study.
    fn by_folder(&self) -> GuessedStudy {
        let id = if self.folder.is_empty() {
            &self.last_folder
        } else {
            &self.folder
        };
        let name = match INDIANA.captures(&self.last_folder) {
            Some(groups) => groups[1].to_owned(),
            None => self.last_folder.clone(),
        };
        GuessedStudy {
            patient: PATIENT.is_match(&self.last_folder).then(|| id.clone()),
            id: id.clone(),
            name,
            form: PathForm::Folder,
            certain: true,
        }
    }
}

/// The guess for each image of each row.
pub(super) fn guesses(rows: &[StudyRow]) -> Vec<Vec<GuessedStudy>> {
    let paths: Vec<(usize, String)> = rows
        .iter()
        .enumerate()
        .flat_map(|(at, row)| {
            let images = row.images.iter();
            images.map(move |image| (at, joined(&row.folder, image)))
        })
        .collect();
    let shared = shared_folders(paths.iter().map(|(_, path)| folder_and_stem(path).0));
    let mut found: Vec<Option<GuessedStudy>> = Vec::with_capacity(paths.len());
    let mut rest = Vec::new();
    for (at, (row, path)) in paths.iter().enumerate() {
        let (folder, stem) = folder_and_stem(path);
        let clear = clear(folder, stem);
        if clear.is_none() {
            // The last folder that all share stays out of the name.
            let own: Vec<&str> = folder.split('/').skip(shared).collect();
            rest.push((
                at,
                Image {
                    row: *row,
                    folder: own.join("/"),
                    last_folder: folder.rsplit('/').next().unwrap_or_default().to_owned(),
                    stem: stem.to_owned(),
                },
            ));
        }
        found.push(clear);
    }
    let images: Vec<&Image> = rest.iter().map(|(_, image)| image).collect();
    for ((at, _), guess) in rest.iter().zip(of_many(&images)) {
        found[*at] = Some(guess);
    }
    let mut by_row: Vec<Vec<GuessedStudy>> = vec![Vec::new(); rows.len()];
    for ((row, _), guess) in paths.iter().zip(found) {
        by_row[*row].extend(guess);
    }
    by_row
}

/// How many folders from the root all paths share.
fn shared_folders<'a>(folders: impl Iterator<Item = &'a str>) -> usize {
    let mut shared: Option<Vec<&str>> = None;
    for folder in folders {
        let parts: Vec<&str> = folder.split('/').collect();
        shared = Some(match shared {
            None => parts,
            Some(shared) => {
                let same = shared.iter().zip(&parts).take_while(|(a, b)| a == b);
                let same = same.count();
                shared[..same].to_vec()
            }
        });
    }
    shared.map_or(0, |shared| shared.len())
}

/// What a path says by itself.
fn clear(folder: &str, stem: &str) -> Option<GuessedStudy> {
    let guess = |id: String, patient: Option<&str>, form| GuessedStudy {
        name: id.clone(),
        id,
        patient: patient.map(str::to_owned),
        form,
        certain: true,
    };
    let folders: Vec<&str> = folder.split('/').collect();
    let patient = folders.iter().rposition(|folder| PATIENT.is_match(folder));
    if let Some(at) = patient
        && let Some(study) = folders.get(at + 1).filter(|study| STUDY.is_match(study))
    {
        let patient = folders[at];
        let id = format!("{patient}/{study}");
        return Some(guess(id, Some(patient), PathForm::PatientFolders));
    }
    // Study, series, image: the first is the study's.
    if let Some(uid) = folders.iter().find(|folder| UID.is_match(folder)) {
        return Some(guess((*uid).to_owned(), None, PathForm::UidFolder));
    }
    let follow_up = FOLLOW_UP.captures(stem)?;
    let patient = follow_up.get(1).map(|group| group.as_str());
    Some(guess(stem.to_owned(), patient, PathForm::FollowUp))
}

/// What paths say together that say nothing clear alone.
fn of_many(images: &[&Image]) -> Vec<GuessedStudy> {
    let by_folder = folders_are_studies(images);
    let names: Vec<Option<String>> = images
        .iter()
        .map(|image| before_view(&image.stem, true))
        .collect();
    let index_is_view = is_small(
        images
            .iter()
            .zip(&names)
            .filter_map(|(image, name)| Some((image.in_folder(name.as_deref()?), image.row))),
    );
    let mut in_folder: BTreeMap<&str, usize> = BTreeMap::new();
    for image in images {
        *in_folder.entry(&image.folder).or_default() += 1;
    }
    let guesses = images.iter().zip(names).map(|(image, name)| {
        // A folder of a patient without folders of studies, and no larger than a study.
        let of_patient =
            PATIENT.is_match(&image.last_folder) && in_folder[image.folder.as_str()] <= MOST_VIEWS;
        if by_folder || of_patient {
            return image.by_folder();
        }
        let study = match name {
            Some(name) if index_is_view => Some(name),
            _ => before_view(&image.stem, false),
        };
        let (study, form) = match study {
            Some(study) => (study, PathForm::NameAndView),
            None => (image.stem.clone(), PathForm::Name),
        };
        let is_number = study.bytes().all(|byte| byte.is_ascii_digit());
        GuessedStudy {
            id: image.in_folder(&study),
            name: study,
            patient: None,
            form,
            certain: form == PathForm::NameAndView || is_number,
        }
    });
    guesses.collect()
}

/// Whether the folders are the studies: several small ones whose images' names say nothing.
fn folders_are_studies(images: &[&Image]) -> bool {
    let mut folders_of: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let mut folders: BTreeSet<&str> = BTreeSet::new();
    for image in images {
        folders_of
            .entry(&image.stem)
            .or_default()
            .insert(&image.folder);
        folders.insert(&image.folder);
    }
    if folders.len() < 2 || images.len() > MOST_VIEWS * folders.len() {
        return false;
    }
    let says_nothing = images.iter().filter(|image| {
        let repeats = folders_of[image.stem.as_str()].len() > 1;
        let unique = HASH.is_match(&image.stem) || UID.is_match(&image.stem);
        image.is_weak() && (repeats || image.is_in_numbered_folder())
            || unique && image.is_in_numbered_folder()
    });
    2 * says_nothing.count() > images.len()
}

/// Whether groups of rows are as small as studies.
fn is_small(groups: impl Iterator<Item = (String, usize)>) -> bool {
    let mut sizes: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
    for (group, row) in groups {
        sizes.entry(group).or_default().insert(row);
    }
    let rows: usize = sizes.values().map(BTreeSet::len).sum();
    rows <= MOST_VIEWS * sizes.len()
}

/// What precedes the view in a name: `2` of `2_1`, `00001` of `00001_PA`. `None` if there is no view, or if
/// nothing with a digit precedes it. A bare number is a view only with `index`.
fn before_view(stem: &str, index: bool) -> Option<String> {
    if let Some(groups) = INDIANA
        .captures(stem)
        .or_else(|| LONG_NUMBER.captures(stem))
    {
        return Some(groups[1].to_owned());
    }
    let has_digit = |text: &str| text.bytes().any(|byte| byte.is_ascii_digit());
    let mut rest = stem;
    let mut index = index;
    loop {
        let shorter = match (VIEW.find(rest), INDEX.find(rest)) {
            (Some(view), _) => &rest[..view.start()],
            (None, Some(number)) if index => {
                index = false;
                &rest[..number.start()]
            }
            _ => break,
        };
        if !has_digit(shorter) || WORD_AND_NUMBER.is_match(shorter) {
            break;
        }
        rest = shorter;
    }
    (rest != stem).then(|| rest.to_owned())
}

/// Two names that look like views of one study, if most names are of such pairs.
pub(super) fn views_apart(images: &[&str]) -> Option<[String; 2]> {
    let mut groups: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for image in images {
        let path = joined("", image);
        let (folder, stem) = folder_and_stem(&path);
        if let Some(found) = APART.captures(stem) {
            groups
                .entry(format!("{folder}/{}", &found[1]))
                .or_default()
                .push(image);
        }
    }
    let alike = groups
        .values()
        .filter(|names| (2..=MOST_VIEWS).contains(&names.len()));
    let pairs: usize = alike.clone().map(Vec::len).sum();
    let first = alike.clone().next()?;
    (2 * pairs > images.len()).then(|| [first[0].to_owned(), first[1].to_owned()])
}
