//! Which part ids a channel holds, derived from its records. Bounded for one channel and for all of them: what was
//! forgotten is read from the log again, so an answer may be slow and is never wrong.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use s2_sdk::types::SequencedRecord;

use super::codec;
use crate::channel::part::{Digest, content_hash, id_hash};
use sessiond_domain::{ChannelKey, Position, SeqNum};

/// Part ids remembered of one channel.
const CHANNEL_PARTS: usize = 1 << 17;
/// Part ids remembered of all channels, at about a hundred bytes each.
const ALL_PARTS: usize = 1 << 20;

/// A record with a part id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Of headers and body.
    pub hash: Digest,
    pub position: Position,
}

/// The part ids of the records in `from..to`.
#[derive(Debug, Default)]
pub(super) struct Index {
    pub from: SeqNum,
    pub to: SeqNum,
    /// It was begun behind the beginning of the channel, for part ids that count only among the last records.
    pub is_window: bool,
    parts: HashMap<Digest, Part>,
}

impl Index {
    pub(super) fn starting(from: SeqNum) -> Self {
        Self { from, to: from, is_window: from > 0, parts: HashMap::new() }
    }

    pub(super) fn find(&self, id: &Digest) -> Option<Part> {
        self.parts.get(id).copied()
    }

    /// Takes in a stored record that follows, but for what retention has removed.
    pub(super) fn see(&mut self, stored: SequencedRecord) {
        if stored.seq_num < self.to {
            return;
        }
        self.to = stored.seq_num + 1;
        if let Some((id, part)) = part_of(stored) {
            self.insert(id, part);
        }
    }

    /// Takes in records of our own, if they follow.
    pub(super) fn stored(
        &mut self,
        start: SeqNum,
        count: usize,
        parts: impl Iterator<Item = (Digest, Part)>,
    ) -> bool {
        if start != self.to {
            return false;
        }
        self.to += count as u64;
        parts.for_each(|(id, part)| self.insert(id, part));
        true
    }

    fn insert(&mut self, id: Digest, part: Part) {
        self.parts.insert(id, part);
        if self.parts.len() > CHANNEL_PARTS {
            self.from += (self.to - self.from) / 2;
            let from = self.from;
            self.parts.retain(|_, part| part.position.seq_num >= from);
        }
    }
}

/// The part id of a stored record, and what it stands for.
pub(super) fn part_of(stored: SequencedRecord) -> Option<(Digest, Part)> {
    if stored.is_command_record() {
        return None;
    }
    let (record, id) = codec::decode(stored);
    let part = Part { hash: content_hash(&record.headers, &record.body), position: record.position };
    Some((id_hash(&id?), part))
}

/// The indexes of the channels that were written with part ids lately.
#[derive(Debug, Default)]
pub(super) struct Indexes(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    channels: HashMap<ChannelKey, Entry>,
    parts: usize,
    uses: u64,
}

#[derive(Debug)]
struct Entry {
    index: Arc<Mutex<Index>>,
    parts: usize,
    used: u64,
}

impl Indexes {
    pub(super) fn get(&self, key: &ChannelKey) -> Option<Arc<Mutex<Index>>> {
        lock(&self.0).channels.get(key).map(|entry| entry.index.clone())
    }

    /// Keeps an index, or counts one that was kept and has grown. May forget those that were not used for longest.
    pub(super) fn keep(&self, key: &ChannelKey, index: &Arc<Mutex<Index>>) {
        let parts = lock(index).parts.len() + 1;
        let mut kept = lock(&self.0);
        kept.uses += 1;
        let entry = Entry { index: index.clone(), parts, used: kept.uses };
        let before = kept.channels.insert(key.clone(), entry).map_or(0, |entry| entry.parts);
        kept.parts = kept.parts + parts - before;
        if kept.parts > ALL_PARTS {
            kept.forget();
        }
    }
}

impl Kept {
    /// Forgets the longest unused until a quarter of the room is free.
    fn forget(&mut self) {
        let mut oldest: Vec<_> =
            self.channels.iter().map(|(key, entry)| (entry.used, entry.parts, key.clone())).collect();
        oldest.sort_unstable_by_key(|(used, ..)| *used);
        for (_, parts, key) in oldest {
            if self.parts <= ALL_PARTS / 4 * 3 {
                return;
            }
            self.channels.remove(&key);
            self.parts -= parts;
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sessiond_domain::{Direction, SessionId, Timestamp};

    fn part(seq_num: u64) -> (Digest, Part) {
        let position = Position { seq_num, timestamp: Timestamp::from_millis(1) };
        (id_hash(&seq_num.to_string()), Part { hash: [0; 16], position })
    }

    fn filled(count: u64) -> Arc<Mutex<Index>> {
        let mut index = Index::starting(0);
        for seq_num in 0..count {
            assert!(index.stored(seq_num, 1, [part(seq_num)].into_iter()));
        }
        Arc::new(Mutex::new(index))
    }

    #[test]
    fn a_channel_past_its_bound_forgets_the_older_half_and_says_so() {
        let index = filled(CHANNEL_PARTS as u64 + 10);
        let index = lock(&index);
        assert!(index.from > 0 && index.parts.len() <= CHANNEL_PARTS);
        assert!(index.find(&part(index.from).0).is_some() && index.find(&part(index.from - 1).0).is_none());
        assert_eq!(index.to, CHANNEL_PARTS as u64 + 10);
    }

    #[test]
    fn records_that_do_not_follow_are_not_taken() {
        let mut index = Index::starting(5);
        assert!(!index.stored(6, 1, [part(6)].into_iter()));
        assert_eq!(index.find(&part(6).0), None);
    }

    #[test]
    fn the_channels_that_were_not_used_for_longest_are_forgotten_first() {
        let indexes = Indexes::default();
        let key = |number: usize| {
            ChannelKey::main(SessionId::from_stored(&format!("session_{number}")), Direction::In)
        };
        let large = filled(CHANNEL_PARTS as u64 - 1);
        (0..8).for_each(|number| indexes.keep(&key(number), &large));
        indexes.keep(&key(0), &large);
        indexes.keep(&key(8), &filled(1));
        assert!(indexes.get(&key(0)).is_some() && indexes.get(&key(8)).is_some());
        assert!(indexes.get(&key(1)).is_none());
    }
}
