//! What a channel holds: records, their places, and how they are asked for.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;

use super::clock::Timestamp;
use super::error::{Error, Result};

/// Largest metered size of a record and of a batch, in bytes, inclusive (S2's limit).
pub const METERED_MAX: usize = 1_048_576;
/// Most records in one batch (S2's limit).
pub const BATCH_RECORDS_MAX: usize = 1000;
/// Longest fencing token, in bytes (S2's limit).
pub const FENCING_TOKEN_MAX: usize = 36;
/// Forms kept of one batch; see [`RecordBatch::selected`].
const SELECTED_MAX: usize = 4;
/// Longest part id, in bytes.
pub const PART_ID_MAX: usize = 256;

/// 0-based number of a record in its channel: gapless, given at append.
pub type SeqNum = u64;

/// A place in a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub struct Position {
    /// Sequence number.
    pub seq_num: SeqNum,
    /// The record's time; never smaller than the previous record's.
    pub timestamp: Timestamp,
}

/// A name and a value, both arbitrary bytes.
pub type Header = (Bytes, Bytes);

/// One entry of a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where it stands.
    pub position: Position,
    /// Headers in the order they were sent.
    pub headers: Vec<Header>,
    /// The body; empty for control records.
    pub body: Bytes,
    /// Metered bytes of the channel up to and including this record, trimmed ones counted; more than that where the engine
    /// does not count them. Never grows by less than the record's own size.
    pub metered_end: u64,
}

/// S2's measure of a record: 8 bytes, 2 for each header, and every byte of headers and body.
pub fn metered_size(headers: &[Header], body: &Bytes) -> usize {
    let headers: usize = headers.iter().map(|(name, value)| 2 + name.len() + value.len()).sum();
    8 + headers + body.len()
}

/// What a command record tells the log. S2 encodes one as a single header with an empty name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Forget records below this number.
    Trim(SeqNum),
    /// From now on refuse appends that carry another fencing token; empty lifts the fence.
    Fence(String),
}

impl Command {
    /// Reads a command from a record's parts; `None` for a data or control record.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a header with an empty name that is not a well-formed command.
    pub fn parse(headers: &[Header], body: &Bytes) -> Result<Option<Self>> {
        let Some((_, value)) = headers.iter().find(|(name, _)| name.is_empty()) else {
            return Ok(None);
        };
        if headers.len() != 1 {
            return Err(Error::invalid("headers", "a command record has exactly one header"));
        }
        match value.as_ref() {
            b"trim" => {
                let seq_num = <[u8; 8]>::try_from(body.as_ref())
                    .map_err(|_| Error::invalid("body", "a trim command's body is 8 bytes, big-endian"))?;
                Ok(Some(Self::Trim(u64::from_be_bytes(seq_num))))
            }
            b"fence" => match std::str::from_utf8(body) {
                Ok(token) if token.len() <= FENCING_TOKEN_MAX => Ok(Some(Self::Fence(token.to_owned()))),
                _ => Err(Error::invalid(
                    "body",
                    format!("a fencing token is at most {FENCING_TOKEN_MAX} bytes of UTF-8"),
                )),
            },
            _ => {
                Err(Error::invalid("headers", "the header with an empty name must be \"trim\" or \"fence\""))
            }
        }
    }

    /// The record that carries this command.
    pub fn into_record(self) -> NewRecord {
        let (name, body) = match self {
            Self::Trim(seq_num) => ("trim", Bytes::copy_from_slice(&seq_num.to_be_bytes())),
            Self::Fence(token) => ("fence", Bytes::from(token)),
        };
        NewRecord {
            headers: vec![(Bytes::new(), Bytes::from_static(name.as_bytes()))],
            body,
            ..NewRecord::default()
        }
    }
}

impl Record {
    /// True for trim and fence commands, which no client ever sees as data.
    pub fn is_command(&self) -> bool {
        self.headers.len() == 1 && self.headers[0].0.is_empty()
    }
}

/// A record that has not been given its place yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewRecord {
    /// Headers, kept in order.
    pub headers: Vec<Header>,
    /// Body.
    pub body: Bytes,
    /// The writer's own time; the log never lets time run backwards or ahead of its clock.
    pub timestamp: Option<Timestamp>,
    /// Makes a repeat of this append answer the original place instead of writing again.
    pub part_id: Option<Arc<str>>,
}

impl NewRecord {
    /// A record with a body and nothing else.
    pub fn data(body: impl Into<Bytes>) -> Self {
        Self { body: body.into(), ..Self::default() }
    }

    /// See [`metered_size`].
    pub fn metered_size(&self) -> usize {
        metered_size(&self.headers, &self.body)
    }
}

/// How long a part id names one record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PartIds {
    /// Chosen by the caller to be unique in the channel: a known one with another content is a fault.
    #[default]
    Lasting,
    /// Short and random, as direct writers make them: they tell a batch that is sent again after a broken connection,
    /// and one that comes again later does so by chance. A batch counts as repeated only if each of its records has a
    /// part id that stands among the last [`RESEND_WINDOW`] records with the same content; else it is stored, whatever
    /// is known.
    Recent,
}

/// How far back a batch is looked for that a direct writer may have sent before: more records than its client keeps
/// without an ack, unless they are a few bytes each.
pub const RESEND_WINDOW: u64 = 1 << 16;

/// Appends that one writer sends one behind the other without waiting for answers: behind one that was refused, none of
/// them is stored.
#[derive(Clone, Debug, Default)]
pub struct Chain(Arc<AtomicBool>);

impl Chain {
    /// Whether an append was refused.
    pub fn is_broken(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Says that an append was refused. For the log, which does so before it looks at the next one.
    pub fn break_off(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A batch to append as one unit, checked for size.
#[derive(Clone, Debug, Default)]
pub struct AppendInput {
    records: Vec<NewRecord>,
    /// Refuse unless the tail is exactly here.
    pub match_seq_num: Option<SeqNum>,
    /// Refuse unless this is the token that is set; an unfenced channel has the empty one. Absent: not checked
    /// (S2's cooperative rule).
    pub fencing_token: Option<String>,
    /// What the part ids of the records are worth.
    pub part_ids: PartIds,
    /// What else must have been stored.
    pub chain: Option<Chain>,
}

impl AppendInput {
    /// Checks a batch: 1 to 1000 records, each and all together at most 1 MiB metered, well-formed commands,
    /// part ids of 1 to 256 bytes and distinct.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::TooLarge`] naming the limit.
    pub fn new(records: Vec<NewRecord>) -> Result<Self> {
        if records.is_empty() || records.len() > BATCH_RECORDS_MAX {
            return Err(Error::invalid("records", format!("must hold 1 to {BATCH_RECORDS_MAX} records")));
        }
        let mut total = 0;
        for (index, record) in records.iter().enumerate() {
            let size = record.metered_size();
            if size > METERED_MAX {
                return Err(too_large("record", size));
            }
            total += size;
            Command::parse(&record.headers, &record.body)?;
            if let Some(id) = &record.part_id {
                if id.is_empty() || id.len() > PART_ID_MAX {
                    return Err(Error::invalid("partId", format!("must be 1 to {PART_ID_MAX} bytes")));
                }
                if records[..index].iter().any(|other| other.part_id.as_ref() == Some(id)) {
                    return Err(Error::invalid("partId", "must not repeat inside one batch"));
                }
            }
        }
        if total > METERED_MAX {
            return Err(too_large("batch", total));
        }
        Ok(Self { records, ..Self::default() })
    }

    /// One record.
    ///
    /// # Errors
    /// As [`AppendInput::new`].
    pub fn one(record: NewRecord) -> Result<Self> {
        Self::new(vec![record])
    }

    /// The records, in order.
    pub fn records(&self) -> &[NewRecord] {
        &self.records
    }

    /// See [`metered_size`], of all records.
    pub fn metered_size(&self) -> usize {
        self.records.iter().map(NewRecord::metered_size).sum()
    }

    /// What the batch takes in memory until it is stored, roughly, in bytes.
    pub fn cost(&self) -> usize {
        let headers: usize = self.records.iter().map(|record| record.headers.len()).sum();
        self.metered_size() + size_of::<NewRecord>() * self.records.len() + size_of::<Header>() * headers
    }

    /// Hands the records over.
    pub fn into_records(self) -> Vec<NewRecord> {
        self.records
    }
}

fn too_large(what: &'static str, size: usize) -> Error {
    Error::TooLarge { what, size: size as u64, limit: METERED_MAX as u64 }
}

/// The answer to an append: the records would survive losing this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppendAck {
    /// Place of the first record.
    pub start: Position,
    /// One past the last record; its time is the last record's.
    pub end: Position,
    /// The channel's tail when the batch was committed (or repeated).
    pub tail: Position,
    /// Place of every record, which for a repeat are the original ones.
    pub seq_nums: Vec<SeqNum>,
    /// True when nothing was written, because every part id was known.
    pub repeated: bool,
}

/// Where a channel begins and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Bounds {
    /// The first record that can still be read (equals the tail when there is none).
    pub earliest: SeqNum,
    /// What the *next* record will get; its time is the last record's.
    pub tail: Position,
}

/// Where a read begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadStart {
    /// At this number; below the trim point means the first surviving record, past the tail means the tail.
    SeqNum(SeqNum),
    /// At the first record at or after this time.
    Timestamp(Timestamp),
    /// This many records before the tail; 0 is the tail itself.
    TailOffset(u64),
}

/// How much one read may return. At least one record comes back if there is any, however large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadLimit {
    /// Most records.
    pub count: usize,
    /// Most metered bytes.
    pub bytes: usize,
}

impl ReadLimit {
    /// A full batch: 1000 records or 1 MiB, whichever comes first.
    pub const BATCH: Self = Self { count: BATCH_RECORDS_MAX, bytes: METERED_MAX };

    /// Everything.
    pub const NONE: Self = Self { count: usize::MAX, bytes: usize::MAX };

    /// At most `count` records.
    pub fn count(count: usize) -> Self {
        Self { count, ..Self::BATCH }
    }

    /// As much as both allow.
    #[must_use]
    pub fn within(self, other: Self) -> Self {
        Self { count: self.count.min(other.count), bytes: self.bytes.min(other.bytes) }
    }

    /// What is left of it after these records, of which the first may have been larger than the limit; `None` if nothing, or
    /// if they were too many.
    pub(super) fn after(self, records: &[Record]) -> Option<Self> {
        let bytes = records.iter().map(|record| metered_size(&record.headers, &record.body)).sum();
        Some(Self { count: self.count.checked_sub(records.len())?, bytes: self.bytes.checked_sub(bytes)? })
    }
}

/// Largest page of records; the smallest is 1.
pub const RECORD_PAGE_MAX: usize = 100;

/// Which way to page through a channel, and from where. Records come in channel order either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordAnchor {
    /// After this number; from the first record that remains without one.
    After(Option<SeqNum>),
    /// Before this number; up to the tail without one.
    Before(Option<SeqNum>),
}

/// A page of records asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordPageRequest {
    /// 1 to [`RECORD_PAGE_MAX`].
    pub(super) size: usize,
    /// From where, and which way.
    pub(super) anchor: RecordAnchor,
}

impl RecordPageRequest {
    /// Checks the size.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field `size`.
    pub fn new(size: usize, anchor: RecordAnchor) -> Result<Self> {
        if (1..=RECORD_PAGE_MAX).contains(&size) {
            Ok(Self { size, anchor })
        } else {
            Err(Error::invalid("size", format!("must be 1 to {RECORD_PAGE_MAX}")))
        }
    }
}

/// A page of records in channel order, without commands.
#[derive(Clone, Debug, Default)]
pub struct RecordPage {
    /// The records; fewer than asked for at an end of the channel, or where they are too large together.
    pub records: Vec<Record>,
    /// Whether records follow: exact when paging forward. When paging backward, whether the channel goes on after the
    /// cursor, be it with nothing but commands.
    pub has_next: bool,
    /// Whether records come before: exact when paging backward. When paging forward, whether the channel begins before
    /// the page, be it with nothing but commands.
    pub has_previous: bool,
}

/// Wire forms of a batch that are worth making once and sharing between followers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rendering {
    /// An SSE `batch` event.
    Sse,
}

/// Consecutive records of one channel, shared by every follower that gets them.
#[derive(Default)]
pub struct RecordBatch {
    /// In order and without gaps; empty only for a read at the tail.
    pub records: Vec<Record>,
    /// The channel's tail, when it is known that these records end at it.
    pub tail: Option<Position>,
    sse: OnceLock<Bytes>,
    selected: Mutex<Vec<(Arc<str>, Bytes)>>,
}

impl RecordBatch {
    /// A batch as read or committed.
    pub fn new(records: Vec<Record>, tail: Option<Position>) -> Self {
        Self { records, tail, ..Self::default() }
    }

    /// The batch in a wire form, rendered by the first follower that asks and shared by the others.
    pub fn rendered(&self, form: Rendering, render: impl FnOnce(&Self) -> Bytes) -> Bytes {
        match form {
            Rendering::Sse => self.sse.get_or_init(|| render(self)).clone(),
        }
    }

    /// The batch in a form that a front end describes by `form`, rendered by the first follower that asks for this
    /// form and shared by the others. Only so many forms are kept.
    pub fn selected(&self, form: &Arc<str>, render: impl FnOnce(&Self) -> Bytes) -> Bytes {
        let mut kept = self.selected.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = kept.iter().find(|(known, _)| known == form) {
            return bytes.clone();
        }
        // Under the lock, so that followers that wake together render once.
        let bytes = render(self);
        if kept.len() < SELECTED_MAX {
            kept.push((form.clone(), bytes.clone()));
        }
        bytes
    }

    /// Where the record after this batch stands, if the batch holds any.
    pub fn next_seq_num(&self) -> Option<SeqNum> {
        self.records.last().map(|record| record.position.seq_num + 1)
    }
}

impl fmt::Debug for RecordBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordBatch").field("records", &self.records).field("tail", &self.tail).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_exactly_one_mebibyte_metered_fits_and_one_byte_more_does_not() {
        let fits = NewRecord::data(vec![b'x'; METERED_MAX - 8]);
        assert_eq!(fits.metered_size(), METERED_MAX);
        assert!(AppendInput::one(fits).is_ok());
        let over = AppendInput::one(NewRecord::data(vec![b'x'; METERED_MAX - 7]));
        assert!(matches!(over, Err(Error::TooLarge { size: 1_048_577, limit: 1_048_576, .. })));
    }

    #[test]
    fn a_batch_holds_one_to_a_thousand_records() {
        assert!(AppendInput::new(vec![]).is_err());
        assert!(AppendInput::new(vec![NewRecord::data("x"); 1000]).is_ok());
        assert!(AppendInput::new(vec![NewRecord::data("x"); 1001]).is_err());
    }

    #[test]
    fn a_form_of_a_batch_is_rendered_once_and_few_are_kept() {
        let batch = RecordBatch::default();
        let forms: Vec<Arc<str>> = (0..6).map(|n| n.to_string().into()).collect();
        for form in &forms {
            assert_eq!(batch.selected(form, |_| Bytes::from(form.to_string())), form.as_bytes());
        }
        let again = |form: &Arc<str>| batch.selected(form, |_| Bytes::from_static(b"again"));
        assert_eq!(again(&Arc::from("3")), "3");
        assert_eq!(again(&forms[4]), "again");
    }

    #[test]
    fn commands_are_read_back_from_their_records() {
        for command in [Command::Trim(7), Command::Fence("me".to_owned())] {
            let record = command.clone().into_record();
            assert_eq!(Command::parse(&record.headers, &record.body).expect("well-formed"), Some(command));
        }
        let header = |name: &'static str, value: &'static str| (Bytes::from(name), Bytes::from(value));
        for (headers, body) in [
            (vec![header("", "trim")], "short"),
            (vec![header("", "erase")], ""),
            (vec![header("", "trim"), header("a", "b")], "12345678"),
            (vec![header("", "fence")], "a token that is much longer than 36 bytes"),
        ] {
            assert!(Command::parse(&headers, &Bytes::from(body)).is_err(), "{headers:?}");
        }
    }
}
