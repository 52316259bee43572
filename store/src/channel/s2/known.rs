//! What this replica knows of a channel: what its records say up to a place. All of it can be read again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quick_cache::sync::Cache;
use s2_sdk::types::SequencedRecord;

use super::codec;
use sessiond_domain::record::{Bounds, Command, Position};
use sessiond_domain::{ChannelKey, SeqNum};

/// Channels that are remembered.
const REMEMBERED: usize = 16_384;

/// The records of a channel up to [`Known::tail`], folded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    /// Everything before was seen; the channel's end if it is sealed.
    pub tail: Position,
    /// No record before may be shown.
    pub earliest: SeqNum,
    /// The stream carries the seal, at `tail`.
    pub sealed: bool,
}

impl Known {
    pub(super) fn bounds(&self) -> Bounds {
        Bounds { earliest: self.earliest, tail: self.tail }
    }

    /// As [`Known::see`], for all the records that remain behind the tail: a gap between them holds nothing any more.
    pub(super) fn see_remaining(&mut self, records: &[SequencedRecord]) {
        for record in records {
            if !self.sealed {
                self.tail.seq_num = self.tail.seq_num.max(record.seq_num);
            }
            self.see(std::slice::from_ref(record));
        }
    }

    /// Takes in consecutive records. What is known already changes nothing; behind a gap only a trim counts.
    pub(super) fn see(&mut self, records: &[SequencedRecord]) {
        for record in records {
            if codec::is_seal(record) {
                if record.seq_num == self.tail.seq_num {
                    self.sealed = true;
                }
                return;
            }
            self.saw(record.seq_num, codec::timestamp(record.timestamp), codec::command(record).as_ref());
        }
    }

    /// Takes in one record.
    pub(super) fn saw(
        &mut self,
        seq_num: SeqNum,
        timestamp: sessiond_domain::Timestamp,
        command: Option<&Command>,
    ) {
        if self.sealed {
            return;
        }
        if let Some(Command::Trim(below)) = command {
            self.earliest = self.earliest.max((*below).min(seq_num + 1));
        }
        if seq_num == self.tail.seq_num {
            self.tail = Position { seq_num: seq_num + 1, timestamp };
        }
    }
}

/// Of one channel.
#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<Look>);

#[derive(Debug, Default)]
struct Look {
    /// `None` until the channel was looked at.
    known: Option<Known>,
    /// Trims that were seen, whether or not the channel was looked at. S2 acts on them in its own time.
    trimmed: SeqNum,
}

impl Slot {
    pub(super) fn get(&self) -> Option<Known> {
        let look = self.lock();
        let known = look.known.clone()?;
        Some(Known { earliest: known.earliest.max(look.trimmed).min(known.tail.seq_num), ..known })
    }

    /// Keeps what a look has shown, unless more was learned meanwhile.
    pub(super) fn keep(&self, found: &Known) -> Known {
        let mut look = self.lock();
        let trimmed = look.trimmed;
        let known = look.known.get_or_insert_with(|| found.clone());
        known.earliest = known.earliest.max(found.earliest).max(trimmed);
        if found.tail.seq_num >= known.tail.seq_num && !known.sealed {
            (known.tail, known.sealed) = (found.tail, found.sealed);
        }
        Known { earliest: known.earliest.min(known.tail.seq_num), ..known.clone() }
    }

    /// Changes what is known.
    pub(super) fn update(&self, change: impl FnOnce(&mut Known)) {
        let mut look = self.lock();
        match &mut look.known {
            Some(known) => change(known),
            None => {
                // Of what comes without having been looked for, only trims are of use.
                let mut unknown = Known {
                    tail: Position { seq_num: SeqNum::MAX, ..Position::default() },
                    ..Known::default()
                };
                change(&mut unknown);
                look.trimmed = look.trimmed.max(unknown.earliest);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Look> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The channels that were looked at lately.
#[derive(Debug)]
pub(super) struct Memory(Cache<ChannelKey, Arc<Slot>>);

impl Default for Memory {
    fn default() -> Self {
        Self(Cache::new(REMEMBERED))
    }
}

impl Memory {
    pub(super) fn slot(&self, key: &ChannelKey) -> Arc<Slot> {
        match self.0.get_or_insert_with(key, || Ok::<_, std::convert::Infallible>(Arc::default())) {
            Ok(slot) => slot,
            Err(never) => match never {},
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use s2_sdk::types::Header;

    use super::*;

    fn record(seq_num: u64, command: Option<(&'static str, &[u8])>) -> SequencedRecord {
        let headers = command.iter().map(|(name, _)| Header::new(Bytes::new(), *name)).collect();
        let body = command.map(|(_, body)| Bytes::copy_from_slice(body)).unwrap_or_default();
        SequencedRecord::from_parts(seq_num, 7, headers, body)
    }

    #[test]
    fn trims_raise_the_beginning_and_the_seal_ends_the_channel_where_it_stands() {
        let mut known = Known::default();
        known.see(&[record(0, None), record(1, None), record(2, Some(("trim", &2_u64.to_be_bytes())))]);
        assert_eq!((known.earliest, known.tail.seq_num, known.sealed), (2, 3, false));
        known.see(&[record(1, None), record(3, Some(("trim", &u64::MAX.to_be_bytes())))]);
        assert_eq!((known.earliest, known.tail.seq_num), (4, 4));
        known.see(&[record(4, Some(("fence", codec::SEAL.as_bytes()))), record(5, None)]);
        assert_eq!((known.tail.seq_num, known.sealed), (4, true));
    }

    #[test]
    fn a_gap_moves_nothing_but_the_beginning() {
        let mut known = Known::default();
        known.see(&[record(5, Some(("trim", &3_u64.to_be_bytes())))]);
        assert_eq!((known.earliest, known.tail.seq_num), (3, 0));
    }
}
