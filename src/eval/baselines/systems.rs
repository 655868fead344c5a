//! Reports that cost no look at the image, made of the training reports.

use std::collections::HashMap;

use super::search::{
    BaselineError, ConstantSearch, Neighbour, best_constant_report, nearest_neighbours,
    random_reports,
};
use crate::eval::cases::{Case, System, SystemTexts, WrittenReport};

/// Where the baselines' reports come from.
#[derive(Debug, Clone, Copy)]
pub enum Reports<'a> {
    /// Of the training set.
    Training(&'a [String]),
    /// The test set's own, for want of a training set: the constant one is then the best in hindsight.
    Own,
}

/// The best constant report and a random one, for all cases. Empty without reports.
pub fn without_images(cases: &[Case], reports: Reports<'_>, seed: u64) -> Vec<SystemTexts> {
    let truths: Vec<String>;
    let (pool, of) = match reports {
        Reports::Training(pool) => (pool, "训练集 (training set)"),
        Reports::Own => {
            truths = cases.iter().map(|case| case.truth.clone()).collect();
            (&truths[..], "测试集自身，未给训练集 (the test set itself)")
        }
    };
    let search = ConstantSearch {
        seed,
        ..ConstantSearch::default()
    };
    let Some(constant) = best_constant_report(pool, &search) else {
        return Vec::new();
    };
    let text = &pool[constant.index];
    let sampled = if constant.exact {
        ""
    } else {
        "，抽样 (of a sample)"
    };
    let own = matches!(reports, Reports::Own);
    // Of the test set's own reports, one of another study.
    let other = |at: usize, drawn: usize| {
        let differs = |place: &usize| !own || cases[*place].study != cases[at].study;
        (drawn..pool.len())
            .chain(0..drawn)
            .find(differs)
            .unwrap_or(drawn)
    };
    let random = random_reports(pool.len(), cases.len(), seed);
    let random = random.into_iter().enumerate();
    vec![
        SystemTexts {
            system: System::Constant,
            note: format!("{of}{sampled}：{text}"),
            texts: vec![WrittenReport::from(text.clone()); cases.len()],
        },
        SystemTexts {
            system: System::Random,
            note: of.to_owned(),
            texts: random
                .map(|(at, drawn)| pool[other(at, drawn)].clone().into())
                .collect(),
        },
    ]
}

/// The report of the training image with the greatest cosine, for each case.
///
/// # Shapes
/// - `queries`: `[cases, dimension]`, `training`: `[reports, dimension]`, row after row
///
/// # Errors
/// [`BaselineError`].
pub fn nearest_image(
    queries: &[f32],
    training: &[f32],
    dimension: usize,
    reports: &[String],
) -> Result<SystemTexts, BaselineError> {
    let nearest = nearest_neighbours(queries, training, dimension)?;
    let mean =
        nearest.iter().map(|n| f64::from(n.cosine)).sum::<f64>() / nearest.len().max(1) as f64;
    let text = |neighbour: &Neighbour| WrittenReport::from(reports[neighbour.index].clone());
    Ok(SystemTexts {
        system: System::Neighbour,
        note: format!("平均余弦 (mean cosine) {mean:.4}"),
        texts: nearest.iter().map(text).collect(),
    })
}

/// For each case another one whose images can take the place of its own: of as many images, and of another study
/// where there is one.
///
/// `images` holds how many each case has. A case alone of its kind keeps its images.
pub fn swapped(studies: &[&str], images: &[usize]) -> Vec<usize> {
    let mut groups: HashMap<usize, Vec<usize>> = HashMap::new();
    for (at, count) in images.iter().enumerate() {
        groups.entry(*count).or_default().push(at);
    }
    let mut others: Vec<usize> = (0..images.len()).collect();
    for group in groups.values() {
        let half = group.len() / 2;
        for (place, &at) in group.iter().enumerate() {
            let far = (0..group.len()).map(|step| group[(place + half + step) % group.len()]);
            let differs = |other: &usize| studies[*other] != studies[at];
            others[at] = far.clone().find(differs).unwrap_or(at);
        }
    }
    others
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cases() -> Vec<Case> {
        [("1", "甲乙丙。"), ("1", "甲乙丙。"), ("2", "甲乙丁。")]
            .map(|(study, truth)| Case {
                study: study.into(),
                name: study.into(),
                question: String::new(),
                truth: truth.into(),
            })
            .to_vec()
    }

    #[test]
    fn own_reports_are_those_of_other_studies() {
        let made = without_images(&cases(), Reports::Own, 1);
        assert_eq!(made[0].texts[2].answer, "甲乙丙。");
        let random: Vec<&str> = made[1].texts.iter().map(|t| t.answer.as_str()).collect();
        assert_eq!(random, ["甲乙丁。", "甲乙丁。", "甲乙丙。"]);
        assert!(without_images(&cases(), Reports::Training(&[]), 1).is_empty());
    }

    #[test]
    fn the_nearest_image_lends_its_report() {
        let reports = ["甲".to_owned(), "乙".to_owned()];
        let made = nearest_image(&[0.0, 2.0], &[1.0, 0.0, 0.1, 1.0], 2, &reports).expect("rows");
        assert_eq!(made.texts, [WrittenReport::from("乙".to_owned())]);
    }

    #[test]
    fn images_go_to_other_studies_of_as_many() {
        let studies = ["1", "1", "2", "3", "4"];
        let others = swapped(&studies, &[1, 1, 1, 1, 2]);
        assert_eq!(others[4], 4, "the only one with two images keeps them");
        for at in 0..4 {
            assert_ne!(studies[others[at]], studies[at]);
        }
    }
}
