//! Room that is held, and bytes that hold it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use super::{COPIES, Kind, Permits, Reservation};

impl Reservation {
    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Gives back what is over `bytes`.
    pub fn shrink(&mut self, bytes: usize) {
        let bytes = bytes.min(self.bytes);
        self.connection.held.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        self.bytes = bytes;
        self.connection.discount_advances(&self.permits);
        let Permits { own, advance, large_advance, shared } = &mut self.permits;
        for permit in [own, advance, large_advance, shared].into_iter().flatten() {
            drop(permit.split(permit.num_permits().saturating_sub(bytes)));
        }
        self.connection.count_advances(&self.permits);
    }

    /// The permits of what was received, which count as held until somebody takes that back.
    pub(super) fn into_permits(mut self) -> Permits {
        self.bytes = 0;
        std::mem::take(&mut self.permits)
    }

    /// Room for what the server works on: nothing waits for the client until it [grows](Self::grow).
    #[must_use]
    pub fn at_work(mut self) -> Self {
        self.connection.held.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = 0;
        self
    }

    /// Waits until it is room for an answer of so many bytes. Of what the connection may have it takes what is free, and waits
    /// for nothing: others of the same connection, which have answers too, may wait likewise.
    pub async fn grow(&mut self, bytes: usize) {
        let wanted = (COPIES * bytes).min(self.connection.process.share());
        let Some(shared) = &self.permits.shared else { return };
        let more = wanted.saturating_sub(shared.num_permits());
        if more > 0 {
            let free = more.min(self.connection.bytes.available_permits());
            let free = u32::try_from(free).unwrap_or(u32::MAX);
            let own = self.connection.bytes.clone().try_acquire_many_owned(free).ok();
            let more = u32::try_from(more).unwrap_or(u32::MAX);
            let process = &self.connection.process;
            let beyond = more - own.as_ref().map_or(0, |_| free);
            let advance = process.acquire_advance(process.advance(beyond)).await;
            let shared = process.acquire(Kind::Bytes, more).await;
            self.absorb(Permits { own, shared, ..advance });
        }
        self.count();
    }

    /// Adds the room of another one of the same connection.
    pub fn merge(&mut self, mut other: Self) {
        self.absorb(other.take_permits());
        self.count();
    }

    fn take_permits(&mut self) -> Permits {
        self.connection.held.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
        let permits = std::mem::take(&mut self.permits);
        self.connection.discount_advances(&permits);
        permits
    }

    fn absorb(&mut self, more: Permits) {
        self.connection.count_advances(&more);
        merge(&mut self.permits.own, more.own);
        merge(&mut self.permits.large_advance, more.large_advance);
        merge(&mut self.permits.advance, more.advance);
        merge(&mut self.permits.shared, more.shared);
    }

    /// From now on all of it is held.
    fn count(&mut self) {
        let bytes = self.permits.shared.as_ref().map_or(self.bytes, OwnedSemaphorePermit::num_permits);
        self.connection.hold(bytes.saturating_sub(self.bytes));
        self.bytes = self.bytes.max(bytes);
    }

    /// Room for as many bytes more, as far as there is any: what is written may be longer than what was read.
    fn overdraw(&self, bytes: usize) -> Option<Self> {
        let more = u32::try_from(bytes.saturating_sub(self.bytes)).unwrap_or(u32::MAX);
        let permit =
            (more > 0 && self.permits.own.is_some()).then(|| self.connection.process.bytes.take(more))??;
        let permits = Permits { shared: Some(permit), ..Permits::default() };
        let mut extra = Self { connection: self.connection.clone(), bytes: 0, permits };
        extra.count();
        Some(extra)
    }

    /// Bytes that keep what they need of this room until they are dropped.
    pub fn around(mut self, bytes: Bytes) -> Bytes {
        self.shrink(COPIES * bytes.len());
        let extra = self.overdraw(bytes.len());
        holding(bytes, (self, extra))
    }
}

fn merge(kept: &mut Option<OwnedSemaphorePermit>, more: Option<OwnedSemaphorePermit>) {
    match (kept, more) {
        (Some(kept), Some(more)) => kept.merge(more),
        (kept, more @ Some(_)) => *kept = more,
        (_, None) => {}
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        drop(self.take_permits());
    }
}

impl Permits {
    /// Bytes of advances, small and large ones.
    pub(super) fn advanced(&self) -> (usize, usize) {
        let count = |permit: &Option<OwnedSemaphorePermit>| {
            permit.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
        };
        (count(&self.advance), count(&self.large_advance))
    }
}

/// Bytes that keep room which others may keep too.
pub fn holding_room(bytes: Bytes, room: Arc<Reservation>) -> Bytes {
    let extra = room.overdraw(bytes.len());
    holding(bytes, (room, extra))
}

/// Bytes that keep something until the last of them is dropped.
pub fn holding<T: Send + 'static>(bytes: Bytes, kept: T) -> Bytes {
    struct Holding<T>(Bytes, #[allow(dead_code, reason = "kept until it is dropped")] T);
    impl<T> AsRef<[u8]> for Holding<T> {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    Bytes::from_owner(Holding(bytes, kept))
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reservation").field(&self.bytes()).finish()
    }
}
