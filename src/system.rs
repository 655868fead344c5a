//! What the operating system tells about memory.

use std::fs;

use crate::kernels::{DeviceMemory, Kernels};

/// Host memory that can still be had, in bytes; `None` where the system does not tell.
pub fn available_memory() -> Option<u64> {
    kibibytes("/proc/meminfo", "MemAvailable:")
}

/// Memory of the host, in bytes; `None` where the system does not tell.
pub fn total_memory() -> Option<u64> {
    kibibytes("/proc/meminfo", "MemTotal:")
}

/// Memory that can still be had where a device's tensors lie, in bytes: the host's for the CPU.
pub fn free_memory<B: Kernels>(device: &B::Device) -> Option<u64> {
    if crate::bench::device::is_cpu::<B>(device) {
        available_memory()
    } else {
        B::free_memory(device)
    }
}

/// Most host memory this process ever held, in bytes; `None` where the system does not tell.
pub fn peak_memory() -> Option<u64> {
    kibibytes("/proc/self/status", "VmHWM:")
}

/// Host memory this process holds now, in bytes; `None` where the system does not tell.
pub fn resident_memory() -> Option<u64> {
    kibibytes("/proc/self/status", "VmRSS:")
}

/// The most memory a run needed so far, and whose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeakMemory {
    /// Bytes.
    pub bytes: u64,
    /// Of the device; of the host where the backend does not tell, or works on the host.
    pub on_device: bool,
}

impl PeakMemory {
    /// In GiB.
    pub fn gib(&self) -> f64 {
        self.bytes as f64 / (1u64 << 30) as f64
    }

    /// `device` or `host`.
    pub fn place(&self) -> &'static str {
        if self.on_device { "device" } else { "host" }
    }
}

/// Keeps the largest of what a device is seen to hold.
#[derive(Debug, Clone, Copy, Default)]
pub struct MemoryWatch(Option<u64>);

impl MemoryWatch {
    /// Looks at the memory that the calling thread's work holds on `device`.
    pub fn look<B: Kernels>(&mut self, device: &B::Device) {
        self.note(B::memory_in_use(device));
    }

    /// Takes in what was seen elsewhere.
    pub fn note(&mut self, seen: Option<DeviceMemory>) {
        self.0 = self.0.max(seen.map(|memory| memory.reserved));
    }

    /// The peak so far: the device's, else the host's; `None` where neither is told.
    pub fn peak(&self) -> Option<PeakMemory> {
        let device = self.0.map(|bytes| PeakMemory {
            bytes,
            on_device: true,
        });
        device.or_else(|| {
            peak_memory().map(|bytes| PeakMemory {
                bytes,
                on_device: false,
            })
        })
    }
}

/// Files and connections this process may have open at once; `None` where the system does not tell.
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
    fn memory_is_told_in_bytes() {
        assert!(available_memory().unwrap() > 1 << 24);
        assert!(peak_memory().unwrap() > 1 << 20);
    }

    #[test]
    fn the_device_counts_before_the_host_and_peaks_stay() {
        let mut watch = MemoryWatch::default();
        let host = watch.peak().unwrap();
        assert_eq!(host.place(), "host");
        assert!(host.bytes > 1 << 20);
        for reserved in [5 << 30, 3 << 30] {
            let in_use = reserved / 2;
            watch.note(Some(DeviceMemory { in_use, reserved }));
        }
        watch.note(None);
        let peak = watch.peak().unwrap();
        assert_eq!((peak.gib(), peak.place()), (5.0, "device"));
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
/// By default threads have heaps of their own, each of which keeps what was freed in it: pictures decoded
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
