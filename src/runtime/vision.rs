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

/// Runs the vision tower over all images of a batch.
pub fn encode_images<B: Accelerator>(
    model: &Qwen3Vl<B>,
    images: &ImageInput,
    config: &Qwen3VlConfig,
    device: &B::Device,
) -> VisionOutput<B> {
    let tower = &model.model.visual;
    let sizes = &config.vision_config;
    let (layout, sent) = match take_sent::<B>(images, device) {
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
