//! What goes out: entries of a study's outbox, sent until they have arrived, each as the same object however often it is tried.

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    dicomweb::Service,
    report::{Outgone, PdfFont, diagnostic_report, encapsulated, message, pdf, structured_report},
    send::{Instance, data_set, store},
};
use crate::{
    base::files::write_atomic,
    store::{Actor, Outgoing, StoreError, Study, StudyState, StudyStore, new_id, now},
};

/// Pauses before the next attempt, in seconds; the last for all that follow.
const PAUSES: [i64; 8] = [5, 10, 30, 60, 120, 300, 600, 600];

/// Where reports go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetKind {
    /// A title at HOST:PORT, by C-STORE.
    Dicom {
        /// The peer's title.
        title: String,
        /// HOST:PORT.
        address: String,
    },
    /// A DICOMweb service, by STOW-RS.
    Web {
        /// Address of the service.
        base: String,
        /// Value of the header `Authorization`.
        authorization: Option<String>,
    },
    /// A folder for messages of HL7 v2.
    Hl7(PathBuf),
    /// A folder for resources of FHIR.
    Fhir(PathBuf),
}

/// A target with the name that records call it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The name: without passwords.
    pub name: String,
    /// Where it is.
    pub kind: TargetKind,
}

impl Target {
    fn forms(&self, with_pdf: bool) -> &'static [&'static str] {
        match self.kind {
            TargetKind::Dicom { .. } | TargetKind::Web { .. } if with_pdf => &["sr", "pdf"],
            TargetKind::Dicom { .. } | TargetKind::Web { .. } => &["sr"],
            TargetKind::Hl7(_) => &["hl7"],
            TargetKind::Fhir(_) => &["fhir"],
        }
    }
}

/// What has gone out since the start.
#[derive(Debug, Default)]
pub struct OutboxCounts {
    /// Objects that have arrived.
    pub sent: AtomicU64,
    /// Attempts that failed.
    pub failed: AtomicU64,
}

/// The targets of a server, and how it sends.
pub struct Outbox {
    /// Where reports go.
    pub targets: Vec<Target>,
    /// Sends drafts as well, and not signed reports alone.
    pub drafts: bool,
    /// Our title.
    pub title: String,
    /// The font of PDFs; without one there are none.
    pub font: Option<PdfFont>,
    /// Counters, for metrics.
    pub counts: OutboxCounts,
}

impl Outbox {
    /// What is to be sent of version `version`; part of the change that drafts or signs the study.
    pub fn outgoing(&self, study: &Study, version: u32) -> Vec<Outgoing> {
        if version == 0 && !self.drafts {
            return Vec::new();
        }
        let Some(report) = Outgone::new(study, version) else {
            return Vec::new();
        };
        let all = self.targets.iter().flat_map(|target| {
            let forms = target.forms(self.font.is_some());
            forms.iter().map(|form| (target.name.clone(), *form))
        });
        all.map(|(target, form)| Outgoing {
            id: new_id(),
            target,
            kind: form.to_owned(),
            version,
            uid: report.uid(form),
            due_at: now(),
            ..Outgoing::default()
        })
        .collect()
    }

    /// Sends what is due; the number of attempts.
    ///
    /// # Errors
    /// The store's.
    pub fn send_due(&self, store: &dyn StudyStore) -> Result<usize, StoreError> {
        let mut attempts = 0;
        for id in store.due(now())? {
            let study = match store.study(&id) {
                Ok(study) => study,
                Err(StoreError::Missing(_)) => continue,
                Err(error) => return Err(error),
            };
            let due: Vec<&Outgoing> = study
                .outbox
                .iter()
                .filter(|one| one.sent_at.is_none() && one.due_at <= now())
                .collect();
            for entry in due {
                attempts += 1;
                let outcome = self.send(&study, entry);
                self.note(store, &study, entry, outcome)?;
            }
        }
        Ok(attempts)
    }

    /// Notes what came of an attempt, in one change.
    fn note(
        &self,
        store: &dyn StudyStore,
        study: &Study,
        entry: &Outgoing,
        outcome: Outcome,
    ) -> Result<(), StoreError> {
        let (id, to) = (&study.id, &entry.target);
        match &outcome {
            Outcome::Arrived => {
                self.counts.sent.fetch_add(1, Ordering::Relaxed);
                log::info!("{} of study {id} has arrived at `{to}`", entry.kind);
            }
            Outcome::Superseded => log::info!(
                "{} of study {id} is not sent: it was drafted anew",
                entry.kind
            ),
            Outcome::Failed(reason) => {
                self.counts.failed.fetch_add(1, Ordering::Relaxed);
                let attempt = entry.attempts + 1;
                log::warn!(
                    "{} of study {id} has not arrived at `{to}` (attempt {attempt}): {reason}",
                    entry.kind
                );
            }
        }
        let changed = store.change(id, "send", &Actor::server(), &mut |study| {
            let at = now();
            if matches!(outcome, Outcome::Superseded) {
                study.outbox.retain(|one| one.id != entry.id);
            }
            if let Some(one) = study.outbox.iter_mut().find(|one| one.id == entry.id) {
                one.attempts += 1;
                match &outcome {
                    Outcome::Failed(reason) => {
                        let pause = PAUSES[(one.attempts as usize - 1).min(PAUSES.len() - 1)];
                        one.due_at = at + 1000 * pause;
                        one.error = Some(reason.clone());
                    }
                    _ => {
                        one.sent_at = Some(at);
                        one.error = None;
                    }
                }
            }
            let signed = u32::try_from(study.signed.len()).unwrap_or(u32::MAX);
            let open = study.outbox.iter().any(|one| one.sent_at.is_none());
            let told = study.outbox.iter().any(|one| one.version == signed);
            if study.state == StudyState::Signed && !open && told {
                study.state = StudyState::Sent;
            }
            Ok(())
        });
        match changed {
            // It was removed meanwhile.
            Err(StoreError::Missing(_)) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    fn send(&self, study: &Study, entry: &Outgoing) -> Outcome {
        let Some(target) = self
            .targets
            .iter()
            .find(|target| target.name == entry.target)
        else {
            return Outcome::Failed("this server was started without that target".into());
        };
        let report = match Outgone::new(study, entry.version) {
            Some(report) if report.uid(&entry.kind) == entry.uid => report,
            _ => return Outcome::Superseded,
        };
        match self.deliver(target, &report, entry) {
            Ok(()) => Outcome::Arrived,
            Err(reason) => Outcome::Failed(reason),
        }
    }

    /// A report as a DICOM file.
    fn object(&self, report: &Outgone<'_>, form: &str) -> Result<Vec<u8>, String> {
        match form {
            "sr" => structured_report(report),
            _ => {
                let font = self
                    .font
                    .as_ref()
                    .ok_or("there is no font for a PDF; --pdf-font gives one")?;
                encapsulated(
                    report,
                    pdf(report, font).map_err(|error| error.to_string())?,
                )
            }
        }
    }

    fn deliver(
        &self,
        target: &Target,
        report: &Outgone<'_>,
        entry: &Outgoing,
    ) -> Result<(), String> {
        let written = |folder: &PathBuf, ending: &str, bytes: &[u8]| {
            // A message that a reader has not taken yet is replaced by itself.
            fs::create_dir_all(folder).map_err(|error| error.kind().to_string())?;
            let name = format!("{}-{}.{ending}", study_part(report), entry.uid);
            write_atomic(&folder.join(name), |file| {
                std::io::Write::write_all(file, bytes)
            })
            .map_err(|_| "its folder cannot be written".to_owned())
        };
        match &target.kind {
            TargetKind::Dicom { title, address } => {
                let file = self.object(report, &entry.kind)?;
                let class = match entry.kind.as_str() {
                    "sr" => super::report::SR_CLASS,
                    _ => super::report::PDF_CLASS,
                };
                let instance = Instance {
                    class,
                    uid: &entry.uid,
                    data: data_set(&file),
                };
                store(address, &self.title, title, &instance)
            }
            TargetKind::Web {
                base,
                authorization,
            } => {
                let file = self.object(report, &entry.kind)?;
                Service::new(base, authorization.clone()).store(&file)
            }
            TargetKind::Hl7(folder) => written(folder, "hl7", message(report).as_bytes()),
            TargetKind::Fhir(folder) => {
                let text = format!("{:#}\n", diagnostic_report(report));
                written(folder, "json", text.as_bytes())
            }
        }
    }
}

/// Our own id of the study: names of files have nothing of a patient.
fn study_part<'a>(report: &Outgone<'a>) -> &'a str {
    &report.study.id
}

enum Outcome {
    Arrived,
    /// It is not a version of the report any more.
    Superseded,
    Failed(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        exchange::report::samples,
        store::{Arrival, MemoryStore},
    };

    fn outbox(targets: Vec<Target>) -> Outbox {
        Outbox {
            targets,
            drafts: true,
            title: "XRAY".into(),
            font: None,
            counts: OutboxCounts::default(),
        }
    }

    /// A store with the sample as a study that is signed, and what goes out of it.
    fn signed(outbox: &Outbox) -> (MemoryStore, String) {
        let store = MemoryStore::default();
        let server = Actor::server();
        let arrival = Arrival {
            study: samples::study(),
            ..Arrival::default()
        };
        // An id of one's own names a study that is there.
        let arrival = Arrival {
            study: Study {
                id: String::new(),
                ..arrival.study
            },
            ..arrival
        };
        let id = store.receive(arrival, &server).unwrap().study;
        store
            .change(&id, "sign", &server, &mut |study| {
                let sample = samples::study();
                (study.draft, study.signed) = (sample.draft, sample.signed);
                study.state = StudyState::Signed;
                study.outbox = outbox.outgoing(study, 1);
                Ok(())
            })
            .unwrap();
        (store, id)
    }

    #[test]
    fn what_has_arrived_is_not_sent_again_and_a_sent_study_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let target = |name: &str, kind| Target {
            name: name.into(),
            kind,
        };
        let outbox = outbox(vec![
            target("hl7", TargetKind::Hl7(folder.path().join("hl7"))),
            target("fhir", TargetKind::Fhir(folder.path().join("fhir"))),
        ]);
        let (store, id) = signed(&outbox);
        assert_eq!(outbox.send_due(&store).unwrap(), 2);
        assert_eq!(outbox.send_due(&store).unwrap(), 0);
        assert_eq!(store.study(&id).unwrap().state, StudyState::Sent);
        for name in ["hl7", "fhir"] {
            assert_eq!(fs::read_dir(folder.path().join(name)).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_target_that_is_away_is_tried_again_later_with_the_same_object() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let outbox = outbox(vec![Target {
            name: "pacs".into(),
            kind: TargetKind::Dicom {
                title: "PACS".into(),
                address,
            },
        }]);
        let (store, id) = signed(&outbox);
        let uid = store.study(&id).unwrap().outbox[0].uid.clone();
        assert_eq!(outbox.send_due(&store).unwrap(), 1);
        let study = store.study(&id).unwrap();
        let entry = &study.outbox[0];
        assert_eq!(
            (entry.attempts, &entry.uid, study.state),
            (1, &uid, StudyState::Signed)
        );
        assert!(entry.error.is_some() && entry.due_at > now() + 3000);
        assert_eq!(outbox.send_due(&store).unwrap(), 0);
    }

    #[test]
    fn a_draft_that_was_written_anew_takes_the_place_of_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let outbox = outbox(vec![Target {
            name: "hl7".into(),
            kind: TargetKind::Hl7(folder.path().to_owned()),
        }]);
        let (store, id) = signed(&outbox);
        store
            .change(&id, "draft", &Actor::server(), &mut |study| {
                study.outbox = outbox.outgoing(study, 0);
                if let Some(draft) = &mut study.draft {
                    draft.at += 1;
                }
                Ok(())
            })
            .unwrap();
        outbox.send_due(&store).unwrap();
        assert_eq!(store.study(&id).unwrap().outbox, []);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
