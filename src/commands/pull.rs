//! `pull`: a model or adapter from Hugging Face or ModelScope, into the caches of their tools or a folder.

use std::{
    io::{Write, stdout},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use super::{
    models::{download, summary, usage},
    shell::{program, shell_word, unless_closed},
    shipped::shipped,
    usage::UsageError,
};
use crate::base::hub::{
    HubError, Want, WeightsKind,
    name::{Hub, ModelId, check_revision, expand_home},
    pull::PullOptions,
    resolve::{Resolved, resolve},
    settings::HubSettings,
};

/// Which hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HubChoice {
    /// Hugging Face, or the mirror in HF_ENDPOINT.
    Hf,
    /// ModelScope.
    Modelscope,
}

impl From<HubChoice> for Hub {
    fn from(choice: HubChoice) -> Self {
        match choice {
            HubChoice::Hf => Self::HuggingFace,
            HubChoice::Modelscope => Self::ModelScope,
        }
    }
}

/// Arguments of `pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// OWNER/NAME, such as Qwen/Qwen3-VL-8B-Instruct; @REVISION may follow, `hf:` or `ms:` stand before it.
    #[arg(value_name = "ID")]
    pub id: String,
    /// Branch, tag or commit [default: main, on ModelScope master].
    #[arg(long, value_name = "R")]
    pub revision: Option<String>,
    /// Hub [default: hf, or modelscope where USE_MODELSCOPE_HUB is 1].
    #[arg(long, value_enum)]
    pub hub: Option<HubChoice>,
    /// Take the files that fit this pattern with `*` and `?` instead of those a model needs; may be given
    /// several times.
    #[arg(long, value_name = "PATTERN")]
    pub include: Vec<String>,
    /// Folder for the files, in place of the hub's cache.
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Runs `pull`; the folder goes to stdout.
///
/// # Errors
/// A name that is none, a hub that does not give the model, bytes that are not the listed ones, a full disk.
pub fn run(args: PullArgs) -> Result<()> {
    let id = model_id(&args)?;
    let settings = HubSettings::from_env();
    let options = PullOptions {
        want: Want::Checkpoint,
        include: args.include,
        output: args.output.as_deref().map(expand_home),
    };
    if let Some((hub, folder)) = on_other_hub(&id, &options, &settings) {
        eprintln!(
            "`{id}` is here already, from {hub}, and is not downloaded twice; `pull {}{id}` does so",
            settings.default_hub.prefix()
        );
        return print_folder(&folder);
    }
    let pulled = match download(&id, &options, &settings) {
        Err(HubError::Offline { .. }) => return Err(offline(&id, &options, &settings)),
        pulled => pulled.map_err(usage)?,
    };
    eprintln!("{}", summary(&pulled));
    if id.hub.is_none() && options.output.is_none() && shipped(id.id.as_ref()).exists() {
        eprintln!(
            "note: `{}` is also a folder here, which other commands take; `{}{id}` names the download",
            id.id,
            pulled.hub.prefix()
        );
    }
    if options.include.is_empty() {
        let name = match &options.output {
            Some(folder) => folder.display().to_string(),
            None => id.to_string(),
        };
        let flag = match pulled.kind {
            WeightsKind::Adapter => "--adapter",
            _ => "--model",
        };
        eprintln!(
            "use it with: {} infer {flag} {}",
            program(),
            shell_word(&name)
        );
    }
    print_folder(&pulled.folder)
}

fn model_id(args: &PullArgs) -> Result<ModelId> {
    let mut id = ModelId::parse_strictly(&args.id).map_err(|error| usage(error.into()))?;
    if let Some(revision) = &args.revision {
        check_revision(revision).map_err(|reason| UsageError(format!("--revision: {reason}")))?;
        if id.revision.as_ref().is_some_and(|named| named != revision) {
            bail!(UsageError(format!(
                "`{id}` names a revision and --revision another; leave one out"
            )));
        }
        id.revision = Some(revision.clone());
    }
    if let Some(hub) = args.hub.map(Hub::from) {
        if id.hub.is_some_and(|named| named != hub) {
            bail!(UsageError(format!(
                "`{id}` names a hub and --hub another; leave one out"
            )));
        }
        id.hub = Some(hub);
    }
    Ok(id)
}

/// Without a network, what is on the disk is all that can be said.
fn offline(id: &ModelId, options: &PullOptions, settings: &HubSettings) -> anyhow::Error {
    let variable = settings.offline.unwrap_or_default();
    match found(id, options, settings) {
        Some(found) => anyhow::anyhow!(
            "{variable} is set, so nothing is fetched; `{id}` was downloaded before, into `{}`",
            found.folder.display()
        ),
        None => usage(HubError::Offline {
            id: id.clone(),
            variable,
        }),
    }
}

/// Where the whole model is, if the other hub than the one to be asked gave it before: a disk needs its weights once.
fn on_other_hub(
    id: &ModelId,
    options: &PullOptions,
    settings: &HubSettings,
) -> Option<(Hub, PathBuf)> {
    let anywhere = id.hub.is_none() && id.revision.is_none();
    if !anywhere || !options.include.is_empty() || options.output.is_some() {
        return None;
    }
    let found = found(id, options, settings)?;
    let hub = found.hub.filter(|hub| *hub != settings.default_hub)?;
    Some((hub, found.folder))
}

/// What was downloaded before under this name.
fn found(id: &ModelId, options: &PullOptions, settings: &HubSettings) -> Option<Resolved> {
    let nowhere = |_: &Path| PathBuf::new();
    let found = resolve(id.to_string().as_ref(), options.want, settings, &nowhere).ok()?;
    found.id.is_some().then_some(found)
}

fn print_folder(folder: &Path) -> Result<()> {
    unless_closed(writeln!(stdout(), "{}", folder.display())).context("cannot print the folder")
}
