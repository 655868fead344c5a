//! How processes come together, and what they then do as one.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use super::{
    ClusterError, Key, Launch,
    hub::{Hub, HubOptions, PURPOSE},
    launch::Address,
    member::Member,
    peer::{Peer, Tell},
    wire::{By, Frame, Greeting, Kind, introduce, read_frame, reason, write_frame},
};

/// Longest silence of a process that lives, however long processes wait for each other.
const LONGEST_SILENCE: Duration = Duration::from_secs(120);
/// How long one attempt to connect may take.
const ATTEMPT: Duration = Duration::from_secs(5);
/// How long a port that an earlier start still holds is waited for.
const RELEASE: Duration = Duration::from_secs(10);

/// What a process brings to the meeting.
pub struct Meeting {
    /// Which process it is.
    pub launch: Launch,
    /// The shared secret.
    pub key: Key,
    /// Address to listen at, without a port; by default the one that the first process is named by, and the one
    /// that this process reaches it from.
    pub bind: Option<String>,
    /// Program and version.
    pub program: String,
    /// Names of its devices.
    pub devices: Vec<String>,
    /// Longest wait for the others, here and later.
    pub patience: Duration,
    /// Prints one line.
    pub tell: Tell,
}

/// A process among those it has met.
pub struct Cluster {
    launch: Launch,
    key: Key,
    peers: Vec<Peer>,
    patience: Duration,
    /// Where this process may be reached by others.
    own: IpAddr,
    last: Mutex<String>,
    // Left before the first process stops to listen.
    member: Member,
    _hub: Option<Hub>,
}

impl Cluster {
    /// Meets the other processes: returns once all are there.
    ///
    /// # Errors
    /// [`ClusterError`]: the port, the first process, the key, or processes that did not come in time.
    pub fn meet(meeting: Meeting) -> Result<Arc<Self>, ClusterError> {
        let Meeting {
            launch,
            key,
            bind,
            program,
            devices,
            patience,
            tell,
        } = meeting;
        let silence = patience.min(LONGEST_SILENCE);
        let deadline = Instant::now() + patience;
        let hub = match launch.rank {
            0 => {
                let options = HubOptions {
                    processes: launch.processes,
                    key: key.clone(),
                    id: launch.id.clone(),
                    noun: launch.noun(),
                    patience,
                    silence,
                    tell: tell.clone(),
                };
                Some(listen(&launch.master, bind.as_deref(), deadline, options)?)
            }
            _ => None,
        };
        let hello = Peer {
            rank: launch.rank,
            processes: launch.processes,
            host: host_name(),
            program,
            devices,
            id: launch.id.clone(),
            noun: launch.noun().into(),
        };
        let target = match &hub {
            // The address that was bound, whatever name stands for it.
            Some(hub) => Target::Bound(reachable(hub.address)),
            None => Target::Named(&launch.master),
        };
        let entry = Entry {
            target,
            key: &key,
            hello: &hello,
            patience,
            deadline,
            tell: &*tell,
        };
        let (stream, peers) = entry.enter()?;
        let own = match &bind {
            Some(bind) => bind.parse().ok(),
            None => None,
        };
        let own = match own.or_else(|| stream.local_addr().ok().map(|address| address.ip())) {
            Some(own) => own,
            None => return Err(ClusterError::Ended("the connection was closed".into())),
        };
        let first = peers[0].name();
        let member = Member::start(stream, first, patience, silence)
            .map_err(|error| ClusterError::Ended(reason(&error)))?;
        let this = Self {
            launch,
            key,
            peers,
            patience,
            own,
            last: Mutex::default(),
            member,
            _hub: hub,
        };
        this.same_program()?;
        Ok(Arc::new(this))
    }

    fn same_program(&self) -> Result<(), ClusterError> {
        let first = &self.peers[0];
        let other = self.peers.iter().find(|peer| peer.program != first.program);
        match other {
            Some(other) => Err(ClusterError::Apart(format!(
                "{} runs {} and {} runs {}; run the same program everywhere",
                other.name(),
                other.program,
                first.name(),
                first.program
            ))),
            None => Ok(()),
        }
    }

    /// Number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.launch.rank
    }

    /// Whether this is the process that writes.
    pub fn is_first(&self) -> bool {
        self.launch.rank == 0
    }

    /// Number of processes.
    pub fn processes(&self) -> usize {
        self.peers.len()
    }

    /// All processes, in order.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// What messages call a process.
    pub fn name(&self, rank: usize) -> String {
        self.peers[rank].name()
    }

    /// Devices of the processes before this one.
    pub fn first_device(&self) -> usize {
        let before = &self.peers[..self.launch.rank];
        before.iter().map(|peer| peer.devices.len().max(1)).sum()
    }

    /// Devices of all processes.
    pub fn devices(&self) -> usize {
        let all = self.peers.iter();
        all.map(|peer| peer.devices.len().max(1)).sum()
    }

    /// Longest wait for the others.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    pub(super) fn own_address(&self) -> IpAddr {
        self.own
    }

    /// The parts of all processes, in their order. All call it with the same `what`, which messages use.
    ///
    /// # Errors
    /// [`ClusterError::Ended`], with the name of the process that is the reason.
    pub fn gather(&self, what: &str, part: &[u8]) -> Result<Vec<Vec<u8>>, ClusterError> {
        self.member
            .gather(what, part)
            .map_err(|error| self.with_last(error))
    }

    /// The number of the next job, from 0, that no other call of any process gets.
    ///
    /// # Errors
    /// [`ClusterError::Ended`].
    pub fn take(&self) -> Result<u64, ClusterError> {
        self.member.take()
    }

    /// Sends something to the first process.
    pub fn post(&self, body: Vec<u8>) {
        self.member.post(body);
    }

    /// What was sent to the first process, with the sender; `None` if nothing came in `patience`.
    ///
    /// # Errors
    /// [`ClusterError::Ended`].
    pub fn next_post(&self, patience: Duration) -> Result<Option<(usize, Vec<u8>)>, ClusterError> {
        self.member.next_post(patience)
    }

    /// Calls `hook` with the reason once the work of all has ended before its time, at once if it has.
    pub fn on_end(&self, hook: impl Fn(&str) + Send + 'static) {
        self.member.on_end(Box::new(hook));
    }

    /// What is to be said with every end: the last thing that was saved.
    pub fn set_last(&self, last: String) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = last;
    }

    /// What [`Cluster::set_last`] was given last.
    pub fn last(&self) -> String {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.clone()
    }

    /// Whether the work of all has ended before its time.
    pub fn is_over(&self) -> bool {
        self.member.verdict(Duration::ZERO).is_some()
    }

    fn with_last(&self, error: ClusterError) -> ClusterError {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            ClusterError::Ended(reason) if !last.is_empty() => {
                ClusterError::Ended(format!("{reason}; {last}"))
            }
            error => error,
        }
    }

    /// The end of the work of all as the first process gives it, in place of what it looked like from here.
    pub fn verdict(&self, otherwise: String) -> ClusterError {
        let reason = self.member.verdict(Duration::from_secs(3));
        self.with_last(ClusterError::Ended(reason.unwrap_or(otherwise)))
    }

    /// Ends the work of all with a reason of this process.
    pub fn fail(&self, reason: &str) {
        self.member.fail(reason);
    }

    /// Leaves once all are done.
    ///
    /// # Errors
    /// [`ClusterError::Ended`]: another process ended before it was done.
    pub fn finish(&self) -> Result<(), ClusterError> {
        self.gather("the end", &[])?;
        self.member.leave();
        Ok(())
    }
}

/// The address to connect to for one that listens everywhere.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

fn resolve(address: &Address) -> Result<Vec<SocketAddr>, String> {
    let found = (address.host.as_str(), address.port).to_socket_addrs();
    match found {
        Ok(found) => {
            let found: Vec<SocketAddr> = found.collect();
            match found.is_empty() {
                true => Err(format!("no address is known for `{}`", address.host)),
                false => Ok(found),
            }
        }
        Err(error) => Err(format!("`{}`: {error}", address.host)),
    }
}

fn listen(
    master: &Address,
    bind: Option<&str>,
    deadline: Instant,
    options: HubOptions,
) -> Result<Hub, ClusterError> {
    let begun = Instant::now();
    let address = Address {
        host: bind.unwrap_or(&master.host).to_string(),
        port: master.port,
    };
    let failed = |reason: String| ClusterError::Bind {
        address: address.to_string(),
        reason,
    };
    loop {
        let (why, is_worth_waiting) = match resolve(&address) {
            Ok(all) => match TcpListener::bind(&all[..]) {
                Ok(listener) => {
                    return Hub::start(listener, options)
                        .map_err(|error| failed(error.to_string()));
                }
                Err(error) => {
                    // An earlier start may still be leaving.
                    let is_taken = error.kind() == io::ErrorKind::AddrInUse;
                    let why = match error.kind() {
                        io::ErrorKind::AddrNotAvailable => {
                            "it is no address of this machine".to_string()
                        }
                        _ => error.to_string(),
                    };
                    (why, is_taken && begun.elapsed() < RELEASE)
                }
            },
            // A name in Kubernetes may take a while to be known.
            Err(why) => (why, true),
        };
        if !is_worth_waiting || Instant::now() >= deadline {
            return Err(failed(why));
        }
        thread::sleep(Duration::from_millis(200));
    }
}

enum Target<'a> {
    Bound(SocketAddr),
    Named(&'a Address),
}

/// A process on its way in.
struct Entry<'a> {
    target: Target<'a>,
    key: &'a Key,
    hello: &'a Peer,
    patience: Duration,
    deadline: Instant,
    tell: &'a (dyn Fn(&str) + Send + Sync),
}

/// Why an attempt to enter failed.
enum Attempt {
    Again(String),
    Never(ClusterError),
}

impl Entry<'_> {
    fn address(&self) -> String {
        match &self.target {
            Target::Bound(address) => address.to_string(),
            Target::Named(address) => address.to_string(),
        }
    }

    fn enter(&self) -> Result<(TcpStream, Vec<Peer>), ClusterError> {
        let mut told = Instant::now();
        loop {
            let why = match self.attempt() {
                Ok(entered) => return Ok(entered),
                Err(Attempt::Never(error)) => return Err(error),
                Err(Attempt::Again(why)) => why,
            };
            let now = Instant::now();
            if now >= self.deadline {
                return Err(ClusterError::Unreachable {
                    address: self.address(),
                    seconds: self.patience.as_secs_f64(),
                    reason: why,
                });
            }
            if now - told > Duration::from_secs(10) {
                told = now;
                (self.tell)(&format!(
                    "waiting for the first process at {}: {why}",
                    self.address()
                ));
            }
            thread::sleep(Duration::from_millis(250));
        }
    }

    fn connect(&self) -> Result<TcpStream, String> {
        let all = match &self.target {
            Target::Bound(address) => vec![*address],
            Target::Named(address) => resolve(address)?,
        };
        let mut why = String::new();
        for address in all {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let left = left.clamp(Duration::from_millis(100), ATTEMPT);
            match TcpStream::connect_timeout(&address, left) {
                Ok(stream) => return Ok(stream),
                Err(error) => why = reason(&error),
            }
        }
        Err(why)
    }

    fn attempt(&self) -> Result<(TcpStream, Vec<Peer>), Attempt> {
        let stream = self.connect().map_err(Attempt::Again)?;
        introduce(&stream, self.key, PURPOSE).map_err(|error| match error {
            Greeting::Broken(why) => Attempt::Again(why),
            // A socket of an earlier process may hold the port for a while.
            Greeting::Wrong(why) if why.starts_with("it is another") => Attempt::Again(why),
            Greeting::Wrong(reason) => Attempt::Never(ClusterError::Refused {
                address: self.address(),
                reason,
            }),
        })?;
        let again = |error: io::Error| Attempt::Again(reason(&error));
        let hello = serde_json::to_vec(self.hello).unwrap_or_default();
        write_frame(&mut &stream, &Frame::new(Kind::Hello, hello)).map_err(again)?;
        // The first process names those that are missing when its own time is up.
        let deadline = self.deadline + Duration::from_secs(2) + self.patience / 4;
        let mut by = By {
            stream: &stream,
            deadline,
        };
        loop {
            let frame = match read_frame(&mut by) {
                Ok(frame) => frame,
                Err(error) if Instant::now() < self.deadline => return Err(again(error)),
                Err(error) => {
                    return Err(Attempt::Never(ClusterError::Unreachable {
                        address: self.address(),
                        seconds: self.patience.as_secs_f64(),
                        reason: reason(&error),
                    }));
                }
            };
            match frame.kind {
                Kind::Welcome => {
                    let peers: Result<Vec<Peer>, _> = serde_json::from_slice(&frame.body);
                    return match peers {
                        Ok(peers) if peers.len() == self.hello.processes => Ok((stream, peers)),
                        _ => Err(Attempt::Never(ClusterError::Ended(
                            "the first process sent a damaged list of processes".into(),
                        ))),
                    };
                }
                Kind::Beat => {}
                Kind::End => return Err(Attempt::Never(ClusterError::Ended(frame.text()))),
                Kind::Refusal => {
                    return Err(Attempt::Never(ClusterError::Refused {
                        address: self.address(),
                        reason: frame.text(),
                    }));
                }
                _ => return Err(Attempt::Again("an unexpected message".into())),
            }
        }
    }
}

/// The machine's name.
fn host_name() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let variable = || {
        ["HOSTNAME", "COMPUTERNAME"]
            .iter()
            .find_map(|name| std::env::var(name).ok())
    };
    let name = kernel.or_else(variable).unwrap_or_default();
    match name.trim() {
        "" => "unnamed".into(),
        name => name.to_string(),
    }
}
