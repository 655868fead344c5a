//! Phantoms as training samples: an endless series in memory, or a folder with images and JSONL.

use std::{
    fs,
    io::{self, BufWriter, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use image::{
    ExtendedColorType, GrayImage, ImageEncoder,
    codecs::png::{CompressionType, FilterType, PngEncoder},
};
use serde::Serialize;

use super::{
    draws::{Draws, Purpose},
    report::{Dialect, write_report},
    study::Study,
};

/// Questions put to the model; the first is the published default.
pub const PROMPTS: [&str; 13] = [
    "通过这张胸部X光影像可以诊断出什么？",
    "请为这张胸部X光片书写报告。",
    "请描述这张胸片的影像所见。",
    "这张胸片有什么异常？",
    "请阅读这张X光片，给出诊断意见。",
    "胸部X光检查的结果是什么？",
    "请根据胸片写出所见和印象。",
    "这张影像显示了哪些病变？",
    "请分析这张胸部影像。",
    "从这张X光片可以看到什么？",
    "请写一份胸部X光诊断报告。",
    "请判断心影、肺野和胸腔有无异常。",
    "作为放射科医生，你如何报告这张胸片？",
];

/// Name of the sample list in a data set folder.
const SAMPLES_FILE: &str = "samples.jsonl";

/// A data set of phantoms could not be written.
#[derive(Debug, thiserror::Error)]
pub enum PhantomDatasetError {
    /// The target holds something already.
    #[error("`{}` exists and is not an empty folder; choose another folder or remove it", .0.display())]
    Exists(PathBuf),
    /// No sample to write, or no question.
    #[error("a data set needs at least one {0}, found none; give a longer list or range")]
    Empty(&'static str),
    /// A file or folder could not be written.
    #[error("cannot write `{}`; check free space and permissions", .path.display())]
    Write {
        /// What was being written.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// An image could not be encoded as PNG.
    #[error("cannot encode `{}` as PNG", .path.display())]
    Encode {
        /// The image file.
        path: PathBuf,
        /// What the encoder said.
        #[source]
        cause: image::ImageError,
    },
    /// A sample could not be written as JSON.
    #[error("cannot write sample {index} as JSON")]
    Json {
        /// Index of the study.
        index: u64,
        /// What the serializer said.
        #[source]
        cause: serde_json::Error,
    },
}

/// One question about one image, with the answer.
#[derive(Debug, Clone)]
pub struct PhantomSample {
    /// The image and its true findings.
    pub study: Study,
    /// The question, without an image mark.
    pub prompt: String,
    /// The answer.
    pub report: String,
}

impl PhantomSample {
    /// Image, question and answer, without the true findings.
    pub fn into_parts(self) -> (GrayImage, String, String) {
        (self.study.image, self.prompt, self.report)
    }
}

/// The endless series of samples of one seed, by index or as an iterator.
#[derive(Debug, Clone)]
pub struct PhantomStudies {
    seed: u64,
    dialect: Dialect,
    prompts: Vec<String>,
    next: u64,
}

impl PhantomStudies {
    /// The series of `seed` in [`Dialect::Plain`] with [`PROMPTS`], starting at index 0.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            dialect: Dialect::Plain,
            prompts: PROMPTS.map(str::to_owned).to_vec(),
            next: 0,
        }
    }

    /// The same images with reports in `dialect`.
    pub fn with_dialect(self, dialect: Dialect) -> Self {
        Self { dialect, ..self }
    }

    /// The same images with questions from `prompts`; an empty list gives empty questions.
    pub fn with_prompts(self, prompts: &[&str]) -> Self {
        let prompts = prompts.iter().map(|&prompt| prompt.to_owned()).collect();
        Self { prompts, ..self }
    }

    /// The sample at `index`, a pure function of the series and the index.
    pub fn get(&self, index: u64) -> PhantomSample {
        let study = Study::new(self.seed, index);
        let mut draws = Draws::new(self.seed, index, Purpose::Prompt);
        let wording_seed = draws.word();
        let prompt = if self.prompts.is_empty() {
            String::new()
        } else {
            self.prompts[draws.below(self.prompts.len())].clone()
        };
        let report = write_report(&study.findings, self.dialect, wording_seed);
        PhantomSample {
            study,
            prompt,
            report,
        }
    }
}

impl Iterator for PhantomStudies {
    type Item = PhantomSample;

    /// The next sample; the series ends only with the last `u64`.
    fn next(&mut self) -> Option<Self::Item> {
        let sample = self.get(self.next);
        self.next = self.next.checked_add(1)?;
        Some(sample)
    }
}

/// What [`write_dataset`] wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The list of samples, one JSON object a line.
    pub samples_file: PathBuf,
    /// Samples, each with one image.
    pub samples: usize,
    /// Samples without a finding.
    pub normal: usize,
    /// Findings over all samples.
    pub findings: usize,
    /// Size of all images, in bytes.
    pub image_bytes: u64,
}

/// One line of the sample list, in the form ms-swift reads.
#[derive(Serialize)]
struct SampleLine<'a> {
    messages: [SampleMessage<'a>; 2],
    images: [String; 1],
}

#[derive(Serialize)]
struct SampleMessage<'a> {
    role: &'static str,
    content: &'a str,
}

/// Writes the samples `range` of `seed` as a data set: `dir/images/NNNN.png`, eight-bit grey, and
/// `dir/samples.jsonl`, whose image paths are relative to `dir`.
///
/// The folder is written beside `dir` and renamed, so `dir` is complete once it exists.
///
/// # Errors
/// [`PhantomDatasetError::Exists`] if `dir` is there and not an empty folder,
/// [`PhantomDatasetError::Empty`] if `range` or `prompts` is empty, and an error naming the file
/// if one cannot be written.
pub fn write_dataset(
    dir: &Path,
    seed: u64,
    range: Range<u64>,
    dialect: Dialect,
    prompts: &[&str],
) -> Result<Summary, PhantomDatasetError> {
    if range.is_empty() {
        return Err(PhantomDatasetError::Empty("sample"));
    }
    if prompts.is_empty() {
        return Err(PhantomDatasetError::Empty("prompt"));
    }
    refuse_existing(dir)?;
    let mut beside = dir.as_os_str().to_owned();
    beside.push(format!(".{}.partial", std::process::id()));
    let beside = PathBuf::from(beside);
    let studies = PhantomStudies::new(seed)
        .with_dialect(dialect)
        .with_prompts(prompts);
    let written = write_folder(&beside, &studies, range).and_then(|mut summary| {
        // An empty folder is removed first: Windows does not rename over one.
        if dir.exists() {
            fs::remove_dir(dir).map_err(cannot_write(dir))?;
        }
        fs::rename(&beside, dir).map_err(cannot_write(dir))?;
        summary.samples_file = dir.join(SAMPLES_FILE);
        Ok(summary)
    });
    if written.is_err() {
        // The first error says more than one of the cleaning up.
        let _ = fs::remove_dir_all(&beside);
    }
    written
}

fn refuse_existing(dir: &Path) -> Result<(), PhantomDatasetError> {
    let exists = match fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => dir.exists(),
    };
    if exists {
        return Err(PhantomDatasetError::Exists(dir.to_owned()));
    }
    Ok(())
}

fn cannot_write(path: &Path) -> impl FnOnce(io::Error) -> PhantomDatasetError {
    let path = path.to_owned();
    move |cause| PhantomDatasetError::Write { path, cause }
}

fn write_folder(
    dir: &Path,
    studies: &PhantomStudies,
    range: Range<u64>,
) -> Result<Summary, PhantomDatasetError> {
    let images = dir.join("images");
    fs::create_dir_all(&images).map_err(cannot_write(&images))?;
    let samples_file = dir.join(SAMPLES_FILE);
    let file = fs::File::create(&samples_file).map_err(cannot_write(&samples_file))?;
    let mut lines = BufWriter::new(file);
    let mut summary = Summary {
        samples_file: samples_file.clone(),
        samples: 0,
        normal: 0,
        findings: 0,
        image_bytes: 0,
    };
    for index in range {
        let sample = studies.get(index);
        let relative = format!("images/{index:04}.png");
        let path = dir.join(&relative);
        let png = encode_png(&sample.study.image, &path)?;
        fs::write(&path, &png).map_err(cannot_write(&path))?;
        let question = format!("<image>{}", sample.prompt);
        let message = |role, content| SampleMessage { role, content };
        let line = serde_json::to_string(&SampleLine {
            messages: [
                message("user", &question),
                message("assistant", &sample.report),
            ],
            images: [relative],
        })
        .map_err(|cause| PhantomDatasetError::Json { index, cause })?;
        writeln!(lines, "{line}").map_err(cannot_write(&samples_file))?;
        summary.samples += 1;
        summary.normal += usize::from(sample.study.findings.is_empty());
        summary.findings += sample.study.findings.len();
        summary.image_bytes += png.len() as u64;
    }
    lines.flush().map_err(cannot_write(&samples_file))?;
    Ok(summary)
}

fn encode_png(image: &GrayImage, path: &Path) -> Result<Vec<u8>, PhantomDatasetError> {
    let mut bytes = Vec::new();
    // Grainy images compress best unfiltered.
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Best, FilterType::NoFilter)
        .write_image(
            image.as_raw(),
            image.width(),
            image.height(),
            ExtendedColorType::L8,
        )
        .map_err(|cause| PhantomDatasetError::Encode {
            path: path.to_owned(),
            cause,
        })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phantom::labels::findings_in_report;

    #[test]
    fn a_written_data_set_holds_the_series() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("phantoms");
        let summary = write_dataset(&dir, 5, 8..28, Dialect::House, &PROMPTS).unwrap();
        assert_eq!(summary.samples, 20);
        println!("{} bytes an image", summary.image_bytes / 20);

        let text = fs::read_to_string(&summary.samples_file).unwrap();
        let series = PhantomStudies::new(5).with_dialect(Dialect::House);
        assert_eq!(text.lines().count(), 20);
        for (line, sample) in text.lines().zip(series.skip(8)) {
            let record: serde_json::Value = serde_json::from_str(line).unwrap();
            let content = |at: usize| record["messages"][at]["content"].as_str().unwrap();
            assert_eq!(record["messages"][0]["role"], "user");
            assert_eq!(record["messages"][1]["role"], "assistant");
            assert_eq!(content(0), format!("<image>{}", sample.prompt));
            assert_eq!(content(1), sample.report);
            assert_eq!(findings_in_report(content(1)), sample.study.findings);
            let image = image::open(dir.join(record["images"][0].as_str().unwrap())).unwrap();
            assert_eq!(image.color(), image::ColorType::L8);
            assert_eq!(image.into_luma8(), sample.study.image);
        }
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "nothing is left beside the data set");
    }

    #[test]
    fn a_full_folder_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("note"), "kept").unwrap();
        let refused = write_dataset(folder.path(), 5, 0..1, Dialect::Plain, &PROMPTS);
        assert!(matches!(refused, Err(PhantomDatasetError::Exists(_))));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn nothing_to_write_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("phantoms");
        let none = write_dataset(&dir, 5, 3..3, Dialect::Plain, &PROMPTS);
        assert!(matches!(none, Err(PhantomDatasetError::Empty("sample"))));
        let silent = write_dataset(&dir, 5, 0..3, Dialect::Plain, &[]);
        assert!(matches!(silent, Err(PhantomDatasetError::Empty("prompt"))));
        assert!(!dir.exists());
    }

    #[test]
    fn every_prompt_occurs() {
        let found: std::collections::BTreeSet<_> = PhantomStudies::new(9)
            .take(150)
            .map(|sample| sample.prompt)
            .collect();
        assert_eq!(found.len(), PROMPTS.len());
    }
}
