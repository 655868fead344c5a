//! The corpora that are known, by their names and files.

use std::str::FromStr;

use serde::Serialize;

/// A corpus, or the form of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CorpusForm {
    /// OpenI-zh: `{"annotations": [{"image_id", "caption"}]}`.
    Annotations,
    /// OpenI-zh as XrayGLM has it: `[{"img", "prompt", "label"}]`.
    Prompts,
    /// Rows of `messages` and `images`, one a line or as a list.
    Messages,
    /// Rows of keys that the user names, one a line, as a list, or as lists under keys such as `train` and `val`.
    Keys,
    /// R2Gen's `annotation.json` of IU X-Ray or MIMIC-CXR: lists under `train`, `val` and `test`.
    R2gen,
    /// The Indiana collection as on Kaggle: `indiana_reports.csv` and `indiana_projections.csv`.
    Indiana,
    /// MIMIC-CXR or MIMIC-CXR-JPG: a tree of reports and images, with tables of views and of the split.
    MimicCxr,
    /// CheXpert Plus: `df_chexpert_plus_240401.csv`.
    ChexpertPlus,
    /// PadChest: `PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv`.
    Padchest,
    /// ROCO and ROCOv2: captions of radiology images.
    Roco,
    /// VinDr-CXR: boxes of findings, without reports.
    VindrCxr,
    /// JSON rows of known keys, such as `[{"image", "report"}]` and `{"data": […]}`.
    Rows,
    /// A table of known columns, English or Chinese.
    Table,
}

/// Each corpus with its names, the first of which is printed, and the files it is known by.
const CORPORA: [(CorpusForm, &[&str], &str); 13] = [
    (
        CorpusForm::Annotations,
        &["openi-zh", "annotations"],
        "a JSON file `{\"annotations\": [{\"image_id\", \"caption\"}]}`",
    ),
    (
        CorpusForm::Prompts,
        &["xrayglm", "openi-zh-prompt", "prompts"],
        "a JSON list of `img`, `prompt` and `label`",
    ),
    (
        CorpusForm::Messages,
        &["messages", "ms-swift"],
        "JSONL rows of `messages` and `images`",
    ),
    (
        CorpusForm::Keys,
        &["keys"],
        "JSON rows, with `--image-key` and `--report-key`",
    ),
    (
        CorpusForm::R2gen,
        &["r2gen", "iu-xray"],
        "`annotation.json` with lists `train`, `val` and `test` of `image_path` and `report`",
    ),
    (
        CorpusForm::Indiana,
        &["indiana", "iu-kaggle"],
        "`indiana_reports.csv` and `indiana_projections.csv`",
    ),
    (
        CorpusForm::MimicCxr,
        &["mimic-cxr", "mimic", "mimic-cxr-jpg"],
        "`files/p10/p…/s….txt` with images in `files/p10/p…/s…/`, and `mimic-cxr-2.0.0-metadata.csv` and `-split.csv`, as they are or as .gz",
    ),
    (
        CorpusForm::ChexpertPlus,
        &["chexpert-plus", "chexpert"],
        "`df_chexpert_plus_240401.csv` with `path_to_image`, `section_findings` and `section_impression`",
    ),
    (
        CorpusForm::Padchest,
        &["padchest"],
        "`PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv` with `ImageID`, `StudyID`, `PatientID` and `Report`",
    ),
    (
        CorpusForm::Roco,
        &["roco", "rocov2"],
        "`radiology/captions.txt`, `radiology/traindata.csv` or `train_captions.csv`",
    ),
    (
        CorpusForm::VindrCxr,
        &["vindr-cxr", "vindr"],
        "`annotations_train.csv` or `train.csv` with `image_id`, `class_name` and `x_min`, `y_min`, `x_max`, `y_max`",
    ),
    (
        CorpusForm::Rows,
        &["rows", "json"],
        "JSON rows with an image (`image`, `image_path` …) and a report (`report`, `findings`, `impression` …)",
    ),
    (
        CorpusForm::Table,
        &["table", "csv"],
        "a table with a column of images (`image`, 文件名, 影像号 …) and of reports (`report`, 影像所见, 影像诊断 …)",
    ),
];

impl CorpusForm {
    /// The name that `--corpus` takes.
    pub fn name(self) -> &'static str {
        self.entry().1[0]
    }

    /// The files it is known by, in words.
    pub(super) fn files(self) -> &'static str {
        self.entry().2
    }

    fn entry(self) -> &'static (Self, &'static [&'static str], &'static str) {
        let found = CORPORA.iter().find(|(form, ..)| *form == self);
        found.unwrap_or(&CORPORA[0])
    }
}

impl FromStr for CorpusForm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = text.to_lowercase().replace('_', "-");
        let found = CORPORA
            .iter()
            .find(|(_, names, _)| names.contains(&wanted.as_str()));
        found.map(|(form, ..)| *form).ok_or_else(|| {
            let names: Vec<&str> = CORPORA.iter().map(|(_, names, _)| names[0]).collect();
            format!("expected one of {}", names.join(", "))
        })
    }
}

/// The keys of a corpus in no known form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorpusKeys {
    /// Key of the image: a path, or a list of paths.
    pub image: String,
    /// Key of the report.
    pub report: String,
}
