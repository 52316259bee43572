//! Lists of sessions: filters, opaque cursors, pages.
//!
//! Order is always `created_at` descending, then session id descending; the cursor holds both.

use data_encoding::BASE64URL_NOPAD;

use super::clock::Timestamp;
use super::error::{Error, Result};
use super::id::{ExternalId, SessionId};
use super::session::{Session, Status};

/// Largest page; the smallest is 1.
pub const PAGE_SIZE_MAX: usize = 100;
/// Page size when the caller names none.
pub const PAGE_SIZE_DEFAULT: usize = 20;
/// Most values that one filter may hold.
pub const FILTER_VALUES_MAX: usize = 100;

/// A set of statuses; empty means any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatusSet(Vec<Status>);

impl StatusSet {
    /// Repeats count once.
    pub fn new(mut statuses: Vec<Status>) -> Self {
        statuses.sort_unstable();
        statuses.dedup();
        Self(statuses)
    }

    /// The statuses; empty when any will do.
    pub fn as_slice(&self) -> &[Status] {
        &self.0
    }

    /// True when the set does not restrict anything.
    pub fn is_any(&self) -> bool {
        self.0.is_empty() || self.0.len() == Status::ALL.len()
    }
}

/// Which sessions to list: every given field must match; inside a field any value will do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// `type` is one of these.
    pub kinds: Vec<String>,
    /// At least one of these tags is set.
    pub tags_any: Vec<String>,
    /// Every one of these tags is set.
    pub tags_all: Vec<String>,
    /// `taskIdentifier` is one of these.
    pub task_identifiers: Vec<String>,
    /// `externalId` is one of these.
    pub external_ids: Vec<ExternalId>,
    /// Derived status, judged at the moment of the query.
    pub statuses: StatusSet,
    /// Created at or after.
    pub created_from: Option<Timestamp>,
    /// Created at or before.
    pub created_to: Option<Timestamp>,
}

impl Filter {
    /// Whether a session matches at `now`: the same rule that a [`ListIndex`](super::ListIndex) applies.
    pub fn matches(&self, session: &Session, now: Timestamp) -> bool {
        let any = |wanted: &[String], value: &str| wanted.is_empty() || wanted.iter().any(|one| one == value);
        let tagged = |tag: &String| session.tags.contains(tag);
        any(&self.kinds, &session.kind)
            && any(&self.task_identifiers, &session.task_identifier)
            && (self.tags_any.is_empty() || self.tags_any.iter().any(tagged))
            && self.tags_all.iter().all(tagged)
            && (self.external_ids.is_empty()
                || session.external_id.as_ref().is_some_and(|id| self.external_ids.contains(id)))
            && (self.statuses.is_any() || self.statuses.as_slice().contains(&session.status(now)))
            && self.created_from.is_none_or(|from| session.created_at >= from)
            && self.created_to.is_none_or(|to| session.created_at <= to)
    }

    /// The filter without repeats and without values that no session can have (nothing stored has a NUL, and Postgres
    /// refuses it); `None` when no session can match. For a [`ListIndex`](super::ListIndex).
    pub fn possible(&self) -> Option<Self> {
        let mut filter = self.clone();
        if filter.tags_all.iter().any(|tag| tag.contains('\0')) {
            return None;
        }
        filter.tags_all.sort_unstable();
        filter.tags_all.dedup();
        for words in [&mut filter.kinds, &mut filter.tags_any, &mut filter.task_identifiers] {
            let restricts = !words.is_empty();
            words.retain(|word| !word.contains('\0'));
            words.sort_unstable();
            words.dedup();
            if restricts && words.is_empty() {
                return None;
            }
        }
        Some(filter)
    }

    /// Checks the number of values of each field.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field and the limit.
    pub fn checked(self) -> Result<Self> {
        let sizes = [
            ("type", self.kinds.len()),
            ("tags", self.tags_any.len()),
            ("tagsAll", self.tags_all.len()),
            ("taskIdentifier", self.task_identifiers.len()),
            ("externalId", self.external_ids.len()),
        ];
        match sizes.into_iter().find(|(_, len)| *len > FILTER_VALUES_MAX) {
            Some((field, _)) => {
                Err(Error::invalid(field, format!("must hold at most {FILTER_VALUES_MAX} values")))
            }
            None => Ok(self),
        }
    }
}

/// A place in a list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// `createdAt` of the row.
    pub created_at: Timestamp,
    /// Its id.
    pub id: SessionId,
}

impl Cursor {
    const VERSION: u8 = 1;

    /// The cursor of a row.
    pub fn of(session: &Session) -> Self {
        Self { created_at: session.created_at, id: session.id.clone() }
    }

    /// The opaque text: base64url of version, time and id.
    pub fn encode(&self) -> String {
        let mut bytes = vec![Self::VERSION];
        bytes.extend(self.created_at.millis().to_be_bytes());
        bytes.extend(self.id.as_str().as_bytes());
        BASE64URL_NOPAD.encode(&bytes)
    }

    /// Reads a cursor that [`Cursor::encode`] wrote.
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
        let id = std::str::from_utf8(id).ok()?;
        let known = *version == Self::VERSION
            && id.starts_with(super::id::SESSION_PREFIX)
            && id.len() <= 64
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        known.then(|| Self {
            created_at: Timestamp::from_millis(i64::from_be_bytes(*millis)),
            id: SessionId::from_stored(id),
        })
    }
}

/// Which way to page, and from where. Rows come in list order either way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// Older than the cursor; from the newest row without one.
    After(Option<Cursor>),
    /// Newer than the cursor; the oldest rows without one.
    Before(Option<Cursor>),
}

/// A page asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// 1 to [`PAGE_SIZE_MAX`].
    pub size: usize,
    /// From where, and which way.
    pub anchor: Anchor,
}

impl PageRequest {
    /// Checks the size.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming the field `page[size]`.
    pub fn new(size: usize, anchor: Anchor) -> Result<Self> {
        if (1..=PAGE_SIZE_MAX).contains(&size) {
            Ok(Self { size, anchor })
        } else {
            Err(Error::malformed("page[size]", format!("must be 1 to {PAGE_SIZE_MAX}")))
        }
    }

    /// The first page.
    pub fn first(size: usize) -> Self {
        Self { size, anchor: Anchor::After(None) }
    }
}

/// A page of rows in list order.
#[derive(Clone, Debug, PartialEq)]
pub struct Page {
    /// The rows.
    pub sessions: Vec<Session>,
    /// Whether older rows follow.
    pub has_next: bool,
    /// Whether newer rows come before.
    pub has_previous: bool,
}

impl Page {
    /// Builds a page from up to `size + 1` rows, read away from the anchor, nearest first.
    pub fn from_rows(request: &PageRequest, mut rows: Vec<Session>) -> Self {
        let more = rows.len() > request.size;
        rows.truncate(request.size);
        match &request.anchor {
            Anchor::After(cursor) => Self { sessions: rows, has_next: more, has_previous: cursor.is_some() },
            Anchor::Before(cursor) => {
                rows.reverse();
                Self { sessions: rows, has_next: cursor.is_some(), has_previous: more }
            }
        }
    }

    /// Cursor of the last row, if older rows follow.
    pub fn next(&self) -> Option<Cursor> {
        self.sessions.last().filter(|_| self.has_next).map(Cursor::of)
    }

    /// Cursor of the first row, if newer rows come before.
    pub fn previous(&self) -> Option<Cursor> {
        self.sessions.first().filter(|_| self.has_previous).map(Cursor::of)
    }
}

/// Which tags to list: distinct, ascending, of sessions in the environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TagQuery {
    /// Starts with this.
    pub prefix: Option<String>,
    /// Contains this, ignoring ASCII case.
    pub contains: Option<String>,
    /// Skip this many.
    pub offset: usize,
    /// Return at most this many.
    pub limit: usize,
}

impl TagQuery {
    /// Whether any tag can match; see [`Filter::possible`].
    pub fn is_possible(&self) -> bool {
        let words = [self.prefix.as_deref(), self.contains.as_deref()];
        self.limit > 0 && !words.into_iter().flatten().any(|word| word.contains('\0'))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn cursors_come_back_unchanged(millis in any::<i64>(), tail in "[0-9a-v]{26}") {
            let cursor = Cursor {
                created_at: Timestamp::from_millis(millis),
                id: SessionId::from_stored(&format!("session_{tail}")),
            };
            prop_assert_eq!(Cursor::decode("page[after]", &cursor.encode()).expect("decodes"), cursor);
        }

        #[test]
        fn no_text_makes_the_cursor_reader_panic(text in ".{0,80}") {
            let _ = Cursor::decode("page[after]", &text);
        }
    }

    #[test]
    fn foreign_text_is_no_cursor() {
        for text in ["", "AQ", "session_abc", "!!!!", &"A".repeat(200)] {
            assert!(Cursor::decode("page[after]", text).is_err(), "{text}");
        }
    }
}
