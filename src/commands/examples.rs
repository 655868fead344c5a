//! Examples below each command's `--help`: what it is for and what to type, with files that come with the program.

use std::fmt::Write as _;

/// What a command line does, and the command line.
pub type Example = (&'static str, &'static str);

/// Where to begin.
pub const FIRST: &[Example] = &[
    (
        "Train the tiny model on the sample data set, both of which come with the program",
        "xray-qwen3vl train",
    ),
    (
        "A report about the sample image, by what was trained",
        "xray-qwen3vl infer --adapter artifacts/tiny/checkpoint-480",
    ),
    ("A web page and OpenAI's API", "xray-qwen3vl serve"),
];

/// The examples of `infer`.
pub const INFER: &[Example] = &[
    (
        "A report about an image, printed as it is generated",
        "xray-qwen3vl infer data/sample/demo.png --stream",
    ),
    (
        "The same with the adapter that `train` without arguments writes",
        "xray-qwen3vl infer data/sample/demo.png --adapter artifacts/tiny/checkpoint-480",
    ),
    (
        "All images of a folder, into a file; started again, it continues",
        "xray-qwen3vl infer --images-dir data/sample/val/images --batch-size 8 --output artifacts/reports.jsonl",
    ),
    (
        "The rows of a data file, each with its own question; `eval artifacts/rows.jsonl` scores the reports",
        "xray-qwen3vl infer data/sample/val/samples.jsonl --batch-size 8 --output artifacts/rows.jsonl",
    ),
    (
        "Another question, sampled",
        "xray-qwen3vl infer data/sample/demo.png --prompt 这张胸片有什么异常？ --temperature 0.7 --seed 1 --json",
    ),
];

/// The examples of `drafts`.
pub const DRAFTS: &[Example] = &[
    (
        "From the training data, beside the adapter that was trained on it, where `infer` and `serve` find it",
        "xray-qwen3vl drafts --data data/sample/train/samples.jsonl --output artifacts/tiny/checkpoint-480",
    ),
    (
        "To a file, with the tokens a step on held-out reports",
        "xray-qwen3vl drafts --data data/sample/train/samples.jsonl --val data/sample/val/samples.jsonl --output artifacts/drafts.bin",
    ),
];

/// The examples of `train`.
pub const TRAIN: &[Example] = &[
    (
        "The tiny model on the sample data set",
        "xray-qwen3vl train",
    ),
    (
        "A short run with keys of its own",
        "xray-qwen3vl train --set max_steps=40 --set learning_rate=1e-3 --output-dir artifacts/short",
    ),
    (
        "That run continued to a later end",
        "xray-qwen3vl train --config artifacts/short/config.toml --resume auto --set max_steps=60",
    ),
    (
        "Reinforcement learning on the findings of its own reports, from the first run on",
        "xray-qwen3vl train --config configs/tiny-grpo.toml",
    ),
    (
        "The same data set as files, DoRA, plain lines instead of the dashboard",
        "xray-qwen3vl train --train-data data/sample/train/samples.jsonl --val-data data/sample/val/samples.jsonl --set use_dora=true --set max_steps=40 --no-tui --output-dir artifacts/dora",
    ),
    (
        "Every key of a config file, explained",
        "xray-qwen3vl config example openi-lora",
    ),
];

/// The examples of `pull`.
pub const PULL: &[Example] = &[
    (
        "The model of the published recipe, into the cache that Python's tools use too",
        "xray-qwen3vl pull Qwen/Qwen3-VL-8B-Instruct",
    ),
    (
        "The same from ModelScope, into a folder",
        "xray-qwen3vl pull Qwen/Qwen3-VL-8B-Instruct --hub modelscope --output model/Qwen3-VL-8B-Instruct",
    ),
];

/// The examples of `merge`.
pub const MERGE: &[Example] = &[
    (
        "The adapter that `train` without arguments writes, merged into its base",
        "xray-qwen3vl merge --adapter artifacts/tiny/checkpoint-480 --output artifacts/merged",
    ),
    (
        "A checkpoint in another dtype",
        "xray-qwen3vl merge --model model/tiny --dtype bf16 --output artifacts/tiny-bf16",
    ),
];

/// The examples of `quantize`.
pub const QUANTIZE: &[Example] = &[
    (
        "8 bits",
        "xray-qwen3vl quantize --model model/tiny --bits 8 --output artifacts/tiny-int8",
    ),
    (
        "4 bits, with a scale for every 32 weights",
        "xray-qwen3vl quantize --model model/tiny --bits 4 --group 32 --output artifacts/tiny-int4",
    ),
    (
        "4 bits, calibrated on reports and films, with a report of what it costs",
        "xray-qwen3vl quantize --model model/tiny --bits 4 --calibrate data/sample/train/samples.jsonl --output artifacts/tiny-calibrated",
    ),
];

/// The examples of `plan`.
pub const PLAN: &[Example] = &[
    ("The run without arguments", "xray-qwen3vl plan"),
    (
        "Its time, at a measured speed, with another batch size",
        "xray-qwen3vl plan --config configs/tiny.toml --set per_device_train_batch_size=4 --samples-per-second 60",
    ),
    (
        "Settings that fit into 2 GiB",
        "xray-qwen3vl plan --config configs/tiny.toml --memory-budget 2",
    ),
];

/// The examples of `prefer`.
pub const PREFER: &[Example] = &[(
    "Pairs of the tiny model's own answers about the sample data set, judged by their findings",
    "xray-qwen3vl prefer data/sample/val/samples.jsonl --samples 4 --max-new-tokens 64 --output artifacts/pairs.jsonl",
)];

/// The examples of `score`.
pub const SCORE: &[Example] = &[(
    "How likely the tiny model finds the true reports of the sample data set",
    "xray-qwen3vl score data/sample/val/samples.jsonl",
)];

/// The examples of `eval`.
pub const EVAL: &[Example] = &[
    (
        "The tiny model on the sample data set, as a page",
        "xray-qwen3vl eval --html artifacts/eval.html",
    ),
    (
        "A finished training run on its validation data",
        "xray-qwen3vl eval --run artifacts/tiny --html artifacts/eval-tiny.html",
    ),
    (
        "The baselines that need no image",
        "xray-qwen3vl eval --baselines-only --data data/sample/val/samples.jsonl --train-data data/sample/train/samples.jsonl",
    ),
    (
        "For RadEval, whose clinical metrics read English reports",
        "xray-qwen3vl eval predictions.jsonl --export radeval radeval.json",
    ),
    (
        "With a language model as judge, which gets the reports, and its own recall on planted errors",
        "xray-qwen3vl eval predictions.jsonl --judge http://127.0.0.1:8000/v1 --judge-check --html eval.html",
    ),
];

/// The examples of `convert`.
pub const CONVERT: &[Example] = &[(
    "A file in ms-swift's format, split by study, with the tokens counted",
    "xray-qwen3vl convert data/sample/train/samples.jsonl --images data/sample/train --output artifacts/converted --model model/tiny",
)];

/// The examples of `clean`.
pub const CLEAN: &[Example] = &[
    (
        "Counts only",
        "xray-qwen3vl clean data/sample/train/samples.jsonl --summary",
    ),
    (
        "A corrected copy with its diff",
        "xray-qwen3vl clean data/sample/train/samples.jsonl --output artifacts/cleaned.jsonl",
    ),
];

/// The examples of `calibrate`.
pub const CALIBRATE: &[Example] = &[
    (
        "The adapter that `train` without arguments writes, on 300 synthetic studies; the file goes into its folder",
        "xray-qwen3vl calibrate --adapter artifacts/tiny/checkpoint-480 --data phantom:101:0..300:house",
    ),
    (
        "Then reports with probabilities",
        "xray-qwen3vl infer data/sample/demo.png --adapter artifacts/tiny/checkpoint-480 --findings",
    ),
    (
        "On the sample validation set, with at most 2 % of errors among decided answers, into another file",
        "xray-qwen3vl calibrate --data data/sample/val/samples.jsonl --target-error 0.02 --output artifacts/calibration.json",
    ),
];

/// The examples of `label`.
pub const LABEL: &[Example] = &[
    (
        "Findings of the reports of a data set, and a page that marks their words",
        "xray-qwen3vl label data/sample/val/samples.jsonl --output artifacts/labels.jsonl --html artifacts/labels.html",
    ),
    (
        "CheXpert's table",
        "xray-qwen3vl label data/sample/val/samples.jsonl --csv artifacts/chexpert.csv",
    ),
];

/// The examples of `check`.
pub const CHECK: &[Example] = &[
    (
        "Both files of a run, and what they share",
        "xray-qwen3vl check data/sample/train/samples.jsonl --val data/sample/val/samples.jsonl",
    ),
    (
        "Several data sets, as `train` takes them",
        "xray-qwen3vl check a=data/sample/train/samples.jsonl:2,data/sample/val/samples.jsonl",
    ),
];

/// The examples of `preview`.
pub const PREVIEW: &[Example] = &[(
    "The sample image as the model sees it, with the grid of its patches",
    "xray-qwen3vl preview data/sample/demo.png --output artifacts/preview.png --patches",
)];

/// The examples of `phantoms`.
pub const PHANTOMS: &[Example] = &[(
    "A hundred studies of another seed",
    "xray-qwen3vl phantoms --seed 5 --count 100 --output artifacts/phantoms",
)];

/// The examples of `init-tiny`.
pub const INIT_TINY: &[Example] = &[
    (
        "Config and tokenizer of a tiny model",
        "xray-qwen3vl init-tiny --output artifacts/tiny-init",
    ),
    (
        "Its first training",
        "xray-qwen3vl train --config configs/tiny-pretrain.toml --random-init --model artifacts/tiny-init",
    ),
];

/// The examples of `serve`.
pub const SERVE: &[Example] = &[
    (
        "The tiny model, for this machine alone",
        "xray-qwen3vl serve",
    ),
    (
        "With an adapter that requests name as their model",
        "xray-qwen3vl serve --lora department=artifacts/tiny/checkpoint-480",
    ),
    (
        "With a worklist and reports that are signed",
        "xray-qwen3vl serve --store studies",
    ),
    (
        "Between a PACS and its radiologists: films by C-STORE, signed reports back as SR and PDF",
        "xray-qwen3vl serve --store studies --dicom XRAY:11112 --dicom-allow PACS --send-to PACS@pacs.example:104",
    ),
    (
        "For a network",
        "xray-qwen3vl serve --host 0.0.0.0 --port 8000 --api-key choose-a-secret",
    ),
];

/// The examples of `store`.
pub const STORE: &[Example] = &[
    (
        "A key for a radiologist, for 90 days",
        "xray-qwen3vl store key add --store studies --name Li --role signer --days 90",
    ),
    (
        "Is everything as it was written?",
        "xray-qwen3vl store verify --store studies",
    ),
    (
        "A copy, while the server runs",
        "xray-qwen3vl store backup --store studies --output backup",
    ),
    (
        "What would a year's limit remove?",
        "xray-qwen3vl store delete --store studies --older-than-days 365 --state signed --state sent --dry-run",
    ),
];

/// The examples of `export`.
pub const EXPORT: &[Example] = &[
    (
        "Reports with consent",
        "xray-qwen3vl export --store studies --signed --output train.jsonl",
    ),
    (
        "Pairs of signed report and draft",
        "xray-qwen3vl export --store studies --signed --pairs --output pairs.jsonl",
    ),
];

/// The examples of `doctor`.
pub const DOCTOR: &[Example] = &[
    ("All devices", "xray-qwen3vl doctor"),
    (
        "One device, for a program",
        "xray-qwen3vl doctor --device cpu --json",
    ),
];

/// The examples of `bench`.
pub const BENCH: &[Example] = &[
    (
        "Reports a second with the tiny model",
        "xray-qwen3vl bench infer --model model/tiny --device cpu --batch 8",
    ),
    (
        "Training steps of a small model with random weights",
        "xray-qwen3vl bench train --random-weights tiny --steps 3",
    ),
    (
        "A server that runs already, under sixteen users",
        "xray-qwen3vl bench serve --users 16 --seconds 20",
    ),
    (
        "What several machines would bring to training, from a step of 0.39 s on one",
        "xray-qwen3vl bench scale --step-seconds 0.39",
    ),
];

/// The examples of `config`.
pub const CONFIG: &[Example] = &[
    (
        "What a run would use, with all defaults",
        "xray-qwen3vl config show --config configs/tiny.toml --set learning_rate=1e-3",
    ),
    (
        "A config to start from, every key explained",
        "xray-qwen3vl config example openi-lora",
    ),
    (
        "For editors: `configs/schema.json` is this",
        "xray-qwen3vl config schema",
    ),
];

/// The examples of `completions`.
pub const COMPLETIONS: &[Example] = &[
    (
        "bash, for this user",
        "xray-qwen3vl completions bash > ~/.local/share/bash-completion/completions/xray-qwen3vl",
    ),
    (
        "zsh, into a folder of $fpath",
        "xray-qwen3vl completions zsh > ~/.zfunc/_xray-qwen3vl",
    ),
    (
        "fish",
        "xray-qwen3vl completions fish > ~/.config/fish/completions/xray-qwen3vl.fish",
    ),
];

/// The examples of `man`.
pub const MAN: &[Example] = &[(
    "Pages for this user, read with `man xray-qwen3vl-train`",
    "xray-qwen3vl man --output ~/.local/share/man/man1",
)];

/// The examples of `version`.
pub const VERSION: &[Example] = &[(
    "For a bug report, or a program",
    "xray-qwen3vl version --json",
)];

/// Columns after which a command line is continued on the next: help is wrapped at the width of the terminal, and a
/// line that was wrapped cannot be typed as it is.
const COLUMNS: usize = 72;

/// A command line broken as a shell takes it, never between an option and its value.
fn broken(command: &str) -> String {
    let mut pieces: Vec<String> = Vec::new();
    for word in command.split(' ') {
        match pieces.last_mut() {
            Some(piece) if piece.starts_with("--") && !word.starts_with('-') => {
                *piece += " ";
                *piece += word;
            }
            _ => pieces.push(word.to_string()),
        }
    }
    let mut text = String::new();
    let mut column = 0;
    for piece in pieces {
        let width = piece.chars().count();
        if column > 0 && column + 1 + width > COLUMNS {
            text += " \\\n          ";
            column = 4;
        } else if column > 0 {
            text.push(' ');
            column += 1;
        }
        text += &piece;
        column += width;
    }
    text
}

/// The examples as a section of `--help`, with what else is there.
pub fn section(examples: &[Example], rest: &str) -> String {
    let mut text = "Examples:\n".to_string();
    for (what, command) in examples {
        let _ = write!(text, "\n  {what}:\n      {}\n", broken(command));
    }
    if !rest.is_empty() {
        let _ = write!(text, "\n{rest}");
    }
    text.trim_end().to_string()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::cli::Cli;

    /// Files that an example before it, or a run without arguments, writes.
    const WRITTEN: &[&str] = &["artifacts/tiny", "artifacts/short", "artifacts/tiny-init"];

    fn commands() -> Vec<(String, Vec<String>)> {
        let all = Cli::command();
        std::iter::once(&all)
            .chain(all.get_subcommands())
            .filter(|command| command.get_name() != "help")
            .map(|command| {
                let help = command
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                let whole = help
                    .split(" \\\n")
                    .map(str::trim_start)
                    .collect::<Vec<_>>()
                    .join(" ");
                let lines = whole.lines().map(str::trim);
                let lines = lines.filter(|line| line.starts_with("xray-qwen3vl "));
                (
                    command.get_name().to_string(),
                    lines.map(str::to_string).collect(),
                )
            })
            .collect()
    }

    #[test]
    fn every_command_has_examples_that_it_takes() {
        let commands = commands();
        assert!(commands.len() >= 14);
        for (name, examples) in commands {
            assert!(!examples.is_empty(), "`{name} --help` has no example");
            assert!(
                name == "xray-qwen3vl"
                    || examples
                        .iter()
                        .any(|example| example.starts_with(&format!("xray-qwen3vl {name}"))),
                "no example of `{name}` calls it"
            );
            for example in examples {
                let typed = example.split(" > ").next().unwrap_or_default();
                if let Err(error) = Cli::try_parse_from(typed.split_whitespace()) {
                    panic!("{example}\n{error}");
                }
            }
        }
    }

    #[test]
    fn a_long_line_is_continued_where_a_shell_takes_it() {
        let words = vec!["word"; 40].join(" ");
        let text = broken(&words);
        assert!(
            text.lines().all(|line| line.chars().count() <= COLUMNS + 8),
            "{text}"
        );
        let again: Vec<&str> = text
            .split_whitespace()
            .filter(|word| *word != "\\")
            .collect();
        assert_eq!(again.join(" "), words);
    }

    #[test]
    fn files_in_examples_come_with_the_program_or_are_written_by_one() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
        for (_, examples) in commands() {
            for example in examples {
                let typed = example.split(" > ").next().unwrap_or_default();
                let words: Vec<&str> = typed.split_whitespace().collect();
                for (index, word) in words.iter().enumerate() {
                    let paths = word.rsplit('=').next().unwrap_or_default();
                    let is_output = index > 0
                        && ["--output", "--output-dir", "--html", "--csv"]
                            .contains(&words[index - 1]);
                    // A name on a hub.
                    let is_name = words.get(1) == Some(&"pull") && index == 2;
                    if is_output || is_name || paths.contains("://") {
                        continue;
                    }
                    for path in paths.split(',').filter(|path| path.contains('/')) {
                        // Without the weight of a data set.
                        let weight = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
                        let path = match path.rsplit_once(':') {
                            Some((path, number)) if weight(number) => path,
                            _ => path,
                        };
                        let written = |name: &&str| Path::new(path).starts_with(name);
                        assert!(
                            WRITTEN.iter().any(written) || repository.join(path).exists(),
                            "{example}: no `{path}`"
                        );
                    }
                }
            }
        }
    }
}
