//! The store of `serve`: opened before anything is served, with the accounts that let people in.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, bail};

use super::args::ServeArgs;
use crate::{
    commands::{infer::DEFAULT_PROMPT, store::store_key, usage::UsageError},
    serve::studies::Studies,
    store::{
        MemoryStore,
        disk::{DiskStore, Open},
    },
};

fn opened(args: &ServeArgs, folder: &Path) -> Result<Arc<DiskStore>> {
    let key = store_key(args.store_key_file.as_ref())?;
    let store = DiskStore::open(folder, key.as_ref(), Open::Serve);
    let store = store.with_context(|| format!("--store `{}`", folder.display()))?;
    let form = if store.is_encrypted() {
        "encrypted"
    } else {
        "not encrypted"
    };
    log::info!("studies are kept in `{}`, {form}", folder.display());
    Ok(Arc::new(store))
}

/// What `serve` keeps studies in, if it does.
///
/// # Errors
/// A store that cannot be opened; one that has no account, where nobody could get in.
pub(super) fn studies(args: &ServeArgs) -> Result<Option<Studies>> {
    let Some(folder) = &args.store else {
        if !args.exchange.has_source() {
            return Ok(None);
        }
        eprintln!(
            "warning: studies, drafts and what is to be sent are in memory and end with this process; --store keeps them"
        );
        return Ok(Some(Studies {
            store: Arc::new(MemoryStore::default()),
            accounts: None,
            user_header: None,
            prompt: DEFAULT_PROMPT.to_owned(),
            findings: true,
            keep_days: None,
            outbox: Some(Arc::new(args.exchange.outbox()?)),
        }));
    };
    let user_header =
        match &args.user_header {
            Some(name) => Some(name.parse().map_err(|_| {
                UsageError(format!("--user-header `{name}` is no name of a header"))
            })?),
            None => None,
        };
    let store = opened(args, folder)?;
    let accounts = (!args.no_auth).then(|| store.clone());
    if accounts.is_some() && store.accounts()?.is_empty() {
        bail!(UsageError(format!(
            "the store has no accounts, so nobody could get in; make one with `store key add --store {} --name NAME \
             --role administrator`, or give --no-auth to let everybody in",
            folder.display()
        )));
    }
    Ok(Some(Studies {
        store,
        accounts,
        user_header,
        prompt: args
            .draft_prompt
            .clone()
            .unwrap_or_else(|| DEFAULT_PROMPT.to_owned()),
        findings: !args.no_draft_findings,
        keep_days: args.keep_days,
        outbox: Some(Arc::new(args.exchange.outbox()?)),
    }))
}
