//! ROCO and ROCOv2: captions of images from articles, in folders of parts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use regex::Regex;

use super::super::error::ConvertError;
use super::super::selection::Part;
use super::record::{Picture, Projection, Record, Records, Report, View, one_line};
use super::table::{Table, text_of};

/// The article that an image is from.
static ARTICLE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^(PMC\d+)_").expect("the pattern is a constant that a test compiles")
});

/// Reads the lists of captions `files`, each of a part.
pub(super) fn read(files: &[PathBuf]) -> Result<Records, ConvertError> {
    let mut found = Records::default();
    let mut with_article = true;
    for path in files {
        let file: Arc<Path> = path.as_path().into();
        found.files.push(file.clone());
        let part = part_of(path);
        for (number, image, caption) in captions(path)? {
            let mut record = Record::new(&file);
            record.report = Report {
                whole: one_line(&caption),
                ..Report::default()
            };
            record.part = part;
            // Pictures of one article show one patient, as a rule.
            let name = image.rsplit('/').next().unwrap_or(&image);
            record.study = ARTICLE.captures(name).map(|groups| groups[1].to_owned());
            with_article &= record.study.is_some();
            record.views.push(View {
                number,
                picture: Picture::Path(image),
                projection: Projection::Unknown,
            });
            found.records.push(record);
        }
    }
    if with_article {
        found.study_rule = Some("the articles of ROCO, `PMCn_…`");
    }
    found.remarks.push(
        "ROCO holds all kinds of radiology, not chest X-rays alone; remove the rows that you do not want".into(),
    );
    Ok(found)
}

/// The part of a list, by its folders or its name.
fn part_of(path: &Path) -> Option<Part> {
    let name = path.file_name()?.to_str()?;
    let own = name
        .split(['_', '.', '-'])
        .find_map(|word| Part::of(word.trim_end_matches("data")));
    own.or_else(|| {
        let folders = path.iter().rev().skip(1).take(3);
        folders
            .filter_map(|folder| folder.to_str())
            .find_map(Part::of)
    })
}

/// Row, image and caption of each line of a list.
fn captions(path: &Path) -> Result<Vec<(usize, String, String)>, ConvertError> {
    let folder = folder_of_images(path);
    let named = |name: &str| match &folder {
        Some(folder) => format!("{folder}/{name}"),
        None => name.to_owned(),
    };
    if path.extension().is_some_and(|ending| ending == "txt") {
        let names = names_beside(path)?;
        let text = text_of(path)?;
        let lines = text.lines().enumerate();
        return lines
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(at, line)| {
                let (id, caption) = line.split_once('\t').ok_or_else(|| ConvertError::Form {
                    path: path.to_owned(),
                    row: at + 1,
                    what: "the line".into(),
                    expected: "`ROCO_n`, a tab and the caption".into(),
                })?;
                let id = id.trim();
                let name = names.get(id).map_or(id, String::as_str);
                Ok((at + 1, named(name), caption.to_owned()))
            })
            .collect();
    }
    let table = Table::read(path)?;
    let caption = table.needed("caption")?;
    let image = match table.column(&["name", "id"]) {
        Some(image) => image,
        None => table.needed("id")?,
    };
    let rows = table.rows().filter_map(|row| {
        let image = named(row.get(Some(image))?);
        let caption = row.get(Some(caption)).unwrap_or_default().to_owned();
        Some((row.number, image, caption))
    });
    Ok(rows.collect())
}

/// The folder of a list's images, below the folder that is searched: `train/radiology/images` for
/// `train/radiology/captions.txt`, `train` for `train_captions.csv`.
fn folder_of_images(path: &Path) -> Option<String> {
    let beside = path.parent()?;
    if beside.join("images").is_dir() {
        let mut parts: Vec<&str> = beside
            .iter()
            .rev()
            .take_while(|name| {
                name.to_str()
                    .is_some_and(|name| name == "radiology" || Part::of(name).is_some())
            })
            .filter_map(|name| name.to_str())
            .collect();
        parts.reverse();
        parts.push("images");
        return Some(parts.join("/"));
    }
    let name = path.file_name()?.to_str()?;
    let part = name.split('_').next()?;
    let folders = [format!("{part}_images"), part.to_owned()];
    folders
        .into_iter()
        .find(|folder| beside.join(folder).is_dir())
}

/// Names of the image files by their ids, from the list of downloads beside the captions.
fn names_beside(path: &Path) -> Result<HashMap<String, String>, ConvertError> {
    let list = path.with_file_name("dlinks.txt");
    if !list.is_file() {
        return Ok(HashMap::new());
    }
    let text = text_of(&list)?;
    let names = text.lines().filter_map(|line| {
        let mut fields = line
            .split('\t')
            .map(str::trim)
            .filter(|field| !field.is_empty());
        let id = fields.next()?;
        Some((id.to_owned(), fields.next_back()?.to_owned()))
    });
    Ok(names.collect())
}
