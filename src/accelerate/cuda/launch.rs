//! Launches this crate's CUDA C++ kernels on cubecl's stream, over the buffers of Burn's tensors.
//!
//! NVRTC compiles a source the first time a configuration is used; cubecl keeps the result in
//! memory and on disk under a key that holds the configuration and a hash of the source.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{Hash, Hasher},
    sync::{LazyLock, Mutex},
};

use burn::tensor::{DType, Tensor, TensorData, TensorPrimitive};
use burn_cubecl::tensor::CubeTensor;
use cubecl::{
    CompilationError, CubeTask,
    client::ComputeClient,
    prelude::*,
    server::{
        CopyDescriptor, KernelArguments, MetadataBindingInfo, TensorMapBinding, TensorMapMeta,
    },
    zspace::metadata::Metadata,
};
use cubecl_cpp::shared::{Body, ComputeKernel, Elem, Flags, Item, SharedMemory};
use cubecl_cuda::{CudaCompiler, CudaRuntime};

use sha2::{Digest, Sha256};

use super::{compiled, operand::Operand, poison, recording};
use crate::ops::Reading;

pub(crate) type Backend = burn::backend::Cuda;
pub(crate) type Buffer = CubeTensor<CudaRuntime>;
pub(super) type Client = ComputeClient<CudaRuntime>;
type Dialect = cubecl_cpp::cuda::CudaDialect<cubecl_cpp::cuda::mma::CudaWmmaCompiler>;

/// Values a source is compiled with: `#define NAME VALUE`.
pub(super) type Defines = Vec<(&'static str, i64)>;

/// One configuration of a kernel, cheap to make: its source is joined at the first use.
#[derive(Debug, Clone, Eq)]
pub(super) struct Kernel {
    name: &'static str,
    sources: &'static [&'static str],
    defines: Defines,
    /// The macro that names the entry point in the sources.
    entry_macro: &'static str,
    threads: u32,
    shared_bytes: usize,
}

impl Kernel {
    /// A kernel of `sources`, whose entry point is called `ENTRY` there.
    pub(super) fn new(
        name: &'static str,
        sources: &'static [&'static str],
        defines: Defines,
        threads: u32,
    ) -> Self {
        Self {
            name,
            sources,
            defines,
            entry_macro: "ENTRY",
            threads,
            shared_bytes: 0,
        }
    }

    /// One more value to compile with.
    pub(super) fn with_define(mut self, name: &'static str, value: i64) -> Self {
        self.defines.push((name, value));
        self
    }

    /// Dynamic shared memory.
    pub(super) fn with_shared(mut self, bytes: usize) -> Self {
        self.shared_bytes = bytes;
        self
    }

    /// Another name for the entry point in the sources.
    pub(super) fn with_entry_macro(mut self, name: &'static str) -> Self {
        self.entry_macro = name;
        self
    }

    /// Name of the compiled entry point: the kernel's and its configuration's.
    pub(super) fn entry(&self) -> &'static str {
        &self.identity().entry
    }

    /// The key that identifies this configuration, built once.
    pub(super) fn identity(&self) -> &'static Identity {
        static KNOWN: LazyLock<Mutex<HashMap<Kernel, &'static Identity>>> =
            LazyLock::new(Mutex::default);
        let mut known = KNOWN.lock().unwrap_or_else(|lock| lock.into_inner());
        if let Some(identity) = known.get(self) {
            return identity;
        }
        let mut entry = self.name.to_string();
        for (_, value) in &self.defines {
            entry.push('_');
            entry.push_str(&value.to_string());
        }
        let mut hasher = Sha256::new();
        hasher.update(self.text(&entry));
        hasher.update(compiled::toolchain());
        let digest = hasher.finalize();
        // One for each configuration of the program; they are used as long as it runs.
        let identity: &'static Identity = Box::leak(Box::new(Identity {
            id: known.len() as u32,
            entry,
            digest: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        }));
        known.insert(self.clone(), identity);
        identity
    }

    /// Threads of a block.
    pub(super) fn threads(&self) -> u32 {
        self.threads
    }

    /// Dynamic shared memory of a block.
    pub(super) fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }

    /// The whole text that is compiled.
    pub(super) fn source(&self) -> String {
        self.text(self.entry())
    }

    fn text(&self, entry: &str) -> String {
        let mut text = format!("#define {} {entry}\n", self.entry_macro);
        for (name, value) in &self.defines {
            text.push_str(&format!("#define {name} {value}\n"));
        }
        for source in self.sources {
            text.push_str(source);
            text.push('\n');
        }
        text
    }
}

impl PartialEq for Kernel {
    fn eq(&self, other: &Self) -> bool {
        // Texts of tens of kilobytes are compared only where they are not the same constant.
        (self.name, self.entry_macro) == (other.name, other.entry_macro)
            && (self.threads, self.shared_bytes) == (other.threads, other.shared_bytes)
            && self.defines == other.defines
            && (std::ptr::eq(self.sources, other.sources) || self.sources == other.sources)
    }
}

impl Hash for Kernel {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // The sources are compared in `eq` only: every launch hashes.
        (self.name, self.threads, self.shared_bytes).hash(state);
        self.defines.hash(state);
    }
}

/// The key of a kernel's configuration.
#[derive(Debug)]
pub(super) struct Identity {
    /// In this process.
    pub id: u32,
    /// Name of the entry point.
    pub entry: String,
    /// Anywhere: SHA-256 of the text and of the versions of compiler and driver.
    pub digest: String,
}

/// What cubecl's server gets.
struct Task(Kernel);

impl KernelMetadata for Task {
    fn name(&self) -> &'static str {
        self.0.name
    }

    fn id(&self) -> KernelId {
        let kernel = &self.0;
        KernelId::new::<Self>()
            .cube_dim(CubeDim::new_1d(kernel.threads))
            .info((kernel.name, kernel.shared_bytes, &*kernel.identity().digest))
    }

    fn address_type(&self) -> StorageType {
        u32::as_type_native_unchecked().storage_type()
    }
}

impl CubeTask<CudaCompiler> for Task {
    fn compile(
        &self,
        _compiler: &mut CudaCompiler,
        _options: &<CudaCompiler as cubecl::Compiler>::CompilationOptions,
        _mode: ExecutionMode,
        _address_type: StorageType,
    ) -> Result<CompiledKernel<CudaCompiler>, CompilationError> {
        let kernel = &self.0;
        let cube_dim = CubeDim::new_1d(kernel.threads);
        // The server reads the dynamic shared memory off the declared arrays, so one is declared.
        let bytes = Item::scalar(Elem::<Dialect>::U8, true);
        let shared_memories = (kernel.shared_bytes > 0)
            .then(|| SharedMemory::new_array(0, bytes, kernel.shared_bytes, 128))
            .into_iter()
            .collect();
        let repr = ComputeKernel::<Dialect> {
            tensor_maps: vec![],
            buffers: vec![],
            scalars: vec![],
            info: Default::default(),
            meta_static_len: 0,
            body: Body {
                instructions: vec![],
                shared_memories,
                pipelines: vec![],
                barriers: vec![],
                const_arrays: vec![],
                local_arrays: vec![],
                info_by_ptr: false,
                has_dynamic_meta: false,
                address_type: Item::scalar(Elem::U32, true),
            },
            cube_dim,
            cluster_dim: None,
            extensions: vec![],
            flags: Flags::default(),
            items: HashSet::new(),
            kernel_name: kernel.entry().to_string(),
        };
        Ok(CompiledKernel {
            entrypoint_name: kernel.entry().to_string(),
            debug_name: Some(kernel.name),
            source: kernel.source(),
            cube_dim,
            debug_info: None,
            repr: Some(repr),
        })
    }
}

/// Parameters passed by value after the pointers: one struct of 64-bit fields.
pub(super) type Parameters = Vec<u64>;

/// A float as a parameter field.
pub(super) fn float_bits(value: f64) -> u64 {
    u64::from((value as f32).to_bits())
}

/// Launches on the stream of the operands' device.
pub(super) fn launch(
    client: &Client,
    kernel: Kernel,
    grid: [usize; 3],
    operands: &[Operand<'_>],
    parameters: Parameters,
) {
    launch_with_maps(client, kernel, grid, &[], operands, parameters);
}

/// A row-major bf16 matrix that a kernel copies tile by tile into 128-byte swizzled shared memory; elements
/// outside read as zero.
#[derive(Debug, Clone, Copy)]
pub(super) struct MatrixMap<'a> {
    pub(super) operand: Operand<'a>,
    /// Rows and columns.
    pub(super) shape: [usize; 2],
    /// Rows and columns of a tile.
    pub(super) tile: [usize; 2],
}

impl<'a> MatrixMap<'a> {
    /// A whole matrix, cut into tiles of rows and columns.
    #[track_caller]
    pub(super) fn new(buffer: &'a Buffer, shape: [usize; 2], tile: [usize; 2]) -> Self {
        Self {
            operand: Operand::contiguous(buffer, DType::BF16, shape),
            shape,
            tile,
        }
    }

    fn binding(&self) -> TensorMapBinding {
        let [rows, columns] = self.shape;
        let [tile_rows, tile_columns] = self.tile;
        TensorMapBinding {
            binding: self.operand.buffer().handle.clone().binding(),
            map: TensorMapMeta {
                format: TensorMapFormat::Tiled(TiledArgs {
                    tile_size: [tile_rows, tile_columns].into(),
                }),
                metadata: Metadata::new([rows, columns], [columns, 1]),
                elem_stride: [1usize, 1].into(),
                interleave: TensorMapInterleave::None,
                swizzle: TensorMapSwizzle::B128,
                prefetch: TensorMapPrefetch::B256,
                oob_fill: OobFill::Zero,
                storage_ty: half::bf16::as_type_native_unchecked().storage_type(),
            },
        }
    }
}

/// [`launch`] with tensor maps: they come first, then their buffers' pointers, then `operands`.
///
/// # Panics
/// If the operands are on several devices.
pub(super) fn launch_with_maps(
    client: &Client,
    kernel: Kernel,
    grid: [usize; 3],
    maps: &[MatrixMap<'_>],
    operands: &[Operand<'_>],
    parameters: Parameters,
) {
    let all = maps.iter().map(|map| &map.operand).chain(operands);
    let mut devices = all.map(|operand| operand.buffer().device.index);
    let first = devices.next();
    assert!(
        devices.all(|device| Some(device) == first),
        "operands of {} on several devices",
        kernel.name
    );
    let buffers: Vec<&Buffer> = operands.iter().map(Operand::buffer).collect();
    if recording::take(&kernel, grid, maps, &buffers, &parameters) {
        return;
    }
    let bindings = buffers
        .iter()
        .map(|buffer| buffer.handle.clone().binding())
        .collect();
    // With the dynamic part declared to begin at the end, the server passes the data by value only.
    let length = parameters.len();
    let arguments = KernelArguments::new()
        .with_tensor_maps(maps.iter().map(MatrixMap::binding).collect())
        .with_buffers(bindings)
        .with_info(MetadataBindingInfo::new(parameters, length));
    let [x, y, z] = grid.map(|size| size as u32);
    // SAFETY: `Operand` has checked type, shape, layout and length of every buffer against what the
    // kernel's header names; the grid and the sizes among the parameters come from the same shapes.
    #[allow(unsafe_code)]
    unsafe {
        client.launch_unchecked(
            Box::new(Task(kernel)),
            CubeCount::Static(x, y, z),
            arguments,
        );
    }
}

/// The buffer of a tensor, with any strides.
pub(crate) fn strided<const D: usize>(tensor: Tensor<Backend, D>) -> Buffer {
    tensor.into_primitive().tensor()
}

/// The buffer of a tensor, copied if it is not contiguous.
pub(crate) fn contiguous<const D: usize>(tensor: Tensor<Backend, D>) -> Buffer {
    burn_cubecl::kernel::into_contiguous(strided(tensor))
}

/// A tensor over a buffer.
pub(crate) fn tensor<const D: usize>(buffer: Buffer) -> Tensor<Backend, D> {
    Tensor::from_primitive(TensorPrimitive::Float(buffer))
}

/// The device's free memory, in bytes.
pub(super) fn free_memory(device: &burn::backend::cuda::CudaDevice) -> Option<u64> {
    let one = strided(Tensor::<Backend, 1>::empty([1], device));
    // The device's context is current on its own thread only.
    let info = one.client.exclusive(cudarc::driver::result::mem_get_info);
    let (free, _) = info.ok()?.ok()?;
    Some(free as u64)
}

/// The client of a buffer's device, leaked for the program's lifetime: a running copy borrows it.
fn lasting_client(buffer: &Buffer) -> &'static Client {
    static CLIENTS: Mutex<BTreeMap<usize, &'static Client>> = Mutex::new(BTreeMap::new());
    let mut clients = CLIENTS.lock().unwrap_or_else(|lock| lock.into_inner());
    clients
        .entry(buffer.device.index)
        .or_insert_with(|| Box::leak(Box::new(buffer.client.clone())))
}

/// Copies values to the host after all work so far (async read); nothing waits before the result is called.
pub(super) fn read_async(x: Tensor<Backend, 1>) -> Reading {
    let buffer = contiguous(x);
    let descriptor = CopyDescriptor::new(
        buffer.handle.clone().binding(),
        buffer.meta.shape().clone(),
        buffer.meta.strides().clone(),
        buffer.dtype.size(),
    );
    let (shape, dtype) = (buffer.meta.shape().clone(), buffer.dtype);
    let copied = lasting_client(&buffer).read_one_tensor_async(descriptor);
    Box::new(move || {
        let bytes = cubecl::future::block_on(copied).expect("the device copies to the host");
        TensorData::from_bytes(bytes, shape, dtype)
            .iter::<f32>()
            .collect()
    })
}

/// A new contiguous buffer, not initialised.
pub(crate) fn empty<const D: usize>(like: &Buffer, shape: [usize; D], dtype: DType) -> Buffer {
    let buffer = recording::reserve(like, &shape, dtype).unwrap_or_else(|| {
        burn_cubecl::ops::numeric::empty_device_contiguous_dtype(
            like.client.clone(),
            like.device.clone(),
            shape.into(),
            dtype,
        )
    });
    poison::fill(&buffer);
    buffer
}
