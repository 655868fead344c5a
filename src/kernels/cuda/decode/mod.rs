//! Decoding behind a prefilled cache: a whole step as one captured graph over Burn's buffers.
//!
//! A layer is five to seven launches: norm + QKV; head norms + rotation + cache; attention; output +
//! residual; norm + gate/up + SwiGLU; down + residual. Tokens, positions and lengths live on the
//! device and the likeliest token is picked there, so that the next step can start before the host
//! has seen the last.

mod plan;

use std::ffi::c_void;

use burn::{prelude::*, tensor::DType};
use cudarc::driver::{result, sys};

use super::{
    launch::{Backend, Buffer, Client, contiguous, empty, strided},
    module::{DriverError, driver},
};
use crate::{
    kernels::{DecodeStart, Decoder},
    qwen3_vl::{Qwen3Vl, cache::KeyValueCache, config::Qwen3VlConfig, nn::Linear},
};
use plan::{Plan, Step};

/// Most sequences of one batch.
const LARGEST_BATCH: usize = 64;

/// Steps whose tokens the ring in the host's memory holds.
const RING: usize = 8;

/// Steps queued at once: the one waited for and the next.
const AHEAD: usize = 2;

/// A stream, a captured step and all it reads and writes.
struct Engine {
    context: sys::CUcontext,
    stream: sys::CUstream,
    graph: Option<sys::CUgraphExec>,
    events: Vec<sys::CUevent>,
    plan: Plan,
    ring: *mut i32,
    rows: usize,
    vocab: usize,
    launched: usize,
    read: usize,
    most: usize,
}

// SAFETY: the handles belong to this engine alone; every call makes the context current first.
#[allow(unsafe_code)]
unsafe impl Send for Engine {}

/// Whether the model's text layers are plain bf16 matrices of shapes the kernels know.
fn covers(model: &Qwen3Vl<Backend>, config: &Qwen3VlConfig, rows: usize) -> bool {
    let text = &config.text_config;
    let plain = |linear: &Linear<Backend>| {
        linear.lora.is_none() && linear.bias.is_none() && linear.weight.val().dtype() == DType::BF16
    };
    let widths = [
        text.hidden_size,
        text.intermediate_size,
        text.vocab_size,
        text.head_dim * text.num_attention_heads,
        text.head_dim * text.num_key_value_heads,
    ];
    // Vectors of eight and four rows for one sequence, tiles of 16 rows and 32 columns for several.
    let unit = if rows == 1 { 8 } else { 32 };
    let group = text.num_attention_heads / text.num_key_value_heads;
    (1..=LARGEST_BATCH).contains(&rows)
        && widths.iter().all(|width| {
            width.is_multiple_of(unit) || (*width == text.vocab_size && width.is_multiple_of(16))
        })
        && text.head_dim.is_multiple_of(8)
        && (16..=128).contains(&text.head_dim)
        && (1..=8).contains(&group)
        && super::rows::covers(text.hidden_size, DType::BF16)
        && model.lm_head.as_ref().is_none_or(plain)
        && model.model.language_model.layers.iter().all(|layer| {
            let (attn, mlp) = (&layer.self_attn, &layer.mlp);
            [&attn.q_proj, &attn.k_proj, &attn.v_proj, &attn.o_proj]
                .into_iter()
                .chain([&mlp.gate_proj, &mlp.up_proj, &mlp.down_proj])
                .all(plain)
        })
}

/// The engine for a prefilled cache; `None` where the kernels do not cover the model.
pub(super) fn start(
    model: &Qwen3Vl<Backend>,
    config: &Qwen3VlConfig,
    cache: &KeyValueCache<Backend>,
    start: &DecodeStart,
) -> Option<Box<dyn Decoder>> {
    let rows = start.tokens.len();
    let room = cache
        .capacity()
        .is_some_and(|capacity| cache.len() + start.most_steps + AHEAD < capacity);
    if !room || !covers(model, config, rows) {
        return None;
    }
    let client = strided(model.model.language_model.norm.weight.val()).client;
    let _ = cubecl_common::future::block_on(client.sync());
    match Engine::new(model, config, cache, start, &client) {
        Ok(engine) => Some(Box::new(engine)),
        Err(error) => {
            log::warn!("decoding without the captured step: {error}");
            None
        }
    }
}

impl Engine {
    fn new(
        model: &Qwen3Vl<Backend>,
        config: &Qwen3VlConfig,
        cache: &KeyValueCache<Backend>,
        start: &DecodeStart,
        client: &Client,
    ) -> Result<Self, DriverError> {
        let rows = start.tokens.len();
        let vocab = config.text_config.vocab_size;
        let like = strided(model.model.language_model.norm.weight.val());
        let device = like.device.index;
        // SAFETY: plain driver calls; every handle is checked and kept until `drop`.
        #[allow(unsafe_code)]
        unsafe {
            driver("starting the driver", result::init())?;
            let number = driver("finding the device", result::device::get(device as i32))?;
            let context = driver("opening the device", result::primary_ctx::retain(number))?;
            driver("choosing the device", result::ctx::set_current(context))?;
            let kind = result::stream::StreamKind::NonBlocking;
            let stream = driver("making a stream", result::stream::create(kind))?;
            let mut ring: *mut c_void = std::ptr::null_mut();
            let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
            let bytes = RING * rows * size_of::<i32>();
            driver(
                "taking memory for tokens",
                sys::cuMemHostAlloc(&mut ring, bytes, flags).result(),
            )?;
            let mut events = Vec::new();
            for _ in 0..RING {
                let mut event = std::ptr::null_mut();
                let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                driver(
                    "making an event",
                    sys::cuEventCreate(&mut event, flags).result(),
                )?;
                events.push(event);
            }
            let plan = Plan::new(
                model,
                config,
                cache,
                start,
                client,
                &like,
                ring as u64,
                RING,
            )?;
            let mut engine = Self {
                context,
                stream,
                graph: None,
                events,
                plan,
                ring: ring.cast(),
                rows,
                vocab,
                launched: 0,
                read: 0,
                most: start.most_steps,
            };
            engine.graph = match engine.capture() {
                Ok(graph) => Some(graph),
                Err(error) => {
                    log::warn!("the decode step is launched kernel by kernel: {error}");
                    None
                }
            };
            Ok(engine)
        }
    }

    /// Records the step's launches without running them.
    #[allow(unsafe_code)]
    unsafe fn capture(&self) -> Result<sys::CUgraphExec, DriverError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: as for `new`; the stream is idle and ours.
        unsafe {
            driver(
                "recording the step",
                sys::cuStreamBeginCapture_v2(self.stream, mode).result(),
            )?;
            let issued = self.issue();
            let mut graph = std::ptr::null_mut();
            driver(
                "recording the step",
                sys::cuStreamEndCapture(self.stream, &mut graph).result(),
            )?;
            issued?;
            let mut executable = std::ptr::null_mut();
            let made = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result();
            let destroyed = sys::cuGraphDestroy(graph).result();
            driver("making the step's graph", made)?;
            driver("making the step's graph", destroyed)?;
            Ok(executable)
        }
    }

    /// Launches the step's kernels one by one.
    fn issue(&self) -> Result<(), DriverError> {
        for step in &self.plan.steps {
            let Step {
                function,
                grid,
                pointers,
                parameters,
            } = step;
            let mut arguments: Vec<*mut c_void> = pointers
                .iter()
                .map(|pointer| (pointer as *const u64).cast_mut().cast())
                .collect();
            arguments.push(parameters.as_ptr().cast_mut().cast());
            // SAFETY: the plan gives each kernel the pointers and parameters its header names.
            #[allow(unsafe_code)]
            let launched = unsafe {
                result::launch_kernel(
                    function.handle(),
                    (grid[0], grid[1], grid[2]),
                    (function.threads, 1, 1),
                    0,
                    self.stream,
                    &mut arguments,
                )
            };
            driver("launching the step", launched)?;
        }
        Ok(())
    }

    fn launch(&mut self) -> Result<(), DriverError> {
        match self.graph {
            // SAFETY: the graph and the stream live as long as the engine.
            #[allow(unsafe_code)]
            Some(graph) => driver("running the step", unsafe {
                sys::cuGraphLaunch(graph, self.stream).result()
            })?,
            None => self.issue()?,
        }
        let event = self.events[self.launched % RING];
        // SAFETY: as above.
        #[allow(unsafe_code)]
        driver("running the step", unsafe {
            sys::cuEventRecord(event, self.stream).result()
        })?;
        self.launched += 1;
        Ok(())
    }

    fn set_current(&self) -> Result<(), DriverError> {
        // SAFETY: the context was retained in `new`.
        #[allow(unsafe_code)]
        driver("choosing the device", unsafe {
            result::ctx::set_current(self.context)
        })
    }

    /// Waits for the oldest step not read yet and reads its tokens.
    fn read(&mut self) -> Result<Vec<Option<u32>>, DriverError> {
        let event = self.events[self.read % RING];
        // SAFETY: the event was recorded behind the step; the ring holds `RING × rows` integers, and
        // the steps queued behind this one write other entries.
        #[allow(unsafe_code)]
        let entry = unsafe {
            driver(
                "waiting for the step",
                sys::cuEventSynchronize(event).result(),
            )?;
            std::slice::from_raw_parts(self.ring.add(self.read % RING * self.rows), self.rows)
        };
        self.read += 1;
        Ok(entry
            .iter()
            .map(|token| u32::try_from(*token).ok())
            .collect())
    }

    fn next_logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, DriverError> {
        self.set_current()?;
        let ids: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
        let mut values = vec![0f32; self.rows * self.vocab];
        // SAFETY: both copies stay inside buffers the plan keeps alive.
        #[allow(unsafe_code)]
        unsafe {
            driver(
                "sending tokens",
                result::memcpy_htod_async(self.plan.token, &ids, self.stream),
            )?;
            self.launch()?;
            driver(
                "reading logits",
                result::memcpy_dtoh_async(&mut values, self.plan.logits, self.stream),
            )?;
            driver("reading logits", result::stream::synchronize(self.stream))?;
        }
        self.read += 1;
        Ok(values.chunks(self.vocab).map(<[f32]>::to_vec).collect())
    }
}

impl Decoder for Engine {
    fn next_tokens(&mut self) -> Result<Vec<Option<u32>>, String> {
        let mut step = || {
            self.set_current()?;
            while self.launched < (self.read + AHEAD).min(self.most + 1).max(self.read + 1) {
                self.launch()?;
            }
            self.read()
        };
        step().map_err(|error: DriverError| error.to_string())
    }

    fn next_logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, String> {
        Engine::next_logits(self, tokens).map_err(|error| error.to_string())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.set_current().is_err() {
            return;
        }
        // SAFETY: the stream is waited for before anything it uses is given back. Errors are not
        // acted on: there is nothing left to do with the handles.
        #[allow(unsafe_code)]
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            if let Some(graph) = self.graph {
                let _ = sys::cuGraphExecDestroy(graph).result();
            }
            for event in &self.events {
                let _ = sys::cuEventDestroy_v2(*event).result();
            }
            let _ = sys::cuMemFreeHost(self.ring.cast()).result();
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// A new buffer of this many elements.
fn scratch(like: &Buffer, count: usize, dtype: DType) -> Buffer {
    empty(like, [count], dtype)
}

/// A buffer with these integers.
fn integers(values: &[i32], like: &Buffer) -> Buffer {
    Tensor::<Backend, 1, Int>::from_data(
        burn::tensor::TensorData::new(values.to_vec(), [values.len()]),
        (&like.device, DType::I32),
    )
    .into_primitive()
}

/// A buffer with these floats.
fn floats(values: &[f32], like: &Buffer) -> Buffer {
    contiguous(Tensor::<Backend, 1>::from_data(
        burn::tensor::TensorData::new(values.to_vec(), [values.len()]),
        (&like.device, DType::F32),
    ))
}
