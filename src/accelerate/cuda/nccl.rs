//! The few functions of NCCL that are needed, from the library as it is installed.
//!
//! cudarc looks for `libnccl.so` without a version, which only development packages and toolkits
//! have; run-time packages, Python's among them, bring `libnccl.so.2`. It also panics where the
//! library is missing, and its errors have no text.

use std::{
    error::Error,
    ffi::{CStr, c_char, c_int, c_void},
    sync::LazyLock,
};

use libloading::Library;

/// File names of the library, found on the loader's search path.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclFloat32` and `ncclSum`.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// A communicator of one device.
pub(super) type Communicator = *mut c_void;

type InitAll = unsafe extern "C" fn(*mut Communicator, c_int, *const c_int) -> c_int;
type AllReduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    Communicator,
    *mut c_void,
) -> c_int;
type GetUniqueId = unsafe extern "C" fn(*mut UniqueId) -> c_int;
type InitRankConfig =
    unsafe extern "C" fn(*mut Communicator, c_int, UniqueId, c_int, *const Config) -> c_int;
type OfCommunicator = unsafe extern "C" fn(Communicator) -> c_int;
type AsyncError = unsafe extern "C" fn(Communicator, *mut c_int) -> c_int;
type ErrorText = unsafe extern "C" fn(c_int) -> *const c_char;
type Group = unsafe extern "C" fn() -> c_int;
type LastError = unsafe extern "C" fn(Communicator) -> *const c_char;

/// Where communicators of one group meet: an address of the process that made it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId([u8; 128]);

impl UniqueId {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// # Errors
    /// The bytes are none.
    pub(super) fn of(bytes: &[u8]) -> Result<Self, String> {
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| format!("NCCL's id has {} bytes, expected 128", bytes.len()))
    }
}

/// `ncclConfig_t` as of NCCL 2.14; later versions take its version into account.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

impl Config {
    /// Calls return at once, so that a wait for another process can be given up.
    const ASYNC: Self = Self {
        size: size_of::<Self>(),
        magic: 0xcafe_beef,
        version: 21400,
        blocking: 0,
    };
}

/// The loaded library.
pub(super) struct Nccl {
    init_all: InitAll,
    unique_id: GetUniqueId,
    /// From NCCL 2.14 on.
    init_rank: Option<InitRankConfig>,
    all_reduce: AllReduce,
    group_start: Group,
    group_end: Group,
    async_error: AsyncError,
    abort: OfCommunicator,
    destroy: OfCommunicator,
    error_text: ErrorText,
    last_error: Option<LastError>,
    _library: Library,
}

impl Nccl {
    /// The library, loaded at the first call.
    ///
    /// # Errors
    /// The library is missing; the message says how to install it.
    pub(super) fn get() -> Result<&'static Self, String> {
        static NCCL: LazyLock<Result<Nccl, String>> = LazyLock::new(|| Nccl::load(&NAMES));
        NCCL.as_ref().map_err(Clone::clone)
    }

    fn load(names: &[&str]) -> Result<Self, String> {
        let mut reasons = Vec::new();
        for name in names {
            // SAFETY: NCCL's initialisers do nothing but set up its own state.
            #[allow(unsafe_code)]
            match unsafe { Library::new(*name) } {
                Ok(library) => {
                    return Self::of(library).map_err(|reason| {
                        format!("`{name}` is no NCCL that can be used: {reason}; install NCCL 2.10 or newer")
                    });
                }
                // The loader's reason is the error's source; the error itself only says that it failed.
                Err(error) => reasons.push(match error.source() {
                    Some(reason) => format!("`{name}`: {reason}"),
                    None => format!("`{name}`: {error}"),
                }),
            }
        }
        Err(format!(
            "several CUDA devices need the library NCCL, which is not found ({}); install the package \
             libnccl2 or `pip install nvidia-nccl-cu13` (cu12 for CUDA 12) and put the folder of \
             libnccl.so.2 on LD_LIBRARY_PATH, or train on one device with more \
             gradient_accumulation_steps",
            reasons.join("; ")
        ))
    }

    fn of(library: Library) -> Result<Self, String> {
        /// SAFETY: the caller names the function's true type.
        #[allow(unsafe_code)]
        unsafe fn find<F: Copy>(library: &Library, name: &str) -> Result<F, String> {
            // SAFETY: as above.
            unsafe { library.get::<F>(name.as_bytes()) }
                .map(|symbol| *symbol)
                .map_err(|error| error.to_string())
        }
        // SAFETY: the types are those of nccl.h, unchanged since 2.4; the library is kept loaded beside
        // the pointers.
        #[allow(unsafe_code)]
        unsafe {
            Ok(Self {
                init_all: find(&library, "ncclCommInitAll")?,
                unique_id: find(&library, "ncclGetUniqueId")?,
                init_rank: find(&library, "ncclCommInitRankConfig").ok(),
                all_reduce: find(&library, "ncclAllReduce")?,
                group_start: find(&library, "ncclGroupStart")?,
                group_end: find(&library, "ncclGroupEnd")?,
                async_error: find(&library, "ncclCommGetAsyncError")?,
                abort: find(&library, "ncclCommAbort")?,
                destroy: find(&library, "ncclCommDestroy")?,
                error_text: find(&library, "ncclGetErrorString")?,
                last_error: find(&library, "ncclGetLastError").ok(),
                _library: library,
            })
        }
    }

    fn check(&self, doing: &str, code: c_int) -> Result<(), String> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        /// SAFETY: a text that ends in zero and outlives the call, or null.
        #[allow(unsafe_code)]
        unsafe fn text(pointer: *const c_char) -> String {
            if pointer.is_null() {
                return String::new();
            }
            // SAFETY: as above.
            unsafe { CStr::from_ptr(pointer) }
                .to_string_lossy()
                .trim()
                .to_string()
        }
        // SAFETY: NCCL returns static texts; the last error needs no communicator.
        #[allow(unsafe_code)]
        let (what, last) = unsafe {
            (
                text((self.error_text)(code)),
                self.last_error
                    .map_or_else(String::new, |last| text(last(std::ptr::null_mut()))),
            )
        };
        let detail = if last.is_empty() {
            String::new()
        } else {
            format!(" ({last})")
        };
        Err(format!(
            "NCCL, {doing}: {what}{detail}; set NCCL_DEBUG=WARN for details"
        ))
    }

    /// A communicator for each of the devices of this process, in their order.
    pub(super) fn communicators(&self, devices: &[c_int]) -> Result<Vec<Communicator>, String> {
        let mut made = vec![std::ptr::null_mut(); devices.len()];
        // SAFETY: both lists have the number of entries that is passed.
        #[allow(unsafe_code)]
        let code =
            unsafe { (self.init_all)(made.as_mut_ptr(), devices.len() as c_int, devices.as_ptr()) };
        self.check("bringing the devices together", code)?;
        Ok(made)
    }

    /// Where the communicators of a group are to meet.
    ///
    /// # Errors
    /// NCCL's, for instance no network interface that it may use.
    pub(super) fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: there is room for the 128 bytes of the id.
        #[allow(unsafe_code)]
        let code = unsafe { (self.unique_id)(&mut id) };
        self.check("opening a port to meet at", code)?;
        Ok(id)
    }

    /// Begins communicators of some devices, numbers `first..` of a group of `all` in several processes;
    /// `enter` makes a device's context current. They may be used once [`Nccl::is_busy`] says that they are
    /// not.
    ///
    /// # Errors
    /// NCCL's; that it is older than 2.14.
    pub(super) fn begin_across(
        &self,
        devices: &[usize],
        [first, all]: [usize; 2],
        id: UniqueId,
        enter: impl Fn(usize) -> Result<(), String>,
    ) -> Result<Vec<Communicator>, String> {
        const DOING: &str = "bringing the devices of several processes together";
        let init_rank = self.init_rank.ok_or(
            "NCCL is older than 2.14, and devices of several processes need its calls that do not block; install a newer one",
        )?;
        let mut made = vec![std::ptr::null_mut(); devices.len()];
        // SAFETY: as the fields say; a group that was started is ended in any case.
        #[allow(unsafe_code)]
        unsafe {
            self.check(DOING, (self.group_start)())?;
            let begun = devices.iter().zip(&mut made).enumerate().try_for_each(
                |(place, (device, made))| {
                    enter(*device)?;
                    let rank = (first + place) as c_int;
                    let code = init_rank(made, all as c_int, id, rank, &Config::ASYNC);
                    self.check(DOING, code)
                },
            );
            let ended = (self.group_end)();
            begun?;
            self.check(DOING, ended)?;
        }
        Ok(made)
    }

    /// Queues all-reduce sums of f32 tensors over all devices on a stream: address, address of the sum,
    /// and number of elements of each.
    ///
    /// # Safety
    /// All addresses hold as many numbers on the communicator's device and stay valid until the stream has
    /// passed; `stream` belongs to that device, whose context is current.
    #[allow(unsafe_code)]
    pub(super) unsafe fn sum(
        &self,
        tensors: &[(u64, u64, usize)],
        communicator: Communicator,
        stream: *mut c_void,
    ) -> Result<(), String> {
        // SAFETY: as the caller guarantees; a group that was started is ended in any case.
        let (queued, ended) = unsafe {
            self.check("adding up", (self.group_start)())?;
            let queued = tensors.iter().try_for_each(|(from, into, count)| {
                let code = (self.all_reduce)(
                    *from as *const c_void,
                    *into as *mut c_void,
                    *count,
                    FLOAT32,
                    SUM,
                    communicator,
                    stream,
                );
                self.check("adding up", code)
            });
            (queued, (self.group_end)())
        };
        queued?;
        self.check("adding up", ended)
    }

    /// Whether an earlier call is still being carried out; its error once it failed.
    pub(super) fn is_busy(&self, communicator: Communicator) -> Result<bool, String> {
        let mut code = SUCCESS;
        // SAFETY: the communicator is alive.
        #[allow(unsafe_code)]
        let returned = unsafe { (self.async_error)(communicator, &mut code) };
        self.check("adding up", returned)?;
        self.check("adding up", code)?;
        Ok(code == IN_PROGRESS)
    }

    /// Destroys a communicator; `abort` ends its running operations.
    pub(super) fn end(&self, communicator: Communicator, abort: bool) {
        // SAFETY: the communicator is alive, and nobody uses it after this.
        #[allow(unsafe_code)]
        let _ = unsafe {
            if abort {
                (self.abort)(communicator)
            } else {
                (self.destroy)(communicator)
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_or_another_says_what_to_do() {
        let missing = Nccl::load(&["libnccl-that-is-nowhere.so.2"]).err().unwrap();
        for piece in [
            "libnccl-that-is-nowhere.so.2",
            "nvidia-nccl-cu13",
            "LD_LIBRARY_PATH",
            "gradient_accumulation_steps",
        ] {
            assert!(missing.contains(piece), "{missing}");
        }
        let other = Nccl::load(&["libm.so.6"]).err().unwrap();
        assert!(other.contains("`libm.so.6` is no NCCL"), "{other}");
    }
}
