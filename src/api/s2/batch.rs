//! What a direct writer sends, read within bounds: never more records in memory than one batch may have.

use std::fmt;
use std::marker::PhantomData;

use bytes::{Buf, Bytes};
use prost::encoding::{DecodeContext, WireType, skip_field};
use prost::{DecodeError, Message};
use s2_api::data::Format;
use s2_api::v1::stream::{AppendRecord, Header, proto};
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::error;
use crate::api::error::Failure;
use crate::domain::record::BATCH_RECORDS_MAX;
use crate::domain::{DirectBatch, Error, NewRecord, Timestamp};

/// A batch in JSON.
///
/// # Errors
/// `bad_json`, and `invalid` for what is not in the format that it claims.
pub(super) fn from_json(bytes: &[u8], format: Format) -> Result<DirectBatch, Failure> {
    let input: JsonInput =
        serde_json::from_slice(bytes).map_err(|fault| error::bad("bad_json", fault.to_string()))?;
    let record = |record: AppendRecord| -> Option<NewRecord> {
        let decode = |text| format.decode(text).ok();
        let headers =
            record.headers.into_iter().map(|Header(name, value)| Some((decode(name)?, decode(value)?)));
        Some(NewRecord {
            headers: headers.collect::<Option<_>>()?,
            body: decode(record.body)?,
            timestamp: record.timestamp.map(timestamp),
            part_id: None,
        })
    };
    let records: Option<_> = input.records.0.into_iter().map(record).collect();
    let records = records.ok_or_else(|| error::refusal(Error::invalid("records", "must be base64")))?;
    Ok(DirectBatch { records, match_seq_num: input.match_seq_num, fencing_token: input.fencing_token })
}

/// A batch in protobuf.
///
/// # Errors
/// `bad_proto`.
pub(super) fn from_proto(bytes: Bytes) -> Result<DirectBatch, Failure> {
    let input = BoundedInput::decode(bytes).map_err(|fault| error::bad("bad_proto", fault.to_string()))?;
    Ok(input.into())
}

/// `AppendInput` in protobuf, which does not make room for more records than a batch may have.
#[derive(Debug, Default)]
pub(super) struct BoundedInput(proto::AppendInput);

impl Message for BoundedInput {
    fn encode_raw(&self, buf: &mut impl bytes::BufMut) {
        self.0.encode_raw(buf);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        // One over the limit is kept, for the refusal.
        if tag == 1 && self.0.records.len() > BATCH_RECORDS_MAX {
            return skip_field(wire_type, tag, buf, ctx);
        }
        self.0.merge_field(tag, wire_type, buf, ctx)
    }

    fn encoded_len(&self) -> usize {
        self.0.encoded_len()
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

impl From<BoundedInput> for DirectBatch {
    fn from(BoundedInput(input): BoundedInput) -> Self {
        let record = |record: proto::AppendRecord| NewRecord {
            headers: record.headers.into_iter().map(|header| (header.name, header.value)).collect(),
            body: record.body,
            timestamp: record.timestamp.map(timestamp),
            part_id: None,
        };
        Self {
            records: input.records.into_iter().map(record).collect(),
            match_seq_num: input.match_seq_num,
            fencing_token: input.fencing_token,
        }
    }
}

fn timestamp(millis: u64) -> Timestamp {
    Timestamp::from_millis(i64::try_from(millis).unwrap_or(i64::MAX))
}

#[derive(Deserialize)]
struct JsonInput {
    records: Bounded<AppendRecord>,
    #[serde(default)]
    match_seq_num: Option<u64>,
    #[serde(default)]
    fencing_token: Option<String>,
}

/// A list of records, which does not make room for more than a batch may have.
struct Bounded<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Bounded<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Read<T> {
            type Value = Bounded<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of records")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Bounded<T>, A::Error> {
                let mut items = Vec::new();
                // One over the limit is kept, for the refusal.
                while items.len() <= BATCH_RECORDS_MAX
                    && let Some(item) = seq.next_element()?
                {
                    items.push(item);
                }
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Bounded(items))
            }
        }

        deserializer.deserialize_seq(Read(PhantomData))
    }
}
