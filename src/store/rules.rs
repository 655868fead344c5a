//! What every store does the same: how a film joins its study, and how lists are searched and ordered.
//!
//! Pure functions of records; no disk, no lock.

use std::cmp::Reverse;

use super::{Arrival, Film, Page, Query, StoreError, Study, StudyState, new_id, record::Patient};

/// Fills what is empty in `kept` from `said`.
fn fill(kept: &mut String, said: &str) {
    if kept.is_empty() {
        said.clone_into(kept);
    }
}

fn fill_patient(kept: &mut Patient, said: &Patient) {
    fill(&mut kept.id, &said.id);
    fill(&mut kept.name, &said.name);
    fill(&mut kept.birth_date, &said.birth_date);
    fill(&mut kept.sex, &said.sex);
    fill(&mut kept.age, &said.age);
}

/// The new study of an arrival's first film; without the film, which [`join`] adds.
pub(super) fn begin(arrival: &Arrival, now: i64) -> Study {
    let said = &arrival.study;
    Study {
        id: if said.id.is_empty() {
            new_id()
        } else {
            said.id.clone()
        },
        study_uid: said.study_uid.clone(),
        source: said.source.clone(),
        patient: said.patient.clone(),
        accession: said.accession.clone(),
        date: said.date.clone(),
        description: said.description.clone(),
        indication: said.indication.clone(),
        prior: said.prior.clone(),
        received_at: now,
        changed_at: now,
        ..Study::default()
    }
}

/// The film of `study` that is `film` again: by its SOPInstanceUID, else by its hash.
pub(super) fn same_film<'a>(study: &'a Study, film: &Film) -> Option<&'a Film> {
    study.films.iter().find(|kept| {
        if film.instance_uid.is_empty() {
            kept.sha256 == film.sha256
        } else {
            kept.instance_uid == film.instance_uid
        }
    })
}

/// Adds a film, whose id, hash and size are set, to its study.
///
/// # Errors
/// [`StoreError::Refused`] for a study that is signed, and for one of another patient.
pub(super) fn join(
    study: &mut Study,
    said: &Study,
    film: Film,
    now: i64,
) -> Result<(), StoreError> {
    if matches!(study.state, StudyState::Signed | StudyState::Sent) {
        return Err(StoreError::Refused(
            "the study is signed, and takes no further film; send it as a study of its own".into(),
        ));
    }
    let (kept, new) = (&study.patient.id, &said.patient.id);
    if !kept.is_empty() && !new.is_empty() && kept != new {
        return Err(StoreError::Refused(
            "the film names another patient than the study it belongs to".into(),
        ));
    }
    fill_patient(&mut study.patient, &said.patient);
    fill(&mut study.accession, &said.accession);
    fill(&mut study.date, &said.date);
    fill(&mut study.description, &said.description);
    fill(&mut study.indication, &said.indication);
    study.films.push(film);
    study.state = StudyState::Received;
    study.failure = None;
    study.changed_at = now;
    study.revision += 1;
    Ok(())
}

/// What a search looks into, in small letters.
pub(super) fn search_text(study: &Study) -> String {
    let patient = &study.patient;
    let parts = [
        &patient.id,
        &patient.name,
        &study.accession,
        &study.date,
        &study.description,
        &study.indication,
        &study.id,
        &study.text().to_owned(),
    ]
    .map(|part| part.to_lowercase());
    parts.join("\n")
}

/// What a list needs of a study without reading it.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) id: String,
    #[allow(dead_code, reason = "for what receives from and sends to a network")]
    pub(super) study_uid: String,
    pub(super) patient: String,
    pub(super) date: String,
    pub(super) state: StudyState,
    pub(super) received_at: i64,
    pub(super) changed_at: i64,
    pub(super) urgency: f64,
    /// When the next entry of the outbox is due.
    pub(super) due_at: Option<i64>,
    search: String,
}

impl Entry {
    /// The entry of a study.
    pub(super) fn new(study: &Study) -> Self {
        let unsent = study.outbox.iter().filter(|one| one.sent_at.is_none());
        Self {
            id: study.id.clone(),
            study_uid: study.study_uid.clone(),
            patient: study.patient.id.clone(),
            date: study.date.clone(),
            state: study.state,
            received_at: study.received_at,
            changed_at: study.changed_at,
            urgency: study.urgency(),
            due_at: unsent.map(|one| one.due_at).min(),
            search: search_text(study),
        }
    }
}

fn is_signed(entry: &Entry) -> bool {
    matches!(entry.state, StudyState::Signed | StudyState::Sent)
}

/// Ids of a page of `entries`, how many there are in all, and the counts of states.
pub(super) fn page<'a>(
    entries: impl Iterator<Item = &'a Entry>,
    query: &Query,
) -> (Vec<&'a Entry>, Page) {
    let words: Vec<String> = query
        .search
        .split_whitespace()
        .map(str::to_lowercase)
        .collect();
    let mut counts = StudyState::ALL.map(|state| (state, 0));
    let mut found: Vec<&Entry> = entries
        .filter(|entry| {
            words
                .iter()
                .all(|word| entry.search.contains(word.as_str()))
        })
        .inspect(|entry| counts[entry.state as usize].1 += 1)
        .filter(|entry| query.states.is_empty() || query.states.contains(&entry.state))
        .collect();
    // The same order at every call: ids decide last.
    found.sort_unstable_by(|one, other| {
        let urgent = match query.urgent_first {
            // What is signed no longer waits for anybody.
            true => is_signed(one)
                .cmp(&is_signed(other))
                .then(other.urgency.total_cmp(&one.urgency)),
            false => std::cmp::Ordering::Equal,
        };
        let newest = other.received_at.cmp(&one.received_at);
        urgent.then(newest).then_with(|| one.id.cmp(&other.id))
    });
    let total = found.len();
    let lines = found
        .into_iter()
        .skip(query.offset)
        .take(query.limit)
        .collect();
    let page = Page {
        lines: Vec::new(),
        total,
        counts: counts.to_vec(),
    };
    (lines, page)
}

/// Ids of the earlier studies of the patient of `of`, the newest first: those of an earlier date, or, where
/// either has none, those that came earlier.
pub(super) fn priors<'a>(entries: impl Iterator<Item = &'a Entry>, of: &Entry) -> Vec<&'a Entry> {
    if of.patient.is_empty() {
        return Vec::new();
    }
    let day = |date: &str| date.get(..8).unwrap_or_default().to_owned();
    let earlier = |entry: &Entry| {
        let (one, other) = (day(&entry.date), day(&of.date));
        match one.is_empty() || other.is_empty() || one == other {
            true => (entry.received_at, &entry.id) < (of.received_at, &of.id),
            false => one < other,
        }
    };
    let mut found: Vec<&Entry> = entries
        .filter(|entry| entry.patient == of.patient && entry.id != of.id && earlier(entry))
        .collect();
    found.sort_by_cached_key(|entry| Reverse((day(&entry.date), entry.received_at)));
    found
}

/// Ids of those in `state` that have not changed since `before`, the oldest first.
pub(super) fn waiting<'a>(
    entries: impl Iterator<Item = &'a Entry>,
    state: StudyState,
    before: i64,
) -> Vec<String> {
    let mut found: Vec<&Entry> = entries
        .filter(|entry| entry.state == state && entry.changed_at <= before)
        .collect();
    found.sort_unstable_by_key(|entry| entry.changed_at);
    found.into_iter().map(|entry| entry.id.clone()).collect()
}

/// Ids of those with something due to be sent at `now`, the longest due first.
pub(super) fn due<'a>(entries: impl Iterator<Item = &'a Entry>, now: i64) -> Vec<String> {
    let mut found: Vec<(i64, &Entry)> = entries
        .filter_map(|entry| Some((entry.due_at.filter(|due| *due <= now)?, entry)))
        .collect();
    found.sort_unstable_by_key(|(due, _)| *due);
    found
        .into_iter()
        .map(|(_, entry)| entry.id.clone())
        .collect()
}

/// The films that the model reads of a study: those that are not kept out, frontal views first, then lateral
/// ones, then the others, each in the order in which they came.
pub fn films_to_read(study: &Study) -> Vec<&Film> {
    let rank = |film: &Film| match film.view.as_str() {
        "PA" | "AP" => 0,
        "LAT" | "LL" | "RL" => 1,
        _ => 2,
    };
    let mut films: Vec<&Film> = study
        .films
        .iter()
        .filter(|film| film.kept_out.is_none())
        .collect();
    films.sort_by_key(|film| rank(film));
    films
}

#[cfg(test)]
mod tests {
    use super::*;

    fn study(id: &str, patient: &str, date: &str, received_at: i64) -> Study {
        Study {
            id: id.into(),
            patient: Patient {
                id: patient.into(),
                ..Patient::default()
            },
            date: date.into(),
            received_at,
            ..Study::default()
        }
    }

    #[test]
    fn priors_are_of_the_same_patient_and_of_earlier_dates() {
        let studies = [
            study("a", "p", "20240101", 9),
            study("b", "p", "20250101120000", 1),
            study("c", "q", "20230101", 1),
            study("d", "p", "", 0),
            study("e", "p", "20260101", 3),
            study("f", "", "20230101", 1),
        ];
        let entries: Vec<Entry> = studies.iter().map(Entry::new).collect();
        let of = |index: usize| -> Vec<&str> {
            let found = priors(entries.iter(), &entries[index]);
            found.iter().map(|entry| entry.id.as_str()).collect()
        };
        assert_eq!(of(4), ["b", "a", "d"]);
        assert_eq!(of(0), ["d"]);
        assert!(of(2).is_empty() && of(5).is_empty());
    }

    #[test]
    fn a_page_has_its_order_its_search_and_counts_of_all_states() {
        let mut urgent = study("a", "P-77", "20260101", 1);
        urgent.state = StudyState::Drafted;
        urgent.draft = Some(crate::store::Draft {
            text: "右侧气胸。".into(),
            findings: serde_json::json!({"classes": {"pneumothorax": {"probability": 0.9}, "other": {"probability": null}}}),
            ..Default::default()
        });
        let studies = [urgent, study("b", "P-78", "", 5), study("c", "p-77", "", 7)];
        let entries: Vec<Entry> = studies.iter().map(Entry::new).collect();
        let ask = |query: &Query| -> (Vec<String>, Page) {
            let (lines, page) = page(entries.iter(), query);
            (lines.iter().map(|one| one.id.clone()).collect(), page)
        };
        let all = Query {
            limit: 10,
            ..Query::default()
        };
        assert_eq!(ask(&all).0, ["c", "b", "a"]);
        let first = Query {
            urgent_first: true,
            limit: 2,
            ..Query::default()
        };
        let (ids, page) = ask(&first);
        assert_eq!((ids, page.total), (vec!["a".into(), "c".into()], 3));
        let searched = Query {
            search: " p-77  气胸 ".into(),
            states: vec![StudyState::Received],
            ..all
        };
        let (ids, page) = ask(&searched);
        assert!(ids.is_empty() && page.total == 0);
        assert_eq!(page.counts[2], (StudyState::Drafted, 1));
    }

    #[test]
    fn a_film_opens_its_study_again_until_it_is_signed() {
        let said = study("", "p", "20260101", 0);
        let mut kept = study("a", "", "", 0);
        kept.state = StudyState::Drafted;
        join(&mut kept, &said, Film::default(), 5).unwrap();
        assert_eq!(kept.state, StudyState::Received);
        assert_eq!((kept.patient.id.as_str(), kept.revision), ("p", 1));
        let other = study("", "q", "", 0);
        assert!(join(&mut kept, &other, Film::default(), 6).is_err());
        kept.state = StudyState::Signed;
        assert!(join(&mut kept, &said, Film::default(), 6).is_err());
        assert_eq!(kept.films.len(), 1);
    }

    #[test]
    fn frontal_films_are_read_first_and_others_not_at_all() {
        let film = |id: &str, view: &str| Film {
            id: id.into(),
            view: view.into(),
            ..Film::default()
        };
        let mut study = Study {
            films: vec![
                film("1", ""),
                film("2", "LAT"),
                film("3", "PA"),
                film("4", "AP"),
            ],
            ..Study::default()
        };
        study.films[3].kept_out = Some("no chest".into());
        let ids: Vec<&str> = films_to_read(&study)
            .iter()
            .map(|film| film.id.as_str())
            .collect();
        assert_eq!(ids, ["3", "2", "1"]);
    }
}
