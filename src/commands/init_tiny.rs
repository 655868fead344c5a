//! `init-tiny`: the empty shell of a tiny Qwen3-VL for the phantom studies, ready to be trained.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::{
    progress::{Progress, Unit},
    shell::{program, shell_word},
    shipped::shipped,
};
use crate::{
    base::files::write_atomic,
    phantom::{Dialect, PhantomStudies},
    processor::{chat::ChatTemplate, train_tokenizer::train_tokenizer},
    qwen3_vl::config::Qwen3VlConfig,
};

/// Arguments of `init-tiny`.
#[derive(Debug, Args)]
pub struct InitTinyArgs {
    /// Folder to write.
    #[arg(long, value_name = "DIR", default_value = "artifacts/tiny-init")]
    pub output: PathBuf,
    /// Seed of the reports that the tokenizer is trained on.
    #[arg(long, value_name = "N", default_value_t = 7)]
    pub seed: u64,
}

/// Studies whose reports the tokenizer is learnt from.
const CORPUS_STUDIES: u64 = 4000;

/// Runs `init-tiny`.
///
/// # Errors
/// The folder cannot be written.
pub fn run(args: &InitTinyArgs) -> Result<()> {
    if std::fs::read_dir(&args.output).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!(
            "`{}` is there and not empty; name a new folder with --output",
            args.output.display()
        );
    }
    let dialects = [Dialect::Plain, Dialect::House];
    let all = CORPUS_STUDIES * dialects.len() as u64;
    let mut progress = Progress::new("drawing studies", all, Unit::Items);
    let mut corpus = Vec::new();
    for dialect in dialects {
        let studies = PhantomStudies::new(args.seed).with_dialect(dialect);
        for index in 0..CORPUS_STUDIES {
            let (_, prompt, report) = studies.get(index).into_parts();
            corpus.extend([prompt, report]);
            progress.set(corpus.len() as u64 / 2, all);
        }
    }
    progress.finish();
    let mut config = Qwen3VlConfig::tiny();
    let vocab = config.text_config.vocab_size;
    eprintln!(
        "learning a tokenizer of {vocab} words from {} texts",
        corpus.len()
    );
    let trained = train_tokenizer(corpus.iter().map(String::as_str), vocab)?;
    std::fs::create_dir_all(&args.output)
        .with_context(|| format!("cannot make the folder `{}`", args.output.display()))?;
    trained.save(&args.output)?;
    let tokenizer = trained.tokenizer()?;
    let special = tokenizer.special();
    let video_pad = tokenizer.token_to_id("<|video_pad|>");
    config.text_config.eos_token_id = Some(special.im_end);
    config.image_token_id = special.image_pad;
    config.video_token_id = video_pad.unwrap_or(special.image_pad);
    config.vision_start_token_id = special.vision_start;
    config.vision_end_token_id = special.vision_end;
    let write = |name: &str, text: String| {
        write_atomic(&args.output.join(name), |out: &mut dyn Write| {
            out.write_all(text.as_bytes())
        })
    };
    write("config.json", config.to_published_json("float32"))?;
    write(
        "chat_template.jinja",
        ChatTemplate::instruct()?.source().to_string(),
    )?;
    let json = |value: serde_json::Value| format!("{value:#}\n");
    write(
        "generation_config.json",
        json(serde_json::json!({
            "do_sample": false,
            "eos_token_id": [special.im_end, special.endoftext],
            "pad_token_id": special.endoftext,
        })),
    )?;
    write(
        "preprocessor_config.json",
        json(serde_json::json!({
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "merge_size": 2,
            "patch_size": 16,
            "size": {"longest_edge": 1_003_520, "shortest_edge": 4096},
            "temporal_patch_size": 2,
        })),
    )?;
    let recipe = shipped(Path::new("configs/tiny-pretrain.toml"));
    println!(
        "wrote `{}`; train it with: {} train --config {} --random-init --model {}",
        args.output.display(),
        program(),
        shell_word(&recipe.display().to_string()),
        shell_word(&args.output.display().to_string())
    );
    Ok(())
}
