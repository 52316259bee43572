//! How long to wait before trying again.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Pauses that double up to a longest, each with up to as much again at random, so that what broke together does not come
/// back together.
#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    tries: u32,
}

impl Backoff {
    /// The first pause and the longest one are given before jitter.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, tries: 0 }
    }

    /// As if it had been paused so often, but no more than a few times.
    pub fn after(first: Duration, longest: Duration, tries: u32) -> Self {
        Self { first, longest, tries: tries.min(4) }
    }

    /// The next pause.
    pub fn next_pause(&mut self) -> Duration {
        let base = self.first.saturating_mul(1 << self.tries.min(16)).min(self.longest);
        self.tries = self.tries.saturating_add(1);
        let random = RandomState::new().hash_one(self.tries) % 1024;
        base + base.mul_f64(random as f64 / 1024.0)
    }

    /// Waits for the next pause.
    pub async fn pause(&mut self) {
        tokio::time::sleep(self.next_pause()).await;
    }

    /// How often it was paused.
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// It worked: the next pause is the first again.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_longest_and_begin_anew_after_a_success() {
        const FIRST: Duration = Duration::from_millis(50);
        const LONGEST: Duration = Duration::from_secs(5);
        let mut backoff = Backoff::new(FIRST, LONGEST);
        let first = backoff.next_pause();
        assert!((FIRST..2 * FIRST).contains(&first));
        let last = (0..50).map(|_| backoff.next_pause()).last().expect("fifty");
        assert!((LONGEST..2 * LONGEST).contains(&last));
        backoff.reset();
        assert!(backoff.next_pause() < 2 * FIRST);
    }
}
