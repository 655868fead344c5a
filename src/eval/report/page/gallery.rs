//! The worst cases: image, truth and answer, with what differs marked in the words.

use std::fmt::Write;

use super::markup::{escape, section, status_names};
use crate::{
    eval::{
        findings::{Finding, ReportLabels, Status},
        outcome::{CaseReview, EvalOutcome, FindingDifference},
        report::thumbnail::data_url,
    },
    processor::image::RgbImage,
};

/// Longest side of an image in the page, in pixels.
const IMAGE_PIXELS: u32 = 360;

/// The images of one case, or why one cannot be shown.
pub type CaseImages = Vec<Result<RgbImage, String>>;

pub(super) fn write(
    page: &mut String,
    outcome: &EvalOutcome,
    most: usize,
    images: &mut dyn FnMut(usize) -> CaseImages,
) {
    let shown = &outcome.reviews[..most.min(outcome.reviews.len())];
    let wrong = outcome.reviews.iter().filter(|r| !r.differences.is_empty());
    section(page, "最差的病例", "worst cases");
    let _ = write!(
        page,
        "<p class=\"muted\">{} 份报告中 {} 份的所见与真值不同；这里是最差的 {} 份。\
         <br><small>Findings differ from the truth in {} of {} reports; these are the worst {}.</small></p>",
        outcome.reviews.len(),
        wrong.clone().count(),
        shown.len(),
        wrong.count(),
        outcome.reviews.len(),
        shown.len()
    );
    page.push_str(
        "<p class=\"chips legend\"><span class=\"chip missed\">漏报 missed</span>\
         <span class=\"chip invented\">误报 invented</span><span class=\"chip side\">左右侧错 wrong side</span>\
         <span class=\"chip agreed\">一致 agreed</span></p>",
    );
    tools(page);
    for review in shown {
        one(page, outcome, review, images(review.case));
    }
}

fn tools(page: &mut String) {
    page.push_str(
        "<div class=\"tools\" id=\"tools\" hidden><input type=\"search\" id=\"search\" placeholder=\"搜索病例、文字、所见 · search\" aria-label=\"搜索\">\
         <select id=\"kind\" aria-label=\"错误\"><option value=\"\">所有错误 · any error</option>\
         <option value=\"missed\">漏报 · missed</option><option value=\"invented\">误报 · invented</option>\
         <option value=\"side\">左右侧错 · wrong side</option><option value=\"false_normal\">漏诊为正常 · false normal</option>\
         <option value=\"invented_normal\">正常被误报 · normal called abnormal</option>\
         <option value=\"contradiction\">思考与结论矛盾 · contradiction</option></select>\
         <select id=\"finding\" aria-label=\"所见\"><option value=\"\">所有所见 · any finding</option>",
    );
    for finding in Finding::ALL {
        if finding != Finding::NoFinding {
            let _ = write!(
                page,
                "<option value=\"{finding}\">{}</option>",
                finding.chinese()
            );
        }
    }
    page.push_str("</select><span id=\"count\" class=\"muted\"></span></div>\n");
}

fn kind(difference: FindingDifference) -> (&'static str, &'static str) {
    match difference {
        FindingDifference::Missed => ("missed", "漏报"),
        FindingDifference::Invented => ("invented", "误报"),
        FindingDifference::Side => ("side", "左右侧错"),
    }
}

/// What the page's filters look for.
fn tags(review: &CaseReview) -> Vec<String> {
    let mut tags: Vec<String> = Vec::new();
    for (finding, difference) in &review.differences {
        let kind = kind(*difference).0;
        tags.extend([
            kind.to_owned(),
            finding.to_string(),
            format!("{kind}:{finding}"),
        ]);
    }
    for (flag, tag) in [
        (review.false_normal, "false_normal"),
        (review.invented, "invented_normal"),
        (review.contradiction, "contradiction"),
    ] {
        if flag {
            tags.push(tag.to_owned());
        }
    }
    tags
}

fn chips(page: &mut String, review: &CaseReview) {
    if review.false_normal {
        page.push_str("<span class=\"chip missed\">漏诊为正常 false normal</span>");
    }
    if review.invented {
        page.push_str("<span class=\"chip invented\">正常被误报 normal called abnormal</span>");
    }
    if review.contradiction {
        page.push_str("<span class=\"chip side\">思考与结论矛盾 contradiction</span>");
    }
    for (finding, difference) in &review.differences {
        let (class, name) = kind(*difference);
        let _ = write!(
            page,
            "<span class=\"chip {class}\">{name}：{}</span>",
            finding.chinese()
        );
    }
    if review.differences.is_empty() && !review.false_normal && !review.invented {
        page.push_str("<span class=\"chip agreed\">所见一致 findings agree</span>");
    }
}

fn one(page: &mut String, outcome: &EvalOutcome, review: &CaseReview, images: CaseImages) {
    let (case, text) = (&outcome.cases[review.case], &outcome.texts[review.case]);
    let pair = &outcome.labels[review.case];
    let _ = write!(
        page,
        "<article class=\"card case\" data-tags=\"{}\"><div class=\"films\">",
        tags(review).join(" ")
    );
    if images.is_empty() {
        page.push_str("<div class=\"nofilm\">没有影像<br>no film</div>");
    }
    for image in images {
        let shown = image.and_then(|image| {
            data_url(&image, IMAGE_PIXELS).ok_or_else(|| "无法编码 cannot be encoded".to_owned())
        });
        let _ = match shown {
            Ok(url) => write!(page, "<img alt=\"{}\" src=\"{url}\">", escape(&case.name)),
            Err(reason) => write!(page, "<div class=\"nofilm\">{}</div>", escape(&reason)),
        };
    }
    let _ = write!(
        page,
        "</div><div class=\"text\"><h3>{}<small>第 {} 例 · 字 ROUGE-L {:.1}</small></h3><div class=\"chips\">",
        escape(&case.name),
        review.case + 1,
        100.0 * review.rouge_l
    );
    chips(page, review);
    page.push_str("</div>");
    let mut part = |chinese: &str, english: &str, html: &str| {
        let _ = write!(
            page,
            "<h4>{chinese} <small>{english}</small></h4><p>{html}</p>"
        );
    };
    if !case.question.trim().is_empty() {
        part("问题", "question", &escape(case.question.trim()));
    }
    part("真值", "truth", &marked(&case.truth, &pair.truth, review));
    if let (Some(thinking), Some(labels)) = (&text.thinking, &pair.thinking) {
        part("思考", "thinking", &marked(thinking, labels, review));
    }
    let answer = marked(&text.answer, &pair.prediction, review);
    let answer = if answer.is_empty() {
        "<span class=\"muted\">（空 empty）</span>".to_owned()
    } else {
        answer
    };
    part("回答", "answer", &answer);
    if let Some(run) = &outcome.other {
        let (text, pair) = (&run.texts[review.case], &run.labels[review.case]);
        let of_other = &run.reviews[review.case];
        let mut html = marked(&text.answer, &pair.prediction, of_other);
        if html.is_empty() {
            html.push_str("<span class=\"muted\">（空 empty）</span>");
        }
        let mut found = String::new();
        chips(&mut found, of_other);
        let _ = write!(
            page,
            "<h4>另一次的回答 <small>answer of the other run · ROUGE-L {:.1}</small></h4><p>{html}</p><div class=\"chips\">{found}</div>",
            100.0 * of_other.rouge_l
        );
    }
    page.push_str("</div></article>\n");
}

/// `text` with the words of each finding marked by what became of it.
fn marked(text: &str, labels: &ReportLabels, review: &CaseReview) -> String {
    let mut html = String::new();
    let mut done = 0;
    for mention in &labels.mentions {
        let Some(finding) = mention.finding.filter(|f| *f != Finding::NoFinding) else {
            continue;
        };
        let span = mention.span.clone();
        // Words of two findings are marked once, for the first.
        let (Some(before), Some(words)) = (text.get(done..span.start), text.get(span.clone()))
        else {
            continue;
        };
        let differs = review
            .differences
            .iter()
            .find(|(other, _)| *other == finding);
        let class = match differs {
            Some((_, difference)) => kind(*difference).0,
            None if mention.status >= Status::Uncertain => "agreed",
            None => continue,
        };
        let status = status_names(mention.status).0;
        let _ = write!(
            html,
            "{}<mark class=\"{class}\" title=\"{}：{status}\">{}</mark>",
            escape(before),
            finding.chinese(),
            escape(words)
        );
        done = span.end;
    }
    html.push_str(&escape(text.get(done..).unwrap_or_default()));
    html.replace('\n', "<br>")
}
