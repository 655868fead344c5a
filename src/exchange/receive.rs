//! C-ECHO and C-STORE as a server (SCP): a thread per association, with limits of their number, time and memory.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use dicom_ul::{
    ServerAssociation,
    association::{
        Association, CloseSocket,
        server::{AccessControl, ServerAssociationOptions},
    },
    pdu::{
        AssociationRJServiceUserReason, PDataValue, PDataValueType, Pdu,
        PresentationContextNegotiated, PresentationContextResultReason, UserIdentity,
    },
};

use super::{
    dimse::{
        ANSWER, CANCEL, Command, ECHO, MAX_COMMAND, NO_DATA, STORE, element, file_head, status,
    },
    intake::{Intake, IntakeError},
};
use crate::{
    processor::dicom::transfer_syntaxes,
    store::{Actor, StoreError},
};

/// Verification.
pub(super) const VERIFICATION: &str = "1.2.840.10008.1.1";

/// Storage classes that are taken: CR, DX for presentation and for processing, SC, its forms of several frames, and XA-like
/// radiographs of older machines come as one of these.
pub const STORAGE_CLASSES: [&str; 7] = [
    "1.2.840.10008.5.1.4.1.1.1",
    "1.2.840.10008.5.1.4.1.1.1.1",
    "1.2.840.10008.5.1.4.1.1.1.1.1",
    "1.2.840.10008.5.1.4.1.1.7",
    "1.2.840.10008.5.1.4.1.1.7.2",
    "1.2.840.10008.5.1.4.1.1.7.3",
    "1.2.840.10008.5.1.4.1.1.7.4",
];

/// Largest PDU that is taken, in bytes.
const MAX_PDU: u32 = 128 << 10;

/// How the server of associations is set up.
#[derive(Clone)]
pub struct ReceiveOptions {
    /// Our title.
    pub title: String,
    /// Titles that may call; none: any.
    pub allowed: Vec<String>,
    /// Most associations at the same time.
    pub max_associations: usize,
    /// Time without a PDU after which an association ends.
    pub timeout: Duration,
    /// Largest object, in bytes.
    pub max_object_bytes: u64,
    /// Most bytes of objects that are on their way.
    pub max_memory_bytes: u64,
}

/// Lets those in that call us by our title, and are allowed.
struct Allowed(Vec<String>);

impl AccessControl for Allowed {
    fn check_access(
        &self,
        own: &str,
        calling: &str,
        called: &str,
        _: Option<&UserIdentity>,
    ) -> Result<(), AssociationRJServiceUserReason> {
        if called != own {
            return Err(AssociationRJServiceUserReason::CalledAETitleNotRecognized);
        }
        if !self.0.is_empty() && !self.0.iter().any(|title| title == calling) {
            return Err(AssociationRJServiceUserReason::CallingAETitleNotRecognized);
        }
        Ok(())
    }
}

/// Open associations, with the time of their last PDU.
#[derive(Default)]
struct Open {
    next: u64,
    sockets: HashMap<u64, (TcpStream, Instant)>,
}

struct Shared {
    options: ReceiveOptions,
    intake: Arc<Intake>,
    open: Mutex<Open>,
    /// Bytes of objects on their way.
    memory: AtomicU64,
    stop: AtomicBool,
    /// Associations that ended in a panic.
    panics: AtomicU64,
}

impl Shared {
    fn open(&self) -> std::sync::MutexGuard<'_, Open> {
        // A panic leaves a socket more, which its time ends.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn progress(&self, id: u64) {
        if let Some((_, last)) = self.open().sockets.get_mut(&id) {
            *last = Instant::now();
        }
    }
}

/// Bytes that an object has taken of the memory for all; given back when it is dropped.
struct Taken<'a> {
    all: &'a AtomicU64,
    bytes: u64,
}

impl Taken<'_> {
    /// Takes so many more; `false` where there is no room.
    fn take(&mut self, more: u64, most: u64) -> bool {
        let taken = self
            .all
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |all| {
                Some(all + more).filter(|sum| *sum <= most)
            });
        if taken.is_ok() {
            self.bytes += more;
        }
        taken.is_ok()
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A server of associations; ends with [`Receiver::stop`].
pub struct Receiver {
    shared: Arc<Shared>,
    address: SocketAddr,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Receiver {
    /// Serves associations on `listener`.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn start(
        listener: TcpListener,
        options: ReceiveOptions,
        intake: Arc<Intake>,
    ) -> std::io::Result<Self> {
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            options,
            intake,
            open: Mutex::default(),
            memory: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            panics: AtomicU64::new(0),
        });
        let accepting = shared.clone();
        let watching = shared.clone();
        let threads = vec![
            thread::Builder::new()
                .name("dicom".into())
                .spawn(move || accept(&listener, &accepting))?,
            thread::Builder::new()
                .name("dicom-time".into())
                .spawn(move || end_silent(&watching))?,
        ];
        Ok(Self {
            shared,
            address,
            threads,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Associations that ended in a panic: none, in a program without faults.
    #[cfg(test)]
    pub(super) fn panics(&self) -> u64 {
        self.shared.panics.load(Ordering::Relaxed)
    }

    /// Ends all associations, and waits for the threads that accept them.
    pub fn stop(mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let mut own = self.address;
        if own.ip().is_unspecified() {
            own.set_ip(match own {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        let _ = TcpStream::connect_timeout(&own, Duration::from_secs(1));
        for (socket, _) in self.shared.open().sockets.values() {
            let _ = socket.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Closes associations that have sent no whole PDU for the time-out: a read's own time-out begins anew with each byte.
fn end_silent(shared: &Shared) {
    while !shared.stop.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(200));
        for (socket, last) in shared.open().sockets.values() {
            if last.elapsed() > shared.options.timeout {
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for socket in listener.incoming() {
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => {
                log::warn!("a DICOM connection could not be accepted: {error}");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let id = {
            let mut open = shared.open();
            if open.sockets.len() >= shared.options.max_associations {
                log::warn!(
                    "a DICOM connection is refused: {} are open",
                    open.sockets.len()
                );
                continue;
            }
            let Ok(copy) = socket.try_clone() else {
                continue;
            };
            open.next += 1;
            let id = open.next;
            open.sockets.insert(id, (copy, Instant::now()));
            id
        };
        let shared = shared.clone();
        let own = shared.clone();
        let begun = thread::Builder::new()
            .name("dicom-peer".into())
            .spawn(move || {
                let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    associate(&own, id, socket)
                }));
                if ended.is_err() {
                    own.panics.fetch_add(1, Ordering::Relaxed);
                    log::error!("a DICOM association failed inside the server");
                }
                own.open().sockets.remove(&id);
            });
        if let Err(error) = begun {
            log::error!("a DICOM association has no thread: {error}");
            shared.open().sockets.remove(&id);
        }
    }
}

fn associate(shared: &Shared, id: u64, socket: TcpStream) {
    let options = &shared.options;
    let mut server = ServerAssociationOptions::new()
        .ae_access_control(Allowed(options.allowed.clone()))
        .ae_title(options.title.clone())
        .max_pdu_length(MAX_PDU)
        .strict(true)
        .read_timeout(options.timeout)
        .write_timeout(options.timeout)
        .with_abstract_syntax(VERIFICATION);
    for class in STORAGE_CLASSES {
        server = server.with_abstract_syntax(class);
    }
    for syntax in transfer_syntaxes() {
        server = server.with_transfer_syntax(*syntax);
    }
    match server.establish(socket) {
        Ok(association) => converse(shared, id, association),
        // The library's words may repeat what the peer sent.
        Err(_) => log::warn!("a DICOM association did not come about: refused, or not understood"),
    }
}

/// A peer's title as a log may have it.
fn plain_title(title: &str) -> String {
    let known = |c: &char| c.is_ascii_graphic() || *c == ' ';
    title.chars().filter(known).take(16).collect()
}

/// What has come of a message.
#[derive(Default)]
struct Message {
    context: u8,
    command: Vec<u8>,
    read: Option<Command>,
    data: Vec<u8>,
    /// Status that is due once the data set has come whole.
    refused: Option<u16>,
}

fn converse<S: Read + Write + CloseSocket>(
    shared: &Shared,
    id: u64,
    mut association: ServerAssociation<S>,
) {
    let peer = plain_title(association.peer_ae_title());
    let contexts: Vec<PresentationContextNegotiated> = association.presentation_contexts().to_vec();
    let mut message = Message::default();
    let mut taken = Taken {
        all: &shared.memory,
        bytes: 0,
    };
    loop {
        let Ok(pdu) = association.receive() else {
            return;
        };
        shared.progress(id);
        let values = match pdu {
            Pdu::PData { data } => data,
            Pdu::ReleaseRQ => {
                let _ = association.send(&Pdu::ReleaseRP);
                return;
            }
            Pdu::AbortRQ { .. } => return,
            _ => {
                let _ = association.abort();
                return;
            }
        };
        for value in values {
            if !accepted(&contexts, value.presentation_context_id) {
                let _ = association.abort();
                return;
            }
            match add(shared, &mut message, &mut taken, value) {
                Added::More => {}
                Added::Broken => {
                    let _ = association.abort();
                    return;
                }
                Added::Whole => {
                    let whole = std::mem::take(&mut message);
                    let context = whole.context;
                    let answer = answer(shared, &contexts, &peer, whole);
                    taken = Taken {
                        all: &shared.memory,
                        bytes: 0,
                    };
                    let Some(answer) = answer else { continue };
                    let pdu = Pdu::PData {
                        data: vec![PDataValue {
                            presentation_context_id: context,
                            value_type: PDataValueType::Command,
                            is_last: true,
                            data: answer.bytes(),
                        }],
                    };
                    if association.send(&pdu).is_err() {
                        return;
                    }
                    shared.progress(id);
                }
            }
        }
    }
}

fn accepted(contexts: &[PresentationContextNegotiated], id: u8) -> bool {
    contexts
        .iter()
        .any(|one| one.id == id && one.reason == PresentationContextResultReason::Acceptance)
}

enum Added {
    More,
    Whole,
    Broken,
}

/// Adds a piece to a message.
fn add(shared: &Shared, message: &mut Message, taken: &mut Taken<'_>, value: PDataValue) -> Added {
    let begun = !message.command.is_empty() || message.read.is_some();
    if begun && message.context != value.presentation_context_id {
        return Added::Broken;
    }
    message.context = value.presentation_context_id;
    match (value.value_type, &message.read) {
        (PDataValueType::Command, None) => {
            if message.command.len() + value.data.len() > MAX_COMMAND {
                return Added::Broken;
            }
            message.command.extend(value.data);
            if !value.is_last {
                return Added::More;
            }
            let Some(command) = Command::read(&message.command) else {
                return Added::Broken;
            };
            let whole = command.number(element::DATA_SET_TYPE) == Some(NO_DATA);
            message.read = Some(command);
            if whole { Added::Whole } else { Added::More }
        }
        (PDataValueType::Data, Some(_)) => {
            let options = &shared.options;
            let size = (message.data.len() + value.data.len()) as u64;
            let fits = message.refused.is_none()
                && size <= options.max_object_bytes
                && taken.take(value.data.len() as u64, options.max_memory_bytes);
            if fits {
                message.data.extend(value.data);
            } else {
                // The rest comes all the same, and is let go of.
                message.data = Vec::new();
                message.refused = Some(status::NO_ROOM);
            }
            if value.is_last {
                Added::Whole
            } else {
                Added::More
            }
        }
        _ => Added::Broken,
    }
}

/// The answer to a whole message, if it has one.
fn answer(
    shared: &Shared,
    contexts: &[PresentationContextNegotiated],
    peer: &str,
    message: Message,
) -> Option<Command> {
    let command = message.read?;
    let field = command.number(element::FIELD)?;
    if field == CANCEL || field & ANSWER != 0 {
        return None;
    }
    let base = Command::default()
        .with(element::FIELD, field | ANSWER)
        .with(
            element::ANSWERED_ID,
            command.number(element::ID).unwrap_or(0),
        )
        .with(element::DATA_SET_TYPE, NO_DATA);
    let base = match command.uid(element::CLASS) {
        Some(class) => base.with_uid(element::CLASS, class),
        None => base,
    };
    let status = match field {
        ECHO => status::SUCCESS,
        STORE => {
            let instance = command.uid(element::INSTANCE).map(str::to_owned);
            let code = match (message.refused, command.uid(element::CLASS), &instance) {
                (Some(code), _, _) => code,
                (None, Some(class), Some(instance)) => {
                    let context = contexts.iter().find(|one| one.id == message.context)?;
                    store(shared, context, peer, class, instance, message.data)
                }
                _ => status::NOT_UNDERSTOOD,
            };
            let base = match &instance {
                Some(instance) => base.with_uid(element::INSTANCE, instance),
                None => base,
            };
            return Some(base.with(element::STATUS, code));
        }
        _ => status::UNRECOGNISED,
    };
    Some(base.with(element::STATUS, status))
}

/// Keeps an object; a success means that the store has it.
fn store(
    shared: &Shared,
    context: &PresentationContextNegotiated,
    peer: &str,
    class: &str,
    instance: &str,
    data: Vec<u8>,
) -> u16 {
    let negotiated = context.abstract_syntax.trim_end_matches(['\0', ' ']);
    if negotiated != class || class == VERIFICATION {
        return status::SOP_CLASS_NOT_SUPPORTED;
    }
    let syntax = context.transfer_syntax.trim_end_matches(['\0', ' ']);
    let mut file = file_head(class, instance, syntax);
    file.extend(data);
    let actor = Actor {
        name: format!("dicom:{peer}"),
        role: "server",
    };
    let taken = shared.intake.take(file, Some(instance), "dicom", &actor);
    match taken {
        Ok(_) => status::SUCCESS,
        Err(error) => {
            log::warn!("an object of `{peer}` is refused: {error}");
            match error {
                IntakeError::Unreadable(_) => status::NOT_UNDERSTOOD,
                IntakeError::Identifier(_) => status::DOES_NOT_MATCH,
                IntakeError::Store(StoreError::Refused(_)) => status::REFUSED,
                IntakeError::Store(_) => status::NO_ROOM,
            }
        }
    }
}
