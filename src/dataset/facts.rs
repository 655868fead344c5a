//! What the record of a run says of a data set: rows left out, and keys that nothing uses.

use rayon::prelude::*;
use serde::Serialize;

use super::{
    data_part::SampleSource, error::DatasetError, length::SampleLength, loader::Overlong,
    samples::Dataset,
};
use crate::{
    processor::{chat::ImageGrid, supervised::encode_supervised},
    runtime::pipeline::TextAndImages,
};

/// Rows that a run leaves out because they are longer than allowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Rows that are longer.
    pub rows: usize,
    /// All rows.
    pub of: usize,
    /// The limit, in tokens.
    pub max_length: usize,
}

impl LeftOut {
    /// Share of the rows above which the sentence is a warning.
    const MUCH: f64 = 0.1;

    /// Whether more than a tenth of the rows is left out.
    pub fn is_much(&self) -> bool {
        self.rows as f64 > Self::MUCH * self.of as f64
    }

    /// What is left out, as a sentence; `None` if nothing is.
    pub fn sentence(&self) -> Option<String> {
        let Self {
            rows,
            of,
            max_length,
        } = self;
        if *rows == 0 {
            return None;
        }
        let share = *rows as f64 / (*of).max(1) as f64;
        let (warning, hint) = if self.is_much() {
            ("warning: ", "; hint: raise max_length or lower max_pixels")
        } else {
            ("", "")
        };
        let percent = 100.0 * share;
        let (words, is) = if *of == 1 {
            ("row", "is")
        } else {
            ("rows", "are")
        };
        Some(format!(
            "{warning}{rows} of {of} {words} ({percent:.1} %) {is} longer than max_length {max_length} and left out{hint}"
        ))
    }
}

/// What a run's record says of its data set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DataFacts {
    /// The data set.
    pub name: String,
    /// Rows that are too long, where such rows are left out.
    pub left_out: Option<LeftOut>,
    /// Keys of rows that nothing uses.
    pub remarks: Vec<String>,
}

impl DataFacts {
    /// One sentence for each thing to know.
    pub fn sentences(&self) -> impl Iterator<Item = String> {
        let left_out = self.left_out.as_ref().and_then(LeftOut::sentence);
        let left_out = left_out.map(|sentence| format!("`{}`: {sentence}", self.name));
        let remarks = self.remarks.iter().map(|remark| format!("note: {remark}"));
        remarks.chain(left_out)
    }
}

impl Dataset {
    /// What to know of the data set before a run begins; with [`Overlong::Skip`], the length of every
    /// sample is taken.
    ///
    /// # Errors
    /// [`DatasetError::AllTooLong`] if no sample would be left.
    pub fn facts(
        &self,
        parts: &TextAndImages,
        max_length: usize,
        overlong: Overlong,
    ) -> Result<DataFacts, DatasetError> {
        Ok(DataFacts {
            name: self.name.clone(),
            left_out: match overlong {
                Overlong::Error => None,
                Overlong::Skip => Some(self.left_out(parts, max_length)?),
            },
            remarks: self.remarks().to_vec(),
        })
    }

    /// Tokens of one sample.
    fn tokens(&self, index: usize, parts: &TextAndImages) -> Result<usize, DatasetError> {
        Ok(self.measure(index, parts)?.tokens)
    }

    /// How long a sample is, without its pixels: of images in files only the headers are read.
    pub(super) fn measure(
        &self,
        index: usize,
        parts: &TextAndImages,
    ) -> Result<SampleLength, DatasetError> {
        let (part, place) = self.part(index);
        let (conversation, sizes, limits) = match &part.source {
            SampleSource::Rows {
                samples, folder, ..
            } => {
                let sample = &samples[place];
                let paths = sample.image_paths(folder);
                let sizes = sample.images.iter().zip(&paths).map(|(image, path)| {
                    (parts.images)
                        .probe(path)
                        .map_err(|cause| self.image_error(index, image.clone(), cause))
                });
                let sizes = sizes.collect::<Result<Vec<_>, _>>()?;
                (self.placed(index, sample, &sizes)?, sizes, sample.limits)
            }
            SampleSource::Phantoms { .. } => {
                let raw = self.read(index, parts)?;
                let sizes = raw.pictures.iter();
                let sizes = sizes.map(|picture| (picture.width(), picture.height()));
                (raw.conversation, sizes.collect(), raw.limits)
            }
        };
        let processor = self.processor(index, limits, parts)?;
        let grids = sizes.iter().map(|(width, height)| {
            processor
                .grid_for(*height, *width)
                .map_err(|cause| self.image_error(index, "of the row".to_string(), cause))
        });
        let grids = grids.collect::<Result<Vec<ImageGrid>, _>>()?;
        let merge = parts.images.config().merge_size;
        encode_supervised(&parts.tokenizer, &conversation, &grids, merge)
            .map(|ids| SampleLength::of(&ids.input_ids, &ids.labels))
            .map_err(|cause| self.encode_error(index, cause))
    }

    /// Counts the samples that are longer than `max_length`, before any of them is trained on.
    ///
    /// A sample that cannot be read counts as short: its error is reported when it is read.
    ///
    /// # Errors
    /// [`DatasetError::AllTooLong`] if no sample would be left.
    pub fn left_out(
        &self,
        parts: &TextAndImages,
        max_length: usize,
    ) -> Result<LeftOut, DatasetError> {
        let lengths: Vec<usize> = (0..self.len())
            .into_par_iter()
            .map(|index| self.tokens(index, parts).unwrap_or(0))
            .collect();
        let rows = lengths
            .iter()
            .filter(|length| **length > max_length)
            .count();
        if rows == lengths.len() {
            return Err(DatasetError::AllTooLong {
                file: self.name.clone(),
                rows,
                shortest: lengths.into_iter().min().unwrap_or(0),
                max_length,
            });
        }
        Ok(LeftOut {
            rows,
            of: lengths.len(),
            max_length,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_left_out_is_said_and_more_is_a_warning() {
        let sentence = |rows, of| {
            let max_length = 128;
            LeftOut {
                rows,
                of,
                max_length,
            }
            .sentence()
        };
        assert_eq!(sentence(0, 10), None);
        assert_eq!(
            sentence(1, 10).as_deref(),
            Some("1 of 10 rows (10.0 %) are longer than max_length 128 and left out")
        );
        let much = sentence(2, 10).unwrap();
        assert!(much.starts_with("warning: 2 of 10 rows (20.0 %)"), "{much}");
        assert!(much.ends_with("hint: raise max_length or lower max_pixels"));
    }
}
