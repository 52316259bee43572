//! One put: small values in one request, larger ones in parts that become visible together.

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::path::Path;
use object_store::{Attributes, MultipartUpload, ObjectStore, PutPayload};

use super::{away, options};
use sessiond_domain::{ByteStream, Result};

/// Size of every part but the last, as some stores demand; S3 takes none under 5 MiB.
const PART: usize = 8 * 1024 * 1024;

/// Bytes that wait to become a part.
struct Parts {
    bytes: ByteStream,
    waiting: Vec<Bytes>,
    size: usize,
    ended: bool,
}

impl Parts {
    /// The next part: [`PART`] bytes, or fewer at the end.
    async fn next(&mut self) -> Result<PutPayload> {
        while self.size < PART && !self.ended {
            match self.bytes.next().await.transpose()? {
                Some(piece) => {
                    self.size += piece.len();
                    self.waiting.push(piece);
                }
                None => self.ended = true,
            }
        }
        let mut part = std::mem::take(&mut self.waiting);
        let surplus = self.size.saturating_sub(PART);
        if surplus > 0
            && let Some(last) = part.last_mut()
        {
            self.waiting.push(last.split_off(last.len() - surplus));
        }
        self.size = surplus;
        Ok(part.into_iter().collect())
    }

    fn is_over(&self) -> bool {
        self.ended && self.size == 0
    }
}

/// Stores all of `bytes`, or nothing.
pub(super) async fn put(
    store: &dyn ObjectStore,
    path: &Path,
    attributes: Attributes,
    bytes: ByteStream,
) -> Result<()> {
    let mut parts = Parts { bytes, waiting: Vec::new(), size: 0, ended: false };
    let first = parts.next().await?;
    let (whole, in_parts) = options(attributes);
    if parts.is_over() {
        return store.put_opts(path, first, whole).await.map(drop).map_err(away);
    }
    let mut upload = store.put_multipart_opts(path, in_parts).await.map_err(away)?;
    let sent = send(upload.as_mut(), first, &mut parts).await;
    if sent.is_err()
        && let Err(error) = upload.abort().await
    {
        tracing::warn!(error = &error as &dyn std::error::Error, "cannot take back parts of a blob");
    }
    sent
}

async fn send(upload: &mut dyn MultipartUpload, first: PutPayload, parts: &mut Parts) -> Result<()> {
    upload.put_part(first).await.map_err(away)?;
    while !parts.is_over() {
        let part = parts.next().await?;
        if part.content_length() > 0 {
            upload.put_part(part).await.map_err(away)?;
        }
    }
    upload.complete().await.map(drop).map_err(away)
}
