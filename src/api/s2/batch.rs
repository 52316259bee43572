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

#[cfg(test)]
pub(super) mod tests {
    use data_encoding::BASE64;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::domain::record::Header as Pair;

    /// Batches of any bytes, small ones and some with too many records.
    pub fn batches() -> impl Strategy<Value = proto::AppendInput> {
        let bytes = || vec(any::<u8>(), 0..40).prop_map(Bytes::from);
        let header = (bytes(), bytes()).prop_map(|(name, value)| proto::Header { name, value });
        let record = (any::<Option<u64>>(), vec(header, 0..4), bytes())
            .prop_map(|(timestamp, headers, body)| proto::AppendRecord { timestamp, headers, body });
        let records = prop_oneof![
            9 => vec(record, 0..8),
            1 => (900..1200_usize).prop_map(|count| vec![proto::AppendRecord::default(); count]),
        ];
        (records, any::<Option<u64>>(), any::<Option<String>>()).prop_map(
            |(records, match_seq_num, fencing_token)| proto::AppendInput {
                records,
                match_seq_num,
                fencing_token,
            },
        )
    }

    /// What a batch is to become, whatever carried it.
    pub fn expected(input: &proto::AppendInput) -> Vec<(Vec<Pair>, Bytes, Option<Timestamp>)> {
        let pair = |header: &proto::Header| (header.name.clone(), header.value.clone());
        let record = |record: &proto::AppendRecord| {
            let headers = record.headers.iter().map(pair).collect();
            (headers, record.body.clone(), record.timestamp.map(timestamp))
        };
        // One over the limit is kept, so that the batch is refused.
        input.records.iter().take(BATCH_RECORDS_MAX + 1).map(record).collect()
    }

    /// Holds a batch that was read against what was sent.
    pub fn check(read: &DirectBatch, input: &proto::AppendInput) -> Result<(), TestCaseError> {
        let records: Vec<_> = read
            .records
            .iter()
            .map(|record| (record.headers.clone(), record.body.clone(), record.timestamp))
            .collect();
        prop_assert!(records == expected(input));
        prop_assert!(read.records.iter().all(|record| record.part_id.is_none()));
        prop_assert_eq!(read.match_seq_num, input.match_seq_num);
        prop_assert_eq!(&read.fencing_token, &input.fencing_token);
        Ok(())
    }

    fn json(input: &proto::AppendInput, text: impl Fn(&[u8]) -> String) -> Value {
        let record = |record: &proto::AppendRecord| {
            let headers =
                record.headers.iter().map(|header| json!([text(&header.name), text(&header.value)]));
            let headers: Vec<_> = headers.collect();
            json!({"timestamp": record.timestamp, "headers": headers, "body": text(&record.body)})
        };
        let records: Vec<_> = input.records.iter().map(record).collect();
        json!({
            "records": records,
            "match_seq_num": input.match_seq_num,
            "fencing_token": input.fencing_token,
        })
    }

    proptest! {
        #[test]
        fn a_batch_in_protobuf_comes_through_whole(input in batches()) {
            check(&from_proto(input.encode_to_vec().into()).expect("a batch"), &input)?;
        }

        #[test]
        fn a_batch_in_json_comes_through_whole(mut input in batches()) {
            let coded = json(&input, |bytes| BASE64.encode(bytes)).to_string();
            check(&from_json(coded.as_bytes(), Format::Base64).expect("a batch"), &input)?;
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let raw = json(&input, text).to_string();
            for record in &mut input.records {
                record.body = text(&record.body).into();
                for header in &mut record.headers {
                    (header.name, header.value) = (text(&header.name).into(), text(&header.value).into());
                }
            }
            check(&from_json(raw.as_bytes(), Format::Raw).expect("a batch"), &input)?;
        }

        #[test]
        fn any_bytes_are_a_batch_or_a_refusal(bytes in vec(any::<u8>(), 0..400), base64 in any::<bool>()) {
            let format = if base64 { Format::Base64 } else { Format::Raw };
            for read in [from_proto(bytes.clone().into()), from_json(&bytes, format)] {
                match read {
                    Ok(batch) => prop_assert!(batch.records.len() <= BATCH_RECORDS_MAX + 1),
                    Err(refused) => prop_assert!(matches!(refused.status.as_u16(), 400 | 422)),
                }
            }
        }

        #[test]
        fn a_batch_that_was_damaged_is_a_batch_or_a_refusal(
            input in batches(),
            place in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            keep in any::<prop::sample::Index>(),
        ) {
            for mut bytes in [input.encode_to_vec(), json(&input, |bytes| BASE64.encode(bytes)).to_string().into()] {
                if !bytes.is_empty() {
                    let place = place.index(bytes.len());
                    bytes[place] = byte;
                    bytes.truncate(keep.index(bytes.len()) + 1);
                }
                for batch in [from_json(&bytes, Format::Base64), from_proto(bytes.into())].into_iter().flatten() {
                    prop_assert!(batch.records.len() <= BATCH_RECORDS_MAX + 1);
                }
            }
        }
    }

    #[test]
    fn two_mebibytes_of_empty_records_are_never_held() {
        let proto = [0x0a, 0].repeat(1 << 20);
        let json = format!("{{\"records\":[{{}}{}]}}", ",{}".repeat(690_000));
        for read in [from_proto(proto.into()), from_json(json.as_bytes(), Format::Raw)] {
            let records = read.expect("a batch").records;
            assert_eq!(records.len(), BATCH_RECORDS_MAX + 1);
            assert!(records.capacity() <= 4 * BATCH_RECORDS_MAX, "{}", records.capacity());
        }
    }
}
