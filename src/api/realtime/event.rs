//! The bytes of SSE events and of JSON text, written by hand: every delivered record passes here.

use std::io::Write;

use bytes::Bytes;

use crate::domain::{Position, Record};

/// What clients take for the clean end of a stream.
pub const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// Why a stream ends cleanly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The session is closed.
    Closed,
    /// The session has expired.
    Expired,
    /// The turn was complete, and the caller wanted no more than that.
    Settled,
    /// No record came for as long as the caller wanted to wait.
    Idle,
    /// The caller's token has ended; with a new one there may be more.
    TokenExpired,
}

impl End {
    /// The `end` event, and behind it [`DONE`], but not where the client shall ask for a new token and go on.
    pub fn event(self) -> Bytes {
        let reason = match self {
            Self::Closed => "closed",
            Self::Expired => "expired",
            Self::Settled => "settled",
            Self::Idle => "idle",
            Self::TokenExpired => "token_expired",
        };
        let mut out = format!("event: end\ndata: {{\"reason\":\"{reason}\"}}\n\n").into_bytes();
        if self != Self::TokenExpired {
            out.extend_from_slice(&DONE);
        }
        out.into()
    }
}

/// A `batch` event. Its id is `seq,count,bytes` over the channel's whole life, so that it is the same for every
/// follower.
pub fn batch(records: &[Record], tail: Option<Position>) -> Bytes {
    let bodies: usize = records.iter().map(|record| record.body.len() + record.body.len() / 4 + 80).sum();
    let mut out = Vec::with_capacity(bodies + 160);
    out.extend_from_slice(b"event: batch\n");
    if let Some(last) = records.last() {
        let seq = last.position.seq_num;
        put(&mut out, format_args!("id: {seq},{},{}\n", seq + 1, last.metered_end));
    }
    out.extend_from_slice(b"data: {\"records\":[");
    for (index, record) in records.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write_record(&mut out, record);
    }
    out.push(b']');
    if let Some(tail) = tail {
        put(&mut out, format_args!(",{}", TailField(tail)));
    }
    out.extend_from_slice(b"}\n\n");
    Bytes::from(out)
}

/// A `ping` event.
pub fn ping(now: i64, tail: Position) -> Bytes {
    Bytes::from(format!("event: ping\ndata: {{\"timestamp\":{now},{}}}\n\n", TailField(tail)))
}

/// An `error` event; the stream then ends uncleanly.
pub fn error(body: &serde_json::Value) -> Bytes {
    Bytes::from(format!("event: error\ndata: {body}\n\n"))
}

struct TailField(Position);

impl std::fmt::Display for TailField {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Position { seq_num, timestamp } = self.0;
        write!(f, "\"tail\":{{\"seq_num\":{seq_num},\"timestamp\":{}}}", timestamp.millis())
    }
}

fn write_record(out: &mut Vec<u8>, record: &Record) {
    let Position { seq_num, timestamp } = record.position;
    put(out, format_args!("{{\"seq_num\":{seq_num},\"timestamp\":{}", timestamp.millis()));
    if !record.headers.is_empty() {
        out.extend_from_slice(b",\"headers\":");
        write_headers(out, record);
    }
    if !record.body.is_empty() {
        out.extend_from_slice(b",\"body\":");
        write_text(out, &record.body);
    }
    out.push(b'}');
}

/// A record's headers as an array of pairs.
pub fn write_headers(out: &mut Vec<u8>, record: &Record) {
    for (index, (name, value)) in record.headers.iter().enumerate() {
        out.extend_from_slice(if index == 0 { b"[[" } else { b",[" });
        write_text(out, name);
        out.push(b',');
        write_text(out, value);
        out.push(b']');
    }
    out.push(b']');
}

/// Formats into a buffer; writing to memory cannot fail.
fn put(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(text);
}

/// Bytes as a JSON string; what is not UTF-8 becomes U+FFFD.
pub fn write_text(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'"');
    match std::str::from_utf8(bytes) {
        Ok(text) => escape(out, text.as_bytes()),
        Err(_) => escape(out, String::from_utf8_lossy(bytes).as_bytes()),
    }
    out.push(b'"');
}

/// What stands after the backslash; 0 for bytes that stand for themselves, `u` for a code.
const ESCAPES: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 0x20 {
        table[byte] = b'u';
        byte += 1;
    }
    table[b'\n' as usize] = b'n';
    table[b'\r' as usize] = b'r';
    table[b'\t' as usize] = b't';
    table[0x08] = b'b';
    table[0x0c] = b'f';
    table[b'"' as usize] = b'"';
    table[b'\\' as usize] = b'\\';
    table
};

fn escape(out: &mut Vec<u8>, text: &[u8]) {
    const HEX: [u8; 16] = *b"0123456789abcdef";
    let mut begin = 0;
    for (at, byte) in text.iter().enumerate() {
        let escape = ESCAPES[usize::from(*byte)];
        if escape == 0 {
            continue;
        }
        out.extend_from_slice(&text[begin..at]);
        begin = at + 1;
        if escape == b'u' {
            let (high, low) = (usize::from(byte >> 4), usize::from(byte & 15));
            out.extend_from_slice(&[b'\\', b'u', b'0', b'0', HEX[high], HEX[low]]);
        } else {
            out.extend_from_slice(&[b'\\', escape]);
        }
    }
    out.extend_from_slice(&text[begin..]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::Timestamp;

    fn record(seq_num: u64, headers: &[(&'static str, &'static str)], body: &'static [u8]) -> Record {
        Record {
            position: Position { seq_num, timestamp: Timestamp::from_millis(5) },
            headers: headers.iter().map(|(n, v)| (Bytes::from(*n), Bytes::from(*v))).collect(),
            body: Bytes::from_static(body),
            metered_end: 100 + seq_num,
        }
    }

    #[test]
    fn a_batch_reads_exactly_as_the_contract_says() {
        let records =
            [record(3, &[], b"{\"a\":\"\n\xff\"}"), record(4, &[("trigger-control", "turn-complete")], b"")];
        let tail = Position { seq_num: 5, timestamp: Timestamp::from_millis(5) };
        let text = batch(&records, Some(tail));
        let expected = concat!(
            "event: batch\nid: 4,5,104\n",
            r#"data: {"records":[{"seq_num":3,"timestamp":5,"body":"{\"a\":\"\n"#,
            "\u{fffd}",
            r#"\"}"},"#,
            r#"{"seq_num":4,"timestamp":5,"headers":[["trigger-control","turn-complete"]]}],"#,
            r#""tail":{"seq_num":5,"timestamp":5}}"#,
            "\n\n"
        );
        assert_eq!(std::str::from_utf8(&text).expect("UTF-8"), expected);
        let ping = ping(7, tail);
        assert_eq!(ping, "event: ping\ndata: {\"timestamp\":7,\"tail\":{\"seq_num\":5,\"timestamp\":5}}\n\n");
    }

    proptest! {
        #[test]
        fn any_text_comes_back_from_its_json(text in any::<String>()) {
            let mut out = Vec::new();
            write_text(&mut out, text.as_bytes());
            prop_assert_eq!(serde_json::from_slice::<String>(&out).expect("JSON"), text);
        }

        #[test]
        fn no_bytes_break_the_line(bytes in any::<Vec<u8>>()) {
            let mut out = Vec::new();
            write_text(&mut out, &bytes);
            prop_assert!(!out.contains(&b'\n') && !out.contains(&b'\r'));
            prop_assert_eq!(serde_json::from_slice::<String>(&out).expect("JSON"), String::from_utf8_lossy(&bytes));
        }
    }
}
