//! `export`: signed reports of a store as rows to train on, without what says whom they are of.

use std::{collections::HashMap, fs, io::Cursor, path::PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use image::{ImageFormat, RgbImage};
use serde_json::json;

use super::{shell::expect_new, store::StoreArgs, usage::UsageError};
use crate::{
    base::files::{sha256_bytes, write_atomic},
    processor::image::{DecodeLimits, decode},
    store::{
        Study, StudyStore,
        disk::{DiskStore, Open},
        films_to_read,
    },
    study::counted,
};

/// Arguments of `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Export the signed reports; there is nothing else to export yet.
    #[arg(long, required = true)]
    pub signed: bool,
    /// File to write, a row a study; its pictures come into a folder of its name beside it.
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Which studies may leave the store: those whose signer ticked the consent, or all, where the house has
    /// consent on paper.
    #[arg(long, value_enum, value_name = "WHICH", default_value_t = Consent::Given)]
    pub consent: Consent,
    /// Write pairs for `objective = "dpo"`: the signed report is chosen, the draft is rejected. Reports that were
    /// signed unchanged are left out.
    #[arg(long)]
    pub pairs: bool,
}

/// Which studies may leave the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Consent {
    /// Those marked so when they were signed.
    Given,
    /// All that are not marked as refused.
    Assumed,
}

/// Why studies are left out, with their number.
#[derive(Default)]
struct LeftOut(HashMap<&'static str, usize>);

impl LeftOut {
    fn add(&mut self, why: &'static str) {
        *self.0.entry(why).or_default() += 1;
    }
}

/// Whether a report names its patient, or a number of the study.
fn names_patient(study: &Study, text: &str) -> bool {
    let patient = &study.patient;
    let name: String = patient.name.replace(['^', '='], " ");
    let whole = [
        patient.id.as_str(),
        &study.accession,
        &patient.birth_date,
        name.trim(),
    ];
    let parts = name.split_whitespace();
    whole
        .into_iter()
        .chain(parts)
        .filter(|word| word.chars().count() >= 2)
        .any(|word| text.contains(word))
}

/// The pixels of a film as the model sees them, as PNG: nothing else of the file.
fn picture(store: &DiskStore, study: &Study, film: &str) -> Result<Vec<u8>> {
    let bytes = store.film(&study.id, film)?;
    let picture = decode(&bytes, "a film", &DecodeLimits::default())?;
    let (width, height) = (picture.width() as u32, picture.height() as u32);
    let pixels = RgbImage::from_raw(width, height, picture.into_pixels());
    let pixels = pixels.context("a film has another size than it says")?;
    let grey = pixels
        .pixels()
        .all(|pixel| pixel[0] == pixel[1] && pixel[1] == pixel[2]);
    let mut png = Cursor::new(Vec::new());
    match grey {
        true => image::DynamicImage::ImageRgb8(pixels)
            .into_luma8()
            .write_to(&mut png, ImageFormat::Png)?,
        false => pixels.write_to(&mut png, ImageFormat::Png)?,
    }
    Ok(png.into_inner())
}

/// Why a study is left out, if it is.
fn reason(study: &Study, args: &ExportArgs) -> Option<&'static str> {
    let Some(signed) = study.signed.last() else {
        return Some("not signed");
    };
    let consent = study.consent.as_ref().map(|consent| consent.text == "yes");
    match (args.consent, consent) {
        (_, Some(false)) => return Some("consent refused"),
        (Consent::Given, None) => return Some("no consent"),
        _ => {}
    }
    let Some(draft) = &study.draft else {
        return Some("no draft");
    };
    if names_patient(study, &signed.text) || (args.pairs && names_patient(study, &draft.text)) {
        return Some("the report names the patient or a number of the study");
    }
    let burned_in = draft
        .remarks
        .iter()
        .any(|remark| remark["code"] == "burned_in_annotation");
    if burned_in {
        return Some("a film may have the patient's data in its pixels");
    }
    (args.pairs && signed.text.trim() == draft.text.trim()).then_some("signed unchanged")
}

/// Runs `export`.
///
/// # Errors
/// A store that cannot be opened, or files that cannot be written.
pub fn run(args: &ExportArgs) -> Result<()> {
    let stem = args
        .output
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned());
    let Some(stem) = stem.filter(|stem| !stem.is_empty()) else {
        bail!(UsageError("--output names no file".into()));
    };
    let folder = args.output.with_file_name(format!("{stem}_films"));
    expect_new(&args.output)?;
    expect_new(&folder)?;
    let store = args.store.open(Open::Existing)?;
    let mut studies = Vec::new();
    let mut left_out = LeftOut::default();
    store.each_study(|study| match reason(&study, args) {
        Some(why) => left_out.add(why),
        None => studies.push(study),
    })?;
    for (why, count) in &left_out.0 {
        eprintln!("{count} left out: {why}");
    }
    if studies.is_empty() {
        bail!("no study of the store can be exported");
    }
    // Names say nothing of the store: they are drawn for this file, the same for the same patient.
    let salt: [u8; 32] = rand::random();
    let pseudonym = |text: &str| sha256_bytes(&[&salt, text.as_bytes()].concat())[..16].to_owned();
    studies.sort_by_cached_key(|study| pseudonym(&study.id));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    let mut rows = String::new();
    for study in &studies {
        let name = pseudonym(&study.id);
        let (Some(draft), Some(signed)) = (&study.draft, study.signed.last()) else {
            continue;
        };
        let mut images = Vec::new();
        // The films that the draft was written from, in its order.
        let read = films_to_read(study)
            .into_iter()
            .filter(|film| draft.films.contains(&film.id));
        for (index, film) in read.enumerate() {
            let file = format!("{name}-{}.png", index + 1);
            let png = picture(&store, study, &film.id)?;
            write_atomic(&folder.join(&file), |out| out.write_all(&png))?;
            images.push(format!("{stem}_films/{file}"));
        }
        let question = format!("{}{}", "<image>".repeat(images.len()), draft.prompt);
        let patient = match study.patient.id.as_str() {
            "" => name.clone(),
            id => pseudonym(id),
        };
        let mut row = json!({
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": signed.text.trim()},
            ],
            "images": images,
            "study": name,
            "patient": patient,
        });
        if args.pairs {
            row["rejected_response"] = draft.text.trim().into();
        }
        rows += &format!("{row}\n");
    }
    write_atomic(&args.output, |out| out.write_all(rows.as_bytes()))?;
    store.note("export_training", None, &crate::commands::store::typist())?;
    eprintln!(
        "`{}`: {}",
        args.output.display(),
        counted(studies.len(), "row", "rows")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Patient;

    #[test]
    fn a_report_that_names_its_patient_is_found() {
        let study = Study {
            patient: Patient {
                id: "P-77".into(),
                name: "Zhang^San=张^三".into(),
                birth_date: "19850203".into(),
                ..Patient::default()
            },
            ..Study::default()
        };
        for text in ["患者P-77，双肺清晰。", "Zhang presented.", "生于19850203。"] {
            assert!(names_patient(&study, text), "{text}");
        }
        assert!(!names_patient(&study, "双肺纹理清晰，三根肋骨骨折。"));
        assert!(!names_patient(&Study::default(), "双肺纹理清晰。"));
    }
}
