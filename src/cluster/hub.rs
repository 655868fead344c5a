//! The first process's side: takes the processes in, joins their parts, and ends the work of all.
//!
//! A thread greets each connection, two serve it, one (the coordinator) decides; nobody is waited for without an end.

use std::{
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    key::Key,
    peer::{Peer, Tell},
    pending::Pending,
    wire::{
        By, Frame, GREETING, Greeting, Kind, MAX_HELLO, Reader, Writer, admit, read_frame,
        read_frame_up_to, reason, write_frame,
    },
};

/// How long the last messages may take to leave.
const FLUSH: Duration = Duration::from_secs(3);
/// Most rejected connections that are logged.
const TOLD_STRANGERS: usize = 10;
/// When missing processes are named for the first time, and how often from then on.
const FIRST_WORD: Duration = Duration::from_secs(5);
const NEXT_WORD: Duration = Duration::from_secs(60);
/// What a connection of this kind proves the key for.
pub(super) const PURPOSE: &[u8] = b"meeting";

/// What the first process decides with.
#[derive(Clone)]
pub(super) struct HubOptions {
    pub(super) processes: usize,
    pub(super) key: Key,
    /// What a launcher calls this start.
    pub(super) id: Option<String>,
    /// `node` or `process`.
    pub(super) noun: &'static str,
    /// Longest wait of processes for each other.
    pub(super) patience: Duration,
    /// Longest silence of a process that lives.
    pub(super) silence: Duration,
    pub(super) tell: Tell,
}

enum Event {
    Hello(Peer, TcpStream),
    Frame(usize, Frame),
    Lost(usize, String),
    /// The first process leaves.
    Close,
}

/// The listening side.
pub(super) struct Hub {
    pub(super) address: SocketAddr,
    events: Sender<Event>,
    stop: Arc<AtomicBool>,
    coordinator: Option<JoinHandle<()>>,
}

impl Hub {
    /// Listens and serves in threads of its own.
    pub(super) fn start(listener: TcpListener, options: HubOptions) -> std::io::Result<Self> {
        let address = listener.local_addr()?;
        let (events, received) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let greeter = Greeter {
            options: options.clone(),
            events: events.clone(),
            pending: Pending::default(),
            strangers: Arc::default(),
        };
        let stopped = stop.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                match stream {
                    Ok(stream) => greeter.greet(stream),
                    // Out of file handles, for instance: the strangers' will come back.
                    Err(_) => thread::sleep(Duration::from_millis(50)),
                }
            }
        });
        let sender = events.clone();
        let coordinator = thread::spawn(move || {
            let seats = (0..options.processes).map(|_| None).collect();
            let table = Table {
                options,
                seats,
                events: sender,
                round: Round::default(),
                taken: 0,
            };
            table.run(&received);
        });
        Ok(Self {
            address,
            events,
            stop,
            coordinator: Some(coordinator),
        })
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = self.events.send(Event::Close);
        if let Some(coordinator) = self.coordinator.take() {
            let _ = coordinator.join();
        }
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the listener, so that it sees the flag.
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        let _ = TcpStream::connect_timeout(&address, Duration::from_secs(1));
    }
}

#[derive(Clone)]
struct Greeter {
    options: HubOptions,
    events: Sender<Event>,
    pending: Pending,
    strangers: Arc<AtomicUsize>,
}

impl Greeter {
    fn greet(&self, stream: TcpStream) {
        let this = self.clone();
        let number = self.pending.add(&stream);
        thread::spawn(move || {
            let from = stream
                .peer_addr()
                .map_or_else(|_| "an unknown address".into(), |peer| peer.to_string());
            match this.hello(&stream) {
                Ok(peer) => {
                    let _ = this.events.send(Event::Hello(peer, stream));
                }
                Err(why) => {
                    let _ = stream.shutdown(Shutdown::Both);
                    let told = this.strangers.fetch_add(1, Ordering::Relaxed);
                    if told < TOLD_STRANGERS {
                        let last = match told + 1 == TOLD_STRANGERS {
                            true => "; others are not reported",
                            false => "",
                        };
                        (this.options.tell)(&format!(
                            "note: a connection from {from} was turned away: {why}{last}"
                        ));
                    }
                }
            }
            this.pending.remove(number);
        });
    }

    fn hello(&self, stream: &TcpStream) -> Result<Peer, String> {
        admit(stream, &self.options.key, PURPOSE).map_err(|error| match error {
            Greeting::Broken(why) | Greeting::Wrong(why) => why,
        })?;
        let mut by = By {
            stream,
            deadline: Instant::now() + GREETING,
        };
        let frame = read_frame_up_to(&mut by, MAX_HELLO).map_err(|error| reason(&error))?;
        if frame.kind != Kind::Hello {
            return Err("it does not say who it is".into());
        }
        serde_json::from_slice(&frame.body).map_err(|error| format!("it says `{error}`"))
    }
}

/// A process that was taken in.
struct Seat {
    peer: Peer,
    out: Sender<Frame>,
    stream: TcpStream,
    done: bool,
    is_open: bool,
}

/// A decision that is being taken.
#[derive(Default)]
struct Round {
    number: u64,
    /// What the first to come calls it, and who that was.
    what: Option<(String, usize, Instant)>,
    parts: Vec<Option<Vec<u8>>>,
}

struct Table {
    options: HubOptions,
    seats: Vec<Option<Seat>>,
    events: Sender<Event>,
    round: Round,
    /// Jobs handed out.
    taken: u64,
}

impl Table {
    fn run(mut self, events: &Receiver<Event>) {
        let reason = self.decide(events);
        if let Some(reason) = reason {
            self.broadcast(&Frame::new(Kind::End, reason));
        }
        // The others close when they have read the end; one that cannot is cut off.
        let end = Instant::now() + FLUSH;
        while self.seats.iter().flatten().any(|seat| seat.is_open) {
            match events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Event::Lost(rank, _)) => self.close(rank),
                Ok(Event::Hello(_, stream)) => {
                    let _ = stream.shutdown(Shutdown::Both);
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        for seat in self.seats.iter().flatten() {
            let _ = seat.stream.shutdown(Shutdown::Both);
        }
    }

    fn close(&mut self, rank: usize) {
        if let Some(seat) = &mut self.seats[rank] {
            seat.is_open = false;
        }
    }

    /// Serves until the work ends; says why, where that is not its regular end.
    fn decide(&mut self, events: &Receiver<Event>) -> Option<String> {
        let begun = Instant::now();
        let mut next_word = begun + FIRST_WORD;
        loop {
            let is_complete = self.seats.iter().all(Option::is_some);
            let deadline = match (&self.round.what, is_complete) {
                (_, false) => next_word.min(begun + self.options.patience),
                (Some((_, _, since)), true) => *since + self.options.patience,
                (None, true) => Instant::now() + NEXT_WORD,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            match events.recv_timeout(left) {
                Ok(Event::Close) => return Some(self.closing()),
                Ok(Event::Hello(peer, stream)) => self.take_in(peer, stream),
                Ok(Event::Frame(rank, frame)) => match self.answer(rank, frame) {
                    Ok(false) => {}
                    Ok(true) => return None,
                    Err(reason) => return Some(reason),
                },
                Ok(Event::Lost(rank, why)) if !is_complete => {
                    // It may come again: nothing has begun.
                    (self.options.tell)(&format!("note: {} {why}", self.name(rank)));
                    self.seats[rank] = None;
                }
                Ok(Event::Lost(rank, why)) => {
                    self.close(rank);
                    if !self.seats[rank].as_ref().is_some_and(|seat| seat.done) {
                        return Some(format!("{} {why}", self.name(rank)));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    let now = Instant::now();
                    if !is_complete && now >= begun + self.options.patience {
                        return Some(format!(
                            "{} did not come within {} s; here are {}",
                            self.missing(),
                            self.options.patience.as_secs_f64(),
                            self.present()
                        ));
                    }
                    if !is_complete && now >= next_word {
                        next_word = now + NEXT_WORD;
                        (self.options.tell)(&format!("waiting for {}", self.missing()));
                    }
                    if let Some((what, _, since)) = &self.round.what
                        && now >= *since + self.options.patience
                    {
                        let late = self.round.parts.iter().enumerate();
                        let late = late.filter(|(_, part)| part.is_none());
                        let late: Vec<String> = late.map(|(rank, _)| self.name(rank)).collect();
                        return Some(format!(
                            "{} did not come to {what} within {} s while the others wait; raise ddp_timeout if it is only slow",
                            late.join(", "),
                            self.options.patience.as_secs_f64()
                        ));
                    }
                }
            }
        }
    }

    /// Why all end when the first process leaves by itself.
    fn closing(&self) -> String {
        match self.seats[0].is_some() {
            true => format!("{} left", self.name(0)),
            false => "the first process left".into(),
        }
    }

    fn name(&self, rank: usize) -> String {
        match &self.seats[rank] {
            Some(seat) => seat.peer.name(),
            None => format!("{} {rank}", self.options.noun),
        }
    }

    fn missing(&self) -> String {
        let missing = (0..self.seats.len()).filter(|rank| self.seats[*rank].is_none());
        let missing: Vec<String> = missing.map(|rank| self.name(rank)).collect();
        format!("{} of {}", missing.join(", "), self.seats.len())
    }

    fn present(&self) -> String {
        let present: Vec<String> = (0..self.seats.len())
            .filter(|rank| self.seats[*rank].is_some())
            .map(|rank| self.name(rank))
            .collect();
        if present.is_empty() {
            return "none".into();
        }
        present.join(", ")
    }

    fn refusal(&self, peer: &Peer) -> Option<String> {
        let count = self.options.processes;
        if peer.processes != count {
            return Some(format!(
                "it was started as one of {} {}s and the first one as one of {count}",
                peer.processes, self.options.noun
            ));
        }
        let Some(seat) = self.seats.get(peer.rank) else {
            return Some(format!("it is number {} of {count}", peer.rank));
        };
        if peer.id != self.options.id {
            let named = |id: &Option<String>| id.clone().unwrap_or_else(|| "none".into());
            return Some(format!(
                "it belongs to another start of the launcher (`{}`, here `{}`)",
                named(&peer.id),
                named(&self.options.id)
            ));
        }
        seat.as_ref().map(|seat| {
            format!(
                "{} is here already; two of them have the number {}",
                seat.peer.name(),
                peer.rank
            )
        })
    }

    fn take_in(&mut self, mut peer: Peer, stream: TcpStream) {
        peer.noun = self.options.noun.into();
        if let Some(reason) = self.refusal(&peer) {
            (self.options.tell)(&format!("note: {} is refused: {reason}", peer.name()));
            let _ = write_frame(&mut &stream, &Frame::new(Kind::Refusal, reason));
            let _ = stream.shutdown(Shutdown::Write);
            return;
        }
        let rank = peer.rank;
        let Ok(out) = serve(&stream, rank, self.options.silence, self.events.clone()) else {
            return;
        };
        self.seats[rank] = Some(Seat {
            peer,
            out,
            stream,
            done: false,
            is_open: true,
        });
        if self.seats.iter().all(Option::is_some) {
            let peers: Vec<&Peer> = self.seats.iter().flatten().map(|seat| &seat.peer).collect();
            let body = serde_json::to_vec(&peers).unwrap_or_default();
            self.round.parts = vec![None; self.seats.len()];
            self.broadcast(&Frame::new(Kind::Welcome, body));
        }
    }

    fn broadcast(&self, frame: &Frame) {
        for seat in self.seats.iter().flatten() {
            let _ = seat.out.send(frame.clone());
        }
    }

    fn send(&self, rank: usize, frame: Frame) {
        if let Some(seat) = &self.seats[rank] {
            let _ = seat.out.send(frame);
        }
    }

    /// Serves a message; whether all are done, or why the work of all ends.
    fn answer(&mut self, rank: usize, frame: Frame) -> Result<bool, String> {
        match frame.kind {
            Kind::Beat => {}
            Kind::Say => self.say(rank, &frame)?,
            Kind::Take => {
                let body = Writer::default().number(self.taken).0;
                self.taken += 1;
                self.send(rank, Frame::new(Kind::Taken, body));
            }
            Kind::Post => {
                let body = Writer::default().number(rank as u64).bytes(&frame.body).0;
                self.send(0, Frame::new(Kind::Post, body));
            }
            Kind::End => return Err(format!("{} failed: {}", self.name(rank), frame.text())),
            Kind::Done => {
                if let Some(seat) = &mut self.seats[rank] {
                    seat.done = true;
                }
                return Ok(self.seats.iter().flatten().all(|seat| seat.done));
            }
            _ => {
                return Err(format!(
                    "{} sent a message that is not its to send",
                    self.name(rank)
                ));
            }
        }
        Ok(false)
    }

    fn say(&mut self, rank: usize, frame: &Frame) -> Result<(), String> {
        let mut body = Reader(&frame.body);
        let parts = (body.number(), body.bytes(), body.bytes());
        let (Some(number), Some(what), Some(payload)) = parts else {
            return Err(format!(
                "{} sent a message that is damaged",
                self.name(rank)
            ));
        };
        let what = String::from_utf8_lossy(what).into_owned();
        match &self.round.what {
            None => self.round.what = Some((what.clone(), rank, Instant::now())),
            Some((first, by, _)) if *first != what => {
                return Err(format!(
                    "{} is at {what} while {} is at {first}: they do not do the same",
                    self.name(rank),
                    self.name(*by)
                ));
            }
            _ => {}
        }
        if number != self.round.number || self.round.parts[rank].is_some() {
            return Err(format!(
                "{} is at decision {number} while the others are at {}",
                self.name(rank),
                self.round.number
            ));
        }
        self.round.parts[rank] = Some(payload.to_vec());
        if self.round.parts.iter().all(Option::is_some) {
            let mut all = Writer::default().number(number);
            for part in self.round.parts.iter_mut() {
                all = all.bytes(&part.take().unwrap_or_default());
            }
            self.round.what = None;
            self.round.number += 1;
            self.broadcast(&Frame::new(Kind::All, all.0));
        }
        Ok(())
    }
}

/// Threads that read and write for one process; the writer beats where there is nothing else to send.
fn serve(
    stream: &TcpStream,
    rank: usize,
    silence: Duration,
    events: Sender<Event>,
) -> std::io::Result<Sender<Frame>> {
    stream.set_read_timeout(Some(silence))?;
    stream.set_write_timeout(Some(silence))?;
    let (mut reading, writing) = (stream.try_clone()?, stream.try_clone()?);
    thread::spawn(move || {
        let why = loop {
            match read_frame(&mut reading) {
                Ok(frame) => {
                    if events.send(Event::Frame(rank, frame)).is_err() {
                        return;
                    }
                }
                Err(error) => break lost(&error, silence),
            }
        };
        let _ = events.send(Event::Lost(rank, why));
    });
    Ok(write_and_beat(writing, silence))
}

/// A thread that writes what it is sent, and a beat where that is nothing for a while.
pub(super) fn write_and_beat(stream: TcpStream, silence: Duration) -> Sender<Frame> {
    let (out, frames) = channel::<Frame>();
    let beat = (silence / 5).min(Duration::from_secs(5));
    thread::spawn(move || {
        let mut stream = stream;
        loop {
            let frame = match frames.recv_timeout(beat) {
                Ok(frame) => frame,
                Err(RecvTimeoutError::Timeout) => Frame::new(Kind::Beat, []),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let is_last = frame.kind == Kind::End || frame.kind == Kind::Done;
            if write_frame(&mut stream, &frame).is_err() || is_last {
                break;
            }
        }
        // What was sent still arrives; the other side sees that no more comes.
        let _ = stream.shutdown(Shutdown::Write);
    });
    out
}

/// Why a process is gone, in words.
pub(super) fn lost(error: &std::io::Error, silence: Duration) -> String {
    match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            format!("has been silent for {} s", silence.as_secs_f64())
        }
        std::io::ErrorKind::UnexpectedEof
        | std::io::ErrorKind::ConnectionReset
        | std::io::ErrorKind::ConnectionAborted
        | std::io::ErrorKind::BrokenPipe => "left".into(),
        _ => format!("is lost ({error})"),
    }
}
