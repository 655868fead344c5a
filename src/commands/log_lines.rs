//! The log of all commands: lines on stderr.

use std::io::Write;

/// The log: lines on stderr, of this program only unless something is wrong elsewhere.
struct Lines;

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
            // A closed stderr must not end a server.
            let _ = writeln!(std::io::stderr(), "{level}{}", record.args());
        }
    }

    fn flush(&self) {}
}

/// Lets lines of this level and worse through; the last call counts.
pub fn init(level: log::LevelFilter) {
    static LINES: Lines = Lines;
    // A second call finds the logger there and changes the level only.
    let _ = log::set_logger(&LINES);
    log::set_max_level(level);
}
