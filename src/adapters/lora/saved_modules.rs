//! Training of modules that PEFT stores whole beside the low-rank matrices (`modules_to_save`).
//!
//! Such a module is a copy of the base's that is trained as in full tuning, in the type of the base. An adapter that
//! was trained before brings its own copy (`base_changes`); a fresh one starts from the base's.

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    prelude::*,
};

use super::{
    attach::{LinearMapper, untie},
    base_changes::all_shapes,
    config::{AdapterError, LoraConfig},
    keys::PREFIX,
    targets::{EMBED_TOKENS, LM_HEAD},
};
use crate::{
    base::files::nearest::nearest,
    ops::Ops,
    qwen3_vl::{Qwen3Vl, nn::Linear, weights::LazyTensor},
    weights::Weight,
};

/// Makes the parameters of all modules that `modules_to_save` names trainable, and says what that changes.
///
/// A tied table of which one use is trained alone becomes two, as in PEFT; a quantised matrix becomes floats, since its
/// numbers cannot be trained.
///
/// # Errors
/// [`AdapterError::NoModule`] for a name that no module has, [`AdapterError::Both`] for a layer that has a low-rank
/// adapter as well.
pub fn train_saved<B: Ops>(
    mut model: Qwen3Vl<B>,
    config: &LoraConfig,
) -> Result<(Qwen3Vl<B>, Vec<String>), AdapterError> {
    let mut notes = Vec::new();
    if config.modules_to_save.is_empty() {
        return Ok((model, notes));
    }
    for name in &config.modules_to_save {
        expect_module(&model, name)?;
    }
    let is_tied = model.lm_head.is_none() && !config.ensure_weight_tying;
    if is_tied
        && [LM_HEAD, EMBED_TOKENS]
            .iter()
            .any(|path| config.saves(path))
    {
        untie(&mut model);
        notes.push(
            "embedding and head are one table in this model; `modules_to_save` makes them two from here on, as in PEFT"
                .to_owned(),
        );
    }
    let mut unpack = Unpack {
        config,
        count: 0,
        adapted: None,
    };
    let mut model = model.map_linears(&mut unpack);
    let table = &mut model.model.language_model.embed_tokens;
    table.weight = unpack.weight(EMBED_TOKENS, table.weight.clone());
    if let Some(layer) = unpack.adapted {
        return Err(AdapterError::Both { layer });
    }
    if unpack.count > 0 {
        notes.push(format!(
            "{} of `modules_to_save` {} quantised; {} trained as floats, from the values that the quantised numbers stand for",
            match unpack.count {
                1 => "a matrix".to_owned(),
                count => format!("{count} matrices"),
            },
            if unpack.count == 1 { "is" } else { "are" },
            if unpack.count == 1 { "it is" } else { "they are" },
        ));
    }
    let model = model.map(&mut Free {
        config,
        path: Vec::new(),
    });
    Ok((model, notes))
}

/// Checks that `name` is the end of some module's path.
fn expect_module<B: Ops>(model: &Qwen3Vl<B>, name: &str) -> Result<(), AdapterError> {
    let shapes = all_shapes(model);
    let modules = shapes.keys().flat_map(|path| {
        path.match_indices('.')
            .map(|(at, _)| path[..at].to_owned())
            .collect::<Vec<_>>()
    });
    let mut modules: Vec<String> = modules.chain([LM_HEAD.to_owned()]).collect();
    modules.sort();
    modules.dedup();
    if modules.iter().any(|module| module.ends_with(name)) {
        return Ok(());
    }
    let ends: Vec<&str> = modules
        .iter()
        .map(|module| module.rsplit('.').next().unwrap_or(module))
        .filter(|end| end.parse::<usize>().is_err())
        .collect();
    Err(AdapterError::NoModule {
        name: name.to_owned(),
        nearest: nearest(name, ends.iter().copied()).map(str::to_owned),
    })
}

/// Floats in place of quantised matrices.
struct Unpack<'a> {
    config: &'a LoraConfig,
    count: usize,
    /// A layer that has an adapter too.
    adapted: Option<String>,
}

impl Unpack<'_> {
    fn weight<B: Ops>(&mut self, path: &str, weight: Weight<B>) -> Weight<B> {
        if weight.packed().is_none() || !self.config.saves(path) {
            return weight;
        }
        self.count += 1;
        Weight::Dense(Param::initialized(ParamId::new(), weight.val()))
    }
}

impl<B: Ops> LinearMapper<B> for Unpack<'_> {
    fn map_linear(&mut self, path: &str, mut linear: Linear<B>) -> Linear<B> {
        if linear.lora.is_some() && self.config.saves(path) {
            self.adapted.get_or_insert_with(|| path.to_owned());
        }
        linear.weight = self.weight(path, linear.weight);
        linear
    }
}

/// Asks for gradients of the parameters of saved modules.
struct Free<'a> {
    config: &'a LoraConfig,
    path: Vec<String>,
}

impl<B: Backend> ModuleMapper<B> for Free<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if is_parameter_saved(self.config, &self.path) {
            param.set_require_grad(true)
        } else {
            param
        }
    }
}

/// Whether the parameter at `path` belongs to a saved module.
fn is_parameter_saved(config: &LoraConfig, path: &[String]) -> bool {
    let Some((_, module)) = path.split_last() else {
        return false;
    };
    config.saves(&module.join("."))
}

/// The parameters of all saved modules under PEFT's names, in order of name.
pub(super) fn saved_tensors<B: Backend>(
    model: &Qwen3Vl<B>,
    config: &LoraConfig,
) -> Vec<LazyTensor> {
    struct Collect<'a> {
        config: &'a LoraConfig,
        path: Vec<String>,
        tensors: Vec<LazyTensor>,
    }
    impl<B: Backend> ModuleVisitor<B> for Collect<'_> {
        fn enter_module(&mut self, name: &str, _container_type: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if !is_parameter_saved(self.config, &self.path) {
                return;
            }
            let mut add = |path: &str| {
                let tensor = param.val();
                self.tensors.push(LazyTensor {
                    name: format!("{PREFIX}{path}"),
                    shape: tensor.dims().to_vec(),
                    dtype: tensor.dtype(),
                    data: Box::new(move || tensor.to_data()),
                });
            };
            let path = self.path.join(".");
            add(&path);
            // With `ensure_weight_tying` PEFT writes the one table under both names.
            if path == format!("{EMBED_TOKENS}.weight") && self.config.ensure_weight_tying {
                add(&format!("{LM_HEAD}.weight"));
            }
        }
    }
    if config.modules_to_save.is_empty() {
        return Vec::new();
    }
    let mut collect = Collect {
        config,
        path: Vec::new(),
        tensors: Vec::new(),
    };
    model.visit(&mut collect);
    collect.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    collect.tensors.dedup_by(|a, b| a.name == b.name);
    collect.tensors
}
