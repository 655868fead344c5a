//! Connections that have not proved anything yet: so many at most, so that strangers take no memory.

use std::{
    collections::VecDeque,
    net::{Shutdown, TcpStream},
    sync::{Arc, Mutex, PoisonError},
};

/// Most connections that are being greeted at once; for one more, the oldest is closed.
const MOST: usize = 64;

/// The number of the next connection, and those that are being greeted with theirs.
type Greeted = (u64, VecDeque<(u64, TcpStream)>);

#[derive(Clone, Default)]
pub(super) struct Pending(Arc<Mutex<Greeted>>);

impl Pending {
    /// Notes a connection; gives its number.
    pub(super) fn add(&self, stream: &TcpStream) -> Option<u64> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = stream.try_clone().ok()?;
        all.0 += 1;
        let number = all.0;
        all.1.push_back((number, copy));
        if all.1.len() > MOST
            && let Some((_, oldest)) = all.1.pop_front()
        {
            let _ = oldest.shutdown(Shutdown::Both);
        }
        Some(number)
    }

    /// Forgets one that was greeted or turned away.
    pub(super) fn remove(&self, number: Option<u64>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.1.retain(|(known, _)| Some(*known) != number);
    }
}
