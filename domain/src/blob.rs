//! Blobs: whole values beside the log, such as the snapshot that an agent writes after every turn.

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;

use super::error::Result;
use super::id::{EnvironmentId, SessionId};

/// Bytes as they come; it ends with its first error.
pub type ByteStream = BoxStream<'static, Result<Bytes>>;

/// Largest snapshot, in bytes.
pub const SNAPSHOT_MAX: u64 = 32 * 1024 * 1024;
/// Longest media type that is kept, in bytes of visible ASCII and spaces.
pub const MEDIA_TYPE_MAX: usize = 100;
/// What a blob is whose media type is not kept.
pub const UNKNOWN_MEDIA_TYPE: &str = "application/octet-stream";

/// The name of a blob: segments of letters, digits, `_` and `-`, joined with `/`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlobKey(String);

impl BlobKey {
    /// The snapshot of a session.
    pub fn snapshot(environment: &EnvironmentId, session: &SessionId) -> Self {
        Self(format!("{environment}/{session}/snapshot"))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a blob's media type is kept as.
pub fn media_type(text: Option<&str>) -> &str {
    let fits = |text: &&str| {
        (1..=MEDIA_TYPE_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ')
    };
    text.map(str::trim).filter(fits).unwrap_or(UNKNOWN_MEDIA_TYPE)
}

/// What there is to know of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its size in bytes.
    pub length: u64,
    /// Names this version of it, without quotes; another put has another one.
    pub etag: String,
    /// As it was put.
    pub media_type: String,
}

/// A blob that is being read.
pub struct Blob {
    /// Which version it is.
    pub info: BlobInfo,
    /// All its bytes, of this version, whatever is put meanwhile.
    pub bytes: ByteStream,
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blob").field("info", &self.info).finish_non_exhaustive()
    }
}

/// Values by key, whole.
///
/// A put replaces the whole value in one step: whoever reads meanwhile gets all of the old one or all of the new one,
/// and after kill -9 or power loss one of them is there. Once a put has returned, the new one is. Of two puts at once
/// one wins.
#[async_trait]
pub trait Blobs: Send + Sync {
    /// Stores all of `bytes`, of whatever length, under `key`. If the stream fails nothing is stored, and its error is
    /// returned as it is. Keeps no more than a few MiB in memory. Not to be dropped before it ends: what was
    /// transferred by then may stay as rubbish that nobody can see.
    async fn put(&self, key: &BlobKey, media_type: &str, bytes: ByteStream) -> Result<()>;

    /// What is stored under `key`.
    async fn find(&self, key: &BlobKey) -> Result<Option<BlobInfo>>;

    /// What is stored under `key`, with all its bytes.
    async fn read(&self, key: &BlobKey) -> Result<Option<Blob>>;

    /// Bytes of the version that `info` describes, which `range` must lie inside. `None` if another one has taken
    /// its place.
    async fn read_range(
        &self,
        key: &BlobKey,
        info: &BlobInfo,
        range: Range<u64>,
    ) -> Result<Option<ByteStream>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_media_type_is_kept_if_it_can_be() {
        for (given, kept) in [
            (Some("text/plain; charset=utf-8"), "text/plain; charset=utf-8"),
            (Some(" a/b "), "a/b"),
            (Some(""), UNKNOWN_MEDIA_TYPE),
            (Some("a\nb"), UNKNOWN_MEDIA_TYPE),
            (None, UNKNOWN_MEDIA_TYPE),
        ] {
            assert_eq!(media_type(given), kept);
        }
        let long = "x".repeat(MEDIA_TYPE_MAX + 1);
        assert_eq!(media_type(Some(&long)), UNKNOWN_MEDIA_TYPE);
        assert_eq!(media_type(Some(&long[1..])), &long[1..]);
    }
}
