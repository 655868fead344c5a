//! What the operating system tells about memory.

use std::fs;

/// Host memory that can still be had, in bytes; `None` where the system does not tell.
pub fn available_memory() -> Option<u64> {
    kibibytes("/proc/meminfo", "MemAvailable:")
}

/// Most host memory this process ever held, in bytes; `None` where the system does not tell.
pub fn peak_memory() -> Option<u64> {
    kibibytes("/proc/self/status", "VmHWM:")
}

/// Host memory this process holds now, in bytes; `None` where the system does not tell.
pub fn resident_memory() -> Option<u64> {
    kibibytes("/proc/self/status", "VmRSS:")
}

fn kibibytes(file: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let number: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(number * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_in_bytes() {
        assert!(available_memory().unwrap() > 1 << 24);
        assert!(peak_memory().unwrap() > 1 << 20);
    }
}
