//! Sums over processes through sockets, in one order: that of the processes and of the parts of each.
//!
//! The sum so far travels from the first process to the last, each adding its own parts to it one by one, and the
//! result travels back. Both go in pieces, so that all connections work at once and each carries every number
//! twice, as in a ring; unlike there, every number is added up in the order in which a single process
//! would add it, which makes the bits of the result the same.

use std::{
    io::{self, BufReader, BufWriter, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Mutex, PoisonError, mpsc::channel},
    thread,
    time::{Duration, Instant},
};

use super::{
    Cluster, ClusterError, Key,
    pending::Pending,
    wire::{By, GREETING, admit, introduce, reason},
};

/// Numbers of a piece.
const PIECE: usize = 1 << 16;
/// What a connection of this kind proves the key for.
const PURPOSE: &[u8] = b"sums";

// Numbers go over the wire as they are in memory.
const _: () = assert!(cfg!(target_endian = "little"));

/// A part of a sum: a row of numbers for each place, or nothing there.
pub type Part = Vec<Option<Vec<f32>>>;

/// Connections to the process before and the one after.
pub struct Chain {
    before: Option<TcpStream>,
    after: Option<TcpStream>,
    /// One sum at a time.
    turn: Mutex<()>,
}

impl Chain {
    /// Connects each process with the next; all call it together.
    ///
    /// # Errors
    /// [`ClusterError`] with the name of the process that cannot be reached.
    pub fn open(cluster: &Cluster) -> Result<Self, ClusterError> {
        let (rank, count) = (cluster.rank(), cluster.processes());
        let listener = match rank + 1 < count {
            true => Some(
                TcpListener::bind((cluster.own_address(), 0)).map_err(|error| {
                    ClusterError::Bind {
                        address: cluster.own_address().to_string(),
                        reason: error.to_string(),
                    }
                })?,
            ),
            false => None,
        };
        let mut address = listener
            .as_ref()
            .and_then(|listener| listener.local_addr().ok());
        if let Some(address) = address.as_mut().filter(|one| one.ip().is_unspecified()) {
            // Listening everywhere is no address to give to others.
            let reached = cluster.own_address();
            if !reached.is_unspecified() {
                address.set_ip(reached);
            }
        }
        let text = address.map_or_else(String::new, |address| address.to_string());
        let addresses = cluster.gather("connecting with neighbours", text.as_bytes())?;
        let patience = cluster.patience();
        let (before, after) = thread::scope(|scope| {
            let after = listener.map(|listener| {
                scope.spawn(move || accept(listener, cluster.key(), rank + 1, patience))
            });
            let before = match rank {
                0 => Ok(None),
                rank => connect(&addresses[rank - 1], cluster.key(), rank, patience)
                    .map(Some)
                    .map_err(|why| (rank - 1, why)),
            };
            let after = match after.map(thread::ScopedJoinHandle::join) {
                None => Ok(None),
                Some(Ok(Ok(stream))) => Ok(Some(stream)),
                Some(Ok(Err(why))) => Err((rank + 1, why)),
                Some(Err(_)) => Err((rank + 1, "the thread that listens failed".into())),
            };
            (before, after)
        });
        let broken = |(other, why): (usize, String)| {
            let reason = format!(
                "{} and {} cannot connect for sums: {why}; may they reach each other on ports that the system chooses?",
                cluster.name(rank),
                cluster.name(other)
            );
            cluster.fail(&reason);
            ClusterError::Ended(reason)
        };
        let this = Self {
            before: before.map_err(broken)?,
            after: after.map_err(broken)?,
            turn: Mutex::new(()),
        };
        for stream in this.before.iter().chain(&this.after) {
            let _ = stream.set_read_timeout(Some(patience));
            let _ = stream.set_write_timeout(Some(patience));
            // A wait for a process that is gone ends with the work of all.
            if let Ok(stream) = stream.try_clone() {
                cluster.on_end(move |_| {
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        }
        Ok(this)
    }

    /// Adds up the parts of all processes: `own` are those of this one in their order, each with a row for each
    /// of `lengths` or none. A place that no part has has no sum.
    ///
    /// # Errors
    /// [`ClusterError::Ended`] with the process that is the reason.
    ///
    /// # Panics
    /// If a row has another length.
    pub fn sum(
        &self,
        cluster: &Cluster,
        lengths: &[usize],
        own: &[Part],
    ) -> Result<Part, ClusterError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        for part in own {
            assert_eq!(part.len(), lengths.len(), "places of a part");
            for (row, length) in part.iter().zip(lengths) {
                assert!(row.as_ref().is_none_or(|row| row.len() == *length));
            }
        }
        self.exchange(lengths, own).map_err(|error| {
            cluster.verdict(format!(
                "{} lost a neighbour while gradients were added up: {}",
                cluster.name(cluster.rank()),
                reason(&error)
            ))
        })
    }

    fn exchange(&self, lengths: &[usize], own: &[Part]) -> io::Result<Part> {
        let Some(after) = &self.after else {
            let mut sums: Part = vec![None; lengths.len()];
            let back = self.before.as_ref().map(BufWriter::new);
            self.forward(lengths, own, back, Some(&mut sums))?;
            return Ok(sums);
        };
        thread::scope(|scope| {
            let back = scope.spawn(|| self.backward(after, lengths));
            let sent = self.forward(lengths, own, Some(BufWriter::new(after)), None);
            if sent.is_err() {
                // The other direction would wait for what does not come.
                let _ = after.shutdown(Shutdown::Both);
            }
            let sums = back
                .join()
                .map_err(|_| io::Error::other("the thread that receives failed"))?;
            sent?;
            sums
        })
    }

    /// Reads the sum so far, adds this process's parts and passes it on; the last process keeps it.
    fn forward(
        &self,
        lengths: &[usize],
        own: &[Part],
        out: Option<BufWriter<&TcpStream>>,
        mut keep: Option<&mut Part>,
    ) -> io::Result<()> {
        let mut out = out;
        let mut input = self
            .before
            .as_ref()
            .map(|stream| BufReader::with_capacity(4 * PIECE, stream));
        let mut there = vec![0u8; lengths.len()];
        if let Some(input) = &mut input {
            input.read_exact(&mut there)?;
        }
        let known = there.clone();
        for (place, there) in there.iter_mut().enumerate() {
            *there |= u8::from(own.iter().any(|part| part[place].is_some()));
        }
        if let Some(out) = &mut out {
            out.write_all(&there)?;
        }
        let mut piece = vec![0f32; PIECE];
        for (place, length) in lengths.iter().copied().enumerate() {
            if there[place] == 0 {
                continue;
            }
            let mut kept = keep.is_some().then(|| Vec::with_capacity(length));
            for from in (0..length).step_by(PIECE) {
                let piece = &mut piece[..(length - from).min(PIECE)];
                let mut is_begun = known[place] != 0;
                if let Some(input) = input.as_mut().filter(|_| is_begun) {
                    input.read_exact(bytemuck::cast_slice_mut(piece))?;
                }
                for row in own.iter().filter_map(|part| part[place].as_ref()) {
                    let row = &row[from..from + piece.len()];
                    if is_begun {
                        piece.iter_mut().zip(row).for_each(|(sum, new)| *sum += new);
                    } else {
                        piece.copy_from_slice(row);
                        is_begun = true;
                    }
                }
                if let Some(out) = &mut out {
                    out.write_all(bytemuck::cast_slice(piece))?;
                }
                if let Some(kept) = &mut kept {
                    kept.extend_from_slice(piece);
                }
            }
            if let Some(keep) = &mut keep {
                keep[place] = kept;
            }
        }
        if let Some(out) = &mut out {
            out.flush()?;
        }
        Ok(())
    }

    /// Reads the sums and passes them on to the process before.
    fn backward(&self, after: &TcpStream, lengths: &[usize]) -> io::Result<Part> {
        let mut input = BufReader::with_capacity(4 * PIECE, after);
        let mut out = self.before.as_ref().map(BufWriter::new);
        let mut there = vec![0u8; lengths.len()];
        input.read_exact(&mut there)?;
        if let Some(out) = &mut out {
            out.write_all(&there)?;
        }
        let mut sums: Part = vec![None; lengths.len()];
        for (place, length) in lengths.iter().copied().enumerate() {
            if there[place] == 0 {
                continue;
            }
            let mut row = vec![0f32; length];
            for piece in row.chunks_mut(PIECE) {
                input.read_exact(bytemuck::cast_slice_mut(piece))?;
                if let Some(out) = &mut out {
                    out.write_all(bytemuck::cast_slice(piece))?;
                }
            }
            sums[place] = Some(row);
        }
        if let Some(out) = &mut out {
            out.flush()?;
        }
        Ok(sums)
    }
}

/// Waits for the process with a number; others are turned away.
fn accept(
    listener: TcpListener,
    key: &Key,
    wanted: usize,
    patience: Duration,
) -> Result<TcpStream, String> {
    let deadline = Instant::now() + patience;
    let (found, finds) = channel();
    listener
        .set_nonblocking(true)
        .map_err(|error| error.to_string())?;
    let pending = Pending::default();
    loop {
        if let Ok(stream) = finds.try_recv() {
            return Ok(stream);
        }
        match listener.accept() {
            Ok((stream, _)) => {
                let (found, key, pending) = (found.clone(), key.clone(), pending.clone());
                thread::spawn(move || {
                    let number = pending.add(&stream);
                    if stream.set_nonblocking(false).is_ok()
                        && admit(&stream, &key, PURPOSE).is_ok()
                        && read_number(&stream).ok() == Some(wanted as u64)
                    {
                        let _ = found.send(stream);
                    } else {
                        let _ = stream.shutdown(Shutdown::Both);
                    }
                    pending.remove(number);
                });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return Err(format!("nobody came within {} s", patience.as_secs_f64()));
                }
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

fn read_number(stream: &TcpStream) -> io::Result<u64> {
    let mut bytes = [0; 8];
    let mut by = By {
        stream,
        deadline: Instant::now() + GREETING,
    };
    by.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn connect(address: &[u8], key: &Key, own: usize, patience: Duration) -> Result<TcpStream, String> {
    let text = String::from_utf8_lossy(address);
    let address: SocketAddr = text
        .parse()
        .map_err(|_| format!("`{text}` is no address"))?;
    let end = Instant::now() + patience;
    loop {
        let attempt = || -> Result<TcpStream, String> {
            let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))
                .map_err(|error| format!("{address}: {}", reason(&error)))?;
            introduce(&stream, key, PURPOSE).map_err(|error| format!("{address}: {error:?}"))?;
            (&stream)
                .write_all(&(own as u64).to_le_bytes())
                .map_err(|error| reason(&error))?;
            Ok(stream)
        };
        match attempt() {
            Ok(stream) => return Ok(stream),
            Err(why) if Instant::now() >= end => return Err(why),
            Err(_) => thread::sleep(Duration::from_millis(200)),
        }
    }
}
