//! What the writer remembers of channels and sessions, so that an append reads nothing from the disk.
//! Everything here can be read again from the store: it is bounded, and forgets what was not used lately.

use std::collections::HashMap;
use std::hash::Hash;

use super::codec::Tail;
use super::store::Store;
use sessiond_domain::{ChannelKey, Closure, Record, Result, SessionId};

/// Entries of each kind that are surely remembered; up to twice as many may be.
const REMEMBERED: usize = 8192;

/// A channel as the next append finds it.
#[derive(Debug, Default)]
pub(super) struct Channel {
    /// Given with the first record.
    pub number: Option<u64>,
    pub tail: Tail,
    /// The channel has a row in `removals`.
    pub removing: bool,
    /// Whether the last record that is no command says that the session is closed; `None` until one is stored.
    pub says_closed: Option<bool>,
    /// Changed by the group that is being built.
    pub touched: bool,
    /// Records of that group for followers; `None` when there were none at its first append.
    pub live: Option<Vec<Record>>,
}

/// Channels and seals in use.
pub(super) struct Memory {
    channels: Recent<ChannelKey, Channel>,
    seals: Recent<SessionId, Option<Closure>>,
    pub next_number: u64,
}

impl Memory {
    pub(super) fn new(next_number: u64) -> Self {
        Self { channels: Recent::new(REMEMBERED), seals: Recent::new(REMEMBERED), next_number }
    }

    pub(super) fn channel(&mut self, store: &Store, key: &ChannelKey) -> Result<&mut Channel> {
        self.channels.get_or_load(key, || {
            Ok(match store.channel(key)? {
                None => Channel::default(),
                Some((number, tail)) => Channel {
                    number: Some(number),
                    removing: tail.earliest > tail.removed,
                    tail,
                    ..Channel::default()
                },
            })
        })
    }

    /// A channel that the group has touched.
    pub(super) fn touched(&mut self, key: &ChannelKey) -> Option<&mut Channel> {
        self.channels.get(key)
    }

    pub(super) fn closure(&mut self, store: &Store, session: &SessionId) -> Result<&mut Option<Closure>> {
        self.seals.get_or_load(session, || store.closure(session))
    }

    /// Forgets what was not used lately. Only between groups: a group's changes live here until it commits.
    pub(super) fn trim(&mut self) {
        self.channels.trim();
        self.seals.trim();
    }
}

/// A map that forgets in two steps: what was not asked for while `limit` others were is dropped.
struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    limit: usize,
}

impl<K: Hash + Eq + Clone, V> Recent<K, V> {
    fn new(limit: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), limit }
    }

    fn get(&mut self, key: &K) -> Option<&mut V> {
        self.young.get_mut(key)
    }

    fn get_or_load(&mut self, key: &K, load: impl FnOnce() -> Result<V>) -> Result<&mut V> {
        if !self.young.contains_key(key) {
            let value = match self.old.remove(key) {
                Some(value) => value,
                None => load()?,
            };
            self.young.insert(key.clone(), value);
        }
        Ok(self.young.get_mut(key).expect("just found or inserted"))
    }

    fn trim(&mut self) {
        if self.young.len() >= self.limit {
            self.old = std::mem::take(&mut self.young);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_rest_is_forgotten() {
        let mut recent = Recent::new(10);
        for round in 0..100 {
            assert_eq!(*recent.get_or_load(&0, || Ok(round)).expect("loads"), 0);
            recent.get_or_load(&(round + 1), || Ok(1)).expect("loads");
            recent.trim();
            assert!(recent.young.len() + recent.old.len() <= 20);
        }
        assert_eq!(*recent.get_or_load(&1, || Ok(7)).expect("loads"), 7);
    }
}
