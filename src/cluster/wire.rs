//! What goes over a connection: a greeting in which both sides prove the key, then frames.
//!
//! A frame is its kind (one byte), the length of its body (four bytes, least first) and the body.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use super::key::{Key, Nonce, nonce};

/// Changes with the meaning of what is sent.
pub(super) const PROTOCOL: u16 = 1;
const MAGIC: &[u8; 8] = b"xrayteam";
/// Longest body; parts of files are far smaller.
const MAX_BODY: usize = 256 << 20;
/// Longest body of a process that has not been taken yet.
pub(super) const MAX_HELLO: usize = 64 << 10;
/// How long a greeting may take.
pub(super) const GREETING: Duration = Duration::from_secs(10);

/// What a frame is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Nothing but that the sender lives.
    Beat = 1,
    /// Who connects, in JSON.
    Hello = 2,
    /// All have come: who they are, in JSON.
    Welcome = 3,
    /// A process's part of a decision: round, length of its name, name, payload.
    Say = 4,
    /// All parts: round, then length and bytes of each.
    All = 5,
    /// Asks for the number of the next job.
    Take = 6,
    /// The number.
    Taken = 7,
    /// For the first process; the hub puts the sender's rank before it.
    Post = 8,
    /// The work of all ends: why.
    End = 9,
    /// The sender is done and leaves.
    Done = 10,
    /// A process that connects is not taken: why.
    Refusal = 11,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        use Kind::{All, Beat, Done, End, Hello, Post, Refusal, Say, Take, Taken, Welcome};
        let all = [
            Beat, Hello, Welcome, Say, All, Take, Taken, Post, End, Done, Refusal,
        ];
        all.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) body: Vec<u8>,
}

impl Frame {
    pub(super) fn new(kind: Kind, body: impl Into<Vec<u8>>) -> Self {
        Self {
            kind,
            body: body.into(),
        }
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Writes a frame at once.
pub(super) fn write_frame(out: &mut impl Write, frame: &Frame) -> io::Result<()> {
    let length = u32::try_from(frame.body.len()).ok();
    let length = length
        .filter(|length| *length as usize <= MAX_BODY)
        .ok_or_else(|| bad(format!("{} bytes are too many to send", frame.body.len())))?;
    let mut bytes = Vec::with_capacity(5 + frame.body.len());
    bytes.push(frame.kind as u8);
    bytes.extend(length.to_le_bytes());
    bytes.extend(&frame.body);
    out.write_all(&bytes)?;
    out.flush()
}

/// Reads a frame; each read ends with the stream's own time-out.
pub(super) fn read_frame(from: &mut impl Read) -> io::Result<Frame> {
    read_frame_up_to(from, MAX_BODY)
}

/// Reads a frame with a body of at most `most` bytes.
pub(super) fn read_frame_up_to(from: &mut impl Read, most: usize) -> io::Result<Frame> {
    let mut head = [0u8; 5];
    from.read_exact(&mut head)?;
    let kind = Kind::of(head[0]).ok_or_else(|| bad("this is no message of the protocol"))?;
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > most {
        return Err(bad(format!("a message of {length} bytes is too long")));
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body)?;
    Ok(Frame { kind, body })
}

/// Reads with one deadline for all of it: one byte now and then gains no time.
pub(super) struct By<'a> {
    pub(super) stream: &'a TcpStream,
    pub(super) deadline: Instant,
}

impl Read for By<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}

/// Why a greeting failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Greeting {
    /// The connection: worth another attempt.
    Broken(String),
    /// The other side is another program, another version, or has another key.
    Wrong(String),
}

impl From<io::Error> for Greeting {
    fn from(error: io::Error) -> Self {
        Self::Broken(reason(&error))
    }
}

/// An error of a connection in words.
pub(super) fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the connection was closed".into(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "no answer in time".into(),
        _ => error.to_string(),
    }
}

fn opening(ours: &Nonce) -> [u8; 42] {
    let mut bytes = [0; 42];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..10].copy_from_slice(&PROTOCOL.to_le_bytes());
    bytes[10..].copy_from_slice(ours);
    bytes
}

fn read_opening(from: &mut impl Read) -> Result<Nonce, Greeting> {
    let mut bytes = [0; 42];
    from.read_exact(&mut bytes[..10])?;
    if bytes[..8] != MAGIC[..] {
        return Err(Greeting::Wrong("it is another program".into()));
    }
    let version = u16::from_le_bytes([bytes[8], bytes[9]]);
    if version != PROTOCOL {
        return Err(Greeting::Wrong(format!(
            "it speaks version {version} of the protocol and this program version {PROTOCOL}; run the same program everywhere"
        )));
    }
    from.read_exact(&mut bytes[10..])?;
    let mut theirs = [0; 32];
    theirs.copy_from_slice(&bytes[10..]);
    Ok(theirs)
}

const WRONG_KEY: &str =
    "it has another key; give all processes the same --cluster-key or --cluster-key-file";

/// The side that was connected to: sends its number first, and proves the key after the other has.
///
/// `purpose` keeps a proof for one kind of connection from serving for another.
pub(super) fn admit(stream: &TcpStream, key: &Key, purpose: &[u8]) -> Result<(), Greeting> {
    prepare(stream)?;
    let mut from = By {
        stream,
        deadline: Instant::now() + GREETING,
    };
    let mut out = stream;
    let ours = nonce();
    out.write_all(&opening(&ours))?;
    let theirs = read_opening(&mut from)?;
    let mut proof = [0; 32];
    from.read_exact(&mut proof)?;
    if !key.accepts(&proof, &[b"connects ", purpose].concat(), &ours, &theirs) {
        let _ = out.write_all(&[0; 32]);
        return Err(Greeting::Wrong(WRONG_KEY.into()));
    }
    let role = [b"listens ", purpose].concat();
    out.write_all(&key.proof(&role, &theirs, &ours))?;
    Ok(())
}

/// The side that connects.
pub(super) fn introduce(stream: &TcpStream, key: &Key, purpose: &[u8]) -> Result<(), Greeting> {
    prepare(stream)?;
    let mut from = By {
        stream,
        deadline: Instant::now() + GREETING,
    };
    let mut out = stream;
    let theirs = read_opening(&mut from)?;
    let ours = nonce();
    let role = [b"connects ", purpose].concat();
    let proof = key.proof(&role, &theirs, &ours);
    out.write_all(&[&opening(&ours)[..], &proof[..]].concat())?;
    let mut answer = [0; 32];
    from.read_exact(&mut answer)?;
    let role = [b"listens ", purpose].concat();
    if !key.accepts(&answer, &role, &ours, &theirs) {
        return Err(Greeting::Wrong(WRONG_KEY.into()));
    }
    Ok(())
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(GREETING))
}

/// Numbers and byte strings one after another: what bodies are made of.
#[derive(Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn number(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend((bytes.len() as u64).to_le_bytes());
        self.0.extend(bytes);
        self
    }
}

/// Reads what [`Writer`] wrote; `None` where it ends too early.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn number(&mut self) -> Option<u64> {
        let (head, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*head))
    }

    pub(super) fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.number()?).ok()?;
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were_and_others_are_refused() {
        let frame = Frame::new(Kind::Say, vec![1, 2, 3]);
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &frame).unwrap();
        assert_eq!(read_frame(&mut &bytes[..]).unwrap(), frame);
        for end in 0..bytes.len() {
            assert!(read_frame(&mut &bytes[..end]).is_err());
        }
        assert!(read_frame_up_to(&mut &bytes[..], 2).is_err());
        // A length that nobody could mean takes no memory.
        let huge = [4, 255, 255, 255, 255];
        assert!(read_frame(&mut &huge[..]).is_err());
        assert!(read_frame(&mut &b"GET / HTTP/1.1\r\n"[..]).is_err());
    }

    #[test]
    fn bodies_end_where_they_end() {
        let body = Writer::default().number(7).bytes(b"name").bytes(b"").0;
        let mut read = Reader(&body);
        assert_eq!(read.number(), Some(7));
        assert_eq!(read.bytes(), Some(&b"name"[..]));
        assert_eq!(read.bytes(), Some(&b""[..]));
        assert_eq!(read.bytes(), None);
        let mut short = Reader(&body[..14]);
        assert_eq!((short.number(), short.bytes()), (Some(7), None));
    }
}
