//! The language of reports, which the questions about them are asked in.

use serde::Serialize;

/// Reports that are looked at for their language.
const LOOKED_AT: usize = 2000;

/// A language that questions are shipped in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// Chinese.
    Chinese,
    /// English.
    English,
    /// Spanish.
    Spanish,
}

/// Words that every report of a language has, and the others have not.
const ENGLISH: [&str; 12] = [
    "the", "is", "are", "no", "of", "and", "there", "with", "lungs", "normal", "chest", "in",
];
const SPANISH: [&str; 14] = [
    "de",
    "sin",
    "con",
    "el",
    "la",
    "los",
    "del",
    "en",
    "se",
    "derrame",
    "silueta",
    "radiografia",
    "radiologico",
    "hallazgos",
];

impl Language {
    /// The language that most of the first 2,000 `texts` are in; English where none says more.
    pub(in crate::dataset::convert) fn of<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let (mut chinese, mut english, mut spanish) = (0_usize, 0_usize, 0_usize);
        for text in texts.take(LOOKED_AT) {
            let letters = text.chars().filter(|c| c.is_alphabetic());
            let (mut han, mut all) = (0_usize, 0_usize);
            for letter in letters {
                all += 1;
                han += usize::from(('\u{4e00}'..='\u{9fff}').contains(&letter));
            }
            if 5 * han > all {
                chinese += 1;
                continue;
            }
            let text = text.to_lowercase();
            let (mut en, mut es) = (0_usize, 0_usize);
            for word in text.split(|c: char| !c.is_alphabetic()) {
                en += usize::from(ENGLISH.contains(&word));
                es += usize::from(SPANISH.contains(&word));
            }
            if es > en {
                spanish += 1;
            } else {
                english += 1;
            }
        }
        if chinese > english.max(spanish) {
            Self::Chinese
        } else if spanish > english {
            Self::Spanish
        } else {
            Self::English
        }
    }

    /// In English.
    pub fn english(self) -> &'static str {
        match self {
            Self::Chinese => "Chinese",
            Self::English => "English",
            Self::Spanish => "Spanish",
        }
    }

    /// Questions about an image, one of which is drawn for each row.
    pub fn prompts(self) -> &'static [&'static str] {
        match self {
            Self::Chinese => &super::super::options::PROMPTS,
            Self::English => &ENGLISH_PROMPTS,
            Self::Spanish => &SPANISH_PROMPTS,
        }
    }

    /// Headings of findings and impression in an answer that has both.
    pub(in crate::dataset::convert) fn headings(self) -> [&'static str; 2] {
        match self {
            Self::Chinese => ["影像所见：", "影像诊断："],
            Self::English => ["Findings: ", "Impression: "],
            Self::Spanish => ["Hallazgos: ", "Impresión: "],
        }
    }
}

/// The twelve questions of the published training in English.
const ENGLISH_PROMPTS: [&str; 12] = [
    "What can be diagnosed from this chest X-ray?",
    "Please analyse this chest X-ray.",
    "What does this X-ray show?",
    "Please give a diagnostic analysis of this chest X-ray.",
    "What is the patient's condition according to this X-ray?",
    "Please describe the diagnostic result of this chest X-ray.",
    "Are there abnormal findings in this chest X-ray?",
    "Please give an impression based on this X-ray.",
    "Analyse this chest X-ray and write a report.",
    "Please interpret the examination result of this chest X-ray.",
    "Which clinical findings does this X-ray show?",
    "Please give a professional reading of this chest image.",
];

/// The same in Spanish.
const SPANISH_PROMPTS: [&str; 12] = [
    "¿Qué se puede diagnosticar en esta radiografía de tórax?",
    "Analice esta radiografía de tórax.",
    "¿Qué muestra esta radiografía?",
    "Haga un análisis diagnóstico de esta radiografía de tórax.",
    "¿Cuál es el estado del paciente según esta radiografía?",
    "Describa el resultado diagnóstico de esta radiografía de tórax.",
    "¿Hay hallazgos anormales en esta radiografía de tórax?",
    "Dé una impresión diagnóstica a partir de esta radiografía.",
    "Analice esta radiografía de tórax y redacte un informe.",
    "Interprete el resultado de esta radiografía de tórax.",
    "¿Qué hallazgos clínicos refleja esta radiografía?",
    "Haga una lectura profesional de esta imagen de tórax.",
];

/// Questions whose answer is names and boxes.
pub(in crate::dataset::convert) const BOX_PROMPTS: [&str; 4] = [
    "Locate the abnormal findings in this chest X-ray.",
    "Which abnormalities does this chest X-ray show, and where are they?",
    "Mark each finding in this chest X-ray with its bounding box.",
    "List the findings in this chest X-ray with their positions.",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_language_is_that_of_most_reports() {
        for (texts, expected) in [
            (
                &["心影不大。", "No pneumothorax.", "双肺清晰，未见X光异常。"][..],
                Language::Chinese,
            ),
            (
                &["The lungs are clear.", "双肺清晰。", "No effusion is seen."],
                Language::English,
            ),
            (
                &[
                    "sin hallazgos patologicos .",
                    "derrame pleural en la base izquierd .",
                ],
                Language::Spanish,
            ),
            (&["cardiomegaly"], Language::English),
            (&[], Language::English),
        ] {
            assert_eq!(Language::of(texts.iter().copied()), expected, "{texts:?}");
        }
    }
}
