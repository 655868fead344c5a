//! Places and memory that requests share: who waits, who is next, and what nobody may take alone.
//!
//! A [`Gate`] has so many places and bytes. A request gets a [`Share`] as soon as there is room for
//! it; the client that holds the fewest places is served first, and among equals who has waited longest.
//! The last part of a gate (`spare_…`) is only for clients that hold little, so that one who takes all
//! that can be had does not keep the others waiting.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// Times that others may overtake a share that does not fit yet.
const MAX_PASSED: u32 = 16;

/// What a gate has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GateLimits {
    /// Places in all.
    pub(super) places: usize,
    /// Places of these for clients that hold fewer than so many.
    pub(super) spare_places: usize,
    /// Bytes in all.
    pub(super) bytes: u64,
    /// Bytes of these for clients that hold less than that.
    pub(super) spare_bytes: u64,
    /// Most that wait, and twice what one client may have waiting.
    pub(super) max_waiting: usize,
}

/// Why a share cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    /// It would not even fit into an empty gate.
    #[error("more is needed than this server ever gives one request")]
    TooLarge,
    /// Too many wait already.
    #[error("too many requests wait already")]
    TooManyWait,
}

/// Places and bytes, taken and given back.
#[derive(Debug)]
pub(super) struct Gate {
    limits: GateLimits,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    places: usize,
    bytes: u64,
}

#[derive(Debug, Default)]
struct State {
    held: Held,
    by_client: HashMap<u64, Held>,
    /// In the order of arrival.
    waiting: Vec<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    client: u64,
    wanted: Held,
    passed: u32,
    reply: oneshot::Sender<Share>,
}

/// Part of a gate; it is given back when this is dropped.
#[derive(Debug)]
pub(super) struct Share {
    gate: Arc<Gate>,
    client: u64,
    held: Held,
}

impl Gate {
    /// A gate with nothing taken.
    pub(super) fn new(limits: GateLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            state: Mutex::default(),
        })
    }

    /// Bytes that are taken.
    pub(super) fn bytes_held(&self) -> u64 {
        self.state().held.bytes
    }

    /// Most bytes that a single share can have.
    pub(super) fn largest(&self) -> u64 {
        let GateLimits {
            bytes, spare_bytes, ..
        } = self.limits;
        (bytes - spare_bytes).max(spare_bytes)
    }

    /// Takes a share for `client`, waiting for room; dropping the future gives up.
    ///
    /// # Errors
    /// [`Full`], at once.
    pub(super) async fn take(
        self: &Arc<Self>,
        client: u64,
        places: usize,
        bytes: u64,
    ) -> Result<Share, Full> {
        if bytes > self.largest() {
            return Err(Full::TooLarge);
        }
        let (reply, granted) = oneshot::channel();
        {
            let mut state = self.state();
            state.waiting.retain(|waiting| !waiting.reply.is_closed());
            let of_client = |waiting: &&Waiting| waiting.client == client;
            let limit = self.limits.max_waiting;
            if state.waiting.len() >= limit
                || state.waiting.iter().filter(of_client).count() >= limit.div_ceil(2)
            {
                return Err(Full::TooManyWait);
            }
            state.waiting.push(Waiting {
                client,
                wanted: Held { places, bytes },
                passed: 0,
                reply,
            });
        }
        self.serve();
        granted.await.map_err(|_| Full::TooManyWait)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives shares to all that fit.
    fn serve(self: &Arc<Self>) {
        loop {
            let next = self.state().next(&self.limits);
            let Some(Waiting {
                client,
                wanted,
                reply,
                ..
            }) = next
            else {
                return;
            };
            // One that nobody waits for any more is given back by being dropped.
            let _ = reply.send(Share {
                gate: self.clone(),
                client,
                held: wanted,
            });
        }
    }

    fn give_back(self: &Arc<Self>, client: u64, back: Held) {
        {
            let mut state = self.state();
            state.held.places -= back.places;
            state.held.bytes -= back.bytes;
            if let Some(held) = state.by_client.get_mut(&client) {
                held.places -= back.places;
                held.bytes -= back.bytes;
                if *held == Held::default() {
                    state.by_client.remove(&client);
                }
            }
        }
        self.serve();
    }
}

impl State {
    /// Takes out the next that fits, and counts it.
    fn next(&mut self, limits: &GateLimits) -> Option<Waiting> {
        self.waiting.retain(|waiting| !waiting.reply.is_closed());
        let mut order: Vec<usize> = (0..self.waiting.len()).collect();
        let of = |client| self.by_client.get(&client).copied().unwrap_or_default();
        // A stable sort: the order of arrival among equals.
        order.sort_by_key(|place| of(self.waiting[*place].client).places);
        let mut passed = Vec::new();
        for place in order {
            let Waiting { client, wanted, .. } = self.waiting[place];
            if self.fits(limits, client, wanted) {
                for place in passed {
                    let overtaken: &mut Waiting = &mut self.waiting[place];
                    overtaken.passed += 1;
                }
                self.held.places += wanted.places;
                self.held.bytes += wanted.bytes;
                let held = self.by_client.entry(client).or_default();
                held.places += wanted.places;
                held.bytes += wanted.bytes;
                return Some(self.waiting.remove(place));
            }
            if self.waiting[place].passed >= MAX_PASSED {
                return None;
            }
            passed.push(place);
        }
        None
    }

    fn fits(&self, limits: &GateLimits, client: u64, wanted: Held) -> bool {
        let own = self.by_client.get(&client).copied().unwrap_or_default();
        let room = |held: u64, own: u64, wanted: u64, all: u64, spare: u64| {
            wanted == 0
                || held + wanted <= all - spare
                || (own + wanted <= spare && held + wanted <= all)
        };
        room(
            self.held.places as u64,
            own.places as u64,
            wanted.places as u64,
            limits.places as u64,
            limits.spare_places as u64,
        ) && room(
            self.held.bytes,
            own.bytes,
            wanted.bytes,
            limits.bytes,
            limits.spare_bytes,
        )
    }
}

impl Share {
    /// Takes more bytes, waiting for room.
    ///
    /// Two that hold a part and wait for the rest may wait for each other: call it with a time limit.
    ///
    /// # Errors
    /// [`Full`], at once.
    pub(super) async fn grow_to(&mut self, bytes: u64) -> Result<(), Full> {
        let more = bytes.saturating_sub(self.held.bytes);
        if more == 0 {
            return Ok(());
        }
        if bytes > self.gate.largest() {
            return Err(Full::TooLarge);
        }
        let gate = self.gate.clone();
        let mut taken = gate.take(self.client, 0, more).await?;
        self.held.bytes += std::mem::take(&mut taken.held.bytes);
        Ok(())
    }

    /// Gives back all but `bytes`.
    pub(super) fn shrink_to(&mut self, bytes: u64) {
        let less = self.held.bytes.saturating_sub(bytes);
        drop(self.split(less));
    }

    /// Gives the places back and keeps the bytes.
    pub(super) fn leave(&mut self) {
        let places = std::mem::take(&mut self.held.places);
        let gate = self.gate.clone();
        gate.give_back(self.client, Held { places, bytes: 0 });
    }

    /// Joins another share of the same client and gate.
    pub(super) fn merge(&mut self, mut other: Self) {
        debug_assert!(Arc::ptr_eq(&self.gate, &other.gate) && self.client == other.client);
        let other = std::mem::take(&mut other.held);
        self.held.places += other.places;
        self.held.bytes += other.bytes;
    }

    /// Makes a share of its own of so many of the bytes.
    pub(super) fn split(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.held.bytes);
        self.held.bytes -= bytes;
        Self {
            gate: self.gate.clone(),
            client: self.client,
            held: Held { places: 0, bytes },
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.held != Held::default() {
            let held = std::mem::take(&mut self.held);
            self.gate.clone().give_back(self.client, held);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn gate() -> Arc<Gate> {
        Gate::new(GateLimits {
            places: 3,
            spare_places: 1,
            bytes: 100,
            spare_bytes: 20,
            max_waiting: 40,
        })
    }

    /// A share that can be had at once.
    fn now(gate: &Arc<Gate>, client: u64, places: usize, bytes: u64) -> Option<Share> {
        gate.take(client, places, bytes).now_or_never()?.ok()
    }

    #[test]
    fn the_last_place_and_the_last_bytes_are_for_those_who_hold_little() {
        let gate = gate();
        let first = now(&gate, 1, 1, 50).unwrap();
        let second = now(&gate, 1, 1, 30).unwrap();
        assert!(now(&gate, 1, 1, 1).is_none());
        assert!(now(&gate, 1, 0, 1).is_none());
        let mut other = now(&gate, 2, 1, 15).unwrap();
        assert!(now(&gate, 2, 1, 1).is_none(), "a second spare place");
        assert!(other.grow_to(20).now_or_never().is_some());
        assert!(other.grow_to(21).now_or_never().is_none());
        assert_eq!(gate.bytes_held(), 100);
        drop((first, second, other));
        assert_eq!(gate.bytes_held(), 0);
        assert!(gate.state().by_client.is_empty());
    }

    #[test]
    fn who_holds_the_fewest_places_is_next() {
        let gate = gate();
        let held = now(&gate, 1, 1, 0).unwrap();
        let also = now(&gate, 1, 1, 0).unwrap();
        let spare = now(&gate, 3, 1, 0).unwrap();
        let mut greedy = Box::pin(gate.take(1, 1, 0));
        assert!(greedy.as_mut().now_or_never().is_none());
        let mut late = Box::pin(gate.take(2, 1, 0));
        assert!(late.as_mut().now_or_never().is_none());
        drop(held);
        assert!(late.as_mut().now_or_never().is_some());
        assert!(greedy.as_mut().now_or_never().is_none());
        drop((also, spare));
        assert!(greedy.now_or_never().is_some());
    }

    #[test]
    fn a_large_share_is_overtaken_a_while_and_then_waits_for_nobody() {
        let gate = gate();
        let mut small = now(&gate, 1, 0, 60).unwrap();
        let mut large = Box::pin(gate.take(2, 0, 80));
        assert!(large.as_mut().now_or_never().is_none());
        for _ in 0..MAX_PASSED {
            assert!(now(&gate, 3, 0, 10).is_some());
        }
        assert!(now(&gate, 3, 0, 10).is_none());
        small.shrink_to(0);
        assert!(large.now_or_never().is_some());
    }

    #[test]
    fn who_gives_up_leaves_nothing_and_what_can_never_fit_is_refused() {
        let gate = gate();
        let all = now(&gate, 1, 0, 80).unwrap();
        {
            let mut waits = Box::pin(gate.take(2, 0, 50));
            assert!(waits.as_mut().now_or_never().is_none());
        }
        drop(all);
        assert_eq!(gate.bytes_held(), 0);
        let refused = gate.take(1, 0, 81).now_or_never().unwrap();
        assert_eq!(refused.unwrap_err(), Full::TooLarge);
        let _all = now(&gate, 1, 0, 80).unwrap();
        let mut waiting: Vec<_> = (0..20).map(|_| Box::pin(gate.take(2, 0, 30))).collect();
        for one in &mut waiting {
            assert!(one.as_mut().now_or_never().is_none());
        }
        let refused = gate.take(2, 0, 30).now_or_never().unwrap();
        assert_eq!(refused.unwrap_err(), Full::TooManyWait);
        assert!(gate.take(3, 0, 30).now_or_never().is_none());
    }
}
