//! Names of devices and of number types, as `--device` and `--dtype` take them.

use std::{fmt, str::FromStr};

use burn::tensor::DType;

/// Kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// The CPU (pure Rust), in the host's memory.
    Cpu,
    /// NVIDIA cards through CUDA.
    Cuda,
    /// GPUs through Vulkan, Metal or WebGPU.
    Wgpu,
}

/// A device by its name on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// The CPU (pure Rust).
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
    /// The discrete GPU of this number through Vulkan, or the best adapter there is.
    Wgpu(Option<usize>),
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Wgpu(None) => f.write_str("wgpu"),
            Self::Wgpu(Some(index)) => write!(f, "wgpu:{index}"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, index) = match text.split_once(':') {
            Some((kind, index)) => {
                let index = index
                    .parse::<usize>()
                    .map_err(|_| format!("`{index}` is not a device number"))?;
                (kind, Some(index))
            }
            None => (text, None),
        };
        match (kind, index) {
            ("cpu", None) => Ok(Self::Cpu),
            ("cuda", index) => Ok(Self::Cuda(index.unwrap_or(0))),
            ("wgpu", index) => Ok(Self::Wgpu(index)),
            _ => Err(format!(
                "`{text}` is not a device; expected cpu, cuda, cuda:N, wgpu or wgpu:N"
            )),
        }
    }
}

/// Types the weights can be held and multiplied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DtypeName {
    /// bfloat16.
    Bf16,
    /// float16.
    F16,
    /// float32.
    F32,
}

impl From<DtypeName> for DType {
    fn from(name: DtypeName) -> Self {
        match name {
            DtypeName::Bf16 => Self::BF16,
            DtypeName::F16 => Self::F16,
            DtypeName::F32 => Self::F32,
        }
    }
}

/// A type as `--dtype` takes it.
pub fn dtype_text(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_read_and_print() {
        for (text, name) in [
            ("cpu", DeviceName::Cpu),
            ("cuda:1", DeviceName::Cuda(1)),
            ("wgpu", DeviceName::Wgpu(None)),
            ("wgpu:2", DeviceName::Wgpu(Some(2))),
        ] {
            assert_eq!(text.parse::<DeviceName>().unwrap(), name);
            assert_eq!(name.to_string(), text);
        }
        assert_eq!("cuda".parse::<DeviceName>().unwrap(), DeviceName::Cuda(0));
        for bad in ["gpu", "cpu:1", "cuda:x", ""] {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad}");
        }
    }
}
