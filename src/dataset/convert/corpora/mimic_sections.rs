//! The sections of a report of MIMIC-CXR.
//!
//! Source: the rules of `section_parser.py` and `create_section_files.py` in the corpus' own code, MIT-LCP `mimic-cxr`,
//! folder `txt`: headings in capitals, their spellings, and the studies whose sections were marked by hand.

use std::sync::LazyLock;

use regex::Regex;

use super::record::Report;

/// Headings that are another name of a section; the rest are recognised by a part of their name.
const HEADINGS: [(&str, &str); 54] = [
    ("preamble", "preamble"),
    ("impression", "impression"),
    ("comparison", "comparison"),
    ("indication", "indication"),
    ("findings", "findings"),
    ("examination", "examination"),
    ("technique", "technique"),
    ("history", "history"),
    ("comparisons", "comparison"),
    ("clinical history", "history"),
    ("reason for examination", "indication"),
    ("notification", "notification"),
    ("reason for exam", "indication"),
    ("clinical information", "history"),
    ("exam", "examination"),
    ("clinical indication", "indication"),
    ("conclusion", "impression"),
    ("chest, two views", "findings"),
    ("recommendation(s)", "recommendations"),
    ("type of examination", "examination"),
    ("reference exam", "comparison"),
    ("patient history", "history"),
    ("addendum", "addendum"),
    ("comparison exam", "comparison"),
    ("date", "date"),
    ("comment", "comment"),
    ("findings and impression", "impression"),
    ("wet read", "wet read"),
    ("comparison film", "comparison"),
    ("recommendations", "recommendations"),
    ("findings/impression", "impression"),
    ("pfi", "history"),
    ("recommendation", "recommendations"),
    ("wetread", "wet read"),
    // Slips of the pen, each in one report or a few.
    ("ndication", "impression"),
    ("impresson", "impression"),
    ("imprression", "impression"),
    ("imoression", "impression"),
    ("impressoin", "impression"),
    ("imprssion", "impression"),
    ("impresion", "impression"),
    ("imperssion", "impression"),
    ("mpression", "impression"),
    ("impession", "impression"),
    ("findings/ impression", "impression"),
    ("finding", "findings"),
    ("findins", "findings"),
    ("findindgs", "findings"),
    ("findgings", "findings"),
    ("findngs", "findings"),
    ("findnings", "findings"),
    ("finidngs", "findings"),
    ("idication", "indication"),
    ("reference findings", "findings"),
];

/// More slips, of the heading before the last comparison.
const COMPARISONS: [&str; 4] = ["comparision", "comparsion", "comparrison", "comparisions"];

/// Sections that a longer heading may contain.
const MAIN: [&str; 5] = [
    "impression",
    "findings",
    "history",
    "comparison",
    "addendum",
];

/// Studies whose report is under a heading that is not its own, with the heading.
const MISNAMED: [(u32, &str); 23] = [
    (50913680, "recommendations"),
    (59363654, "examination"),
    (59279892, "technique"),
    (59768032, "recommendations"),
    (57936451, "indication"),
    (50058765, "indication"),
    (53356173, "examination"),
    (53202765, "technique"),
    (50808053, "technique"),
    (51966317, "indication"),
    (50743547, "examination"),
    (56451190, "note"),
    (59067458, "recommendations"),
    (59215320, "examination"),
    (55124749, "indication"),
    (54365831, "indication"),
    (59087630, "recommendations"),
    (58157373, "recommendations"),
    (56482935, "recommendations"),
    (58375018, "recommendations"),
    (54654948, "indication"),
    (55157853, "examination"),
    (51491012, "history"),
];

/// Studies whose report has no headings, with the characters it begins and ends at; equal where there is no report.
const MARKED: [(u32, usize, usize); 31] = [
    (50525523, 201, 349),
    (57564132, 233, 554),
    (59982525, 313, 717),
    (53488209, 149, 475),
    (54875119, 234, 988),
    (50196495, 59, 399),
    (56579911, 59, 218),
    (52648681, 292, 631),
    (59889364, 172, 453),
    (53514462, 73, 377),
    (59505494, 59, 450),
    (53182247, 59, 412),
    (51410602, 47, 320),
    (56412866, 522, 822),
    (54986978, 59, 306),
    (59003148, 262, 505),
    (57150433, 61, 394),
    (56760320, 219, 457),
    (59562049, 158, 348),
    (52674888, 145, 296),
    (55258338, 192, 568),
    (59330497, 140, 655),
    (52119491, 179, 454),
    (58235663, 0, 0),
    (50798377, 0, 0),
    (54168089, 0, 0),
    (53071062, 0, 0),
    (56724958, 0, 0),
    (54231141, 0, 0),
    (53607029, 0, 0),
    (52035334, 0, 0),
];

static HEADING: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\n ([A-Z ()/,-]+):\s").expect("the pattern is a constant that a test compiles")
});

/// Headings that name the views, with the findings below them.
static VIEWS: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        "chest|portable|pa and lateral|lateral and pa|ap and lateral|lateral and ap|frontal and|two views|frontal view|pa view|ap view|one view|lateral view|bone window|frontal upright|frontal semi-upright|ribs|pa and lat",
    )
    .expect("the pattern is a constant that a test compiles")
});

fn section_name(heading: &str) -> String {
    let heading = heading.to_lowercase();
    let heading = heading.trim();
    if let Some((_, name)) = HEADINGS.iter().find(|(slip, _)| *slip == heading) {
        return (*name).to_owned();
    }
    if COMPARISONS.contains(&heading) {
        return "comparison".to_owned();
    }
    if let Some(name) = MAIN.iter().find(|name| heading.contains(*name)) {
        return (*name).to_owned();
    }
    if VIEWS.is_match(heading) {
        return "findings".to_owned();
    }
    heading.to_owned()
}

/// Names and texts of the sections, in their order.
fn sections(text: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    match HEADING.captures(text) {
        None => found.push(("full report".into(), text.to_owned())),
        Some(first) => {
            let start = first.get(1).map_or(0, |group| group.start());
            found.push(("preamble".into(), text[..start].to_owned()));
            let mut next = Some(first);
            while let Some(groups) = next {
                let from = groups.get(0).map_or(0, |group| group.end());
                // The first line of a section may look like a heading.
                let skip = text[from..].find('\n').unwrap_or(0);
                next = HEADING.captures_at(text, from + skip);
                let to = next
                    .as_ref()
                    .and_then(|groups| groups.get(0))
                    .map_or(text.len(), |group| group.start());
                found.push((section_name(&groups[1]), text[from..to].to_owned()));
            }
        }
    }
    // A heading over nothing, such as a title that looks like findings.
    found.retain(|(name, text)| {
        !["impression", "findings"].contains(&name.as_str()) || !text.trim().is_empty()
    });
    let has = |name: &str| found.iter().any(|(known, _)| known == name);
    if !has("impression")
        && !has("findings")
        && let Some((_, last)) = found.last_mut()
        && let Some((first, rest)) = last.clone().split_once("\n \n")
    {
        *last = first.to_owned();
        found.push(("last_paragraph".into(), rest.to_owned()));
    }
    found
}

/// Findings and impression of the report of a study; where it has neither, its last paragraph or what is under
/// "comparison" as the whole.
///
/// `study` is the number of the study, which some hand-made rules are for.
pub(super) fn report(text: &str, study: u32) -> Report {
    let one_line = |text: &str| {
        let words: Vec<&str> = text.split_whitespace().collect();
        Some(words.join(" ")).filter(|text| !text.is_empty())
    };
    if let Some((_, from, to)) = MARKED.iter().find(|(marked, ..)| *marked == study) {
        let marked: String = text.chars().skip(*from).take(to - from).collect();
        return Report {
            whole: one_line(&marked),
            ..Report::default()
        };
    }
    let sections = sections(&text.replace("\r\n", "\n"));
    // The last of a name counts: addenda come first.
    let last = |wanted: &str| {
        let found = sections.iter().rev().find(|(name, _)| name == wanted);
        found.and_then(|(_, text)| one_line(text))
    };
    if let Some((_, name)) = MISNAMED.iter().find(|(misnamed, _)| *misnamed == study) {
        return Report {
            whole: last(name),
            ..Report::default()
        };
    }
    let (findings, impression) = (last("findings"), last("impression"));
    let neither = findings.is_none() && impression.is_none();
    Report {
        whole: neither
            .then(|| last("last_paragraph").or_else(|| last("comparison")))
            .flatten(),
        findings,
        impression,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str, study: u32) -> [Option<String>; 3] {
        let Report {
            findings,
            impression,
            whole,
        } = report(text, study);
        [findings, impression, whole]
    }

    #[test]
    fn sections_are_found_as_by_the_published_rules() {
        for (text, expected) in [
            (
                "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n INDICATION:  Cough.\n \n FINDINGS: \n \n The lungs are\n clear.\n \n IMPRESSION: \n \n Normal.\n",
                ["The lungs are clear.", "Normal.", ""],
            ),
            // Another spelling, and the last of two.
            (
                " FINAL REPORT\n IMPRESSON:  First.\n \n CONCLUSION:  Second.\n",
                ["", "Second.", ""],
            ),
            // A title over nothing, then the views as a heading.
            (
                " FINAL REPORT\n CHEST, PA LATERAL:\n \n HISTORY:  Pain.\n \n AP VIEW OF THE CHEST:  Clear lungs.\n",
                ["Clear lungs.", "", ""],
            ),
            // No section but a heading with paragraphs after it.
            (
                " FINAL REPORT\n INDICATION:  Fever.\n \n No pneumonia.\n \n Heart normal.\n",
                ["", "", "No pneumonia. Heart normal."],
            ),
            (
                " FINAL REPORT\n INDICATION:  Fever.\n COMPARISON:  None. Lungs are clear.\n",
                ["", "", "None. Lungs are clear."],
            ),
            // `:` in the first line of a section begins none.
            (
                " FINAL REPORT\n FINDINGS:\n PA AND LATERAL VIEWS:  Clear.\n",
                ["PA AND LATERAL VIEWS: Clear.", "", ""],
            ),
            ("nothing", ["", "", ""]),
        ] {
            let expected = expected.map(|text| Some(text.to_owned()).filter(|t| !t.is_empty()));
            assert_eq!(parsed(text, 1), expected, "{text}");
        }
    }

    #[test]
    fn studies_marked_by_hand_have_their_own_rules() {
        let text = format!("{}report here{}", "x".repeat(59), "y".repeat(500));
        let [_, _, whole] = parsed(&text, 56579911);
        assert!(whole.unwrap().starts_with("report here"));
        assert_eq!(parsed(&text, 58235663), [None, None, None]);
        let text = " FINAL REPORT\n INDICATION:  The report.\n \n IMPRESSION:  Not this.\n";
        assert_eq!(
            parsed(text, 57936451),
            [None, None, Some("The report.".into())]
        );
    }
}
