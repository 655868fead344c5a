//! A fixed sequence of launches, recorded once and replayed as one submission.
//!
//! A launch through cubecl and wgpu takes some 15 us of the host: its scalars go through a staging buffer, its
//! operands into a new bind group. A decode step is the same launches each time, so all of that is done once.
//! [`Recorder`] is a runtime of cubecl whose server takes launches down in place of running them: code that is
//! generic over the runtime is recorded as it is. What changes from step to step must be on the device.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::backend::wgpu::{WgpuDevice, WgpuRuntime};
use cubecl::{
    CubeTask, MemoryUsage, Runtime,
    bytes::Bytes,
    client::ComputeClient,
    future::DynFut,
    ir::TargetProperties,
    prelude::*,
    profile::ProfileDuration,
    server::{
        Binding, ComputeServer, CopyDescriptor, KernelArguments, ProfileError, ProfilingToken,
        ServerCommunication, ServerError, ServerUtilities,
    },
    stream_id::StreamId,
    wgpu::{AutoCompiler, WgpuResource, WgpuServer, WgpuStorage},
    zspace::{Shape, Strides},
};
use cubecl_common::{
    device::{Device, DeviceId, DeviceService, ServerUtilitiesHandle},
    device_handle::DeviceHandle,
};
use cubecl_runtime::{
    allocator::ContiguousMemoryLayoutPolicy,
    config::{CubeClRuntimeConfig, RuntimeConfig, profiling::ProfilingLogLevel},
    logging::ServerLogger,
    memory_management::{ManagedMemoryHandle, MemoryAllocationMode},
    storage::ManagedResource,
};

use super::launch::Buffer;

/// A runtime that records.
#[derive(Debug, Clone)]
pub(super) struct Recorder;

impl Runtime for Recorder {
    type Compiler = AutoCompiler;
    type Server = RecordingServer;
    type Device = WgpuDevice;

    fn client(device: &WgpuDevice) -> ComputeClient<Self> {
        recording_client(device)
    }

    fn name(client: &ComputeClient<Self>) -> &'static str {
        client.info()
    }

    fn max_cube_count() -> (u32, u32, u32) {
        WgpuRuntime::max_cube_count()
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        WgpuRuntime::can_read_tensor(shape, strides)
    }

    fn target_properties() -> TargetProperties {
        WgpuRuntime::target_properties()
    }

    fn enumerate_devices(_type_id: u16, _info: &&'static str) -> Vec<DeviceId> {
        Vec::new()
    }
}

/// One launch.
struct Launch {
    kernel: Box<dyn CubeTask<AutoCompiler>>,
    count: [u32; 3],
    arguments: KernelArguments,
    mode: ExecutionMode,
}

/// What was recorded on one stream.
#[derive(Default)]
struct Recorded {
    launches: Vec<Launch>,
    /// Memory that was allocated, with its size.
    memory: Vec<(ManagedMemoryHandle, u64)>,
}

type Streams = Arc<Mutex<HashMap<StreamId, Recorded>>>;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The server of [`Recorder`].
pub(super) struct RecordingServer {
    utilities: Arc<ServerUtilities<Self>>,
    streams: Streams,
}

impl std::fmt::Debug for RecordingServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RecordingServer")
    }
}

/// A recording has nothing to read, write or wait for.
const NOT_RECORDED: &str = "only launches are recorded";

impl ServerCommunication for RecordingServer {
    const SERVER_COMM_ENABLED: bool = false;
}

impl DeviceService for RecordingServer {
    fn init(_device_id: DeviceId) -> Self {
        unreachable!("`recording_client` makes the server")
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl ComputeServer for RecordingServer {
    type Kernel = Box<dyn CubeTask<AutoCompiler>>;
    /// The runtime's name.
    type Info = &'static str;
    type MemoryLayoutPolicy = ContiguousMemoryLayoutPolicy;
    type Storage = WgpuStorage;

    fn initialize_memory(&mut self, memory: ManagedMemoryHandle, size: u64, stream: StreamId) {
        let mut streams = locked(&self.streams);
        streams
            .entry(stream)
            .or_default()
            .memory
            .push((memory, size));
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn read(
        &mut self,
        _descriptors: Vec<CopyDescriptor>,
        _stream: StreamId,
    ) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        unreachable!("{NOT_RECORDED}")
    }

    fn write(&mut self, _descriptors: Vec<(CopyDescriptor, Bytes)>, _stream: StreamId) {
        unreachable!("{NOT_RECORDED}")
    }

    fn sync(&mut self, _stream: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }

    fn get_resource(
        &mut self,
        _binding: Binding,
        _stream: StreamId,
    ) -> Result<ManagedResource<WgpuResource>, ServerError> {
        unreachable!("{NOT_RECORDED}")
    }

    #[allow(unsafe_code)]
    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        count: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
        stream: StreamId,
    ) {
        let CubeCount::Static(x, y, z) = count else {
            unreachable!("a count that the device finds is not recorded")
        };
        let mut streams = locked(&self.streams);
        streams.entry(stream).or_default().launches.push(Launch {
            kernel,
            count: [x, y, z],
            arguments,
            mode,
        });
    }

    fn flush(&mut self, _stream: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn memory_usage(&mut self, _stream: StreamId) -> Result<MemoryUsage, ServerError> {
        unreachable!("{NOT_RECORDED}")
    }

    fn memory_cleanup(&mut self, _stream: StreamId) {}

    fn start_profile(&mut self, _stream: StreamId) -> Result<ProfilingToken, ServerError> {
        unreachable!("{NOT_RECORDED}")
    }

    fn end_profile(
        &mut self,
        _stream: StreamId,
        _token: ProfilingToken,
    ) -> Result<ProfileDuration, ProfileError> {
        unreachable!("{NOT_RECORDED}")
    }

    fn allocation_mode(&mut self, _mode: MemoryAllocationMode, _stream: StreamId) {}
}

/// Recorders of the devices, and what each has recorded.
type Clients = Vec<(WgpuDevice, ComputeClient<Recorder>, Streams)>;

static CLIENTS: Mutex<Clients> = Mutex::new(Vec::new());

fn client_and_streams(device: &WgpuDevice) -> (ComputeClient<Recorder>, Streams) {
    let mut clients = locked(&CLIENTS);
    if let Some((_, client, streams)) = clients.iter().find(|(of, ..)| of == device) {
        return (client.clone(), streams.clone());
    }
    let real = WgpuRuntime::client(device);
    let properties = real.properties().clone();
    let policy = ContiguousMemoryLayoutPolicy::new(properties.memory.alignment as usize);
    let logger = Arc::new(ServerLogger::default());
    let name = WgpuRuntime::name(&real);
    let streams = Streams::default();
    let server = RecordingServer {
        utilities: Arc::new(ServerUtilities::new(properties, logger, name, policy)),
        streams: streams.clone(),
    };
    let client = ComputeClient::<Recorder>::init(device, server);
    clients.push((device.clone(), client.clone(), streams.clone()));
    (client, streams)
}

/// The client of a device's recorder.
pub(super) fn recording_client(device: &WgpuDevice) -> ComputeClient<Recorder> {
    client_and_streams(device).0
}

/// Whether the device's launches can be replayed: its kernels are SPIR-V. A profiler sees only what is launched.
pub(super) fn can_record(client: &ComputeClient<WgpuRuntime>) -> bool {
    let level = CubeClRuntimeConfig::get().profiling.logger.level;
    WgpuRuntime::name(client) == "wgpu<spirv>" && matches!(level, ProfilingLogLevel::Disabled)
}

/// The same buffer for a recording.
pub(super) fn to_recorder(
    buffer: &Buffer<WgpuRuntime>,
    client: &ComputeClient<Recorder>,
) -> Buffer<Recorder> {
    Buffer {
        client: client.clone(),
        handle: buffer.handle.clone(),
        meta: buffer.meta.clone(),
        device: buffer.device.clone(),
        dtype: buffer.dtype,
        qparams: None,
    }
}

/// The buffer of a recording on its device: after the recording has ended.
pub(super) fn to_device(
    buffer: &Buffer<Recorder>,
    client: &ComputeClient<WgpuRuntime>,
) -> Buffer<WgpuRuntime> {
    Buffer {
        client: client.clone(),
        handle: buffer.handle.clone(),
        meta: buffer.meta.clone(),
        device: buffer.device.clone(),
        dtype: buffer.dtype,
        qparams: None,
    }
}

/// One launch, all operands bound.
struct Step {
    pipeline: Arc<wgpu::ComputePipeline>,
    bind_group: wgpu::BindGroup,
    count: [u32; 3],
}

/// A recorded sequence.
pub(super) struct Replay {
    steps: Vec<Step>,
    device: wgpu::Device,
    queue: wgpu::Queue,
    /// Memory of what was recorded.
    _memory: Vec<ManagedMemoryHandle>,
}

/// Pipelines by device and kernel: recordings come again for every answer.
type Pipelines = HashMap<(DeviceId, KernelId), Arc<wgpu::ComputePipeline>>;

static PIPELINES: Mutex<Option<Pipelines>> = Mutex::new(None);

/// Bytes that a bound part of a buffer may begin at multiples of, on every device.
const ALIGNMENT: usize = 256;

/// Records what `work` launches through [`Recorder`] on this thread; nothing runs yet.
///
/// # Errors
/// A kernel that does not compile, or memory that is not to be had.
pub(super) fn record<T>(
    device: &WgpuDevice,
    (wgpu_device, queue): (wgpu::Device, wgpu::Queue),
    work: impl FnOnce(&ComputeClient<Recorder>) -> T,
) -> Result<(T, Replay), String> {
    let (client, streams) = client_and_streams(device);
    let stream = StreamId::current();
    locked(&streams).remove(&stream);
    let output = work(&client);
    // Waits until all has arrived.
    client.flush().map_err(|error| error.to_string())?;
    let recorded = locked(&streams).remove(&stream).unwrap_or_default();
    let server = DeviceHandle::<WgpuServer>::new(device.to_id());
    let id = device.to_id();
    let of_device = wgpu_device.clone();
    let built =
        server.submit_blocking(move |server| build(server, &of_device, id, recorded, stream));
    let (steps, memory) = built.map_err(|_| "the device's thread has ended".to_string())??;
    let replay = Replay {
        steps,
        device: wgpu_device,
        queue,
        _memory: memory,
    };
    Ok((output, replay))
}

/// Pipelines, scalars and bind groups of a recording.
fn build(
    server: &mut WgpuServer,
    device: &wgpu::Device,
    id: DeviceId,
    recorded: Recorded,
    stream: StreamId,
) -> Result<(Vec<Step>, Vec<ManagedMemoryHandle>), String> {
    let Recorded { launches, memory } = recorded;
    for (handle, size) in &memory {
        server.initialize_memory(handle.clone(), *size, stream);
    }
    // Scalars of all launches, one after the other.
    let mut scalars: Vec<u8> = Vec::new();
    let places: Vec<(usize, usize)> = launches
        .iter()
        .map(|launch| {
            let own: &[u8] = bytemuck::cast_slice(&launch.arguments.info.data);
            let start = scalars.len().next_multiple_of(ALIGNMENT);
            scalars.resize(start, 0);
            scalars.extend_from_slice(own);
            (start, own.len())
        })
        .collect();
    let held = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("scalars of a recording"),
        size: (scalars.len().next_multiple_of(ALIGNMENT).max(ALIGNMENT)) as u64,
        usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::STORAGE,
        mapped_at_creation: true,
    });
    {
        let mut view = held.get_mapped_range_mut(..);
        view.slice(..scalars.len()).copy_from_slice(&scalars);
    }
    held.unmap();
    let mut steps = Vec::with_capacity(launches.len());
    for (launch, (start, length)) in launches.into_iter().zip(places) {
        let Launch {
            kernel,
            count,
            mut arguments,
            mode,
        } = launch;
        let pipeline = pipeline(server, id, kernel, &arguments, mode)?;
        let resources = mem::take(&mut arguments.buffers)
            .into_iter()
            .map(|binding| server.get_resource(binding, stream))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| error.to_string())?;
        let of_scalars = wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &held,
            offset: start as u64,
            size: std::num::NonZeroU64::new(length as u64),
        });
        let operands = resources
            .iter()
            .map(|resource| resource.resource().as_wgpu_bind_resource())
            .chain((length > 0).then_some(of_scalars));
        let entries: Vec<_> = operands
            .enumerate()
            .map(|(binding, resource)| wgpu::BindGroupEntry {
                binding: binding as u32,
                resource,
            })
            .collect();
        let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        steps.push(Step {
            pipeline,
            bind_group,
            count,
        });
    }
    Ok((
        steps,
        memory.into_iter().map(|(handle, _)| handle).collect(),
    ))
}

fn pipeline(
    server: &mut WgpuServer,
    device: DeviceId,
    kernel: Box<dyn CubeTask<AutoCompiler>>,
    arguments: &KernelArguments,
    mode: ExecutionMode,
) -> Result<Arc<wgpu::ComputePipeline>, String> {
    let mut id = kernel.id();
    id.mode(mode);
    let key = (device, id.clone());
    if let Some(known) = locked(&PIPELINES).get_or_insert_default().get(&key) {
        return Ok(known.clone());
    }
    let cached = server
        .load_cached_pipeline(&id, arguments, mode)
        .map_err(|error| error.to_string())?;
    let made = match cached {
        Some(Ok(pipeline)) => pipeline,
        _ => {
            let mut compiler = AutoCompiler::SpirV(Default::default());
            let compiled = compiler
                .compile(server, kernel, mode)
                .map_err(|error| error.to_string())?;
            let code = compiled.repr.as_ref().map(|code| code.as_ref());
            let module = server
                .create_module(&compiled.entrypoint_name, code, &compiled.source, mode)
                .map_err(|error| error.to_string())?;
            server.create_pipeline(&compiled.entrypoint_name, code, module, arguments)
        }
    };
    locked(&PIPELINES)
        .get_or_insert_default()
        .insert(key, made.clone());
    Ok(made)
}

impl Replay {
    /// Queues all launches. Work that cubecl has not submitted yet comes after them.
    pub(super) fn run(&self) {
        let mut encoder = self.device.create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            for step in &self.steps {
                let [x, y, z] = step.count;
                pass.set_pipeline(&step.pipeline);
                pass.set_bind_group(0, &step.bind_group, &[]);
                pass.dispatch_workgroups(x, y, z);
            }
        }
        self.queue.submit([encoder.finish()]);
    }

    /// Writes into a buffer of the recording before the next run.
    pub(super) fn write(&self, to: &WgpuResource, bytes: &[u8]) {
        self.queue.write_buffer(&to.buffer, to.offset, bytes);
    }
}

/// Where a buffer is on the device.
///
/// # Errors
/// What cubecl says.
pub(super) fn resource(
    buffer: &Buffer<WgpuRuntime>,
) -> Result<ManagedResource<WgpuResource>, String> {
    let resource = buffer.client.get_resource(buffer.handle.clone());
    resource.map_err(|error| error.to_string())
}
