//! Batches that come compressed: decoded within the limit of those that do not.

use std::io::Read;

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use http::StatusCode;
use http::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};
use zstd::stream::read::Decoder as ZstdDecoder;

use super::{BODY_MAX, error};
use crate::api::error::Failure;
use crate::api::extract::codings;
use crate::api::received::Received;
use crate::domain::{Code, ConnectionBudget, Error};

/// Largest window of zstd as a content coding (RFC 9659), as a power of two. Of it no more is used than is decoded.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;
/// Bytes that are decoded at once.
const PIECE: usize = 16 << 10;

/// What a batch may be compressed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Gzip,
    Zstd,
}

impl Coding {
    /// The one that a request names, if any.
    ///
    /// # Errors
    /// 415 for another one, or several.
    pub(super) fn of(headers: &HeaderMap) -> Result<Option<Self>, Failure> {
        let mut codings = codings(headers);
        let coding = match codings.next() {
            None => return Ok(None),
            Some(word) if word.eq_ignore_ascii_case("gzip") || word.eq_ignore_ascii_case("x-gzip") => {
                Self::Gzip
            }
            Some(word) if word.eq_ignore_ascii_case("zstd") => Self::Zstd,
            Some(_) => return Err(unsupported()),
        };
        if codings.next().is_some() { Err(unsupported()) } else { Ok(Some(coding)) }
    }

    /// The batch, in room that is kept until the request is answered. `word` is S2's for a batch that cannot be read.
    ///
    /// # Errors
    /// `word`; 413 if the batch is over the limit, of which no more than that was decoded; 503 without room.
    pub(super) fn decode(
        self,
        body: &[u8],
        budget: &ConnectionBudget,
        word: &'static str,
    ) -> Result<Bytes, Failure> {
        match self {
            Self::Gzip => read(MultiGzDecoder::new(body), budget, word),
            Self::Zstd => {
                let decoder = ZstdDecoder::with_buffer(body).and_then(|mut decoder| {
                    decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                    Ok(decoder)
                });
                read(decoder.map_err(|fault| error::refusal(Error::internal(fault)))?, budget, word)
            }
        }
    }
}

fn read(mut decoder: impl Read, budget: &ConnectionBudget, word: &'static str) -> Result<Bytes, Failure> {
    let (mut batch, mut piece) = (Vec::new(), vec![0; PIECE]);
    let mut room = Received::default();
    loop {
        let count = decoder.read(&mut piece);
        let count =
            count.map_err(|fault| error::bad(word, format!("the body cannot be decoded: {fault}")))?;
        if count == 0 {
            break;
        }
        if batch.len() + count > BODY_MAX {
            let message = format!("Request body too large: decoded it has more than {BODY_MAX} bytes");
            let failure = Failure::new(StatusCode::PAYLOAD_TOO_LARGE, Code::TooLarge.as_str(), message);
            return Err(error::reshaped(failure));
        }
        room.hold(budget, count, BODY_MAX).map_err(error::reshaped)?;
        batch.extend_from_slice(&piece[..count]);
    }
    if let Some(room) = room.into_room() {
        budget.keep(room);
    }
    Ok(batch.into())
}

fn unsupported() -> Failure {
    let message = "Content-Encoding must be gzip or zstd";
    let failure = Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message);
    error::reshaped(failure.header(ACCEPT_ENCODING, HeaderValue::from_static("gzip, zstd")))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use http::header::CONTENT_ENCODING;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::domain::SendBudget;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).expect("memory takes it");
        encoder.finish().expect("memory takes it")
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::stream::encode_all(bytes, 0).expect("memory takes it")
    }

    #[test]
    fn one_coding_that_is_known_is_taken() {
        for (lines, coding) in [
            (&[][..], Ok(None)),
            (&["identity"], Ok(None)),
            (&[""], Ok(None)),
            (&["gzip"], Ok(Some(Coding::Gzip))),
            (&["X-GZIP"], Ok(Some(Coding::Gzip))),
            (&[" identity , Zstd"], Ok(Some(Coding::Zstd))),
            (&["br"], Err(415)),
            (&["gzip, zstd"], Err(415)),
            (&["gzip", "gzip"], Err(415)),
            (&["\u{e9}"], Err(415)),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(CONTENT_ENCODING, HeaderValue::from_bytes(line.as_bytes()).expect("a value"));
            }
            let found = Coding::of(&headers).map_err(|failure| failure.status.as_u16());
            assert_eq!(found, coding, "{lines:?}");
        }
    }

    proptest! {
        #[test]
        fn what_was_encoded_comes_back_and_anything_else_is_refused(
            bytes in vec(any::<u8>(), 0..2000),
            cut in any::<prop::sample::Index>(),
        ) {
            let budget = SendBudget::new(0, 1).connection();
            for (coding, encoded) in [(Coding::Gzip, gzip(&bytes)), (Coding::Zstd, zstd(&bytes))] {
                prop_assert_eq!(&coding.decode(&encoded, &budget, "bad_json").expect("a batch"), &bytes);
                let short = &encoded[..cut.index(encoded.len())];
                if !short.is_empty() {
                    let refused = coding.decode(short, &budget, "bad_proto").expect_err("cut short");
                    prop_assert_eq!((refused.status.as_u16(), refused.code), (400, "bad_proto"));
                }
                if let Err(refused) = coding.decode(&bytes, &budget, "bad_json") {
                    prop_assert!(matches!(refused.status.as_u16(), 400 | 413));
                }
            }
        }
    }

    #[test]
    fn a_batch_of_exactly_the_limit_fits_and_no_byte_more() {
        let budget = SendBudget::new(64 << 20, 1);
        let connection = budget.connection();
        for (coding, encode) in
            [(Coding::Gzip, gzip as fn(&[u8]) -> Vec<u8>), (Coding::Zstd, zstd as fn(&[u8]) -> Vec<u8>)]
        {
            let fits = coding.decode(&encode(&vec![7; BODY_MAX]), &connection, "bad_json").expect("fits");
            assert_eq!(fits.len(), BODY_MAX);
            for size in [BODY_MAX + 1, 64 << 20] {
                let refused =
                    coding.decode(&encode(&vec![7; size]), &connection, "bad_json").expect_err("over");
                assert_eq!((refused.status.as_u16(), refused.code), (413, "too_large"));
            }
            connection.answered();
        }
        assert_eq!(budget.lent(), 0);
    }
}
