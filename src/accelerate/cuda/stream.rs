//! A CUDA stream beside cubecl's, memory for it, and launches captured as a graph.

use std::{
    ffi::c_void,
    sync::atomic::{AtomicI32, Ordering},
};

use cudarc::driver::{result, sys};

pub(super) use super::driver::Context;
use super::{
    driver::{DriverError, driver},
    module::Function,
    poison,
};

/// One launch.
pub(super) struct Step {
    pub function: Function,
    /// Whether it may begin before the previous one has ended: its kernel then waits by itself.
    pub early: bool,
    pub grid: [u32; 3],
    /// Tensor maps come before the pointers.
    pub maps: Vec<sys::CUtensorMap>,
    pub pointers: Vec<u64>,
    pub parameters: Vec<u64>,
}

/// A stream.
pub(super) struct Stream {
    context: Context,
    raw: sys::CUstream,
}

// SAFETY: the handle belongs to this value alone; callers make the context current.
#[allow(unsafe_code)]
unsafe impl Send for Stream {}

impl Stream {
    /// A new stream on the device of the current context.
    pub(super) fn new(context: Context) -> Result<Self, DriverError> {
        let kind = result::stream::StreamKind::NonBlocking;
        let raw = driver("making a stream", result::stream::create(kind))?;
        Ok(Self { context, raw })
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Synchronises: waits for all that was queued.
    pub(super) fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the stream is alive.
        #[allow(unsafe_code)]
        driver("waiting for the device", unsafe {
            result::stream::synchronize(self.raw)
        })
    }

    /// Launches kernels one by one.
    pub(super) fn issue(&self, steps: &[Step]) -> Result<(), DriverError> {
        for step in steps {
            let Step {
                function,
                early,
                grid,
                maps,
                pointers,
                parameters,
            } = step;
            let maps = maps.iter().map(|map| (&raw const *map).cast_mut().cast());
            let pointers = pointers.iter().map(|at| (&raw const *at).cast_mut().cast());
            let mut arguments: Vec<*mut c_void> = maps.chain(pointers).collect();
            arguments.push(parameters.as_ptr().cast_mut().cast());
            let mut attribute = sys::CUlaunchAttribute {
                id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: [0; 4],
                value: sys::CUlaunchAttributeValue {
                    programmaticStreamSerializationAllowed: 1,
                },
            };
            let config = sys::CUlaunchConfig {
                gridDimX: grid[0],
                gridDimY: grid[1],
                gridDimZ: grid[2],
                blockDimX: function.threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: function.shared_bytes as u32,
                hStream: self.raw,
                attrs: &raw mut attribute,
                numAttrs: u32::from(*early),
            };
            // SAFETY: whoever made the step gave each kernel what its header names.
            #[allow(unsafe_code)]
            let launched = unsafe {
                sys::cuLaunchKernelEx(
                    &raw const config,
                    function.handle(),
                    arguments.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
                .result()
            };
            driver("launching a kernel", launched)?;
        }
        Ok(())
    }

    /// Records launches without running them.
    fn record(&self, steps: &[Step]) -> Result<Graph, DriverError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let doing = "recording launches";
        // SAFETY: the stream is idle and ours; the graph is destroyed on every way out.
        #[allow(unsafe_code)]
        unsafe {
            driver(doing, sys::cuStreamBeginCapture_v2(self.raw, mode).result())?;
            let issued = self.issue(steps);
            let mut graph = std::ptr::null_mut();
            driver(
                doing,
                sys::cuStreamEndCapture(self.raw, &mut graph).result(),
            )?;
            let mut executable = std::ptr::null_mut();
            let made = issued.and_then(|()| {
                let made = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0);
                driver("making a graph", made.result())
            });
            let destroyed = sys::cuGraphDestroy(graph).result();
            made?;
            let graph = Graph {
                context: self.context,
                raw: executable,
            };
            driver("making a graph", destroyed)?;
            Ok(graph)
        }
    }

    /// Copies values to the device, after what was queued.
    ///
    /// # Safety
    /// `address` has room for them.
    #[allow(unsafe_code)]
    pub(super) unsafe fn send<T>(&self, address: u64, values: &[T]) -> Result<(), DriverError> {
        // SAFETY: the caller's; the driver has read pageable memory when it returns, and pinned
        // memory is not written before the stream is synchronised.
        driver("sending to the device", unsafe {
            result::memcpy_htod_async(address, values, self.raw)
        })
    }

    /// Copies values from the device; they are valid once the stream is synchronised.
    ///
    /// # Safety
    /// `address` holds so many, and `values` stays where it is until then.
    #[allow(unsafe_code)]
    pub(super) unsafe fn fetch<T>(
        &self,
        values: &mut [T],
        address: u64,
    ) -> Result<(), DriverError> {
        // SAFETY: the caller's.
        driver("reading from the device", unsafe {
            result::memcpy_dtoh_async(values, address, self.raw)
        })
    }

    /// Copies bytes on the device.
    ///
    /// # Safety
    /// Both ranges are the caller's and do not overlap.
    #[allow(unsafe_code)]
    pub(super) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), DriverError> {
        // SAFETY: the caller's.
        driver("copying on the device", unsafe {
            result::memcpy_dtod_async(to, from, bytes, self.raw)
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Errors are not acted on here and below: there is nothing left to do with the handles.
        if self.context.enter().is_ok() {
            let _ = self.wait();
            // SAFETY: synchronised, and not used afterwards.
            #[allow(unsafe_code)]
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// An event in a stream that the host can wait for.
pub(super) struct Event {
    context: Context,
    raw: sys::CUevent,
}

// SAFETY: as for `Stream`.
#[allow(unsafe_code)]
unsafe impl Send for Event {}

impl Event {
    /// A new event on the device of the current context.
    pub(super) fn new(context: Context) -> Result<Self, DriverError> {
        let kind = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let raw = driver("making an event", result::event::create(kind))?;
        Ok(Self { context, raw })
    }

    /// Records the event after what the stream has queued so far.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), DriverError> {
        // SAFETY: both handles are alive.
        #[allow(unsafe_code)]
        driver("marking the stream", unsafe {
            result::event::record(self.raw, stream.raw)
        })
    }

    /// Waits until the device has passed the event.
    pub(super) fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the handle is alive.
        #[allow(unsafe_code)]
        driver("waiting for the device", unsafe {
            result::event::synchronize(self.raw)
        })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made in `new`; the driver frees it once the device has passed it.
            #[allow(unsafe_code)]
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

/// A captured sequence of launches.
struct Graph {
    context: Context,
    raw: sys::CUgraphExec,
}

// SAFETY: as for `Stream`.
#[allow(unsafe_code)]
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by `record`; its owners synchronise the stream before they drop it.
            #[allow(unsafe_code)]
            let _ = unsafe { sys::cuGraphExecDestroy(self.raw).result() };
        }
    }
}

/// Launches that are run again and again: as one graph, or one by one where none can be made.
pub(super) struct Repeated {
    steps: Vec<Step>,
    graph: Option<Graph>,
}

/// Set to 1 to launch kernel by kernel.
const NO_GRAPH: &str = "XRAY_CUDA_NO_GRAPH";

impl Repeated {
    pub(super) fn new(stream: &Stream, steps: Vec<Step>) -> Self {
        let graph = if std::env::var_os(NO_GRAPH).is_some_and(|value| value == "1") {
            None
        } else {
            match stream.record(&steps) {
                Ok(graph) => Some(graph),
                Err(error) => {
                    log::warn!("kernels are launched one by one: {error}");
                    None
                }
            }
        };
        Self { steps, graph }
    }

    /// Queues all launches.
    pub(super) fn run(&self, stream: &Stream) -> Result<(), DriverError> {
        match &self.graph {
            // SAFETY: the graph and the stream are alive.
            #[allow(unsafe_code)]
            Some(graph) => driver("running a graph", unsafe {
                sys::cuGraphLaunch(graph.raw, stream.raw).result()
            }),
            None => stream.issue(&self.steps),
        }
    }
}

/// Memory on the device, beside cubecl's pools.
#[derive(Debug)]
pub(super) struct DeviceMemory {
    context: Context,
    pub address: u64,
}

impl DeviceMemory {
    /// Zeroed memory.
    ///
    /// # Errors
    /// The driver's, above all out of memory.
    pub(super) fn zeroed(context: Context, bytes: usize) -> Result<Self, DriverError> {
        Self::filled(context, bytes, 0)
    }

    /// Memory that is written before it is read: what it holds until then must not matter.
    ///
    /// # Errors
    /// As for [`DeviceMemory::zeroed`].
    pub(super) fn fresh(context: Context, bytes: usize) -> Result<Self, DriverError> {
        Self::filled(context, bytes, if poison::is_on() { 0xff } else { 0 })
    }

    fn filled(context: Context, bytes: usize, byte: u8) -> Result<Self, DriverError> {
        // A stream of its own: synchronising the whole device fails while another thread captures.
        let stream = Stream::new(context)?;
        // SAFETY: the memory is ours; the fill is synchronised before anybody reads it.
        #[allow(unsafe_code)]
        unsafe {
            let doing = format!(
                "taking {:.1} GiB of device memory",
                bytes as f64 / 2f64.powi(30)
            );
            let address = driver(&doing, result::malloc_sync(bytes.max(1)))?;
            let memory = Self { context, address };
            let filled = result::memset_d8_async(address, byte, bytes.max(1), stream.raw());
            driver(&doing, filled)?;
            stream.wait()?;
            Ok(memory)
        }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: taken in `filled`; freeing waits for work that uses it.
            #[allow(unsafe_code)]
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Page-locked memory of the host, which the device reads and writes.
#[derive(Debug)]
pub(super) struct PinnedMemory {
    context: Context,
    raw: *mut u8,
    bytes: usize,
}

// SAFETY: as for `Stream`.
#[allow(unsafe_code)]
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// Zeroed memory, for all devices.
    pub(super) fn new(context: Context, bytes: usize) -> Result<Self, DriverError> {
        let mut raw: *mut c_void = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: the memory is ours and is written before it is read.
        #[allow(unsafe_code)]
        unsafe {
            driver(
                "taking page-locked memory",
                sys::cuMemHostAlloc(&mut raw, bytes.max(1), flags).result(),
            )?;
            std::ptr::write_bytes(raw.cast::<u8>(), 0, bytes);
        }
        Ok(Self {
            context,
            raw: raw.cast(),
            bytes,
        })
    }

    /// What the host has written.
    ///
    /// # Safety
    /// No queued work writes the memory as long as the result is held.
    #[allow(unsafe_code)]
    pub(super) unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this length and initialised in `new`; as the caller guarantees.
        unsafe { std::slice::from_raw_parts(self.raw, self.bytes) }
    }

    /// Room for the host to write.
    ///
    /// # Safety
    /// No queued work reads or writes the memory as long as the result is held.
    #[allow(unsafe_code)]
    pub(super) unsafe fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.raw, self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: taken in `new`; owners wait for the stream first.
            #[allow(unsafe_code)]
            let _ = unsafe { sys::cuMemFreeHost(self.raw.cast()).result() };
        }
    }
}

/// Words in the host's memory that kernels write while the host goes on.
#[derive(Debug)]
pub(super) struct DeviceWords(PinnedMemory);

impl DeviceWords {
    /// Zeroed words.
    pub(super) fn new(context: Context, count: usize) -> Result<Self, DriverError> {
        PinnedMemory::new(context, count * size_of::<i32>()).map(Self)
    }

    /// Their device address: one address space for host and device on every 64-bit system.
    pub(super) fn address(&self) -> u64 {
        self.0.raw as u64
    }

    /// A copy of some words as they are now. Each is read atomically: there is no reference to memory
    /// that another writer changes. What a kernel has written is visible once its event was waited for.
    ///
    /// # Panics
    /// Past the last word.
    pub(super) fn read(&self, words: std::ops::Range<usize>) -> Vec<i32> {
        let count = self.0.bytes / size_of::<i32>();
        assert!(words.end <= count, "words {words:?} of {count}");
        words
            .map(|at| {
                // SAFETY: inside the memory, which is aligned to pages; whoever writes it writes whole
                // words.
                #[allow(unsafe_code)]
                unsafe {
                    AtomicI32::from_ptr(self.0.raw.cast::<i32>().add(at)).load(Ordering::Acquire)
                }
            })
            .collect()
    }
}
