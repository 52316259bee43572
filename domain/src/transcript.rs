//! The transcript inside a snapshot, as the SDK's agent runtime writes it (`chatSnapshot` of its core package, 4.8.3).
//!
//! Version 1 is one JSON object with `messages`. Version 2 is lines: a header, an entry each, an index (the footer), and
//! a trailer of fixed width that says how long the index is, so that a page can be read without the rest. What cannot
//! be read is taken as the SDK's own reader takes it: an entry is left out, a whole snapshot is as none.
//!
//! A writer is not trusted with our memory: what is read here is walked over, and only the places of the page are kept.

mod json;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, future};

use super::blob::ByteStream;

/// Bytes of the trailer: `#tt2:`, 16 digits, a line feed.
pub const TRAILER: usize = 22;
const TRAILER_PREFIX: &[u8] = b"#tt2:";
/// What a blob of version 2 begins with.
const LINES_PREFIX: &[u8] = b"{\"v\":2";
/// Most messages of a page, whatever limit was asked for.
pub const PAGE_MESSAGES: usize = 10_000;
/// Most bytes of the messages of a page. One message that is larger is a page of its own.
pub const PAGE_BYTES: u64 = 8 * 1024 * 1024;
/// Longest id and event id, as JSON spells it, in bytes. A message with a longer id is left out, as one without.
const ID_MAX: usize = 4096;
/// Longest number that may be a version.
const VERSION_MAX: usize = 16;

/// Which page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TranscriptQuery {
    /// At most so many messages, the newest of those asked for; `None` or zero for as many as a page may have.
    pub limit: Option<usize>,
    /// Only messages before the one with this id. If there is none with it the page is empty.
    pub before: Option<String>,
}

impl TranscriptQuery {
    fn most(&self) -> usize {
        self.limit.filter(|limit| *limit > 0).map_or(PAGE_MESSAGES, |limit| limit.min(PAGE_MESSAGES))
    }
}

/// Where in the channels the snapshot was taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TranscriptCursors {
    /// Of `out`.
    pub last_out_event_id: Option<String>,
    /// Of `in`.
    pub last_in_event_id: Option<String>,
}

/// A page, oldest message first: at most [`PAGE_MESSAGES`] of them, of at most [`PAGE_BYTES`] if there are several.
#[derive(Debug, Default)]
pub struct Transcript {
    /// As the agent wrote them.
    pub messages: Messages,
    /// The cursors of the snapshot.
    pub cursors: TranscriptCursors,
    /// What [`TranscriptQuery::before`] must be for the page of older messages; `None` if there are none.
    pub next_cursor: Option<String>,
}

/// The messages of a page as JSON, with a comma between each two. Read from the store as they are taken.
pub struct Messages {
    /// How many bytes will come.
    pub length: u64,
    /// The bytes.
    pub bytes: ByteStream,
}

impl Default for Messages {
    fn default() -> Self {
        Self { length: 0, bytes: futures_util::stream::empty().boxed() }
    }
}

impl fmt::Debug for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messages").field("length", &self.length).finish_non_exhaustive()
    }
}

/// A place in a blob, from where the page's own text begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: u32,
    end: u32,
}

impl Span {
    /// `None` past 4 GiB, which no snapshot reaches.
    fn of(place: &Range<usize>) -> Option<Self> {
        Some(Self { start: place.start.try_into().ok()?, end: place.end.try_into().ok()? })
    }

    fn length(self) -> u64 {
        u64::from(self.end - self.start)
    }

    fn in_text(self, text: &[u8]) -> &[u8] {
        &text[self.start as usize..self.end as usize]
    }
}

/// Where the messages of a page stand in a blob.
#[derive(Debug, Default)]
pub struct Page {
    /// Where in the blob the text begins that the spans count from.
    base: u64,
    messages: Vec<Span>,
    cursors: TranscriptCursors,
    next_cursor: Option<String>,
}

/// Bytes of a blob that hold a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Whole entry lines.
    pub range: Range<u64>,
    cursors: TranscriptCursors,
    next_cursor: Option<String>,
}

/// The places of the values that these keys have in the object that `text` is; `None` if it is none.
fn find<const N: usize>(text: &[u8], names: [&str; N]) -> Option<[Option<Range<usize>>; N]> {
    json::whole(text, |walk| walk.find(names))
}

/// Shows the elements of the array that `text` is; `None` if it is none.
fn each_element<'a>(text: &'a [u8], mut each: impl FnMut(&'a [u8])) -> Option<()> {
    json::whole(text, |walk| {
        walk.elements(|walk| {
            each(&text[walk.value()?]);
            Some(())
        })
    })
}

fn cursors(text: &[u8], out: Option<Range<usize>>, input: Option<Range<usize>>) -> TranscriptCursors {
    let id = |place: Option<Range<usize>>| json::string(&text[place?], ID_MAX).map(Cow::into_owned);
    TranscriptCursors { last_out_event_id: id(out), last_in_event_id: id(input) }
}

/// The id of a message; `None` if it is no message.
fn own_id(message: &[u8]) -> Option<Cow<'_, str>> {
    if !message.starts_with(b"{") {
        return None;
    }
    let [id] = find(message, ["id"])?;
    json::string(&message[id?], ID_MAX).filter(|id| !id.is_empty())
}

/// The id and the message of an entry.
fn entry(line: &[u8]) -> Option<(Cow<'_, str>, Range<usize>)> {
    let [id, message] = find(line, ["id", "message"])?;
    let (id, message) = (json::string(&line[id?], ID_MAX)?, message?);
    (own_id(&line[message.clone()])? == id).then_some((id, message))
}

/// The newest messages of those that are shown to it, oldest first: no more than a page holds.
struct Newest<'a> {
    most: usize,
    before: Option<&'a str>,
    /// The message that ends the page has come.
    ended: bool,
    /// There are older ones than those that are kept.
    older: bool,
    bytes: u64,
    messages: VecDeque<Span>,
}

impl<'a> Newest<'a> {
    fn of(query: &'a TranscriptQuery) -> Self {
        Self::before(query.before.as_deref(), query.most())
    }

    fn before(before: Option<&'a str>, most: usize) -> Self {
        Self { most, before, ended: false, older: false, bytes: 0, messages: VecDeque::new() }
    }

    fn see(&mut self, id: &str, place: &Range<usize>) {
        self.ended |= self.before == Some(id);
        let Some(span) = Span::of(place).filter(|_| !self.ended) else { return };
        self.bytes += span.length();
        self.messages.push_back(span);
        while self.messages.len() > self.most || (self.bytes > PAGE_BYTES && self.messages.len() > 1) {
            self.bytes -= self.messages.pop_front().map_or(0, Span::length);
            self.older = true;
        }
    }

    /// Every entry among the lines of this part of `text`.
    fn see_lines(&mut self, text: &[u8], part: Range<usize>) {
        let mut start = part.start;
        for line in text[part].split(|byte| *byte == b'\n') {
            if let Some((id, message)) = entry(line) {
                self.see(&id, &(start + message.start..start + message.end));
            }
            start += line.len() + 1;
        }
    }

    /// The page, whose messages stand in `text`, which begins at `base`.
    fn page(self, text: &[u8], base: u64, cursors: TranscriptCursors) -> Page {
        if self.before.is_some() && !self.ended {
            return Page { cursors, ..Page::default() };
        }
        let first = self.messages.front().filter(|_| self.older);
        let next_cursor = first.and_then(|span| own_id(span.in_text(text))).map(Cow::into_owned);
        Page { base, messages: self.messages.into(), cursors, next_cursor }
    }
}

/// The length of the index line, from the last bytes of a blob.
pub fn footer_length(tail: &[u8]) -> Option<u64> {
    let trailer = tail.len().checked_sub(TRAILER).map(|at| &tail[at..])?;
    let digits = trailer.strip_prefix(TRAILER_PREFIX)?.strip_suffix(b"\n")?;
    let digits = std::str::from_utf8(digits).ok()?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

/// Where the page is in a blob of version 2, by its index line, which begins at `end`: an empty range if there are no
/// such messages. `None` if the line cannot be the index of that blob.
pub fn window(line: &[u8], end: u64, query: &TranscriptQuery) -> Option<Window> {
    let [ids, offsets, out, input] = find(line, ["ids", "offsets", "lastOutEventId", "lastInEventId"])?;
    let (ids, offsets) = (&line[ids?], &line[offsets?]);
    // The last ones before the page ends, no more than a page may have.
    let (mut newest, mut count, mut stop, mut fits) = (VecDeque::new(), 0_usize, None, true);
    each_element(ids, |id| {
        fits &= id.starts_with(b"\"");
        let ends = query
            .before
            .as_deref()
            .is_some_and(|before| stop.is_none() && json::string(id, ID_MAX).is_some_and(|id| id == before));
        if ends {
            stop = Some(count);
        } else if stop.is_none() {
            newest.push_back(id);
            newest.keep_last(query.most());
        }
        count += 1;
    })?;
    let found = query.before.is_none() || stop.is_some();
    let stop = stop.unwrap_or(count);
    let (mut starts, mut seen, mut last) = (VecDeque::new(), 0_usize, None);
    each_element(offsets, |offset| {
        let offset = std::str::from_utf8(offset).ok().and_then(|digits| digits.parse::<u64>().ok());
        fits &= offset.is_some() && offset > last;
        last = offset;
        if seen <= stop {
            starts.push_back(offset.unwrap_or_default());
            starts.keep_last(newest.len() + 1);
        }
        seen += 1;
    })?;
    if !fits || seen != count + 1 || last > Some(end) {
        return None;
    }
    let cursors = cursors(line, out, input);
    if !found || newest.is_empty() {
        return Some(Window { range: 0..0, cursors, next_cursor: None });
    }
    let end = *starts.back()?;
    while newest.len() > 1 && end - starts[0] > PAGE_BYTES {
        newest.pop_front();
        starts.pop_front();
    }
    let next_cursor = match stop > newest.len() {
        true => Some(json::string(newest[0], ID_MAX)?.into_owned()),
        false => None,
    };
    Some(Window { range: starts[0]..end, cursors, next_cursor })
}

/// Keeps the end of a queue.
trait KeepLast {
    fn keep_last(&mut self, most: usize);
}

impl<T> KeepLast for VecDeque<T> {
    fn keep_last(&mut self, most: usize) {
        while self.len() > most {
            self.pop_front();
        }
    }
}

/// The page whose lines these are.
pub fn page_within(window: Window, lines: &[u8]) -> Page {
    // An index may call many lines one.
    let mut newest = Newest::before(None, PAGE_MESSAGES);
    newest.see_lines(lines, 0..lines.len());
    let mut page = newest.page(lines, window.range.start, window.cursors);
    page.next_cursor = page.next_cursor.or(window.next_cursor);
    page
}

/// The page of a whole blob of any version.
pub fn page(blob: &[u8], query: &TranscriptQuery) -> Page {
    read(blob, query).unwrap_or_default()
}

fn read(blob: &[u8], query: &TranscriptQuery) -> Option<Page> {
    if blob.starts_with(LINES_PREFIX) {
        let newline = blob.iter().position(|byte| *byte == b'\n')?;
        let (header, start) = (&blob[..newline], newline + 1);
        let [out, input] = find(header, ["lastOutEventId", "lastInEventId"])?;
        let index = footer_length(&blob[start..]).map(|length| length.saturating_add(1 + TRAILER as u64));
        let index = index.map_or(0, |length| usize::try_from(length).unwrap_or(usize::MAX));
        let mut newest = Newest::of(query);
        newest.see_lines(blob, start..blob.len().saturating_sub(index).max(start));
        return Some(newest.page(blob, 0, cursors(header, out, input)));
    }
    let (mut version, mut out, mut input) = (None, None, None);
    // Which of them counts is known at the end.
    let mut found: Option<[Newest<'_>; 2]> = None;
    json::whole(blob, |walk| {
        walk.members(|walk, key| {
            let is = |name| json::is_named(key, name);
            if is("messages") {
                let mut newest = [Newest::of(query), Newest::of(query)];
                walk.elements(|walk| element(walk, blob, &mut newest))?;
                found = Some(newest);
                return Some(());
            }
            let place = Some(walk.value()?);
            match () {
                () if is("version") => version = place,
                () if is("lastOutEventId") => out = place,
                () if is("lastInEventId") => input = place,
                () => {}
            }
            Some(())
        })
    })?;
    let [first, second] = found?;
    let newest = if version_of(&blob[version?])? == 1 { first } else { second };
    Some(newest.page(blob, 0, cursors(blob, out, input)))
}

/// Takes an element of `messages`: in version 1 a message, in version 2 an entry.
fn element<'a>(walk: &mut json::Walk<'a>, text: &'a [u8], newest: &mut [Newest<'_>; 2]) -> Option<()> {
    if !walk.is_at_object() {
        return walk.value().map(|_| ());
    }
    let start = walk.at();
    let [id, message] = walk.find(["id", "message"])?;
    let place = start..walk.at();
    let Some(id) = id.and_then(|id| json::string(&text[id], ID_MAX)).filter(|id| !id.is_empty()) else {
        return Some(());
    };
    newest[0].see(&id, &place);
    if let Some(message) = message {
        walk.go(message.start);
        let own = if walk.is_at_object() { walk.find(["id"])? } else { [None] };
        walk.go(place.end);
        let [own] = own.map(|own| json::string(&text[own?], ID_MAX));
        if own.is_some_and(|own| own == id) {
            newest[1].see(&id, &message);
        }
    }
    Some(())
}

/// 1 or 2.
fn version_of(text: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= VERSION_MAX)?;
    match text.parse::<f64>() {
        Ok(1.0) => Some(1),
        Ok(2.0) => Some(2),
        _ => None,
    }
}

impl Page {
    /// Bytes of its messages, with the commas between them.
    pub fn length(&self) -> u64 {
        let commas = self.messages.len().saturating_sub(1) as u64;
        self.messages.iter().map(|span| span.length()).sum::<u64>() + commas
    }

    /// Where in the blob its messages are, and what is between them.
    pub fn range(&self) -> Range<u64> {
        let place =
            |first: &Span, last: &Span| self.base + u64::from(first.start)..self.base + u64::from(last.end);
        self.messages.first().zip(self.messages.last()).map_or(0..0, |(first, last)| place(first, last))
    }

    /// Its messages out of the text that they were found in.
    pub fn messages(&self, text: &[u8]) -> Bytes {
        let mut joined = BytesMut::new();
        for (at, span) in self.messages.iter().enumerate() {
            if at > 0 {
                joined.put_u8(b',');
            }
            joined.extend_from_slice(span.in_text(text));
        }
        joined.freeze()
    }

    /// The page, whose messages come with `bytes`: the very ones, or with `cut` all of [`Page::range`].
    pub fn transcript(self, bytes: ByteStream, cut: bool) -> Transcript {
        let length = self.length();
        let bytes = if cut { Cutter::of(self.messages).cut(bytes) } else { bytes };
        let messages = Messages { length, bytes };
        Transcript { messages, cursors: self.cursors, next_cursor: self.next_cursor }
    }
}

/// Cuts messages out of a stream that begins with the first of them.
struct Cutter {
    /// Of one or more messages each: those of version 1 stand one comma apart already.
    runs: std::vec::IntoIter<Span>,
    run: Option<Span>,
    /// Where the next piece begins.
    at: u32,
}

impl Cutter {
    fn of(messages: Vec<Span>) -> Self {
        let first = messages.first().map_or(0, |span| span.start);
        let mut runs: Vec<Span> = Vec::new();
        for Span { start, end } in messages {
            match runs.last_mut() {
                Some(run) if run.end + 1 == start => run.end = end,
                _ => runs.push(Span { start, end }),
            }
        }
        runs.shrink_to_fit();
        let mut runs = runs.into_iter();
        Self { run: runs.next(), runs, at: first }
    }

    fn cut(mut self, bytes: ByteStream) -> ByteStream {
        let cut = bytes.map_ok(move |piece| self.take(&piece));
        cut.try_filter(|piece| future::ready(!piece.is_empty())).boxed()
    }

    /// What is kept of the next piece.
    fn take(&mut self, piece: &Bytes) -> Bytes {
        let start = self.at;
        let end = start.saturating_add(u32::try_from(piece.len()).unwrap_or(u32::MAX));
        let mut kept = BytesMut::new();
        while let Some(run) = self.run.filter(|run| run.start < end) {
            if run.start <= start && run.end > end {
                self.at = end;
                return piece.clone();
            }
            let here = (run.start.max(start) - start) as usize..(run.end.min(end) - start) as usize;
            kept.extend_from_slice(&piece[here]);
            if run.end > end {
                break;
            }
            self.run = self.runs.next();
            if self.run.is_some() {
                kept.put_u8(b',');
            }
        }
        self.at = end;
        kept.freeze()
    }
}

#[cfg(test)]
mod tests;
