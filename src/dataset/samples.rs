//! A data set: the rows of files, or ranges of phantoms, each read on demand.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    data_part::{DataPart, MOST_ROWS, SampleSource},
    error::DatasetError,
    image_remarks::ImageRemarks,
    mix::data_names,
    reader::{ColumnsSeen, DataOptions},
};
use crate::{
    phantom::Finding,
    processor::{
        image::{DecodeLimits, ImageError, RgbImage, probe},
        message::Part,
        remark::{Remark, RemarkKind},
        sample::{Conversation, PixelLimits, Sample, SampleError},
        supervised::SupervisedError,
    },
    runtime::pipeline::TextAndImages,
};

/// The question of a sample without image.
const WORDS_ONLY_PROMPT: &str = "请写一份胸部X光报告的范文。";

/// Where a sample is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) part: usize,
    /// From 0.
    pub(super) row: usize,
}

/// A data set whose samples are read on demand.
#[derive(Debug, Clone)]
pub struct Dataset {
    pub(super) name: String,
    pub(super) parts: Arc<[DataPart]>,
    pub(super) fingerprint: String,
    pub(super) remarks: Vec<String>,
    /// The samples that count, in their order; all of the only part if absent.
    pub(super) chosen: Option<Arc<[Place]>>,
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
    /// Opens a data set by its name, as [`Self::open_with`] without options.
    ///
    /// # Errors
    /// [`DatasetError`] names the file and the row.
    pub fn open(name: &str) -> Result<Self, DatasetError> {
        Self::open_with(name, &DataOptions::default())
    }

    /// Opens a data set by its name: a path, `phantom:…`, or several of them with weights, see [`data_names`].
    ///
    /// # Errors
    /// [`DatasetError`] names the file and the row.
    pub fn open_with(name: &str, options: &DataOptions) -> Result<Self, DatasetError> {
        let names = data_names(name)?;
        let mut parts = Vec::new();
        // The parts of each data set: several files, where its name has a `*`.
        let mut files: Vec<Range<usize>> = Vec::new();
        for entry in &names {
            let start = parts.len();
            for file in entry.files()? {
                parts.push(DataPart::open(&file, entry.label(), options)?);
            }
            files.push(start..parts.len());
        }
        // Data sets of several forms may share a run: a column need not be in all of them.
        let mut columns = ColumnsSeen::default();
        parts.iter().for_each(|part| columns.add(&part.columns));
        let is_drawn = |part: &DataPart| matches!(part.source, SampleSource::Phantoms { .. });
        if !options.columns_may_be_absent && !parts.iter().all(is_drawn) {
            columns.expect_all(&options.columns, Path::new(name))?;
        }
        let parts: Arc<[DataPart]> = parts.into();
        let remarks = parts.iter().flat_map(|part| part.remarks.clone()).collect();
        if let ([part], [entry]) = (&*parts, names.as_slice())
            && entry.is_plain()
        {
            return Ok(Self {
                name: part.name.clone(),
                fingerprint: part.fingerprint.clone(),
                remarks,
                parts,
                chosen: None,
                image_remarks: Arc::default(),
            });
        }
        let mut chosen = Vec::new();
        let mut fingerprint = Vec::new();
        for (files, entry) in files.into_iter().zip(&names) {
            let refused = |reason| DatasetError::Name {
                name: entry.to_string(),
                reason,
            };
            let len: usize = parts[files.clone()].iter().map(DataPart::len).sum();
            let wanted = entry.wanted(len);
            if wanted == 0 {
                return Err(refused(format!("takes none of its {len} rows")));
            }
            if wanted.max(len) > MOST_ROWS {
                return Err(refused(format!(
                    "takes {wanted} of {len} rows, too many for a mixture"
                )));
            }
            let places = files.clone().flat_map(|part| {
                let rows = 0..parts[part].len();
                rows.map(move |row| Place { part, row })
            });
            let places: Vec<Place> = places.collect();
            let rows = entry.chosen(len, options.seed);
            chosen.extend(rows.into_iter().map(|row| places[row]));
            let rows = entry
                .rows
                .map_or_else(String::new, |rows| format!("#{rows}"));
            let files = parts[files].iter().map(|part| part.fingerprint.as_str());
            let files = files.collect::<Vec<_>>().join(" and ");
            fingerprint.push(format!("{files} x{}{rows}", entry.weight));
        }
        Ok(Self {
            name: name.to_owned(),
            parts,
            fingerprint: format!("{} by seed {}", fingerprint.join(" + "), options.seed),
            remarks,
            chosen: Some(chosen.into()),
            image_remarks: Arc::default(),
        })
    }

    /// What its image files gave cause to remark, as far as they were read, by this copy or another.
    pub fn image_remarks(&self) -> &ImageRemarks {
        &self.image_remarks
    }

    /// As it was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a reader of a result should know of the files: keys that nothing uses, images that were kept.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// Identifies this data set: a hash of the file, or the generator's name.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The data sets that this one is made of, each on its own with what it is called; itself where it is no mixture.
    pub fn split_by_name(&self) -> Vec<(String, Self)> {
        let Some(chosen) = &self.chosen else {
            let label = self.parts.first().map(|part| part.label.clone());
            return vec![(label.unwrap_or_default(), self.clone())];
        };
        let mut places: Vec<(&str, Vec<Place>)> = Vec::new();
        for place in chosen.iter() {
            let label = self.parts[place.part].label.as_str();
            match places.iter_mut().find(|(known, _)| *known == label) {
                Some((_, places)) => places.push(*place),
                None => places.push((label, vec![*place])),
            }
        }
        let sets = places.into_iter().map(|(label, places)| {
            let chosen = Some(places.into());
            let data = self.clone();
            (label.to_owned(), Self { chosen, ..data })
        });
        sets.collect()
    }

    /// Image files: row (from 0), name in the row, path; none for drawn studies.
    pub fn image_files(&self) -> Vec<(usize, Cow<'_, str>, PathBuf)> {
        let mut files = Vec::new();
        for row in 0..self.len() {
            let (part, place) = self.part(row);
            let SampleSource::Rows {
                samples, folder, ..
            } = &part.source
            else {
                continue;
            };
            let sample = &samples[place];
            for (image, name) in sample.images.iter().enumerate() {
                let name = if self.parts.len() == 1 {
                    Cow::Borrowed(name.as_str())
                } else {
                    Cow::Owned(format!("{}: {name}", part.label))
                };
                files.push((row, name, sample.image_path(image, folder)));
            }
        }
        files
    }

    /// Where a sample of this data set is.
    pub(super) fn place(&self, index: usize) -> Place {
        match &self.chosen {
            Some(chosen) => chosen[index],
            None => Place {
                part: 0,
                row: index,
            },
        }
    }

    /// The part of a sample, and its place there, from 0.
    pub(super) fn part(&self, index: usize) -> (&DataPart, usize) {
        let Place { part, row } = self.place(index);
        (&self.parts[part], row)
    }

    /// The file of a sample, for messages.
    pub(super) fn file(&self, index: usize) -> String {
        self.part(index).0.name.clone()
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        match &self.chosen {
            Some(chosen) => chosen.len(),
            None => self.parts.first().map_or(0, DataPart::len),
        }
    }

    /// The line of a sample in its file, or its place among drawn ones; from 1.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn row(&self, index: usize) -> usize {
        let (part, place) = self.part(index);
        match &part.source {
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
        let (part, place) = self.part(index);
        match &part.source {
            SampleSource::Rows {
                samples, folder, ..
            } => {
                let sample = &samples[place];
                let paths = sample.image_paths(folder);
                let pictures = sample
                    .images
                    .iter()
                    .zip(&paths)
                    .map(|(image, path)| {
                        let reading = (parts.images)
                            .read(path, None)
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
        let (part, place) = self.part(index);
        let SampleSource::Phantoms { studies, range, .. } = &part.source else {
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
        let (part, place) = self.part(index);
        let SampleSource::Phantoms { studies, range, .. } = &part.source else {
            return None;
        };
        let number = range.start + place as u64;
        Some(studies[(number % 4) as usize].get(number).study.findings)
    }

    /// Reads one sample's texts without opening its pictures.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn text(&self, index: usize) -> SampleText {
        let (part, place) = self.part(index);
        let (images, name, conversation) = match &part.source {
            SampleSource::Rows {
                samples, folder, ..
            } => {
                let sample = &samples[place];
                let name = if sample.images.is_empty() {
                    format!("row {}", self.row(index))
                } else {
                    sample.images.join(";")
                };
                let images = sample.image_paths(folder);
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
            file: PathBuf::from(self.file(index)),
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
            file: self.file(index),
            row: self.row(index),
            image,
            cause,
        }
    }

    pub(super) fn encode_error(&self, index: usize, cause: SupervisedError) -> DatasetError {
        DatasetError::Encode {
            file: self.file(index),
            row: self.row(index),
            cause,
        }
    }
}
