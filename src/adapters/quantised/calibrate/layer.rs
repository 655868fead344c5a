//! A decoder layer over many sequences at once, stopping at the inputs of its linear layers.

use burn::prelude::*;

use crate::{
    ops::{Ops, cast::to_f32},
    qwen3_vl::{
        ImageFeatures,
        key_values::KeyValueCache,
        layer::{DecoderLayer, Eager, Executor, Projection, StreamNorm, TextContext},
    },
};

/// Linear layers that share an input: they are multiplied in one launch, so they share a format too.
pub const UNITS: [&[Projection]; 4] = [
    &[Projection::Query, Projection::Key, Projection::Value],
    &[Projection::Output],
    &[Projection::Gate, Projection::Up],
    &[Projection::Down],
];

/// What all sequences share in every layer.
pub struct Sequences<'a, B: Backend> {
    /// Positions and masks of each.
    pub contexts: &'a [TextContext<B>],
    /// Image features of each.
    pub images: &'a [Option<ImageFeatures<B>>],
    /// The first of them are calibrated on; the others only go through.
    pub calibrated: usize,
}

/// Runs a layer; before a unit of linear layers is used, `on_inputs` gets it, the layer, and the mean of
/// `x xᵀ` over all tokens that are calibrated on, `[width, width]` in f32, and may replace weights of the layer.
pub struct Calibrating<'a, B: Backend, F> {
    sequences: &'a Sequences<'a, B>,
    layer: DecoderLayer<B>,
    on_inputs: F,
}

impl<'a, B: Ops, F> Calibrating<'a, B, F>
where
    F: FnMut(&'static [Projection], &mut DecoderLayer<B>, Tensor<B, 2>),
{
    /// An executor of one layer.
    pub fn new(sequences: &'a Sequences<'a, B>, layer: DecoderLayer<B>, on_inputs: F) -> Self {
        Self {
            sequences,
            layer,
            on_inputs,
        }
    }

    fn eager(&self, sequence: usize) -> Eager<'_, B, Option<&'static mut KeyValueCache<B>>> {
        let layers = std::slice::from_ref(&self.layer);
        let context = &self.sequences.contexts[sequence];
        Eager::new(layers, context, None, None)
    }

    fn each<X, Y>(
        &self,
        x: Vec<X>,
        mut run: impl FnMut(&mut Eager<'_, B, Option<&'static mut KeyValueCache<B>>>, X) -> Y,
    ) -> Vec<Y> {
        let all = x.into_iter().enumerate();
        all.map(|(sequence, x)| run(&mut self.eager(sequence), x))
            .collect()
    }

    fn inputs(&mut self, unit: usize, x: &[Tensor<B, 2>]) {
        let (mut sum, mut tokens) = (None, 0);
        for x in x.iter().take(self.sequences.calibrated) {
            let x = to_f32(x.clone());
            tokens += x.dims()[0];
            let own = x.clone().transpose().matmul(x);
            sum = Some(match sum {
                Some(sum) => sum + own,
                None => own,
            });
        }
        if let Some(sum) = sum {
            (self.on_inputs)(UNITS[unit], &mut self.layer, sum / tokens as f64);
        }
    }
}

impl<B: Ops, F> Executor for Calibrating<'_, B, F>
where
    F: FnMut(&'static [Projection], &mut DecoderLayer<B>, Tensor<B, 2>),
{
    type Hidden = Vec<Tensor<B, 2>>;
    type Normed = Vec<Tensor<B, 2>>;
    type Projected = Vec<[Tensor<B, 3>; 3]>;
    type Rotated = Vec<[Tensor<B, 3>; 3]>;
    type Attended = Vec<Tensor<B, 2>>;
    type Activated = Vec<Tensor<B, 2>>;

    /// There is one layer.
    fn enter(&mut self, _layer: usize) {}

    fn norm(&mut self, norm: StreamNorm, x: &Self::Hidden) -> Self::Normed {
        self.each(x.clone(), |run, x| run.norm(norm, &x))
    }

    fn project_heads(&mut self, x: Self::Normed) -> Self::Projected {
        self.inputs(0, &x);
        self.each(x, |run, x| run.project_heads(x))
    }

    fn rotate(&mut self, heads: Self::Projected) -> Self::Rotated {
        self.each(heads, |run, heads| run.rotate(heads))
    }

    fn attend(&mut self, heads: Self::Rotated) -> Self::Attended {
        self.each(heads, |run, heads| run.attend(heads))
    }

    fn project_attended(&mut self, y: Self::Attended, residual: Self::Hidden) -> Self::Hidden {
        self.inputs(1, &y);
        let both = y.into_iter().zip(residual).collect();
        self.each(both, |run, (y, residual)| run.project_attended(y, residual))
    }

    fn swiglu(&mut self, x: Self::Normed) -> Self::Activated {
        self.inputs(2, &x);
        self.each(x, |run, x| run.swiglu(x))
    }

    fn project_down(&mut self, y: Self::Activated, residual: Self::Hidden) -> Self::Hidden {
        self.inputs(3, &y);
        let both = y.into_iter().zip(residual).collect();
        self.each(both, |run, (y, residual)| run.project_down(y, residual))
    }

    fn add_deepstack(&mut self, layer: usize, x: Self::Hidden) -> Self::Hidden {
        let both = x.into_iter().zip(self.sequences.images);
        both.map(|(x, images)| match images {
            Some(images) => images.add_deepstack(layer, x),
            None => x,
        })
        .collect()
    }
}

/// Values of a tensor on the host, as f32.
pub fn on_host<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    to_f32(tensor).into_data().iter::<f32>().collect()
}
