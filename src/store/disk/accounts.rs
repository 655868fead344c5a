//! Who may use a store: accounts with a role, scopes and an end, known by the hash of a key or by a proxy's header.

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::failed;
use crate::store::StoreError;

/// What an account is for; its scopes follow from it unless they are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Sees studies and reports.
    Reader,
    /// Edits and signs as well.
    Signer,
    /// Everything, other accounts and deletion included.
    Administrator,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 3] = [Self::Reader, Self::Signer, Self::Administrator];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Signer => "signer",
            Self::Administrator => "administrator",
        }
    }

    /// The scopes of the role.
    pub fn scopes(self) -> &'static [Scope] {
        match self {
            Self::Reader => &[Scope::Read],
            Self::Signer => &[
                Scope::Read,
                Scope::Ask,
                Scope::Upload,
                Scope::Edit,
                Scope::Sign,
            ],
            Self::Administrator => &Scope::ALL,
        }
    }
}

/// One thing that an account may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// See studies, films and reports.
    Read,
    /// Ask the model: `/v1/chat/completions` and its like.
    Ask,
    /// Bring studies in.
    Upload,
    /// Change a report that is not signed.
    Edit,
    /// Sign a report.
    Sign,
    /// Everything else: adapters, metrics, the audit log, deletion.
    Admin,
}

impl Scope {
    /// All scopes.
    pub const ALL: [Self; 6] = [
        Self::Read,
        Self::Ask,
        Self::Upload,
        Self::Edit,
        Self::Sign,
        Self::Admin,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Ask => "ask",
            Self::Upload => "upload",
            Self::Edit => "edit",
            Self::Sign => "sign",
            Self::Admin => "admin",
        }
    }
}

/// One account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Name, as reports are signed.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// What it may do: never more than its role.
    pub scopes: Vec<Scope>,
    /// Whether it has a key; else a proxy's header names it.
    pub has_key: bool,
    /// When it was made, in milliseconds since 1970.
    pub created_at: i64,
    /// When it ends, if it does.
    pub expires_at: Option<i64>,
}

impl Account {
    /// Whether it has not ended at `now`.
    pub fn is_valid(&self, now: i64) -> bool {
        self.expires_at.is_none_or(|end| now < end)
    }
}

/// The hash a key is kept as. Keys are 256 random bits, so a plain hash cannot be searched.
fn hash(key: &str) -> Vec<u8> {
    Sha256::digest(key.trim()).to_vec()
}

/// A new key.
pub(super) fn new_key() -> String {
    let bytes: [u8; 32] = rand::random();
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("xray-{digits}")
}

pub(super) fn insert(
    connection: &Connection,
    account: &Account,
    key: Option<&str>,
) -> Result<(), StoreError> {
    let scopes: Vec<&str> = account.scopes.iter().map(|scope| scope.name()).collect();
    let known: Option<i64> = connection
        .query_row(
            "SELECT 1 FROM accounts WHERE name = ?1",
            [&account.name],
            |row| row.get(0),
        )
        .optional()
        .map_err(failed)?;
    if known.is_some() {
        return Err(StoreError::Refused(format!(
            "there is an account `{}` already; `store key remove` takes it away",
            account.name
        )));
    }
    connection
        .execute(
            "INSERT INTO accounts VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![
                account.name,
                account.role.name(),
                scopes.join(" "),
                key.map(hash),
                account.created_at,
                account.expires_at
            ],
        )
        .map_err(failed)?;
    Ok(())
}

const COLUMNS: &str =
    "SELECT name, role, scopes, key_hash IS NOT NULL, created_at, expires_at FROM accounts";

fn read(row: &Row<'_>) -> rusqlite::Result<Option<Account>> {
    let (role, scopes): (String, String) = (row.get(1)?, row.get(2)?);
    let Some(role) = Role::ALL.into_iter().find(|one| one.name() == role) else {
        return Ok(None);
    };
    let scopes = scopes.split(' ');
    let scopes = scopes.filter_map(|name| Scope::ALL.into_iter().find(|one| one.name() == name));
    Ok(Some(Account {
        name: row.get(0)?,
        role,
        scopes: scopes.collect(),
        has_key: row.get(3)?,
        created_at: row.get(4)?,
        expires_at: row.get(5)?,
    }))
}

pub(super) fn all(connection: &Connection) -> Result<Vec<Account>, StoreError> {
    let mut statement = connection
        .prepare(&format!("{COLUMNS} ORDER BY name"))
        .map_err(failed)?;
    let rows = statement.query_map([], read).map_err(failed)?;
    let accounts = rows.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    Ok(accounts.into_iter().flatten().collect())
}

/// The account of a key.
pub(super) fn of_key(connection: &Connection, key: &str) -> Result<Option<Account>, StoreError> {
    // Found by a hash of 256 random bits: the time of the search reveals nothing of a key.
    let found = connection
        .prepare_cached(&format!("{COLUMNS} WHERE key_hash = ?1"))
        .and_then(|mut statement| statement.query_row([hash(key)], read).optional());
    Ok(found.map_err(failed)?.flatten())
}

/// The account without a key that a proxy names.
pub(super) fn of_name(connection: &Connection, name: &str) -> Result<Option<Account>, StoreError> {
    let found = connection
        .prepare_cached(&format!("{COLUMNS} WHERE name = ?1 AND key_hash IS NULL"))
        .and_then(|mut statement| statement.query_row([name], read).optional());
    Ok(found.map_err(failed)?.flatten())
}

pub(super) fn remove(connection: &Connection, name: &str) -> Result<(), StoreError> {
    let removed = connection
        .execute("DELETE FROM accounts WHERE name = ?1", [name])
        .map_err(failed)?;
    match removed {
        0 => Err(StoreError::Missing("account")),
        _ => Ok(()),
    }
}
