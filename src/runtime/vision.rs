//! Runs the vision tower: cached layouts, and images uploaded ahead of their use.
//!
//! One batch a thread is sent ahead: it belongs to the thread that sent it and is taken once.

use std::{
    any::{Any, TypeId},
    cell::RefCell,
    sync::Mutex,
};

use burn::{
    prelude::*,
    tensor::backend::{DeviceId, DeviceOps},
};

use super::accelerator::Accelerator;
use crate::{
    batch::images::ImageInput,
    qwen3_vl::{
        Qwen3Vl,
        config::{Qwen3VlConfig, VisionConfig},
        vision::{VisionLayout, VisionOutput, pixel_tensor},
    },
};

/// Runs the vision tower over all images of a batch. Images that follow themselves, as those of the answers to one
/// question, go through it once.
pub fn encode_images<B: Accelerator>(
    model: &Qwen3Vl<B>,
    images: &ImageInput,
    config: &Qwen3VlConfig,
    device: &B::Device,
) -> VisionOutput<B> {
    let tower = &model.model.visual;
    let sizes = &config.vision_config;
    let sent = take_sent::<B>(images, device);
    if sent.is_none()
        && let Some((distinct, places)) = without_repeats(images)
    {
        let output = encode_images(model, &distinct, config, device);
        return repeated(output, &distinct, &places, sizes, device);
    }
    let (layout, sent) = match sent {
        Some(SentImages { layout, pixels }) => (layout, Some(pixels)),
        None => (shared_layout(&images.image_grid_thw, sizes, device), None),
    };
    B::vision_tower(tower, images, &layout, || {
        let pixels = sent
            .clone()
            .unwrap_or_else(|| pixel_tensor(images, sizes.patch_dim(), tower.dtype(), device));
        tower.forward(pixels, &layout, None)
    })
}

/// The images without those that follow themselves, and the place of each image among them; `None` where there is none.
fn without_repeats(images: &ImageInput) -> Option<(ImageInput, Vec<usize>)> {
    let patches = images.patches();
    if images.image_grid_thw.len() < 2 || patches == 0 {
        return None;
    }
    let width = images.pixel_values.len() / patches;
    let (mut places, mut start) = (Vec::new(), 0);
    let mut kept: Vec<([usize; 3], &[f32])> = Vec::new();
    for grid in &images.image_grid_thw {
        let values = grid.iter().product::<usize>() * width;
        let own = (*grid, &images.pixel_values[start..start + values]);
        start += values;
        if kept.last() != Some(&own) {
            kept.push(own);
        }
        places.push(kept.len() - 1);
    }
    if kept.len() == places.len() {
        return None;
    }
    let values = kept.iter().flat_map(|(_, values)| values.iter().copied());
    let distinct = ImageInput {
        pixel_values: values.collect(),
        image_grid_thw: kept.iter().map(|(grid, _)| *grid).collect(),
    };
    Some((distinct, places))
}

/// Features of `distinct` images, in the places of all that are equal to them.
fn repeated<B: Accelerator>(
    output: VisionOutput<B>,
    distinct: &ImageInput,
    places: &[usize],
    sizes: &VisionConfig,
    device: &B::Device,
) -> VisionOutput<B> {
    let merged = sizes.spatial_merge_size.pow(2);
    let mut start = 0;
    let ranges = distinct.image_grid_thw.iter().map(|grid| {
        let range = start..start + (grid.iter().product::<usize>() / merged) as i32;
        start = range.end;
        range
    });
    let ranges: Vec<std::ops::Range<i32>> = ranges.collect();
    let rows: Vec<i32> = places
        .iter()
        .flat_map(|place| ranges[*place].clone())
        .collect();
    let rows = Tensor::<B, 1, Int>::from_ints(rows.as_slice(), device);
    let all = |features: Tensor<B, 2>| features.select(0, rows.clone());
    VisionOutput {
        merged: all(output.merged),
        deepstack: output.deepstack.into_iter().map(all).collect(),
    }
}

/// Sends the images of a batch that this thread will show the vision tower next, so that the device has
/// them by then. The batch must not be changed meanwhile.
pub fn send_ahead<B: Accelerator>(
    model: &Qwen3Vl<B>,
    images: &ImageInput,
    config: &Qwen3VlConfig,
    device: &B::Device,
) {
    let sizes = &config.vision_config;
    let sent = SentImages::<B> {
        layout: shared_layout(&images.image_grid_thw, sizes, device),
        pixels: pixel_tensor(
            images,
            sizes.patch_dim(),
            model.model.visual.dtype(),
            device,
        ),
    };
    SENT.set(Some((key(images, device), Box::new(sent))));
}

/// Inputs of the vision tower for some images.
struct SentImages<B: Backend> {
    layout: VisionLayout<B>,
    /// `[patches, patch_dim]`, in the type of the tower.
    pixels: Tensor<B, 2>,
}

/// Which images, by the number of their pixels, and the device they were sent to.
type Key = (u64, DeviceId);

thread_local! {
    static SENT: RefCell<Option<(Key, Box<dyn Any>)>> = const { RefCell::new(None) };
}

fn key<D: DeviceOps>(images: &ImageInput, device: &D) -> Key {
    (images.pixel_values.number(), device.id())
}

/// Takes what was sent of these images; what was sent of others is dropped.
fn take_sent<B: Accelerator>(images: &ImageInput, device: &B::Device) -> Option<SentImages<B>> {
    let (sent, value) = SENT.take()?;
    let value = (sent == key(images, device)).then_some(value)?;
    value.downcast().ok().map(|value| *value)
}

/// Key of a cached layout.
#[derive(Debug, PartialEq)]
struct LayoutKey {
    backend: TypeId,
    device: DeviceId,
    grids: Vec<[usize; 3]>,
    position_side: usize,
    spatial_merge_size: usize,
    head_dim: usize,
}

/// Layouts used last, the latest at the end; shared by all models of a process.
static LAYOUTS: Mutex<Vec<(LayoutKey, Box<dyn Any + Send>)>> = Mutex::new(Vec::new());

/// Layouts kept, and patches of the largest kept one: some 10 MB of device memory altogether.
const KEPT_LAYOUTS: usize = 8;
const LARGEST_KEPT: usize = 4096;

/// The layout of some images: images of one size come again and again.
fn shared_layout<B: Accelerator>(
    grids: &[[usize; 3]],
    config: &VisionConfig,
    device: &B::Device,
) -> VisionLayout<B> {
    let new = || VisionLayout::new(grids, config, device);
    let patches: usize = grids.iter().map(|[t, h, w]| t * h * w).sum();
    if patches > LARGEST_KEPT {
        return new();
    }
    let key = LayoutKey {
        backend: TypeId::of::<B>(),
        device: device.id(),
        grids: grids.to_vec(),
        position_side: config.position_side(),
        spatial_merge_size: config.spatial_merge_size,
        head_dim: config.head_dim(),
    };
    let mut kept = LAYOUTS.lock().unwrap_or_else(|lock| lock.into_inner());
    let found = kept.iter().position(|(known, _)| *known == key);
    let layout = match found.and_then(|at| kept.remove(at).1.downcast().ok()) {
        Some(layout) => *layout,
        None => new(),
    };
    kept.push((key, Box::new(layout.clone())));
    if kept.len() > KEPT_LAYOUTS {
        kept.remove(0);
    }
    layout
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::{qwen3_vl::config::Qwen3VlConfig, runtime::synthetic::weights::RandomSize};
    use burn::tensor::DType;
    use burn_flex::Flex;

    #[test]
    fn images_sent_ahead_are_seen_as_they_are_and_once() {
        let config: Qwen3VlConfig = RandomSize::Tiny.config(None).unwrap();
        let device = Default::default();
        let model =
            crate::runtime::synthetic::weights::draw::<Flex>(&config, 3, DType::F32, None, &device);
        let mut requests = crate::runtime::synthetic::requests::Requests::new(&config, false, 5);
        let (images, others) = (requests.image(), requests.image());
        let see = |images: &ImageInput| {
            let output = encode_images(&model, images, &config, &device);
            output.merged.into_data()
        };
        let expected = see(&images);
        send_ahead(&model, &images, &config, &device);
        assert!(SENT.with_borrow(Option::is_some));
        assert_eq!(see(&images), expected);
        assert!(SENT.with_borrow(Option::is_none));
        // Others are not taken for them.
        send_ahead(&model, &images, &config, &device);
        let of_others = see(&others);
        assert_ne!(of_others, expected);
        assert_eq!(see(&images), expected);
    }

    #[test]
    fn an_image_that_follows_itself_is_encoded_once_and_seen_each_time() {
        let config: Qwen3VlConfig = RandomSize::Tiny.config(None).unwrap();
        let device = Default::default();
        let model =
            crate::runtime::synthetic::weights::draw::<Flex>(&config, 3, DType::F32, None, &device);
        let mut requests = crate::runtime::synthetic::requests::Requests::new(&config, false, 5);
        let (one, other) = (requests.image(), requests.image());
        let see = |images: &ImageInput| -> Vec<f32> {
            let output = encode_images(&model, images, &config, &device);
            let all = std::iter::once(output.merged).chain(output.deepstack);
            all.flat_map(|features| features.into_data().to_vec::<f32>().unwrap())
                .collect()
        };
        let mut all = ImageInput::default();
        for image in [&one, &one, &other, &one] {
            all.extend(image);
        }
        let (distinct, places) = without_repeats(&all).unwrap();
        assert_eq!(
            (distinct.image_grid_thw.len(), places),
            (3, vec![0, 0, 1, 2])
        );
        let (alone, beside, together) = (see(&one), see(&other), see(&all));
        let sets = together.len() / (3 * alone.len() + beside.len());
        assert_eq!(sets, 1);
        let parts = 1 + config.vision_config.deepstack_visual_indexes.len();
        let (a, b) = (alone.len() / parts, beside.len() / parts);
        for part in 0..parts {
            let own = &together[part * (3 * a + b)..];
            for (at, want) in [
                (0, &alone[part * a..][..a]),
                (a, &alone[part * a..][..a]),
                (2 * a, &beside[part * b..][..b]),
                (2 * a + b, &alone[part * a..][..a]),
            ] {
                for (x, y) in own[at..].iter().zip(want) {
                    // Batched matmuls sum in another order.
                    assert!(
                        (x - y).abs() < 1e-4 + 1e-4 * y.abs(),
                        "part {part}: {x} {y}"
                    );
                }
            }
        }
        assert!(without_repeats(&one).is_none());
    }

    /// Pixels in the place of others in memory, as many of them, are not taken for them.
    #[test]
    fn pixels_are_known_by_number_and_not_by_address() {
        let device = Default::default();
        let mut images = ImageInput {
            pixel_values: vec![1.0; 8].into(),
            image_grid_thw: vec![[1, 2, 4]],
        };
        let clone = images.clone();
        assert_eq!(
            key::<burn_flex::FlexDevice>(&images, &device),
            key(&clone, &device)
        );
        let address = images.pixel_values.as_ptr();
        let before = key(&images, &device);
        // The allocator gives the place to the next vector of this length, sooner or later.
        for _ in 0..64 {
            images.pixel_values = Default::default();
            images.pixel_values = vec![2.0; 8].into();
            assert_ne!(key(&images, &device), before);
            if images.pixel_values.as_ptr() == address {
                break;
            }
        }
        let one = images.clone();
        images.extend(&clone);
        assert_ne!(key(&images, &device), key(&one, &device));
    }
}
