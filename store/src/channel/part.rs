//! Part ids: what tells one content from another.

use bytes::Bytes;

use sessiond_domain::record::Header;

/// Half a SHA-256.
pub(crate) type Digest = [u8; 16];

/// Of headers and body, each with its length.
pub(crate) fn content_hash(headers: &[Header], body: &Bytes) -> Digest {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    let mut field = |bytes: &[u8]| {
        context.update(&(bytes.len() as u64).to_be_bytes());
        context.update(bytes);
    };
    for (name, value) in headers {
        field(name);
        field(value);
    }
    field(body);
    half(&context.finish())
}

/// Of a part id, so that a long one takes no more room than a short one.
pub(crate) fn id_hash(id: &str) -> Digest {
    half(&aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, id.as_bytes()))
}

fn half(digest: &aws_lc_rs::digest::Digest) -> Digest {
    let mut hash = [0; 16];
    hash.copy_from_slice(&digest.as_ref()[..16]);
    hash
}
