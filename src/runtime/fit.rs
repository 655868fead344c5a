//! Which form of the weights, and how many tokens of keys and values, fit into a device's memory.
//!
//! An estimate before anything is loaded, from shapes alone; held against what cards showed.

use std::{collections::BTreeMap, fmt};

use crate::{
    adapters::quantised::{
        Formats,
        memory::{bytes_in_formats, cache_bytes, weight_bytes},
    },
    base::device_name::DeviceKind,
    ops::quantised::{Quantization, cache::CacheFormat},
    qwen3_vl::config::Qwen3VlConfig,
};

const GIB: f64 = (1u64 << 30) as f64;

/// What answering takes of a device's memory.
#[derive(Debug)]
pub struct InferenceMemory<'a> {
    config: &'a Qwen3VlConfig,
    /// Shape of each parameter by its path.
    shapes: BTreeMap<String, Vec<usize>>,
    /// Bytes of a float weight.
    element: usize,
    /// Bytes of weights whose form is that of their files.
    packed: Option<u64>,
    kind: DeviceKind,
}

/// What is wanted of the memory that the weights leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheWish {
    /// Tokens of keys and values that all sequences together will use.
    pub tokens: usize,
    /// Fewest tokens that are of use; rather than fewer, the weights take a smaller form.
    pub least: usize,
    /// Format of keys and values; another may be chosen where it is `None`.
    pub format: Option<CacheFormat>,
    /// Tokens that go through the layers at once.
    pub at_once: usize,
    /// Most patches of an image, before merging.
    pub patches: usize,
}

/// A form that fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fit {
    /// Form to bring the weights into; `None` where they stay as they are.
    pub quantization: Option<Quantization>,
    /// Form of keys and values.
    pub kv_cache: CacheFormat,
    /// Tokens of keys and values there is room for, at most those wanted.
    pub cache_tokens: usize,
    /// Bytes of the weights, of keys and values, and of all else.
    pub bytes: [u64; 3],
    /// Fewest tokens of use, those of one answer.
    least: usize,
    /// Bits of a float weight.
    float_bits: usize,
    /// Whether the weights are packed in their files.
    packed: bool,
}

impl Fit {
    /// Answers of the wished length that there is room for at once.
    pub fn rows(&self) -> usize {
        self.cache_tokens / self.least.max(1)
    }
}

/// Memory that is too small for every form.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error(
    "{budget:.1} GiB of memory are too small: with {} weights and {tokens} tokens of keys and values the model takes about {need:.1} GiB; take a smaller model, lower --max-pixels, or use a larger device",
    match .quantization { Some(quantization) => quantization.to_string(), None => "these".to_string() }
)]
pub struct TooSmall {
    /// GiB.
    budget: f64,
    /// The smallest form that was allowed.
    quantization: Option<Quantization>,
    tokens: usize,
    /// GiB.
    need: f64,
}

impl<'a> InferenceMemory<'a> {
    /// Of a model with parameters of these shapes; `element` bytes a float weight.
    pub fn new(
        config: &'a Qwen3VlConfig,
        shapes: BTreeMap<String, Vec<usize>>,
        element: usize,
        kind: DeviceKind,
    ) -> Self {
        Self {
            config,
            shapes,
            element,
            packed: None,
            kind,
        }
    }

    /// Of weights that stay as their files have them: every form is this one.
    #[must_use]
    pub fn with_packed_weights(self, formats: &Formats) -> Self {
        let bytes = bytes_in_formats(&self.shapes, formats, self.element);
        Self {
            packed: Some(bytes as u64),
            ..self
        }
    }

    /// Bytes of the weights.
    pub fn weights(&self, quantization: Option<Quantization>) -> u64 {
        self.packed
            .unwrap_or_else(|| weight_bytes(&self.shapes, quantization, self.element) as u64)
    }

    /// Bytes of the keys and values of so many tokens.
    pub fn cache(&self, format: CacheFormat, tokens: usize) -> u64 {
        let text = &self.config.text_config;
        let bytes = match format {
            CacheFormat::Float => cache_bytes(text, tokens, self.element),
            // And an f32 scale for each token and head.
            CacheFormat::Int8 => {
                cache_bytes(text, tokens, 1) + cache_bytes(text, tokens, 4) / text.head_dim
            }
        };
        bytes as u64
    }

    /// Bytes of the driver with its modules and pools, and of activations.
    pub fn work(&self, quantization: Option<Quantization>, wish: &CacheWish) -> u64 {
        let (text, vision) = (&self.config.text_config, &self.config.vision_config);
        let token = 8 * text.hidden_size + 3 * text.intermediate_size;
        let patch = 8 * vision.hidden_size + 2 * vision.intermediate_size;
        let activations = (wish.at_once * token + wish.patches * patch) * self.element;
        // Read off an H200: 0.55 GiB of context and modules; a quantised model's pools take pages beside.
        let quantised = quantization.is_some() || self.packed.is_some();
        let driver: f64 = match (self.kind, quantised) {
            (DeviceKind::Cuda, false) => 0.7,
            (DeviceKind::Cuda, true) => 1.68,
            (DeviceKind::Wgpu, _) => 0.35,
            (DeviceKind::Cpu, _) => 0.1,
        };
        activations as u64 + (driver * GIB) as u64
    }

    /// The best form within `budget` bytes: floats before `int8` before `int4`, of those `allowed`; keys and
    /// values in 8 bits only where nothing else fits. Then as many tokens as are wanted and fit.
    ///
    /// # Errors
    /// [`TooSmall`].
    pub fn choose(
        &self,
        budget: u64,
        allowed: &[Option<Quantization>],
        wish: &CacheWish,
    ) -> Result<Fit, TooSmall> {
        let caches: &[CacheFormat] = match wish.format {
            Some(CacheFormat::Float) => &[CacheFormat::Float],
            Some(CacheFormat::Int8) => &[CacheFormat::Int8],
            None => &[CacheFormat::Float, CacheFormat::Int8],
        };
        let fits = caches.iter().flat_map(|kv_cache| {
            let fit = |quantization: &Option<Quantization>| {
                self.fit(budget, *quantization, *kv_cache, wish)
            };
            allowed.iter().filter_map(fit)
        });
        fits.into_iter().next().ok_or_else(|| {
            let quantization = allowed.last().copied().flatten();
            let kv_cache = caches[caches.len() - 1];
            let need = self.weights(quantization)
                + self.work(quantization, wish)
                + self.cache(kv_cache, wish.least);
            TooSmall {
                budget: budget as f64 / GIB,
                quantization,
                tokens: wish.least,
                need: need as f64 / GIB,
            }
        })
    }

    /// As many tokens as fit beside weights of a form; `None` where those are fewer than the least.
    pub fn fit(
        &self,
        budget: u64,
        quantization: Option<Quantization>,
        kv_cache: CacheFormat,
        wish: &CacheWish,
    ) -> Option<Fit> {
        /// Tokens of a page.
        const PAGE: usize = 256;
        let (weights, work) = (self.weights(quantization), self.work(quantization, wish));
        let left = budget.checked_sub(weights + work)?;
        let room = (left / self.cache(kv_cache, PAGE)) as usize * PAGE;
        let cache_tokens = room.min(wish.tokens);
        (cache_tokens >= wish.least).then(|| Fit {
            quantization,
            kv_cache,
            cache_tokens,
            bytes: [weights, self.cache(kv_cache, cache_tokens), work],
            least: wish.least,
            float_bits: 8 * self.element,
            packed: self.packed.is_some(),
        })
    }
}

impl fmt::Display for Fit {
    /// `weights in int8 (8.2 GiB), keys and values of 4096 tokens in 16 bits (0.6 GiB), work 1.8 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [weights, cache, work] = self.bytes.map(|bytes| bytes as f64 / GIB);
        let floats = format!("{} bits", self.float_bits);
        let form = match self.quantization {
            Some(quantization) => quantization.to_string(),
            None if self.packed => "the form of their files".to_string(),
            None => floats.clone(),
        };
        let cached = match self.kv_cache {
            CacheFormat::Float => floats.as_str(),
            CacheFormat::Int8 => "8 bits",
        };
        write!(
            f,
            "weights in {form} ({weights:.1} GiB), keys and values of {} tokens in {cached} ({cache:.1} GiB), work {work:.1} GiB",
            self.cache_tokens
        )
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::qwen3_vl::{Qwen3Vl, nn::InitOptions, weights::parameter_shapes};
    use burn_flex::Flex;

    fn shapes(config: &Qwen3VlConfig) -> BTreeMap<String, Vec<usize>> {
        let options = InitOptions::default();
        parameter_shapes(&Qwen3Vl::<Flex>::new(config, &options, &Default::default()))
    }

    /// Room for one answer about a 512×512 image, as `bench decode` has it.
    fn one_answer() -> CacheWish {
        CacheWish {
            tokens: 768,
            least: 768,
            format: None,
            at_once: 368,
            patches: 1024,
        }
    }

    fn forms() -> [Option<Quantization>; 3] {
        [None, "int8".parse().ok(), "int4".parse().ok()]
    }

    #[test]
    fn estimates_are_near_what_an_h200_showed() {
        let config = Qwen3VlConfig::published("8b").unwrap();
        // `bench decode --batch 1` of the 8B, 2026-11-30: GiB in use on the card, driver included.
        for (kind, seen) in [
            (DeviceKind::Cuda, [17.18, 9.90, 6.74]),
            (DeviceKind::Wgpu, [16.56, 8.68, 5.34]),
        ] {
            let memory = InferenceMemory::new(&config, shapes(&config), 2, kind);
            for (form, seen) in forms().into_iter().zip(seen) {
                let fit = memory.fit(64 << 30, form, CacheFormat::Float, &one_answer());
                let gib = fit.unwrap().bytes.iter().sum::<u64>() as f64 / GIB;
                // Never less than it takes: what was chosen must run.
                assert!(
                    (1.0..1.06).contains(&(gib / seen)),
                    "{kind:?} {form:?}: {gib} {seen}"
                );
            }
        }
    }

    #[test]
    fn a_smaller_card_gets_a_smaller_form_and_then_fewer_tokens() {
        let config = Qwen3VlConfig::published("8b").unwrap();
        let memory = InferenceMemory::new(&config, shapes(&config), 2, DeviceKind::Cuda);
        let wish = CacheWish {
            tokens: 65_536,
            least: 2048,
            format: None,
            at_once: 512,
            patches: 3920,
        };
        let mut before = (usize::MAX, 0);
        for (gib, bits) in [(8.0, 4), (12.0, 8), (16.0, 8), (24.0, 16), (80.0, 16)] {
            let budget = (gib * GIB) as u64;
            let fit = memory.choose(budget, &forms(), &wish).unwrap();
            assert_eq!(
                fit.quantization.map_or(16, |form| form.layers.bits()),
                bits,
                "{gib}: {fit}"
            );
            assert!(fit.bytes.iter().sum::<u64>() <= budget, "{gib}: {fit}");
            assert!((2048..=65_536).contains(&fit.cache_tokens), "{gib}: {fit}");
            assert_eq!(fit.kv_cache, CacheFormat::Float);
            if before.0 == bits {
                assert!(fit.cache_tokens >= before.1, "{gib}: {fit}");
            }
            before = (bits, fit.cache_tokens);
        }
        // 32k tokens in int4 within 12 GiB, and keys and values in 8 bits where 16 leave no room.
        let long = CacheWish {
            tokens: 32_768,
            least: 32_768,
            ..wish
        };
        let fit = memory.choose(12 << 30, &forms(), &long).unwrap();
        assert_eq!(
            (fit.quantization, fit.kv_cache),
            (forms()[2], CacheFormat::Float)
        );
        let fit = memory.choose(10 << 30, &forms(), &long).unwrap();
        assert_eq!(
            (fit.quantization, fit.kv_cache),
            (forms()[2], CacheFormat::Int8)
        );
        let error = memory
            .choose(6 << 30, &forms(), &wish)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("6.0 GiB") && error.contains("int4"),
            "{error}"
        );
        // What the user fixed stays.
        let fixed = memory.choose(80 << 30, &forms()[1..2], &wish).unwrap();
        assert_eq!(fixed.quantization, forms()[1]);
    }
}
