//! Studies and reports that outlive a request: records, the trait of a store, in memory and on disk.
//!
//! Knows no HTTP, no DICOM network and no model. Whatever a store has said `Ok` to is still there after `kill -9`
//! (with `--store`; the one in memory ends with its process).

pub mod disk;
pub mod edits;
mod memory;
mod record;
mod rules;

pub use memory::MemoryStore;
pub use record::{Draft, Film, Outgoing, Patient, Report, Study, StudyState};
pub use rules::films_to_read;

/// What can go wrong. No text of it has data of a patient.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No such study, film or entry.
    #[error("there is no such {0}")]
    Missing(&'static str),
    /// Somebody else changed the study since it was read.
    #[error(
        "the study was changed meanwhile (revision {found}, expected {expected}); read it again"
    )]
    Changed {
        /// The caller's.
        expected: u64,
        /// The store's.
        found: u64,
    },
    /// A change that its state does not allow.
    #[error("{0}")]
    Refused(String),
    /// The disk is full, or the store's largest size is reached.
    #[error("the store has no room left: {0}; free some, or let `store delete` remove old studies")]
    Full(String),
    /// Anything else; for the log.
    #[error("the store failed: {0}")]
    Failed(String),
}

/// Who does something, for the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// Name of an account; `dicom:AET` for a peer of the network, `server` for the program itself.
    pub name: String,
    /// `reader`, `signer`, `administrator`, `api`, or `server`.
    pub role: &'static str,
}

impl Actor {
    /// The program itself.
    pub fn server() -> Self {
        Self {
            name: "server".into(),
            role: "server",
        }
    }
}

/// A film that comes in, with what it says of its study.
#[derive(Debug, Clone, Default)]
pub struct Arrival {
    /// Id, state, times, revision and films are the store's to set; the rest is taken where the study is new,
    /// and fills what is empty where it is not.
    pub study: Study,
    /// `id`, `sha256` and `bytes` are the store's to set.
    pub film: Film,
    /// The file, as it came.
    pub bytes: Vec<u8>,
}

/// What became of a film that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Id of its study.
    pub study: String,
    /// Id of the film.
    pub film: String,
    /// Whether the same film (by SOPInstanceUID, else by its hash) was there already; nothing was changed then.
    pub again: bool,
}

/// Which studies a list has.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Those in one of these states; none: in any.
    pub states: Vec<StudyState>,
    /// Words that patient, number, description, date or report have, all of them, in any case.
    pub search: String,
    /// The urgent first; else the newest first.
    pub urgent_first: bool,
    /// Studies before the page.
    pub offset: usize,
    /// Studies of a page.
    pub limit: usize,
}

/// One line of a worklist.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// The study without its films' bytes.
    pub study: Study,
    /// [`Study::urgency`].
    pub urgency: f64,
}

/// A page of a list, and how many there are in all.
#[derive(Debug, Clone, Default)]
pub struct Page {
    /// In order.
    pub lines: Vec<Line>,
    /// Number of studies that the query is true of.
    pub total: usize,
    /// Number of studies in each state, whatever the query says of states.
    pub counts: Vec<(StudyState, usize)>,
}

/// A change of one study: refuses, or leaves the record as it shall be.
pub type Change<'a> = &'a mut dyn FnMut(&mut Study) -> Result<(), StoreError>;

/// Where studies are kept. All calls block for the time of a disk; handlers call them on a blocking thread.
pub trait StudyStore: Send + Sync {
    /// Keeps a film, and its study if that is new (by StudyInstanceUID; an `Arrival` with a `study.id` adds to
    /// that one). A film for a study that was complete or drafted makes it received again; one that is
    /// signed takes none ([`StoreError::Refused`]).
    fn receive(&self, arrival: Arrival, actor: &Actor) -> Result<Received, StoreError>;

    /// A study by our id.
    fn study(&self, id: &str) -> Result<Study, StoreError>;

    /// Id of the study with a StudyInstanceUID.
    #[allow(dead_code, reason = "for what receives from and sends to a network")]
    fn by_uid(&self, study_uid: &str) -> Result<Option<String>, StoreError>;

    /// Earlier studies of the same patient (PatientID, not empty), the newest first, by study date, then by arrival.
    fn priors(&self, id: &str) -> Result<Vec<Study>, StoreError>;

    /// The bytes of a film as they came.
    fn film(&self, study: &str, film: &str) -> Result<Vec<u8>, StoreError>;

    /// Changes a study in one transaction, together with the line of the audit log: `action` is a fixed word
    /// (`draft`, `edit`, `sign`, `send`, `complete`, `fail`, …). Sets `revision` and `changed_at`.
    /// The outbox is part of the record: what is signed and what is to be sent are one change.
    fn change(
        &self,
        id: &str,
        action: &'static str,
        actor: &Actor,
        change: Change<'_>,
    ) -> Result<Study, StoreError>;

    /// A page of the worklist.
    fn list(&self, query: &Query) -> Result<Page, StoreError>;

    /// Ids of studies in a state that have not changed since `before` (milliseconds since 1970), the oldest first.
    fn waiting(&self, state: StudyState, before: i64) -> Result<Vec<String>, StoreError>;

    /// Ids of studies with something in the outbox that is not sent and due at `now`, the longest due first.
    #[allow(dead_code, reason = "for what receives from and sends to a network")]
    fn due(&self, now: i64) -> Result<Vec<String>, StoreError>;

    /// Removes a study with its films.
    fn delete(&self, id: &str, actor: &Actor) -> Result<(), StoreError>;

    /// Notes something that changes no study (a look at a report, an export, a refused sign-on).
    fn note(
        &self,
        action: &'static str,
        study: Option<&str>,
        actor: &Actor,
    ) -> Result<(), StoreError>;
}

/// Now, in milliseconds since 1970.
pub fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}

/// A new id: 32 hexadecimal digits.
pub fn new_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}
