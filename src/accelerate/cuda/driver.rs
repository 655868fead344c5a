//! Calls of the CUDA driver: their errors, and the context that they need.

use cudarc::driver::{result, sys};

/// An error of the CUDA driver, with its message.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{doing}: {reason}")]
pub(super) struct DriverError {
    pub(super) doing: String,
    pub(super) reason: String,
}

pub(super) fn driver<T, E: std::fmt::Debug>(
    doing: &str,
    result: Result<T, E>,
) -> Result<T, DriverError> {
    result.map_err(|reason| DriverError {
        doing: doing.to_string(),
        reason: format!("{reason:?}"),
    })
}

/// The device's context, which every call needs to be current.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context(sys::CUcontext);

// SAFETY: a primary context may be used from every thread that makes it current.
#[allow(unsafe_code)]
unsafe impl Send for Context {}

impl Context {
    pub(super) fn of(device: usize) -> Result<Self, DriverError> {
        driver("starting the driver", result::init())?;
        let number = driver("finding the device", result::device::get(device as i32))?;
        // SAFETY: the context is retained as long as the process lives, as cubecl does.
        #[allow(unsafe_code)]
        let context = driver("opening the device", unsafe {
            result::primary_ctx::retain(number)
        })?;
        Ok(Self(context))
    }

    pub(super) fn enter(self) -> Result<(), DriverError> {
        // SAFETY: retained in `of`.
        #[allow(unsafe_code)]
        driver("choosing the device", unsafe {
            result::ctx::set_current(self.0)
        })
    }
}
