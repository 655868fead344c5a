//! A page of reports with the words of their findings marked.

use std::fmt::Write;

use super::page::markup::{escape, status_names};
use crate::eval::findings::{Finding, Labeler, Laterality, ReportLabels, Severity, Status};

/// A text with its labels.
pub struct LabelledText<'t> {
    /// What it is called.
    pub name: String,
    /// The text.
    pub text: &'t str,
    /// Labels of the text.
    pub labels: &'t ReportLabels,
}

/// Most texts of a page; a page of more is too large to open.
const MOST: usize = 2000;

/// The page; `rules` is the name of the table.
pub fn label_page(labeler: &Labeler, rules: &str, texts: &[LabelledText<'_>]) -> String {
    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"zh-CN\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>报告所见标注</title>\n<style>\n{}\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <header class=\"top\"><h1>报告所见标注<small>findings of reports</small></h1></header>\n\
         <p class=\"muted\">规则 rules：{}。共 {} 份，显示 {} 份 (shown {} of {})。</p>\n\
         <p class=\"chips legend\"><mark class=\"present\">有 present</mark> <mark class=\"uncertain\">可疑 uncertain</mark> \
         <mark class=\"absent\">无 absent</mark> <mark class=\"other\">二十类以外 outside the twenty</mark> \
         <mark class=\"unread\">未读懂 unread</mark></p>\n",
        include_str!("page/style.css"),
        escape(rules),
        texts.len(),
        texts.len().min(MOST),
        texts.len().min(MOST),
        texts.len()
    );
    for text in texts.iter().take(MOST) {
        one(&mut page, labeler, text);
    }
    page.push_str(
        "<footer><p>仅供研究，不是诊断。所见由规则从报告文字中读出。</p><p>For research only; nothing here is a \
         diagnosis. Findings are read off the texts by rules.</p></footer>\n</main>\n</body>\n</html>\n",
    );
    page
}

const STYLE: &str = "mark{border-radius:.2em;padding:0 .15em;color:inherit}
mark.present{background:#f6c9c4}mark.uncertain{background:#fbe3b0}mark.absent{background:#cfe8cf}
mark.other{background:#d5dcf5}mark.unread{background:none;border-bottom:2px dashed #b3261e}
.case{display:block}
.case p{line-height:1.9}
.case .chips mark{display:inline-block;margin:.1em 0}
@media (prefers-color-scheme:dark){mark.present{background:#6e2b25}mark.uncertain{background:#665019}mark.absent{background:#2b4d2c}mark.other{background:#333f6b}}
";

fn class(status: Status) -> &'static str {
    match status {
        Status::Present => "present",
        Status::Uncertain => "uncertain",
        Status::Absent => "absent",
        Status::NotMentioned => "",
    }
}

/// Names of side and degree, as `左侧 少量`.
fn detail(side: Option<Laterality>, severity: Option<Severity>) -> String {
    let side = side.map(|side| match side {
        Laterality::Left => "左侧",
        Laterality::Right => "右侧",
        Laterality::Bilateral => "双侧",
    });
    let severity = severity.map(|severity| match severity {
        Severity::Trace => "极少",
        Severity::Mild => "轻",
        Severity::Moderate => "中",
        Severity::Severe => "重",
    });
    let words: Vec<&str> = side.into_iter().chain(severity).collect();
    words.join(" ")
}

fn one(page: &mut String, labeler: &Labeler, text: &LabelledText<'_>) {
    let _ = write!(
        page,
        "<article class=\"card case\"><div class=\"text\"><h3>{}</h3><div class=\"chips\">",
        escape(&text.name)
    );
    let others = labeler.others();
    let named = |key: &str| {
        let name = others.iter().find(|other| other.key == key);
        name.map_or_else(|| key.to_owned(), |other| other.chinese.clone())
    };
    let labels = text.labels;
    let twenty = labels.findings.iter().map(|(finding, label)| {
        // A normal report is marked like a denied finding.
        let class = match (*finding, label.status) {
            (Finding::NoFinding, Status::Present) => "absent",
            (Finding::NoFinding, Status::Absent) => "present",
            (_, status) => class(status),
        };
        (finding.chinese().to_owned(), class, label)
    });
    let rest = labels
        .others
        .iter()
        .map(|(key, label)| (named(key), "other", label));
    for (name, class, label) in twenty.chain(rest) {
        let detail = detail(label.laterality, label.severity);
        let _ = write!(
            page,
            "<mark class=\"{class}\">{}：{} {detail}</mark> ",
            escape(&name),
            status_names(label.status).0
        );
    }
    let _ = writeln!(
        page,
        "</div><p>{}</p></div></article>",
        marked(text.text, labels, &named)
    );
}

/// The words to mark, in order, none twice: start, end, class, title.
fn marked(text: &str, labels: &ReportLabels, named: &dyn Fn(&str) -> String) -> String {
    let mut marks: Vec<(usize, usize, &str, String)> = labels
        .mentions
        .iter()
        .filter_map(|mention| {
            let (class, name) = match (mention.finding, &mention.other) {
                (Some(Finding::NoFinding), _) => return None,
                (Some(finding), _) => (class(mention.status), finding.chinese().to_owned()),
                (None, Some(other)) => ("other", named(other)),
                (None, None) => ("other", "其他异常".to_owned()),
            };
            let title = format!("{name}：{}", status_names(mention.status).0);
            Some((mention.span.start, mention.span.end, class, title))
        })
        .collect();
    let unread = labels.unread.iter();
    marks.extend(unread.map(|span| (span.start, span.end, "unread", "未读懂 unread".to_owned())));
    marks.sort_by_key(|mark| (mark.0, std::cmp::Reverse(mark.1)));
    let mut html = String::new();
    let mut done = 0;
    for (start, end, class, title) in marks {
        let (Some(before), Some(words)) = (text.get(done..start), text.get(start..end)) else {
            continue;
        };
        let _ = write!(
            html,
            "{}<mark class=\"{class}\" title=\"{}\">{}</mark>",
            escape(before),
            escape(&title),
            escape(words)
        );
        done = end;
    }
    html.push_str(&escape(text.get(done..).unwrap_or_default()));
    html.replace('\n', "<br>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_marked_once_and_escaped() {
        let labeler = Labeler::hospital();
        let text = "左侧气胸<b>，右膈下见游离气体。";
        let labels = labeler.label(text);
        let page = label_page(
            labeler,
            "hospital",
            &[LabelledText {
                name: "1".to_owned(),
                text,
                labels: &labels,
            }],
        );
        assert!(
            page.contains("<mark class=\"present\" title=\"气胸：有\">气胸</mark>&lt;b&gt;"),
            "{page}"
        );
        assert!(page.contains("膈下游离气体：有"), "{page}");
    }
}
