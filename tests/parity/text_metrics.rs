//! The text metrics against the published Python packages, pair by pair, on made-up reports.
//!
//! `tests/fixtures/metrics/gen_goldens.py` names the packages and their versions.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use xray_qwen3vl::eval::text::bleu::{BleuCounts, Smoothing};
use xray_qwen3vl::eval::text::chrf::ChrfCounts;
use xray_qwen3vl::eval::text::published::{PublishedPair, llama_factory, ms_swift, ms_swift_3};
use xray_qwen3vl::eval::text::segment::{CutText, characters, sacrebleu_zh, words};
use xray_qwen3vl::eval::text::{
    PublishedScores, TextEvaluation, TextLanguage, TextPair, TextScores, UnitScores, jieba,
};

/// Of numbers in per cent. The packages add 1e-8 to a divisor of ROUGE that our plain form leaves
/// out, which is at most 5e-7 here; all else differs in the order of sums alone.
const TOLERANCE: f64 = 1e-6;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/metrics")
}

fn goldens() -> Value {
    let text = fs::read_to_string(folder().join("goldens.json")).expect("goldens.json is readable");
    serde_json::from_str(&text).expect("goldens.json is JSON")
}

fn pairs() -> Vec<TextPair> {
    let text = fs::read_to_string(folder().join("pairs.jsonl")).expect("pairs.jsonl is readable");
    text.lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).expect("a row is JSON");
            let field = |key: &str| row[key].as_str().expect("a field is text").to_owned();
            TextPair {
                study: field("study"),
                prediction: field("prediction"),
                reference: field("reference"),
            }
        })
        .collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    let numbers: Option<Vec<f64>> = match value {
        Value::Array(rows) => rows.iter().map(Value::as_f64).collect(),
        single => single.as_f64().map(|number| vec![number]),
    };
    numbers.unwrap_or_else(|| panic!("not numbers: {value}"))
}

fn assert_near(ours: &[f64], reference: &Value, what: &str) {
    let reference = numbers(reference);
    assert_eq!(ours.len(), reference.len(), "{what}");
    for (at, (ours, reference)) in ours.iter().zip(&reference).enumerate() {
        let difference = (ours - reference).abs();
        assert!(
            difference <= TOLERANCE,
            "{what}[{at}]: ours {ours}, reference {reference}, difference {difference:e}"
        );
    }
}

#[test]
fn words_equal_those_of_python_jieba() {
    let goldens = goldens();
    for (at, pair) in pairs().iter().enumerate() {
        for (side, text) in [&pair.prediction, &pair.reference].into_iter().enumerate() {
            let reference: Vec<&str> = goldens["words"][at][side]
                .as_array()
                .expect("a list")
                .iter()
                .filter_map(Value::as_str)
                .collect();
            assert_eq!(jieba::cut(text), reference, "pair {at}, text {text:?}");
            let tokens = goldens["zh_tokens"][at][side].as_str().expect("a text");
            assert_eq!(sacrebleu_zh(text), tokens, "pair {at}, text {text:?}");
        }
    }
}

#[test]
fn corpus_scores_equal_the_packages() {
    let goldens = goldens();
    let scores = TextEvaluation::new(&pairs(), TextLanguage::Chinese)
        .expect("there are pairs")
        .scores();
    let unit = |scores: &UnitScores, block: &Value, name: &str| {
        assert_near(&scores.bleu, &block["corpus_exp"], &format!("{name} bleu"));
        assert_near(
            &scores.sentence_bleu,
            &mean(&block["sentence_exp"]),
            &format!("{name} sentence bleu"),
        );
        let rouge = [scores.rouge_1, scores.rouge_2, scores.rouge_l];
        assert_near(&rouge, &mean(&block["rouge"]), &format!("{name} rouge"));
        assert_near(
            &[scores.meteor],
            &mean(&block["meteor"]),
            &format!("{name} meteor"),
        );
        assert_near(
            &[scores.cider_d],
            &block["cider_d"],
            &format!("{name} cider-d"),
        );
        assert_near(&[scores.chrf], &block["chrf"], &format!("{name} chrf"));
    };
    unit(&scores.characters, &goldens["characters"], "characters");
    unit(&scores.words, &goldens["jieba"], "words");
    assert_near(
        &scores.characters.bleu,
        &goldens["sacrebleu_char"]["corpus_exp"],
        "sacrebleu char",
    );
    assert_near(
        &[scores.characters.chrf],
        &goldens["sacrebleu_chrf"],
        "sacrebleu chrf",
    );
    assert_near(
        &scores.sacrebleu_zh.bleu,
        &goldens["sacrebleu_zh"]["corpus_exp"],
        "sacrebleu zh",
    );
    let sentence = mean(&goldens["sacrebleu_zh"]["sentence_exp"]);
    assert_near(
        &scores.sacrebleu_zh.sentence_bleu,
        &sentence,
        "sacrebleu zh, sentences",
    );

    let program = |scores: PublishedScores, name: &str| {
        let ours = [
            scores.rouge_1,
            scores.rouge_2,
            scores.rouge_l,
            scores.bleu_4,
        ];
        assert_near(&ours, &goldens[name]["mean"], name);
    };
    program(scores.ms_swift, "ms_swift");
    program(scores.ms_swift_3, "ms_swift_3");
    program(scores.llama_factory, "llama_factory");
}

/// The mean of rows, or of numbers, over all pairs.
fn mean(rows: &Value) -> Value {
    let rows: Vec<Vec<f64>> = rows
        .as_array()
        .expect("a list")
        .iter()
        .map(numbers)
        .collect();
    let mean = |at: usize| rows.iter().map(|row| row[at]).sum::<f64>() / rows.len() as f64;
    Value::from((0..rows[0].len()).map(mean).collect::<Vec<f64>>())
}

#[test]
fn each_pair_equals_the_packages() {
    let goldens = goldens();
    let pairs = pairs();
    let evaluation = TextEvaluation::new(&pairs, TextLanguage::Chinese).expect("there are pairs");
    for at in 0..pairs.len() {
        let scores: TextScores = evaluation.pair_scores(at).expect("a pair");
        for (scores, name) in [(scores.characters, "characters"), (scores.words, "jieba")] {
            let block = &goldens[name];
            let what = format!("pair {at} on {name}");
            assert_near(&scores.sentence_bleu, &block["sentence_exp"][at], &what);
            assert_near(
                &[scores.rouge_1, scores.rouge_2, scores.rouge_l],
                &block["rouge"][at],
                &what,
            );
            assert_near(&[scores.meteor], &block["meteor"][at], &what);
            assert_near(&[scores.cider_d], &block["cider_d_pairs"][at], &what);
            assert_near(&[scores.chrf], &block["chrf_pairs"][at], &what);
        }
        let what = format!("pair {at} of sacrebleu zh");
        assert_near(
            &scores.sacrebleu_zh.sentence_bleu,
            &goldens["sacrebleu_zh"]["sentence_exp"][at],
            &what,
        );
    }
}

#[test]
fn each_smoothing_equals_sacrebleu() {
    let goldens = goldens();
    let pairs = pairs();
    let smoothings = [
        (Smoothing::Exponential, "exp"),
        (Smoothing::None, "none"),
        (Smoothing::AddK(1.0), "add-k-1"),
        (Smoothing::AddK(0.5), "add-k-0.5"),
    ];
    for (tokens, block) in [
        (characters as fn(&str) -> Vec<&str>, "characters"),
        (words, "jieba"),
    ] {
        let counts: Vec<BleuCounts> = pairs
            .iter()
            .map(|pair| BleuCounts::of(&tokens(&pair.prediction), &tokens(&pair.reference)))
            .collect();
        let mut sum = BleuCounts::default();
        for pair in &counts {
            sum.add(pair, 1.0);
        }
        for (smoothing, name) in smoothings {
            let ours: [f64; 4] = std::array::from_fn(|at| 100.0 * sum.corpus(at + 1, smoothing));
            assert_near(
                &ours,
                &goldens[block][format!("corpus_{name}")],
                &format!("{block} corpus {name}"),
            );
            let Some(reference) = goldens[block][format!("sentence_{name}")].as_array() else {
                continue;
            };
            for (at, (pair, reference)) in counts.iter().zip(reference).enumerate() {
                let ours: [f64; 4] =
                    std::array::from_fn(|order| 100.0 * pair.sentence(order + 1, smoothing));
                assert_near(&ours, reference, &format!("{block} pair {at} {name}"));
            }
        }
    }
}

#[test]
fn each_pair_equals_the_training_programs() {
    let goldens = goldens();
    for (at, pair) in pairs().iter().enumerate() {
        let (prediction, reference) = (
            &CutText::new(&pair.prediction),
            &CutText::new(&pair.reference),
        );
        let check = |ours: Option<PublishedPair>, name: &str| {
            let golden = &goldens[name]["pairs"][at];
            match ours {
                None => assert!(golden.is_null(), "{name} counts pair {at}"),
                Some(PublishedPair { rouge, bleu_4 }) => {
                    let ours = [rouge.rouge_1, rouge.rouge_2, rouge.rouge_l, bleu_4]
                        .map(|score| 100.0 * score);
                    assert_near(&ours, golden, &format!("{name} pair {at}"));
                }
            }
        };
        check(ms_swift(prediction, reference), "ms_swift");
        check(ms_swift_3(prediction, reference), "ms_swift_3");
        check(Some(llama_factory(prediction, reference)), "llama_factory");
    }
}

#[test]
fn chrf_leaves_white_space_out() {
    let chrf =
        |prediction| ChrfCounts::of(&characters(prediction), &characters("双肺清晰")).score();
    assert_eq!(chrf("双 肺\n清晰"), chrf("双肺清晰"));
}
