//! A store in a folder: records in SQLite, films as files beside it.
//!
//! ```text
//! FOLDER/store.db          records, accounts, audit log (WAL; readable by any SQLite, unless encrypted)
//! FOLDER/films/ab/ID       the bytes of a film as they came (or encrypted)
//! FOLDER/serve.lock        held by the one server that works on it
//! ```
//!
//! A film's file is on the disk before its record is, and a record and its line of the audit log are one transaction: after
//! `kill -9` there may be a file too many, which the next server removes, and never one too few.

mod accounts;
mod audit;
mod check;
mod cipher;
mod films;
mod schema;

use std::{
    collections::{HashMap, HashSet},
    fs::{File, TryLockError},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use super::{
    Actor, Arrival, Change, Line, Page, Query, Received, StoreError, Study, StudyState, StudyStore,
    new_id, now, rules, rules::Entry,
};

pub use accounts::{Account, Role, Scope};
pub use audit::AuditLine;
use cipher::Cipher;
pub use cipher::StoreKey;
use films::Films;

/// Makes an error of SQLite one of a store; none of its texts has data of a patient.
fn failed(error: rusqlite::Error) -> StoreError {
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => StoreError::Full(error.to_string()),
        _ => StoreError::Failed(error.to_string()),
    }
}

/// Studies in memory for lists: what `rules` needs of each, by id.
#[derive(Default)]
struct Index {
    entries: HashMap<String, Entry>,
    /// SQLite's number of changes by other connections.
    version: i64,
}

struct Inner {
    connection: Connection,
    index: Index,
}

/// A store in a folder.
pub struct DiskStore {
    inner: Mutex<Inner>,
    films: Films,
    cipher: Cipher,
    /// Held as long as the store is served.
    _lock: Option<File>,
}

/// How a store is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// By a server: alone, made where there is none, and leftovers of a broken-off one are removed.
    Serve,
    /// By a command beside a server; made where there is none.
    Beside,
    /// By a command beside a server; an error where there is none.
    Existing,
}

impl DiskStore {
    /// Opens the store in a folder.
    ///
    /// # Errors
    /// A folder that cannot be used, another server on it, a wrong key, a newer version.
    pub fn open(folder: &Path, key: Option<&StoreKey>, how: Open) -> Result<Self, StoreError> {
        let place = folder.display().to_string();
        let file = folder.join("store.db");
        if how == Open::Existing && !file.is_file() {
            return Err(StoreError::Refused(format!(
                "there is no store in `{place}`: `serve --store` or `store key add` makes one"
            )));
        }
        films::private_folder(folder)?;
        let lock = match how {
            Open::Serve => Some(lock(folder)?),
            _ => None,
        };
        let connection = Connection::open(&file).map_err(failed)?;
        films::private_file(&file)?;
        schema::prepare(&connection)?;
        let cipher = Cipher::new(key);
        schema::check_key(&connection, &cipher)?;
        let store = Self {
            inner: Mutex::new(Inner {
                connection,
                index: Index::default(),
            }),
            films: Films::new(folder.join("films"))?,
            cipher,
            _lock: lock,
        };
        let mut inner = store.lock();
        store.load_index(&mut inner)?;
        if how == Open::Serve {
            let mut known = HashSet::new();
            store.each_record(&inner.connection, |study| {
                known.extend(study.films.into_iter().map(|film| film.id));
            })?;
            store.films.remove_leftovers(&known)?;
        }
        drop(inner);
        Ok(store)
    }

    /// Whether records and films are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.cipher.is_encrypted()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic leaves a transaction that SQLite rolls back.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store's state, with the index as other processes have left it.
    fn current(&self) -> Result<MutexGuard<'_, Inner>, StoreError> {
        let mut inner = self.lock();
        if version(&inner.connection)? != inner.index.version {
            self.load_index(&mut inner)?;
        }
        Ok(inner)
    }

    fn load_index(&self, inner: &mut Inner) -> Result<(), StoreError> {
        let version = version(&inner.connection)?;
        let mut entries = HashMap::new();
        self.each_record(&inner.connection, |study| {
            entries.insert(study.id.clone(), Entry::new(&study));
        })?;
        inner.index = Index { entries, version };
        Ok(())
    }

    fn each_record(
        &self,
        connection: &Connection,
        mut each: impl FnMut(Study),
    ) -> Result<(), StoreError> {
        let mut statement = connection
            .prepare("SELECT id, record FROM studies")
            .map_err(failed)?;
        let mut rows = statement.query([]).map_err(failed)?;
        while let Some(row) = rows.next().map_err(failed)? {
            let id: String = row.get(0).map_err(failed)?;
            let record: Vec<u8> = row.get(1).map_err(failed)?;
            each(self.read_record(&id, record)?);
        }
        Ok(())
    }

    fn read_record(&self, id: &str, record: Vec<u8>) -> Result<Study, StoreError> {
        let record = self.cipher.open(&format!("study:{id}"), record)?;
        serde_json::from_slice(&record)
            .map_err(|_| StoreError::Failed(format!("the record of study {id} cannot be read")))
    }

    fn read(&self, connection: &Connection, id: &str) -> Result<Study, StoreError> {
        let record: Option<Vec<u8>> = connection
            .prepare_cached("SELECT record FROM studies WHERE id = ?1")
            .and_then(|mut statement| statement.query_row([id], |row| row.get(0)).optional())
            .map_err(failed)?;
        self.read_record(id, record.ok_or(StoreError::Missing("study"))?)
    }

    /// Writes a record with its line of the audit log.
    fn write(
        &self,
        connection: &Connection,
        study: &Study,
        action: &str,
        actor: &Actor,
    ) -> Result<(), StoreError> {
        let record = serde_json::to_vec(study)
            .map_err(|_| StoreError::Failed("a record could not be written".into()))?;
        let digest = audit::digest(&record);
        let sealed = self.cipher.seal(&format!("study:{}", study.id), &record)?;
        let uid = (!study.study_uid.is_empty()).then(|| self.cipher.lookup(&study.study_uid));
        connection
            .prepare_cached(
                "INSERT INTO studies VALUES (?1, ?2, ?3, ?4) ON CONFLICT (id) DO UPDATE \
                 SET uid = excluded.uid, revision = excluded.revision, record = excluded.record",
            )
            .and_then(|mut statement| {
                let revision = i64::try_from(study.revision).unwrap_or(i64::MAX);
                statement.execute(params![study.id, uid, revision, sealed])
            })
            .map_err(failed)?;
        audit::append(
            connection,
            &self.cipher,
            now(),
            actor,
            action,
            &study.id,
            digest,
        )
    }

    /// Runs `work` in a transaction that holds the write lock from its begin.
    fn transaction<T>(
        &self,
        inner: &mut Inner,
        work: impl FnOnce(&Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let transaction = inner
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(failed)?;
        let done = work(&transaction)?;
        transaction.commit().map_err(failed)?;
        Ok(done)
    }

    /// Id of the study that a film belongs to.
    fn study_of(
        &self,
        connection: &Connection,
        said: &Study,
    ) -> Result<Option<String>, StoreError> {
        let known = |sql: &str, value: &dyn rusqlite::ToSql| {
            connection
                .prepare_cached(sql)
                .and_then(|mut statement| statement.query_row([value], |row| row.get(0)).optional())
                .map_err(failed)
        };
        if !said.id.is_empty() {
            let found = known("SELECT id FROM studies WHERE id = ?1", &said.id)?;
            return found.map(Some).ok_or(StoreError::Missing("study"));
        }
        if said.study_uid.is_empty() {
            return Ok(None);
        }
        let uid = self.cipher.lookup(&said.study_uid);
        known("SELECT id FROM studies WHERE uid = ?1", &uid)
    }

    /// Makes an account, and a key for it unless a proxy names it.
    ///
    /// # Errors
    /// A name that is taken.
    pub fn add_account(&self, account: &Account, by: &Actor) -> Result<Option<String>, StoreError> {
        let key = account.has_key.then(accounts::new_key);
        let mut inner = self.lock();
        self.transaction(&mut inner, |connection| {
            accounts::insert(connection, account, key.as_deref())?;
            audit::append(
                connection,
                &self.cipher,
                now(),
                by,
                "key_add",
                "",
                account.name.clone().into(),
            )
        })?;
        Ok(key)
    }

    /// Takes an account away.
    ///
    /// # Errors
    /// [`StoreError::Missing`].
    pub fn remove_account(&self, name: &str, by: &Actor) -> Result<(), StoreError> {
        let mut inner = self.lock();
        self.transaction(&mut inner, |connection| {
            accounts::remove(connection, name)?;
            audit::append(
                connection,
                &self.cipher,
                now(),
                by,
                "key_remove",
                "",
                name.into(),
            )
        })
    }

    /// All accounts.
    pub fn accounts(&self) -> Result<Vec<Account>, StoreError> {
        accounts::all(&self.lock().connection)
    }

    /// The account of a key.
    pub fn account_of_key(&self, key: &str) -> Result<Option<Account>, StoreError> {
        accounts::of_key(&self.lock().connection, key)
    }

    /// The account that a trusted proxy names.
    pub fn account_of_name(&self, name: &str) -> Result<Option<Account>, StoreError> {
        accounts::of_name(&self.lock().connection, name)
    }

    /// The audit log, the first line first.
    pub fn audit(&self) -> Result<Vec<AuditLine>, StoreError> {
        audit::lines(&self.lock().connection)
    }

    /// Calls `each` with every study, in no order.
    pub fn each_study(&self, each: impl FnMut(Study)) -> Result<(), StoreError> {
        let inner = self.lock();
        self.each_record(&inner.connection, each)
    }
}

/// SQLite's number of changes that other connections have made.
fn version(connection: &Connection) -> Result<i64, StoreError> {
    connection
        .query_row("PRAGMA data_version", [], |row| row.get(0))
        .map_err(failed)
}

fn lock(folder: &Path) -> Result<File, StoreError> {
    let path = folder.join("serve.lock");
    let file = File::create(&path).map_err(|error| films::io_error(&path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Refused(format!(
            "another server works on the store in `{}`; stop it, or give this one a folder of its own",
            folder.display()
        ))),
        Err(TryLockError::Error(error)) => Err(films::io_error(&path, &error)),
    }
}

impl StudyStore for DiskStore {
    fn receive(&self, arrival: Arrival, actor: &Actor) -> Result<Received, StoreError> {
        let mut film = arrival.film.clone();
        film.id = new_id();
        film.sha256 = crate::base::files::sha256_bytes(&arrival.bytes);
        film.bytes = arrival.bytes.len() as u64;
        let again = |study: &Study| {
            rules::same_film(study, &film).map(|kept| Received {
                study: study.id.clone(),
                film: kept.id.clone(),
                again: true,
            })
        };
        // Before anything is written: a film that is here already, or has no place.
        let first = rules::begin(&arrival, now());
        {
            let inner = self.lock();
            if let Some(id) = self.study_of(&inner.connection, &arrival.study)? {
                let mut study = self.read(&inner.connection, &id)?;
                if let Some(received) = again(&study) {
                    return Ok(received);
                }
                rules::join(&mut study, &arrival.study, film.clone(), now())?;
            }
        }
        let sealed = self
            .cipher
            .seal(&format!("film:{}", film.id), &arrival.bytes)?;
        self.films.write(&film.id, &sealed)?;
        let mut inner = self.lock();
        let done = self.transaction(&mut inner, |connection| {
            let mut study = match self.study_of(connection, &arrival.study)? {
                Some(id) => self.read(connection, &id)?,
                None => first,
            };
            if let Some(received) = again(&study) {
                return Ok((received, None));
            }
            rules::join(&mut study, &arrival.study, film.clone(), now())?;
            self.write(connection, &study, "receive", actor)?;
            let received = Received {
                study: study.id.clone(),
                film: film.id.clone(),
                again: false,
            };
            Ok((received, Some(Entry::new(&study))))
        });
        match done {
            Ok((received, Some(entry))) => {
                inner.index.entries.insert(received.study.clone(), entry);
                Ok(received)
            }
            Ok((received, None)) => {
                self.films.remove(&film.id)?;
                Ok(received)
            }
            Err(error) => {
                // The reason matters, not that of the removal; the next start removes it as well.
                let _ = self.films.remove(&film.id);
                Err(error)
            }
        }
    }

    fn study(&self, id: &str) -> Result<Study, StoreError> {
        self.read(&self.lock().connection, id)
    }

    fn by_uid(&self, study_uid: &str) -> Result<Option<String>, StoreError> {
        let said = Study {
            study_uid: study_uid.to_owned(),
            ..Study::default()
        };
        self.study_of(&self.lock().connection, &said)
    }

    fn priors(&self, id: &str) -> Result<Vec<Study>, StoreError> {
        let inner = self.current()?;
        let entries = &inner.index.entries;
        let of = entries.get(id).ok_or(StoreError::Missing("study"))?;
        let found = rules::priors(entries.values(), of).into_iter();
        found
            .map(|entry| self.read(&inner.connection, &entry.id))
            .collect()
    }

    fn film(&self, study: &str, film: &str) -> Result<Vec<u8>, StoreError> {
        let known = self.study(study)?.films.iter().any(|one| one.id == film);
        if !known {
            return Err(StoreError::Missing("film"));
        }
        self.cipher
            .open(&format!("film:{film}"), self.films.read(film)?)
    }

    fn change(
        &self,
        id: &str,
        action: &'static str,
        actor: &Actor,
        change: Change<'_>,
    ) -> Result<Study, StoreError> {
        let mut inner = self.lock();
        let study = self.transaction(&mut inner, |connection| {
            let mut study = self.read(connection, id)?;
            let revision = study.revision;
            change(&mut study)?;
            study.id = id.to_owned();
            study.revision = revision + 1;
            study.changed_at = now();
            self.write(connection, &study, action, actor)?;
            Ok(study)
        })?;
        inner
            .index
            .entries
            .insert(id.to_owned(), Entry::new(&study));
        Ok(study)
    }

    fn list(&self, query: &Query) -> Result<Page, StoreError> {
        let inner = self.current()?;
        let (found, mut page) = rules::page(inner.index.entries.values(), query);
        for entry in found {
            page.lines.push(Line {
                study: self.read(&inner.connection, &entry.id)?,
                urgency: entry.urgency,
            });
        }
        Ok(page)
    }

    fn waiting(&self, state: StudyState, before: i64) -> Result<Vec<String>, StoreError> {
        let inner = self.current()?;
        Ok(rules::waiting(inner.index.entries.values(), state, before))
    }

    fn due(&self, now: i64) -> Result<Vec<String>, StoreError> {
        let inner = self.current()?;
        Ok(rules::due(inner.index.entries.values(), now))
    }

    fn delete(&self, id: &str, actor: &Actor) -> Result<(), StoreError> {
        let mut inner = self.lock();
        let study = self.transaction(&mut inner, |connection| {
            let study = self.read(connection, id)?;
            connection
                .execute("DELETE FROM studies WHERE id = ?1", [id])
                .map_err(failed)?;
            audit::append(
                connection,
                &self.cipher,
                now(),
                actor,
                "delete",
                id,
                Vec::new(),
            )?;
            Ok(study)
        })?;
        inner.index.entries.remove(id);
        // What a crash leaves here, the next server removes.
        study
            .films
            .iter()
            .try_for_each(|film| self.films.remove(&film.id))
    }

    fn note(
        &self,
        action: &'static str,
        study: Option<&str>,
        actor: &Actor,
    ) -> Result<(), StoreError> {
        let mut inner = self.lock();
        let study = study.unwrap_or_default();
        self.transaction(&mut inner, |connection| {
            audit::append(
                connection,
                &self.cipher,
                now(),
                actor,
                action,
                study,
                Vec::new(),
            )
        })
    }
}

#[cfg(test)]
mod tests;
