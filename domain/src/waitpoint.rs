//! Waitpoints: a run waits for the next record of a channel. What ends a wait is decided here, in one place, and from
//! the log alone.

use data_encoding::BASE64URL_NOPAD;

use super::channel::{ChannelKey, Direction};
use super::clock::Timestamp;
use super::error::{Error, Result};
use super::id::{EnvironmentId, RunId, SessionId, SessionRef, WaitpointId, utf16_len};
use super::list::{FILTER_VALUES_MAX, PAGE_SIZE_MAX};
use super::record::{Position, SeqNum};
use super::session::{Closure, Session, checked_tags};

/// Longest idempotency key, in UTF-16 units; the shortest is 1.
pub const WAITPOINT_KEY_MAX: usize = 2048;

/// A run that waits for the next data record of a session's main channel.
#[derive(Clone, Debug, PartialEq)]
pub struct Waitpoint {
    /// Its id.
    pub id: WaitpointId,
    /// The environment that owns it.
    pub environment: EnvironmentId,
    /// The session whose channel it waits on.
    pub session: SessionId,
    /// Which of its two main channels.
    pub direction: Direction,
    /// Who waits.
    pub run: RunId,
    /// The last record that the waiter has seen; without one every record that remains counts.
    pub after: Option<SeqNum>,
    /// When the wait ends without a record; never, without it.
    pub timeout_at: Option<Timestamp>,
    /// When the session expires. Copied, because it never changes.
    pub expires_at: Option<Timestamp>,
    /// Labels to filter by.
    pub tags: Vec<String>,
    /// Makes a repeat find this waitpoint, inside its channel.
    pub idempotency_key: Option<String>,
    /// Until when the key counts.
    pub key_expires_at: Option<Timestamp>,
    /// When it was created.
    pub created_at: Timestamp,
    /// How the wait ended. Write-once.
    pub completion: Option<Completion>,
}

/// The end of a wait, written once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// When: the record's time, or the moment that was reached.
    pub at: Timestamp,
    /// How.
    pub outcome: Outcome,
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The first data record after [`Waitpoint::after`].
    Record(SeqNum),
    /// [`Waitpoint::timeout_at`] was reached.
    TimedOut,
    /// The session was closed, so that nothing can come any more.
    Closed,
    /// The session expired, so that nothing can come any more.
    Expired,
}

impl Outcome {
    /// The stored word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Record(_) => "record",
            Self::TimedOut => "timeout",
            Self::Closed => "closed",
            Self::Expired => "expired",
        }
    }

    /// Reads the stored word with its number.
    pub fn parse(word: &str, seq_num: Option<SeqNum>) -> Option<Self> {
        match (word, seq_num) {
            ("record", Some(seq_num)) => Some(Self::Record(seq_num)),
            ("timeout", _) => Some(Self::TimedOut),
            ("closed", _) => Some(Self::Closed),
            ("expired", _) => Some(Self::Expired),
            _ => None,
        }
    }
}

/// How a wait stands, in the three words that clients know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitStatus {
    /// Nothing has come yet.
    Waiting,
    /// A record has come.
    Completed,
    /// It ended without a record, for whichever reason.
    TimedOut,
}

impl WaitStatus {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Waiting, Self::Completed, Self::TimedOut];

    /// The wire word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "WAITING",
            Self::Completed => "COMPLETED",
            Self::TimedOut => "TIMED_OUT",
        }
    }

    /// Reads the wire word.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == text)
    }
}

impl Waitpoint {
    /// How it stands.
    pub fn status(&self) -> WaitStatus {
        match &self.completion {
            None => WaitStatus::Waiting,
            Some(Completion { outcome: Outcome::Record(_), .. }) => WaitStatus::Completed,
            Some(_) => WaitStatus::TimedOut,
        }
    }

    /// The channel that it waits on.
    pub fn channel(&self) -> ChannelKey {
        ChannelKey::main(self.session.clone(), self.direction)
    }

    /// The first record that may end it.
    pub fn first_seq_num(&self) -> SeqNum {
        self.after.map_or(0, |after| after.saturating_add(1))
    }

    /// The moment at which it ends without a record, if none comes before.
    pub fn deadline(&self) -> Option<Timestamp> {
        self.limit().map(|limit| limit.at)
    }

    fn limit(&self) -> Option<Completion> {
        let timeout = self.timeout_at.map(|at| Completion { at, outcome: Outcome::TimedOut });
        let expiry = self.expires_at.map(|at| Completion { at, outcome: Outcome::Expired });
        match (timeout, expiry) {
            (Some(timeout), Some(expiry)) if expiry.at < timeout.at => Some(expiry),
            (timeout, expiry) => timeout.or(expiry),
        }
    }

    /// What has ended the wait, as far as can be told at `now`, from `first`, the place of the channel's first data
    /// record from [`Waitpoint::first_seq_num`] on, and from the session's closure.
    ///
    /// A record that the log has dated before the deadline wins over the deadline, however late anybody looks; one at
    /// or after it does not. Every record of a closed session but the last of `.in` came before the close.
    pub fn ended(
        &self,
        first: Option<Position>,
        closure: Option<&Closure>,
        now: Timestamp,
    ) -> Option<Completion> {
        let limit = self.limit();
        if let Some(first) = first {
            return Some(match limit {
                Some(limit) if limit.at <= first.timestamp => limit,
                _ => Completion {
                    at: first.timestamp.max(self.created_at),
                    outcome: Outcome::Record(first.seq_num),
                },
            });
        }
        let reached = limit.filter(|limit| limit.at <= now);
        let closed = closure.map(|closure| Completion { at: closure.at, outcome: Outcome::Closed });
        match (reached, closed) {
            (Some(limit), Some(closed)) if closed.at < limit.at => Some(closed),
            (limit, closed) => limit.or(closed),
        }
        .map(|completion| Completion { at: completion.at.max(self.created_at), ..completion })
    }
}

/// A wait as a caller asks for it, not yet checked.
#[derive(Clone, Debug)]
pub struct NewWaitpoint {
    /// See [`Waitpoint::run`]; the session's current run without one.
    pub run: Option<RunId>,
    /// The session whose channel to wait on.
    pub session: SessionRef,
    /// See [`Waitpoint::direction`].
    pub direction: Direction,
    /// See [`Waitpoint::after`].
    pub after: Option<SeqNum>,
    /// See [`Waitpoint::timeout_at`].
    pub timeout_at: Option<Timestamp>,
    /// See [`Waitpoint::tags`].
    pub tags: Vec<String>,
    /// See [`Waitpoint::idempotency_key`].
    pub idempotency_key: Option<String>,
    /// See [`Waitpoint::key_expires_at`].
    pub key_expires_at: Option<Timestamp>,
}

impl NewWaitpoint {
    /// Checks every limit and gives the waitpoint its id.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field.
    pub(super) fn into_waitpoint(self, session: &Session, now: Timestamp) -> Result<Waitpoint> {
        let fits = |key: &String| (1..=WAITPOINT_KEY_MAX).contains(&utf16_len(key)) && !key.contains('\0');
        if !self.idempotency_key.as_ref().is_none_or(fits) {
            let message = format!("must be 1 to {WAITPOINT_KEY_MAX} characters, none of them NUL");
            return Err(Error::invalid("idempotencyKey", message));
        }
        Ok(Waitpoint {
            id: WaitpointId::generate(now),
            environment: session.environment.clone(),
            session: session.id.clone(),
            direction: self.direction,
            run: self.run.unwrap_or_else(|| session.current_run_id.clone()),
            after: self.after,
            timeout_at: self.timeout_at,
            expires_at: session.expires_at,
            tags: checked_tags(&self.tags)?,
            key_expires_at: self.key_expires_at.filter(|_| self.idempotency_key.is_some()),
            idempotency_key: self.idempotency_key,
            created_at: now,
            completion: None,
        })
    }
}

/// Which waitpoints to list: every given field must match.
#[derive(Clone, Debug, Default)]
pub struct WaitpointFilter {
    /// The status is one of these; any, when empty.
    pub statuses: Vec<WaitStatus>,
    /// At least one of these tags is set.
    pub tags_any: Vec<String>,
    /// Of this session.
    pub session: Option<SessionId>,
    /// Made by this run.
    pub run: Option<RunId>,
    /// Made with this key, which still counts.
    pub idempotency_key: Option<String>,
    /// Created at or after.
    pub created_from: Option<Timestamp>,
    /// Created at or before.
    pub created_to: Option<Timestamp>,
}

impl WaitpointFilter {
    /// Checks the number of values.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field and the limit.
    pub(super) fn checked(self) -> Result<Self> {
        if self.tags_any.len() > FILTER_VALUES_MAX {
            return Err(Error::invalid("tags", format!("must hold at most {FILTER_VALUES_MAX} values")));
        }
        Ok(self)
    }
}

/// A place in a list of waitpoints, which is ordered by creation, newest first, then by id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitpointCursor {
    /// When the row was created.
    pub created_at: Timestamp,
    /// Its id.
    pub id: WaitpointId,
}

impl WaitpointCursor {
    const VERSION: u8 = 1;

    /// The cursor of a row.
    pub fn of(waitpoint: &Waitpoint) -> Self {
        Self { created_at: waitpoint.created_at, id: waitpoint.id.clone() }
    }

    /// The opaque text.
    pub fn encode(&self) -> String {
        let mut bytes = vec![Self::VERSION];
        bytes.extend(self.created_at.millis().to_be_bytes());
        bytes.extend(self.id.as_str().as_bytes());
        BASE64URL_NOPAD.encode(&bytes)
    }

    /// Reads a cursor that [`WaitpointCursor::encode`] wrote.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming `field`.
    pub fn decode(field: &str, text: &str) -> Result<Self> {
        Self::try_decode(text).ok_or_else(|| Error::malformed(field, "is not a cursor of this list"))
    }

    fn try_decode(text: &str) -> Option<Self> {
        let bytes = BASE64URL_NOPAD.decode(text.as_bytes()).ok()?;
        let (version, rest) = bytes.split_first()?;
        let (millis, id) = rest.split_first_chunk::<8>()?;
        let id = WaitpointId::parse(std::str::from_utf8(id).ok()?).ok()?;
        let created_at = Timestamp::from_millis(i64::from_be_bytes(*millis));
        (*version == Self::VERSION).then_some(Self { created_at, id })
    }
}

/// Which way to page, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaitpointAnchor {
    /// Older than the cursor; from the newest row without one.
    After(Option<WaitpointCursor>),
    /// Newer than the cursor; the oldest rows without one.
    Before(Option<WaitpointCursor>),
}

/// A page asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitpointPageRequest {
    /// 1 to [`PAGE_SIZE_MAX`].
    pub size: usize,
    /// From where, and which way.
    pub anchor: WaitpointAnchor,
}

impl WaitpointPageRequest {
    /// Checks the size.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming the field `page[size]`.
    pub fn new(size: usize, anchor: WaitpointAnchor) -> Result<Self> {
        if (1..=PAGE_SIZE_MAX).contains(&size) {
            Ok(Self { size, anchor })
        } else {
            Err(Error::malformed("page[size]", format!("must be 1 to {PAGE_SIZE_MAX}")))
        }
    }
}

/// A page of waitpoints in list order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WaitpointPage {
    /// The rows.
    pub waitpoints: Vec<Waitpoint>,
    /// Whether older rows follow.
    pub has_next: bool,
    /// Whether newer rows come before.
    pub has_previous: bool,
}

impl WaitpointPage {
    /// Builds a page from up to `size + 1` rows, read away from the anchor, nearest first.
    pub fn from_rows(request: &WaitpointPageRequest, mut rows: Vec<Waitpoint>) -> Self {
        let more = rows.len() > request.size;
        rows.truncate(request.size);
        match &request.anchor {
            WaitpointAnchor::After(cursor) => {
                Self { waitpoints: rows, has_next: more, has_previous: cursor.is_some() }
            }
            WaitpointAnchor::Before(cursor) => {
                rows.reverse();
                Self { waitpoints: rows, has_next: cursor.is_some(), has_previous: more }
            }
        }
    }

    /// Cursor of the last row, if older rows follow.
    pub fn next(&self) -> Option<WaitpointCursor> {
        self.waitpoints.last().filter(|_| self.has_next).map(WaitpointCursor::of)
    }

    /// Cursor of the first row, if newer rows come before.
    pub fn previous(&self) -> Option<WaitpointCursor> {
        self.waitpoints.first().filter(|_| self.has_previous).map(WaitpointCursor::of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn waitpoint(timeout_at: Option<i64>, expires_at: Option<i64>) -> Waitpoint {
        Waitpoint {
            id: WaitpointId::generate(at(10)),
            environment: EnvironmentId::from_stored("env_a"),
            session: SessionId::from_stored("session_a"),
            direction: Direction::In,
            run: RunId::from_stored("run_a"),
            after: None,
            timeout_at: timeout_at.map(at),
            expires_at: expires_at.map(at),
            tags: Vec::new(),
            idempotency_key: None,
            key_expires_at: None,
            created_at: at(10),
            completion: None,
        }
    }

    #[test]
    fn a_wait_ends_by_whatever_came_first_however_late_anybody_looks() {
        let record = |millis| Some(Position { seq_num: 3, timestamp: at(millis) });
        let by_record = |millis| Some((millis, Outcome::Record(3)));
        for (timeout, expiry, first, closed, now, ended) in [
            (None, None, None, None, 1000, None),
            (Some(50), None, None, None, 49, None),
            (Some(50), None, None, None, 50, Some((50, Outcome::TimedOut))),
            (Some(50), None, record(49), None, 1000, by_record(49)),
            (Some(50), None, record(50), None, 1000, Some((50, Outcome::TimedOut))),
            (Some(50), Some(40), None, None, 1000, Some((40, Outcome::Expired))),
            (Some(50), Some(60), None, None, 1000, Some((50, Outcome::TimedOut))),
            (None, Some(40), record(39), None, 1000, by_record(39)),
            (Some(50), None, None, Some(30), 31, Some((30, Outcome::Closed))),
            (Some(50), None, None, Some(60), 70, Some((50, Outcome::TimedOut))),
            (None, None, record(20), Some(30), 70, by_record(20)),
            (None, None, record(5), None, 70, by_record(10)),
            (None, None, None, Some(5), 70, Some((10, Outcome::Closed))),
        ] {
            let closure = closed.map(|millis| Closure { at: at(millis), reason: None });
            let found = waitpoint(timeout, expiry).ended(first, closure.as_ref(), at(now));
            let found = found.map(|completion| (completion.at.millis(), completion.outcome));
            assert_eq!(found, ended, "{timeout:?} {expiry:?} {first:?} {closed:?} {now}");
        }
    }

    #[test]
    fn cursors_come_back_unchanged_and_nothing_else_is_one() {
        let cursor = WaitpointCursor::of(&waitpoint(None, None));
        assert_eq!(WaitpointCursor::decode("page[after]", &cursor.encode()).expect("a cursor"), cursor);
        for text in ["", "AQ", "waitpoint_a", "!!!!", &"A".repeat(200)] {
            assert!(WaitpointCursor::decode("page[after]", text).is_err(), "{text}");
        }
    }
}
