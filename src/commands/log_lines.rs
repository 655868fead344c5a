//! The log of all commands: lines on stderr.

use std::{
    fmt::Write as _,
    io::Write,
    sync::atomic::{AtomicBool, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

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
                let since = SystemTime::now().duration_since(UNIX_EPOCH);
                line = time_text(since.unwrap_or_default().as_millis());
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

/// Milliseconds since 1970 as a time of UTC, in the form of RFC 3339.
fn time_text(milliseconds: u128) -> String {
    let (seconds, milliseconds) = ((milliseconds / 1000) as i64, milliseconds % 1000);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z")
}

/// Year, month and day of a day since 1970-01-01.
///
/// Source: `civil_from_days`, Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn date(days: i64) -> (i64, i64, i64) {
    // Years begin in March, so that the leap day is the last.
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day = days.rem_euclid(146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
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
            assert_eq!(time_text(seconds * 1000), text);
        }
    }
}
