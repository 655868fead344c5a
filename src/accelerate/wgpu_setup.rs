//! The wgpu device that Burn's backend uses, initialised with this program's options.

use std::sync::Mutex;

use burn::backend::wgpu::{
    RuntimeOptions, WgpuDevice, WgpuSetup, graphics::AutoGraphicsApi, init_setup,
};

use crate::base::panics::quietly;

/// The wgpu adapter, device and queue of a device, opened once.
///
/// # Errors
/// The message of a missing driver or adapter.
pub(super) fn wgpu_setup(device: &WgpuDevice) -> Result<WgpuSetup, String> {
    type Opened = Vec<(WgpuDevice, Result<WgpuSetup, String>)>;
    static OPENED: Mutex<Opened> = Mutex::new(Vec::new());
    let mut opened = OPENED.lock().unwrap_or_else(|lock| lock.into_inner());
    if let Some((_, setup)) = opened.iter().find(|(name, _)| name == device) {
        return setup.clone();
    }
    // Launches that go to the queue together: half as many submissions as by default. Above 63, cubecl waits
    // for the device in between.
    let options = || RuntimeOptions {
        tasks_max: 60,
        ..RuntimeOptions::default()
    };
    let setup = quietly(|| init_setup::<AutoGraphicsApi>(device, options()));
    opened.push((device.clone(), setup.clone()));
    setup
}
