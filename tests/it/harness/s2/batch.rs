//! What writers send: records, batches, frames, honest ones and others.

use bytes::Bytes;
use s2_api::v1::stream::proto::{AppendInput, AppendRecord, Header};
use s2_api::v1::stream::s2s::{CompressionAlgorithm, SessionMessage};
use serde_json::json;

/// A frame that is not compressed.
pub fn frame(input: &AppendInput) -> Bytes {
    compressed(CompressionAlgorithm::None, input)
}

/// A frame that is compressed if it is large enough.
pub fn compressed(algorithm: CompressionAlgorithm, input: &AppendInput) -> Bytes {
    SessionMessage::regular(algorithm, input).expect("fits a frame").encode()
}

/// A frame with these flags around this payload, whatever it is.
pub fn raw_frame(flags: u8, payload: &[u8]) -> Bytes {
    let length = u32::try_from(payload.len() + 1).expect("three bytes").to_be_bytes();
    [&length[1..], &[flags], payload].concat().into()
}

/// A record in protobuf.
pub fn record(headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> AppendRecord {
    let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    let headers = headers.iter().map(|(name, value)| Header { name: bytes(name), value: bytes(value) });
    AppendRecord { timestamp: None, headers: headers.collect(), body: Bytes::copy_from_slice(body.as_ref()) }
}

/// A batch of bodies.
pub fn batch<S: AsRef<str>>(bodies: &[S]) -> AppendInput {
    let records = bodies.iter().map(|body| record(&[], body.as_ref())).collect();
    AppendInput { records, match_seq_num: None, fencing_token: None }
}

/// A body as the SDK's writer makes it: a value with an id of its own.
pub fn envelope(data: &str, id: &str) -> String {
    json!({"data": data, "id": id}).to_string()
}
