//! Rules about single tokens: those that may not come yet, at all, or after what was written.

use std::sync::Arc;

use llguidance::toktrie::TokEnv;

use super::engine::TokenConstraint;

/// One text that an answer does not contain.
struct Word {
    bytes: Vec<u8>,
    /// By the number of its bytes that are written already: the tokens that would complete it.
    completed_by: Vec<Vec<u32>>,
}

/// Texts that an answer does not contain, however they are cut into tokens.
pub struct BadWords {
    env: TokEnv,
    words: Vec<Word>,
    longest: usize,
}

impl BadWords {
    /// Looks for the tokens that would complete one of `texts`, none of which is empty.
    pub(super) fn new(env: TokEnv, texts: &[String]) -> Self {
        let trie = env.tok_trie();
        let words = texts.iter().map(|text| {
            let bytes = text.as_bytes().to_vec();
            let mut completed_by = vec![Vec::new(); bytes.len()];
            for id in 0..trie.vocab_size() as u32 {
                let token = trie.token(id);
                if token.windows(bytes.len()).any(|window| window == bytes) {
                    completed_by[0].push(id);
                }
                // A token cannot complete more than it has.
                let first = bytes.len().saturating_sub(token.len()).max(1);
                for (written, tokens) in completed_by.iter_mut().enumerate().skip(first) {
                    if token.starts_with(&bytes[written..]) {
                        tokens.push(id);
                    }
                }
            }
            Word {
                bytes,
                completed_by,
            }
        });
        let words: Vec<Word> = words.collect();
        let longest = words.iter().map(|word| word.bytes.len()).max();
        Self {
            words,
            longest: longest.unwrap_or(0),
            env,
        }
    }

    /// Forbids tokens after a text that ends so.
    fn mask(&self, end: &[u8], logits: &mut [f32]) {
        for word in &self.words {
            for (written, tokens) in word.completed_by.iter().enumerate() {
                if !end.ends_with(&word.bytes[..written]) {
                    continue;
                }
                for id in tokens {
                    if let Some(logit) = logits.get_mut(*id as usize) {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }

    /// Appends a token to the end of a text.
    fn append(&self, token: u32, end: &mut Vec<u8>) {
        end.extend_from_slice(self.env.tok_trie().token(token));
        end.drain(..end.len().saturating_sub(self.longest));
    }
}

/// A constraint on single tokens, with or without a form beside it.
pub struct TokenRules {
    /// None of these before `min_new_tokens`.
    pub end_tokens: Vec<u32>,
    /// Fewest tokens of the answer.
    pub min_new_tokens: usize,
    /// The only tokens there are besides the end tokens, if not all.
    pub allowed: Option<Vec<u32>>,
    /// Texts that must not come, and the end of the answer so far.
    pub bad_words: Option<(Arc<BadWords>, Vec<u8>)>,
    /// Form of the answer.
    pub form: Option<Box<dyn TokenConstraint>>,
    /// Tokens of the answer so far.
    pub written: usize,
}

impl TokenConstraint for TokenRules {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        if let Some(form) = &mut self.form {
            form.mask(logits)?;
        }
        if let Some(allowed) = &self.allowed {
            let mut kept = vec![f32::NEG_INFINITY; logits.len()];
            for id in allowed.iter().chain(&self.end_tokens) {
                if let Some(logit) = logits.get(*id as usize) {
                    kept[*id as usize] = *logit;
                }
            }
            logits.copy_from_slice(&kept);
        }
        if let Some((words, end)) = &self.bad_words {
            words.mask(end, logits);
        }
        if self.written < self.min_new_tokens {
            let before = self.form.is_some().then(|| logits.to_vec());
            for id in &self.end_tokens {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            // A form that is complete cannot be made longer.
            if let Some(before) = before
                && logits.iter().all(|logit| *logit == f32::NEG_INFINITY)
            {
                logits.copy_from_slice(&before);
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<bool, String> {
        self.written += 1;
        if let Some((words, end)) = &mut self.bad_words {
            words.append(token, end);
        }
        match &mut self.form {
            Some(form) => form.accept(token),
            None => Ok(false),
        }
    }

    fn is_free(&self) -> bool {
        self.written >= self.min_new_tokens
            && self.allowed.is_none()
            && self.form.as_ref().is_none_or(|form| form.is_free())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{super::grammar::GrammarFactory, *};
    use crate::processor::tokenizer::Tokenizer;

    #[test]
    fn a_bad_word_is_not_written_by_any_tokens() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let vocab = tokenizer.vocab_size();
        let factory = GrammarFactory::new(&tokenizer, vocab + 5).unwrap();
        let words = Arc::new(factory.bad_words(&["影正".to_owned(), "ab".to_owned()]));
        let mut rules = TokenRules {
            end_tokens: Vec::new(),
            min_new_tokens: 0,
            allowed: None,
            bad_words: Some((words, Vec::new())),
            form: None,
            written: 0,
        };
        assert!(rules.is_free());
        // The model insists on it, token by token and byte by byte.
        let wanted = [
            tokenizer.encode_plain("心影正常").unwrap(),
            tokenizer.encode_plain("xab").unwrap(),
        ];
        for id in wanted.into_iter().flatten() {
            let mut logits = vec![0.0; vocab + 5];
            logits[id as usize] = 1.0;
            rules.mask(&mut logits).unwrap();
            let chosen = crate::runtime::generate::sampler::argmax(&logits);
            rules.accept(chosen).unwrap();
        }
        let mut logits = vec![0.0; vocab + 5];
        let (words, _) = rules.bad_words.take().unwrap();
        words.mask("心影".as_bytes(), &mut logits);
        let text_of = |id: usize| tokenizer.decode(&[id as u32], true).unwrap();
        for (id, logit) in logits.iter().enumerate().take(vocab) {
            let text = text_of(id);
            let completes = text.starts_with('正') || text.contains("影正") || text.contains("ab");
            if completes {
                assert_eq!(*logit, f32::NEG_INFINITY, "{text}");
            }
        }
        assert!(logits.contains(&0.0));
    }

    #[test]
    fn no_end_token_comes_before_the_fewest_tokens() {
        let mut rules = TokenRules {
            end_tokens: vec![1],
            min_new_tokens: 2,
            allowed: Some(vec![0, 3]),
            bad_words: None,
            form: None,
            written: 0,
        };
        let masked = |rules: &mut TokenRules| {
            let mut logits = [0.5; 4];
            rules.mask(&mut logits).unwrap();
            rules.accept(0).unwrap();
            logits.map(|logit| logit == 0.5)
        };
        assert_eq!(masked(&mut rules), [true, false, false, true]);
        assert!(!rules.is_free());
        assert_eq!(masked(&mut rules), [true, false, false, true]);
        assert_eq!(masked(&mut rules), [true, true, false, true]);
    }
}
