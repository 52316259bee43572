//! The 256-byte JSON record that every server gets, and finding it again in whatever a server sends back.
//!
//! Each record carries a mark: `~`, its number in the channel, a dot, and the nanosecond at which it was sent. The
//! tilde occurs nowhere else in a record nor in any framing, and none of the mark needs escaping in JSON.

use std::sync::OnceLock;
use std::time::Instant;

/// Bytes of one record.
pub(crate) const LEN: usize = 256;

const TILDE: u8 = b'~';
const NUMBER: usize = 8;
const NANOS: usize = 16;
const MARK: usize = 1 + NUMBER + 1 + NANOS;
const BEFORE: &[u8] = br#"{"kind":"message","payload":{"role":"user","parts":[{"type":"text","text":""#;
const AFTER: &[u8] = br#""}]}}"#;
const FILLER: usize = LEN - BEFORE.len() - MARK - AFTER.len();

/// Tells whether `bytes` start with the whole answer to one request, and how long it is. An answer that is not a
/// success is an error.
pub(crate) type Answered = fn(&[u8]) -> anyhow::Result<Option<usize>>;

/// A whole request, rendered once; only the record in it changes, if it appends one.
#[derive(Clone)]
pub(crate) struct Request {
    bytes: Vec<u8>,
    /// Where the record's text begins.
    at: Option<usize>,
    /// Where the head says the record's number too.
    numbered_at: Option<usize>,
    pub(crate) answered: Answered,
}

impl Request {
    /// A request whose record stands between `head` and `end`.
    pub(crate) fn new(head: &[u8], end: &[u8], answered: Answered) -> Self {
        let mut bytes = Vec::with_capacity(head.len() + LEN + end.len());
        bytes.extend_from_slice(head);
        bytes.extend_from_slice(BEFORE);
        bytes.resize(bytes.len() + MARK + FILLER, b'.');
        bytes.extend_from_slice(AFTER);
        bytes.extend_from_slice(end);
        Self { bytes, at: Some(head.len() + BEFORE.len()), numbered_at: None, answered }
    }

    /// A request that appends nothing.
    pub(crate) fn plain(bytes: Vec<u8>, answered: Answered) -> Self {
        Self { bytes, at: None, numbered_at: None, answered }
    }

    /// Also writes the number of each record over the eight characters after `word` in the head.
    pub(crate) fn numbering(mut self, word: &[u8]) -> Self {
        let at = self.bytes.windows(word.len()).position(|bytes| bytes == word);
        self.numbered_at = at.map(|at| at + word.len());
        self
    }

    /// The request with record `number`, sent now.
    pub(crate) fn stamp(&mut self, number: u64) -> &[u8] {
        let Some(at) = self.at else { return &self.bytes };
        let text = &mut self.bytes[at..at + MARK + FILLER];
        text[0] = TILDE;
        digits(&mut text[1..=NUMBER], number);
        text[1 + NUMBER] = b'.';
        digits(&mut text[2 + NUMBER..MARK], nanos());
        let filler = filler();
        let from = number as usize * 131 % (filler.len() - FILLER);
        text[MARK..].copy_from_slice(&filler[from..from + FILLER]);
        if let Some(at) = self.numbered_at {
            digits(&mut self.bytes[at..at + NUMBER], number);
        }
        &self.bytes
    }
}

/// Nanoseconds since this process first asked.
pub(crate) fn nanos() -> u64 {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    u64::try_from(EPOCH.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// A record that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) number: u64,
    pub(crate) sent: u64,
}

/// Finds marks in a byte stream that arrives in pieces.
#[derive(Default)]
pub(crate) struct Marks {
    /// The start of a mark whose rest has not arrived.
    partial: Vec<u8>,
}

impl Marks {
    /// Hands every mark that ends in `bytes` to `on`.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], on: &mut dyn FnMut(Mark)) {
        if !self.partial.is_empty() {
            let missing = (MARK - self.partial.len()).min(bytes.len());
            self.partial.extend_from_slice(&bytes[..missing]);
            bytes = &bytes[missing..];
            if self.partial.len() < MARK {
                return;
            }
            on(parse(&self.partial));
            self.partial.clear();
        }
        while let Some(at) = find(bytes) {
            bytes = &bytes[at..];
            if bytes.len() < MARK {
                self.partial.extend_from_slice(bytes);
                return;
            }
            on(parse(bytes));
            // The filler is plain text: no mark can begin in it.
            bytes = &bytes[(MARK + FILLER).min(bytes.len())..];
        }
    }
}

/// Blocks of a size that the compiler turns into vector instructions.
fn find(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    for block in bytes.chunks(64) {
        if block.iter().fold(false, |found, byte| found | (*byte == TILDE)) {
            return block.iter().position(|byte| *byte == TILDE).map(|found| at + found);
        }
        at += block.len();
    }
    None
}

fn parse(mark: &[u8]) -> Mark {
    Mark { number: number(&mark[1..=NUMBER]), sent: number(&mark[2 + NUMBER..MARK]) }
}

fn number(digits: &[u8]) -> u64 {
    digits.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit.wrapping_sub(b'0') % 10))
}

fn digits(into: &mut [u8], mut value: u64) {
    for digit in into.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Text that does not compress to nothing, from a fixed xorshift sequence.
fn filler() -> &'static [u8] {
    static TEXT: OnceLock<Vec<u8>> = OnceLock::new();
    TEXT.get_or_init(|| {
        let letters = b"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789";
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        (0..64 * 1024)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                letters[(state % letters.len() as u64) as usize]
            })
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_found_wherever_the_stream_is_cut() {
        let mut request = Request::new(b"head", b"end", |_| Ok(None));
        let mut stream = request.stamp(7).to_vec();
        stream.extend_from_slice(request.stamp(8));
        for cut in 0..stream.len() {
            let mut seen = Vec::new();
            let mut marks = Marks::default();
            marks.feed(&stream[..cut], &mut |mark| seen.push(mark.number));
            marks.feed(&stream[cut..], &mut |mark| seen.push(mark.number));
            assert_eq!(seen, [7, 8], "cut at {cut}");
        }
    }

    #[test]
    fn a_record_is_256_bytes_of_json() {
        let mut request = Request::new(b"", b"", |_| Ok(None));
        let record = request.stamp(1);
        assert_eq!(record.len(), LEN);
        assert!(serde_json::from_slice::<serde_json::Value>(record).is_ok());
    }
}
