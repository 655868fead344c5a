//! A fixed sequence of launches, recorded once and replayed as one CUDA graph.
//!
//! What a closure launches through [`super::launch`] is either watched as it runs, so that its kernels
//! can be compiled ahead ([`watch`]), or recorded in place of running ([`record`]). Buffers of a
//! recorded run come from a pool of its own and are reused as soon as nothing holds them, so a
//! graph keeps as much memory as the run needs at its peak. Operations of Burn's own cannot be
//! recorded: compare a recording with the launched run before using it.

use std::{cell::RefCell, collections::BTreeMap, ffi::c_void};

use burn::tensor::DType;
use cudarc::driver::sys;

use super::{
    buffer::Buffer,
    driver::{Context, DriverError, driver},
    kernel::Kernel,
    module::{architecture, load},
    operand::MatrixMap,
    stream::{PinnedMemory, Repeated, Step, Stream},
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
    /// Buffers it only reads, weights and anything made before, by address.
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

/// Runs `work` and returns the kernels it launched, each once.
pub(super) fn watch<R>(work: impl FnOnce() -> R) -> (R, Vec<Kernel>) {
    let (output, mode) = within(Mode::Watch(Vec::new()), work);
    match mode {
        Some(Mode::Watch(kernels)) => (output, kernels),
        _ => (output, Vec::new()),
    }
}

/// Records what `work` launches in place of running it. The tensors that `work` returns are in the graph's own
/// memory and valid after each replay; the graph has room for an input of `input_bytes`.
///
/// # Errors
/// The driver's error.
pub(super) fn record<R>(
    device: usize,
    input_bytes: usize,
    work: impl FnOnce() -> R,
) -> Result<(R, Graph), DriverError> {
    // This thread encodes tensor maps, which needs the device's context.
    Context::of(device)?.enter()?;
    let (output, mode) = within(Mode::Record(Recorder::default()), work);
    let Some(Mode::Record(recorder)) = mode else {
        unreachable!("`within` returns the mode it was passed");
    };
    if let Some(error) = recorder.error {
        return Err(error);
    }
    let graph = Graph::new(device, recorder, input_bytes)?;
    Ok((output, graph))
}

/// Adds a launch to the list or the recording; returns whether it is recorded and must not run.
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
            if !kernels.contains(kernel) {
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

/// A buffer from the pool of the current recording, `None` without one.
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
    /// The address of a buffer, which stays valid as long as the recording lives.
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
            let address = self.hold(map.operand.buffer())?;
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
                // Synchronises: only an allocated handle has a correct reference count.
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

/// A recorded run on a stream of its own, with page-locked memory for its input.
pub(super) struct Graph {
    repeated: Repeated,
    stream: Stream,
    context: Context,
    input: PinnedMemory,
    _kept: Vec<Buffer>,
}

impl Graph {
    fn new(device: usize, recorder: Recorder, input_bytes: usize) -> Result<Self, DriverError> {
        let context = Context::of(device)?;
        context.enter()?;
        let arch = architecture(device);
        let steps = recorder
            .launches
            .into_iter()
            .map(|launch| {
                Ok(Step {
                    early: false,
                    function: load(&launch.kernel, device, &arch)?,
                    grid: launch.grid,
                    maps: launch.maps,
                    pointers: launch.pointers,
                    parameters: launch.parameters,
                })
            })
            .collect::<Result<Vec<_>, DriverError>>()?;
        let stream = Stream::new(context)?;
        let pool = recorder.pool.into_iter().map(|(_, buffer)| buffer);
        Ok(Self {
            repeated: Repeated::new(&stream, steps),
            stream,
            context,
            input: PinnedMemory::new(context, input_bytes)?,
            _kept: pool.chain(recorder.read.into_values()).collect(),
        })
    }

    /// Has `fill` write the input, copies it to a device address and starts the run after it; does not
    /// wait for the run.
    ///
    /// # Safety
    /// `to` has room for the input.
    ///
    /// # Errors
    /// The driver's error.
    #[allow(unsafe_code)]
    pub(super) unsafe fn start(
        &mut self,
        to: u64,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), DriverError> {
        self.context.enter()?;
        // An earlier input that was never waited for may still be in flight.
        self.stream.wait()?;
        // SAFETY: the stream is idle; there is room for the input, as the caller guarantees.
        unsafe {
            let input = self.input.bytes_mut();
            fill(input);
            self.stream.send(to, input)?;
        }
        self.repeated.run(&self.stream)
    }

    /// Copies results elsewhere on the device, `(from, to, bytes)` each, and waits for all of it.
    ///
    /// # Safety
    /// The addresses are those of live buffers of these sizes, which nothing else uses meanwhile.
    ///
    /// # Errors
    /// The driver's error.
    #[allow(unsafe_code)]
    pub(super) unsafe fn finish(&self, copies: &[(u64, u64, usize)]) -> Result<(), DriverError> {
        self.context.enter()?;
        for (from, to, bytes) in copies {
            // SAFETY: as the caller guarantees.
            unsafe { self.stream.copy(*to, *from, *bytes)? };
        }
        self.stream.wait()
    }
}

impl MatrixMap<'_> {
    /// The tensor map as the driver encodes it.
    fn encode(&self, address: u64) -> Result<sys::CUtensorMap, DriverError> {
        let [rows, columns] = self.shape.map(|size| size as u64);
        let [tile_rows, tile_columns] = self.tile.map(|size| size as u32);
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: all arrays have the length that a rank of two needs, and outlive the call.
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
