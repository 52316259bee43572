//! Snapshots: who may have a URL of one, what an upload stores, and the transcript inside.

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt};
use tracing::instrument;

use super::{Sessions, detached};
use crate::access::{Action, Caller, UNAUTHORIZED};
use crate::blob::{self, Blob, BlobInfo, BlobKey, ByteStream, SNAPSHOT_MAX};
use crate::error::{Error, Result};
use crate::id::{EnvironmentId, SessionId, SessionRef};
use crate::session::SharedSession;
use crate::transcript::{self, Footer, TRAILER, Transcript, TranscriptQuery};

/// Bytes at the end of a snapshot that are read first: mostly the whole index, often the whole snapshot.
const TAIL: u64 = 128 * 1024;
/// How often a read begins again because a put came between.
const RETRIES: usize = 16;

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

async fn collect(bytes: ByteStream) -> Result<Bytes> {
    let whole = bytes.try_fold(BytesMut::new(), async |mut whole, piece| {
        whole.extend_from_slice(&piece);
        Ok(whole)
    });
    Ok(whole.await?.freeze())
}

/// Parses on a thread that may take its time: a snapshot can have tens of MiB.
async fn parsed<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(Error::internal)
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
        range: std::ops::Range<u64>,
    ) -> Result<Option<ByteStream>> {
        self.blobs.read_range(&BlobKey::snapshot(environment, session), info, range).await
    }

    /// A page of the transcript in a session's snapshot; an empty one if there is no snapshot. Secret keys only.
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

    /// The page, from this version of the snapshot; `None` if another has taken its place. Reads no more than it
    /// needs where the snapshot has an index.
    async fn page_of(
        &self,
        key: &BlobKey,
        info: &BlobInfo,
        query: &TranscriptQuery,
    ) -> Result<Option<Transcript>> {
        let Some(tail) = self.bytes(key, info, info.length.saturating_sub(TAIL)..info.length).await? else {
            return Ok(None);
        };
        if tail.len() as u64 == info.length {
            let query = query.clone();
            return parsed(move || transcript::transcript(&tail, &query)).await.map(Some);
        }
        if let Some(index) = index_range(&tail, info) {
            let Some(line) = self.bytes(key, info, index.clone()).await? else { return Ok(None) };
            let footer = parsed(move || Footer::parse(&line, index.start)).await?;
            if let Some(footer) = footer {
                let window = footer.window(query);
                let range = window.as_ref().map_or(0..0, |window| window.range.clone());
                let Some(lines) = self.bytes(key, info, range).await? else { return Ok(None) };
                return parsed(move || footer.transcript(window, &lines)).await.map(Some);
            }
        }
        let Some(whole) = self.bytes(key, info, 0..info.length).await? else { return Ok(None) };
        let query = query.clone();
        parsed(move || transcript::transcript(&whole, &query)).await.map(Some)
    }

    async fn bytes(
        &self,
        key: &BlobKey,
        info: &BlobInfo,
        range: std::ops::Range<u64>,
    ) -> Result<Option<Bytes>> {
        match self.blobs.read_range(key, info, range).await? {
            Some(bytes) => collect(bytes).await.map(Some),
            None => Ok(None),
        }
    }
}

/// Where the index line is, without its line feed.
fn index_range(tail: &[u8], info: &BlobInfo) -> Option<std::ops::Range<u64>> {
    let end = info.length.checked_sub(TRAILER as u64 + 1)?;
    let start = end.checked_sub(transcript::footer_length(tail)?)?;
    Some(start..end)
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn pieces(sizes: &[usize]) -> ByteStream {
        let pieces: Vec<_> = sizes.iter().map(|size| Ok(Bytes::from(vec![0; *size]))).collect();
        stream::iter(pieces).boxed()
    }

    #[tokio::test]
    async fn the_limit_holds_to_the_byte() {
        let max = usize::try_from(SNAPSHOT_MAX).expect("fits");
        assert_eq!(collect(limited(pieces(&[max - 1, 1]))).await.expect("fits").len(), max);
        let over = collect(limited(pieces(&[max, 1]))).await.expect_err("over");
        assert!(matches!(over, Error::TooLarge { limit: SNAPSHOT_MAX, .. }));
    }
}
