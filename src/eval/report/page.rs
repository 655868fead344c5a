//! An outcome as one HTML file that needs nothing beside it: Chinese first, light and dark, searchable.

use std::fmt::Write;

use super::{
    Confusion, Difference, Outcome, Remark, Review, STATUSES, System,
    charts::dots,
    film::data_url,
    names::{Label, label, p_value},
    table::shown,
};
use crate::{
    eval::findings::{Finding, Status},
    processor::image::RgbImage,
    study::counted,
};

mod gallery;

/// Longest side of a film in the page, in pixels.
const FILM_PIXELS: u32 = 360;

/// Scores that get a chart.
const CHARTS: [&str; 6] = [
    "findings.micro.f1",
    "findings.macro.f1",
    "findings.false_normal",
    "findings.invented",
    "characters.rouge_l",
    "characters.bleu_4",
];

/// What a page tells besides the scores.
#[derive(Debug, Clone, Default)]
pub struct PageFacts {
    /// Rows of the head: Chinese name, English name, value.
    pub facts: Vec<(&'static str, &'static str, String)>,
    /// Things a reader must know before believing the numbers.
    pub warnings: Vec<Remark>,
    /// Mean loss per token, perplexity and token accuracy (0 to 1) on the true reports.
    pub loss: Option<(f64, f64, f64)>,
    /// Curves of the training run, as SVG.
    pub curves: Option<String>,
    /// Most cases of the gallery.
    pub gallery: usize,
}

/// The films of one case, or why one cannot be shown.
pub type Films = Vec<Result<RgbImage, String>>;

/// Writes the page. `films` is asked once for each case of the gallery, by its place.
pub fn html(outcome: &Outcome, facts: &PageFacts, films: &mut dyn FnMut(usize) -> Films) -> String {
    let mut page = String::new();
    page.push_str(
        "<!doctype html>\n<html lang=\"zh-CN\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; \
         style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n<title>胸片报告评测</title>\n<style>\n",
    );
    page.push_str(include_str!("page/style.css"));
    page.push_str("</style>\n</head>\n<body>\n<main>\n");
    head(&mut page, outcome, facts);
    tiles(&mut page, outcome, facts);
    charts(&mut page, outcome);
    scores(&mut page, outcome);
    comparison(&mut page, outcome);
    findings(&mut page, outcome);
    confusion(&mut page, outcome);
    gallery::write(&mut page, outcome, facts.gallery, films);
    if let Some(curves) = &facts.curves {
        section(&mut page, "训练曲线", "training curves");
        let _ = writeln!(page, "<div class=\"card curves\">{curves}</div>");
    }
    page.push_str(
        "<footer><p>仅供研究，不是诊断。所见由规则从报告文字中读出；规则的错误与模型的错误一样计数。</p>\
         <p>For research only; nothing here is a diagnosis. Findings are read off the texts by rules, whose mistakes \
         count like the model's.</p></footer>\n</main>\n<script>\n",
    );
    page.push_str(include_str!("page/script.js"));
    page.push_str("</script>\n</body>\n</html>\n");
    page
}

/// Text as HTML shows it, in elements and in attributes.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

// Writing to a string cannot fail, here and below.
fn section(page: &mut String, chinese: &str, english: &str) {
    let _ = writeln!(page, "<h2>{chinese}<small>{english}</small></h2>");
}

fn head(page: &mut String, outcome: &Outcome, facts: &PageFacts) {
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
fn best_baseline(outcome: &Outcome, name: &str) -> Option<(System, f64)> {
    let label = label(name);
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

fn tiles(page: &mut String, outcome: &Outcome, facts: &PageFacts) {
    page.push_str("<div class=\"tiles\">");
    for name in [
        "findings.micro.f1",
        "findings.false_normal",
        "findings.invented",
        "characters.rouge_l",
    ] {
        let label = label(name);
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

/// The English name, with its tokens where the Chinese one tells them too.
fn english(label: &Label) -> String {
    if label.group.1 == "findings" {
        label.english.clone()
    } else {
        format!("{}, {}", label.english, label.group.1)
    }
}

fn charts(page: &mut String, outcome: &Outcome) {
    section(page, "与基线比较", "beside the baselines");
    page.push_str(
        "<p class=\"muted\">基线不看所见：同一份报告给所有人、训练集中任一报告、最相似影像的报告。影像互换后模型的分数应明显下降，\
         否则它没有看图。<br><small>The baselines look for no finding. With images swapped the model should fall visibly, \
         else it does not look.</small></p><div class=\"charts\">",
    );
    for name in CHARTS {
        let chart = dots(outcome, name);
        if chart.is_empty() {
            continue;
        }
        let label = label(name);
        let less = if label.less_is_better { " ↓" } else { "" };
        let group = if label.group.1 == "findings" {
            String::new()
        } else {
            format!("（{}）", label.group.0)
        };
        let _ = write!(
            page,
            "<div class=\"card\"><h3>{}{group}{less}<small>{}</small></h3>{chart}</div>",
            label.chinese,
            english(&label)
        );
    }
    page.push_str("</div>\n");
    for system in outcome.systems.iter().filter(|s| !s.note.is_empty()) {
        let (chinese, english) = system.system.names();
        let _ = writeln!(
            page,
            "<p class=\"muted\">{chinese} <small>{english}</small>：{}</p>",
            escape(&system.note)
        );
    }
}

fn scores(page: &mut String, outcome: &Outcome) {
    section(page, "分数", "scores");
    page.push_str("<p class=\"muted\">百分数，CIDEr-D 为 0 到 10 · per cent, CIDEr-D from 0 to 10</p><div class=\"card scroll\">");
    score_table(page, outcome, &shown(outcome, false));
    page.push_str(
        "</div><details><summary>全部分数 · all scores</summary><div class=\"card scroll\">",
    );
    score_table(page, outcome, &shown(outcome, true));
    page.push_str("</div></details>\n");
}

fn score_table(page: &mut String, outcome: &Outcome, names: &[&str]) {
    page.push_str("<table><thead><tr><th></th>");
    for (at, system) in outcome.systems.iter().enumerate() {
        let (chinese, english) = system.system.names();
        let _ = write!(page, "<th>{chinese}<small>{english}</small></th>");
        if at == 0 {
            page.push_str("<th>区间<small>interval</small></th>");
        }
    }
    page.push_str("</tr></thead><tbody>");
    let is_finding = |name: &&&str| name.starts_with("findings.");
    let findings = names.iter().filter(is_finding);
    let texts = names.iter().filter(|name| !is_finding(name));
    let mut group = "";
    for name in findings.chain(texts) {
        let label = label(name);
        if label.group.1 != group {
            if group == "findings" {
                rate_rows(page, outcome);
            }
            group = label.group.1;
            let english = if label.group.0 == group { "" } else { group };
            let _ = write!(
                page,
                "<tr class=\"group\"><td colspan=\"{}\">{} <small>{english}</small></td></tr>",
                outcome.systems.len() + 2,
                label.group.0
            );
        }
        let english = if label.chinese == label.english {
            ""
        } else {
            &label.english
        };
        let less = if label.less_is_better { " ↓" } else { "" };
        let _ = write!(
            page,
            "<tr><td>{}{less} <small>{english}</small></td>",
            label.chinese
        );
        for (at, system) in outcome.systems.iter().enumerate() {
            let Some(score) = system.scores.get(name) else {
                continue;
            };
            let _ = write!(page, "<td>{}</td>", label.value(score.value));
            if at == 0 {
                let _ = write!(page, "<td class=\"muted\">{}</td>", label.ends(score));
            }
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table>");
}

/// Shares of equal outputs, which have no interval: a draw with repeats would make equals.
fn rate_rows(page: &mut String, outcome: &Outcome) {
    type RateOf = fn(&super::SystemScores) -> crate::eval::findings::score::Rate;
    let rates: [(&str, &str, RateOf); 3] = [
        ("空白回答占比", "empty answers", |s| {
            s.findings.empty_outputs
        }),
        ("相同输出占比", "identical outputs", |s| {
            s.findings.identical_outputs
        }),
        ("最常见输出占比", "most frequent output", |s| {
            s.findings.most_frequent_output
        }),
    ];
    for (chinese, english, rate) in rates {
        let _ = write!(page, "<tr><td>{chinese} <small>{english}</small></td>");
        for (at, system) in outcome.systems.iter().enumerate() {
            let value = rate(system).value().unwrap_or(f64::NAN);
            let _ = write!(page, "<td>{:.1}</td>", 100.0 * value);
            if at == 0 {
                page.push_str("<td></td>");
            }
        }
        page.push_str("</tr>");
    }
}

fn comparison(page: &mut String, outcome: &Outcome) {
    let Some(comparison) = &outcome.comparison else {
        return;
    };
    section(
        page,
        "与另一次运行成对比较",
        "paired comparison with another run",
    );
    page.push_str(
        "<div class=\"card scroll\"><table><thead><tr><th></th><th>另一次<small>other</small></th><th>本次<small>this</small></th>\
         <th>差<small>difference</small></th><th>区间<small>interval</small></th><th>p</th></tr></thead><tbody>",
    );
    for name in shown(outcome, false) {
        let Some(compared) = comparison.get(name) else {
            continue;
        };
        let label = label(name);
        let _ = write!(
            page,
            "<tr><td>{} <small>{} · {}</small></td><td>{}</td><td>{}</td><td>{}</td><td class=\"muted\">{}</td><td>{}</td></tr>",
            label.chinese,
            label.group.0,
            label.english,
            label.value(compared.first),
            label.value(compared.second),
            label.value(compared.difference.value),
            label.ends(&compared.difference),
            p_value(compared.p)
        );
    }
    page.push_str("</tbody></table></div>\n");
}

fn findings(page: &mut String, outcome: &Outcome) {
    section(page, "逐项所见", "by finding");
    page.push_str(
        "<div class=\"card scroll\"><table><thead><tr><th>所见<small>finding</small></th><th>真值<small>true</small></th>\
         <th>模型说有<small>said</small></th><th>一致<small>both</small></th><th>漏报<small>missed</small></th>\
         <th>误报<small>invented</small></th><th>精确率<small>precision</small></th><th>召回率<small>recall</small></th>\
         <th>F1</th><th>区间<small>interval</small></th><th></th></tr></thead><tbody>",
    );
    let model = &outcome.systems[0];
    let percent = |share: Option<f64>| {
        share.map_or_else(|| "–".to_owned(), |share| format!("{:.1}", 100.0 * share))
    };
    let mut absent = Vec::new();
    for (finding, counts) in &model.findings.by_finding {
        if counts.support() + counts.false_positive == 0 {
            absent.push(finding.chinese());
            continue;
        }
        let name = format!("findings.{finding}.f1");
        let label = label(&name);
        let interval = model
            .scores
            .get(&name)
            .map_or_else(String::new, |score| label.ends(score));
        let _ = write!(
            page,
            "<tr><td>{} <small>{}</small></td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>\
             <td class=\"muted\">{interval}</td><td class=\"bar\"><span style=\"width:{:.0}px\"></span></td></tr>",
            finding.chinese(),
            finding.key().replace('_', " "),
            counts.support(),
            counts.true_positive + counts.false_positive,
            counts.true_positive,
            counts.false_negative,
            counts.false_positive,
            percent(counts.precision()),
            percent(counts.recall()),
            percent(counts.f1()),
            120.0 * counts.f1().unwrap_or(0.0)
        );
    }
    page.push_str("</tbody></table>");
    if !absent.is_empty() {
        let _ = write!(
            page,
            "<p class=\"muted\">真值与回答中都没有 <small>in no report and no answer</small>：{}</p>",
            absent.join("、")
        );
    }
    let averaged = model.findings.macro_classes.len();
    let _ = write!(
        page,
        "<p class=\"muted\">宏平均：真值或回答中出现的 {averaged} 类所见的平均（含“未见异常”），没有例数的比值按 0 计 \
         <small>macro: mean over the {} in truth or answer, no finding among them where it occurs; 0 where a share has no case</small></p>",
        counted(averaged, "class", "classes")
    );
    page.push_str("</div>\n");
}

fn status_names(status: Status) -> (&'static str, &'static str) {
    match status {
        Status::Present => ("有", "present"),
        Status::Uncertain => ("可疑", "uncertain"),
        Status::Absent => ("无", "absent"),
        Status::NotMentioned => ("未提及", "not mentioned"),
    }
}

fn confusion(page: &mut String, outcome: &Outcome) {
    section(page, "真值与回答的混淆", "confusion of truth and answer");
    let mut all = Confusion::default();
    for (finding, table) in &outcome.confusion {
        if *finding == Finding::NoFinding {
            continue;
        }
        for (sums, row) in all.iter_mut().zip(table) {
            for (sum, count) in sums.iter_mut().zip(row) {
                *sum += count;
            }
        }
    }
    page.push_str("<div class=\"card\"><select id=\"confusion-select\" aria-label=\"所见\" hidden><option value=\"all\">全部所见 · all findings</option>");
    for finding in Finding::ALL {
        let _ = write!(
            page,
            "<option value=\"{finding}\">{} · {}</option>",
            finding.chinese(),
            finding.key().replace('_', " ")
        );
    }
    page.push_str("</select><div class=\"scroll\"><table class=\"confusion\" id=\"confusion\"><thead><tr><th>真值 ↓ 回答 →<small>truth ↓ answer →</small></th>");
    for status in STATUSES {
        let (chinese, english) = status_names(status);
        let _ = write!(page, "<th>{chinese}<small>{english}</small></th>");
    }
    page.push_str("</tr></thead><tbody>");
    for (row, status) in STATUSES.into_iter().enumerate() {
        let (chinese, english) = status_names(status);
        let _ = write!(page, "<tr><th>{chinese} <small>{english}</small></th>");
        for (column, count) in all[row].iter().enumerate() {
            let class = if row == column {
                " class=\"agree\""
            } else {
                ""
            };
            let _ = write!(page, "<td{class}>{count}</td>");
        }
        page.push_str("</tr>");
    }
    let tables = outcome.confusion.iter().map(|(f, table)| (f.key(), table));
    let tables: std::collections::BTreeMap<&str, &Confusion> =
        tables.chain(std::iter::once(("all", &all))).collect();
    // Only keys of ours and numbers: nothing in it can end the script.
    let data = serde_json::to_string(&tables).unwrap_or_else(|_| "{}".to_owned());
    let _ = writeln!(
        page,
        "</tbody></table></div><script type=\"application/json\" id=\"confusion-data\">{data}</script></div>"
    );
}
