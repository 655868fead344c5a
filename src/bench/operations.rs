//! How often each operation runs on the device and how long it takes: the table of `--table`.
//!
//! CubeCL's profiler times every kernel, those of this program included, when two environment
//! variables enable it before the process starts; it waits for each kernel, so such a run is no
//! measure of speed and is made in a process of its own. It writes a line a kernel into a file:
//! `| 12.3µs     | name`. Work replayed as a CUDA graph is not seen.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// Names the profiler's file.
const FILE_VARIABLE: &str = "CUBECL_DEBUG_LOG";
/// Enables the profiler.
const LEVEL_VARIABLE: &str = "CUBECL_DEBUG_OPTION";

/// One operation in one call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    /// The kernel's name.
    pub name: String,
    /// How often it ran.
    pub count: u64,
    /// Time on the device, in seconds, all together.
    pub seconds: f64,
}

/// What the environment of a profiled process must hold.
pub fn environment(log: &Path) -> [(&'static str, OsString); 2] {
    [
        (FILE_VARIABLE, log.as_os_str().to_owned()),
        (LEVEL_VARIABLE, "profile".into()),
    ]
}

/// The file the profiler of this process writes.
#[derive(Debug, Clone)]
pub struct OperationLog {
    path: PathBuf,
    mark: u64,
}

impl OperationLog {
    /// The file of the environment, when this process is profiled into one.
    pub fn from_environment() -> Option<Self> {
        let level = std::env::var_os(LEVEL_VARIABLE)?;
        let path = PathBuf::from(std::env::var_os(FILE_VARIABLE)?);
        (level == "profile" && path.is_absolute()).then_some(Self { path, mark: 0 })
    }

    /// Forgets what ran before; to be called when the device is idle.
    pub fn mark(&mut self) {
        self.mark = self.flushed_length();
    }

    /// What ran since the mark, longest first; to be called when the device is idle.
    ///
    /// Nothing where the backend has no such profiler or the file cannot be read.
    pub fn since_mark(&self) -> Vec<Operation> {
        self.flushed_length();
        let mut text = Vec::new();
        let read = fs::File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.mark))?;
            file.read_to_end(&mut text)
        });
        match read {
            Ok(_) => parse(&String::from_utf8_lossy(&text)),
            Err(_) => Vec::new(),
        }
    }

    /// Length of the file once its writer, a thread that runs after the device, has caught up.
    fn flushed_length(&self) -> u64 {
        const QUIET: Duration = Duration::from_millis(500);
        let length = || fs::metadata(&self.path).map_or(0, |file| file.len());
        let mut before = length();
        loop {
            thread::sleep(QUIET);
            let now = length();
            if now == before {
                return now;
            }
            before = now;
        }
    }
}

/// Adds up the profiler's lines; all others (kernel sources, sums) are skipped.
fn parse(log: &str) -> Vec<Operation> {
    let mut all: HashMap<&str, Operation> = HashMap::new();
    for line in log.lines() {
        let Some((time, name)) = line
            .strip_prefix("| ")
            .and_then(|rest| rest.split_once(" | "))
        else {
            continue;
        };
        let Some(seconds) = parse_duration(time.trim()) else {
            continue;
        };
        let name = name.trim();
        let one = all.entry(name).or_insert_with(|| Operation {
            name: name.to_string(),
            count: 0,
            seconds: 0.0,
        });
        one.count += 1;
        one.seconds += seconds;
    }
    let mut all: Vec<Operation> = all.into_values().collect();
    all.sort_by(|a, b| {
        b.seconds
            .total_cmp(&a.seconds)
            .then_with(|| a.name.cmp(&b.name))
    });
    all
}

/// Reads what `Duration`'s `Debug` writes, such as `12.3µs`.
fn parse_duration(text: &str) -> Option<f64> {
    let units = [("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let (number, unit) = units
        .iter()
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))?;
    Some(number.parse::<f64>().ok()? * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_back_as_they_are_written() {
        for nanos in [
            0,
            7,
            850,
            12_345,
            1_200_000,
            3_000_000_000,
            61_500_000_000u64,
        ] {
            let duration = Duration::from_nanos(nanos);
            let read = parse_duration(&format!("{duration:?}")).unwrap();
            assert!(
                (read - duration.as_secs_f64()).abs() < 1e-12,
                "{duration:?}"
            );
        }
        assert_eq!(parse_duration("Duration"), None);
        assert_eq!(parse_duration("kernels"), None);
    }

    #[test]
    fn only_kernels_after_the_mark_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let before = "| 2ms        | gemm\n";
        // The profiler's own sums and a kernel's source must not be taken for launches.
        let after = "| 10.5µs     | gemm\n| Name | Duration | Num Computed | Ratio |\n\
                      | gemm | 10.5µs | 1 | 100 % |\n  | x = 1;\n| 1.5ms      | norm\n| 20µs       | gemm\n";
        fs::write(&path, before).unwrap();
        let mut log = OperationLog { path, mark: 0 };
        log.mark();
        fs::write(&log.path, format!("{before}{after}")).unwrap();
        let all = log.since_mark();
        assert_eq!(all.len(), 2, "{all:?}");
        assert_eq!((all[0].name.as_str(), all[0].count), ("norm", 1));
        assert_eq!((all[1].name.as_str(), all[1].count), ("gemm", 2));
        assert!((all[1].seconds - 30.5e-6).abs() < 1e-12);
    }
}
