//! What scores are called and how they are written.

use crate::eval::{bootstrap::Interval, findings::Finding, outcome::NamedValues};

/// How a score is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreScale {
    /// 0 to 100 already.
    Percent,
    /// 0 to 1, written as per cent.
    Share,
    /// 0 to 10.
    Ten,
}

/// A score's name for readers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScoreName {
    /// Group, Chinese and English.
    pub group: (&'static str, &'static str),
    /// Name in Chinese.
    pub chinese: String,
    /// Name in English.
    pub english: String,
    /// How its values are written.
    pub scale: ScoreScale,
    /// Whether less is better.
    pub less_is_better: bool,
}

/// The scores that a short table shows.
pub const HEADLINE: [&str; 34] = [
    "findings.micro.precision",
    "findings.micro.recall",
    "findings.micro.f1",
    "findings.macro.f1",
    "findings.false_normal",
    "findings.invented",
    "findings.laterality_errors",
    "findings.contradictions",
    "findings.invented_comparisons",
    "findings.inner_contradictions",
    "findings.chexpert_14.micro.f1",
    "findings.chexpert_14.macro.f1",
    "findings.chexpert_14.samples.f1",
    "findings.chexpert_5.micro.f1",
    "findings.chexpert_5.macro.f1",
    "findings.with_side.micro.f1",
    "findings.with_side_degree_lobe.micro.f1",
    "findings.urgent.micro.f1",
    "characters.bleu_1",
    "characters.bleu_4",
    "characters.rouge_l",
    "characters.meteor",
    "characters.cider_d",
    "characters.chrf",
    "words.bleu_1",
    "words.bleu_4",
    "words.rouge_l",
    "words.meteor",
    "words.cider_d",
    "words.chrf",
    "sacrebleu_zh.bleu_4",
    "ms_swift.rouge_l",
    "ms_swift.bleu_4",
    "llama_factory.bleu_4",
];

/// The name for readers of the score `name`.
pub fn score_name(name: &str) -> ScoreName {
    let (group, rest) = name.split_once('.').unwrap_or(("", name));
    if group == "findings" {
        return finding_score_name(rest);
    }
    let english = match rest {
        "meteor" => "METEOR (exact)".to_owned(),
        "cider_d" => "CIDEr-D".to_owned(),
        "chrf" => "chrF".to_owned(),
        other => match other.strip_prefix("sentence_bleu_") {
            Some(order) => format!("BLEU-{order} (sentence mean)"),
            None => other.to_uppercase().replace('_', "-"),
        },
    };
    let chinese = english
        .replace(" (sentence mean)", "（逐句平均）")
        .replace(" (exact)", "（精确匹配）");
    let group = match group {
        "characters" => ("按字", "characters"),
        "words" => ("按词（中文用 jieba）", "words (jieba for Chinese)"),
        "sacrebleu_zh" => ("sacrebleu zh", "sacrebleu zh"),
        "ms_swift" => ("ms-swift 4", "ms-swift 4"),
        "ms_swift_3" => ("ms-swift 3", "ms-swift 3"),
        "llama_factory" => ("LLaMA-Factory", "LLaMA-Factory"),
        _ => ("其他", "other"),
    };
    let scale = if rest == "cider_d" {
        ScoreScale::Ten
    } else {
        ScoreScale::Percent
    };
    ScoreName {
        group,
        chinese,
        english,
        scale,
        less_is_better: false,
    }
}

/// Chinese and English of a group of labels, see `findings::Group`.
fn group_name(group: &str) -> Option<(&'static str, &'static str)> {
    Some(match group {
        "chexpert_14" => ("CheXpert 14 类", "CheXpert 14"),
        "chexpert_5" => ("CheXpert 5 类", "CheXpert 5"),
        "with_side" => ("含左右侧", "with side"),
        "with_side_degree_lobe" => ("含左右侧、程度、肺叶", "with side, degree, lobe"),
        "urgent" => ("危急所见", "urgent"),
        _ => return None,
    })
}

fn average_name(kind: &str) -> (&'static str, &'static str) {
    match kind {
        "micro" => ("微平均", "micro"),
        "macro" => ("宏平均", "macro"),
        "weighted" => ("加权平均", "weighted"),
        _ => ("逐例平均", "per report"),
    }
}

fn finding_score_name(name: &str) -> ScoreName {
    let rates = [
        (
            "invented_comparisons",
            "无旧片而作比较率",
            "comparison without a prior film",
        ),
        (
            "inner_contradictions",
            "报告自相矛盾率",
            "report contradicts itself",
        ),
        ("false_normal", "漏诊为正常率", "false-normal rate"),
        ("invented", "正常误报率", "invented-finding rate"),
        ("laterality_errors", "左右侧错误率", "laterality errors"),
        (
            "contradictions",
            "思考与结论矛盾率",
            "thinking contradicts answer",
        ),
    ];
    let rate = rates.iter().find(|(key, ..)| *key == name);
    let grouped = name
        .split_once('.')
        .and_then(|(group, rest)| Some((group_name(group)?, rest.split_once('.')?)));
    let (chinese, english) = match (rate, name.split_once('.')) {
        (Some((_, chinese, english)), _) => ((*chinese).to_owned(), (*english).to_owned()),
        (None, Some(_)) if grouped.is_some() => {
            let ((group, group_english), (kind, what)) = grouped.unwrap_or_default();
            let (kind, kind_english) = average_name(kind);
            let (what, what_english) = match what {
                "precision" => ("精确率", "precision"),
                "recall" => ("召回率", "recall"),
                _ => ("F1", "F1"),
            };
            (
                format!("{group}{kind}{what}"),
                format!("{group_english}: {kind_english} {what_english}"),
            )
        }
        (None, Some((of, what))) => {
            let what_chinese = match what {
                "precision" => "精确率",
                "recall" => "召回率",
                _ => "F1",
            };
            let class = Finding::ALL.into_iter().find(|f| f.key() == of);
            let of_chinese = match (of, class) {
                ("micro", _) => "微平均",
                ("macro", _) => "宏平均",
                (_, Some(class)) => class.chinese(),
                (other, None) => other,
            };
            let what = if what == "f1" { "F1" } else { what };
            (
                format!("{of_chinese}{what_chinese}"),
                format!("{} {what}", of.replace('_', " ")),
            )
        }
        (None, None) => (name.to_owned(), name.to_owned()),
    };
    ScoreName {
        group: ("所见", "findings"),
        chinese,
        english,
        scale: ScoreScale::Share,
        less_is_better: rate.is_some(),
    }
}

impl ScoreName {
    /// The value as it is written; `–` where there is none.
    pub fn value(&self, value: f64) -> String {
        match self.scale {
            _ if value.is_nan() => "–".to_owned(),
            ScoreScale::Percent => format!("{value:.1}"),
            ScoreScale::Share => format!("{:.1}", 100.0 * value),
            ScoreScale::Ten => format!("{value:.2}"),
        }
    }

    /// The value with the ends of its interval.
    pub fn interval(&self, interval: &Interval) -> String {
        if interval.value.is_nan() {
            return "–".to_owned();
        }
        if interval.low.is_nan() || interval.high.is_nan() {
            return format!("{} [–]", self.value(interval.value));
        }
        format!(
            "{} [{}, {}]",
            self.value(interval.value),
            self.value(interval.low),
            self.value(interval.high)
        )
    }

    /// The ends of an interval alone; `–` where there is none.
    pub fn ends(&self, interval: &Interval) -> String {
        if interval.low.is_nan() || interval.high.is_nan() {
            return "–".to_owned();
        }
        format!(
            "{} – {}",
            self.value(interval.low),
            self.value(interval.high)
        )
    }

    /// The value on an axis from 0 to 1.
    pub fn on_axis(&self, value: f64) -> f64 {
        match self.scale {
            ScoreScale::Percent => value / 100.0,
            ScoreScale::Share => value,
            ScoreScale::Ten => value / 10.0,
        }
    }
}

/// A p value as it is written; `–` where there is none.
pub fn p_value(p: f64) -> String {
    if p.is_nan() {
        "–".to_owned()
    } else {
        format!("{p:.3}")
    }
}

/// Whether the score `name` says anything in any of `scores`: not a share of nothing everywhere.
pub fn is_measured<'a>(
    name: &str,
    mut scores: impl Iterator<Item = &'a NamedValues<Interval>>,
) -> bool {
    scores.any(|scores| scores.get(name).is_some_and(|score| !score.value.is_nan()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{findings::evaluation::FindingSums, text::TextScores};

    #[test]
    fn every_score_has_a_name_in_both_languages() {
        let findings = FindingSums::names();
        let findings = findings.iter().map(|name| format!("findings.{name}"));
        let all: Vec<String> = TextScores::names().into_iter().chain(findings).collect();
        let mut seen = std::collections::BTreeSet::new();
        for name in &all {
            let label = score_name(name);
            assert_ne!(label.group.1, "other", "{name}");
            assert!(
                seen.insert((label.group, label.chinese.clone())),
                "{name}: {label:?}"
            );
            assert!(!label.english.contains('_'), "{label:?}");
        }
        for name in HEADLINE {
            assert!(all.iter().any(|other| other == name), "{name}");
        }
    }

    #[test]
    fn values_are_written_on_their_scale() {
        let value = Interval {
            value: 0.5,
            low: 0.25,
            high: 0.75,
        };
        assert_eq!(
            score_name("findings.micro.f1").interval(&value),
            "50.0 [25.0, 75.0]"
        );
        assert_eq!(score_name("characters.cider_d").value(1.234), "1.23");
        assert_eq!(score_name("words.chrf").value(f64::NAN), "–");
        let alone = Interval {
            low: f64::NAN,
            high: f64::NAN,
            ..value
        };
        assert_eq!(score_name("findings.micro.f1").interval(&alone), "50.0 [–]");
        assert_eq!(
            (p_value(f64::NAN), p_value(0.0314)),
            ("–".to_owned(), "0.031".to_owned())
        );
        assert!(score_name("findings.invented").less_is_better);
        assert_eq!(score_name("findings.pneumothorax.f1").chinese, "气胸F1");
    }
}
