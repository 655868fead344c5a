//! Facts from the operating system: memory, processor, the user's cache folder.

use std::fs;

/// Free host memory, in bytes; `None` where the system does not report it.
pub fn available_memory() -> Option<u64> {
    kibibytes("/proc/meminfo", "MemAvailable:")
}

/// Memory of the host, in bytes; `None` where the system does not report it.
pub fn total_memory() -> Option<u64> {
    kibibytes("/proc/meminfo", "MemTotal:")
}

/// Most host memory this process ever held, in bytes; `None` where the system does not report it.
pub fn peak_memory() -> Option<u64> {
    kibibytes("/proc/self/status", "VmHWM:")
}

/// Host memory this process holds now, in bytes; `None` where the system does not report it.
pub fn resident_memory() -> Option<u64> {
    kibibytes("/proc/self/status", "VmRSS:")
}

/// Files and connections this process may have open at once; `None` where the system does not report it.
pub fn open_files_limit() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/limits").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
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
    fn memory_is_reported_in_bytes() {
        assert!(available_memory().unwrap() > 1 << 24);
        assert!(peak_memory().unwrap() > 1 << 20);
    }
}

/// Sets one of glibc's limits of its allocator.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set_allocator(parameter: std::ffi::c_int, value: std::ffi::c_int) {
    #[allow(unsafe_code)]
    unsafe extern "C" {
        fn mallopt(parameter: std::ffi::c_int, value: std::ffi::c_int) -> std::ffi::c_int;
    }
    // SAFETY: takes two numbers and changes nothing but the allocator's own settings, under its lock.
    #[allow(unsafe_code)]
    unsafe {
        mallopt(parameter, value);
    }
}

/// Lets all threads share one heap, where the C library is glibc.
///
/// By default threads have heaps of their own, each of which keeps what was freed in it: images decoded
/// on many threads took three times the memory of those alive.
pub fn share_one_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const M_ARENA_MAX: std::ffi::c_int = -8;
        set_allocator(M_ARENA_MAX, 1);
    }
}

/// Keeps large host buffers for the next one of their size, where the C library is glibc.
///
/// Pixels and samples of a few megabytes come and go all the time; by default each is mapped anew,
/// and every page of it is zeroed by the kernel at its first touch.
pub fn keep_large_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const M_TRIM_THRESHOLD: std::ffi::c_int = -1;
        const M_MMAP_THRESHOLD: std::ffi::c_int = -3;
        const BYTES: std::ffi::c_int = 256 << 20;
        set_allocator(M_MMAP_THRESHOLD, BYTES);
        set_allocator(M_TRIM_THRESHOLD, BYTES);
    }
}

/// The program's folder for what can be made again: below `$XDG_CACHE_HOME` or `~/.cache`; `None` without either of
/// them.
pub fn cache_folder() -> Option<std::path::PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = set("XDG_CACHE_HOME")
        .map(std::path::PathBuf::from)
        .or_else(|| set("HOME").map(|home| std::path::PathBuf::from(home).join(".cache")))?;
    Some(cache.join("xray-qwen3vl"))
}

/// Name and number of cores of the machine's processor.
pub fn cpu_name() -> String {
    let model = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_string())
        });
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{}, {cores} cores", model.as_deref().unwrap_or("unknown"))
}
