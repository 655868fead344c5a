//! A process's side of its connection to the first one.

use std::{
    collections::VecDeque,
    net::{Shutdown, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc::Sender},
    thread,
    time::{Duration, Instant},
};

use super::{
    ClusterError,
    hub::{lost, write_and_beat},
    wire::{Frame, Kind, Reader, Writer, read_frame},
};

/// What is done once the work of all has ended, with the reason.
type Hook = Box<dyn Fn(&str) + Send>;

#[derive(Default)]
struct State {
    all: VecDeque<(u64, Vec<Vec<u8>>)>,
    taken: VecDeque<u64>,
    posts: VecDeque<(usize, Vec<u8>)>,
    ended: Option<String>,
    /// Nothing is expected any more.
    left: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    hooks: Mutex<Vec<Hook>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, reason: String) {
        {
            let mut state = self.lock();
            if state.ended.is_some() || state.left {
                return;
            }
            state.ended = Some(reason.clone());
        }
        self.changed.notify_all();
        let hooks = self.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        hooks.iter().for_each(|hook| hook(&reason));
    }
}

/// A process that was taken in.
pub(super) struct Member {
    shared: Arc<Shared>,
    out: Mutex<Sender<Frame>>,
    stream: TcpStream,
    /// The next decision.
    round: Mutex<u64>,
    patience: Duration,
    silence: Duration,
}

impl Member {
    /// Serves a connection that was welcomed; `first` is the name of the first process.
    pub(super) fn start(
        stream: TcpStream,
        first: String,
        patience: Duration,
        silence: Duration,
    ) -> std::io::Result<Self> {
        stream.set_read_timeout(Some(silence))?;
        stream.set_write_timeout(Some(silence))?;
        let shared: Arc<Shared> = Arc::default();
        let (mut reading, writing) = (stream.try_clone()?, stream.try_clone()?);
        let reader = shared.clone();
        thread::spawn(move || {
            loop {
                match read_frame(&mut reading) {
                    Ok(frame) if frame.kind == Kind::End => {
                        reader.end(frame.text());
                        // The first process waits for this before it leaves.
                        let _ = reading.shutdown(Shutdown::Both);
                        return;
                    }
                    Ok(frame) => reader.note(&frame),
                    Err(error) => {
                        reader.end(format!("{first} {}", lost(&error, silence)));
                        return;
                    }
                }
            }
        });
        Ok(Self {
            shared,
            out: Mutex::new(write_and_beat(writing, silence)),
            stream,
            round: Mutex::new(0),
            patience,
            silence,
        })
    }

    fn send(&self, frame: Frame) {
        let out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // A writer that is gone has lost the connection, which the reader says.
        let _ = out.send(frame);
    }

    /// Waits for something, or for the end of the work.
    fn wait<T>(
        &self,
        what: &str,
        mut look: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, ClusterError> {
        // The first process's own clock runs out before.
        let end = Instant::now() + self.patience + 2 * self.silence;
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = look(&mut state) {
                return Ok(found);
            }
            if let Some(reason) = &state.ended {
                return Err(ClusterError::Ended(reason.clone()));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClusterError::Ended(format!(
                    "nothing came of {what} within {} s",
                    self.patience.as_secs_f64()
                )));
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The parts of all processes, in their order. All call it with the same `what`.
    pub(super) fn gather(&self, what: &str, part: &[u8]) -> Result<Vec<Vec<u8>>, ClusterError> {
        let mut round = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        let number = *round;
        *round += 1;
        let body = Writer::default()
            .number(number)
            .bytes(what.as_bytes())
            .bytes(part);
        self.send(Frame::new(Kind::Say, body.0));
        self.wait(what, |state| {
            let place = state.all.iter().position(|(known, _)| *known == number)?;
            state.all.remove(place).map(|(_, parts)| parts)
        })
    }

    /// The number of the next job, from 0, that no other call of any process gets.
    pub(super) fn take(&self) -> Result<u64, ClusterError> {
        self.send(Frame::new(Kind::Take, []));
        self.wait("asking for the next job", |state| state.taken.pop_front())
    }

    /// Sends something to the first process.
    pub(super) fn post(&self, body: Vec<u8>) {
        self.send(Frame::new(Kind::Post, body));
    }

    /// Something that was sent to the first process, with the sender; `None` after `patience` without any.
    pub(super) fn next_post(
        &self,
        patience: Duration,
    ) -> Result<Option<(usize, Vec<u8>)>, ClusterError> {
        let end = Instant::now() + patience;
        let mut state = self.shared.lock();
        loop {
            if let Some(post) = state.posts.pop_front() {
                return Ok(Some(post));
            }
            if let Some(reason) = &state.ended {
                return Err(ClusterError::Ended(reason.clone()));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Why the work of all has ended; waits for the word so long.
    pub(super) fn verdict(&self, patience: Duration) -> Option<String> {
        let end = Instant::now() + patience;
        let mut state = self.shared.lock();
        loop {
            if state.ended.is_some() {
                return state.ended.clone();
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Calls `hook` once the work of all has ended before its time, at once if it has.
    pub(super) fn on_end(&self, hook: Hook) {
        let mut hooks = self
            .shared
            .hooks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let ended = self.shared.lock().ended.clone();
        match ended {
            Some(reason) => hook(&reason),
            None => hooks.push(hook),
        }
    }

    /// Ends the work of all, and waits until that is known.
    pub(super) fn fail(&self, reason: &str) {
        {
            let state = self.shared.lock();
            if state.ended.is_some() || state.left {
                return;
            }
        }
        self.send(Frame::new(Kind::End, reason));
        self.verdict(Duration::from_secs(3));
    }

    /// Leaves; whatever happens to the others is no error any more.
    pub(super) fn leave(&self) {
        self.shared.lock().left = true;
        self.send(Frame::new(Kind::Done, []));
    }
}

impl Shared {
    fn note(&self, frame: &Frame) {
        let mut body = Reader(&frame.body);
        {
            let mut state = self.lock();
            match frame.kind {
                Kind::All => {
                    let Some(number) = body.number() else { return };
                    let mut parts = Vec::new();
                    while let Some(part) = body.bytes() {
                        parts.push(part.to_vec());
                    }
                    state.all.push_back((number, parts));
                }
                Kind::Taken => state.taken.extend(body.number()),
                Kind::Post => {
                    if let (Some(rank), Some(bytes)) = (body.number(), body.bytes()) {
                        state.posts.push_back((rank as usize, bytes.to_vec()));
                    }
                }
                _ => {}
            }
        }
        self.changed.notify_all();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let is_over = {
            let state = self.shared.lock();
            state.left || state.ended.is_some()
        };
        if !is_over {
            self.fail("it ended without a word");
        }
        self.shared.lock().left = true;
        if is_over {
            // The last word is on its way: the writer closes its side after it.
            let _ = self.stream.set_write_timeout(Some(Duration::from_secs(1)));
        } else {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }
}
