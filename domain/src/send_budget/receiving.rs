//! What clients send: its room, and how much more a connection may send.

use std::sync::atomic::Ordering;

use tokio::sync::OwnedSemaphorePermit;

use super::{ConnectionBudget, FIRST_BYTES, Kind, Permits, Reservation, UNLIMITED, lock};

impl ConnectionBudget {
    /// Room for so many bytes that are being received, `has` of which have some, if there is any at this moment; otherwise some
    /// is made for the next one. Little comes out of the whole, so that who sends much holds up no other.
    /// Nobody waits: what is not read fills the window that all streams of an HTTP/2 connection share, and those that have
    /// room then never get what is theirs.
    pub fn try_receive(&self, bytes: usize, has: usize) -> Option<Reservation> {
        let process = &self.connection.process;
        let bytes = bytes.min(process.share());
        let large = bytes.saturating_sub(FIRST_BYTES) - has.min(bytes).saturating_sub(FIRST_BYTES);
        let [count, large] =
            [bytes - has.min(bytes), large].map(|count| u32::try_from(count).unwrap_or(u32::MAX));
        let own = self.connection.receives.clone().try_acquire_many_owned(count).ok()?;
        let rest = || {
            let advance = process.try_acquire_advance(large)?;
            Some((advance, process.bytes.take(count)?))
        };
        let Some((advance, shared)) = rest() else {
            process.relieve(Kind::LargeAdvances);
            process.relieve(Kind::Advances);
            process.relieve(Kind::Bytes);
            return None;
        };
        Some(self.lent(Permits { own: Some(own), shared: Some(shared), ..advance }))
    }

    /// A reservation again, of permits whose bytes count as held.
    fn retaken(&self, permits: Permits) -> Reservation {
        let bytes = permits.shared.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        Reservation { connection: self.connection.clone(), bytes, permits }
    }

    /// So many bytes were received.
    pub fn received(&self, bytes: usize) {
        let connection = &self.connection;
        connection.received.fetch_add(bytes as u64, Ordering::Relaxed);
        connection.may_have_moved();
    }

    /// The client may send so many bytes more, and up to `large` in room that is taken once they are not enough. Said again
    /// for every message where a library collects messages before we see any of them.
    pub fn allow(&self, bytes: usize, large: usize) {
        let before = std::mem::replace(&mut *lock(&self.connection.large), (large, Permits::default()));
        // What it holds counts as held until here.
        drop(self.retaken(before.1));
        self.connection.may_send.store(bytes as u64, Ordering::Relaxed);
    }

    /// Whether the client has sent more than it may.
    pub fn is_spent(&self) -> bool {
        self.connection.may_send.load(Ordering::Relaxed) == 0
    }

    /// The client has sent so many bytes. False if it may not, which it may not do again.
    pub fn spend(&self, bytes: usize) -> bool {
        let may_send = &self.connection.may_send;
        let left = may_send.load(Ordering::Relaxed);
        if left == UNLIMITED {
            return true;
        }
        let left = left.checked_sub(bytes as u64).or_else(|| self.begin_large(bytes));
        may_send.store(left.unwrap_or(0), Ordering::Relaxed);
        self.received(bytes);
        left.is_some()
    }

    /// So many of the bytes that the client has sent were none of its message.
    pub fn give_back(&self, bytes: usize) {
        let more = |left: u64| (left != UNLIMITED && left > 0).then(|| left.saturating_add(bytes as u64));
        // Nothing to give back where there is no limit, or where it is reached.
        let _ = self.connection.may_send.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// What may be sent after `bytes` of a large message, if there is room for one.
    fn begin_large(&self, bytes: usize) -> Option<u64> {
        let mut large = lock(&self.connection.large);
        let size = std::mem::take(&mut large.0);
        let left = size.checked_sub(bytes)?;
        large.1 = self.try_receive(size, 0)?.into_permits();
        Some(left as u64)
    }

    /// Keeps the room of what was received until the request is answered.
    pub fn keep(&self, room: Reservation) {
        lock(&self.request.received).push(room);
    }

    /// The request is answered.
    pub fn answered(&self) {
        lock(&self.request.received).clear();
    }
}
