//! The transcript inside a snapshot, as the SDK's agent runtime writes it (`chatSnapshot` of its core package, 4.8.3).
//!
//! Version 1 is one JSON object with `messages`. Version 2 is lines: a header, an entry each, an index (the footer), and
//! a trailer of fixed width that says how long the index is, so that a page can be read without the rest. What cannot
//! be read is taken as the SDK's own reader takes it: an entry is left out, a whole snapshot is as none.

use std::ops::Range;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

/// Bytes of the trailer: `#tt2:`, 16 digits, a line feed.
pub const TRAILER: usize = 22;
const TRAILER_PREFIX: &[u8] = b"#tt2:";
/// What a blob of version 2 begins with.
const LINES_PREFIX: &[u8] = b"{\"v\":2";

/// Which page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TranscriptQuery {
    /// At most so many messages, the newest of those asked for; `None` for all.
    pub limit: Option<usize>,
    /// Only messages before the one with this id. If there is none with it the page is empty.
    pub before: Option<String>,
}

/// Where in the channels the snapshot was taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TranscriptCursors {
    /// Of `out`.
    pub last_out_event_id: Option<String>,
    /// Of `in`.
    pub last_in_event_id: Option<String>,
}

/// A page, oldest message first.
#[derive(Clone, Debug, Default)]
pub struct Transcript {
    /// As the agent wrote them.
    pub messages: Vec<Box<RawValue>>,
    /// The cursors of the snapshot.
    pub cursors: TranscriptCursors,
    /// What [`TranscriptQuery::before`] must be for the page of older messages; `None` if there are none.
    pub next_cursor: Option<String>,
}

/// A message with its id.
#[derive(Debug)]
struct Entry {
    id: String,
    message: Box<RawValue>,
}

#[derive(Deserialize)]
struct Identified {
    id: String,
}

#[derive(Deserialize)]
struct Line {
    id: String,
    message: Box<RawValue>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cursors {
    #[serde(default)]
    last_out_event_id: Value,
    #[serde(default)]
    last_in_event_id: Value,
}

#[derive(Deserialize)]
struct Object {
    version: Value,
    messages: Vec<Box<RawValue>>,
}

/// The index of a blob of version 2.
#[derive(Debug, Deserialize)]
pub struct Footer {
    ids: Vec<String>,
    /// Where each entry begins, and where the last one ends.
    offsets: Vec<u64>,
    #[serde(skip)]
    cursors: TranscriptCursors,
}

/// Bytes of a blob that hold a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Whole entry lines.
    pub range: Range<u64>,
    next_cursor: Option<String>,
}

/// A struct, which JSON spells as an object and serde would take from an array too.
fn object<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Option<T> {
    let text = text.trim_ascii();
    text.starts_with(b"{").then(|| serde_json::from_slice(text).ok()).flatten()
}

fn cursors(text: &[u8]) -> TranscriptCursors {
    let text_of = |value: &Value| value.as_str().map(str::to_owned);
    let cursors = object::<Cursors>(text).unwrap_or_default();
    TranscriptCursors {
        last_out_event_id: text_of(&cursors.last_out_event_id),
        last_in_event_id: text_of(&cursors.last_in_event_id),
    }
}

fn own_id(message: &RawValue) -> Option<String> {
    object::<Identified>(message.get().as_bytes()).map(|own| own.id).filter(|id| !id.is_empty())
}

fn entry(line: &[u8]) -> Option<Entry> {
    let Line { id, message } = object(line)?;
    (own_id(&message).as_deref() == Some(id.as_str())).then_some(Entry { id, message })
}

fn entries(lines: &[u8]) -> Vec<Entry> {
    lines.split(|byte| *byte == b'\n').filter_map(entry).collect()
}

/// The length of the index line, from the last bytes of a blob.
pub fn footer_length(tail: &[u8]) -> Option<u64> {
    let trailer = tail.len().checked_sub(TRAILER).map(|at| &tail[at..])?;
    let digits = trailer.strip_prefix(TRAILER_PREFIX)?.strip_suffix(b"\n")?;
    let digits = std::str::from_utf8(digits).ok()?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

impl Footer {
    /// The index line of a blob in which it begins at `end`. `None` if it cannot be the index of that blob.
    pub fn parse(line: &[u8], end: u64) -> Option<Self> {
        let footer: Self = object(line)?;
        let rises = footer.offsets.windows(2).all(|pair| pair[0] < pair[1]);
        let fits = footer.offsets.len() == footer.ids.len() + 1 && footer.offsets.last() <= Some(&end);
        (rises && fits).then(|| Self { cursors: cursors(line), ..footer })
    }

    /// Where the page is; `None` if it is empty.
    pub fn window(&self, query: &TranscriptQuery) -> Option<Window> {
        let (range, next_cursor) = page(&self.ids, String::as_str, query)?;
        let range = *self.offsets.get(range.start)?..*self.offsets.get(range.end)?;
        Some(Window { range, next_cursor })
    }

    /// The page whose bytes these are; without a window the empty one.
    pub fn transcript(self, window: Option<Window>, lines: &[u8]) -> Transcript {
        Transcript {
            messages: entries(lines).into_iter().map(|entry| entry.message).collect(),
            cursors: self.cursors,
            next_cursor: window.and_then(|window| window.next_cursor),
        }
    }
}

/// Which of the messages make the page, and the cursor to the page of older ones; `None` if it is empty.
fn page<T>(
    all: &[T],
    id: impl Fn(&T) -> &str,
    query: &TranscriptQuery,
) -> Option<(Range<usize>, Option<String>)> {
    let end = match &query.before {
        Some(before) => all.iter().position(|one| id(one) == before)?,
        None => all.len(),
    };
    let start = query.limit.filter(|limit| *limit > 0).map_or(0, |limit| end.saturating_sub(limit));
    let next = (start > 0).then(|| id(&all[start]).to_owned());
    (start < end).then_some((start..end, next))
}

/// The page of a whole blob of any version.
pub fn transcript(blob: &[u8], query: &TranscriptQuery) -> Transcript {
    let Some((mut entries, cursors)) = parse(blob) else { return Transcript::default() };
    let page = page(&entries, |entry| entry.id.as_str(), query);
    let (range, next_cursor) = page.unwrap_or_default();
    let messages = entries.drain(range).map(|entry| entry.message).collect();
    Transcript { messages, cursors, next_cursor }
}

fn parse(blob: &[u8]) -> Option<(Vec<Entry>, TranscriptCursors)> {
    if blob.starts_with(LINES_PREFIX) {
        let newline = blob.iter().position(|byte| *byte == b'\n')?;
        let (header, mut lines) = (&blob[..newline], &blob[newline + 1..]);
        object::<Cursors>(header)?;
        if let Some(length) = footer_length(lines).and_then(|length| usize::try_from(length).ok()) {
            lines = &lines[..lines.len().saturating_sub(length.saturating_add(1 + TRAILER))];
        }
        return Some((entries(lines), cursors(header)));
    }
    let whole: Object = object(blob)?;
    let entries = match whole.version.as_u64()? {
        1 => {
            let own = |message: Box<RawValue>| own_id(&message).map(|id| Entry { id, message });
            whole.messages.into_iter().filter_map(own).collect()
        }
        2 => whole.messages.iter().filter_map(|one| entry(one.get().as_bytes())).collect(),
        _ => return None,
    };
    Some((entries, cursors(blob)))
}

#[cfg(test)]
#[path = "transcript/tests.rs"]
mod tests;
