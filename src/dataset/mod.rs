//! Data sets: samples from files or from the phantom generator, encoded for training.
//!
//! A data set is named by a path to a JSONL file in ms-swift's form, or by
//! `phantom:SEED:FROM..TO[:plain|terse|mixed|house]`, which draws synthetic studies as they are asked for.

pub mod check;
pub mod convert;
pub mod loader;

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest, Sha256};

use crate::{
    phantom::{Dialect, PhantomStudies},
    pipeline::TextAndImages,
    processor::{
        image::{ImageError, RgbImage},
        message::Part,
        sample::{Conversation, Sample, SampleError, parse_line},
        supervised::{SupervisedError, encode_prompt, encode_supervised},
    },
    qwen3_vl::{ImageInput, rope::PositionError},
};

/// What can be wrong with a data set.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The file cannot be read.
    #[error("cannot read `{}`: {cause}; expected a JSONL file in ms-swift's form, or `phantom:SEED:FROM..TO[:plain|terse|mixed|house]`", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// A phantom data set is not named as expected.
    #[error(
        "`{0}` does not name a phantom data set; expected `phantom:SEED:FROM..TO` with an optional `:plain`, `:terse`, `:mixed` or `:house`"
    )]
    Phantom(String),
    /// There is no row.
    #[error("`{0}` holds no sample")]
    Empty(String),
    /// A row is not in the expected form.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// An image of a row cannot be read.
    #[error("`{file}`, row {row}: image `{image}`: {cause}")]
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

/// The question of a sample without picture.
const WORDS_ONLY_PROMPT: &str = "请写一份胸部X光报告的范文。";

/// Where samples come from.
#[derive(Debug, Clone)]
enum Source {
    Rows {
        samples: Arc<Vec<Sample>>,
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
}

/// One sample before encoding.
#[derive(Debug, Clone)]
pub struct RawSample {
    /// Question and answer.
    pub conversation: Conversation,
    /// Pictures in the order of their places.
    pub pictures: Vec<RgbImage>,
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
        let text = fs::read_to_string(path).map_err(|cause| DatasetError::Read {
            path: path.to_path_buf(),
            cause,
        })?;
        let mut samples = Vec::new();
        for (index, line) in text.lines().enumerate() {
            if !line.trim().is_empty() {
                samples.push(parse_line(line, path, index + 1)?);
            }
        }
        if samples.is_empty() {
            return Err(DatasetError::Empty(name.to_string()));
        }
        Ok(Self {
            name: name.to_string(),
            source: Source::Rows {
                samples: Arc::new(samples),
                folder: path.parent().unwrap_or(Path::new("")).to_path_buf(),
            },
            fingerprint: format!("sha256:{}", hex(&Sha256::digest(text.as_bytes()))),
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
                words_only: name.ends_with(":mixed"),
            },
            fingerprint: name.to_string(),
        })
    }

    /// As it was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tells this data set from another: a hash of the file, or the generator's name.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Image files: row (from 0), name in the row, path; none for drawn studies.
    pub fn image_files(&self) -> Vec<(usize, &str, PathBuf)> {
        let Source::Rows { samples, folder } = &self.source else {
            return Vec::new();
        };
        let rows = samples.iter().enumerate();
        rows.flat_map(|(row, sample)| {
            let images = sample.images.iter();
            images.map(move |image| (row, image.as_str(), folder.join(image)))
        })
        .collect()
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        match &self.source {
            Source::Rows { samples, .. } => samples.len(),
            Source::Phantoms { range, .. } => (range.end - range.start) as usize,
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
        match &self.source {
            Source::Rows { samples, folder } => {
                let sample = &samples[index];
                let pictures = sample
                    .images
                    .iter()
                    .map(|image| {
                        parts.images.load(&folder.join(image)).map_err(|cause| {
                            DatasetError::Image {
                                file: self.name.clone(),
                                row: index + 1,
                                image: image.clone(),
                                cause,
                            }
                        })
                    })
                    .collect::<Result<_, _>>()?;
                Ok(RawSample {
                    conversation: sample.conversation.clone(),
                    pictures,
                })
            }
            Source::Phantoms {
                studies,
                range,
                words_only,
            } => {
                let number = range.start + index as u64;
                let (image, prompt, report) =
                    studies[(number % 4) as usize].get(number).into_parts();
                if *words_only && number % 4 == 3 {
                    return Ok(RawSample {
                        conversation: Conversation::single(0, WORDS_ONLY_PROMPT, report),
                        pictures: Vec::new(),
                    });
                }
                let (width, height) = image.dimensions();
                let picture = RgbImage::from_gray(width as usize, height as usize, image.as_raw())
                    .map_err(|cause| DatasetError::Image {
                        file: self.name.clone(),
                        row: index + 1,
                        image: "phantom".to_string(),
                        cause,
                    })?;
                Ok(RawSample {
                    conversation: Conversation::single(1, prompt, report),
                    pictures: vec![picture],
                })
            }
        }
    }

    /// The pictures of a sample that is drawn, not read: of phantoms. `None` where they lie in files.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn drawn(&self, index: usize) -> Option<Vec<RgbImage>> {
        let Source::Phantoms { studies, range, .. } = &self.source else {
            return None;
        };
        let number = range.start + index as u64;
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
        let (images, name, conversation) = match &self.source {
            Source::Rows { samples, folder } => {
                let sample = &samples[index];
                let name = if sample.images.is_empty() {
                    format!("row {}", index + 1)
                } else {
                    sample.images.join(";")
                };
                let images = sample.images.iter().map(|image| folder.join(image));
                (images.collect(), name, sample.conversation.clone())
            }
            Source::Phantoms { studies, range, .. } => {
                let number = range.start + index as u64;
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
                row: index + 1,
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
    ) -> Result<(crate::generate::Prompt, String), DatasetError> {
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
        Ok((crate::generate::Prompt { input_ids, images }, answer))
    }

    fn patches(
        &self,
        index: usize,
        raw: &RawSample,
        parts: &TextAndImages,
    ) -> Result<ImageInput, DatasetError> {
        let mut images = ImageInput::default();
        for (place, picture) in raw.pictures.iter().enumerate() {
            let patches = parts
                .images
                .process(picture)
                .map_err(|cause| DatasetError::Image {
                    file: self.name.clone(),
                    row: index + 1,
                    image: format!("number {}", place + 1),
                    cause,
                })?;
            images.extend(&ImageInput {
                pixel_values: patches.pixel_values.into(),
                image_grid_thw: vec![patches.grid_thw],
            });
        }
        Ok(images)
    }

    fn encode_error(&self, index: usize, cause: SupervisedError) -> DatasetError {
        DatasetError::Encode {
            file: self.name.clone(),
            row: index + 1,
            cause,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
