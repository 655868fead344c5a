//! Loss scale of training in f16: gradients between the layers are multiplied by it so that small ones do not
//! vanish, and divided out of the gradients of parameters, which are f32.
//!
//! It is dynamic: halved when a gradient leaves the range of f16, whose step is left out, and doubled after
//! `GROWTH_STEPS` good steps. Being powers of two, it costs no rounding. bf16 and f32 have none.
//!
//! Source: `torch.amp.GradScaler`.

use std::sync::{Arc, Mutex, PoisonError};

use burn::{
    module::ModuleVisitor,
    module::{AutodiffModule, Param},
    optim::GradientsParams,
    prelude::*,
    tensor::{DType, backend::AutodiffBackend},
};
use serde::{Deserialize, Serialize};

use crate::{ops::cast::to_f32, runtime::accelerator::TrainAccelerator};

/// The first scale.
const FIRST: f64 = 65_536.0;

/// Good steps after which the scale is doubled.
const GROWTH_STEPS: u32 = 2000;

/// What a checkpoint keeps of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScaleState {
    /// The factor, a power of two, 1 at least.
    pub scale: f64,
    /// Steps taken since it was last changed.
    pub good_steps: u32,
}

impl Default for LossScaleState {
    fn default() -> Self {
        Self {
            scale: FIRST,
            good_steps: 0,
        }
    }
}

impl LossScaleState {
    /// After a step with gradients that were `finite`, or whose step was left out.
    fn after(self, finite: bool) -> Self {
        let Self { scale, good_steps } = self;
        match (finite, good_steps + 1) {
            (false, _) => Self {
                scale: (scale / 2.0).max(1.0),
                good_steps: 0,
            },
            (true, GROWTH_STEPS) => Self {
                scale: scale * 2.0,
                good_steps: 0,
            },
            (true, good_steps) => Self { scale, good_steps },
        }
    }
}

/// The scale of a run; clones share it, also with the threads of other devices.
#[derive(Debug, Clone)]
pub struct LossScale(Arc<Mutex<LossScaleState>>);

impl LossScale {
    /// For weights of a type; `state` is that of the checkpoint a run goes on from. `None` where no scale is
    /// needed.
    pub fn of(dtype: DType, state: Option<LossScaleState>) -> Option<Self> {
        (dtype == DType::F16).then(|| Self(Arc::new(Mutex::new(state.unwrap_or_default()))))
    }

    /// As a checkpoint keeps it.
    pub fn state(&self) -> LossScaleState {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The factor on the loss.
    pub fn factor(&self) -> f64 {
        self.state().scale
    }

    /// Adapts the scale to a step's gradients. Returns whether a smaller one can still help: not where it is
    /// 1 already.
    pub(super) fn update(&self, finite: bool) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *state;
        *state = before.after(finite);
        finite || before.scale > 1.0
    }
}

/// Gradients of a module's parameters in f32, each divided by `factor`.
pub(super) fn unscaled<B: TrainAccelerator, M: AutodiffModule<B>>(
    module: &M,
    grads: GradientsParams,
    factor: f64,
) -> GradientsParams {
    struct Unscale {
        scaled: GradientsParams,
        unscaled: GradientsParams,
        factor: f64,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Unscale {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(gradient) = self.scaled.remove::<B::InnerBackend, D>(param.id) {
                let gradient = to_f32(gradient) / self.factor;
                self.unscaled.register(param.id, gradient);
            }
        }
    }
    let mut visitor = Unscale {
        scaled: grads,
        unscaled: GradientsParams::new(),
        factor,
    };
    module.visit(&mut visitor);
    visitor.unscaled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_falls_at_once_and_grows_slowly() {
        assert!(LossScale::of(DType::BF16, None).is_none());
        assert!(LossScale::of(DType::F32, None).is_none());
        let scale = LossScale::of(DType::F16, None).unwrap();
        assert_eq!(scale.factor(), 65_536.0);
        assert!(scale.update(true) && scale.update(false));
        let halved = LossScaleState {
            scale: 32_768.0,
            good_steps: 0,
        };
        assert_eq!(scale.state(), halved);
        // Clones are the same scale, and a checkpoint's goes on where it was.
        let other = scale.clone();
        for step in 0..GROWTH_STEPS {
            assert_eq!((other.factor(), other.state().good_steps), (32_768.0, step));
            assert!(scale.update(true));
        }
        assert_eq!(other.factor(), 65_536.0);
        let text = serde_json::to_string(&halved).unwrap();
        let resumed = LossScale::of(DType::F16, serde_json::from_str(&text).ok()).unwrap();
        assert_eq!(resumed.state(), halved);
        // At 1 the gradients themselves are out of range.
        for _ in 0..15 {
            assert!(resumed.update(false));
        }
        assert_eq!(resumed.factor(), 1.0);
        assert!(!resumed.update(false));
        assert_eq!(resumed.factor(), 1.0);
    }
}
