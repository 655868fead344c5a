//! What a reader of a report should know about a file, and the attributes to show.

use dicom_dictionary_std::tags;

use super::reader::{DataSet, DicomFile};
use crate::processor::remark::{Remark, RemarkKind};

/// What does not look like a chest radiograph.
pub(super) fn subject(set: &DataSet<'_>) -> Vec<Remark> {
    let mut remarks = Vec::new();
    match set.codes(tags::MODALITY).first() {
        Some(&("CR" | "DX")) => {}
        Some(found) => remarks.push(Remark::new(RemarkKind::NotAChest, format!(
            "its modality is {found}, not CR or DX: a report on it as a chest radiograph means nothing"
        ))),
        None => remarks.push(Remark::new(RemarkKind::SubjectNotStated,
            "it does not say its modality, taken for a radiograph",
        )),
    }
    match set.codes(tags::BODY_PART_EXAMINED).first() {
        Some(part) if part.contains("CHEST") || part.contains("THORAX") => {}
        Some(found) => remarks.push(Remark::new(RemarkKind::NotAChest, format!(
            "its body part is {found}, not CHEST or THORAX: a report on it as a chest radiograph means nothing"
        ))),
        None => remarks.push(Remark::new(RemarkKind::SubjectNotStated,
            "it does not say its body part, taken for a chest",
        )),
    }
    remarks.extend(view(set));
    remarks.extend(purpose(set));
    remarks.extend(aspect(set));
    remarks
}

/// A remark on a view that nobody takes of a chest.
///
/// The field is free in practice, so what is not known is not doubted.
fn view(set: &DataSet<'_>) -> Option<Remark> {
    const ELSEWHERE: [&str; 24] = [
        "CC",
        "MLO",
        "ML",
        "LM",
        "LMO",
        "XCCL",
        "XCCM",
        "FB",
        "SIO",
        "ISO",
        "CV",
        "TOWNE",
        "TOWNES",
        "WATERS",
        "CALDWELL",
        "SMV",
        "PANORAMIC",
        "SUNRISE",
        "SKYLINE",
        "MERCHANT",
        "TUNNEL",
        "MORTISE",
        "FROG LEG",
        "DENS",
    ];
    let found = *set.codes(tags::VIEW_POSITION).first()?;
    ELSEWHERE.contains(&found).then(|| {
        Remark::new(
            RemarkKind::NotAChest,
            format!(
                "its view is {found}, none of a chest: a report on it as a chest radiograph means nothing"
            ),
        )
    })
}

/// Remarks on an image that is not made for reading, or not for reading alone.
fn purpose(set: &DataSet<'_>) -> Vec<Remark> {
    let says = |tag, word| set.codes(tag).first() == Some(&word);
    let mut remarks = Vec::new();
    if says(tags::PRESENTATION_INTENT_TYPE, "FOR PROCESSING") {
        remarks.push(Remark::new(
            RemarkKind::ForProcessing,
            "it is FOR PROCESSING, not FOR PRESENTATION: its grey levels are not those of a film made for reading",
        ));
    }
    if says(tags::BURNED_IN_ANNOTATION, "YES") {
        remarks.push(Remark::new(
            RemarkKind::BurnedInAnnotation,
            "its Burned In Annotation is YES: text in its pixels may name the patient",
        ));
    }
    if set.has_overlay {
        remarks.push(Remark::new(
            RemarkKind::OverlayLeftOut,
            "it has an overlay, which is left out",
        ));
    }
    remarks
}

/// A remark if pixels are visibly not square.
fn aspect(set: &DataSet<'_>) -> Option<Remark> {
    const VISIBLE: f64 = 0.02;
    let pair = |tag| match set.numbers(tag)?.as_slice() {
        [vertical, horizontal] if *vertical > 0.0 && *horizontal > 0.0 => {
            Some(vertical / horizontal)
        }
        _ => None,
    };
    let ratio = [
        tags::PIXEL_ASPECT_RATIO,
        tags::PIXEL_SPACING,
        tags::IMAGER_PIXEL_SPACING,
    ]
    .into_iter()
    .find_map(pair)?;
    ((ratio - 1.0).abs() > VISIBLE).then(|| {
        Remark::new(RemarkKind::PixelAspect, format!(
            "its pixels are {ratio:.2} times as high as wide and are used as they are: shapes are distorted"
        ))
    })
}

/// The technical attributes of a file, by name: nothing of the patient, the place or the time.
pub(super) fn technical(opened: &DicomFile<'_>, set: &DataSet<'_>) -> Vec<(&'static str, String)> {
    let syntax = &opened.syntax;
    let mut shown = vec![(
        "transfer syntax",
        format!("{} ({})", syntax.name(), syntax.uid()),
    )];
    let mut show = |name, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            shown.push((name, value));
        }
    };
    let word = |tag| set.word(tag).map(|word| word.to_string());
    let codes = |tag| Some(set.codes(tag).join("\\"));
    let numbers = |tag| {
        let numbers = set.numbers(tag)?;
        let texts: Vec<String> = numbers.iter().map(f64::to_string).collect();
        Some(texts.join("\\"))
    };
    let there = |there| Some(if there { "yes" } else { "no" }.to_owned());
    show("rows", word(tags::ROWS));
    show("columns", word(tags::COLUMNS));
    show("frames", numbers(tags::NUMBER_OF_FRAMES));
    show("samples per pixel", word(tags::SAMPLES_PER_PIXEL));
    show(
        "photometric interpretation",
        codes(tags::PHOTOMETRIC_INTERPRETATION),
    );
    show("bits allocated", word(tags::BITS_ALLOCATED));
    show("bits stored", word(tags::BITS_STORED));
    show("high bit", word(tags::HIGH_BIT));
    show("pixel representation", word(tags::PIXEL_REPRESENTATION));
    show("planar configuration", word(tags::PLANAR_CONFIGURATION));
    show("lossy compression", codes(tags::LOSSY_IMAGE_COMPRESSION));
    show("modality", codes(tags::MODALITY));
    show("presentation intent", codes(tags::PRESENTATION_INTENT_TYPE));
    show("burned in annotation", codes(tags::BURNED_IN_ANNOTATION));
    show("overlay", there(set.has_overlay));
    show("body part", codes(tags::BODY_PART_EXAMINED));
    show("view position", codes(tags::VIEW_POSITION));
    show("laterality", codes(tags::IMAGE_LATERALITY));
    show(
        "orientation of rows and columns",
        codes(tags::PATIENT_ORIENTATION),
    );
    show("rescale slope", numbers(tags::RESCALE_SLOPE));
    show("rescale intercept", numbers(tags::RESCALE_INTERCEPT));
    show("modality table", there(set.modality_table.is_some()));
    show("window center", numbers(tags::WINDOW_CENTER));
    show("window width", numbers(tags::WINDOW_WIDTH));
    show("window function", codes(tags::VOILUT_FUNCTION));
    show("table of interest", there(set.voi_table.is_some()));
    show(
        "presentation lut shape",
        codes(tags::PRESENTATION_LUT_SHAPE),
    );
    show("pixel spacing (mm)", numbers(tags::PIXEL_SPACING));
    show(
        "imager pixel spacing (mm)",
        numbers(tags::IMAGER_PIXEL_SPACING),
    );
    shown
}
