//! The contract of `Blobs`.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use sessiond::domain::{BlobKey, Blobs, ByteStream, EnvironmentId, Error, SessionId};
use sessiond::store::blob::{ObjectBlobs, S3Options};
use tempfile::TempDir;

use crate::contract::suite;

suite!("Blobs": [folder = Opened::folder, s3 = Opened::s3], [
    what_was_put_is_read,
    nothing_is_under_a_key_that_was_never_put,
    a_put_replaces_all_of_it_and_names_another_version,
    the_media_type_is_kept,
    any_range_of_a_version_is_read,
    a_range_of_a_version_that_is_gone_is_none,
    a_stream_that_fails_stores_nothing,
    readers_see_one_version_whole,
    sizes_around_the_part_are_stored_whole,
    the_largest_snapshot_is_stored,
    keys_are_apart,
]);

const PART: usize = 8 * 1024 * 1024;

/// An adapter over an empty place.
struct Opened {
    blobs: Arc<dyn Blobs>,
    _folder: Option<TempDir>,
}

impl std::ops::Deref for Opened {
    type Target = Arc<dyn Blobs>;

    fn deref(&self) -> &Arc<dyn Blobs> {
        &self.blobs
    }
}

impl Opened {
    async fn folder() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let blobs = ObjectBlobs::folder(&folder.path().join("made/by/us")).expect("opens");
        Self { blobs: Arc::new(blobs), _folder: Some(folder) }
    }

    async fn s3() -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        Self { blobs: Arc::new(ObjectBlobs::s3(&s3_options()).expect("opens")), _folder: None }
    }
}

/// A prefix of its own in the bucket of the test server.
fn s3_options() -> S3Options {
    let text = std::env::var("SESSIOND_TEST_S3").expect(
        "SESSIOND_TEST_S3 is not set: `cargo xtask test` starts an S3 server and sets it, so run the tests through it",
    );
    let url = url::Url::parse(&text).expect("http://key:secret@host:port/bucket");
    let bucket = url.path().trim_matches('/').to_owned();
    let secret = url.password().expect("a secret").to_owned();
    S3Options {
        bucket,
        prefix: format!("test-{}", uuid::Uuid::new_v4().simple()),
        endpoint: Some(format!("http://{}:{}", url.host_str().expect("a host"), url.port().expect("a port"))),
        region: Some("us-east-1".to_owned()),
        credentials: Some((url.username().to_owned().into(), secret.into())),
        allow_http: true,
    }
}

fn key(session: &str) -> BlobKey {
    BlobKey::snapshot(&EnvironmentId::from_stored("env_here"), &SessionId::from_stored(session))
}

fn pieces(bytes: &[u8], size: usize) -> ByteStream {
    let pieces: Vec<_> = bytes.chunks(size).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    stream::iter(pieces).boxed()
}

/// Bytes that no shifted copy equals.
fn content(seed: u8, size: usize) -> Vec<u8> {
    (0..size).map(|at| (at % 251) as u8 ^ seed ^ (at / 251 % 256) as u8).collect()
}

async fn put(blobs: &Opened, session: &str, bytes: &[u8]) {
    blobs.put(&key(session), "text/plain", pieces(bytes, 64 * 1024)).await.expect("stored");
}

async fn whole(bytes: ByteStream) -> Vec<u8> {
    bytes.try_collect::<Vec<_>>().await.expect("readable").concat()
}

async fn read(blobs: &Opened, session: &str) -> Option<Vec<u8>> {
    match blobs.read(&key(session)).await.expect("an answer") {
        Some(blob) => Some(whole(blob.bytes).await),
        None => None,
    }
}

async fn what_was_put_is_read(blobs: Opened) {
    for size in [0, 1, 1000] {
        let bytes = content(1, size);
        put(&blobs, "s", &bytes).await;
        let blob = blobs.read(&key("s")).await.expect("an answer").expect("a blob");
        assert_eq!(blob.info.length, size as u64);
        assert_eq!(blobs.find(&key("s")).await.expect("an answer"), Some(blob.info));
        assert!(whole(blob.bytes).await == bytes, "{size} bytes");
    }
}

async fn nothing_is_under_a_key_that_was_never_put(blobs: Opened) {
    assert!(blobs.find(&key("s")).await.expect("an answer").is_none());
    assert!(blobs.read(&key("s")).await.expect("an answer").is_none());
}

async fn a_put_replaces_all_of_it_and_names_another_version(blobs: Opened) {
    put(&blobs, "s", b"the first, which is longer").await;
    let first = blobs.find(&key("s")).await.expect("an answer").expect("a blob");
    put(&blobs, "s", b"the second").await;
    let second = blobs.find(&key("s")).await.expect("an answer").expect("a blob");
    assert_eq!(read(&blobs, "s").await.as_deref(), Some(&b"the second"[..]));
    assert_ne!(first.etag, second.etag);
    assert!(!second.etag.contains('"'));
}

async fn the_media_type_is_kept(blobs: Opened) {
    for (media_type, size) in [("application/vnd.trigger.transcript+ndjson", 3), ("a/b; c=d", PART + 1)] {
        let bytes = pieces(&content(1, size), 1 << 20);
        blobs.put(&key("s"), media_type, bytes).await.expect("stored");
        let found = blobs.find(&key("s")).await.expect("an answer").expect("a blob");
        assert_eq!(found.media_type, media_type);
        let read = blobs.read(&key("s")).await.expect("an answer").expect("a blob");
        assert_eq!(read.info.media_type, media_type);
    }
}

async fn any_range_of_a_version_is_read(blobs: Opened) {
    let bytes = content(3, 1000);
    put(&blobs, "s", &bytes).await;
    let info = blobs.find(&key("s")).await.expect("an answer").expect("a blob");
    for range in [0..1000, 0..1, 999..1000, 128..300, 0..0, 1000..1000] {
        let part = blobs.read_range(&key("s"), &info, range.clone()).await.expect("an answer");
        let part = whole(part.expect("the same version")).await;
        assert_eq!(part, bytes[range.start as usize..range.end as usize], "{range:?}");
    }
}

async fn a_range_of_a_version_that_is_gone_is_none(blobs: Opened) {
    put(&blobs, "s", b"the first").await;
    let info = blobs.find(&key("s")).await.expect("an answer").expect("a blob");
    put(&blobs, "s", b"the other").await;
    assert!(blobs.read_range(&key("s"), &info, 0..3).await.expect("an answer").is_none());
}

async fn a_stream_that_fails_stores_nothing(blobs: Opened) {
    put(&blobs, "s", b"the first").await;
    for size in [10, PART + 10] {
        let fails = stream::iter([Ok(Bytes::from(content(1, size))), Err(Error::malformed("body", "broke"))]);
        let error = blobs.put(&key("s"), "text/plain", fails.boxed()).await.expect_err("refused");
        assert!(matches!(&error, Error::Malformed(fault) if fault.message == "broke"), "{error:?}");
        assert_eq!(read(&blobs, "s").await.as_deref(), Some(&b"the first"[..]));
        let fails = stream::iter([Ok(Bytes::from(content(1, size))), Err(Error::malformed("body", "broke"))]);
        blobs.put(&key("new"), "text/plain", fails.boxed()).await.expect_err("refused");
        assert!(blobs.find(&key("new")).await.expect("an answer").is_none());
    }
}

async fn readers_see_one_version_whole(blobs: Opened) {
    let versions: Vec<_> = (0..4u8).map(|seed| content(seed * 50, 40_000 + usize::from(seed))).collect();
    put(&blobs, "s", &versions[0]).await;
    let writer = async {
        for round in 0..20 {
            put(&blobs, "s", &versions[round % versions.len()]).await;
        }
    };
    let reader = async {
        for _ in 0..40 {
            let seen = read(&blobs, "s").await.expect("a blob");
            assert!(versions.contains(&seen), "a mixture of {} bytes", seen.len());
        }
    };
    futures_util::join!(writer, reader);
}

async fn sizes_around_the_part_are_stored_whole(blobs: Opened) {
    for size in [PART - 128, PART - 1, PART, PART + 1, 2 * PART] {
        let bytes = content(7, size);
        put(&blobs, "s", &bytes).await;
        assert!(read(&blobs, "s").await.expect("a blob") == bytes, "{size} bytes");
    }
}

async fn keys_are_apart(blobs: Opened) {
    put(&blobs, "session_a", b"a").await;
    put(&blobs, "session_ab", b"ab").await;
    let elsewhere =
        BlobKey::snapshot(&EnvironmentId::from_stored("env_elsewhere"), &SessionId::from_stored("session_a"));
    assert!(blobs.find(&elsewhere).await.expect("an answer").is_none());
    assert_eq!(read(&blobs, "session_a").await.as_deref(), Some(&b"a"[..]));
    assert_eq!(read(&blobs, "session_ab").await.as_deref(), Some(&b"ab"[..]));
}

async fn the_largest_snapshot_is_stored(blobs: Opened) {
    let bytes = content(9, 4 * PART);
    blobs.put(&key("s"), "text/plain", pieces(&bytes, 64 * 1024)).await.expect("stored");
    assert!(read(&blobs, "s").await.expect("a blob") == bytes);
}
