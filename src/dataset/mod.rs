//! Data sets: samples from files or from the phantom generator, encoded for training.
//!
//! A data set is named by a path to a JSONL file in ms-swift's form, or by
//! `phantom:SEED:FROM..TO[:plain|terse|partial|mixed|house]`, which draws synthetic studies as they are asked for.

pub mod check;
pub mod convert;
mod facts;
mod held_out;
pub mod image_remarks;
pub mod loader;
mod python_random;
pub mod rows;
mod split;

use std::{
    borrow::Cow,
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest, Sha256};

use crate::{
    batch::{images::ImageInput, positions::PositionError},
    phantom::{Dialect, PhantomStudies},
    processor::{
        image::{DecodeLimits, ImageError, RgbImage, probe},
        message::Part,
        patches::ImageProcessor,
        remark::{Remark, RemarkKind},
        sample::{Conversation, PixelLimits, RowFault, Sample, SampleError, parse_line},
        supervised::{SupervisedError, encode_prompt, encode_supervised},
    },
    runtime::pipeline::TextAndImages,
};

pub(crate) use facts::UnusedKeys;
pub use facts::{DataFacts, LeftOut};

/// What can be wrong with a data set.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The file cannot be read.
    #[error("cannot read `{}`: {cause}; expected a JSONL file in ms-swift's form, or `phantom:SEED:FROM..TO[:plain|terse|partial|mixed|house]`", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// A phantom data set is not named as expected.
    #[error(
        "`{0}` does not name a phantom data set; expected `phantom:SEED:FROM..TO` with an optional `:plain`, `:terse`, `:partial`, `:mixed` or `:house`"
    )]
    Phantom(String),
    /// There is no row.
    #[error("`{0}` holds no sample")]
    Empty(String),
    /// The file is not one row a line.
    #[error(transparent)]
    Rows(#[from] rows::RowsError),
    /// A row is not in the expected form.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// Nothing can be held out for validation.
    #[error(
        "`{file}`: no rows can be held out for validation (split_dataset_ratio {ratio}): {reason}; name validation data (`val_data`), or set `split_dataset_ratio = 0` to train without"
    )]
    HoldOut {
        /// The data set.
        file: String,
        /// The share asked for.
        ratio: f64,
        /// Why.
        reason: String,
    },
    /// An image of a row cannot be read.
    #[error("`{file}`, row {row}: image `{image}`: {}", in_words(.cause))]
    Image {
        /// The data set.
        file: String,
        /// The row, from 1.
        row: usize,
        /// The image.
        image: String,
        /// Why.
        cause: ImageError,
    },
    /// A row cannot be encoded.
    #[error("`{file}`, row {row}: {cause}")]
    Encode {
        /// The data set.
        file: String,
        /// The row, from 1.
        row: usize,
        /// Why.
        cause: SupervisedError,
    },
    /// Image tokens and images of a row do not agree.
    #[error("`{file}`, row {row}: {cause}")]
    Positions {
        /// The data set.
        file: String,
        /// The row, from 1.
        row: usize,
        /// Why.
        cause: PositionError,
    },
    /// A file does not come.
    #[error(
        "`{file}`: the samples of step {step} (rows {rows:?}) were not read within {seconds} s while the devices wait; is an image on a slow or broken disk? Raise ddp_timeout if it is only slow"
    )]
    Slow {
        /// The data set.
        file: String,
        /// The step, from 1.
        step: usize,
        /// Rows of the step, from 1.
        rows: Vec<usize>,
        /// How long was waited.
        seconds: f64,
    },
    /// Every row is longer than allowed, and such rows are left out.
    #[error(
        "`{file}`: {}, and `overlong = \"skip\"` leaves such rows out: nothing is left to learn; raise max_length or lower max_pixels",
        match .rows {
            1 => format!("its only row has {shortest} tokens, more than max_length {max_length}"),
            rows => format!("all {rows} rows are longer than max_length {max_length} (the shortest has {shortest} tokens)"),
        }
    )]
    AllTooLong {
        /// The data set.
        file: String,
        /// Its rows.
        rows: usize,
        /// Tokens of the shortest.
        shortest: usize,
        /// The limit.
        max_length: usize,
    },
    /// A row is longer than allowed.
    #[error(
        "`{file}`, row {row}: {tokens} tokens ({image} of them image tokens), more than max_length {max_length}; raise max_length, lower max_pixels, or set `overlong = \"skip\"`"
    )]
    TooLong {
        /// The data set.
        file: String,
        /// The row, from 1.
        row: usize,
        /// Tokens of the row.
        tokens: usize,
        /// Image tokens among them.
        image: usize,
        /// The limit.
        max_length: usize,
    },
}

/// An error with its causes, as the system's word says whether a file is missing or forbidden.
fn in_words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}

pub use held_out::HeldOut;

/// The question of a sample without picture.
const WORDS_ONLY_PROMPT: &str = "请写一份胸部X光报告的范文。";

/// Where samples come from.
#[derive(Debug, Clone)]
enum Source {
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

/// A data set whose samples are read when they are asked for.
#[derive(Debug, Clone)]
pub struct Dataset {
    name: String,
    source: Source,
    fingerprint: String,
    remarks: Vec<String>,
    /// Rows of the source that count, in their order; all if absent.
    chosen: Option<Arc<[usize]>>,
    /// Shared by copies: each thread of a loader reads through one.
    image_remarks: Arc<image_remarks::ImageRemarks>,
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

/// What a sample is called and says; its pictures stay closed.
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

/// One sample as the model takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedSample {
    /// Token ids, image placeholders expanded.
    pub input_ids: Vec<u32>,
    /// What each token should be; -100 where it is not a target.
    pub labels: Vec<i64>,
    /// Images in the order of their tokens.
    pub images: ImageInput,
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
        for (number, line) in rows::rows(path, &bytes)? {
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
            source: Source::Rows {
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
            source: Source::Phantoms {
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
    pub fn image_remarks(&self) -> &image_remarks::ImageRemarks {
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

    /// Tells this data set from another: a hash of the file, or the generator's name.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Image files: row (from 0), name in the row, path; none for drawn studies.
    pub fn image_files(&self) -> Vec<(usize, &str, PathBuf)> {
        let Source::Rows {
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
    fn place(&self, index: usize) -> usize {
        self.chosen.as_ref().map_or(index, |chosen| chosen[index])
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        if let Some(chosen) = &self.chosen {
            return chosen.len();
        }
        match &self.source {
            Source::Rows { samples, .. } => samples.len(),
            Source::Phantoms { range, .. } => (range.end - range.start) as usize,
        }
    }

    /// The line of a sample in its file, or its place among drawn ones; from 1.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn row(&self, index: usize) -> usize {
        let place = self.place(index);
        match &self.source {
            Source::Rows { lines, .. } => lines[place],
            Source::Phantoms { .. } => place + 1,
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
            Source::Rows {
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
            Source::Phantoms {
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

    /// The pictures of a sample that is drawn, not read: of phantoms. `None` where they lie in files.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn drawn(&self, index: usize) -> Option<Vec<RgbImage>> {
        let place = self.place(index);
        let Source::Phantoms { studies, range, .. } = &self.source else {
            return None;
        };
        let number = range.start + place as u64;
        let (image, ..) = studies[(number % 4) as usize].get(number).into_parts();
        let (width, height) = image.dimensions();
        let picture = RgbImage::from_gray(width as usize, height as usize, image.as_raw());
        Some(picture.into_iter().collect())
    }

    /// Reads one sample's texts without opening its pictures.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn text(&self, index: usize) -> SampleText {
        let place = self.place(index);
        let (images, name, conversation) = match &self.source {
            Source::Rows {
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
            Source::Phantoms { studies, range, .. } => {
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

    /// Reads and encodes one sample for training.
    ///
    /// # Errors
    /// [`DatasetError`] names the row.
    pub fn encode(
        &self,
        index: usize,
        parts: &TextAndImages,
        max_length: usize,
    ) -> Result<EncodedSample, DatasetError> {
        let raw = self.read(index, parts)?;
        let images = self.patches(index, &raw, parts)?;
        let merge = parts.config.vision_config.spatial_merge_size;
        let ids = encode_supervised(
            &parts.tokenizer,
            &raw.conversation,
            &images.image_grid_thw,
            merge,
        )
        .map_err(|cause| self.encode_error(index, cause))?;
        if ids.input_ids.len() > max_length {
            return Err(DatasetError::TooLong {
                file: self.name.clone(),
                row: self.row(index),
                tokens: ids.input_ids.len(),
                image: images.patches() / (merge * merge),
                max_length,
            });
        }
        Ok(EncodedSample {
            input_ids: ids.input_ids,
            labels: ids.labels,
            images,
        })
    }

    /// Reads one sample as a question: the prompt's ids, the images, and the true answer.
    ///
    /// # Errors
    /// [`DatasetError`] names the row.
    pub fn question(
        &self,
        index: usize,
        parts: &TextAndImages,
    ) -> Result<(crate::runtime::generate::Prompt, String), DatasetError> {
        let raw = self.read(index, parts)?;
        let images = self.patches(index, &raw, parts)?;
        let input_ids = encode_prompt(
            &parts.tokenizer,
            &raw.conversation,
            &images.image_grid_thw,
            parts.config.vision_config.spatial_merge_size,
        )
        .map_err(|cause| self.encode_error(index, cause))?;
        let answer = raw
            .conversation
            .last_answer()
            .unwrap_or_default()
            .to_string();
        Ok((
            crate::runtime::generate::Prompt { input_ids, images },
            answer,
        ))
    }

    fn patches(
        &self,
        index: usize,
        raw: &RawSample,
        parts: &TextAndImages,
    ) -> Result<ImageInput, DatasetError> {
        let mut images = ImageInput::default();
        let processor = self.processor(index, raw.limits, parts)?;
        for (place, picture) in raw.pictures.iter().enumerate() {
            let patches = processor
                .process(picture)
                .map_err(|cause| self.image_error(index, format!("number {}", place + 1), cause))?;
            images.extend(&ImageInput {
                pixel_values: patches.pixel_values.into(),
                image_grid_thw: vec![patches.grid_thw],
            });
        }
        Ok(images)
    }

    /// The image processor at the pixel limits of a row.
    fn processor<'a>(
        &self,
        index: usize,
        limits: PixelLimits,
        parts: &'a TextAndImages,
    ) -> Result<Cow<'a, ImageProcessor>, DatasetError> {
        parts.images.with_pixels(limits).map_err(|cause| {
            DatasetError::Sample(SampleError {
                file: PathBuf::from(&self.name),
                row: self.row(index),
                fault: RowFault::Limits(cause.to_string()),
            })
        })
    }

    /// The conversation of a row with the boxes of its objects.
    fn placed(
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

    fn image_error(&self, index: usize, image: String, cause: ImageError) -> DatasetError {
        DatasetError::Image {
            file: self.name.clone(),
            row: self.row(index),
            image,
            cause,
        }
    }

    fn encode_error(&self, index: usize, cause: SupervisedError) -> DatasetError {
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
