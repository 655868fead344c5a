//! Films from anywhere into the store: what they say is read, what is no chest radiograph is kept out with a reason, and a
//! study whose films have stopped coming is complete.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    processor::{
        dicom::{Identity, identity, looks_like_dicom},
        image::DecodeLimits,
    },
    store::{
        Actor, Arrival, Film, Patient, Received, StoreError, Study, StudyState, StudyStore, now,
    },
};

/// Why a film was not taken. No text of it has data of a patient.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    /// Not a DICOM file, or a damaged one.
    #[error("it {0}")]
    Unreadable(String),
    /// An identifier is missing or wrong.
    #[error("its {0} is missing or no identifier")]
    Identifier(&'static str),
    /// The store's reason.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What has come in since the start.
#[derive(Debug, Default)]
pub struct IntakeCounts {
    /// Films that were kept, those that the model does not read among them.
    pub films: AtomicU64,
    /// Films that were there already.
    pub again: AtomicU64,
    /// Films that the model does not read.
    pub kept_out: AtomicU64,
    /// Films that were not taken.
    pub refused: AtomicU64,
}

/// Takes films into a store.
pub struct Intake {
    store: Arc<dyn StudyStore>,
    limits: DecodeLimits,
    /// Counters, for metrics.
    pub counts: IntakeCounts,
}

fn arrival(identity: Identity, source: &str, bytes: Vec<u8>) -> Arrival {
    let of_a_chest = |view: &str| match view {
        "LATERAL" => "LAT".to_owned(),
        other => other.to_owned(),
    };
    Arrival {
        study: Study {
            study_uid: identity.study_uid,
            source: source.into(),
            patient: Patient {
                id: identity.patient_id,
                name: identity.patient_name,
                birth_date: identity.birth_date,
                sex: identity.sex,
                age: identity.age,
            },
            accession: identity.accession,
            date: identity.date,
            description: identity.description,
            ..Study::default()
        },
        film: Film {
            instance_uid: identity.instance_uid,
            series_uid: identity.series_uid,
            class_uid: identity.class_uid,
            view: of_a_chest(&identity.view),
            date: identity.film_date,
            kept_out: identity.kept_out,
            ..Film::default()
        },
        bytes,
    }
}

impl Intake {
    /// An intake of films within `limits`.
    pub fn new(store: Arc<dyn StudyStore>, limits: DecodeLimits) -> Self {
        Self {
            store,
            limits,
            counts: IntakeCounts::default(),
        }
    }

    /// Takes a DICOM file; `instance` is the SOPInstanceUID that its sender announced, if any.
    ///
    /// # Errors
    /// Any [`IntakeError`]; nothing was kept then.
    pub fn take(
        &self,
        bytes: Vec<u8>,
        instance: Option<&str>,
        source: &str,
        actor: &Actor,
    ) -> Result<Received, IntakeError> {
        let taken = self.take_in(bytes, instance, source, actor);
        let counter = match &taken {
            Ok(received) if received.again => &self.counts.again,
            Ok(_) => &self.counts.films,
            Err(_) => &self.counts.refused,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        taken
    }

    fn take_in(
        &self,
        bytes: Vec<u8>,
        instance: Option<&str>,
        source: &str,
        actor: &Actor,
    ) -> Result<Received, IntakeError> {
        if !looks_like_dicom(&bytes[..bytes.len().min(512)]) {
            return Err(IntakeError::Unreadable("is no DICOM file".into()));
        }
        let identity = identity(&bytes, &self.limits)
            .map_err(|error| IntakeError::Unreadable(error.to_string()))?;
        for (uid, name) in [
            (&identity.study_uid, "StudyInstanceUID"),
            (&identity.instance_uid, "SOPInstanceUID"),
        ] {
            if uid.is_empty() {
                return Err(IntakeError::Identifier(name));
            }
        }
        if instance.is_some_and(|announced| announced != identity.instance_uid) {
            return Err(IntakeError::Identifier(
                "SOPInstanceUID (another than was announced)",
            ));
        }
        let kept_out = identity.kept_out.clone();
        let received = self
            .store
            .receive(arrival(identity, source, bytes), actor)?;
        if let (Some(reason), false) = (kept_out, received.again) {
            self.counts.kept_out.fetch_add(1, Ordering::Relaxed);
            log::info!(
                "film {} of study {} is kept out: {reason}",
                received.film,
                received.study
            );
        }
        Ok(received)
    }

    /// Makes studies complete to which nothing has come for `quiet`: then their drafts are written. One without any film
    /// that the model reads has failed, with the reason of its first.
    ///
    /// # Errors
    /// The store's.
    pub fn complete(&self, quiet: Duration) -> Result<usize, StoreError> {
        let quiet = i64::try_from(quiet.as_millis()).unwrap_or(i64::MAX);
        let before = now().saturating_sub(quiet);
        let mut done = 0;
        for id in self.store.waiting(StudyState::Received, before)? {
            let changed = self
                .store
                .change(&id, "complete", &Actor::server(), &mut |study| {
                    // A film that came between the look and the change.
                    if study.state != StudyState::Received || study.changed_at > before {
                        return Err(StoreError::Changed {
                            expected: 0,
                            found: study.revision,
                        });
                    }
                    let readable = study.films.iter().any(|film| film.kept_out.is_none());
                    if readable {
                        study.state = StudyState::Complete;
                    } else {
                        let reason = study.films.iter().find_map(|film| film.kept_out.as_deref());
                        let reason = reason.unwrap_or("it has no film");
                        study.failure = Some(format!("no film of the study is read: {reason}"));
                        study.state = StudyState::Failed;
                    }
                    Ok(())
                });
            match changed {
                Ok(_) => done += 1,
                Err(StoreError::Changed { .. } | StoreError::Missing(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}
