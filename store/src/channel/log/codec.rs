//! Stored forms: keys and rows of every keyspace. Knows bytes, not files.
//!
//! Every row begins with a version. Rows that may grow end in tagged fields: a tag below
//! [`OPTIONAL_TAGS`] changes what the row means, so a reader that does not know it must refuse; any other is
//! kept as it is. Reserved: 1 = fork parent (channel, cut), 2 = producer state (id, epoch, sequence).

use bytes::{Buf, BufMut, Bytes};

use sessiond_domain::channel::ChannelName;
use sessiond_domain::clock::Timestamp;
use sessiond_domain::record::{NewRecord, Position, Record};
use sessiond_domain::{ChannelAddress, ChannelKey, Closure, Direction, SeqNum, SessionId};

/// Version of every row written here.
const ROW: u8 = 1;
/// Tags from here on may be kept without being understood.
const OPTIONAL_TAGS: u8 = 128;
/// A record's flag: a part id follows the headers.
const HAS_PART: u8 = 1;
/// Where a record's timestamp and metered end stand, so that they can be filled in after encoding.
const PLACE: std::ops::Range<usize> = 2..18;

/// A row that this version cannot read.
#[derive(Debug, thiserror::Error)]
#[error("a stored {0} is damaged or was written by a newer version")]
pub(super) struct Unreadable(pub &'static str);

type Decoded<T> = Result<T, Unreadable>;

/// Key of a record: channel, then sequence number, so that a range reads a channel in order.
pub(super) fn record_key(channel: u64, seq_num: SeqNum) -> [u8; 16] {
    (u128::from(channel) << 64 | u128::from(seq_num)).to_be_bytes()
}

/// Sequence number of a record's key.
pub(super) fn record_seq_num(key: &[u8]) -> Decoded<SeqNum> {
    key.get(8..16).and_then(|tail| tail.try_into().ok()).map(u64::from_be_bytes).ok_or(Unreadable("key"))
}

/// Key of a part id of a channel.
pub(super) fn part_key(channel: u64, part_id: &str) -> Vec<u8> {
    [&channel.to_be_bytes(), part_id.as_bytes()].concat()
}

/// Key of the moment when a part id may be forgotten.
pub(super) fn expiry_key(at: Timestamp, part_key: &[u8]) -> Vec<u8> {
    [&at.millis().to_be_bytes(), part_key].concat()
}

/// Key of a channel's number: session, NUL, direction, name.
pub(super) fn channel_key(key: &ChannelKey) -> Vec<u8> {
    let direction = match key.address.direction {
        Direction::In => b'i',
        Direction::Out => b'o',
    };
    let mut out = key.session.as_str().as_bytes().to_vec();
    out.extend([0, direction]);
    out.extend(key.address.name.iter().flat_map(|name| name.as_str().bytes()));
    out
}

/// Reads [`channel_key`] back.
pub(super) fn parse_channel_key(bytes: &[u8]) -> Decoded<ChannelKey> {
    let fault = || Unreadable("channel key");
    let text = std::str::from_utf8(bytes).map_err(|_| fault())?;
    let (session, rest) = text.split_once('\0').ok_or_else(fault)?;
    let direction = match rest.as_bytes().first() {
        Some(b'i') => Direction::In,
        Some(b'o') => Direction::Out,
        _ => return Err(fault()),
    };
    let name = match &rest[1..] {
        "" => None,
        name => Some(ChannelName::parse(name).map_err(|_| fault())?),
    };
    Ok(ChannelKey { session: SessionId::from_stored(session), address: ChannelAddress { direction, name } })
}

/// Encodes everything of a record but its place, which [`place_record`] fills in.
pub(super) fn encode_record(record: &NewRecord, metered: usize) -> Vec<u8> {
    let part = record.part_id.as_deref();
    let mut out =
        Vec::with_capacity(32 + metered + 8 * record.headers.len() + part.map_or(0, |id| id.len() + 2));
    out.put_u8(ROW);
    out.put_u8(if part.is_some() { HAS_PART } else { 0 });
    out.put_bytes(0, PLACE.len());
    put_len(&mut out, record.headers.len());
    for (name, value) in &record.headers {
        put_bytes(&mut out, name);
        put_bytes(&mut out, value);
    }
    if let Some(part) = part {
        put_bytes(&mut out, part.as_bytes());
    }
    out.put_slice(&record.body);
    out
}

/// Fills in what is known only when the record gets its place.
pub(super) fn place_record(value: &mut [u8], timestamp: Timestamp, metered_end: u64) {
    let mut place = &mut value[PLACE];
    place.put_i64(timestamp.millis());
    place.put_u64(metered_end);
}

/// Time of a stored record.
pub(super) fn record_timestamp(mut value: &[u8]) -> Decoded<Timestamp> {
    open_record(&mut value).map(|(_, timestamp, _)| timestamp)
}

fn open_record(value: &mut impl Buf) -> Decoded<(u8, Timestamp, u64)> {
    let fault = || Unreadable("record");
    let version = value.try_get_u8().map_err(|_| fault())?;
    let flags = value.try_get_u8().map_err(|_| fault())?;
    if version != ROW || flags & !HAS_PART != 0 {
        return Err(fault());
    }
    let timestamp = Timestamp::from_millis(value.try_get_i64().map_err(|_| fault())?);
    Ok((flags, timestamp, value.try_get_u64().map_err(|_| fault())?))
}

/// Reads a record and its part id. Headers and body share the value's memory.
pub(super) fn decode_record(seq_num: SeqNum, mut value: Bytes) -> Decoded<(Record, Option<Bytes>)> {
    let fault = || Unreadable("record");
    let (flags, timestamp, metered_end) = open_record(&mut value)?;
    let count = take_len(&mut value).ok_or_else(fault)?;
    let mut headers = Vec::with_capacity(count.min(value.len() / 2));
    for _ in 0..count {
        let name = take_bytes(&mut value).ok_or_else(fault)?;
        headers.push((name, take_bytes(&mut value).ok_or_else(fault)?));
    }
    let part = match flags & HAS_PART {
        0 => None,
        _ => Some(take_bytes(&mut value).ok_or_else(fault)?),
    };
    let position = Position { seq_num, timestamp };
    Ok((Record { position, headers, body: value, metered_end }, part))
}

/// What is stored of a channel besides its records: the row that every commit to it rewrites.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tail {
    /// What the next record gets; its time is the last record's.
    pub next: Position,
    /// Metered bytes of every record ever appended.
    pub metered_end: u64,
    /// The first record that may be read.
    pub earliest: SeqNum,
    /// Records below are gone from the disk too.
    pub removed: SeqNum,
    /// The fencing token; empty when there is none.
    pub fence: String,
    /// Tagged fields of a newer version.
    pub kept: Bytes,
}

impl Tail {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(48 + self.fence.len() + self.kept.len());
        out.put_u8(ROW);
        out.put_u64(self.next.seq_num);
        out.put_i64(self.next.timestamp.millis());
        out.put_u64(self.metered_end);
        out.put_u64(self.earliest);
        out.put_u64(self.removed);
        put_bytes(&mut out, self.fence.as_bytes());
        out.put_slice(&self.kept);
        out
    }

    pub(super) fn decode(mut value: Bytes) -> Decoded<Self> {
        let fault = || Unreadable("tail");
        if value.len() < 41 || value.get_u8() != ROW {
            return Err(fault());
        }
        let next = Position { seq_num: value.get_u64(), timestamp: Timestamp::from_millis(value.get_i64()) };
        let (metered_end, earliest, removed) = (value.get_u64(), value.get_u64(), value.get_u64());
        let fence = take_bytes(&mut value).ok_or_else(fault)?;
        let fence = String::from_utf8(fence.to_vec()).map_err(|_| fault())?;
        check_tags(value.clone()).ok_or_else(fault)?;
        Ok(Self { next, metered_end, earliest, removed, fence, kept: value })
    }
}

/// What is remembered of a part id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Of the record's headers and body.
    pub hash: [u8; 16],
    /// Where the record stands.
    pub position: Position,
    /// When it was appended by our clock, which the record's own time may precede.
    pub stored_at: Timestamp,
}

impl Part {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(41);
        out.put_u8(ROW);
        out.put_slice(&self.hash);
        out.put_u64(self.position.seq_num);
        out.put_i64(self.position.timestamp.millis());
        out.put_i64(self.stored_at.millis());
        out
    }

    pub(super) fn decode(mut value: &[u8]) -> Decoded<Self> {
        if value.len() != 41 || value.get_u8() != ROW {
            return Err(Unreadable("part id"));
        }
        let mut hash = [0; 16];
        value.copy_to_slice(&mut hash);
        let position =
            Position { seq_num: value.get_u64(), timestamp: Timestamp::from_millis(value.get_i64()) };
        Ok(Self { hash, position, stored_at: Timestamp::from_millis(value.get_i64()) })
    }
}

/// The row of a seal.
pub(super) fn encode_closure(closure: &Closure) -> Vec<u8> {
    let mut out = Vec::with_capacity(16);
    out.put_u8(ROW);
    out.put_i64(closure.at.millis());
    out.put_u8(u8::from(closure.reason.is_some()));
    put_bytes(&mut out, closure.reason.as_deref().unwrap_or_default().as_bytes());
    out
}

/// Reads [`encode_closure`] back.
pub(super) fn decode_closure(mut value: Bytes) -> Decoded<Closure> {
    let fault = || Unreadable("seal");
    if value.len() < 11 || value.get_u8() != ROW {
        return Err(fault());
    }
    let at = Timestamp::from_millis(value.get_i64());
    let has_reason = value.get_u8() == 1;
    let reason = take_bytes(&mut value).ok_or_else(fault)?;
    check_tags(value).ok_or_else(fault)?;
    let reason = String::from_utf8(reason.to_vec()).map_err(|_| fault())?;
    Ok(Closure { at, reason: has_reason.then_some(reason) })
}

/// The row of a channel's number.
pub(super) fn encode_number(number: u64) -> Vec<u8> {
    let mut out = vec![ROW];
    out.put_u64(number);
    out
}

/// Reads [`encode_number`] back.
pub(super) fn decode_number(mut value: Bytes) -> Decoded<u64> {
    if value.len() < 9 || value.get_u8() != ROW {
        return Err(Unreadable("channel"));
    }
    let number = value.get_u64();
    check_tags(value).map(|()| number).ok_or(Unreadable("channel"))
}

fn check_tags(mut fields: Bytes) -> Option<()> {
    while fields.has_remaining() {
        if fields.get_u8() < OPTIONAL_TAGS {
            return None;
        }
        take_bytes(&mut fields)?;
    }
    Some(())
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_len(out, bytes.len());
    out.put_slice(bytes);
}

/// Seven bits a byte, lowest first.
fn put_len(out: &mut Vec<u8>, mut len: usize) {
    while len >= 0x80 {
        out.put_u8((len & 0x7f) as u8 | 0x80);
        len >>= 7;
    }
    out.put_u8(len as u8);
}

fn take_len(from: &mut Bytes) -> Option<usize> {
    let mut len = 0;
    for shift in (0..35).step_by(7) {
        let byte = from.try_get_u8().ok()?;
        len |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(len);
        }
    }
    None
}

fn take_bytes(from: &mut Bytes) -> Option<Bytes> {
    let len = take_len(from)?;
    (len <= from.len()).then(|| from.split_to(len))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_record_comes_back_as_it_was_stored(
            headers in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..300), prop::collection::vec(any::<u8>(), 0..40)), 0..5),
            body in prop::collection::vec(any::<u8>(), 0..400),
            part in prop::option::of("[a-z]{1,200}"),
            (millis, metered, seq_num) in any::<(i64, u64, u64)>(),
        ) {
            let headers: Vec<_> = headers.into_iter().map(|(n, v)| (Bytes::from(n), Bytes::from(v))).collect();
            let record = NewRecord { headers, body: body.into(), part_id: part.map(Into::into), timestamp: None };
            let mut value = encode_record(&record, record.metered_size());
            place_record(&mut value, Timestamp::from_millis(millis), metered);
            prop_assert_eq!(record_timestamp(&value).expect("readable").millis(), millis);
            let (stored, part) = decode_record(seq_num, value.into()).expect("readable");
            prop_assert_eq!(stored.position, Position { seq_num, timestamp: Timestamp::from_millis(millis) });
            prop_assert_eq!((stored.headers, stored.body, stored.metered_end), (record.headers, record.body, metered));
            prop_assert_eq!(part.as_deref(), record.part_id.as_deref().map(str::as_bytes));
        }

        #[test]
        fn damaged_rows_are_refused_and_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let bytes = Bytes::from(bytes);
            let _ = decode_record(0, bytes.clone());
            let _ = Tail::decode(bytes.clone());
            let _ = Part::decode(&bytes);
            let _ = decode_closure(bytes.clone());
            let _ = decode_number(bytes.clone());
            let _ = parse_channel_key(&bytes);
        }
    }

    #[test]
    fn fields_of_a_newer_version_are_kept_unless_they_change_the_meaning() {
        let mut tail = Tail {
            fence: "f".into(),
            earliest: 3,
            kept: Bytes::from_static(&[200, 1, 9]),
            ..Tail::default()
        };
        assert_eq!(Tail::decode(tail.encode().into()).expect("kept"), tail);
        tail.kept = Bytes::from_static(&[1, 1, 9]);
        assert!(Tail::decode(tail.encode().into()).is_err());
    }

    #[test]
    fn channel_keys_are_distinct_and_read_back() {
        let session = SessionId::from_stored("session_a");
        let name = ChannelName::parse("notes").expect("valid");
        for direction in [Direction::In, Direction::Out] {
            for name in [None, Some(name.clone())] {
                let key =
                    ChannelKey { session: session.clone(), address: ChannelAddress { direction, name } };
                assert_eq!(parse_channel_key(&channel_key(&key)).expect("readable"), key);
            }
        }
    }
}
