//! Kernels compiled and loaded without cubecl: a captured graph needs function handles, which cubecl
//! does not expose.

use std::{
    collections::{HashMap, HashSet},
    ffi::{CStr, CString},
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use cudarc::{
    driver::{result, sys},
    nvrtc,
};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

pub(super) use super::driver::{DriverError, driver};
use super::{driver::Context, kernel::Kernel, plan::card};

/// A loaded entry point, and the threads and dynamic shared memory of its blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function {
    handle: usize,
    pub threads: u32,
    pub shared_bytes: usize,
}

impl Function {
    pub(super) fn handle(self) -> sys::CUfunction {
        self.handle as sys::CUfunction
    }
}

/// The architecture that kernels are compiled for on a device.
pub(super) fn architecture(device: usize) -> String {
    match card(device).capability {
        // The card's own instructions are in the architecture with an `a` only.
        90 => "sm_90a".to_string(),
        capability => format!("sm_{capability}"),
    }
}

/// A kernel's place in the table: its handle once it is loaded.
type Place = Arc<Mutex<Option<usize>>>;

/// Compiles (or finds on disk) and loads a kernel; a device's context is current.
pub(super) fn load(kernel: &Kernel, device: usize, arch: &str) -> Result<Function, DriverError> {
    static LOADED: LazyLock<Mutex<HashMap<(usize, u32), Place>>> = LazyLock::new(Mutex::default);
    let identity = kernel.identity();
    let key = (device, identity.id);
    // Compiling takes up to a second: threads that need the same kernel wait, others go on.
    let place = {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.entry(key).or_default().clone()
    };
    let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
    let handle = match *place {
        Some(handle) => handle,
        None => {
            let name = format!("{arch}-{}-{}.cubin", identity.entry, identity.digest);
            let file = super::compiled::folder().map(|folder| folder.join(name));
            let kept = file
                .as_ref()
                .and_then(|file| kept(file))
                .and_then(|image| load_image(kernel, &image).ok());
            match kept {
                Some(handle) => handle,
                // No cached image, or damaged, or written for another driver.
                None => {
                    let image = compile(kernel, arch)?;
                    let handle = load_image(kernel, &image)?;
                    keep(file, &image);
                    handle
                }
            }
        }
    };
    *place = Some(handle);
    Ok(Function {
        handle,
        threads: kernel.threads(),
        shared_bytes: kernel.shared_bytes(),
    })
}

/// [`load`] for several kernels at once, on all cores: one takes up to a second to compile.
pub(super) fn load_all<'a>(
    kernels: impl Iterator<Item = &'a Kernel>,
    device: usize,
    arch: &str,
) -> Result<(), DriverError> {
    let mut known = HashSet::new();
    let kernels: Vec<_> = kernels
        .filter(|kernel| known.insert(kernel.identity().id))
        .collect();
    kernels.into_par_iter().try_for_each(|kernel| {
        Context::of(device)?.enter()?;
        load(kernel, device, arch).map(|_| ())
    })
}

/// [`load_all`] in the background, on half of the cores.
pub(super) fn load_in_background(kernels: Vec<Kernel>, device: usize) {
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get() / 2);
    std::thread::spawn(move || {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .build();
        let arch = architecture(device);
        // Whoever needs a kernel that failed here compiles it again and reports the error.
        if let Ok(pool) = pool {
            let _ = pool.install(|| load_all(kernels.iter(), device, &arch));
        }
    });
}

/// What [`keep`] wrote, if it is complete: the driver gets no length of an image to check.
fn kept(file: &Path) -> Option<Vec<u8>> {
    let mut image = std::fs::read(file).ok()?;
    let digest = image.split_off(image.len().checked_sub(Sha256::output_size())?);
    (Sha256::digest(&image).as_slice() == digest).then_some(image)
}

/// A cache that cannot be written is no error: the next start compiles again.
fn keep(file: Option<PathBuf>, image: &[u8]) {
    let Some(file) = file else { return };
    let temporary = file.with_extension(format!("{}.tmp", std::process::id()));
    let whole = [image, Sha256::digest(image).as_slice()].concat();
    let written =
        std::fs::write(&temporary, whole).and_then(|()| std::fs::rename(&temporary, &file));
    if let Err(error) = written {
        log::warn!(
            "compiled kernels are not kept in {}: {error}",
            file.display()
        );
    }
}

/// Machine code (CUBIN): PTX would be compiled once more when the driver loads it.
fn compile(kernel: &Kernel, arch: &str) -> Result<Vec<u8>, DriverError> {
    let doing = format!("compiling {}", kernel.entry());
    let source = driver(&doing, CString::new(kernel.source()))?;
    let program = driver(&doing, nvrtc::result::create_program(&source, None))?;
    // SAFETY: the program was made above and is destroyed below, once.
    #[allow(unsafe_code)]
    unsafe {
        let compiled =
            nvrtc::result::compile_program(program, &[format!("--gpu-architecture={arch}")]);
        if compiled.is_err() {
            let log = nvrtc::result::get_program_log(program)
                .map(|log| CStr::from_ptr(log.as_ptr()).to_string_lossy().into_owned())
                .unwrap_or_default();
            let _ = nvrtc::result::destroy_program(program);
            return Err(DriverError { doing, reason: log });
        }
        let mut size = 0;
        driver(
            &doing,
            nvrtc::sys::nvrtcGetCUBINSize(program, &mut size).result(),
        )?;
        let mut image = vec![0u8; size];
        let got = nvrtc::sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result();
        driver(&doing, got)?;
        driver(&doing, nvrtc::result::destroy_program(program))?;
        Ok(image)
    }
}

fn load_image(kernel: &Kernel, image: &[u8]) -> Result<usize, DriverError> {
    let doing = format!("loading {}", kernel.entry());
    let name = driver(&doing, CString::new(kernel.entry()))?;
    // SAFETY: the image is complete, from NVRTC or as `kept` has checked; the module stays loaded as long
    // as the process lives.
    #[allow(unsafe_code)]
    unsafe {
        let module = driver(&doing, result::module::load_data(image.as_ptr().cast()))?;
        let function = driver(&doing, result::module::get_function(module, name))?;
        if kernel.shared_bytes() > 0 {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = kernel.shared_bytes() as i32;
            driver(
                &doing,
                sys::cuFuncSetAttribute(function, attribute, bytes).result(),
            )?;
        }
        Ok(function as usize)
    }
}
