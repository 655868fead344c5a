//! Compares the labels read from reports with the MeSH labels of the Indiana collection.
//!
//! The MeSH labels were given by people to the original English reports, and name only what is there; the Chinese
//! text went through a rewriting and a translation. So a difference is a mistake of the labeler, of the
//! translation, or a thing the rewriting left out; of the English reports themselves, a mistake or a thing that was not indexed.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    error::FindingsError,
    finding::Finding,
    labeler::Labeler,
    labels::Status,
    pair::UncertainPolicy,
    score::{Average, ClassCounts, macro_average, micro, percent},
};

/// Study number (`uid`) to what its MeSH labels say; a class that is not in the map is not there.
pub type MeshLabels = BTreeMap<u32, BTreeMap<Finding, Status>>;

/// Agreement by class over a set of studies.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MeshAgreement {
    /// Studies with MeSH labels and a Chinese report.
    pub studies: usize,
    /// Counts by class; the MeSH labels are the truth.
    pub by_finding: BTreeMap<Finding, ClassCounts>,
    /// From the counts of all classes together.
    pub micro: Average,
    /// Mean over the classes.
    pub macro_average: Average,
}

/// Reads `indiana_reports.csv`; studies without indexing (`No Indexing`, bad image) are left out.
///
/// # Errors
/// [`FindingsError::Labels`] for a row that is no CSV, [`FindingsError::MissingColumn`] without `uid` or `MeSH`.
pub fn read_mesh_labels(csv_text: &str) -> Result<MeshLabels, FindingsError> {
    let at = |row| move |cause| FindingsError::Labels { row, cause };
    let mut reader = csv::Reader::from_reader(csv_text.as_bytes());
    let header = reader.headers().map_err(at(1))?.clone();
    let column = |name| {
        header
            .iter()
            .position(|h| h == name)
            .ok_or(FindingsError::MissingColumn(name))
    };
    let (uid, mesh) = (column("uid")?, column("MeSH")?);
    let mut labels = MeshLabels::new();
    for (number, row) in reader.records().enumerate() {
        let row = row.map_err(at(number as u64 + 2))?;
        let terms = row.get(mesh).unwrap_or_default();
        let Some(Ok(uid)) = row.get(uid).map(str::parse) else {
            continue;
        };
        if terms.contains("No Indexing") || terms.trim().is_empty() {
            continue;
        }
        labels.insert(uid, mesh_findings(terms));
    }
    Ok(labels)
}

/// What a MeSH cell says: terms apart by `;`, qualifiers apart by `/`.
pub fn mesh_findings(cell: &str) -> BTreeMap<Finding, Status> {
    use Finding as F;
    let mut found: BTreeMap<Finding, Status> = BTreeMap::new();
    let mut add = |finding, status: Status| {
        let entry = found.entry(finding).or_insert(status);
        *entry = status.max(*entry);
    };
    for term in cell.split(';').map(|term| term.trim().to_lowercase()) {
        let head = term.split('/').next().unwrap_or_default();
        let has = |word: &str| term.contains(word);
        let doubtful = if has("borderline") {
            Status::Uncertain
        } else {
            Status::Present
        };
        match head {
            "normal" => add(F::NoFinding, Status::Present),
            "cardiomegaly" => add(F::Cardiomegaly, doubtful),
            "cardiac shadow" if has("enlarged") || has("borderline") => {
                add(F::Cardiomegaly, doubtful)
            }
            "mediastinum" if has("prominent") || has("enlarged") && !has("lymph") => {
                add(F::EnlargedCardiomediastinum, Status::Present);
            }
            "opacity" | "airspace disease" | "infiltrate" => add(F::LungOpacity, Status::Present),
            "density" if has("/lung") || has("retrocardiac") => {
                add(F::LungOpacity, Status::Present)
            }
            "nodule" | "mass" | "cavitation" => add(F::LungLesion, Status::Present),
            "pulmonary edema" | "pulmonary congestion" | "heart failure" => {
                add(F::Edema, Status::Present)
            }
            "consolidation" => add(F::Consolidation, Status::Present),
            "pneumonia" => add(F::Pneumonia, Status::Present),
            "pulmonary atelectasis" => add(F::Atelectasis, Status::Present),
            "pneumothorax" => add(F::Pneumothorax, Status::Present),
            "hydropneumothorax" | "hemopneumothorax" => {
                add(F::Pneumothorax, Status::Present);
                add(F::PleuralEffusion, Status::Present);
            }
            "pleural effusion" | "hemothorax" => add(F::PleuralEffusion, Status::Present),
            "costophrenic angle" if has("blunted") => add(F::PleuralEffusion, Status::Uncertain),
            "thickening" if has("pleura") => add(F::PleuralOther, Status::Present),
            "pleura" => add(F::PleuralOther, Status::Present),
            "fractures, bone" => add(F::Fracture, Status::Present),
            "catheters, indwelling"
            | "implanted medical device"
            | "medical device"
            | "tube, inserted"
            | "stents"
            | "surgical instruments"
            | "sutures" => add(F::SupportDevices, Status::Present),
            "granuloma" | "granulomatous disease" => add(F::Granuloma, Status::Present),
            "calcified granuloma" => {
                add(F::Granuloma, Status::Present);
                add(F::Calcification, Status::Present);
            }
            "calcinosis" => add(F::Calcification, Status::Present),
            "spine" | "thoracic vertebrae" | "lumbar vertebrae" | "cervical vertebrae"
                if has("degenerative") =>
            {
                add(F::DegenerativeSpine, Status::Present);
            }
            "spondylosis" | "osteophyte" | "hyperostosis, diffuse idiopathic skeletal" => {
                add(F::DegenerativeSpine, Status::Present);
            }
            "hernia, hiatal" | "hernia, diaphragmatic" => add(F::Hernia, Status::Present),
            "scoliosis" => add(F::Scoliosis, Status::Present),
            "emphysema"
            | "pulmonary emphysema"
            | "bullous emphysema"
            | "pulmonary disease, chronic obstructive"
            | "lung, hyperlucent"
            | "blister" => add(F::Emphysema, Status::Present),
            "lung" if has("hyperdistention") => add(F::Emphysema, Status::Present),
            "diaphragm" if has("flattened") => add(F::Emphysema, Status::Present),
            _ => {}
        }
        if has("/calcified") {
            add(F::Calcification, Status::Present);
        }
    }
    found
}

/// Labels `reports`, given as study number and text, and compares them with `labels`. Of several reports
/// of one study only the first counts; studies without labels are left out.
pub fn compare_with_mesh<'a>(
    labeler: &Labeler,
    labels: &MeshLabels,
    reports: impl IntoIterator<Item = (u32, &'a str)>,
    policy: UncertainPolicy,
) -> MeshAgreement {
    let mut by_finding: BTreeMap<Finding, ClassCounts> = Finding::ALL
        .into_iter()
        .map(|f| (f, ClassCounts::default()))
        .collect();
    let mut seen = std::collections::BTreeSet::new();
    for (uid, text) in reports {
        let Some(truth) = labels.get(&uid).filter(|_| seen.insert(uid)) else {
            continue;
        };
        let read = labeler.label(text);
        for (finding, counts) in &mut by_finding {
            let truth = truth.get(finding).copied().unwrap_or_default();
            counts.add(
                policy.positive(*finding, truth),
                policy.positive(*finding, read.status(*finding)),
            );
        }
    }
    MeshAgreement {
        studies: seen.len(),
        micro: micro(by_finding.values()),
        macro_average: macro_average(by_finding.values()),
        by_finding,
    }
}

impl MeshAgreement {
    /// The table as Markdown, one row a class, shares as percentages.
    pub fn to_markdown(&self) -> String {
        let mut table = String::from(
            "| finding | MeSH | read | both | precision % | recall % | F1 % |\n|---|---|---|---|---|---|---|\n",
        );
        for (finding, counts) in &self.by_finding {
            table.push_str(&format!(
                "| {finding} | {} | {} | {} | {} | {} | {} |\n",
                counts.support(),
                counts.true_positive + counts.false_positive,
                counts.true_positive,
                percent(counts.precision()),
                percent(counts.recall()),
                percent(counts.f1()),
            ));
        }
        for (name, average) in [("micro", &self.micro), ("macro", &self.macro_average)] {
            let [p, r, f] =
                [average.precision, average.recall, average.f1].map(|value| percent(Some(value)));
            table.push_str(&format!("| {name} | | | | {p} | {r} | {f} |\n"));
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_become_findings() {
        let found = mesh_findings(
            "Cardiomegaly/borderline;Calcified Granuloma/lung/left;Lung/hypoinflation;Diaphragm/flattened",
        );
        let expected = [
            (Finding::Cardiomegaly, Status::Uncertain),
            (Finding::Granuloma, Status::Present),
            (Finding::Calcification, Status::Present),
            (Finding::Emphysema, Status::Present),
        ];
        assert_eq!(found, expected.into_iter().collect());
    }

    #[test]
    fn a_table_without_mesh_is_refused() {
        let error = read_mesh_labels("uid,Problems\n1,normal\n").expect_err("no MeSH");
        assert!(error.to_string().contains("`MeSH`"), "{error}");
    }

    #[test]
    fn unindexed_studies_are_left_out() {
        let labels = read_mesh_labels("uid,MeSH\n1,normal\n2,No Indexing\n3,\"Hernia, Hiatal\"\n")
            .expect("labels");
        assert_eq!(labels.keys().copied().collect::<Vec<_>>(), [1, 3]);
        let reports = [
            (1, "胸部未见异常。"),
            (1, "气胸。"),
            (2, "气胸。"),
            (3, "胸部正常。"),
        ];
        let agreement = compare_with_mesh(
            Labeler::openi(),
            &labels,
            reports,
            UncertainPolicy::AsPresent,
        );
        assert_eq!(agreement.studies, 2);
        assert_eq!(
            agreement.by_finding[&Finding::Hernia],
            ClassCounts {
                false_negative: 1,
                ..Default::default()
            }
        );
        assert_eq!(agreement.by_finding[&Finding::NoFinding].true_positive, 1);
    }
}
