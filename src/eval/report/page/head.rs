//! The head of a page: what was evaluated, what to beware of, and the main scores.

use std::fmt::Write;

use super::{
    facts::PageFacts,
    markup::{english, escape},
};
use crate::{
    eval::{cases::System, outcome::EvalOutcome, report::names::score_name},
    study::counted,
};

pub(super) fn head(page: &mut String, outcome: &EvalOutcome, facts: &PageFacts) {
    page.push_str(
        "<header class=\"top\"><h1>胸片报告评测<small>evaluation of chest X-ray reports</small></h1>\
         <button id=\"theme\" type=\"button\" hidden>明 / 暗 · light / dark</button></header>\n",
    );
    page.push_str("<div class=\"card\"><dl class=\"facts\">");
    let mut row = |chinese: &str, english: &str, value: &str| {
        let _ = write!(
            page,
            "<dt>{chinese} <small>{english}</small></dt><dd>{}</dd>",
            escape(value)
        );
    };
    for (chinese, english, value) in &facts.facts {
        row(chinese, english, value);
    }
    let bootstrap = &outcome.settings.bootstrap;
    row(
        "规模",
        "size",
        &format!(
            "{} 份报告，{} 项检查 ({} of {})",
            outcome.cases.len(),
            outcome.studies,
            counted(outcome.cases.len(), "report", "reports"),
            counted(outcome.studies, "study", "studies")
        ),
    );
    row(
        "区间",
        "intervals",
        &format!(
            "{:.0} %，按检查自助抽样 {} 次，种子 {} (bootstrap by study)",
            100.0 * bootstrap.confidence,
            bootstrap.resamples,
            bootstrap.seed
        ),
    );
    page.push_str("</dl></div>\n");
    for warning in &facts.warnings {
        let _ = writeln!(
            page,
            "<div class=\"card warn\">{}<br><small>{}</small></div>",
            escape(&warning.chinese),
            escape(&warning.english)
        );
    }
}

/// The best of the systems that look at no image, for one score.
fn best_baseline(outcome: &EvalOutcome, name: &str) -> Option<(System, f64)> {
    let label = score_name(name);
    let values = outcome.systems[1..].iter().filter_map(|system| {
        let value = system.scores.get(name)?.value;
        (system.system != System::Swapped && !value.is_nan()).then_some((system.system, value))
    });
    values.reduce(|best, next| {
        let better = if label.less_is_better {
            next.1 < best.1
        } else {
            next.1 > best.1
        };
        if better { next } else { best }
    })
}

pub(super) fn tiles(page: &mut String, outcome: &EvalOutcome, facts: &PageFacts) {
    page.push_str("<div class=\"tiles\">");
    for name in [
        "findings.micro.f1",
        "findings.false_normal",
        "findings.invented",
        "characters.rouge_l",
    ] {
        let label = score_name(name);
        let Some(score) = outcome.systems[0].scores.get(name) else {
            continue;
        };
        let interval = if score.value.is_nan() {
            "没有这样的检查 · no such study".to_owned()
        } else {
            format!("[{}]", label.ends(score))
        };
        let less = if label.less_is_better { " ↓" } else { "" };
        let unit = if score.value.is_nan() { "" } else { " %" };
        let _ = write!(
            page,
            "<div class=\"card tile\"><div class=\"what\">{}{less}<small>{}</small></div><b>{}{unit}</b><div class=\"interval\">{interval}</div>",
            label.chinese,
            english(&label),
            label.value(score.value)
        );
        if let Some((system, value)) = best_baseline(outcome, name) {
            let _ = write!(
                page,
                "<div class=\"against\">最好的基线：{}，{}<small>best baseline: {}</small></div>",
                label.value(value),
                system.names().0,
                system.names().1
            );
        }
        page.push_str("</div>");
    }
    if let Some((loss, perplexity, accuracy)) = facts.loss {
        let _ = write!(
            page,
            "<div class=\"card tile\"><div class=\"what\">损失<small>loss per token</small></div><b>{loss:.4}</b>\
             <div class=\"interval\">困惑度 perplexity {perplexity:.3}</div>\
             <div class=\"against\">词元准确率：{:.1} %<small>token accuracy</small></div></div>",
            100.0 * accuracy
        );
    }
    page.push_str("</div>\n");
}
