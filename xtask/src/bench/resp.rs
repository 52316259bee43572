//! As much of Redis' protocol as a load generator needs.

use anyhow::{Context, bail};

use super::record::{Mark, Marks};
use super::target::Reader;

/// A command in wire form.
pub(crate) fn command(words: &[&str]) -> Vec<u8> {
    let mut text = format!("*{}\r\n", words.len());
    for word in words {
        text.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    text.into_bytes()
}

/// Length of the whole reply at the start of `bytes`, which must not be an error.
pub(crate) fn answered(bytes: &[u8]) -> anyhow::Result<Option<usize>> {
    walk(bytes, 0, &mut |_| ())
}

/// Walks one value from `at`, hands every string in it to `on`, and tells where it ends if it is all there.
pub(crate) fn walk<'a>(
    bytes: &'a [u8],
    at: usize,
    on: &mut dyn FnMut(&'a [u8]),
) -> anyhow::Result<Option<usize>> {
    let Some(line) = bytes[at..].iter().position(|byte| *byte == b'\n').map(|end| &bytes[at..at + end + 1])
    else {
        return Ok(None);
    };
    let text = std::str::from_utf8(line).context("a reply line is not text")?.trim_end();
    let mut next = at + line.len();
    match line[0] {
        b'+' | b':' => on(&bytes[at + 1..at + text.len()]),
        b'-' => bail!("redis answered {text}"),
        b'$' => {
            if let Ok(length) = text[1..].parse::<usize>() {
                if bytes.len() < next + length + 2 {
                    return Ok(None);
                }
                on(&bytes[next..next + length]);
                next += length + 2;
            }
        }
        b'*' => {
            for _ in 0..text[1..].parse::<usize>().unwrap_or(0) {
                match walk(bytes, next, on)? {
                    Some(end) => next = end,
                    None => return Ok(None),
                }
            }
        }
        _ => bail!("not a reply: {text}"),
    }
    Ok(Some(next))
}

/// Reads a stream by asking again and again, each time for what follows the last entry.
pub(crate) struct Entries {
    key: String,
    last: String,
    ask: Ask,
    buffer: Vec<u8>,
    marks: Marks,
}

/// How to ask.
#[derive(Clone, Copy)]
pub(crate) enum Ask {
    /// `XREAD BLOCK 0`: waits for the next entry.
    Block,
    /// `XRANGE` in pages of 1000.
    Page,
}

impl Entries {
    /// All entries of `key`, from its first.
    pub(crate) fn new(key: &str, ask: Ask) -> Self {
        let (key, last) = (key.to_owned(), "0-0".to_owned());
        Self { key, last, ask, buffer: Vec::new(), marks: Marks::default() }
    }
}

impl Reader for Entries {
    fn request(&self) -> Vec<u8> {
        match self.ask {
            Ask::Block => command(&["XREAD", "BLOCK", "0", "STREAMS", &self.key, &self.last]),
            Ask::Page => command(&["XRANGE", &self.key, &format!("({}", self.last), "+", "COUNT", "1000"]),
        }
    }

    fn ready(&self) -> bool {
        true
    }

    fn feed(&mut self, bytes: &[u8], on: &mut dyn FnMut(Mark)) -> anyhow::Result<Option<Vec<u8>>> {
        self.buffer.extend_from_slice(bytes);
        // An entry is its id, a field name and the record; XREAD puts the key before the entries.
        let skip = usize::from(matches!(self.ask, Ask::Block));
        let mut strings = 0;
        let mut last: &[u8] = &[];
        let marks = &mut self.marks;
        let mut records = Vec::new();
        let end = walk(&self.buffer, 0, &mut |string| {
            if strings >= skip {
                match (strings - skip) % 3 {
                    0 => last = string,
                    2 => records.push(string),
                    _ => (),
                }
            }
            strings += 1;
        })?;
        let Some(end) = end else { return Ok(None) };
        for record in records {
            marks.feed(record, on);
        }
        if !last.is_empty() {
            self.last = std::str::from_utf8(last)?.to_owned();
        }
        self.buffer.drain(..end);
        Ok(Some(self.request()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_walked_once_it_is_complete() {
        let reply = b"*1\r\n*2\r\n$1\r\nk\r\n*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nd\r\n$2\r\nxx\r\n";
        let mut strings = Vec::new();
        assert_eq!(walk(reply, 0, &mut |string| strings.push(string)).unwrap(), Some(reply.len()));
        assert_eq!(strings, [&b"k"[..], b"1-0", b"d", b"xx"]);
        assert_eq!(answered(&reply[..reply.len() - 1]).unwrap(), None);
        assert!(answered(b"-ERR no\r\n").is_err());
    }
}
