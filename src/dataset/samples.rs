//! A data set: the rows of a file, or a range of phantoms, each read on demand.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest, Sha256};

use super::{
    error::DatasetError, image_remarks::ImageRemarks, rows::rows, unused_keys::UnusedKeys,
};
use crate::{
    phantom::{Dialect, Finding, PhantomStudies},
    processor::{
        image::{DecodeLimits, ImageError, RgbImage, probe},
        message::Part,
        remark::{Remark, RemarkKind},
        sample::{Conversation, PixelLimits, Sample, SampleError, parse_line},
        supervised::SupervisedError,
    },
    runtime::pipeline::TextAndImages,
};

/// The question of a sample without image.
const WORDS_ONLY_PROMPT: &str = "请写一份胸部X光报告的范文。";

/// Where samples come from.
#[derive(Debug, Clone)]
pub(super) enum SampleSource {
    Rows {
        samples: Arc<Vec<Sample>>,
        /// Line of each sample, from 1.
        lines: Arc<Vec<usize>>,
        folder: PathBuf,
    },
    Phantoms {
        studies: Arc<[PhantomStudies; 4]>,
        range: Range<u64>,
        words_only: bool,
    },
}

/// A data set whose samples are read on demand.
#[derive(Debug, Clone)]
pub struct Dataset {
    pub(super) name: String,
    pub(super) source: SampleSource,
    pub(super) fingerprint: String,
    pub(super) remarks: Vec<String>,
    /// Rows of the source that count, in their order; all if absent.
    pub(super) chosen: Option<Arc<[usize]>>,
    /// Shared by copies: each thread of a loader reads through one.
    pub(super) image_remarks: Arc<ImageRemarks>,
}

/// One sample before encoding.
#[derive(Debug, Clone)]
pub struct RawSample {
    /// Question and answer.
    pub conversation: Conversation,
    /// Pictures in the order of their places.
    pub pictures: Vec<RgbImage>,
    /// Pixel limits of its own.
    pub limits: PixelLimits,
}

/// The name and the texts of a sample, whose image files are not opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleText {
    /// Image files, as they can be opened from here; none for phantoms.
    pub images: Vec<PathBuf>,
    /// Its images as the file names them, else its place.
    pub name: String,
    /// The last question, its images left out.
    pub question: String,
    /// The last answer; `None` in a sample made for inference.
    pub answer: Option<String>,
}

impl Dataset {
    /// Opens a data set by its name: a path, or `phantom:…`.
    ///
    /// # Errors
    /// [`DatasetError`] names the file and the row.
    pub fn open(name: &str) -> Result<Self, DatasetError> {
        if name.starts_with("phantom:") {
            return Self::phantoms(name);
        }
        let path = Path::new(name);
        let bytes = fs::read(path).map_err(|cause| DatasetError::Read {
            path: path.to_path_buf(),
            cause,
        })?;
        let (mut samples, mut lines) = (Vec::new(), Vec::new());
        let mut unused = UnusedKeys::default();
        for (number, line) in rows(path, &bytes)? {
            let mut sample = parse_line(line, path, number)?;
            unused.add(number, std::mem::take(&mut sample.unknown_keys));
            samples.push(sample);
            lines.push(number);
        }
        if samples.is_empty() {
            return Err(DatasetError::Empty(name.to_string()));
        }
        let remarks = unused
            .sentences()
            .map(|(line, sentence)| format!("`{name}` row {line}: {sentence}"));
        Ok(Self {
            name: name.to_string(),
            remarks: remarks.collect(),
            source: SampleSource::Rows {
                samples: Arc::new(samples),
                lines: Arc::new(lines),
                folder: path.parent().unwrap_or(Path::new("")).to_path_buf(),
            },
            fingerprint: format!("sha256:{}", hex(&Sha256::digest(&bytes))),
            chosen: None,
            image_remarks: Arc::default(),
        })
    }

    fn phantoms(name: &str) -> Result<Self, DatasetError> {
        let wrong = || DatasetError::Phantom(name.to_string());
        let mut parts = name.split(':').skip(1);
        let seed: u64 = parts
            .next()
            .and_then(|seed| seed.parse().ok())
            .ok_or_else(wrong)?;
        let (from, to) = parts
            .next()
            .and_then(|range| range.split_once(".."))
            .ok_or_else(wrong)?;
        let range = from.parse().map_err(|_| wrong())?..to.parse().map_err(|_| wrong())?;
        let dialects = match parts.next() {
            None | Some("plain") => [Dialect::Plain; 4],
            Some("terse") => [Dialect::Terse; 4],
            Some("house") => [Dialect::House; 4],
            // Another hospital's reports; one in four is the department's without its picture, which keeps its
            // words known.
            Some("partial") => [
                Dialect::Partial,
                Dialect::Partial,
                Dialect::Partial,
                Dialect::House,
            ],
            // For a first training: two terse reports, which teach the eye, one with wording of its own,
            // and one of the department's without its picture, which teaches words alone.
            Some("mixed") => [
                Dialect::Terse,
                Dialect::Plain,
                Dialect::Terse,
                Dialect::House,
            ],
            Some(_) => return Err(wrong()),
        };
        if range.is_empty() {
            return Err(DatasetError::Empty(name.to_string()));
        }
        Ok(Self {
            name: name.to_string(),
            source: SampleSource::Phantoms {
                studies: Arc::new(
                    dialects.map(|dialect| PhantomStudies::new(seed).with_dialect(dialect)),
                ),
                range,
                words_only: name.ends_with(":mixed") || name.ends_with(":partial"),
            },
            fingerprint: name.to_string(),
            remarks: Vec::new(),
            chosen: None,
            image_remarks: Arc::default(),
        })
    }

    /// What its images gave cause to remark, as far as they were read, by this copy or another.
    pub fn image_remarks(&self) -> &ImageRemarks {
        &self.image_remarks
    }

    /// As it was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a reader of a result should know of the file: keys that nothing uses.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// Identifies this data set: a hash of the file, or the generator's name.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Image files: row (from 0), name in the row, path; none for drawn studies.
    pub fn image_files(&self) -> Vec<(usize, &str, PathBuf)> {
        let SampleSource::Rows {
            samples, folder, ..
        } = &self.source
        else {
            return Vec::new();
        };
        (0..self.len())
            .flat_map(|row| {
                let images = samples[self.place(row)].images.iter();
                images.map(move |image| (row, image.as_str(), folder.join(image)))
            })
            .collect()
    }

    /// Place in the source of a row of this data set, from 0.
    pub(super) fn place(&self, index: usize) -> usize {
        self.chosen.as_ref().map_or(index, |chosen| chosen[index])
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        if let Some(chosen) = &self.chosen {
            return chosen.len();
        }
        match &self.source {
            SampleSource::Rows { samples, .. } => samples.len(),
            SampleSource::Phantoms { range, .. } => (range.end - range.start) as usize,
        }
    }

    /// The line of a sample in its file, or its place among drawn ones; from 1.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn row(&self, index: usize) -> usize {
        let place = self.place(index);
        match &self.source {
            SampleSource::Rows { lines, .. } => lines[place],
            SampleSource::Phantoms { .. } => place + 1,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads one sample with its pictures.
    ///
    /// # Errors
    /// [`DatasetError::Image`] names the row and the file.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn read(&self, index: usize, parts: &TextAndImages) -> Result<RawSample, DatasetError> {
        let place = self.place(index);
        match &self.source {
            SampleSource::Rows {
                samples, folder, ..
            } => {
                let sample = &samples[place];
                let pictures = sample
                    .images
                    .iter()
                    .map(|image| {
                        let reading = (parts.images)
                            .read(&folder.join(image), None)
                            .map_err(|cause| self.image_error(index, image.clone(), cause))?;
                        self.image_remarks.note(image, &reading.remarks);
                        Ok(reading.picture)
                    })
                    .collect::<Result<Vec<RgbImage>, DatasetError>>()?;
                if sample.images.is_empty() {
                    let none = Remark::new(RemarkKind::NoImage, "the row has no image");
                    self.image_remarks
                        .note(&format!("row {}", index + 1), &[none]);
                }
                let sizes: Vec<_> = pictures
                    .iter()
                    .map(|picture| (picture.width(), picture.height()))
                    .collect();
                Ok(RawSample {
                    conversation: self.placed(index, sample, &sizes)?,
                    pictures,
                    limits: sample.limits,
                })
            }
            SampleSource::Phantoms {
                studies,
                range,
                words_only,
            } => {
                let number = range.start + place as u64;
                let (image, prompt, report) =
                    studies[(number % 4) as usize].get(number).into_parts();
                if *words_only && number % 4 == 3 {
                    return Ok(RawSample {
                        conversation: Conversation::single(0, WORDS_ONLY_PROMPT, report),
                        pictures: Vec::new(),
                        limits: PixelLimits::default(),
                    });
                }
                let (width, height) = image.dimensions();
                let picture = RgbImage::from_gray(width as usize, height as usize, image.as_raw())
                    .map_err(|cause| self.image_error(index, "phantom".to_string(), cause))?;
                Ok(RawSample {
                    conversation: Conversation::single(1, prompt, report),
                    pictures: vec![picture],
                    limits: PixelLimits::default(),
                })
            }
        }
    }

    /// The pictures of a sample that is drawn, not read: of phantoms. `None` where they are in files.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn drawn(&self, index: usize) -> Option<Vec<RgbImage>> {
        let place = self.place(index);
        let SampleSource::Phantoms { studies, range, .. } = &self.source else {
            return None;
        };
        let number = range.start + place as u64;
        let (image, ..) = studies[(number % 4) as usize].get(number).into_parts();
        let (width, height) = image.dimensions();
        let picture = RgbImage::from_gray(width as usize, height as usize, image.as_raw());
        Some(picture.into_iter().collect())
    }

    /// What a drawn sample shows; `None` where samples are in files.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn drawn_findings(&self, index: usize) -> Option<BTreeSet<Finding>> {
        let SampleSource::Phantoms { studies, range, .. } = &self.source else {
            return None;
        };
        let number = range.start + self.place(index) as u64;
        Some(studies[(number % 4) as usize].get(number).study.findings)
    }

    /// Reads one sample's texts without opening its pictures.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn text(&self, index: usize) -> SampleText {
        let place = self.place(index);
        let (images, name, conversation) = match &self.source {
            SampleSource::Rows {
                samples, folder, ..
            } => {
                let sample = &samples[place];
                let name = if sample.images.is_empty() {
                    format!("row {}", self.row(index))
                } else {
                    sample.images.join(";")
                };
                let images: Vec<PathBuf> = (sample.images.iter())
                    .map(|image| folder.join(image))
                    .collect();
                let limits = DecodeLimits::default();
                let sizes = images.iter().filter(|_| sample.has_boxes());
                let sizes: Result<Vec<_>, _> = sizes.map(|image| probe(image, &limits)).collect();
                // A picture that cannot be read is named when it is opened.
                let placed = sizes.ok().and_then(|sizes| sample.placed(&sizes).ok());
                let conversation =
                    placed.map_or_else(|| sample.conversation.clone(), Cow::into_owned);
                (images, name, conversation)
            }
            SampleSource::Phantoms { studies, range, .. } => {
                let number = range.start + place as u64;
                let (_, prompt, report) = studies[(number % 4) as usize].get(number).into_parts();
                let conversation = Conversation::single(1, prompt, report);
                (Vec::new(), format!("phantom {number}"), conversation)
            }
        };
        let question = conversation.turns.last().map(|turn| {
            let words = turn.question.iter().filter_map(|part| match part {
                Part::Image => None,
                Part::Text { text } => Some(text.as_str()),
            });
            words.collect()
        });
        SampleText {
            images,
            name,
            question: question.unwrap_or_default(),
            answer: conversation.last_answer().map(str::to_owned),
        }
    }

    /// The conversation of a row with the boxes of its objects.
    pub(super) fn placed(
        &self,
        index: usize,
        sample: &Sample,
        sizes: &[(usize, usize)],
    ) -> Result<Conversation, DatasetError> {
        let placed = sample.placed(sizes).map_err(|fault| SampleError {
            file: PathBuf::from(&self.name),
            row: self.row(index),
            fault,
        })?;
        Ok(placed.into_owned())
    }

    pub(super) fn image_error(
        &self,
        index: usize,
        image: String,
        cause: ImageError,
    ) -> DatasetError {
        DatasetError::Image {
            file: self.name.clone(),
            row: self.row(index),
            image,
            cause,
        }
    }

    pub(super) fn encode_error(&self, index: usize, cause: SupervisedError) -> DatasetError {
        DatasetError::Encode {
            file: self.name.clone(),
            row: self.row(index),
            cause,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
