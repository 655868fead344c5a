//! Launches this crate's CUDA C++ kernels on cubecl's stream, over the buffers of Burn's tensors.

use std::collections::HashSet;

use burn::tensor::DType;
use cubecl::{
    CompilationError, CubeTask,
    prelude::*,
    server::{KernelArguments, MetadataBindingInfo},
};
use cubecl_cpp::shared::{Body, ComputeKernel, Elem, Flags, Item, SharedMemory};
use cubecl_cuda::CudaCompiler;

pub(crate) use super::buffer::{Backend, Buffer, contiguous, strided, tensor};
pub(super) use super::{
    buffer::{Client, free_memory, read_async},
    kernel::{Defines, Kernel},
    operand::MatrixMap,
};
use super::{operand::Operand, poison, recording};

type Dialect = cubecl_cpp::cuda::CudaDialect<cubecl_cpp::cuda::mma::CudaWmmaCompiler>;

/// What cubecl's server gets.
struct Task(Kernel);

impl KernelMetadata for Task {
    fn name(&self) -> &'static str {
        self.0.name
    }

    fn id(&self) -> KernelId {
        let kernel = &self.0;
        KernelId::new::<Self>()
            .cube_dim(CubeDim::new_1d(kernel.threads()))
            .info((
                kernel.name,
                kernel.shared_bytes(),
                &*kernel.identity().digest,
            ))
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
        let cube_dim = CubeDim::new_1d(kernel.threads());
        // The server reads the dynamic shared memory off the declared arrays, so one is declared.
        let bytes = Item::scalar(Elem::<Dialect>::U8, true);
        let shared_memories = (kernel.shared_bytes() > 0)
            .then(|| SharedMemory::new_array(0, bytes, kernel.shared_bytes(), 128))
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
    fill(&buffer);
    buffer
}

/// Fills a fresh buffer, where [`poison`] is on.
fn fill(buffer: &Buffer) {
    let elements = buffer.meta.shape().num_elements();
    if elements == 0 || !poison::is_on() {
        return;
    }
    let bytes = elements * buffer.dtype.size();
    let kernel = Kernel::new("poison", &[include_str!("poison.cu")], Vec::new(), 256);
    launch(
        &buffer.client,
        kernel,
        [bytes.div_ceil(256 * 16), 1, 1],
        &[Operand::fresh(buffer)],
        vec![bytes as u64],
    );
}
