//! `label`: findings of reports, read by rules, a row each.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::{shell::unless_closed, usage::UsageError};
use crate::{
    base::{files::write_atomic, text_file::read_text},
    dataset::rows::DataFile,
    eval::{
        findings::{
            Finding, ReportLabels, RuleSet, Status,
            agreement::{HandLabels, agreement, hand_labels},
            export::{CHEXPERT, chexpert_value, to_json},
        },
        report::label_page::{LabelledText, label_page},
        text::TextLanguage,
    },
    study::counted,
};

/// Keys in which a report is looked for, in this order.
const TEXT_KEYS: [&str; 14] = [
    "report",
    "text",
    "response",
    "answer",
    "reference",
    "caption",
    "label",
    "content",
    "findings",
    "impression",
    "报告",
    "检查所见",
    "影像所见",
    "诊断意见",
];

/// Most bytes of a file with a report a line.
const MAX_BYTES: u64 = 1 << 30;

/// What one row of the output is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// The whole report.
    Report,
    /// Each part of it: findings, impression.
    Section,
    /// Each sentence.
    Sentence,
}

/// Arguments of `label`.
#[derive(Debug, Clone, Args)]
pub struct LabelArgs {
    /// Reports: a data file of any kind that `train` reads (JSON Lines, a JSON list, CSV, TSV, Parquet; UTF-8, UTF-16,
    /// GB18030, gzip), or `.txt` with a report a line.
    #[arg(value_name = "FILE")]
    pub input: PathBuf,
    /// Key or column of the report, instead of the first known one: report, text, response …
    #[arg(long, value_name = "KEY")]
    pub text_key: Option<String>,
    /// Table of words: `openi` (machine-translated), `hospital`, `english`, or a file in the form of theirs; guessed
    /// from the reports when not given.
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub rules: Option<String>,
    /// What a row is about.
    #[arg(long, value_enum, default_value_t = Level::Report)]
    pub level: Level,
    /// Write one JSON object a row here; to stdout where no output is named.
    #[arg(long, value_name = "OUT.jsonl")]
    pub output: Option<PathBuf>,
    /// Write CheXpert's table here: 1.0, 0.0, -1.0 for doubt, empty where a class is not mentioned.
    #[arg(long, value_name = "OUT.csv")]
    pub csv: Option<PathBuf>,
    /// Print how far the rules agree with labels by hand: accuracy, Cohen's kappa and F1 by class. The rows hold them
    /// as `labels` (class → status) or as lists `present`, `absent`, `uncertain`.
    #[arg(long)]
    pub agreement: bool,
    /// Write a page here that marks the words.
    #[arg(long, value_name = "OUT.html")]
    pub html: Option<PathBuf>,
}

/// A report as the file names it.
struct Report {
    /// Short keys of the row, such as `id` and `image`.
    keys: Map<String, Value>,
    text: String,
    by_hand: Option<HandLabels>,
}

/// Runs `label`.
///
/// # Errors
/// A file that cannot be read or written; a row without a report, with its number.
pub fn run(args: &LabelArgs) -> Result<()> {
    let reports = read(&args.input, args.text_key.as_deref())?;
    if reports.is_empty() {
        bail!("`{}` holds no report", args.input.display());
    }
    let texts = reports.iter().map(|report| report.text.as_str());
    let rules = RuleSet::choose(args.rules.as_deref(), texts)?;
    eprintln!("{}", rules.told());
    let pieces: Vec<(usize, &Report, String)> = reports
        .iter()
        .enumerate()
        .flat_map(|(row, report)| {
            let parts = match args.level {
                Level::Report => vec![report.text.clone()],
                Level::Section => rules.sections(&report.text),
                Level::Sentence => rules.sentences(&report.text),
            };
            parts.into_iter().map(move |part| (row + 1, report, part))
        })
        .collect();
    let labelled: Vec<_> = pieces
        .par_iter()
        .map(|(_, _, text)| rules.label(text))
        .collect();
    let rows = || {
        pieces
            .iter()
            .zip(&labelled)
            .map(|((row, report, text), labels)| {
                let mut line = report.keys.clone();
                line.insert("row".to_owned(), json!(row));
                if args.level != Level::Report {
                    line.insert("text".to_owned(), json!(text));
                }
                if let Value::Object(read) = to_json(&rules, text, labels) {
                    line.extend(read);
                }
                line.insert("rules".to_owned(), json!(rules.name));
                Value::Object(line)
            })
    };
    if let Some(path) = &args.output {
        write_atomic(path, |out| {
            for row in rows() {
                writeln!(out, "{row}")?;
            }
            Ok(())
        })?;
    } else if args.csv.is_none() && args.html.is_none() && !args.agreement {
        let mut out = std::io::stdout().lock();
        let printed = rows().try_for_each(|row| writeln!(out, "{row}"));
        unless_closed(printed).context("cannot write to stdout")?;
    }
    if let Some(path) = &args.csv {
        let table = chexpert_table(&pieces, &labelled)?;
        write_atomic(path, |out| out.write_all(&table))?;
    }
    if let Some(path) = &args.html {
        let texts: Vec<LabelledText<'_>> = pieces
            .iter()
            .zip(&labelled)
            .map(|((row, report, text), labels)| LabelledText {
                name: name_of(*row, report),
                text,
                labels,
            })
            .collect();
        let page = label_page(&rules, &rules.name, &texts);
        write_atomic(path, |out| out.write_all(page.as_bytes()))?;
    }
    if args.agreement {
        let table = agreement_table(args, &pieces, &labelled)?;
        let mut out = std::io::stdout().lock();
        unless_closed(out.write_all(table.as_bytes())).context("cannot write to stdout")?;
    }
    summary(&labelled);
    Ok(())
}

fn agreement_table(
    args: &LabelArgs,
    pieces: &[(usize, &Report, String)],
    labelled: &[ReportLabels],
) -> Result<String> {
    if args.level != Level::Report {
        bail!(UsageError(
            "--agreement compares whole reports; leave --level out".into()
        ));
    }
    let judged = pieces.iter().zip(labelled);
    let pairs: Vec<_> = judged
        .filter_map(|((_, report, _), labels)| Some((labels, report.by_hand.as_ref()?)))
        .collect();
    if pairs.is_empty() {
        bail!(UsageError(format!(
            "--agreement: no row of `{}` has labels by hand; expected `labels` (class → status), or the lists `present`, \
             `absent` and `uncertain`",
            args.input.display()
        )));
    }
    let mut table = format!(
        "{:28} {:>7} {:>9} {:>7} {:>7}\n",
        "class", "present", "accuracy", "kappa", "F1"
    );
    let number =
        |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.3}"));
    for (finding, class) in agreement(&pairs) {
        table.push_str(&format!(
            "{:28} {:>7} {:>9} {:>7} {:>7}\n",
            finding.key(),
            class.support,
            number(Some(class.accuracy)),
            number(class.kappa),
            number(class.f1)
        ));
    }
    Ok(table)
}

fn summary(labelled: &[ReportLabels]) {
    let normal = labelled
        .iter()
        .filter(|labels| labels.status(Finding::NoFinding) == Status::Present)
        .count();
    let unread = labelled
        .iter()
        .filter(|labels| !labels.unread.is_empty())
        .count();
    let share = labelled
        .iter()
        .map(|labels| labels.unread_share())
        .sum::<f64>()
        / labelled.len().max(1) as f64;
    eprintln!(
        "{}: {normal} normal; {unread} with words that no rule reads ({:.1} % of the text), which are never called normal",
        counted(labelled.len(), "text", "texts"),
        100.0 * share
    );
}

fn name_of(row: usize, report: &Report) -> String {
    let named = ["id", "study", "study_id", "image", "name"];
    let key = named.iter().find_map(|key| report.keys.get(*key));
    match key {
        Some(Value::String(name)) => name.clone(),
        Some(name) => name.to_string(),
        None => format!("{row}"),
    }
}

fn chexpert_table(
    pieces: &[(usize, &Report, String)],
    labelled: &[ReportLabels],
) -> Result<Vec<u8>> {
    let mut table = csv::Writer::from_writer(Vec::new());
    let names = CHEXPERT.iter().map(|(name, _)| *name);
    table.write_record(["Row", "Reports"].into_iter().chain(names))?;
    for ((row, _, text), labels) in pieces.iter().zip(labelled) {
        let row = row.to_string();
        let values = CHEXPERT
            .iter()
            .map(|(_, finding)| chexpert_value(*finding, labels.status(*finding)));
        table.write_record([row.as_str(), text].into_iter().chain(values))?;
    }
    table
        .into_inner()
        .map_err(|error| error.into_error().into())
}

/// Reports of a file of any kind that `train` reads; of `.txt` one a line.
fn read(path: &Path, key: Option<&str>) -> Result<Vec<Report>> {
    let is_text = path
        .extension()
        .is_some_and(|ending| ending.eq_ignore_ascii_case("txt"));
    if is_text {
        let text = read_text(path, MAX_BYTES)?.text;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        return Ok(lines
            .map(|line| Report {
                keys: Map::new(),
                by_hand: None,
                text: line.to_owned(),
            })
            .collect());
    }
    let file = DataFile::read(path)?;
    file.rows()?
        .map(|(number, row)| {
            let row = row.map_err(|fault| anyhow!("`{}` row {number}: {fault}", path.display()))?;
            report(path, number, row, key)
        })
        .collect()
}

/// The report of a row; findings and impression are joined.
fn report(
    path: &Path,
    number: usize,
    row: Map<String, Value>,
    key: Option<&str>,
) -> Result<Report> {
    let place = || format!("`{}` row {number}", path.display());
    let text_of = |key: &str| row.get(key).and_then(Value::as_str);
    let text = match key {
        Some(key) => text_of(key).map(str::to_owned).ok_or_else(|| {
            let keys: Vec<&str> = row.keys().map(String::as_str).collect();
            UsageError(format!(
                "{} has no text under `{key}`; it has {}",
                place(),
                keys.join(", ")
            ))
        })?,
        None => match (text_of("findings"), text_of("impression"), answer(&row)) {
            (_, _, Some(text)) => text,
            (Some(findings), Some(impression), _) => {
                let (findings, impression) = (findings.trim(), impression.trim());
                match TextLanguage::guess([findings, impression]) {
                    TextLanguage::English => {
                        format!("Findings: {findings}\nImpression: {impression}")
                    }
                    TextLanguage::Chinese => format!("所见：{findings}\n印象：{impression}"),
                }
            }
            _ => match TEXT_KEYS.iter().find_map(|key| text_of(key)) {
                Some(text) => text.to_owned(),
                None => {
                    let keys: Vec<&str> = row.keys().map(String::as_str).collect();
                    bail!(UsageError(format!(
                        "{} has no report under a known key ({}); it has {}; name its key with --text-key",
                        place(),
                        TEXT_KEYS.join(", "),
                        keys.join(", ")
                    )));
                }
            },
        },
    };
    let short = |value: &Value| match value {
        Value::String(text) => text.len() <= 256,
        Value::Number(_) => true,
        Value::Array(items) => {
            items.len() <= 8
                && items
                    .iter()
                    .all(|i| i.as_str().is_some_and(|i| i.len() <= 256))
        }
        _ => false,
    };
    let keys = row.iter().filter(|(key, value)| {
        let is_text = value
            .as_str()
            .is_some_and(|value| text.contains(value) && !value.is_empty());
        short(value) && !is_text && !TEXT_KEYS.contains(&key.as_str())
    });
    let by_hand = hand_labels(&row, "labels").map_err(|reason| anyhow!("{}: {reason}", place()))?;
    Ok(Report {
        by_hand,
        keys: keys
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
        text,
    })
}

/// The last answer of a conversation.
fn answer(row: &Map<String, Value>) -> Option<String> {
    let messages = row.get("messages")?.as_array()?;
    let last = messages
        .iter()
        .rev()
        .find(|message| message["role"] == "assistant")?;
    last["content"].as_str().map(str::to_owned)
}
