//! `report_command`: a program beside a run that is given what the run measures, as JSON lines.
//!
//! The first line is the run's start with its whole config, the last one its end; between them is each row of
//! `metrics.jsonl`. The program has a thread of its own here, so a slow one delays no step: lines wait in a queue of
//! fixed length and are counted when they are dropped. What it prints goes to a file. Whatever becomes of it, the run
//! goes on, and its result says so.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::{Value, json};

use super::{
    records::Row,
    words::{Tell, counted},
};
use crate::base::build_info::VERSION;

/// Name of the file in the run's folder that takes what the program prints.
pub const LOG: &str = "report_command.log";

/// Lines that may wait for the program.
const QUEUE: usize = 4096;

/// How long the program may take to end after the run has.
const PATIENCE: Duration = Duration::from_secs(300);

/// Bytes at the end of the log in which the last line is looked for.
const TAIL: u64 = 4096;

/// The program cannot be started.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot start `report_command` {command:?}: {cause}; expected a program and its arguments, such as [\"python3\", \"configs/hooks/wandb_log.py\"]"
)]
pub struct ReportCommandError {
    command: Vec<String>,
    cause: io::Error,
}

/// What became of the program; part of the run's result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reported {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Lines that were handed to it.
    pub lines: u64,
    /// Lines that it was too slow for.
    pub dropped: u64,
    /// How it failed; `None` if it ended well.
    pub failure: Option<String>,
}

impl Reported {
    /// What a person should know of it; `None` if all is well.
    pub fn remark(&self) -> Option<String> {
        let dropped = (self.dropped > 0).then(|| {
            format!(
                "{} dropped, it was too slow",
                counted(self.dropped as usize, "line was", "lines were")
            )
        });
        let parts: Vec<String> = self.failure.iter().cloned().chain(dropped).collect();
        (!parts.is_empty()).then(|| format!("report_command: {}", parts.join("; ")))
    }
}

/// The running program.
pub(super) struct ReportCommand {
    command: Vec<String>,
    child: Child,
    lines: Option<SyncSender<String>>,
    writer: Option<JoinHandle<()>>,
    log: PathBuf,
    /// Where the log ended before this process.
    log_start: u64,
    sent: u64,
    dropped: u64,
    failure: Option<String>,
    patience: Duration,
    tell: Tell,
}

/// The first line that the program gets.
pub(super) struct Start<'a> {
    /// The run's folder.
    pub(super) run: &'a Path,
    /// The resolved settings.
    pub(super) config: Value,
    /// Steps done before.
    pub(super) step: usize,
    /// Steps of the whole run.
    pub(super) total_steps: usize,
    /// Whether the run continues from a checkpoint.
    pub(super) resumed: bool,
}

impl ReportCommand {
    /// Starts the program and sends it the run's start.
    ///
    /// # Errors
    /// [`ReportCommandError`] if there is no such program.
    pub(super) fn start(
        command: &[String],
        start: &Start<'_>,
        tell: Tell,
    ) -> Result<Self, ReportCommandError> {
        let failed = |cause| ReportCommandError {
            command: command.to_vec(),
            cause,
        };
        let log = start.run.join(LOG);
        let out = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(failed)?;
        let log_start = out.metadata().map_or(0, |found| found.len());
        let (program, arguments) = command.split_first().ok_or_else(|| {
            failed(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the list is empty",
            ))
        })?;
        let mut process = Command::new(program);
        process
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(out.try_clone().map_err(failed)?)
            .stderr(out);
        // Ctrl-C is for the run: it saves, and then ends the program by its last line.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut process, 0);
        let mut child = process.spawn().map_err(failed)?;
        let (lines, queue) = sync_channel(QUEUE);
        let writer = child
            .stdin
            .take()
            .map(|stdin| thread::spawn(move || write_lines(stdin, &queue)));
        let mut running = Self {
            command: command.to_vec(),
            child,
            lines: Some(lines),
            writer,
            log,
            log_start,
            sent: 0,
            dropped: 0,
            failure: None,
            patience: PATIENCE,
            tell,
        };
        let name = start
            .run
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        running.send(&json!({
            "event": "start",
            "program": format!("xray-qwen3vl {VERSION}"),
            "name": name,
            "output_dir": start.run.display().to_string(),
            "step": start.step,
            "total_steps": start.total_steps,
            "resumed": start.resumed,
            "config": start.config,
        }));
        Ok(running)
    }

    /// Sends a row of `metrics.jsonl`.
    pub(super) fn row(&mut self, row: &Row) {
        let mut line = Row::new();
        line.insert("event".into(), "metrics".into());
        line.extend(row.clone());
        self.send(&Value::Object(line));
    }

    fn send(&mut self, line: &Value) {
        if !self.offer(line) {
            self.dropped += 1;
            if self.dropped == 1 {
                (self.tell)("note: report_command does not keep up; lines are dropped");
            }
        }
    }

    /// Puts a line into the queue; `false` if it is full. A program that has ended takes none, and that is reported.
    fn offer(&mut self, line: &Value) -> bool {
        let Some(lines) = self.lines.as_ref().filter(|_| self.failure.is_none()) else {
            return true;
        };
        let sent = lines.try_send(format!("{line}\n"));
        if matches!(sent, Err(TrySendError::Disconnected(_))) {
            // Its input is closed: most often it is just ending, and how says more.
            thread::sleep(Duration::from_millis(100));
        }
        if let Ok(Some(status)) = self.child.try_wait() {
            self.fail(&format!("ended with {}", exit_text(status)));
            return true;
        }
        match sent {
            Ok(()) => self.sent += 1,
            Err(TrySendError::Full(_)) => return false,
            Err(TrySendError::Disconnected(_)) => self.fail("no longer reads its input"),
        }
        true
    }

    fn fail(&mut self, how: &str) {
        let mut text = format!(
            "{how} after {}; its output is in `{}`",
            counted(self.sent as usize, "line", "lines"),
            self.log.display()
        );
        if let Some(last) = last_line(&self.log, self.log_start) {
            text += &format!(", which ends with: {last}");
        }
        (self.tell)(&format!(
            "note: report_command {text}; the run goes on without it"
        ));
        self.failure = Some(text);
    }

    /// Sends the run's end, closes the program's input and waits for it to end.
    pub(super) fn finish(mut self, ending: &str, step: usize, error: Option<&str>) -> Reported {
        let line = json!({"event": "end", "ending": ending, "step": step, "error": error});
        let deadline = Instant::now() + self.patience;
        // The last line is worth waiting for.
        while !self.offer(&line) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        self.lines = None;
        let mut told = false;
        let waiting = Instant::now();
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break Some(status),
                Err(_) => break None,
                Ok(None) => {}
            }
            if Instant::now() >= deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                break None;
            }
            if !told && waiting.elapsed() > Duration::from_secs(5) {
                told = true;
                (self.tell)("waiting for report_command to end");
            }
            thread::sleep(Duration::from_millis(20));
        };
        if self.failure.is_none() {
            match status {
                Some(status) if status.success() => {}
                Some(status) => self.fail(&format!("ended with {}", exit_text(status))),
                None => self.fail(&format!(
                    "was ended, as it still ran {} s after the run",
                    self.patience.as_secs()
                )),
            }
        }
        // A child of the program may hold the pipe open: then the thread is left to itself.
        if let Some(writer) = self.writer.take().filter(JoinHandle::is_finished) {
            let _ = writer.join();
        }
        Reported {
            command: self.command,
            lines: self.sent,
            dropped: self.dropped,
            failure: self.failure,
        }
    }
}

/// Hands on lines until there are no more, or the program reads no more.
fn write_lines(mut stdin: ChildStdin, lines: &Receiver<String>) {
    for line in lines {
        if stdin
            .write_all(line.as_bytes())
            .and_then(|()| stdin.flush())
            .is_err()
        {
            return;
        }
    }
}

fn exit_text(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("exit code {code}"),
        None => status.to_string(),
    }
}

/// The last line of a file after its first `start` bytes.
fn last_line(path: &Path, start: u64) -> Option<String> {
    let length = fs::metadata(path).ok()?.len();
    let from = start.max(length.saturating_sub(TAIL));
    let mut file = File::open(path).ok()?;
    file.seek(SeekFrom::Start(from)).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = text.lines().rev().map(str::trim);
    lines.find(|line| !line.is_empty()).map(str::to_string)
}

#[cfg(all(test, unix))]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    type Told = Arc<Mutex<Vec<String>>>;

    fn start(folder: &Path, script: &str) -> (ReportCommand, Told) {
        let told = Told::default();
        let tell: Tell = Arc::new({
            let told = told.clone();
            move |line: &str| told.lock().unwrap().push(line.to_string())
        });
        let command = ["sh", "-c", script].map(str::to_string);
        let start = Start {
            run: folder,
            config: json!({"seed": 42}),
            step: 3,
            total_steps: 9,
            resumed: true,
        };
        (ReportCommand::start(&command, &start, tell).unwrap(), told)
    }

    fn row(step: u64) -> Row {
        json!({"step": step, "loss": 0.5})
            .as_object()
            .unwrap()
            .clone()
    }

    #[test]
    fn the_program_reads_start_rows_and_end() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("lines");
        let (mut running, told) = start(
            folder.path(),
            &format!("echo hello; cat > {}", out.display()),
        );
        (4..7).for_each(|step| running.row(&row(step)));
        let reported = running.finish("done", 6, None);
        assert_eq!((reported.lines, reported.remark()), (5, None));
        let text = fs::read_to_string(out).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines[0]["event"], "start");
        assert_eq!(lines[0]["config"]["seed"], 42);
        assert_eq!(
            (&lines[0]["step"], &lines[0]["resumed"]),
            (&json!(3), &json!(true))
        );
        assert_eq!(
            lines[1],
            json!({"event": "metrics", "step": 4, "loss": 0.5})
        );
        assert_eq!(lines[4]["ending"], "done");
        assert_eq!(
            fs::read_to_string(folder.path().join(LOG)).unwrap(),
            "hello\n"
        );
        assert!(told.lock().unwrap().is_empty());
    }

    #[test]
    fn a_program_that_fails_is_told_once_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(LOG), "of an earlier run\n").unwrap();
        let (mut running, told) = start(folder.path(), "echo no module named wandb >&2; exit 7");
        let deadline = Instant::now() + Duration::from_secs(20);
        while running.failure.is_none() && Instant::now() < deadline {
            running.row(&row(4));
            thread::sleep(Duration::from_millis(5));
        }
        (5..9).for_each(|step| running.row(&row(step)));
        let reported = running.finish("done", 9, None);
        let remark = reported.remark().unwrap();
        assert!(
            remark.contains("exit code 7") || remark.contains("no longer reads"),
            "{remark}"
        );
        assert!(remark.ends_with("no module named wandb"), "{remark}");
        assert_eq!(told.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_program_that_never_reads_or_ends_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let (mut running, told) = start(folder.path(), "exec sleep 1000");
        running.patience = Duration::from_millis(300);
        let long = json!({"step": 4, "text": "x".repeat(2000)})
            .as_object()
            .unwrap()
            .clone();
        // More than the pipe and the queue hold.
        (0..QUEUE + 200).for_each(|_| running.row(&long));
        let reported = running.finish("done", 9, None);
        assert!(reported.dropped > 0);
        let remark = reported.remark().unwrap();
        assert!(
            remark.contains("still ran") && remark.contains("dropped"),
            "{remark}"
        );
        assert!(told.lock().unwrap()[0].contains("does not keep up"));
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error_before_the_run() {
        let folder = tempfile::tempdir().unwrap();
        let start = Start {
            run: folder.path(),
            config: Value::Null,
            step: 0,
            total_steps: 1,
            resumed: false,
        };
        let command = ["no-such-program-anywhere".to_string()];
        let error = ReportCommand::start(&command, &start, Arc::new(|_: &str| {}))
            .err()
            .unwrap();
        assert!(
            error.to_string().contains("no-such-program-anywhere"),
            "{error}"
        );
    }
}
