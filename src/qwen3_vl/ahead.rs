//! Images on the device before they are asked for.
//!
//! One batch a thread: what is kept belongs to the thread that sent it and is taken once.

use std::{any::Any, cell::RefCell};

use burn::{
    prelude::*,
    tensor::backend::{DeviceId, DeviceOps},
};

use super::{ImageInput, vision::VisionLayout};
use crate::kernels::Kernels;

/// What the vision tower needs of some images.
pub(super) struct Ahead<B: Backend> {
    pub layout: VisionLayout<B>,
    /// `[patches, patch_dim]`, in the type of the tower.
    pub pixels: Tensor<B, 2>,
}

/// Which images, by the number of their pixels, and the device they were sent to.
type Key = (u64, DeviceId);

thread_local! {
    static KEPT: RefCell<Option<(Key, Box<dyn Any>)>> = const { RefCell::new(None) };
}

fn key<D: DeviceOps>(images: &ImageInput, device: &D) -> Key {
    (images.pixel_values.number(), device.id())
}

/// Keeps what was sent in place of what was kept before.
pub(super) fn keep<B: Kernels>(images: &ImageInput, device: &B::Device, ahead: Ahead<B>) {
    KEPT.set(Some((key(images, device), Box::new(ahead))));
}

/// Takes what was sent of these images; what was sent of others is let go.
pub(super) fn take<B: Kernels>(images: &ImageInput, device: &B::Device) -> Option<Ahead<B>> {
    let (kept, ahead) = KEPT.take()?;
    let ahead = (kept == key(images, device)).then_some(ahead)?;
    ahead.downcast().ok().map(|ahead| *ahead)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::{bench::weights::RandomSize, qwen3_vl::config::Qwen3VlConfig};
    use burn::tensor::DType;
    use burn_flex::Flex;

    #[test]
    fn images_sent_ahead_are_seen_as_they_are_and_once() {
        let config: Qwen3VlConfig = RandomSize::Tiny.config(None).unwrap();
        let device = Default::default();
        let model = crate::bench::weights::draw::<Flex>(&config, 3, DType::F32, None, &device);
        let mut requests = crate::bench::requests::Requests::new(&config, false, 5);
        let (images, others) = (requests.image(), requests.image());
        let see = |images: &ImageInput| {
            let output = model.encode_images(images, &config, &device);
            output.merged.into_data()
        };
        let expected = see(&images);
        model.send_ahead(&images, &config, &device);
        assert!(KEPT.with_borrow(Option::is_some));
        assert_eq!(see(&images), expected);
        assert!(KEPT.with_borrow(Option::is_none));
        // Others are not taken for them.
        model.send_ahead(&images, &config, &device);
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
