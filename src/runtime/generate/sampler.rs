//! Logits to a token.

use std::collections::{HashSet, VecDeque};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the next token is chosen; the defaults are greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingConfig {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps this many likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the likeliest tokens that reach this share together; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this likely relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen before; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplingConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// A sentence that names the setting, what was found and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        let range = |name: &str, value: f32, low: f32, high: f32| {
            if value >= low && value <= high {
                Ok(())
            } else {
                Err(format!("{name} is {value}, expected {low} to {high}"))
            }
        };
        range("temperature", self.temperature, 0.0, 100.0)?;
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(format!(
                "top_p is {}, expected more than 0 and at most 1; temperature 0 takes the likeliest token",
                self.top_p
            ));
        }
        range("min_p", self.min_p, 0.0, 1.0)?;
        range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
    }
}

/// One draw: how a token is to be chosen from logits, here or on a device.
///
/// The order of the filters is transformers': repetition penalty, temperature, top-k, top-p, min-p.
/// What is left is gone through from the likeliest token on, and equals by rising id, until the weights
/// reach the share `uniform` of their sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenChoice {
    /// As in [`SamplingConfig`].
    pub temperature: f32,
    /// As in [`SamplingConfig`].
    pub top_k: usize,
    /// As in [`SamplingConfig`].
    pub top_p: f32,
    /// As in [`SamplingConfig`].
    pub min_p: f32,
    /// As in [`SamplingConfig`].
    pub repetition_penalty: f32,
    /// Uniform in `[0, 1)`; ignored without a temperature.
    pub uniform: f32,
}

impl Default for TokenChoice {
    fn default() -> Self {
        Self::new(&SamplingConfig::default(), 0.0)
    }
}

impl TokenChoice {
    /// A draw with these settings.
    pub fn new(config: &SamplingConfig, uniform: f32) -> Self {
        Self {
            temperature: config.temperature,
            top_k: config.top_k,
            top_p: config.top_p,
            min_p: config.min_p,
            repetition_penalty: config.repetition_penalty,
            uniform,
        }
    }

    /// The token; `seen` are those before it. Ties go to the lower id.
    pub fn token(&self, logits: &[f32], seen: &HashSet<u32>) -> u32 {
        if self.repetition_penalty == 1.0 {
            return self.draw(logits);
        }
        let mut penalised = logits.to_vec();
        for id in seen {
            if let Some(logit) = penalised.get_mut(*id as usize) {
                if *logit > 0.0 {
                    *logit /= self.repetition_penalty;
                } else {
                    *logit *= self.repetition_penalty;
                }
            }
        }
        self.draw(&penalised)
    }

    fn draw(&self, logits: &[f32]) -> u32 {
        if self.temperature == 0.0 {
            return argmax(logits);
        }
        let mut kept: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            .map(|(id, logit)| (id as u32, *logit))
            .collect();
        kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.top_k > 0 {
            kept.truncate(self.top_k);
        }
        let top = kept.first().map_or(0.0, |first| first.1);
        for (_, value) in &mut kept {
            // The maximum comes off first: a tiny temperature must not make infinities of all.
            *value = ((*value - top) / self.temperature).exp();
        }
        // In f64: an f32 sum over a vocabulary is off by more than the draw resolves.
        let sum = |kept: &[(u32, f32)]| -> f64 { kept.iter().map(|(_, w)| f64::from(*w)).sum() };
        if self.top_p < 1.0 {
            let share = f64::from(self.top_p) * sum(&kept);
            let mut before = 0.0;
            // A token stays while those before it do not reach the share yet; the first always does.
            kept.retain(|(_, weight)| {
                let stays = before < share;
                before += f64::from(*weight);
                stays
            });
        }
        if self.min_p > 0.0 {
            // The likeliest has weight 1.
            kept.retain(|(_, weight)| *weight >= self.min_p);
        }
        let mut left = f64::from(self.uniform) * sum(&kept);
        for (id, weight) in &kept {
            left -= f64::from(*weight);
            if left < 0.0 {
                return *id;
            }
        }
        kept.last().map_or(0, |(id, _)| *id)
    }
}

/// Chooses tokens for one sequence.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplingConfig,
    random: ChaCha8Rng,
    seen: HashSet<u32>,
    /// Choices returned whose tokens are not known yet.
    pending: VecDeque<TokenChoice>,
}

impl Sampler {
    /// A sampler for a sequence that starts with `prompt`.
    pub fn new(config: &SamplingConfig, prompt: &[u32]) -> Self {
        Self {
            random: ChaCha8Rng::seed_from_u64(config.seed),
            seen: prompt.iter().copied().collect(),
            config: config.clone(),
            pending: VecDeque::new(),
        }
    }

    /// How the next token is to be chosen; the same until there is one.
    pub fn choice(&mut self) -> TokenChoice {
        self.choices(1)[0]
    }

    /// How the next `count` tokens are to be chosen, one after another: what is returned for a place stays the same until
    /// there is a token.
    pub fn choices(&mut self, count: usize) -> Vec<TokenChoice> {
        while self.pending.len() < count {
            let uniform = if self.config.temperature == 0.0 {
                0.0
            } else {
                self.random.random::<f32>()
            };
            self.pending
                .push_back(TokenChoice::new(&self.config, uniform));
        }
        self.pending.iter().take(count).copied().collect()
    }

    /// The uniform numbers of the next draws, for a device that makes them all.
    pub fn draws(mut self, count: usize) -> Vec<f32> {
        let choices = self.choices(count).into_iter();
        choices.map(|choice| choice.uniform).collect()
    }

    /// Takes the token that came of [`Sampler::choice`].
    pub fn take(&mut self, token: u32) {
        self.pending.pop_front();
        self.seen.insert(token);
    }

    /// The next token.
    pub fn next(&mut self, logits: &[f32]) -> u32 {
        let token = self.choice().token(logits, &self.seen);
        self.take(token);
        token
    }
}

/// Index of the largest value, the first of equals.
pub fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(config: SamplingConfig, logits: &[f32], draws: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(&config, &[]);
        (0..draws).map(|_| sampler.next(logits)).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(drawn(SamplingConfig::default(), &[1.0, 3.0, 3.0], 1), [1]);
    }

    #[test]
    fn the_penalty_turns_greedy_away_from_what_was_said() {
        let config = SamplingConfig {
            repetition_penalty: 2.0,
            ..SamplingConfig::default()
        };
        let mut sampler = Sampler::new(&config, &[1]);
        assert_eq!(sampler.next(&[1.4, 2.0, -1.0]), 0);
        // 1.4 / 2 and 2 / 2 against 0.9.
        assert_eq!(sampler.next(&[1.4, 2.0, 0.9]), 1);
    }

    #[test]
    fn a_choice_made_elsewhere_leaves_the_same_sequence() {
        let config = SamplingConfig {
            temperature: 1.0,
            repetition_penalty: 1.5,
            seed: 3,
            ..SamplingConfig::default()
        };
        let logits: Vec<f32> = (0..20).map(|id| (id % 7) as f32).collect();
        let here = drawn(config.clone(), &logits, 30);
        let mut sampler = Sampler::new(&config, &[]);
        let (mut tokens, mut seen) = (Vec::new(), HashSet::new());
        for _ in 0..30 {
            let choice = sampler.choice();
            assert_eq!(choice, sampler.choice());
            let token = choice.token(&logits, &seen);
            sampler.take(token);
            tokens.push(token);
            seen.insert(token);
        }
        assert_eq!(tokens, here);
        let draws = Sampler::new(&config, &[]).draws(2);
        let mut sampler = Sampler::new(&config, &[]);
        assert_eq!(draws[0], sampler.choice().uniform);
        sampler.next(&logits);
        assert_eq!(draws[1], sampler.choice().uniform);
    }

    #[test]
    fn choices_that_were_looked_at_ahead_come_in_turn() {
        let config = SamplingConfig {
            temperature: 1.0,
            seed: 9,
            ..SamplingConfig::default()
        };
        let draws = Sampler::new(&config, &[]).draws(6);
        let mut sampler = Sampler::new(&config, &[]);
        let uniforms = |choices: Vec<TokenChoice>| -> Vec<f32> {
            choices.into_iter().map(|choice| choice.uniform).collect()
        };
        assert_eq!(uniforms(sampler.choices(4)), draws[..4]);
        sampler.take(1);
        sampler.take(2);
        // Two tokens were right and the rest was not kept: its numbers are used again.
        assert_eq!(sampler.choice().uniform, draws[2]);
        assert_eq!(uniforms(sampler.choices(4)), draws[2..]);
    }

    #[test]
    fn filters_leave_only_what_they_promise() {
        let logits = [0.0, 1.0, 2.0, 3.0];
        let hot = SamplingConfig {
            temperature: 5.0,
            ..SamplingConfig::default()
        };
        let top_k = SamplingConfig {
            top_k: 2,
            ..hot.clone()
        };
        assert!(drawn(top_k, &logits, 200).iter().all(|id| *id >= 2));
        // softmax([0..3]) = .032 .087 .237 .644: 0.7 needs two.
        let top_p = SamplingConfig {
            temperature: 1.0,
            top_p: 0.7,
            ..hot.clone()
        };
        assert!(drawn(top_p, &logits, 200).iter().all(|id| *id >= 2));
        let min_p = SamplingConfig {
            temperature: 1.0,
            min_p: 0.3,
            ..hot.clone()
        };
        assert!(drawn(min_p, &logits, 200).iter().all(|id| *id >= 2));
        assert!(drawn(hot, &logits, 200).contains(&0));
    }

    #[test]
    fn one_seed_gives_one_sequence_and_frequencies_follow_the_softmax() {
        let config = |seed| SamplingConfig {
            temperature: 1.0,
            seed,
            ..SamplingConfig::default()
        };
        let logits = [0.0, 2f32.ln()];
        assert_eq!(drawn(config(7), &logits, 50), drawn(config(7), &logits, 50));
        assert_ne!(drawn(config(7), &logits, 50), drawn(config(8), &logits, 50));
        let ones = drawn(config(1), &logits, 3000)
            .iter()
            .filter(|id| **id == 1)
            .count();
        // Two thirds of 3,000, four standard deviations.
        assert!((1900..2100).contains(&ones), "{ones}");
    }
}
