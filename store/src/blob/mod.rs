//! Blobs in a folder or in a bucket of any S3-compatible store.

mod open;
mod put;
mod sweep;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, GetOptions, GetRange, GetResult, GetResultPayload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions,
};
use tokio::io::AsyncReadExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::io::ReaderStream;

pub use open::S3Options;
use sessiond_domain::blob::{MEDIA_TYPE_MAX, UNKNOWN_MEDIA_TYPE};
use sessiond_domain::{Blob, BlobInfo, BlobKey, Blobs, ByteStream, Error, Result};

/// First bytes of a file of ours; the last one is the version of the format.
const MAGIC: &[u8] = b"sessiond-blob 1 ";
/// Bytes of a file before its content: the magic, the media type padded with spaces, a line feed.
const HEADER: usize = 128;
/// Bytes that are read of a file in one step.
const FILE_PIECE: usize = 64 * 1024;
/// How often a read begins again because a put came between.
const RETRIES: usize = 16;
/// Longest wait for others to be done.
const ROOM_PATIENCE: Duration = Duration::from_secs(10);

/// Where a blob's media type is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MediaType {
    /// With the object, by a store that can.
    Attribute,
    /// In front of the content, in the same file, because only so both change in one step.
    Header,
}

/// Blobs as objects.
#[derive(Clone, Debug)]
pub struct ObjectBlobs {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    media_type: MediaType,
    /// One permit for each blob that is being read: each has a file or a socket.
    reads: Arc<Semaphore>,
    /// And for each that is being written, so that neither takes the other's.
    writes: Arc<Semaphore>,
}

/// A fault of the store's.
fn away(error: object_store::Error) -> Error {
    Error::unavailable("the store of blobs", error)
}

/// `None` for what is not there, or not in the version that was asked for.
fn present<T>(result: object_store::Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(object_store::Error::NotFound { .. } | object_store::Error::Precondition { .. }) => Ok(None),
        Err(error) => Err(away(error)),
    }
}

/// The bytes of a blob, which is being read until they are dropped.
fn content(result: GetResult, room: OwnedSemaphorePermit) -> Result<ByteStream> {
    let bytes = match result.payload {
        GetResultPayload::File(file, _) => of_file(file, result.range)?,
        GetResultPayload::Stream(bytes) => bytes.map_err(away).boxed(),
    };
    let held = move |piece| {
        let _room = &room;
        piece
    };
    Ok(bytes.map(held).boxed())
}

/// Reads in larger pieces than the library does, because each piece waits for a thread.
fn of_file(mut file: File, range: Range<u64>) -> Result<ByteStream> {
    let fault = |error| Error::unavailable("the store of blobs", error);
    file.seek(SeekFrom::Start(range.start)).map_err(fault)?;
    let part = tokio::fs::File::from_std(file).take(range.end - range.start);
    Ok(ReaderStream::with_capacity(part, FILE_PIECE).map_err(fault).boxed())
}

/// Without its quotes, which only some stores write.
fn etag(meta: &ObjectMeta) -> Option<String> {
    meta.e_tag.as_deref().map(|etag| etag.trim_matches('"').to_owned())
}

/// The first bytes of a file whose content has this type, which is at most [`MEDIA_TYPE_MAX`] bytes.
fn header(media_type: &str) -> Bytes {
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&media_type.as_bytes()[..media_type.len().min(MEDIA_TYPE_MAX)]);
    header.resize(HEADER - 1, b' ');
    header.push(b'\n');
    header.into()
}

fn parse_header(header: &[u8]) -> Option<String> {
    let text = header.strip_prefix(MAGIC)?.strip_suffix(b"\n")?;
    (header.len() == HEADER).then_some(())?;
    Some(std::str::from_utf8(text).ok()?.trim_end().to_owned())
}

impl ObjectBlobs {
    /// Files or sockets that one blob takes while it is written or read: its own, and the folder's while that is synced.
    pub const FILES_EACH: u64 = 2;

    /// Writes and reads at most so many blobs at once, half of them each; further ones wait for a while.
    #[must_use]
    pub fn at_once(mut self, limit: usize) -> Self {
        let reads = Self::reads(limit);
        self.reads = Arc::new(Semaphore::new(reads.min(Semaphore::MAX_PERMITS)));
        self.writes = Arc::new(Semaphore::new((limit - reads).clamp(1, Semaphore::MAX_PERMITS)));
        self
    }

    /// How many of `limit` blobs may be read at once.
    pub fn reads(limit: usize) -> usize {
        limit.div_ceil(2)
    }

    async fn room(all: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit> {
        match timeout(ROOM_PATIENCE, all.clone().acquire_owned()).await {
            Ok(permit) => permit.map_err(Error::internal),
            Err(_) => {
                Err(Error::unavailable("the store of blobs", "too many blobs are written or read at once"))
            }
        }
    }

    fn path(&self, key: &BlobKey) -> Path {
        self.prefix.parts().chain(Path::from(key.as_str()).parts()).collect()
    }

    fn offset(&self) -> u64 {
        match self.media_type {
            MediaType::Attribute => 0,
            MediaType::Header => HEADER as u64,
        }
    }

    fn attributes(&self, media_type: &str) -> Attributes {
        match self.media_type {
            MediaType::Attribute => Attributes::from_iter([(Attribute::ContentType, media_type.to_owned())]),
            MediaType::Header => Attributes::new(),
        }
    }

    fn info(&self, meta: &ObjectMeta, media_type: Option<String>) -> Result<BlobInfo> {
        let etag = etag(meta);
        Ok(BlobInfo {
            length: meta.size.saturating_sub(self.offset()),
            etag: etag.ok_or_else(|| Error::internal("the store of blobs names no versions"))?,
            media_type: media_type.unwrap_or_else(|| UNKNOWN_MEDIA_TYPE.to_owned()),
        })
    }

    fn as_kept(result: &GetResult) -> Option<String> {
        result.attributes.get(&Attribute::ContentType).map(|value| value.to_string())
    }

    async fn find_in_file(&self, key: &BlobKey) -> Result<Option<BlobInfo>> {
        let _room = Self::room(&self.reads).await?;
        let range = Some(GetRange::Bounded(0..HEADER as u64));
        let options = GetOptions { range, ..GetOptions::default() };
        let Some(result) = present(self.store.get_opts(&self.path(key), options).await)? else {
            return Ok(None);
        };
        let meta = result.meta.clone();
        let header = result.bytes().await.map_err(away)?;
        let media_type = parse_header(&header)
            .ok_or_else(|| Error::internal(format!("{} is no file of ours", key.as_str())))?;
        self.info(&meta, Some(media_type)).map(Some)
    }
}

#[async_trait]
impl Blobs for ObjectBlobs {
    async fn put(&self, key: &BlobKey, media_type: &str, bytes: ByteStream) -> Result<()> {
        let _room = Self::room(&self.writes).await?;
        let attributes = self.attributes(media_type);
        let bytes = match self.media_type {
            MediaType::Attribute => bytes,
            MediaType::Header => stream::iter([Ok(header(media_type))]).chain(bytes).boxed(),
        };
        put::put(self.store.as_ref(), &self.path(key), attributes, bytes).await
    }

    async fn find(&self, key: &BlobKey) -> Result<Option<BlobInfo>> {
        if self.media_type == MediaType::Header {
            return self.find_in_file(key).await;
        }
        let _room = Self::room(&self.reads).await?;
        let options = GetOptions { head: true, ..GetOptions::default() };
        let found = present(self.store.get_opts(&self.path(key), options).await)?;
        found.map(|result| self.info(&result.meta, Self::as_kept(&result))).transpose()
    }

    async fn read(&self, key: &BlobKey) -> Result<Option<Blob>> {
        if self.media_type == MediaType::Attribute {
            let room = Self::room(&self.reads).await?;
            let found = present(self.store.get_opts(&self.path(key), GetOptions::default()).await)?;
            let Some(result) = found else { return Ok(None) };
            let info = self.info(&result.meta, Self::as_kept(&result))?;
            return Ok(Some(Blob { info, bytes: content(result, room)? }));
        }
        for _ in 0..RETRIES {
            let Some(info) = self.find(key).await? else { return Ok(None) };
            if let Some(bytes) = self.read_range(key, &info, 0..info.length).await? {
                return Ok(Some(Blob { info, bytes }));
            }
        }
        Err(Error::unavailable("the store of blobs", "the blob changed during every attempt to read it"))
    }

    async fn read_range(
        &self,
        key: &BlobKey,
        info: &BlobInfo,
        range: Range<u64>,
    ) -> Result<Option<ByteStream>> {
        if range.is_empty() {
            return Ok(Some(stream::empty().boxed()));
        }
        let options = GetOptions {
            range: Some(GetRange::Bounded(range.start + self.offset()..range.end + self.offset())),
            if_match: Some(format!("\"{}\"", info.etag)),
            ..GetOptions::default()
        };
        let room = Self::room(&self.reads).await?;
        let found = present(self.store.get_opts(&self.path(key), options).await)?;
        // Some stores do not know `If-Match`.
        let same = found.filter(|result| etag(&result.meta).as_ref() == Some(&info.etag));
        same.map(|result| content(result, room)).transpose()
    }
}

/// How an object is put, in one piece or in parts.
fn options(attributes: Attributes) -> (PutOptions, PutMultipartOptions) {
    (
        PutOptions { attributes: attributes.clone(), ..PutOptions::default() },
        PutMultipartOptions { attributes, ..PutMultipartOptions::default() },
    )
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, TryFutureExt};

    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let long = "x".repeat(MEDIA_TYPE_MAX);
        for text in ["", "application/json", &long] {
            let header = header(text);
            assert_eq!(header.len(), HEADER);
            assert_eq!(parse_header(&header).as_deref(), Some(text));
            assert_eq!(parse_header(&header[1..]), None);
            assert_eq!(parse_header(&header[..HEADER - 1]), None);
        }
    }

    #[tokio::test]
    async fn a_blob_over_the_limit_waits_until_another_one_of_its_kind_is_done() {
        let folder = tempfile::tempdir().expect("a folder");
        let blobs = ObjectBlobs::folder(folder.path()).expect("opens").at_once(1);
        let key = BlobKey::snapshot(
            &sessiond_domain::EnvironmentId::from_stored("env_a"),
            &sessiond_domain::SessionId::from_stored("session_a"),
        );
        let bytes = || stream::iter([Ok(Bytes::from_static(b"{}"))]).boxed();
        blobs.put(&key, "application/json", bytes()).await.expect("stored");
        let reading = blobs.read(&key).await.expect("answers").expect("is there");
        let mut waiting = [blobs.find(&key).map_ok(drop).boxed(), blobs.read(&key).map_ok(drop).boxed()];
        for waiting in &mut waiting {
            assert!(futures_util::poll!(waiting).is_pending());
        }
        blobs.put(&key, "application/json", bytes()).await.expect("stored beside what is read");
        let mut first = blobs.put(&key, "application/json", stream::pending().boxed());
        assert!(futures_util::poll!(&mut first).is_pending());
        let mut second = blobs.put(&key, "application/json", bytes());
        assert!(futures_util::poll!(&mut second).is_pending());
        drop(first);
        second.await.expect("its turn has come");
        drop(reading);
        // Together: each holds its place until it is polled again.
        futures_util::future::try_join_all(waiting).await.expect("their turns have come");
    }
}
