//! A fixed run of launches, recorded once and replayed as one graph.
//!
//! What a closure launches through [`super::launch`] is either noted as it runs, so that its kernels
//! can be compiled ahead ([`watch`]), or recorded in place of running ([`record`]). Buffers of a
//! recorded run come out of a pool of its own and are used again as soon as nothing holds them, so a
//! graph keeps as much memory as the run needs at its peak. Operations of Burn's own cannot be
//! recorded: a recording is to be compared with the launched run before it is used.

use std::{cell::RefCell, collections::BTreeMap, ffi::c_void};

use burn::tensor::DType;
use cudarc::driver::{result, sys};

use super::{
    launch::{Buffer, Kernel, MatrixMap},
    module::{DriverError, Function, architecture, driver, load},
};

/// Pool buffers are multiples of this many bytes.
const GRAIN: usize = 4096;

/// One launch, all pointers resolved.
struct Launch {
    kernel: Kernel,
    grid: [u32; 3],
    maps: Vec<sys::CUtensorMap>,
    pointers: Vec<u64>,
    parameters: Vec<u64>,
}

#[derive(Default)]
struct Recorder {
    launches: Vec<Launch>,
    /// Memory that the run writes, each piece with its address.
    pool: Vec<(u64, Buffer)>,
    /// What it only reads, weights and anything made before, by address.
    read: BTreeMap<u64, Buffer>,
    error: Option<DriverError>,
}

enum Mode {
    Watch(Vec<Kernel>),
    Record(Recorder),
}

thread_local! {
    static MODE: RefCell<Option<Mode>> = const { RefCell::new(None) };
}

/// Ends a mode also when its work panics.
struct Ended;

impl Drop for Ended {
    fn drop(&mut self) {
        MODE.take();
    }
}

fn within<R>(mode: Mode, work: impl FnOnce() -> R) -> (R, Option<Mode>) {
    MODE.replace(Some(mode));
    let ended = Ended;
    let output = work();
    let mode = MODE.take();
    drop(ended);
    (output, mode)
}

/// Runs `work` and gives the kernels it launched, each once.
pub(super) fn watch<R>(work: impl FnOnce() -> R) -> (R, Vec<Kernel>) {
    let (output, mode) = within(Mode::Watch(Vec::new()), work);
    match mode {
        Some(Mode::Watch(kernels)) => (output, kernels),
        _ => (output, Vec::new()),
    }
}

/// Records what `work` launches in place of running it. What `work` returns lies in the graph's own
/// memory and is there after each replay.
///
/// # Errors
/// What the driver says.
pub(super) fn record<R>(
    device: usize,
    work: impl FnOnce() -> R,
) -> Result<(R, Graph), DriverError> {
    let (output, mode) = within(Mode::Record(Recorder::default()), work);
    let Some(Mode::Record(recorder)) = mode else {
        unreachable!("`within` gives back the mode it was given");
    };
    if let Some(error) = recorder.error {
        return Err(error);
    }
    let graph = Graph::new(device, recorder)?;
    Ok((output, graph))
}

/// Notes a launch; whether it is recorded and must not run.
pub(super) fn take(
    kernel: &Kernel,
    grid: [usize; 3],
    maps: &[MatrixMap<'_>],
    buffers: &[&Buffer],
    parameters: &[u64],
) -> bool {
    MODE.with_borrow_mut(|mode| match mode {
        None => false,
        Some(Mode::Watch(kernels)) => {
            if !kernels.iter().any(|known| known.entry() == kernel.entry()) {
                kernels.push(kernel.clone());
            }
            false
        }
        Some(Mode::Record(recorder)) => {
            if let Err(error) = recorder.push(kernel, grid, maps, buffers, parameters) {
                recorder.error.get_or_insert(error);
            }
            true
        }
    })
}

/// A buffer out of the pool of the recording under way, `None` where there is none.
pub(super) fn reserve<const D: usize>(
    like: &Buffer,
    shape: &[usize; D],
    dtype: DType,
) -> Option<Buffer> {
    MODE.with_borrow_mut(|mode| match mode {
        Some(Mode::Record(recorder)) => {
            let buffer = recorder.reserve(like, shape, dtype);
            buffer
                .map_err(|error| recorder.error.get_or_insert(error))
                .ok()
        }
        _ => None,
    })
}

/// The device address of a buffer.
pub(super) fn address(buffer: &Buffer) -> Result<u64, DriverError> {
    let resource = buffer.client.get_resource(buffer.handle.clone());
    let resource = driver("finding a buffer", resource)?;
    Ok(resource.resource().ptr)
}

impl Recorder {
    /// The address of a buffer, which stays where it is as long as the recording lives.
    fn hold(&mut self, buffer: &Buffer) -> Result<u64, DriverError> {
        let at = address(buffer)?;
        let ours = self
            .pool
            .iter()
            .any(|(start, pooled)| (*start..*start + pooled.handle.size()).contains(&at));
        if !ours {
            self.read.entry(at).or_insert_with(|| buffer.clone());
        }
        Ok(at)
    }

    fn push(
        &mut self,
        kernel: &Kernel,
        grid: [usize; 3],
        maps: &[MatrixMap<'_>],
        buffers: &[&Buffer],
        parameters: &[u64],
    ) -> Result<(), DriverError> {
        let mut pointers = Vec::with_capacity(maps.len() + buffers.len());
        let mut encoded = Vec::with_capacity(maps.len());
        for map in maps {
            let address = self.hold(map.buffer)?;
            encoded.push(map.encode(address)?);
            pointers.push(address);
        }
        for buffer in buffers {
            pointers.push(self.hold(buffer)?);
        }
        self.launches.push(Launch {
            kernel: kernel.clone(),
            grid: grid.map(|size| size as u32),
            maps: encoded,
            pointers,
            parameters: parameters.to_vec(),
        });
        Ok(())
    }

    fn reserve<const D: usize>(
        &mut self,
        like: &Buffer,
        shape: &[usize; D],
        dtype: DType,
    ) -> Result<Buffer, DriverError> {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        let size = bytes.next_multiple_of(GRAIN);
        let free = self.pool.iter().position(|(_, buffer)| {
            buffer.handle.size() as usize == size && buffer.handle.can_mut()
        });
        let at = match free {
            Some(at) => at,
            None => {
                let buffer = burn_cubecl::ops::numeric::empty_device_contiguous_dtype(
                    like.client.clone(),
                    like.device.clone(),
                    [size].into(),
                    DType::U8,
                );
                // Waits until the memory is there: only then does the handle count its holders.
                self.pool.push((address(&buffer)?, buffer));
                self.pool.len() - 1
            }
        };
        let handle = self.pool[at].1.handle.clone();
        Ok(Buffer::new_contiguous(
            like.client.clone(),
            like.device.clone(),
            (*shape).into(),
            handle.offset_end((size - bytes) as u64),
            dtype,
        ))
    }
}

/// A recorded run on a stream of its own.
pub(super) struct Graph {
    context: sys::CUcontext,
    stream: sys::CUstream,
    executable: sys::CUgraphExec,
    _kept: Vec<Buffer>,
}

// SAFETY: the handles belong to this graph alone; every call makes the context current first.
#[allow(unsafe_code)]
unsafe impl Send for Graph {}

impl Graph {
    #[allow(unsafe_code)]
    fn new(device: usize, recorder: Recorder) -> Result<Self, DriverError> {
        let context = open(device)?;
        let arch = architecture(device);
        let functions = recorder
            .launches
            .iter()
            .map(|launch| load(&launch.kernel, device, &arch))
            .collect::<Result<Vec<_>, _>>()?;
        // SAFETY: plain driver calls; the stream is ours and idle, and each kernel gets what its
        // launcher gave it.
        unsafe {
            let kind = result::stream::StreamKind::NonBlocking;
            let stream = driver("making a stream", result::stream::create(kind))?;
            let executable = capture(stream, &functions, &recorder.launches).inspect_err(|_| {
                let _ = result::stream::destroy(stream);
            })?;
            let pool = recorder.pool.into_iter().map(|(_, buffer)| buffer);
            Ok(Self {
                context,
                stream,
                executable,
                _kept: pool.chain(recorder.read.into_values()).collect(),
            })
        }
    }

    fn set_current(&self) -> Result<(), DriverError> {
        // SAFETY: the context was retained in `new`.
        #[allow(unsafe_code)]
        driver("choosing the device", unsafe {
            result::ctx::set_current(self.context)
        })
    }

    /// Sends bytes to a device address and starts the run behind them; returns at once.
    ///
    /// # Safety
    /// `to` has room for `bytes`, and `bytes` stays as it is until [`Graph::finish`].
    ///
    /// # Errors
    /// What the driver says.
    #[allow(unsafe_code)]
    pub(super) unsafe fn start(&self, bytes: &[u8], to: u64) -> Result<(), DriverError> {
        self.set_current()?;
        // SAFETY: as the caller promises; the graph lives as long as `self`.
        unsafe {
            driver(
                "sending the input",
                result::memcpy_htod_async(to, bytes, self.stream),
            )?;
            driver(
                "running a graph",
                sys::cuGraphLaunch(self.executable, self.stream).result(),
            )
        }
    }

    /// Copies results elsewhere on the device, `(from, to, bytes)` each, and waits for all of it.
    ///
    /// # Safety
    /// The addresses are those of live buffers of these sizes, which nothing else uses meanwhile.
    ///
    /// # Errors
    /// What the driver says.
    #[allow(unsafe_code)]
    pub(super) unsafe fn finish(&self, copies: &[(u64, u64, usize)]) -> Result<(), DriverError> {
        self.set_current()?;
        // SAFETY: as the caller promises.
        unsafe {
            for (from, to, bytes) in copies {
                driver(
                    "copying a result",
                    result::memcpy_dtod_async(*to, *from, *bytes, self.stream),
                )?;
            }
            driver("running a graph", result::stream::synchronize(self.stream))
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.set_current().is_err() {
            return;
        }
        // SAFETY: the stream is waited for before anything it uses is given back. Errors are not
        // acted on: there is nothing left to do with the handles.
        #[allow(unsafe_code)]
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let _ = sys::cuGraphExecDestroy(self.executable).result();
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// Makes a device's context current on this thread.
pub(super) fn open(device: usize) -> Result<sys::CUcontext, DriverError> {
    // SAFETY: plain driver calls; the primary context is never released, as cubecl's is not.
    #[allow(unsafe_code)]
    unsafe {
        driver("starting the driver", result::init())?;
        let number = driver("finding the device", result::device::get(device as i32))?;
        let context = driver("opening the device", result::primary_ctx::retain(number))?;
        driver("choosing the device", result::ctx::set_current(context))?;
        Ok(context)
    }
}

/// # Safety
/// The stream is idle, the context current, and the launches fit their kernels.
#[allow(unsafe_code)]
unsafe fn capture(
    stream: sys::CUstream,
    functions: &[Function],
    launches: &[Launch],
) -> Result<sys::CUgraphExec, DriverError> {
    const DOING: &str = "recording a graph";
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: as the caller promises; the graph is destroyed once it is instantiated.
    unsafe {
        driver(DOING, sys::cuStreamBeginCapture_v2(stream, mode).result())?;
        let issued = functions
            .iter()
            .zip(launches)
            .try_for_each(|(function, launch)| {
                let maps = launch
                    .maps
                    .iter()
                    .map(|map| (&raw const *map).cast_mut().cast());
                let pointers = launch
                    .pointers
                    .iter()
                    .map(|at| (&raw const *at).cast_mut().cast());
                let mut arguments: Vec<*mut c_void> = maps.chain(pointers).collect();
                arguments.push(launch.parameters.as_ptr().cast_mut().cast());
                let [x, y, z] = launch.grid;
                let launched = result::launch_kernel(
                    function.handle(),
                    (x, y, z),
                    (function.threads, 1, 1),
                    function.shared_bytes as u32,
                    stream,
                    &mut arguments,
                );
                driver(DOING, launched)
            });
        let mut graph = std::ptr::null_mut();
        driver(DOING, sys::cuStreamEndCapture(stream, &mut graph).result())?;
        let mut executable = std::ptr::null_mut();
        let made = issued.and_then(|()| {
            let made = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result();
            driver(DOING, made)
        });
        let destroyed = sys::cuGraphDestroy(graph).result();
        made?;
        driver(DOING, destroyed)?;
        Ok(executable)
    }
}

impl MatrixMap<'_> {
    /// The map as the driver wants it.
    fn encode(&self, address: u64) -> Result<sys::CUtensorMap, DriverError> {
        let [rows, columns] = self.shape.map(|size| size as u64);
        let [tile_rows, tile_columns] = self.tile.map(|size| size as u32);
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: all arrays hold what the rank of two asks for, and outlive the call.
        #[allow(unsafe_code)]
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                address as *mut c_void,
                [columns, rows].as_ptr(),
                [columns * 2].as_ptr(),
                [tile_columns, tile_rows].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
        };
        driver("describing a matrix", encoded)?;
        Ok(map)
    }
}
