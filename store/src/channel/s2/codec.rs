//! What we write into S2 and how it is read back: names of streams, records of channels, records of our own streams.
//!
//! A channel is one stream that holds its records as they are. Two things are ours in it: the fence that seals it, behind
//! which nothing is part of the channel, and a header with the part id of a record whose body does not hold it.

use std::sync::Arc;

use bytes::Bytes;
use s2_sdk::types::{AppendRecord, Header as S2Header, SequencedRecord, StreamPosition};
use serde::{Deserialize, Serialize};

use sessiond_domain::record::{Command, FENCING_TOKEN_MAX, METERED_MAX, NewRecord, metered_size};
use sessiond_domain::{
    ChannelAddress, ChannelKey, ChannelName, Close, Direction, Error, Position, Record, Result, SeqNum,
    SessionId, Timestamp, envelope,
};

/// The fencing token that seals a stream for ever. No writer may have it.
pub(super) const SEAL: &str = "sessiond:sealed";
const _: () = assert!(SEAL.len() <= FENCING_TOKEN_MAX);
/// Name of the header that carries a part id. No writer may send it.
const PART_HEADER: &[u8] = b"sessiond-part-id";

/// The stream whose first record is the log's id.
pub(super) const ID_STREAM: &str = "sessiond/id";
/// The stream of seals that may not have reached their rows.
pub(super) const OUTBOX_STREAM: &str = "sessiond/unsettled";

/// The stream of a channel.
pub(super) fn channel_stream(key: &ChannelKey) -> String {
    key.to_string()
}

/// The stream that holds a session's named channels and its seal.
pub(super) fn registry_stream(session: &SessionId) -> String {
    format!("sessions/{session}/registry")
}

/// A record of a session's registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Entry {
    /// A named channel, from now on sealed with the session.
    Channel { direction: String, name: String },
    /// The session is sealed. The first one counts. `told`: the agent has said so on `.out` itself.
    Closed {
        at: i64,
        reason: Option<String>,
        #[serde(default)]
        told: bool,
    },
    /// Every channel carries the seal.
    Fenced,
}

impl Entry {
    pub(super) fn channel(address: &ChannelAddress) -> Option<Self> {
        let name = address.name.as_ref()?.as_str().to_owned();
        Some(Self::Channel { direction: address.direction.as_str().to_owned(), name })
    }

    pub(super) fn closed(Close { closure, told }: &Close) -> Self {
        Self::Closed { at: closure.at.millis(), reason: closure.reason.clone(), told: *told }
    }

    pub(super) fn to_record(&self) -> Result<AppendRecord> {
        let body = serde_json::to_vec(self).map_err(Error::internal)?;
        AppendRecord::new(body).map_err(Error::internal)
    }

    /// Reads a record of a registry; `None` for commands.
    pub(super) fn parse(record: &SequencedRecord) -> Result<Option<Self>> {
        if record.is_command_record() {
            return Ok(None);
        }
        serde_json::from_slice(&record.body).map(Some).map_err(Error::internal)
    }
}

/// The address that an [`Entry::Channel`] names.
pub(super) fn address(direction: &str, name: &str) -> Result<ChannelAddress> {
    Ok(ChannelAddress { direction: Direction::parse(direction)?, name: Some(ChannelName::parse(name)?) })
}

/// The command that sets a fencing token.
pub(super) fn fence(token: &str) -> Result<AppendRecord> {
    encoded_command(b"fence", Bytes::copy_from_slice(token.as_bytes()))
}

/// The command that forgets the records below a number.
pub(super) fn trim(below: SeqNum) -> Result<AppendRecord> {
    encoded_command(b"trim", Bytes::copy_from_slice(&below.to_be_bytes()))
}

fn encoded_command(name: &'static [u8], body: Bytes) -> Result<AppendRecord> {
    let header = S2Header::new(Bytes::new(), Bytes::from_static(name));
    AppendRecord::new(body).and_then(|record| record.with_headers([header])).map_err(Error::internal)
}

/// A record as S2 takes it.
///
/// # Errors
/// [`Error::Invalid`] for what is reserved; [`Error::TooLarge`] if a record that has to carry its part id in a header
/// has no room for it.
pub(super) fn encode(record: NewRecord) -> Result<AppendRecord> {
    if record.headers.iter().any(|(name, _)| name == PART_HEADER) {
        return Err(Error::invalid("headers", "a header of this name is reserved"));
    }
    if let Some(Command::Fence(token)) = Command::parse(&record.headers, &record.body)? {
        check_token(&token)?;
    }
    let size = record.metered_size();
    let mut headers: Vec<S2Header> =
        record.headers.iter().map(|(name, value)| S2Header::new(name.clone(), value.clone())).collect();
    if let Some(id) = &record.part_id
        && part_in_body(&record.headers, &record.body).as_deref() != Some(id)
    {
        headers.push(S2Header::new(Bytes::from_static(PART_HEADER), Bytes::copy_from_slice(id.as_bytes())));
    }
    let too_large = |_| Error::TooLarge { what: "record", size: size as u64, limit: METERED_MAX as u64 };
    let encoded =
        AppendRecord::new(record.body).and_then(|body| body.with_headers(headers)).map_err(too_large)?;
    Ok(match record.timestamp {
        Some(at) => encoded.with_timestamp(u64::try_from(at.millis()).unwrap_or(0)),
        None => encoded,
    })
}

/// Refuses the token that only a seal has.
pub(super) fn check_token(token: &str) -> Result<()> {
    if token == SEAL { Err(Error::invalid("fencingToken", "is reserved")) } else { Ok(()) }
}

/// A stored record and its part id.
pub(super) fn decode(stored: SequencedRecord) -> (Record, Option<Arc<str>>) {
    let position = Position { seq_num: stored.seq_num, timestamp: timestamp(stored.timestamp) };
    let mut headers: Vec<_> = stored.headers.into_iter().map(|header| (header.name, header.value)).collect();
    let kept = headers.iter().position(|(name, _)| name == PART_HEADER).map(|index| headers.remove(index).1);
    let metered_end = metered_end(position.seq_num, metered_size(&headers, &stored.body));
    let part = match kept {
        Some(id) => std::str::from_utf8(&id).ok().map(Arc::from),
        None => part_in_body(&headers, &stored.body),
    };
    (Record { position, headers, body: stored.body, metered_end }, part)
}

/// A stored record as it is shown.
pub(super) fn shown(stored: SequencedRecord) -> Record {
    let position = Position { seq_num: stored.seq_num, timestamp: timestamp(stored.timestamp) };
    let headers = stored.headers.into_iter().map(|header| (header.name, header.value));
    let headers: Vec<_> = headers.filter(|(name, _)| name != PART_HEADER).collect();
    let metered_end = metered_end(position.seq_num, metered_size(&headers, &stored.body));
    Record { position, headers, body: stored.body, metered_end }
}

/// S2 does not count the bytes of a stream. This grows with the records, by no less than each one's size.
fn metered_end(seq_num: SeqNum, size: usize) -> u64 {
    seq_num.saturating_mul(METERED_MAX as u64).saturating_add(size as u64)
}

fn part_in_body(headers: &[(Bytes, Bytes)], body: &Bytes) -> Option<Arc<str>> {
    if headers.iter().any(|(name, _)| name.is_empty()) {
        return None;
    }
    envelope::part_id(body).map(Arc::from)
}

/// The command that a stored record is.
pub(super) fn command(stored: &SequencedRecord) -> Option<Command> {
    if !stored.is_command_record() {
        return None;
    }
    let headers: Vec<_> =
        stored.headers.iter().map(|header| (header.name.clone(), header.value.clone())).collect();
    Command::parse(&headers, &stored.body).ok().flatten()
}

/// True for the record behind which a channel ends.
pub(super) fn is_seal(stored: &SequencedRecord) -> bool {
    stored.is_command_record() && *stored.headers[0].value == *b"fence" && *stored.body == *SEAL.as_bytes()
}

pub(super) fn position(at: StreamPosition) -> Position {
    Position { seq_num: at.seq_num, timestamp: timestamp(at.timestamp) }
}

pub(super) fn timestamp(millis: u64) -> Timestamp {
    Timestamp::from_millis(i64::try_from(millis).unwrap_or(i64::MAX))
}
