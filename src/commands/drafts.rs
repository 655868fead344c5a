//! `drafts`: a store of answers to draft tokens from, and how commands find it.

use std::{
    io::{Write, stdout},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::Args;
use rayon::prelude::*;

use super::{
    models::{DownloadArgs, find},
    shared_args::{DraftingArgs, ReadingArgs},
    shell::unless_closed,
};
use crate::{
    base::{files::size_text, hub::Want},
    dataset::Dataset,
    processor::tokenizer::Tokenizer,
    runtime::{
        accelerator::Accelerator,
        generate::{
            drafts::{DRAFTS_FILE, DraftCounts, DraftStore, Drafts, MOST_DRAFTED, replay},
            is_drafted,
        },
        pipeline::PipelineOptions,
    },
    study::counted,
};

/// Arguments of `drafts`.
#[derive(Debug, Args)]
pub struct DraftsArgs {
    /// Data whose last answers are stored, as `train` takes it: the training data of the adapter.
    #[arg(long, value_name = "DATA")]
    pub data: String,
    /// File to write, or the folder of an adapter, which gets a `drafts.bin`. What is there is replaced.
    #[arg(long, value_name = "FILE|DIR")]
    pub output: PathBuf,
    /// Held-out data: prints how many tokens a step would give if the model wrote just these answers.
    #[arg(long, value_name = "DATA")]
    pub val: Option<String>,
    /// Folder or name of the checkpoint that will write; its tokenizer makes the tokens.
    #[arg(long, value_name = "DIR|ID", default_value = "model/tiny")]
    pub model: PathBuf,
    /// Downloads; of the model, all but the weights.
    #[command(flatten)]
    pub download: DownloadArgs,
    /// How the data files are read.
    #[command(flatten)]
    pub reading: ReadingArgs,
}

/// Runs `drafts`.
///
/// # Errors
/// Data that cannot be read, or a file that cannot be written.
pub fn run(args: DraftsArgs) -> Result<()> {
    let model = find(&args.model, Want::Description, args.download)?;
    let tokenizer = Tokenizer::from_folder(&model).context(
        "the answers cannot be made into tokens; hint: `--model` names the folder of a checkpoint",
    )?;
    let answers = |name: &str| -> Result<Vec<Vec<u32>>> {
        let data = Dataset::open_with(name, &args.reading.options())?;
        for remark in data.remarks() {
            eprintln!("{remark}");
        }
        answers_of(&data, &tokenizer)
    };
    let store = DraftStore::of_answers(&args.data, &answers(&args.data)?)?;
    let path = match args.output.is_dir() {
        true => args.output.join(DRAFTS_FILE),
        false => args.output.clone(),
    };
    store.save(&path, &tokenizer)?;
    let mut lines = format!(
        "`{}`: {} of {}, {}\n",
        path.display(),
        counted(store.texts() as usize, "answer", "answers"),
        counted(store.tokens() as usize, "token", "tokens"),
        size_text(store.bytes())
    );
    if let Some(val) = &args.val {
        let held = answers(val)?;
        let drafts = Drafts::from_store(store);
        for most in [2, 4, MOST_DRAFTED, 15] {
            let counts = replay(
                &Drafts {
                    most,
                    ..drafts.clone()
                },
                &held,
            );
            lines += &format!("{most} drafted at most: {}\n", counts_text(&counts));
        }
    }
    unless_closed(stdout().write_all(lines.as_bytes())).context("cannot print what was written")
}

/// What drafts brought, in words.
fn counts_text(counts: &DraftCounts) -> String {
    let share = 100.0 * counts.accepted as f64 / counts.drafted.max(1) as f64;
    format!(
        "{:.2} tokens a step; {share:.0} % of {} were right",
        counts.tokens as f64 / counts.steps.max(1) as f64,
        counted(counts.drafted, "drafted token", "drafted tokens"),
    )
}

/// What is said at the end of a run with drafts.
pub(super) fn tell(drafts: Option<&Drafts>, counts: &DraftCounts) {
    if counts.steps > 0 {
        eprintln!("drafts: {}", counts_text(counts));
    } else if drafts.is_some() {
        eprintln!("drafts: nothing was drafted");
    }
}

/// Token ids of the last answer of each row, with the token that ends it.
fn answers_of(data: &Dataset, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
    let one = |index: usize| -> Result<Option<Vec<u32>>> {
        let Some(answer) = data.text(index).answer else {
            return Ok(None);
        };
        let place = || format!("`{}`, row {}", data.name(), data.row(index));
        tokenizer
            .refuse_control_tokens(&answer)
            .with_context(place)?;
        let ids = tokenizer.encode(&format!("{answer}<|im_end|>"));
        Ok(Some(ids.with_context(place)?))
    };
    let answers = (0..data.len()).into_par_iter().map(one);
    let answers: Vec<Option<Vec<u32>>> = answers.collect::<Result<_>>()?;
    Ok(answers.into_iter().flatten().collect())
}

/// What a command drafts from.
#[derive(Debug, Clone, Default)]
pub(super) struct Drafting {
    pub(super) drafts: Option<Drafts>,
    /// A line about it for stderr.
    pub(super) note: Option<String>,
    /// Whether nothing was typed: what is beside an adapter is taken.
    pub(super) found: bool,
}

/// What is drafted from in batches of at most `rows` answers; what the user should know goes to stderr.
///
/// # Errors
/// As [`drafting`].
pub(super) fn drafting_for_batches<B: Accelerator>(
    args: &DraftingArgs,
    options: &PipelineOptions,
    tokenizer: &Tokenizer,
    rows: usize,
) -> Result<Option<Drafts>> {
    let adapter = options.adapter.as_deref();
    let Drafting {
        drafts,
        note,
        found,
    } = drafting(args, adapter, &options.model, tokenizer)?;
    // There a step of several rows takes nearly twice as long as one of one row.
    if B::DECODER_VERIFIES && found && drafts.is_some() {
        eprintln!(
            "note: nothing is drafted: on this device that seldom pays; `--drafts FILE` does it"
        );
        return Ok(None);
    }
    if let Some(note) = note {
        eprintln!("note: {note}");
    }
    if drafts.is_some() && !is_drafted::<B>(rows) {
        eprintln!(
            "note: nothing is drafted for {rows} answers at once, which fill a step of this device themselves"
        );
    }
    Ok(drafts)
}

/// What was typed, or what is beside the adapter, or else the model.
///
/// # Errors
/// A file that was named and cannot be used; one that was only found is left, and that is noted.
pub(super) fn drafting(
    args: &DraftingArgs,
    adapter: Option<&Path>,
    model: &Path,
    tokenizer: &Tokenizer,
) -> Result<Drafting> {
    let most = args.draft_tokens;
    let with = |store: DraftStore, path: &Path| Drafting {
        note: Some(format!(
            "tokens are drafted from `{}` ({})",
            path.display(),
            counted(store.texts() as usize, "answer", "answers")
        )),
        drafts: Some(Drafts {
            most,
            ..Drafts::from_store(store)
        }),
        found: false,
    };
    match args.drafts.as_deref() {
        Some("off") => Ok(Drafting::default()),
        Some("prompt") => Ok(Drafting {
            drafts: Some(Drafts {
                most,
                ..Drafts::default()
            }),
            ..Drafting::default()
        }),
        Some(file) => Ok(with(
            DraftStore::load(Path::new(file), tokenizer)?,
            Path::new(file),
        )),
        None => {
            let beside = adapter.into_iter().chain(Some(model));
            let mut found = beside.map(|folder| folder.join(DRAFTS_FILE));
            let Some(path) = found.find(|path| path.is_file()) else {
                return Ok(Drafting {
                    found: true,
                    ..Drafting::default()
                });
            };
            Ok(Drafting {
                found: true,
                ..match DraftStore::load(&path, tokenizer) {
                    Ok(store) => with(store, &path),
                    Err(error) => Drafting {
                        note: Some(format!("nothing is drafted: {error}")),
                        ..Drafting::default()
                    },
                }
            })
        }
    }
}
