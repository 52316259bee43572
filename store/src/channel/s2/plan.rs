//! What becomes of an append: it is sent, it is answered from what the log holds, or it waits.
//!
//! Part ids are found in the log. To store one only once among all replicas, an append with part ids must land exactly
//! behind the records that were searched; if it does not, what has come in between is searched as well, and so on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use s2_sdk::types::SequencedRecord;

use super::append::{PartId, Request, repeated};
use super::codec;
use super::index::{Index, Part, lock, part_of};
use super::writer::Writer;
use crate::channel::part::Digest;
use sessiond_domain::record::{Command, PartIds, RESEND_WINDOW};
use sessiond_domain::{AppendAck, Error, Position, Result, SeqNum};

/// Where no channel ends: an append that must land here is only judged by S2.
pub(super) const NOWHERE: SeqNum = i64::MAX as SeqNum;

/// See the module.
pub(super) enum Plan {
    /// Send it, to land exactly here if that is given.
    Send { pin: Option<SeqNum> },
    /// It needs nothing more.
    Answer(Result<AppendAck>),
    /// Not before everything in flight has landed.
    Wait,
}

/// What the part ids of a batch say.
enum Verdict {
    New,
    Repeated(Vec<Position>),
    Refused(Error),
    /// These are not remembered; only the log can tell.
    Forgotten(Vec<Digest>),
}

impl Writer {
    /// Decides about the first append in line.
    pub(super) async fn plan(&mut self, request: &Request) -> Plan {
        if let Some(closure) = &self.closed {
            return Plan::Answer(Err(Error::Closed { at: closure.at, reason: closure.reason.clone() }));
        }
        if request.is_cut_off() {
            return Plan::Answer(Err(Error::Conflict("an append before this one was refused".to_owned())));
        }
        if !request.is_named() {
            return Plan::Send { pin: None };
        }
        self.plan_named(request).await.unwrap_or_else(|error| Plan::Answer(Err(error)))
    }

    async fn plan_named(&mut self, request: &Request) -> Result<Plan> {
        // Whether the records up to this very moment were searched, as an answer that stores nothing requires.
        let mut searched = false;
        let mut remembered = HashMap::new();
        loop {
            let flying = request.part_keys().any(|key| self.flying.contains(key));
            let index = self.shared.indexes.get(&self.key).filter(|index| covers(index, request.part_ids));
            let (Some(index), Some(next), false) = (index, self.next, flying) else {
                if !self.is_quiet() {
                    return Ok(Plan::Wait);
                }
                self.search(request.part_ids).await?;
                if let Some(closed) = self.refusal() {
                    return Ok(Plan::Answer(Err(closed)));
                }
                searched = true;
                continue;
            };
            let elsewhere = request.match_seq_num.is_some_and(|expected| expected != next);
            let verdict = judge(&lock(&index), request, next, self.earliest(), &remembered);
            match verdict {
                Verdict::New if !elsewhere => return Ok(Plan::Send { pin: Some(next) }),
                // Whoever expects another tail is told by S2 what is wrong, the fence or the tail.
                Verdict::New if searched => return Ok(Plan::Send { pin: Some(NOWHERE) }),
                Verdict::Forgotten(keys) => {
                    let below = lock(&index).from;
                    self.recall(&keys, below, &mut remembered).await?;
                }
                _ if !searched => self.next = None,
                Verdict::Repeated(places) => {
                    return Ok(Plan::Answer(Ok(repeated(&places, self.searched))));
                }
                Verdict::Refused(error) => return Ok(Plan::Answer(Err(error))),
                Verdict::New => {}
            }
        }
    }

    fn earliest(&self) -> SeqNum {
        self.shared.memory.slot(&self.key).get().map_or(0, |known| known.earliest)
    }

    fn refusal(&self) -> Option<Error> {
        let closure = self.closed.as_ref()?;
        Some(Error::Closed { at: closure.at, reason: closure.reason.clone() })
    }

    /// Takes everything into the index that was stored up to this moment, by whomever.
    async fn search(&mut self, ids: PartIds) -> Result<()> {
        let kept = self.shared.indexes.get(&self.key).filter(|index| covers(index, ids));
        let index = match kept {
            Some(index) => index,
            None => Arc::new(Mutex::new(Index::starting(self.search_from(ids).await?))),
        };
        let (from, mut sealed) = (lock(&index).to, false);
        let slot = self.shared.memory.slot(&self.key);
        let token = &mut self.token;
        let see = |records: Vec<SequencedRecord>| {
            slot.update(|known| known.see(&records));
            let mut index = lock(&index);
            for record in records {
                if codec::is_seal(&record) {
                    sealed = true;
                    break;
                }
                if let Some(Command::Fence(set)) = codec::command(&record) {
                    *token = set;
                }
                index.see(record);
            }
            Ok(())
        };
        let tail = self.shared.remote.scan(&self.stream, from, see).await?.unwrap_or_default();
        if sealed {
            self.closed = Some(self.shared.registry.closure(&self.key.session).await?);
        }
        lock(&index).to = tail.seq_num.max(from);
        (self.next, self.searched) = (Some(tail.seq_num), tail);
        self.shared.indexes.keep(&self.key, &index);
        Ok(())
    }

    /// Where a new index has to begin.
    async fn search_from(&self, ids: PartIds) -> Result<SeqNum> {
        if ids == PartIds::Lasting {
            return Ok(0);
        }
        let tail = self.shared.remote.tail(&self.stream).await?.unwrap_or_default();
        Ok(tail.seq_num.saturating_sub(RESEND_WINDOW))
    }

    /// Looks for part ids in the records that the index has forgotten.
    async fn recall(
        &self,
        keys: &[Digest],
        below: SeqNum,
        remembered: &mut HashMap<Digest, Option<Part>>,
    ) -> Result<()> {
        remembered.extend(keys.iter().map(|key| (*key, None)));
        let see = |records: Vec<SequencedRecord>| {
            for (key, part) in
                records.into_iter().take_while(|record| record.seq_num < below).filter_map(part_of)
            {
                if let Some(known) = remembered.get_mut(&key) {
                    *known = Some(part);
                }
            }
            Ok(())
        };
        self.shared.remote.scan_below(&self.stream, self.earliest(), below, see).await.map(drop)
    }
}

/// True if an index reaches back as far as these part ids count.
fn covers(index: &Arc<Mutex<Index>>, ids: PartIds) -> bool {
    let index = lock(index);
    match ids {
        PartIds::Lasting => !index.is_window,
        PartIds::Recent => true,
    }
}

/// As the embedded log does: all known with the same content, or all new; short-lived ids count only among the last
/// records.
fn judge(
    index: &Index,
    request: &Request,
    next: SeqNum,
    earliest: SeqNum,
    remembered: &HashMap<Digest, Option<Part>>,
) -> Verdict {
    let recent = request.part_ids == PartIds::Recent;
    let window = next.saturating_sub(RESEND_WINDOW);
    let (mut places, mut forgotten) = (Vec::new(), Vec::new());
    for PartId { id, key, hash } in request.parts.iter().flatten() {
        let part = match (index.find(key), remembered.get(key)) {
            (Some(part), _) => Some(part),
            (None, Some(Some(part))) => Some(*part),
            (None, Some(None)) => None,
            (None, None) => {
                if !recent && index.from > earliest {
                    forgotten.push(*key);
                }
                None
            }
        };
        match part {
            Some(part) if part.position.seq_num < earliest => {}
            Some(part) if recent && part.position.seq_num < window => {}
            Some(part) if part.hash == *hash => places.push(part.position),
            Some(_) if recent => {}
            Some(_) => return Verdict::Refused(Error::IdempotencyMismatch { part_id: id.to_string() }),
            None => {}
        }
    }
    if !forgotten.is_empty() {
        return Verdict::Forgotten(forgotten);
    }
    match places.len() {
        0 => Verdict::New,
        known if known == request.records.len() => Verdict::Repeated(places),
        _ if recent => Verdict::New,
        _ => Verdict::Refused(Error::Conflict(
            "only some records of the batch were appended before".to_owned(),
        )),
    }
}
