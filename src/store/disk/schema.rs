//! The tables of a store, and how an older store becomes one of today.

use rusqlite::{Connection, OptionalExtension, params};

use super::{cipher::Cipher, failed};
use crate::store::StoreError;

/// One step a version; the number of steps is the version.
const MIGRATIONS: [&str; 1] = ["
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
CREATE TABLE studies (
    id TEXT PRIMARY KEY,
    uid BLOB UNIQUE,
    revision INTEGER NOT NULL,
    record BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE audit (
    number INTEGER PRIMARY KEY,
    at INTEGER NOT NULL,
    actor TEXT NOT NULL,
    role TEXT NOT NULL,
    action TEXT NOT NULL,
    study TEXT NOT NULL,
    digest BLOB NOT NULL,
    link BLOB NOT NULL
) STRICT;
CREATE TABLE accounts (
    name TEXT PRIMARY KEY,
    role TEXT NOT NULL,
    scopes TEXT NOT NULL,
    key_hash BLOB UNIQUE,
    created_at INTEGER NOT NULL,
    expires_at INTEGER
) STRICT;
"];

/// Sets a connection up and brings the tables to this version.
///
/// # Errors
/// A store of a newer version; a file that is no database.
pub(super) fn prepare(connection: &Connection) -> Result<(), StoreError> {
    connection
        .busy_timeout(std::time::Duration::from_secs(20))
        .map_err(failed)?;
    // FULL: a commit is on the disk when it returns. What is deleted is overwritten.
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;",
        )
        .map_err(failed)?;
    connection
        .execute_batch("BEGIN IMMEDIATE")
        .map_err(failed)?;
    let done = migrate(connection);
    let end = if done.is_ok() { "COMMIT" } else { "ROLLBACK" };
    connection.execute_batch(end).map_err(failed)?;
    done
}

fn migrate(connection: &Connection) -> Result<(), StoreError> {
    let version: i64 = connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(failed)?;
    let version = usize::try_from(version).unwrap_or(usize::MAX);
    if version > MIGRATIONS.len() {
        return Err(StoreError::Refused(format!(
            "the store has version {version}, this program knows versions up to {}; use a newer program",
            MIGRATIONS.len()
        )));
    }
    for (index, step) in MIGRATIONS.iter().enumerate().skip(version) {
        connection.execute_batch(step).map_err(failed)?;
        connection
            .execute_batch(&format!("PRAGMA user_version = {}", index + 1))
            .map_err(failed)?;
    }
    Ok(())
}

/// What a key is known by without being kept.
const MARK: &[u8] = b"xray store";

/// Compares the key with the one the store was made with.
///
/// # Errors
/// [`StoreError::Refused`] that says which of the two has none, or that they differ.
pub(super) fn check_key(connection: &Connection, cipher: &Cipher) -> Result<(), StoreError> {
    let kept: Option<Vec<u8>> = connection
        .query_row("SELECT value FROM meta WHERE name = 'mark'", [], |row| {
            row.get(0)
        })
        .optional()
        .map_err(failed)?;
    let Some(kept) = kept else {
        let mark = cipher.seal("mark", MARK)?;
        connection
            .execute(
                "INSERT OR IGNORE INTO meta VALUES ('mark', ?1)",
                params![mark],
            )
            .map_err(failed)?;
        return Ok(());
    };
    let refused = |text: &str| Err(StoreError::Refused(text.into()));
    let is_plain = kept == MARK;
    match (cipher.is_encrypted(), is_plain) {
        (false, false) => {
            refused("the store is encrypted; give its key with --store-key-file or XRAY_STORE_KEY")
        }
        (true, true) => refused(
            "the store is not encrypted, and a key was given; leave it out, or begin a new store",
        ),
        (false, true) => Ok(()),
        (true, false) => match cipher.open("mark", kept) {
            Ok(_) => Ok(()),
            Err(_) => refused("the key is not the one the store was made with"),
        },
    }
}
