//! Memory of devices: what is free, and the most that a run needed.

use super::{DeviceMemory, Ops};
use crate::base::{
    device_name::DeviceKind,
    system::{available_memory, peak_memory},
};

/// Free memory where a device's tensors are stored, in bytes: the host's for the CPU.
pub fn free_memory<B: Ops>(device: &B::Device) -> Option<u64> {
    if B::KIND == DeviceKind::Cpu {
        available_memory()
    } else {
        B::free_memory(device)
    }
}

const GIB: f64 = (1u64 << 30) as f64;

/// Memory that the program may take of a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// What is free at the start.
    Free,
    /// GiB.
    Gib(f64),
}

impl std::str::FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "auto" => Ok(Self::Free),
            number => (number.parse().ok())
                .filter(|gib: &f64| *gib > 0.0 && gib.is_finite())
                .map(Self::Gib)
                .ok_or_else(|| format!("`{text}`: expected `auto` or a number of GiB, such as 24")),
        }
    }
}

impl Budget {
    /// In GiB, of a device with `free` bytes left, to two places.
    ///
    /// # Errors
    /// `auto` where the free memory is not known.
    pub fn gib(self, free: Option<u64>) -> Result<f64, String> {
        match (self, free) {
            (Self::Gib(gib), _) => Ok(gib),
            // The driver's own tables grow while kernels are loaded.
            (Self::Free, Some(free)) => Ok((free as f64 * 0.97 / GIB * 100.0).floor() / 100.0),
            (Self::Free, None) => Err(
                "the device does not tell how much memory is free; give a number of GiB in place of `auto`"
                    .to_string(),
            ),
        }
    }
}

/// The most memory a run needed so far, and whose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeakMemory {
    /// Bytes.
    pub bytes: u64,
    /// Of the device; of the host where the backend does not report it, or computes on the host.
    pub on_device: bool,
}

impl PeakMemory {
    /// In GiB.
    pub fn gib(&self) -> f64 {
        self.bytes as f64 / GIB
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
    /// Reads the memory that the calling thread's work holds on `device`.
    pub fn look<B: Ops>(&mut self, device: &B::Device) {
        self.note(B::memory_in_use(device));
    }

    /// Adds a reading taken elsewhere.
    pub fn note(&mut self, seen: Option<DeviceMemory>) {
        self.0 = self.0.max(seen.map(|memory| memory.reserved));
    }

    /// The peak so far: the device's, else the host's; `None` where neither is known.
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read() {
        assert_eq!("auto".parse(), Ok(Budget::Free));
        assert_eq!("24".parse(), Ok(Budget::Gib(24.0)));
        for bad in ["0", "-3", "lots", "inf", ""] {
            assert!(bad.parse::<Budget>().is_err(), "{bad}");
        }
        assert_eq!(Budget::Free.gib(Some(100 << 30)), Ok(97.0));
        assert!(Budget::Free.gib(None).unwrap_err().contains("GiB"));
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
