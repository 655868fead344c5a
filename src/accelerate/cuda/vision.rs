//! The vision tower as one CUDA graph for each layout of patches that occurs again.
//!
//! Some 250 short launches cost more on the host than on the device. So the first request of a layout
//! runs launch by launch while its kernels are listed; these are compiled in the background; a later request
//! records the run, compares the graph's output with the launched one's bit for bit, and from then on
//! the graph is replayed. A graph that differs is never used.

use std::{any::Any, thread::JoinHandle};

use burn::{prelude::*, tensor::DType};

use super::{
    launch::{Backend, Buffer, empty, strided, tensor},
    module::{DriverError, architecture, driver, load_all},
    recording::{Graph, address, record, watch},
};
use crate::{
    batch::images::ImageInput,
    qwen3_vl::vision::{VisionLayout, VisionModel, VisionOutput},
};

/// Layouts of one tower that have a graph, and patches of the largest: some 40 KB of memory a patch.
const MOST_GRAPHS: usize = 4;
const MOST_PATCHES: usize = 4096;

type Grids = Vec<[usize; 3]>;

/// The state of a layout: watched, compiled, recorded.
enum State {
    Compiling(JoinHandle<Result<(), DriverError>>),
    Ready(Box<TowerGraph>),
    Refused,
}

/// The layouts of one tower, the latest last.
#[derive(Default)]
struct Layouts(Vec<(Grids, State)>);

/// A recorded tower with its input and outputs.
struct TowerGraph {
    graph: Graph,
    /// `[patches, patch_dim]`, bf16.
    pixels: u64,
    /// Main merger's output first; address and bytes of each.
    outputs: Vec<(u64, usize)>,
    /// `[merged, out_hidden]`.
    shape: [usize; 2],
    /// Outputs and input.
    held: Vec<Buffer>,
}

/// The tower's output for some images; `run` launches it kernel by kernel.
pub(super) fn run(
    tower: &VisionModel<Backend>,
    images: &ImageInput,
    layout: &VisionLayout<Backend>,
    run: impl Fn() -> VisionOutput<Backend>,
) -> VisionOutput<Backend> {
    let patches = images.patches();
    if !super::supported(&tower.patch_embed.proj.bias.val())
        || tower.dtype() != DType::BF16
        || !(1..=MOST_PATCHES).contains(&patches)
    {
        return run();
    }
    let Some(mut kept) = tower.kept.lock() else {
        return run();
    };
    let layouts = kept.get_or_insert_with(|| Box::new(Layouts::default()));
    let Some(layouts) = layouts.downcast_mut::<Layouts>() else {
        return run();
    };
    let grids = &images.image_grid_thw;
    let found = layouts.0.iter().position(|(known, _)| known == grids);
    let state = found.map(|at| layouts.0.remove(at).1);
    let (output, state) = match state {
        None => {
            let device = strided(tower.patch_embed.proj.bias.val()).device.index;
            let (output, kernels) = watch(&run);
            let compiling =
                std::thread::spawn(move || load_all(kernels.iter(), device, &architecture(device)));
            (output, State::Compiling(compiling))
        }
        Some(State::Compiling(thread)) if !thread.is_finished() => {
            (run(), State::Compiling(thread))
        }
        Some(State::Compiling(thread)) => {
            let output = run();
            let compiled = thread.join().unwrap_or(Ok(()));
            let made = compiled.and_then(|()| TowerGraph::new(tower, images, layout));
            let state = match made.and_then(|mut graph| Ok((graph.run(images)?, graph))) {
                Ok((replayed, graph)) if same_bits(&replayed, &output) => {
                    State::Ready(Box::new(graph))
                }
                Ok(_) => {
                    log::warn!("the vision tower stays launched: its graph returns another result");
                    State::Refused
                }
                Err(error) => {
                    log::warn!("the vision tower stays launched: {error}");
                    State::Refused
                }
            };
            (output, state)
        }
        Some(State::Ready(mut graph)) => match graph.run(images) {
            Ok(output) => (output, State::Ready(graph)),
            Err(error) => {
                log::warn!("the vision tower is launched again: {error}");
                (run(), State::Refused)
            }
        },
        Some(State::Refused) => (run(), State::Refused),
    };
    layouts.0.push((grids.clone(), state));
    if layouts.0.len() > MOST_GRAPHS {
        layouts.0.remove(0);
    }
    output
}

fn kept_layouts(kept: &Option<Box<dyn Any + Send>>) -> Option<&Layouts> {
    let kept: &(dyn Any + Send) = kept.as_deref()?;
    kept.downcast_ref()
}

/// Waits until a tower's kernels are compiled.
pub(super) fn wait_for_background(tower: &VisionModel<Backend>) {
    let Some(kept) = tower.kept.lock() else {
        return;
    };
    let layouts = kept_layouts(&kept);
    for (_, state) in layouts.map_or(&[][..], |layouts| &layouts.0) {
        while matches!(state, State::Compiling(thread) if !thread.is_finished()) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

fn same_bits(a: &VisionOutput<Backend>, b: &VisionOutput<Backend>) -> bool {
    let bytes = |x: &Tensor<Backend, 2>| x.clone().into_data().bytes.to_vec();
    a.deepstack.len() == b.deepstack.len()
        && bytes(&a.merged) == bytes(&b.merged)
        && a.deepstack
            .iter()
            .zip(&b.deepstack)
            .all(|(a, b)| bytes(a) == bytes(b))
}

impl TowerGraph {
    fn new(
        tower: &VisionModel<Backend>,
        images: &ImageInput,
        layout: &VisionLayout<Backend>,
    ) -> Result<Self, DriverError> {
        let like = strided(tower.patch_embed.proj.bias.val());
        let patch_dim = images.pixel_values.len() / images.patches();
        // Made before the recording, by operations of Burn's, and never again.
        let positions = tower.position_embeddings(layout);
        let pixels = empty(&like, [images.patches(), patch_dim], DType::BF16);
        wait(&like)?;
        let input = tensor::<2>(pixels.clone());
        let input_bytes = images.pixel_values.len() * DType::BF16.size();
        let (output, graph) = record(like.device.index, input_bytes, || {
            tower.forward_from(input, positions, layout, None)
        })?;
        let shape = output.merged.dims();
        let held: Vec<Buffer> = std::iter::once(output.merged)
            .chain(output.deepstack)
            .map(strided)
            .collect();
        let bytes = shape[0] * shape[1] * DType::BF16.size();
        let outputs = held
            .iter()
            .map(|buffer| Ok((address(buffer)?, bytes)))
            .collect::<Result<_, DriverError>>()?;
        Ok(Self {
            graph,
            pixels: address(&pixels)?,
            outputs,
            shape,
            held: held.into_iter().chain([pixels]).collect(),
        })
    }

    fn run(&mut self, images: &ImageInput) -> Result<VisionOutput<Backend>, DriverError> {
        let like = &self.held[0];
        // SAFETY: the buffer of the pixels has room for those of its layout.
        #[allow(unsafe_code)]
        unsafe {
            self.graph.start(self.pixels, |bytes| {
                images.write_half_values(bytemuck::cast_slice_mut(bytes));
            })?;
        }
        let fresh: Vec<Buffer> = self
            .outputs
            .iter()
            .map(|_| empty(like, self.shape, DType::BF16))
            .collect();
        let copies = fresh
            .iter()
            .zip(&self.outputs)
            .map(|(to, (from, bytes))| Ok((*from, address(to)?, *bytes)))
            .collect::<Result<Vec<_>, DriverError>>()?;
        // Memory from the allocator may still be read by earlier launches.
        wait(like)?;
        // SAFETY: both sides are held here, and the stream of `like` is idle.
        #[allow(unsafe_code)]
        unsafe {
            self.graph.finish(&copies)?;
        }
        let mut outputs = fresh.into_iter().map(tensor);
        Ok(VisionOutput {
            merged: outputs
                .next()
                .expect("the main merger's output comes first"),
            deepstack: outputs.collect(),
        })
    }
}

/// Synchronises: waits for all that was launched through cubecl.
fn wait(like: &Buffer) -> Result<(), DriverError> {
    let done = cubecl_common::future::block_on(like.client.sync());
    driver("waiting for the device", done)
}

/// Whether a layout of a tower is replayed as a graph.
#[cfg(test)]
pub(super) fn is_replayed(tower: &VisionModel<Backend>, grids: &[[usize; 3]]) -> bool {
    let Some(kept) = tower.kept.lock() else {
        return false;
    };
    let layouts = kept_layouts(&kept);
    layouts.is_some_and(|layouts| {
        layouts
            .0
            .iter()
            .any(|(known, state)| known == grids && matches!(state, State::Ready(_)))
    })
}
