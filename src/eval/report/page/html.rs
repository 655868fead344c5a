//! The page as a whole: its parts in their order, with style and script inside.

use std::fmt::Write;

use super::{
    facts::PageFacts,
    findings,
    gallery::{self, CaseImages},
    head, judge,
    markup::section,
    probabilities, rollouts, scores, subgroups,
};
use crate::eval::outcome::EvalOutcome;

/// Writes the page. `images` is called once for each case of the gallery, by its place.
pub fn html(
    outcome: &EvalOutcome,
    facts: &PageFacts,
    images: &mut dyn FnMut(usize) -> CaseImages,
) -> String {
    let mut page = String::new();
    page.push_str(
        "<!doctype html>\n<html lang=\"zh-CN\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; \
         style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n<title>胸片报告评测</title>\n<style>\n",
    );
    page.push_str(include_str!("style.css"));
    page.push_str("</style>\n</head>\n<body>\n<main>\n");
    head::head(&mut page, outcome, facts);
    head::tiles(&mut page, outcome, facts);
    scores::charts(&mut page, outcome);
    scores::scores(&mut page, outcome);
    scores::comparison(&mut page, outcome);
    findings::findings(&mut page, outcome);
    findings::confusion(&mut page, outcome);
    subgroups::subgroups(&mut page, outcome);
    probabilities::probabilities(&mut page, outcome);
    judge::judge(&mut page, outcome);
    gallery::write(&mut page, outcome, facts.gallery, images);
    if let Some(rollout) = &facts.rollout {
        rollouts::write(&mut page, rollout);
    }
    if let Some(curves) = &facts.curves {
        section(&mut page, "训练曲线", "training curves");
        let _ = writeln!(page, "<div class=\"card curves\">{curves}</div>");
    }
    page.push_str(
        "<footer><p>仅供研究，不是诊断。所见由规则从报告文字中读出；规则的错误与模型的错误一样计数。</p>\
         <p>For research only; nothing here is a diagnosis. Findings are read off the texts by rules, whose mistakes \
         count like the model's.</p></footer>\n</main>\n<script>\n",
    );
    page.push_str(include_str!("script.js"));
    page.push_str("</script>\n</body>\n</html>\n");
    page
}
