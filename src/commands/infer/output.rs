//! Where records go, and which are there already.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{Write, stdout},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use rayon::prelude::*;

use super::{
    args::InferArgs,
    findings,
    journal::{Journal, LineKind, Repair},
    record::{RECORD_START, Record, settings_hash},
    task::{Task, TaskKey, TaskKind},
};
use crate::{
    base::files::{is_same_file, other_kind, sha256_file},
    runtime::generate::FinishReason,
    study::counted,
};

/// A record that the file holds.
struct KnownRecord {
    sha256: Option<String>,
    row_sha256: Option<String>,
    failed: bool,
}

enum RecordTarget {
    /// Printed, as the arguments say.
    Stdout,
    /// Lines to stdout, or to a device, without looking for earlier ones.
    Lines(PathBuf, Option<File>),
    /// A batch run's file.
    Journal(Box<Journal<TaskKey>>),
}

/// What a run still has to do.
pub(crate) struct Todo<'a> {
    /// The reports to write, in order.
    pub(crate) tasks: Vec<&'a Task>,
    /// What was found there already, to be said on stderr.
    pub(crate) note: Option<String>,
}

/// Where records go, and what is there already.
pub(crate) struct RecordFile {
    target: RecordTarget,
    /// Records of this run's question and settings.
    known: HashMap<TaskKey, KnownRecord>,
    /// Records of other ones.
    others: usize,
    failed: usize,
    first_error: Option<String>,
}

impl RecordFile {
    /// Opens the file of a batch run and mends it where it is damaged, which is said on stderr.
    ///
    /// # Errors
    /// A file that is none of a batch run, or cannot be written.
    pub(crate) fn open(args: &InferArgs, tasks: &[Task]) -> Result<Self> {
        let mut this = Self {
            target: RecordTarget::Stdout,
            known: HashMap::new(),
            others: 0,
            failed: 0,
            first_error: None,
        };
        let Some(path) = &args.output else {
            return Ok(this);
        };
        if let Some(lines) = without_resume(path)? {
            this.target = lines;
            return Ok(this);
        }
        let kind = tasks.first().map_or(TaskKind::Images(1), Task::kind);
        let settings = settings_hash(args, kind);
        let (known, others) = (&mut this.known, &mut this.others);
        let (mut journal, repair) = Journal::open(path, RECORD_START.as_bytes(), &mut |line| {
            let Ok(record) = serde_json::from_slice::<Record>(line) else {
                return LineKind::Damaged;
            };
            let same_question = kind == TaskKind::Rows || record.prompt == args.prompt();
            let key = record.key(kind);
            let Some(key) = key.filter(|_| same_question && record.settings == settings) else {
                *others += 1;
                return LineKind::Other;
            };
            let found = KnownRecord {
                failed: record.error.is_some(),
                sha256: record.image_sha256,
                row_sha256: record.row_sha256,
            };
            known.insert(key.clone(), found);
            LineKind::Keyed(key)
        })?;
        print_repair(path, &repair);
        // A run that was killed may have left both the old and the new record.
        journal.replace_earlier(&worth_keeping)?;
        this.target = RecordTarget::Journal(Box::new(journal));
        Ok(this)
    }

    /// Which reports are to be written: those that are not there, those that ended in an error, and those
    /// whose image is another one now. In a file each image has one record, however often it is named.
    pub(crate) fn todo<'a>(&self, tasks: &'a [Task]) -> Todo<'a> {
        if !matches!(self.target, RecordTarget::Journal(_)) {
            let tasks = tasks.iter().collect();
            return Todo { tasks, note: None };
        }
        let mut seen: HashSet<TaskKey> = HashSet::new();
        let unique: Vec<(&Task, TaskKey)> = tasks
            .iter()
            .filter_map(|task| {
                let key = task.key();
                seen.insert(key.clone()).then_some((task, key))
            })
            .collect();
        let states: Vec<ReportState> = unique
            .par_iter()
            .map(|(task, key)| self.state(task, key))
            .collect();
        let todo = unique.iter().zip(&states);
        let todo = todo.filter(|(_, state)| **state != ReportState::There);
        let are_rows = tasks.first().is_some_and(|task| task.row.is_some());
        Todo {
            tasks: todo.map(|((task, _), _)| *task).collect(),
            note: self.note(&states, tasks.len() - unique.len(), are_rows),
        }
    }

    /// What to say of the named reports; `repeated` were named a second time.
    fn note(&self, states: &[ReportState], repeated: usize, are_rows: bool) -> Option<String> {
        let (one, many) = if are_rows {
            ("row", "rows")
        } else {
            ("image", "images")
        };
        let count = |wanted| states.iter().filter(|state| **state == wanted).count();
        let [there, failed, exchanged] = [
            ReportState::There,
            ReportState::Failed,
            ReportState::Exchanged,
        ]
        .map(count);
        let all = states.len();
        let mut notes = Vec::new();
        if there == all {
            notes.push(match all {
                1 => "the report is there already".to_owned(),
                _ => format!("all {all} reports are there already"),
            });
        } else if there > 0 {
            notes.push(format!(
                "going on: {there} of {all} reports are there already"
            ));
        }
        if failed > 0 {
            notes.push(format!(
                "{} that failed before {} tried again",
                counted(failed, "report", "reports"),
                if failed == 1 { "is" } else { "are" }
            ));
        }
        if exchanged > 0 {
            notes.push(format!(
                "{} not as the file has {} and {} reported on anew",
                counted(exchanged, &format!("{one} is"), &format!("{many} are")),
                if exchanged == 1 { "it" } else { "them" },
                if exchanged == 1 { "is" } else { "are" }
            ));
        }
        if self.others > 0 {
            notes.push(format!(
                "the file also has {} of another question, model or setting",
                counted(self.others, "report", "reports")
            ));
        }
        if repeated > 0 {
            notes.push(format!(
                "{} named more than once, and reported on once",
                counted(repeated, &format!("{one} is"), &format!("{many} are"))
            ));
        }
        (!notes.is_empty()).then(|| notes.join("; "))
    }

    fn state(&self, task: &Task, key: &TaskKey) -> ReportState {
        let row = task.question().map(|question| &question.sha256);
        match self.known.get(key) {
            None => ReportState::New,
            Some(known) if known.failed => ReportState::Failed,
            Some(known) if known.row_sha256.as_ref() != row => ReportState::Exchanged,
            Some(known) => match (&known.sha256, sha256_of(&task.images)) {
                // An image that went away since keeps its report.
                (Some(then), Some(now)) if *then != now => ReportState::Exchanged,
                _ => ReportState::There,
            },
        }
    }

    /// Writes one record at once, so that an interruption loses nothing that was finished.
    ///
    /// # Errors
    /// A full disk, a reader that has gone away.
    pub(crate) fn add(&mut self, task: &Task, record: &Record, args: &InferArgs) -> Result<()> {
        if let Some(error) = &record.error {
            self.failed += 1;
            self.first_error.get_or_insert_with(|| error.clone());
        }
        match &mut self.target {
            RecordTarget::Journal(journal) => {
                journal.add(task.key(), serde_json::to_string(record)?)?;
            }
            RecordTarget::Lines(path, file) => {
                let line = serde_json::to_string(record)? + "\n";
                match file {
                    Some(file) => file.write_all(line.as_bytes()),
                    None => stdout().write_all(line.as_bytes()),
                }
                .with_context(|| format!("cannot write `{}`", path.display()))?;
            }
            RecordTarget::Stdout if args.json => say(&serde_json::to_string(record)?)?,
            RecordTarget::Stdout => {
                match &record.error {
                    None if !args.stream => say(&record.report)?,
                    // The first one ends the program; the others would be lost.
                    Some(error) if self.failed > 1 => eprintln!("{error}"),
                    _ => {}
                }
                if record.error.is_none()
                    && let Some(text) = findings::text(record)
                {
                    say(&text)?;
                }
                if args.verbose
                    && let Some(thinking) = &record.thinking
                {
                    eprintln!("thinking {thinking}");
                }
            }
        }
        match record.finish_reason {
            Some(FinishReason::Repetition) => eprintln!(
                "{}: ended after {} because they repeat; --no-repetition-stop goes on",
                record.label(),
                counted(record.completion_tokens, "token", "tokens")
            ),
            Some(FinishReason::Length) => eprintln!(
                "{}: ended after {}; --max-new-tokens allows more",
                record.label(),
                counted(record.completion_tokens, "token", "tokens")
            ),
            _ => {}
        }
        Ok(())
    }

    /// Puts new records in the place of those they replace.
    ///
    /// # Errors
    /// The file cannot be written, or reports failed: how many, and why the first one did.
    pub(crate) fn finish(mut self) -> Result<()> {
        if let RecordTarget::Journal(journal) = &mut self.target {
            journal.replace_earlier(&worth_keeping)?;
        }
        match (self.first_error, self.failed) {
            (Some(error), 1) => bail!("{error}"),
            (Some(error), failed) => bail!("{failed} reports failed, the first: {error}"),
            _ => Ok(()),
        }
    }
}

/// What the file has of a report.
#[derive(Clone, Copy, PartialEq)]
enum ReportState {
    New,
    There,
    Failed,
    Exchanged,
}

/// SHA-256 of the images as a record has it; `None` if one cannot be read.
fn sha256_of(images: &[PathBuf]) -> Option<String> {
    let hashes: Option<Vec<String>> = images
        .iter()
        .map(|path| match other_kind(path) {
            None => sha256_file(path).ok(),
            Some(_) => None,
        })
        .collect();
    Some(hashes?.join(";"))
}

/// Whether a record that was replaced is to be kept aside: it has a report, about another image.
fn worth_keeping(earlier: &[u8], later: &[u8]) -> bool {
    let read = |line: &[u8]| serde_json::from_slice::<Record>(line).ok();
    match (read(earlier), read(later)) {
        (Some(earlier), Some(later)) => {
            earlier.error.is_none()
                && (later.error.is_some()
                    || earlier.image_sha256 != later.image_sha256
                    || earlier.row_sha256 != later.row_sha256)
        }
        _ => true,
    }
}

/// How to write to something that is no file of records: stdout and devices take lines.
fn without_resume(path: &Path) -> Result<Option<RecordTarget>> {
    if is_same_file(path, Path::new("/dev/stdout")) {
        return Ok(Some(RecordTarget::Lines(path.to_path_buf(), None)));
    }
    match other_kind(path) {
        // Opening a folder is an error that says so.
        None | Some("folder") => Ok(None),
        Some("device") => {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(path)
                .with_context(|| format!("cannot write `{}`", path.display()))?;
            Ok(Some(RecordTarget::Lines(path.to_path_buf(), Some(file))))
        }
        Some(kind) => bail!(
            "cannot write `{}`: it is a {kind}, expected a file or `/dev/stdout`; --json without --output prints the records",
            path.display()
        ),
    }
}

fn print_repair(path: &Path, repair: &Repair) {
    let name = path.display();
    if let Some((rows, aside)) = &repair.damaged {
        let shown: Vec<String> = rows.iter().take(5).map(usize::to_string).collect();
        let more = if rows.len() > shown.len() { " …" } else { "" };
        eprintln!(
            "`{name}`: {} damaged ({}{more}) and moved to `{}`; what has no record is reported on again",
            counted(rows.len(), "line is", "lines are"),
            shown.join(", "),
            aside.display()
        );
    }
    if repair.zeros > 0 {
        eprintln!(
            "`{name}`: ended in {}, as after a power cut, which were taken away",
            counted(repair.zeros as usize, "zero byte", "zero bytes")
        );
    }
    if repair.cut {
        eprintln!("`{name}`: the last record was cut off and is written again");
    }
}

/// Prints one line to stdout; a reader that has gone away is an error like any other.
fn say(line: &str) -> Result<()> {
    writeln!(stdout(), "{line}").context("cannot write to stdout")
}
