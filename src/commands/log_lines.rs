//! The log of all commands: lines on stderr.

use std::{
    fmt::Write as _,
    io::Write,
    sync::atomic::{AtomicBool, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use chrono::{DateTime, SecondsFormat};

/// The log: lines on stderr, of this program only unless something is wrong elsewhere.
struct Lines {
    /// Whether lines begin with the time.
    timed: AtomicBool,
}

impl log::Log for Lines {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        let ours = metadata.target().starts_with("xray_qwen3vl");
        metadata.level()
            <= if ours {
                log::Level::Info
            } else {
                log::Level::Error
            }
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = match record.level() {
                log::Level::Error => "error: ",
                log::Level::Warn => "warning: ",
                _ => "",
            };
            let mut line = String::new();
            if self.timed.load(Ordering::Relaxed) {
                line = time_text(SystemTime::now());
                line.push(' ');
            }
            line.push_str(level);
            escape(&mut line, &record.args().to_string());
            // A closed stderr must not end a server.
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }

    fn flush(&self) {}
}

/// Lets lines of this level and worse through; the last call counts.
pub fn init(level: log::LevelFilter) {
    set(level, false);
}

/// As [`init`], and each line begins with the time, in UTC.
pub fn init_timed(level: log::LevelFilter) {
    set(level, true);
}

fn set(level: log::LevelFilter, timed: bool) {
    static LINES: Lines = Lines {
        timed: AtomicBool::new(false),
    };
    LINES.timed.store(timed, Ordering::Relaxed);
    // A second call finds the logger there and changes the level only.
    let _ = log::set_logger(&LINES);
    log::set_max_level(level);
}

/// Adds `text` as one line that shows what it is: no line break, no control of a terminal, no change of
/// the direction of writing.
fn escape(line: &mut String, text: &str) {
    for letter in text.chars() {
        let turns = matches!(letter, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
        match letter {
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            _ if letter.is_control() || turns => {
                let _ = write!(line, "\\u{{{:x}}}", letter as u32);
            }
            _ => line.push(letter),
        }
    }
}

/// A moment in UTC, in the form of RFC 3339.
fn time_text(moment: SystemTime) -> String {
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    let milliseconds = i64::try_from(since.as_millis()).unwrap_or(i64::MAX);
    // A clock beyond chrono's years shows as the first moment instead of ending the program.
    DateTime::from_timestamp_millis(milliseconds)
        .unwrap_or_default()
        .to_rfc3339_opts(SecondsFormat::Millis, true)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_line_stays_one_line_whatever_is_in_it() {
        let mut line = String::new();
        escape(
            &mut line,
            "心影 x\n2026-11-30 ERROR forged\r\u{1b}[31m\u{202e}\u{9b}",
        );
        assert_eq!(
            line,
            "心影 x\\n2026-11-30 ERROR forged\\r\\u{1b}[31m\\u{202e}\\u{9b}"
        );
    }

    #[test]
    fn the_time_is_that_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (1_796_022_265, "2026-11-30T07:04:25.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            let moment = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(time_text(moment), text);
        }
    }
}
