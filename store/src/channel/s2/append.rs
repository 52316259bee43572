//! An append on its way: as far as it can be prepared without knowing the channel.

use std::sync::Arc;

use s2_sdk::types::AppendRecord;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::codec;
use super::index::Part;
use crate::channel::part::{Digest, content_hash, id_hash};
use sessiond_domain::record::{Chain, Command, NewRecord, PartIds};
use sessiond_domain::{AppendAck, AppendInput, Error, Position, Result, SeqNum};

/// The part id of a record.
#[derive(Clone, Debug)]
pub(super) struct PartId {
    pub id: Arc<str>,
    pub key: Digest,
    pub hash: Digest,
}

/// A batch and where its answer goes.
#[derive(Debug)]
pub(super) struct Request {
    pub records: Vec<AppendRecord>,
    /// One for each record, or none at all.
    pub parts: Vec<Option<PartId>>,
    /// Commands and the index of their records.
    pub commands: Vec<(usize, Command)>,
    pub match_seq_num: Option<SeqNum>,
    pub fencing_token: Option<String>,
    pub part_ids: PartIds,
    pub chain: Option<Chain>,
    /// Metered size of all records.
    pub metered: usize,
    /// How often it came back without an answer.
    pub tries: u32,
    pub since: Instant,
    reply: oneshot::Sender<Result<AppendAck>>,
}

impl Request {
    /// Prepares a batch.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is reserved.
    pub(super) fn prepare(input: AppendInput) -> Result<(Self, oneshot::Receiver<Result<AppendAck>>)> {
        let (reply, answer) = oneshot::channel();
        let (match_seq_num, fencing_token) = (input.match_seq_num, input.fencing_token.clone());
        let (part_ids, chain, metered) = (input.part_ids, input.chain.clone(), input.metered_size());
        fencing_token.as_deref().map_or(Ok(()), codec::check_token)?;
        let new = input.into_records();
        let mut commands = Vec::new();
        for (index, record) in new.iter().enumerate() {
            if let Some(command) = Command::parse(&record.headers, &record.body)? {
                commands.push((index, command));
            }
        }
        let named = new.iter().any(|record| record.part_id.is_some());
        let parts = if named { new.iter().map(part_id).collect() } else { Vec::new() };
        let records = new.into_iter().map(codec::encode).collect::<Result<Vec<_>>>()?;
        let (tries, since) = (0, Instant::now());
        let request = Self {
            records,
            parts,
            commands,
            match_seq_num,
            fencing_token,
            part_ids,
            chain,
            metered,
            tries,
            since,
            reply,
        };
        Ok((request, answer))
    }

    /// True behind a refused append of its chain.
    pub(super) fn is_cut_off(&self) -> bool {
        self.chain.as_ref().is_some_and(Chain::is_broken)
    }

    /// True if the outcome of this append can be found in the log.
    pub(super) fn is_named(&self) -> bool {
        !self.parts.is_empty()
    }

    /// The part ids that it has.
    pub(super) fn part_keys(&self) -> impl Iterator<Item = &Digest> {
        self.parts.iter().flatten().map(|part| &part.key)
    }

    /// The fencing token that is set after it, if it sets one.
    pub(super) fn token_after(&self) -> Option<&str> {
        self.commands.iter().rev().find_map(|(_, command)| match command {
            Command::Fence(token) => Some(token.as_str()),
            Command::Trim(_) => None,
        })
    }

    /// The parts as they stand once stored; `None` if the times of some are not known.
    pub(super) fn placed(&self, start: Position, end: Position) -> Option<Vec<(Digest, Part)>> {
        if self.is_named() && start.timestamp != end.timestamp && self.records.len() > 2 {
            return None;
        }
        let places = start.seq_num..end.seq_num;
        let placed = self.parts.iter().zip(places).filter_map(|(part, seq_num)| {
            let timestamp = if seq_num == start.seq_num { start.timestamp } else { end.timestamp };
            let part = part.as_ref()?;
            Some((part.key, Part { hash: part.hash, position: Position { seq_num, timestamp } }))
        });
        Some(placed.collect())
    }

    /// Answers. Whoever does not wait any more does not want the answer.
    pub(super) fn answer(self, answer: Result<AppendAck>) {
        if let (Some(chain), Err(_)) = (&self.chain, &answer) {
            chain.break_off();
        }
        let _ = self.reply.send(answer);
    }
}

fn part_id(record: &NewRecord) -> Option<PartId> {
    let id = record.part_id.clone()?;
    Some(PartId { key: id_hash(&id), hash: content_hash(&record.headers, &record.body), id })
}

/// The answer to a batch that was stored before.
pub(super) fn repeated(places: &[Position], tail: Position) -> AppendAck {
    let start = places.first().copied().unwrap_or(tail);
    let last = places.last().copied().unwrap_or(tail);
    AppendAck {
        start,
        end: Position { seq_num: last.seq_num + 1, timestamp: last.timestamp },
        tail,
        seq_nums: places.iter().map(|place| place.seq_num).collect(),
        repeated: true,
    }
}

/// The answer to everything that comes while S2 is away.
pub(super) fn away_too(error: &Error) -> Error {
    super::remote::away(error.to_string())
}
