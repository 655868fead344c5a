//! Answers that a run has drawn and rewarded, beside the true reports.

use std::{collections::BTreeMap, fmt::Write};

use serde::Deserialize;

use super::markup::{escape, section};

/// Answers of one rollout.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PageRollout {
    /// Steps of the run before it.
    pub step: usize,
    /// The answers.
    pub answers: Vec<RewardedAnswer>,
}

/// One drawn answer, as the run's folder has it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct RewardedAnswer {
    /// The true report.
    pub truth: String,
    /// The answer.
    pub answer: String,
    /// The weighted sum.
    pub reward: f64,
    /// By part.
    pub rewards: BTreeMap<String, f64>,
    /// Not trained on, by part.
    #[serde(default)]
    pub held_out_rewards: BTreeMap<String, f64>,
    /// How much better than the mean of its group.
    pub advantage: f64,
}

/// Writes a table of the answers.
pub(super) fn write(page: &mut String, rollout: &PageRollout) {
    section(page, "抽样回答与奖励", "drawn answers with their rewards");
    let _ = writeln!(
        page,
        "<p class=\"muted\">第 {0} 步之后抽取；优势为与同组平均之差。<br>Drawn after step {0}; the advantage is the distance from \
         the mean of the group.</p>\n<div class=\"card scroll\"><table><thead><tr><th>真实报告<br><small>truth</small></th>\
         <th>回答<br><small>answer</small></th><th>奖励<br><small>reward</small></th><th>分项<br><small>by part</small></th>\
         <th>优势<br><small>advantage</small></th></tr></thead><tbody>",
        rollout.step
    );
    for one in &rollout.answers {
        let parts = |parts: &BTreeMap<String, f64>| -> Vec<String> {
            let each = parts.iter();
            each.map(|(name, value)| format!("{} {value:.2}", escape(name)))
                .collect()
        };
        let mut shown = parts(&one.rewards);
        let held_out = parts(&one.held_out_rewards);
        shown.extend(held_out.iter().map(|part| format!("<i>{part}</i>")));
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td>{:.3}</td><td>{}</td><td>{:+.2}</td></tr>",
            escape(&one.truth),
            escape(&one.answer),
            one.reward,
            shown.join("<br>"),
            one.advantage
        );
    }
    page.push_str(
        "</tbody></table></div>\n<p class=\"muted\">斜体：只测量、不训练。<br>Italic: measured, not trained on.</p>\n",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_shown_escaped_with_their_parts() {
        let line = r#"{"truth":"a<b","answer":"心影增大。","reward":0.5,"rewards":{"finding_f1":0.25},"held_out_rewards":{"text":0.75},"advantage":-1.5,"row":3}"#;
        let rollout = PageRollout {
            step: 8,
            answers: vec![serde_json::from_str(line).unwrap()],
        };
        let mut page = String::new();
        write(&mut page, &rollout);
        for part in [
            "a&lt;b",
            "心影增大。",
            "finding_f1 0.25",
            "<i>text 0.75</i>",
            "-1.50",
        ] {
            assert!(page.contains(part), "no {part} in {page}");
        }
    }
}
