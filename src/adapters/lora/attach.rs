//! Attaching adapters by path: a mapper over the linear layers of a model.

use burn::{
    module::{Param, ParamId},
    prelude::*,
    tensor::DType,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    config::{AdapterError, LoraConfig, TargetMatcher},
    targets::{LM_HEAD, OTHER_LAYERS},
};
use crate::{
    base::seeds::mix,
    ops::{Kept, cast::to_f32},
    qwen3_vl::{Qwen3Vl, layer::Projection, nn::Linear},
    weights::{Weight, lora::Lora},
};

/// Rebuilds the linear layers of a model one by one.
///
/// Burn's `ModuleMapper` maps tensors inside a tree of fixed shape; an adapter adds parameters, so
/// this one maps layers. Paths are the published names, as in `ModuleMapper`.
pub trait LinearMapper<B: Backend> {
    /// Returns the replacement of the layer at `path`.
    fn map_linear(&mut self, path: &str, linear: Linear<B>) -> Linear<B>;
}

/// Lists all linear layers with their paths, by the given way of borrowing.
macro_rules! linears {
    ($model:expr, $iter:ident, $projections:ident $(, $mutability:tt)?) => {{
        let model = $model;
        let mut all = Vec::new();
        let visual = &$($mutability)? model.model.visual;
        for (i, block) in visual.blocks.$iter().enumerate() {
            let at = format!("model.visual.blocks.{i}");
            all.push((format!("{at}.attn.qkv"), &$($mutability)? block.attn.qkv));
            all.push((format!("{at}.attn.proj"), &$($mutability)? block.attn.proj));
            all.push((format!("{at}.mlp.linear_fc1"), &$($mutability)? block.mlp.linear_fc1));
            all.push((format!("{at}.mlp.linear_fc2"), &$($mutability)? block.mlp.linear_fc2));
        }
        let merger = &$($mutability)? visual.merger;
        all.push(("model.visual.merger.linear_fc1".to_string(), &$($mutability)? merger.linear_fc1));
        all.push(("model.visual.merger.linear_fc2".to_string(), &$($mutability)? merger.linear_fc2));
        for (i, merger) in visual.deepstack_merger_list.$iter().enumerate() {
            let at = format!("model.visual.deepstack_merger_list.{i}");
            all.push((format!("{at}.linear_fc1"), &$($mutability)? merger.linear_fc1));
            all.push((format!("{at}.linear_fc2"), &$($mutability)? merger.linear_fc2));
        }
        for (i, layer) in model.model.language_model.layers.$iter().enumerate() {
            let at = format!("model.language_model.layers.{i}");
            let linears = layer.$projections();
            for (projection, linear) in Projection::ALL.into_iter().zip(linears) {
                all.push((format!("{at}.{}", projection.path()), linear));
            }
        }
        if let Some(head) = &$($mutability)? model.lm_head {
            all.push(("lm_head".to_string(), head));
        }
        all
    }};
}

impl<B: Backend> Qwen3Vl<B> {
    /// All linear layers with their published paths.
    pub fn linears(&self) -> Vec<(String, &Linear<B>)> {
        linears!(self, iter, projections)
    }

    /// Rebuilds every linear layer through `mapper`.
    pub fn map_linears(mut self, mapper: &mut impl LinearMapper<B>) -> Self {
        for (path, linear) in linears!(&mut self, iter_mut, projections_mut, mut) {
            *linear = mapper.map_linear(&path, linear.clone());
        }
        // What was cached came from the layers before.
        self.model.visual.kept = Kept::default();
        self
    }
}

/// Attaches a fresh adapter to every layer that the config targets.
struct AttachLora<'a> {
    config: &'a LoraConfig,
    matcher: TargetMatcher,
    seed: u64,
    attached: usize,
    error: Option<AdapterError>,
}

impl<B: Backend> LinearMapper<B> for AttachLora<'_> {
    fn map_linear(&mut self, path: &str, mut linear: Linear<B>) -> Linear<B> {
        if !self.matcher.matches(path) {
            return linear;
        }
        if linear.lora.is_some() {
            let layer = path.to_string();
            self.error.get_or_insert(AdapterError::Attached { layer });
            return linear;
        }
        let sizes = self
            .config
            .rank_of(path)
            .and_then(|rank| Ok((rank, self.config.scaling_of(path)?)));
        let (rank, scaling) = match sizes {
            Ok(sizes) => sizes,
            Err(error) => {
                self.error.get_or_insert(error);
                return linear;
            }
        };
        let [d_output, d_input] = linear.weight.lazy_shape().dims();
        let device = linear.weight.lazy_device();
        // PEFT's kaiming_uniform(a=√5) on [r, in]: uniform within 1/√in. Drawn on the host, so that
        // a seed gives one adapter on every backend.
        let bound = 1.0 / (d_input as f32).sqrt();
        let mut random = ChaCha8Rng::seed_from_u64(mix(self.seed, self.attached as u64));
        let a: Vec<f32> = (0..rank * d_input)
            .map(|_| random.random_range(-bound..bound))
            .collect();
        let a = Tensor::from_data(TensorData::new(a, [rank, d_input]), (&device, DType::F32));
        let b = Tensor::zeros([d_output, rank], (&device, DType::F32));
        let param =
            |tensor| Param::initialized(ParamId::new(), Tensor::<B, 2>::require_grad(tensor));
        let magnitude = self.config.use_dora.then(|| {
            let weight = to_f32(linear.weight.val().detach());
            let norms: Tensor<B, 1> = (weight.clone() * weight).sum_dim(1).sqrt().squeeze_dim(1);
            Param::initialized(ParamId::new(), norms.require_grad())
        });
        let lora = Lora::new([param(a), param(b)], magnitude, scaling)
            .with_dropout(self.config.lora_dropout, self.attached);
        linear.lora = Some(lora);
        self.attached += 1;
        linear
    }
}

/// Gives a tied head a layer of its own, with the embedding's matrix: no memory until one of the two changes.
pub(super) fn untie<B: Backend>(model: &mut Qwen3Vl<B>) {
    let weight = match &model.model.language_model.embed_tokens.weight {
        Weight::Dense(table) => Weight::Dense(Param::initialized(ParamId::new(), table.val())),
        packed @ Weight::Packed(_) => packed.clone(),
    };
    model.lm_head = Some(Linear {
        weight,
        bias: None,
        lora: None,
    });
}

/// Attaches fresh adapters (`A` random, `B` zero) to the targeted layers and returns their number. A tied head
/// that is targeted becomes a layer of its own.
///
/// # Errors
/// [`AdapterError::NoTarget`] when nothing matches, [`AdapterError::NotTrained`] when an embedding or a
/// convolution does, [`AdapterError::Pattern`].
pub fn attach<B: Backend>(
    mut model: Qwen3Vl<B>,
    config: &LoraConfig,
    seed: u64,
) -> Result<(Qwen3Vl<B>, usize), AdapterError> {
    let matcher = config.matcher()?;
    if let Some((layer, kind)) = OTHER_LAYERS
        .iter()
        .find(|(layer, _)| matcher.matches(layer))
    {
        return Err(AdapterError::NotTrained {
            targets: config.target_modules.to_string(),
            layer: (*layer).to_owned(),
            kind,
        });
    }
    if model.lm_head.is_none() && matcher.matches(LM_HEAD) {
        untie(&mut model);
    }
    let mut mapper = AttachLora {
        config,
        matcher,
        seed,
        attached: 0,
        error: None,
    };
    let model = model.map_linears(&mut mapper);
    match mapper.error {
        Some(error) => Err(error),
        None if mapper.attached == 0 => Err(AdapterError::NoTarget {
            targets: config.target_modules.to_string(),
        }),
        None => Ok((model, mapper.attached)),
    }
}
