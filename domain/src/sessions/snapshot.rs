//! Snapshots: who may have a URL of one, what an upload stores, and the transcript inside.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::instrument;

use super::{Sessions, detached};
use crate::access::{Action, Caller, UNAUTHORIZED};
use crate::blob::{self, Blob, BlobInfo, BlobKey, ByteStream, SNAPSHOT_MAX};
use crate::error::{Error, Result};
use crate::id::{EnvironmentId, SessionId, SessionRef};
use crate::session::SharedSession;
use crate::transcript::{self, Page, TRAILER, Transcript, TranscriptQuery};

/// Bytes at the end of a snapshot that are read first: mostly the whole index, often the whole snapshot.
const TAIL: u64 = 128 * 1024;
/// How often a read begins again because a put came between.
const RETRIES: usize = 16;
/// Whole snapshots, or parts larger than [`TAIL`], that are in memory to be read at once.
const PARSES: u32 = 2;
/// Parts of at most [`TAIL`] that are in memory for each of those that is not.
const SMALL: u32 = 32;
/// Messages of at most so many bytes are answered out of what was read; more are read again as the client takes them.
const HELD: u64 = 64 * 1024;

/// Who may have a part of a snapshot in memory. Turns are given in the order in which they were asked for.
pub(super) struct Parses(Arc<Semaphore>);

/// A turn, until it is dropped.
struct Turn {
    _permit: Option<OwnedSemaphorePermit>,
    /// For so many bytes.
    bytes: u64,
}

impl Default for Parses {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new((PARSES * SMALL) as usize)))
    }
}

impl Parses {
    async fn turn(&self, bytes: u64) -> Turn {
        let (permits, bytes) = if bytes <= TAIL { (1, TAIL) } else { (SMALL, SNAPSHOT_MAX) };
        // Never closed, so there is always a permit.
        Turn { _permit: self.0.clone().acquire_many_owned(permits).await.ok(), bytes }
    }

    /// A turn for this many bytes in place of `turn`. What that one was for must not be in memory any more.
    async fn instead(&self, turn: Turn, bytes: u64) -> Turn {
        if bytes <= turn.bytes {
            return turn;
        }
        drop(turn);
        self.turn(bytes).await
    }
}

/// Refuses what is over the limit, once it is.
fn limited(bytes: ByteStream) -> ByteStream {
    let mut size = 0;
    let count = move |piece: Bytes| {
        size += piece.len() as u64;
        let fits = size <= SNAPSHOT_MAX;
        let refused = Error::TooLarge { what: "the snapshot", size, limit: SNAPSHOT_MAX };
        futures_util::future::ready(if fits { Ok(piece) } else { Err(refused) })
    };
    bytes.and_then(count).boxed()
}

/// All bytes, of which there are `length`.
async fn collect(bytes: ByteStream, length: usize) -> Result<Bytes> {
    let whole = bytes.try_fold(BytesMut::with_capacity(length), async |mut whole, piece| {
        whole.extend_from_slice(&piece);
        Ok(whole)
    });
    Ok(whole.await?.freeze())
}

/// Parses on a thread that may take its time: a snapshot can have tens of MiB. The turn ends with the work, even if
/// nobody waits for it any more.
async fn parsed<T: Send + 'static>(
    turn: Turn,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<(T, Turn)> {
    tokio::task::spawn_blocking(move || (work(), turn)).await.map_err(|cut| Error::interrupted(&cut))
}

async fn parse_whole(turn: Turn, blob: Bytes, query: &TranscriptQuery) -> Result<Found> {
    let query = query.clone();
    let page = move || with_few_messages(transcript::page(&blob, &query), &blob);
    parsed(turn, page).await.map(|(found, _)| found)
}

/// A page, and its messages if they are few.
type Found = (Page, Option<Bytes>);

fn with_few_messages(page: Page, text: &[u8]) -> Found {
    let few = (page.length() <= HELD).then(|| page.messages(text));
    (page, few)
}

impl Sessions {
    /// The session whose snapshot the caller may read or write. Closed and expired ones too: what is written after
    /// the last turn adds no record, and without it the transcript of a session would lack its end.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`].
    #[instrument(skip_all, name = "snapshot_url", fields(session.id = %address))]
    pub async fn with_snapshot(
        &self,
        caller: &Caller,
        action: Action,
        address: &SessionRef,
    ) -> Result<SharedSession> {
        self.present(caller, action, address).await?.ok_or(Error::NotFound("session"))
    }

    /// Replaces a session's snapshot. Whoever calls has been authorised by a signed URL.
    ///
    /// # Errors
    /// [`Error::TooLarge`] over [`SNAPSHOT_MAX`]; the stream's own; [`Error::Unavailable`]. The old snapshot stays.
    #[instrument(skip_all, name = "put_snapshot", fields(session.id = %session))]
    pub async fn put_snapshot(
        &self,
        environment: &EnvironmentId,
        session: &SessionId,
        media_type: Option<&str>,
        bytes: ByteStream,
    ) -> Result<()> {
        let (blobs, key) = (self.blobs.clone(), BlobKey::snapshot(environment, session));
        let media_type = blob::media_type(media_type).to_owned();
        // An upload that its client gives up must still be cleared away.
        detached(async move { blobs.put(&key, &media_type, limited(bytes)).await }).await
    }

    /// What a session's snapshot is; for whom a signed URL has authorised.
    ///
    /// # Errors
    /// [`Error::NotFound`] if none was put; [`Error::Unavailable`].
    pub async fn find_snapshot(&self, environment: &EnvironmentId, session: &SessionId) -> Result<BlobInfo> {
        let found = self.blobs.find(&BlobKey::snapshot(environment, session)).await?;
        found.ok_or(Error::NotFound("snapshot"))
    }

    /// A session's snapshot; for whom a signed URL has authorised.
    ///
    /// # Errors
    /// As [`Sessions::find_snapshot`].
    pub async fn read_snapshot(&self, environment: &EnvironmentId, session: &SessionId) -> Result<Blob> {
        let found = self.blobs.read(&BlobKey::snapshot(environment, session)).await?;
        found.ok_or(Error::NotFound("snapshot"))
    }

    /// Bytes of the version of a session's snapshot that `info` describes; `None` if another has taken its place.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn read_snapshot_range(
        &self,
        environment: &EnvironmentId,
        session: &SessionId,
        info: &BlobInfo,
        range: Range<u64>,
    ) -> Result<Option<ByteStream>> {
        self.blobs.read_range(&BlobKey::snapshot(environment, session), info, range).await
    }

    /// A page of the transcript in a session's snapshot; an empty one if there is no snapshot. Secret keys only. What
    /// the snapshot holds is its writer's: at most [`PARSES`] large ones are in memory at once, and of a page no more
    /// than its reader takes.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`], [`Error::Unavailable`].
    #[instrument(skip_all, name = "transcript", fields(session.id = %address))]
    pub async fn transcript(
        &self,
        caller: &Caller,
        address: &SessionRef,
        query: &TranscriptQuery,
    ) -> Result<Transcript> {
        if !caller.is_private() {
            return Err(UNAUTHORIZED);
        }
        let session = self.with_snapshot(caller, Action::Read, address).await?;
        let key = BlobKey::snapshot(&session.environment, &session.id);
        for _ in 0..RETRIES {
            let Some(info) = self.blobs.find(&key).await? else { return Ok(Transcript::default()) };
            if let Some(page) = self.page_of(&key, &info, query).await? {
                return Ok(page);
            }
        }
        Err(Error::unavailable("the snapshot", "it changed during every attempt to read it"))
    }

    /// The page, from this version of the snapshot; `None` if another has taken its place.
    async fn page_of(
        &self,
        key: &BlobKey,
        info: &BlobInfo,
        query: &TranscriptQuery,
    ) -> Result<Option<Transcript>> {
        let Some((page, few)) = self.find_page(key, info, query).await? else { return Ok(None) };
        if let Some(few) = few {
            return Ok(Some(page.transcript(stream::iter([Ok(few)]).boxed(), false)));
        }
        let bytes = self.blobs.read_range(key, info, page.range()).await?;
        Ok(bytes.map(|bytes| page.transcript(bytes, true)))
    }

    /// Where the page is. Reads no more than it needs where the snapshot has an index.
    async fn find_page(
        &self,
        key: &BlobKey,
        info: &BlobInfo,
        query: &TranscriptQuery,
    ) -> Result<Option<Found>> {
        if info.length > SNAPSHOT_MAX {
            // Not put through here.
            return Ok(Some((Page::default(), Some(Bytes::new()))));
        }
        let mut turn = self.parses.turn(TAIL).await;
        let end = info.length.saturating_sub(TAIL);
        let Some(tail) = self.bytes(key, info, end..info.length).await? else { return Ok(None) };
        if end == 0 {
            return parse_whole(turn, tail, query).await.map(Some);
        }
        let index = index_range(&tail, info);
        let in_tail = index.clone().and_then(|index| part(&tail, end, index));
        drop(tail);
        if let Some(index) = index {
            let line = match in_tail {
                Some(line) => Some(line),
                None => {
                    turn = self.parses.instead(turn, index.end - index.start).await;
                    self.bytes(key, info, index.clone()).await?
                }
            };
            let Some(line) = line else { return Ok(None) };
            let query = query.clone();
            let find = move || transcript::window(&line, index.start, &query);
            let (window, same) = parsed(turn, find).await?;
            turn = same;
            if let Some(window) = window {
                turn = self.parses.instead(turn, window.range.end - window.range.start).await;
                let Some(lines) = self.bytes(key, info, window.range.clone()).await? else { return Ok(None) };
                let within = move || with_few_messages(transcript::page_within(window, &lines), &lines);
                return parsed(turn, within).await.map(|(found, _)| Some(found));
            }
        }
        let turn = self.parses.instead(turn, info.length).await;
        let Some(blob) = self.bytes(key, info, 0..info.length).await? else { return Ok(None) };
        parse_whole(turn, blob, query).await.map(Some)
    }

    async fn bytes(&self, key: &BlobKey, info: &BlobInfo, range: Range<u64>) -> Result<Option<Bytes>> {
        let length = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or_default();
        match self.blobs.read_range(key, info, range).await? {
            Some(bytes) => collect(bytes, length).await.map(Some),
            None => Ok(None),
        }
    }
}

/// Where the index line is, without its line feed.
fn index_range(tail: &[u8], info: &BlobInfo) -> Option<Range<u64>> {
    let end = info.length.checked_sub(TRAILER as u64 + 1)?;
    let start = end.checked_sub(transcript::footer_length(tail)?)?;
    Some(start..end)
}

/// What stands at `range`, if all of it is in `text`, which begins at `start`.
fn part(text: &Bytes, start: u64, range: Range<u64>) -> Option<Bytes> {
    let place = |at: u64| usize::try_from(at.checked_sub(start)?).ok();
    let (from, to) = (place(range.start)?, place(range.end)?);
    (to <= text.len()).then(|| text.slice(from..to))
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn pieces(sizes: &[usize]) -> ByteStream {
        let pieces: Vec<_> = sizes.iter().map(|size| Ok(Bytes::from(vec![0; *size]))).collect();
        stream::iter(pieces).boxed()
    }

    #[tokio::test]
    async fn the_limit_holds_to_the_byte() {
        let max = usize::try_from(SNAPSHOT_MAX).expect("fits");
        assert_eq!(collect(limited(pieces(&[max - 1, 1])), max).await.expect("fits").len(), max);
        let over = collect(limited(pieces(&[max, 1])), max).await.expect_err("over");
        assert!(matches!(over, Error::TooLarge { limit: SNAPSHOT_MAX, .. }));
    }

    #[tokio::test]
    async fn a_turn_is_over_when_its_work_is_and_not_before() {
        let parses = Parses::default();
        let (first, second) = (parses.turn(SNAPSHOT_MAX).await, parses.turn(TAIL + 1).await);
        assert!(parses.turn(1).now_or_never().is_none(), "two are all there are");
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let given_up = Box::pin(parsed(first, move || ended.recv())).now_or_never();
        assert!(given_up.is_none());
        assert!(parses.turn(1).now_or_never().is_none(), "the work goes on");
        drop(end);
        let small = parses.turn(1).await;
        assert!(parses.turn(SNAPSHOT_MAX).now_or_never().is_none());
        let _large = parses.instead(small, TAIL + 1).await;
        drop(second);
        parses.turn(SNAPSHOT_MAX).await;
    }
}
