//! VinDr-CXR: boxes of findings by several readers, without reports. A row asks for the findings and answers with names
//! and boxes, which training writes as Qwen3-VL does (`objects`, in `processor/objects.rs`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::{Map, json};

use super::super::error::ConvertError;
use super::super::selection::Part;
use super::record::{Picture, Projection, Record, Records, View};
use super::table::{Table, TableRow};

/// Boxes of two readers that share this much of their union mark one finding.
const SAME: f64 = 0.4;

/// The label of an image without findings.
const NO_FINDING: &str = "No finding";

/// A box of one reader, in pixels of the image as it was published.
#[derive(Debug, Clone, PartialEq)]
struct Marked {
    reader: String,
    class: String,
    corners: [f64; 4],
}

/// What the readers say of one image.
#[derive(Debug, Default)]
struct Image {
    number: usize,
    readers: BTreeSet<String>,
    boxes: Vec<Marked>,
    size: Option<(f64, f64)>,
}

/// Columns of a table of boxes.
struct Columns {
    image: usize,
    class: usize,
    reader: Option<usize>,
    corners: [usize; 4],
    width: Option<usize>,
    height: Option<usize>,
}

impl Columns {
    fn of(table: &Table) -> Result<Self, ConvertError> {
        Ok(Self {
            image: table.needed("image_id")?,
            class: table.needed("class_name")?,
            reader: table.column(&["rad_id", "rad_ID"]),
            corners: [
                table.needed("x_min")?,
                table.needed("y_min")?,
                table.needed("x_max")?,
                table.needed("y_max")?,
            ],
            width: table.column(&["image_width", "width"]),
            height: table.column(&["image_height", "height"]),
        })
    }

    fn corners(&self, path: &Path, row: TableRow<'_>) -> Result<Option<[f64; 4]>, ConvertError> {
        let mut corners = [0.0; 4];
        let mut given = 0;
        for (corner, column) in corners.iter_mut().zip(self.corners) {
            let Some(text) = row.get(Some(column)) else {
                continue;
            };
            let number: Option<f64> = text.parse().ok();
            *corner = number
                .filter(|n| n.is_finite())
                .ok_or_else(|| ConvertError::Form {
                    path: path.to_owned(),
                    row: row.number,
                    what: format!("the corner `{text}`"),
                    expected: "a number of pixels".into(),
                })?;
            given += 1;
        }
        match given {
            0 => Ok(None),
            4 => Ok(Some(corners)),
            _ => Err(ConvertError::Form {
                path: path.to_owned(),
                row: row.number,
                what: "the box".into(),
                expected: "`x_min`, `y_min`, `x_max` and `y_max`, or none of them".into(),
            }),
        }
    }
}

/// Reads the tables of boxes `files`, each of a part.
pub(super) fn read(files: &[PathBuf]) -> Result<Records, ConvertError> {
    let mut found = Records::default();
    let (mut marked, mut kept) = (0, 0);
    let mut with_readers = false;
    for path in files {
        let table = Table::read(path)?;
        found.files.push(table.path.clone());
        let columns = Columns::of(&table)?;
        let sizes = sizes_beside(path)?;
        let (part, folder) = part_of(path);
        let mut order = Vec::new();
        let mut images: HashMap<String, Image> = HashMap::new();
        for row in table.rows() {
            let (Some(id), Some(class)) =
                (row.get(Some(columns.image)), row.get(Some(columns.class)))
            else {
                continue;
            };
            let reader = row.get(columns.reader).unwrap_or_default().to_owned();
            let image = images.entry(id.to_owned()).or_insert_with(|| {
                order.push(id.to_owned());
                let side = |column| row.get(column).and_then(|text| text.parse::<f64>().ok());
                Image {
                    number: row.number,
                    size: side(columns.width)
                        .zip(side(columns.height))
                        .or_else(|| sizes.get(id).copied())
                        .filter(|(width, height)| *width > 0.0 && *height > 0.0),
                    ..Image::default()
                }
            });
            image.readers.insert(reader.clone());
            if let Some(corners) = columns.corners(path, row)? {
                image.boxes.push(Marked {
                    reader,
                    class: class.to_owned(),
                    corners,
                });
            }
        }
        for id in order {
            let Some(image) = images.remove(&id) else {
                continue;
            };
            with_readers |= image.readers.len() > 1;
            marked += image.boxes.len();
            let agreed = agreed(&image);
            kept += agreed.len();
            let mut record = Record::new(&table.path);
            record.part = part;
            record.study = Some(id.clone());
            let path = folder.map_or_else(|| id.clone(), |folder| format!("{folder}/{id}"));
            record.views.push(View {
                number: image.number,
                picture: Picture::Path(path),
                // All of them are PA.
                projection: Projection::Frontal,
            });
            answer(&mut record, &agreed, image.size);
            found.records.push(record);
        }
    }
    found.study_rule = Some("the images of VinDr-CXR, each of another study");
    found.remarks.push(if with_readers {
        format!(
            "VinDr-CXR has no reports: rows ask for findings and boxes; of {marked} boxes of several readers {kept} were made, where more than half of the readers of an image marked the same"
        )
    } else {
        format!("VinDr-CXR has no reports: rows ask for findings and boxes; {kept} boxes")
    });
    Ok(found)
}

/// Writes the answer of a row, and its objects.
fn answer(record: &mut Record, agreed: &[(String, [f64; 4])], size: Option<(f64, f64)>) {
    if agreed.is_empty() {
        record.report.whole = Some(NO_FINDING.into());
        record.objects = Some(Map::new());
        return;
    }
    let lines: Vec<&str> = agreed.iter().map(|_| "<ref-object><bbox>").collect();
    record.report.whole = Some(lines.join("\n"));
    let names: Vec<&String> = agreed.iter().map(|(class, _)| class).collect();
    let boxes = agreed.iter().map(|(_, corners)| match size {
        None => corners.to_vec(),
        Some((width, height)) => {
            let sides = [width, height, width, height];
            let shares = corners.iter().zip(sides);
            shares
                .map(|(corner, side)| (corner / side).clamp(0.0, 1.0))
                .collect()
        }
    });
    let mut objects = Map::new();
    objects.insert("ref".into(), json!(names));
    objects.insert("bbox".into(), json!(boxes.collect::<Vec<Vec<f64>>>()));
    objects.insert(
        "bbox_type".into(),
        json!(if size.is_some() { "norm1" } else { "real" }),
    );
    record.objects = Some(objects);
}

/// The boxes that more than half of the readers of an image marked: the mean of theirs. By name, then from the top.
fn agreed(image: &Image) -> Vec<(String, [f64; 4])> {
    let mut found = Vec::new();
    let mut by_class: BTreeMap<&str, Vec<&Marked>> = BTreeMap::new();
    for marked in &image.boxes {
        by_class.entry(&marked.class).or_default().push(marked);
    }
    for (class, boxes) in by_class {
        // Each box joins the first group that it agrees with and that its reader has no box in.
        let mut groups: Vec<Vec<&Marked>> = Vec::new();
        for marked in boxes {
            let place = groups.iter_mut().find(|group| {
                let other = group.iter().all(|one| one.reader != marked.reader);
                other
                    && group
                        .iter()
                        .any(|one| overlap(&one.corners, &marked.corners) >= SAME)
            });
            match place {
                Some(group) => group.push(marked),
                None => groups.push(vec![marked]),
            }
        }
        for group in groups
            .iter()
            .filter(|group| 2 * group.len() > image.readers.len())
        {
            let mut mean = [0.0; 4];
            for one in group {
                for (sum, corner) in mean.iter_mut().zip(one.corners) {
                    *sum += corner / group.len() as f64;
                }
            }
            found.push((class.to_owned(), mean));
        }
    }
    found.sort_by(|(a, x), (b, y)| a.cmp(b).then(x[1].total_cmp(&y[1])));
    found
}

/// What two boxes share of their union.
fn overlap(a: &[f64; 4], b: &[f64; 4]) -> f64 {
    let area = |c: &[f64; 4]| (c[2] - c[0]).max(0.0) * (c[3] - c[1]).max(0.0);
    let shared = area(&[
        a[0].max(b[0]),
        a[1].max(b[1]),
        a[2].min(b[2]),
        a[3].min(b[3]),
    ]);
    let union = area(a) + area(b) - shared;
    if union > 0.0 { shared / union } else { 0.0 }
}

/// The part of a table by its name, and the folder of its images if there is one.
fn part_of(path: &Path) -> (Option<Part>, Option<&'static str>) {
    let name = path
        .file_stem()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    if name.ends_with("test") {
        (Some(Part::Test), Some("test"))
    } else if name.ends_with("train") {
        (Some(Part::Train), Some("train"))
    } else {
        (None, None)
    }
}

/// Width and height of the images as they were published, from the table that comes with smaller copies.
fn sizes_beside(path: &Path) -> Result<HashMap<String, (f64, f64)>, ConvertError> {
    let stem = path
        .file_stem()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let table = path.with_file_name(format!("{stem}_meta.csv"));
    if !table.is_file() {
        return Ok(HashMap::new());
    }
    let table = Table::read(&table)?;
    let (image, height, width) = (
        table.needed("image_id")?,
        table.needed("dim0")?,
        table.needed("dim1")?,
    );
    let sizes = table.rows().filter_map(|row| {
        let side = |column| row.get(Some(column))?.parse::<f64>().ok();
        Some((
            row.get(Some(image))?.to_owned(),
            (side(width)?, side(height)?),
        ))
    });
    Ok(sizes.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(boxes: &[(&str, &str, [f64; 4])]) -> Image {
        Image {
            readers: ["a", "b", "c"].map(str::to_owned).into(),
            boxes: boxes
                .iter()
                .map(|(reader, class, corners)| Marked {
                    reader: (*reader).to_owned(),
                    class: (*class).to_owned(),
                    corners: *corners,
                })
                .collect(),
            ..Image::default()
        }
    }

    #[test]
    fn a_box_is_kept_where_most_readers_agree() {
        let found = agreed(&image(&[
            ("a", "Nodule", [0.0, 0.0, 10.0, 10.0]),
            ("b", "Nodule", [0.0, 0.0, 10.0, 12.0]),
            // Another place, another name, and a second box of one reader.
            ("c", "Nodule", [50.0, 50.0, 60.0, 60.0]),
            ("c", "Mass", [0.0, 0.0, 10.0, 10.0]),
            ("a", "Nodule", [50.0, 50.0, 60.0, 61.0]),
            ("a", "Nodule", [0.0, 0.0, 10.0, 11.0]),
        ]));
        assert_eq!(
            found,
            [
                ("Nodule".to_owned(), [0.0, 0.0, 10.0, 11.0]),
                ("Nodule".to_owned(), [50.0, 50.0, 60.0, 60.5]),
            ]
        );
        assert_eq!(
            overlap(&[0.0, 0.0, 2.0, 2.0], &[1.0, 0.0, 3.0, 2.0]),
            1.0 / 3.0
        );
        assert_eq!(overlap(&[0.0; 4], &[0.0; 4]), 0.0);
    }
}
