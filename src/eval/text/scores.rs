//! The text scores by name: characters, words, sacrebleu, and what training programs print.

use serde::Serialize;

/// Scores on one kind of token; per cent but for `cider_d`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct UnitScores {
    /// Corpus BLEU-1 to 4, exponential smoothing (sacrebleu's).
    pub bleu: [f64; 4],
    /// Mean sentence BLEU-1 to 4, exponential smoothing over the orders that the prediction has.
    pub sentence_bleu: [f64; 4],
    /// Mean ROUGE-1 F1, repeats counted.
    pub rouge_1: f64,
    /// Mean ROUGE-2 F1, repeats counted.
    pub rouge_2: f64,
    /// Mean ROUGE-L F1 of the whole text.
    pub rouge_l: f64,
    /// Mean METEOR, exact matches only.
    pub meteor: f64,
    /// Mean CIDEr-D, 0 to 10, its weights from the references evaluated.
    pub cider_d: f64,
    /// Corpus chrF up to order 6; on words the same formula with words for characters.
    pub chrf: f64,
}

/// BLEU on the tokens of sacrebleu's `zh`, per cent; what `sacrebleu -l xx-zh` prints is `bleu[3]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SacrebleuZhScores {
    /// Corpus BLEU-1 to 4, exponential smoothing.
    pub bleu: [f64; 4],
    /// Mean sentence BLEU-1 to 4, exponential smoothing over the orders that the prediction has.
    pub sentence_bleu: [f64; 4],
}

/// What a training program prints, per cent; see [`super::published`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PublishedScores {
    /// Mean ROUGE-1 F1 of the program's package.
    pub rouge_1: f64,
    /// Mean ROUGE-2 F1 of the program's package.
    pub rouge_2: f64,
    /// Mean ROUGE-L F1 of the program's package.
    pub rouge_l: f64,
    /// Mean sentence BLEU-4 of nltk, smoothing method 3.
    pub bleu_4: f64,
}

/// Every text score of a set of pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TextScores {
    /// On characters.
    pub characters: UnitScores,
    /// On jieba's words.
    pub words: UnitScores,
    /// BLEU as sacrebleu counts Chinese.
    pub sacrebleu_zh: SacrebleuZhScores,
    /// As ms-swift 4 prints them.
    pub ms_swift: PublishedScores,
    /// As ms-swift 3 prints them.
    pub ms_swift_3: PublishedScores,
    /// As LLaMA-Factory prints them.
    pub llama_factory: PublishedScores,
}

impl TextScores {
    /// Names such as `characters.bleu_4`, in the order of [`TextScores::values`].
    #[must_use]
    pub fn names() -> Vec<String> {
        let bleu = (1..=4).map(|order| format!("bleu_{order}"));
        let sentence_bleu = (1..=4).map(|order| format!("sentence_bleu_{order}"));
        let bleus: Vec<String> = bleu.chain(sentence_bleu).collect();
        let others = ["rouge_1", "rouge_2", "rouge_l", "meteor", "cider_d", "chrf"];
        let mut names = Vec::new();
        for unit in ["characters", "words"] {
            names.extend(bleus.iter().map(|name| format!("{unit}.{name}")));
            names.extend(others.iter().map(|name| format!("{unit}.{name}")));
        }
        names.extend(bleus.iter().map(|name| format!("sacrebleu_zh.{name}")));
        for program in ["ms_swift", "ms_swift_3", "llama_factory"] {
            names.extend(
                ["rouge_1", "rouge_2", "rouge_l", "bleu_4"].map(|name| format!("{program}.{name}")),
            );
        }
        names
    }

    /// Every score, in the order of [`TextScores::names`].
    #[must_use]
    pub fn values(&self) -> Vec<f64> {
        let mut values = Vec::new();
        for unit in [&self.characters, &self.words] {
            values.extend(unit.bleu);
            values.extend(unit.sentence_bleu);
            values.extend([
                unit.rouge_1,
                unit.rouge_2,
                unit.rouge_l,
                unit.meteor,
                unit.cider_d,
                unit.chrf,
            ]);
        }
        values.extend(self.sacrebleu_zh.bleu);
        values.extend(self.sacrebleu_zh.sentence_bleu);
        for program in [&self.ms_swift, &self.ms_swift_3, &self.llama_factory] {
            values.extend([
                program.rouge_1,
                program.rouge_2,
                program.rouge_l,
                program.bleu_4,
            ]);
        }
        values
    }
}
