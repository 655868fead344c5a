//! `store`: accounts, checks and backups of a folder of studies, beside a server that works on it or without one.

use std::{
    io::{Write, stdout},
    path::PathBuf,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use super::{shell::unless_closed, usage::UsageError};
use crate::{
    base::files::write_atomic,
    store::{
        Actor, StudyState,
        disk::{Account, DiskStore, Open, Role, Scope, StoreKey},
        edits::{Edits, plot},
        now,
    },
    study::counted,
};

/// Where a store is and what it is encrypted with.
#[derive(Debug, Args, Clone)]
pub struct StoreArgs {
    /// Folder of the store.
    #[arg(long, value_name = "FOLDER", env = "XRAY_STORE")]
    pub store: PathBuf,
    /// File with the key of an encrypted store: 64 hexadecimal digits, as `openssl rand -hex 32` prints. XRAY_STORE_KEY
    /// may have the key itself.
    #[arg(long, value_name = "FILE")]
    pub store_key_file: Option<PathBuf>,
}

/// The key of a store, of a file or of the environment.
///
/// # Errors
/// A file that cannot be read; a key of another form.
pub(super) fn store_key(file: Option<&PathBuf>) -> Result<Option<StoreKey>> {
    let (name, text) = match file {
        Some(file) => {
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("cannot read --store-key-file `{}`", file.display()))?;
            ("--store-key-file", text)
        }
        None => match std::env::var("XRAY_STORE_KEY") {
            Ok(text) if !text.is_empty() => ("XRAY_STORE_KEY", text),
            _ => return Ok(None),
        },
    };
    match StoreKey::read(&text) {
        Ok(key) => Ok(Some(key)),
        Err(reason) => bail!(UsageError(format!("{name}: {reason}"))),
    }
}

impl StoreArgs {
    /// Opens the store.
    ///
    /// # Errors
    /// As [`DiskStore::open`].
    pub(super) fn open(&self, how: Open) -> Result<DiskStore> {
        let key = store_key(self.store_key_file.as_ref())?;
        let store = DiskStore::open(&self.store, key.as_ref(), how);
        store.with_context(|| format!("--store `{}`", self.store.display()))
    }
}

/// Arguments of `store`.
#[derive(Debug, Args)]
pub struct StoreCommand {
    /// What to do.
    #[command(subcommand)]
    pub action: StoreAction,
}

/// What can be done with a store.
#[derive(Debug, Subcommand)]
pub enum StoreAction {
    /// Accounts and their keys.
    Key(KeyCommand),
    /// Read everything: the chain of the audit log, each record against it, each film against its hash. Exit code 1
    /// where something is wrong.
    Verify(VerifyArgs),
    /// Copy the store to a folder, also while it is served. A second time, only new films are copied.
    Backup(BackupArgs),
    /// Remove studies by age and state, with their films. The audit log keeps a line of each.
    Delete(DeleteArgs),
    /// Print the audit log, a JSON object a line: number, at, actor, role, action, study.
    Audit(AuditArgs),
    /// Plot by month how much of each finding was changed between draft and signed report, as an SVG.
    Edits(EditsArgs),
}

/// Arguments of `store key`.
#[derive(Debug, Args)]
pub struct KeyCommand {
    /// What to do.
    #[command(subcommand)]
    pub action: KeyAction,
}

/// What can be done with accounts.
#[derive(Debug, Subcommand)]
pub enum KeyAction {
    /// Make an account. Its key is printed once and kept as a hash only.
    Add(KeyAddArgs),
    /// List accounts: name, role, scopes, end.
    List(StoreArgs),
    /// Take an account away; its key opens nothing from then on.
    Remove(KeyRemoveArgs),
}

/// A role on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoleName {
    /// Sees studies and reports.
    Reader,
    /// Edits and signs as well.
    Signer,
    /// Everything.
    Administrator,
}

impl From<RoleName> for Role {
    fn from(name: RoleName) -> Self {
        match name {
            RoleName::Reader => Self::Reader,
            RoleName::Signer => Self::Signer,
            RoleName::Administrator => Self::Administrator,
        }
    }
}

/// A state on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "`StudyState` explains each")]
pub enum StateName {
    Received,
    Complete,
    Drafted,
    Signed,
    Sent,
    Failed,
}

/// Arguments of `store key add`.
#[derive(Debug, Args)]
pub struct KeyAddArgs {
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Name, as reports are signed.
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// What the account is for.
    #[arg(long, value_enum, value_name = "ROLE")]
    pub role: RoleName,
    /// Only these of the role's scopes (read, ask, upload, edit, sign, admin); can be given several times.
    #[arg(long, value_name = "SCOPE")]
    pub scope: Vec<String>,
    /// Days after which the key ends; without it the key does not end.
    #[arg(long, value_name = "DAYS")]
    pub days: Option<u32>,
    /// Make no key: the account is used by its name in the header of a trusted proxy (serve --user-header).
    #[arg(long)]
    pub proxy: bool,
}

/// Arguments of `store key remove`.
#[derive(Debug, Args)]
pub struct KeyRemoveArgs {
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Name of the account.
    #[arg(long, value_name = "NAME")]
    pub name: String,
}

/// Arguments of `store verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// What an earlier `store verify` printed as its head, `LINES:HASH`: finds out whether lines were cut off since.
    #[arg(long, value_name = "LINES:HASH")]
    pub head: Option<String>,
}

/// Arguments of `store backup`.
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Folder of the copy; an encrypted store stays encrypted.
    #[arg(long, value_name = "FOLDER")]
    pub output: PathBuf,
}

/// Arguments of `store delete`.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Days since the last change.
    #[arg(long, value_name = "DAYS")]
    pub older_than_days: u32,
    /// States of the studies to remove; can be given several times.
    #[arg(long, value_enum, value_name = "STATE", required = true)]
    pub state: Vec<StateName>,
    /// Only say how many there are.
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `store audit`.
#[derive(Debug, Args)]
pub struct AuditArgs {
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Only lines about this study.
    #[arg(long, value_name = "ID")]
    pub study: Option<String>,
}

/// Arguments of `store edits`.
#[derive(Debug, Args)]
pub struct EditsArgs {
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// The plot to write.
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Whoever types commands on the server's own machine.
pub(super) fn typist() -> Actor {
    Actor {
        name: "command line".into(),
        role: "administrator",
    }
}

/// Writes to stdout.
fn print(text: &str) -> Result<()> {
    unless_closed(stdout().write_all(text.as_bytes())).context("cannot write to stdout")
}

/// Runs `store`.
///
/// # Errors
/// A store that cannot be opened, or in which something is wrong.
pub fn run(command: &StoreCommand) -> Result<()> {
    match &command.action {
        StoreAction::Key(key) => match &key.action {
            KeyAction::Add(args) => key_add(args),
            KeyAction::List(args) => key_list(args),
            KeyAction::Remove(args) => {
                args.store
                    .open(Open::Existing)?
                    .remove_account(&args.name, &typist())?;
                eprintln!("`{}` was removed", args.name);
                Ok(())
            }
        },
        StoreAction::Verify(args) => verify(args),
        StoreAction::Backup(args) => {
            let films = args.store.open(Open::Existing)?.backup(&args.output)?;
            eprintln!(
                "`{}`: {}",
                args.output.display(),
                counted(films, "film", "films")
            );
            Ok(())
        }
        StoreAction::Delete(args) => delete(args),
        StoreAction::Audit(args) => audit(args),
        StoreAction::Edits(args) => edits(args),
    }
}

fn key_add(args: &KeyAddArgs) -> Result<()> {
    let role = Role::from(args.role);
    let name = args.name.trim();
    if name.is_empty() || name.chars().count() > 100 || name.chars().any(char::is_control) {
        bail!(UsageError("--name has to be 1 to 100 letters".into()));
    }
    let mut scopes = role.scopes().to_vec();
    if !args.scope.is_empty() {
        let wanted = args.scope.iter().map(|text| {
            let known = scopes.iter().find(|scope| scope.name() == text);
            let names: Vec<&str> = scopes.iter().map(|scope| scope.name()).collect();
            known.copied().with_context(|| {
                format!(
                    "--scope {text}: the role `{}` has {}",
                    role.name(),
                    names.join(", ")
                )
            })
        });
        scopes = wanted.collect::<Result<Vec<Scope>>>()?;
    }
    let made = now();
    let account = Account {
        name: name.to_owned(),
        role,
        scopes,
        has_key: !args.proxy,
        created_at: made,
        expires_at: args
            .days
            .map(|days| made + i64::from(days) * 24 * 3600 * 1000),
    };
    let key = args
        .store
        .open(Open::Beside)?
        .add_account(&account, &typist())?;
    match key {
        Some(key) => {
            print(&format!("{key}\n"))?;
            eprintln!("the key of `{name}`; it is not shown again");
        }
        None => eprintln!("`{name}` may be named by a trusted proxy"),
    }
    Ok(())
}

fn key_list(args: &StoreArgs) -> Result<()> {
    let accounts = args.open(Open::Existing)?.accounts()?;
    let mut text = String::new();
    for account in &accounts {
        let line = json!({
            "name": account.name,
            "role": account.role,
            "scopes": account.scopes,
            "key": account.has_key,
            "created_at": account.created_at,
            "expires_at": account.expires_at,
            "valid": account.is_valid(now()),
        });
        text += &format!("{line}\n");
    }
    print(&text)
}

fn verify(args: &VerifyArgs) -> Result<()> {
    let anchor = args.head.as_deref().map(|text| {
        let parts = text.split_once(':');
        parts
            .and_then(|(lines, hash)| Some((lines.parse::<usize>().ok()?, hash)))
            .ok_or_else(|| UsageError("--head is LINES:HASH, as `store verify` prints it".into()))
    });
    let found = args
        .store
        .open(Open::Existing)?
        .verify(anchor.transpose()?)?;
    let line = json!({
        "studies": found.studies,
        "films": found.films,
        "lines": found.lines,
        "head": format!("{}:{}", found.lines, found.head),
        "faults": found.faults,
    });
    print(&format!("{line}\n"))?;
    if !found.faults.is_empty() {
        bail!(
            "the store has {}: {}",
            counted(found.faults.len(), "fault", "faults"),
            found.faults[0]
        );
    }
    Ok(())
}

fn delete(args: &DeleteArgs) -> Result<()> {
    let states: Vec<StudyState> = args
        .state
        .iter()
        .map(|name| match name {
            StateName::Received => StudyState::Received,
            StateName::Complete => StudyState::Complete,
            StateName::Drafted => StudyState::Drafted,
            StateName::Signed => StudyState::Signed,
            StateName::Sent => StudyState::Sent,
            StateName::Failed => StudyState::Failed,
        })
        .collect();
    let store = args.store.open(Open::Existing)?;
    if args.dry_run {
        let count = store.older_than(args.older_than_days, &states)?.len();
        eprintln!("{count} studies would be removed");
        return Ok(());
    }
    let count = store.delete_older(args.older_than_days, &states, &typist())?;
    eprintln!("{count} studies were removed");
    Ok(())
}

fn audit(args: &AuditArgs) -> Result<()> {
    let lines = args.store.open(Open::Existing)?.audit()?;
    let mut text = String::new();
    for line in &lines {
        if args
            .study
            .as_ref()
            .is_some_and(|study| *study != line.study)
        {
            continue;
        }
        let object = json!({
            "number": line.number,
            "at": line.at,
            "actor": line.actor,
            "role": line.role,
            "action": line.action,
            "study": line.study,
        });
        text += &format!("{object}\n");
    }
    print(&text)
}

fn edits(args: &EditsArgs) -> Result<()> {
    let mut edits = Edits::default();
    args.store
        .open(Open::Existing)?
        .each_study(|study| edits.add(&study))?;
    if edits.reports() == 0 {
        bail!("the store has no signed report with a draft");
    }
    let svg = plot(&edits);
    write_atomic(&args.output, |file| file.write_all(svg.as_bytes()))?;
    eprintln!(
        "`{}`: {}",
        args.output.display(),
        counted(edits.reports(), "report", "reports")
    );
    Ok(())
}
