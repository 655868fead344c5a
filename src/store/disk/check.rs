//! Work on a whole store: verify, back up, delete by rule.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::Path,
};

use super::{
    DiskStore, audit, failed,
    films::{self, Films},
};
use crate::{
    base::files::sha256_bytes,
    store::{Actor, StoreError, Study, StudyState, StudyStore, now},
};

/// What `store verify` found.
#[derive(Debug, Clone, Default)]
pub struct Verified {
    /// Studies.
    pub studies: usize,
    /// Films.
    pub films: usize,
    /// Lines of the audit log.
    pub lines: usize,
    /// The last link, to be kept elsewhere: it stands for all lines.
    pub head: String,
    /// What is wrong, in sentences.
    pub faults: Vec<String>,
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl DiskStore {
    /// Reads everything: the chain of the audit log, each record against its last line, each film against its hash.
    ///
    /// `anchor` is the `head` of an earlier call with its number of lines: what was cut off at the end since shows
    /// by it alone.
    ///
    /// # Errors
    /// A store that cannot be read at all.
    pub fn verify(&self, anchor: Option<(usize, &str)>) -> Result<Verified, StoreError> {
        let inner = self.lock();
        let lines = audit::lines(&inner.connection)?;
        let mut found = Verified {
            lines: lines.len(),
            head: lines
                .last()
                .map_or_else(String::new, |line| hexadecimal(&line.link)),
            ..Verified::default()
        };
        found.faults.extend(audit::broken(&self.cipher, &lines));
        if let Some((number, head)) = anchor {
            let kept = number.checked_sub(1).and_then(|index| lines.get(index));
            if kept.is_none_or(|line| hexadecimal(&line.link) != head) {
                found.faults.push(format!(
                    "line {number} of the audit log is not the one that was noted: lines were removed or all were written anew"
                ));
            }
        }
        let mut last: HashMap<&str, &[u8]> = HashMap::new();
        for line in lines.iter().filter(|line| !line.study.is_empty()) {
            if line.action == "delete" {
                last.remove(line.study.as_str());
            } else if !line.digest.is_empty() {
                last.insert(&line.study, &line.digest);
            }
        }
        let mut statement = inner
            .connection
            .prepare("SELECT id, record FROM studies")
            .map_err(failed)?;
        let mut rows = statement.query([]).map_err(failed)?;
        while let Some(row) = rows.next().map_err(failed)? {
            let id: String = row.get(0).map_err(failed)?;
            let sealed: Vec<u8> = row.get(1).map_err(failed)?;
            found.studies += 1;
            let record = match self.cipher.open(&format!("study:{id}"), sealed) {
                Ok(record) => record,
                Err(error) => {
                    found.faults.push(error.to_string());
                    continue;
                }
            };
            if last.remove(id.as_str()) != Some(&audit::digest(&record)[..]) {
                found.faults.push(format!(
                    "the record of study {id} is not the one of its last line in the audit log"
                ));
            }
            match serde_json::from_slice::<Study>(&record) {
                Ok(study) => self.verify_films(&study, &mut found),
                Err(_) => found
                    .faults
                    .push(format!("the record of study {id} cannot be read")),
            }
        }
        for id in last.keys() {
            found.faults.push(format!(
                "study {id} is gone, and the audit log has no line about its deletion"
            ));
        }
        Ok(found)
    }

    fn verify_films(&self, study: &Study, found: &mut Verified) {
        for film in &study.films {
            found.films += 1;
            let bytes = self.films.read(&film.id);
            let bytes =
                bytes.and_then(|bytes| self.cipher.open(&format!("film:{}", film.id), bytes));
            match bytes {
                Ok(bytes) if sha256_bytes(&bytes) == film.sha256 => {}
                Ok(_) => found.faults.push(format!("film {} was changed", film.id)),
                Err(error) => found.faults.push(error.to_string()),
            }
        }
    }

    /// Copies the store, also while it is served; films that were copied before are not copied again.
    ///
    /// # Errors
    /// A disk that is full; a folder that is no backup of this store.
    pub fn backup(&self, to: &Path) -> Result<usize, StoreError> {
        films::private_folder(to)?;
        let file = to.join("store.db");
        let part = to.join("store.db.part");
        let io = |error: std::io::Error| films::io_error(&part, &error);
        let mut ids = HashSet::new();
        // Films first and again after the database: a film that came between belongs to a record of the copy.
        let target = Films::new(to.join("films"))?;
        {
            let mut copy = rusqlite::Connection::open(&part).map_err(failed)?;
            let inner = self.lock();
            let backup =
                rusqlite::backup::Backup::new(&inner.connection, &mut copy).map_err(failed)?;
            backup
                .run_to_completion(1000, std::time::Duration::ZERO, None)
                .map_err(failed)?;
            self.each_record(&inner.connection, |study| {
                ids.extend(study.films.into_iter().map(|film| film.id));
            })?;
        }
        for id in &ids {
            if !target.path(id).is_file() {
                target.write(id, &self.films.read(id)?)?;
            }
        }
        films::private_file(&part)?;
        // The copy's own journal would not fit another database.
        for name in [
            "store.db-wal",
            "store.db-shm",
            "store.db.part-wal",
            "store.db.part-shm",
        ] {
            let _ = fs::remove_file(to.join(name));
        }
        fs::rename(&part, &file).map_err(io)?;
        target.remove_leftovers(&ids)?;
        Ok(ids.len())
    }

    /// Ids of the studies in one of `states` (none: in any) that have not changed for `days`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn older_than(&self, days: u32, states: &[StudyState]) -> Result<Vec<String>, StoreError> {
        let before = now() - i64::from(days) * 24 * 3600 * 1000;
        let states = match states {
            [] => &StudyState::ALL[..],
            states => states,
        };
        let mut found = Vec::new();
        for state in states {
            found.extend(self.waiting(*state, before)?);
        }
        Ok(found)
    }

    /// Removes those studies; returns how many there were.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn delete_older(
        &self,
        days: u32,
        states: &[StudyState],
        actor: &Actor,
    ) -> Result<usize, StoreError> {
        let ids = self.older_than(days, states)?;
        for id in &ids {
            self.delete(id, actor)?;
        }
        Ok(ids.len())
    }
}
