//! One model's reports beside the truth, and beside what needs no model: scores with intervals, and what is wrong in
//! which case. Where the reports come from is not known here.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::{
    bootstrap::adjust,
    cases::{Case, System, SystemTexts, WrittenReport},
    error::EvaluateError,
    findings::{
        Finding, LabelledPair, RuleSet, Status, evaluation::FindingEvaluation, score::score_pairs,
    },
    outcome::{
        CaseReview, Confusion, EvalOutcome, EvalSettings, FindingDifference, NamedValues, OtherRun,
        STATUSES, SystemScores,
    },
    text::{TextEvaluation, TextPair, rouge::rouge_l, segment::characters},
};

/// Scores the first of `systems` beside all others, and compares it with the run `other`.
///
/// # Errors
/// [`EvaluateError`]: nothing to evaluate, settings out of range.
///
/// # Panics
/// If there is no system, or a system has not one text a case.
pub fn evaluate(
    cases: Vec<Case>,
    systems: Vec<SystemTexts>,
    other: Option<&[WrittenReport]>,
    rules: &RuleSet,
    settings: EvalSettings,
) -> Result<EvalOutcome, EvaluateError> {
    assert!(!systems.is_empty(), "there is no system to evaluate");
    for texts in systems.iter().map(|system| &system.texts[..]).chain(other) {
        assert_eq!(texts.len(), cases.len(), "texts and cases disagree");
    }
    let scores: Vec<(SystemScores, Parts)> = systems
        .par_iter()
        .map(|system| system_scores(&cases, system, rules, &settings))
        .collect::<Result<_, _>>()?;
    let (scores, mut parts): (Vec<SystemScores>, Vec<Parts>) = scores.into_iter().unzip();
    let model = parts.swap_remove(0);
    let compared = other
        .map(|texts| {
            let system = SystemTexts {
                system: System::Model,
                note: String::new(),
                texts: texts.to_vec(),
            };
            let (scores, other) = system_scores(&cases, &system, rules, &settings)?;
            let mut all = other.texts.compare(&model.texts, &settings.bootstrap)?;
            let findings = other
                .findings
                .compare(&model.findings, &settings.bootstrap)?;
            all.extend(findings.into_iter().map(prefixed));
            adjust(all.iter_mut().map(|(_, comparison)| comparison));
            let reviews = (0..cases.len()).map(|at| {
                review(
                    at,
                    &cases[at],
                    &system.texts[at],
                    &other.labels[at],
                    &settings,
                )
            });
            let other = OtherRun {
                reviews: reviews.collect(),
                confusion: confusion(&other.labels),
                texts: system.texts,
                labels: other.labels,
                scores,
            };
            Ok::<_, EvaluateError>((NamedValues(all), other))
        })
        .transpose()?;
    let (comparison, other) = compared.unzip();
    let texts = systems
        .into_iter()
        .next()
        .map_or_else(Vec::new, |s| s.texts);
    let mut reviews: Vec<CaseReview> = (0..cases.len())
        .map(|at| review(at, &cases[at], &texts[at], &model.labels[at], &settings))
        .collect();
    reviews.sort_by(|a, b| {
        let wrong = |r: &CaseReview| (r.differences.len(), r.false_normal);
        wrong(b)
            .cmp(&wrong(a))
            .then(a.rouge_l.total_cmp(&b.rouge_l))
            .then(a.case.cmp(&b.case))
    });
    Ok(EvalOutcome {
        studies: model.texts.studies(),
        confusion: confusion(&model.labels),
        labels: model.labels,
        cases,
        texts,
        systems: scores,
        reviews,
        comparison,
        other,
        probabilities: None,
        judge: None,
        probability_comparison: None,
        subgroups: Vec::new(),
        rules: (rules.name.clone(), rules.guessed),
        others: rules
            .others()
            .into_iter()
            .map(|other| (other.key.clone(), other.chinese.clone()))
            .collect(),
        settings,
    })
}

/// What the scores of one system are made of.
struct Parts {
    texts: TextEvaluation,
    labels: Vec<LabelledPair>,
    findings: FindingEvaluation,
}

impl Parts {
    fn of(
        cases: &[Case],
        texts: &[WrittenReport],
        rules: &RuleSet,
        settings: &EvalSettings,
    ) -> Result<Self, EvaluateError> {
        let pairs: Vec<TextPair> = cases
            .iter()
            .zip(texts)
            .map(|(case, text)| TextPair {
                study: case.study.clone(),
                prediction: text.answer.clone(),
                reference: case.truth.clone(),
            })
            .collect();
        let labels: Vec<LabelledPair> = cases
            .iter()
            .zip(texts)
            .map(|(case, text)| {
                LabelledPair::read(
                    rules,
                    &case.study,
                    &case.truth,
                    &text.answer,
                    text.thinking.as_deref(),
                )
            })
            .collect();
        Ok(Self {
            texts: TextEvaluation::new(&pairs, settings.language)?,
            findings: FindingEvaluation::new(&labels, settings.policies),
            labels,
        })
    }
}

fn prefixed<T>((name, value): (String, T)) -> (String, T) {
    (format!("findings.{name}"), value)
}

fn system_scores(
    cases: &[Case],
    system: &SystemTexts,
    rules: &RuleSet,
    settings: &EvalSettings,
) -> Result<(SystemScores, Parts), EvaluateError> {
    let parts = Parts::of(cases, &system.texts, rules, settings)?;
    let mut scores = parts.texts.intervals(&settings.bootstrap)?;
    let findings = parts.findings.intervals(&settings.bootstrap)?;
    scores.extend(findings.into_iter().map(prefixed));
    let outputs = system.texts.iter().map(|text| text.answer.as_str());
    let scores = SystemScores {
        system: system.system,
        note: system.note.clone(),
        scores: NamedValues(scores),
        findings: score_pairs(&parts.labels, outputs, settings.policies),
    };
    Ok((scores, parts))
}

fn confusion(labels: &[LabelledPair]) -> BTreeMap<Finding, Confusion> {
    let place = |status: Status| STATUSES.iter().position(|s| *s == status).unwrap_or(3);
    let mut tables = BTreeMap::new();
    for finding in Finding::ALL {
        let mut table = Confusion::default();
        for pair in labels {
            let (truth, answer) = (pair.truth.status(finding), pair.prediction.status(finding));
            table[place(truth)][place(answer)] += 1;
        }
        tables.insert(finding, table);
    }
    tables
}

fn review(
    at: usize,
    case: &Case,
    text: &WrittenReport,
    pair: &LabelledPair,
    settings: &EvalSettings,
) -> CaseReview {
    let compared = pair.compare(settings.policies);
    let differences = compared
        .classes
        .iter()
        .filter(|class| class.finding != Finding::NoFinding)
        .filter_map(|class| {
            let difference = match (class.in_truth, class.in_prediction) {
                (Some(true), Some(false)) => FindingDifference::Missed,
                (Some(false), Some(true)) => FindingDifference::Invented,
                _ if class.wrong_side == Some(true) => FindingDifference::Side,
                _ => return None,
            };
            Some((class.finding, difference))
        })
        .collect();
    CaseReview {
        case: at,
        differences,
        empty: pair.is_empty,
        false_normal: compared.false_normal == Some(true),
        invented: compared.invented == Some(true),
        contradiction: compared.contradiction == Some(true),
        rouge_l: rouge_l(&characters(&text.answer), &characters(&case.truth)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{
        bootstrap::Bootstrap, cases::System, caveat::too_few, findings::Policies,
        text::TextLanguage,
    };

    fn case(study: &str, truth: &str) -> Case {
        Case {
            study: study.into(),
            name: format!("{study}_1.png"),
            question: String::new(),
            truth: truth.into(),
        }
    }

    fn outcome() -> EvalOutcome {
        let cases = vec![
            case("1", "左侧胸腔积液。"),
            case("2", "右侧气胸，心影增大。"),
            case("3", "胸部未见异常。"),
        ];
        let texts = ["右侧胸腔积液。", "心肺未见异常。", "胸部未见异常。"];
        let texts: Vec<WrittenReport> = texts.map(|text| text.to_owned().into()).to_vec();
        let system = SystemTexts {
            system: System::Model,
            note: String::new(),
            texts: texts.clone(),
        };
        let settings = EvalSettings {
            bootstrap: Bootstrap {
                resamples: 20,
                ..Bootstrap::default()
            },
            policies: Policies::default(),
            language: TextLanguage::Chinese,
        };
        evaluate(
            cases,
            vec![system],
            Some(&texts),
            &RuleSet::guess([]),
            settings,
        )
        .expect("there are cases")
    }

    #[test]
    fn the_worst_case_comes_first_and_says_what_is_wrong() {
        let outcome = outcome();
        let first = &outcome.reviews[0];
        assert_eq!(first.case, 1);
        assert!(first.false_normal && !first.invented);
        let expected = [
            (Finding::Cardiomegaly, FindingDifference::Missed),
            (Finding::Pneumothorax, FindingDifference::Missed),
        ];
        assert_eq!(first.differences, expected);
        let second = &outcome.reviews[1];
        assert_eq!(
            second.differences,
            [(Finding::PleuralEffusion, FindingDifference::Side)]
        );
        assert_eq!(outcome.reviews[2].differences, []);
    }

    #[test]
    fn statuses_fall_where_they_belong() {
        let table = outcome().confusion[&Finding::Pneumothorax];
        assert_eq!(table.iter().flatten().sum::<usize>(), 3);
        // Present in the truth, not mentioned in the answer.
        assert_eq!(table[0][3], 1);
    }

    #[test]
    fn a_run_compared_with_itself_does_not_differ() {
        let comparison = outcome().comparison.expect("another run was given");
        let rouge = comparison.get("characters.rouge_l").expect("a score");
        assert_eq!(rouge.difference.value, 0.0);
        // Three studies are too few for a test.
        assert!(rouge.p.is_nan());
        let remark = too_few(3, true).expect("too few");
        assert!(
            remark
                .english
                .starts_with("3 studies: no p value; at least 6"),
            "{remark:?}"
        );
        assert_eq!(too_few(3, false), None);
        assert_eq!(too_few(6, true), None);
        assert!(too_few(1, false).is_some());
        assert!(comparison.get("findings.micro.f1").is_some());
    }
}
