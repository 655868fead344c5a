//! The audit log: who did what when, each line bound to all before it.

use rusqlite::{Connection, OptionalExtension, params};
use sha2::{Digest, Sha256};

use super::{cipher::Cipher, failed};
use crate::store::{Actor, StoreError};

/// One line of the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditLine {
    /// Its number, from 1.
    pub number: i64,
    /// When, in milliseconds since 1970.
    pub at: i64,
    /// Who.
    pub actor: String,
    /// As what.
    pub role: String,
    /// What.
    pub action: String,
    /// Id of the study it is about; empty for none.
    pub study: String,
    /// Hash of the study's record after it; empty where none was changed.
    pub(super) digest: Vec<u8>,
    /// The link: over the link before it and all of the above.
    pub(super) link: Vec<u8>,
}

/// SHA-256 of a record as it is kept.
pub(super) fn digest(record: &[u8]) -> Vec<u8> {
    Sha256::digest(record).to_vec()
}

fn link(cipher: &Cipher, before: &[u8], line: &AuditLine) -> Vec<u8> {
    let parts: [&[u8]; 8] = [
        before,
        &line.number.to_le_bytes(),
        &line.at.to_le_bytes(),
        line.actor.as_bytes(),
        line.role.as_bytes(),
        line.action.as_bytes(),
        line.study.as_bytes(),
        &line.digest,
    ];
    cipher.link(&parts).to_vec()
}

/// Appends a line, inside a transaction that holds the write lock.
pub(super) fn append(
    connection: &Connection,
    cipher: &Cipher,
    at: i64,
    actor: &Actor,
    action: &str,
    study: &str,
    digest: Vec<u8>,
) -> Result<(), StoreError> {
    let last: Option<(i64, Vec<u8>)> = connection
        .prepare_cached("SELECT number, link FROM audit ORDER BY number DESC LIMIT 1")
        .and_then(|mut statement| {
            statement
                .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()
        })
        .map_err(failed)?;
    let (number, before) = last.unwrap_or_default();
    let mut line = AuditLine {
        number: number + 1,
        at,
        actor: actor.name.clone(),
        role: actor.role.to_owned(),
        action: action.to_owned(),
        study: study.to_owned(),
        digest,
        link: Vec::new(),
    };
    line.link = link(cipher, &before, &line);
    connection
        .prepare_cached("INSERT INTO audit VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")
        .and_then(|mut statement| {
            statement.execute(params![
                line.number,
                line.at,
                line.actor,
                line.role,
                line.action,
                line.study,
                line.digest,
                line.link
            ])
        })
        .map_err(failed)?;
    Ok(())
}

/// All lines, the first one first.
pub(super) fn lines(connection: &Connection) -> Result<Vec<AuditLine>, StoreError> {
    let mut statement = connection
        .prepare("SELECT number, at, actor, role, action, study, digest, link FROM audit ORDER BY number")
        .map_err(failed)?;
    let rows = statement
        .query_map([], |row| {
            Ok(AuditLine {
                number: row.get(0)?,
                at: row.get(1)?,
                actor: row.get(2)?,
                role: row.get(3)?,
                action: row.get(4)?,
                study: row.get(5)?,
                digest: row.get(6)?,
                link: row.get(7)?,
            })
        })
        .map_err(failed)?;
    rows.collect::<Result<_, _>>().map_err(failed)
}

/// What is wrong with the chain: the first line that does not follow from the ones before it.
pub(super) fn broken(cipher: &Cipher, lines: &[AuditLine]) -> Option<String> {
    let mut before: &[u8] = &[];
    for (index, line) in lines.iter().enumerate() {
        let expected = index as i64 + 1;
        if line.number != expected {
            return Some(format!(
                "the audit log has no line {expected}: it was removed"
            ));
        }
        if line.link != link(cipher, before, line) {
            return Some(format!(
                "line {expected} of the audit log was changed, or one before it was"
            ));
        }
        before = &line.link;
    }
    None
}
