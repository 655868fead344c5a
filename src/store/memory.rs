//! Studies in memory: what `serve` keeps without `--store`. They end with their process.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{
    Actor, Arrival, Change, Line, Page, Query, Received, StoreError, Study, StudyState, StudyStore,
    new_id, now, rules, rules::Entry,
};

/// Most bytes of films that are kept before new ones are refused.
const MOST_BYTES: u64 = 2 << 30;

#[derive(Default)]
struct Kept {
    studies: HashMap<String, (Study, Entry)>,
    by_uid: HashMap<String, String>,
    /// Bytes of films, by id.
    films: HashMap<String, Vec<u8>>,
    bytes: u64,
}

/// A store in memory.
#[derive(Default)]
pub struct MemoryStore {
    kept: Mutex<Kept>,
    most_bytes: Option<u64>,
}

impl MemoryStore {
    /// A store of at most so many bytes of films.
    #[cfg(test)]
    pub fn of(bytes: u64) -> Self {
        Self {
            most_bytes: Some(bytes),
            ..Self::default()
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Records are put in whole, so a panic leaves none half changed.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn study(&self, id: &str) -> Result<&Study, StoreError> {
        let found = self.studies.get(id).map(|(study, _)| study);
        found.ok_or(StoreError::Missing("study"))
    }

    fn put(&mut self, study: Study) {
        if !study.study_uid.is_empty() {
            let (uid, id) = (study.study_uid.clone(), study.id.clone());
            self.by_uid.insert(uid, id);
        }
        let entry = Entry::new(&study);
        self.studies.insert(study.id.clone(), (study, entry));
    }

    fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.studies.values().map(|(_, entry)| entry)
    }
}

impl StudyStore for MemoryStore {
    fn receive(&self, arrival: Arrival, _actor: &Actor) -> Result<Received, StoreError> {
        let mut film = arrival.film.clone();
        film.id = new_id();
        film.sha256 = crate::base::files::sha256_bytes(&arrival.bytes);
        film.bytes = arrival.bytes.len() as u64;
        let said = &arrival.study;
        let mut kept = self.lock();
        let known = match said.id.is_empty() {
            false => Some(kept.study(&said.id)?.clone()),
            true => match kept.by_uid.get(&said.study_uid) {
                Some(id) => Some(kept.study(id)?.clone()),
                None => None,
            },
        };
        let mut study = known.unwrap_or_else(|| rules::begin(&arrival, now()));
        if let Some(same) = rules::same_film(&study, &film) {
            return Ok(Received {
                study: study.id.clone(),
                film: same.id.clone(),
                again: true,
            });
        }
        let most = self.most_bytes.unwrap_or(MOST_BYTES);
        if kept.bytes + film.bytes > most {
            let mib = most >> 20;
            return Err(StoreError::Full(format!(
                "{mib} MiB of films are kept in memory, and no more fit; --store keeps them on a disk"
            )));
        }
        rules::join(&mut study, said, film.clone(), now())?;
        let received = Received {
            study: study.id.clone(),
            film: film.id.clone(),
            again: false,
        };
        kept.bytes += film.bytes;
        kept.films.insert(film.id, arrival.bytes);
        kept.put(study);
        Ok(received)
    }

    fn study(&self, id: &str) -> Result<Study, StoreError> {
        self.lock().study(id).cloned()
    }

    fn by_uid(&self, study_uid: &str) -> Result<Option<String>, StoreError> {
        Ok(self.lock().by_uid.get(study_uid).cloned())
    }

    fn priors(&self, id: &str) -> Result<Vec<Study>, StoreError> {
        let kept = self.lock();
        let of = kept.studies.get(id).ok_or(StoreError::Missing("study"))?;
        let found = rules::priors(kept.entries(), &of.1).into_iter();
        found.map(|entry| kept.study(&entry.id).cloned()).collect()
    }

    fn film(&self, study: &str, film: &str) -> Result<Vec<u8>, StoreError> {
        let kept = self.lock();
        let known = kept.study(study)?.films.iter().any(|one| one.id == film);
        let bytes = kept.films.get(film).filter(|_| known);
        bytes.cloned().ok_or(StoreError::Missing("film"))
    }

    fn change(
        &self,
        id: &str,
        _action: &'static str,
        _actor: &Actor,
        change: Change<'_>,
    ) -> Result<Study, StoreError> {
        let mut kept = self.lock();
        let mut study = kept.study(id)?.clone();
        let revision = study.revision;
        change(&mut study)?;
        study.id = id.to_owned();
        study.revision = revision + 1;
        study.changed_at = now();
        kept.put(study.clone());
        Ok(study)
    }

    fn list(&self, query: &Query) -> Result<Page, StoreError> {
        let kept = self.lock();
        let (found, mut page) = rules::page(kept.entries(), query);
        for entry in found {
            page.lines.push(Line {
                study: kept.study(&entry.id)?.clone(),
                urgency: entry.urgency,
            });
        }
        Ok(page)
    }

    fn waiting(&self, state: StudyState, before: i64) -> Result<Vec<String>, StoreError> {
        Ok(rules::waiting(self.lock().entries(), state, before))
    }

    fn due(&self, now: i64) -> Result<Vec<String>, StoreError> {
        Ok(rules::due(self.lock().entries(), now))
    }

    fn delete(&self, id: &str, _actor: &Actor) -> Result<(), StoreError> {
        let mut kept = self.lock();
        let (study, _) = kept
            .studies
            .remove(id)
            .ok_or(StoreError::Missing("study"))?;
        kept.by_uid.remove(&study.study_uid);
        for film in &study.films {
            kept.films.remove(&film.id);
            kept.bytes = kept.bytes.saturating_sub(film.bytes);
        }
        Ok(())
    }

    fn note(
        &self,
        _action: &'static str,
        _study: Option<&str>,
        _actor: &Actor,
    ) -> Result<(), StoreError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Film;

    fn arrival(study: &str, instance: &str, bytes: usize) -> Arrival {
        Arrival {
            study: Study {
                study_uid: study.into(),
                ..Study::default()
            },
            film: Film {
                instance_uid: instance.into(),
                ..Film::default()
            },
            bytes: vec![7; bytes],
        }
    }

    #[test]
    fn films_join_their_study_once_and_room_is_given_back() {
        let store = MemoryStore::of(30);
        let server = Actor::server();
        let first = store.receive(arrival("1.2", "1.2.1", 10), &server).unwrap();
        let again = store.receive(arrival("1.2", "1.2.1", 10), &server).unwrap();
        assert!(again.again && again.film == first.film);
        let second = store.receive(arrival("1.2", "1.2.2", 10), &server).unwrap();
        assert_eq!(second.study, first.study);
        let full = store.receive(arrival("1.3", "1.3.1", 11), &server);
        assert!(matches!(full, Err(StoreError::Full(_))));
        assert_eq!(store.by_uid("1.3").unwrap(), None);
        assert_eq!(store.film(&first.study, &first.film).unwrap(), [7; 10]);
        let waiting = store.waiting(StudyState::Received, now()).unwrap();
        assert_eq!(waiting, std::slice::from_ref(&first.study));
        store.delete(&first.study, &server).unwrap();
        store.receive(arrival("1.3", "1.3.1", 30), &server).unwrap();
    }

    #[test]
    fn a_change_that_is_refused_leaves_the_study_as_it_was() {
        let store = MemoryStore::default();
        let server = Actor::server();
        let id = store
            .receive(arrival("1.2", "1.2.1", 1), &server)
            .unwrap()
            .study;
        let before = store.study(&id).unwrap();
        let refused = store.change(&id, "edit", &server, &mut |study| {
            study.accession = "x".into();
            Err(StoreError::Refused("no".into()))
        });
        assert!(refused.is_err());
        assert_eq!(store.study(&id).unwrap(), before);
    }
}
