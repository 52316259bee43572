//! As much HTTP/1.1 as a load generator needs: rendered requests, whole answers, and bodies that stream.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, bail, ensure};

use super::record::{Mark, Marks};
use super::target::Reader;

/// The status line and headers of an answer.
pub(crate) struct Head {
    pub(crate) status: u16,
    /// Bytes up to the body.
    pub(crate) len: usize,
    body: Length,
}

enum Length {
    Known(usize),
    Chunked,
}

impl Head {
    /// The head at the start of `bytes`, once it is complete.
    pub(crate) fn parse(bytes: &[u8]) -> anyhow::Result<Option<Self>> {
        let Some(len) = bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4) else {
            return Ok(None);
        };
        let text = std::str::from_utf8(&bytes[..len]).context("the head is not text")?;
        let mut lines = text.split("\r\n");
        let status =
            lines.next().and_then(|line| line.split(' ').nth(1)).context("no status line")?.parse()?;
        let mut body = Length::Known(0);
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            if name.eq_ignore_ascii_case("content-length") {
                body = Length::Known(value.trim().parse()?);
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                body = Length::Chunked;
            }
        }
        Ok(Some(Self { status, len, body }))
    }
}

/// Length of the whole answer at the start of `bytes`, which must be a 2xx.
pub(crate) fn answered(bytes: &[u8]) -> anyhow::Result<Option<usize>> {
    let Some(head) = Head::parse(bytes)? else { return Ok(None) };
    ensure!((200..300).contains(&head.status), "answered {}", String::from_utf8_lossy(bytes));
    match head.body {
        Length::Known(body) => Ok((bytes.len() >= head.len + body).then_some(head.len + body)),
        Length::Chunked => {
            let mut chunks = Chunks::default();
            let used = chunks.feed(&bytes[head.len..], &mut |_| ())?;
            Ok(chunks.ended.then_some(head.len + used))
        }
    }
}

/// Sends one request and waits for its answer: the status and the body.
pub(crate) fn exchange(stream: &mut TcpStream, request: &[u8]) -> anyhow::Result<(u16, Vec<u8>)> {
    stream.write_all(request)?;
    let mut bytes = Vec::new();
    let mut piece = [0; 16 * 1024];
    loop {
        let read = stream.read(&mut piece)?;
        ensure!(read > 0, "the server hung up");
        bytes.extend_from_slice(&piece[..read]);
        let Some(head) = Head::parse(&bytes)? else { continue };
        let mut body = Vec::new();
        let whole = match head.body {
            Length::Known(length) => {
                body.extend_from_slice(&bytes[head.len..]);
                body.len() >= length
            }
            Length::Chunked => {
                let mut chunks = Chunks::default();
                chunks.feed(&bytes[head.len..], &mut |piece| body.extend_from_slice(piece))?;
                chunks.ended
            }
        };
        if whole {
            return Ok((head.status, body));
        }
    }
}

/// A request with the headers that every one has.
pub(crate) fn request(line: &str, address: SocketAddr, headers: &[(&str, &str)]) -> Vec<u8> {
    let mut text = format!("{line} HTTP/1.1\r\nHost: {address}\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    text.into_bytes()
}

/// The chunked coding, undone as it arrives.
#[derive(Default)]
struct Chunks {
    /// Payload bytes of the chunk at hand that have not arrived.
    left: usize,
    /// Digits of the size line so far.
    size: usize,
    place: Place,
    ended: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Size,
    Payload,
    /// The line end after a payload, or after the last chunk.
    End,
}

impl Chunks {
    /// Hands payload to `on` and tells how many bytes it used.
    fn feed(&mut self, bytes: &[u8], on: &mut dyn FnMut(&[u8])) -> anyhow::Result<usize> {
        let mut at = 0;
        while at < bytes.len() && !self.ended {
            match self.place {
                Place::Payload => {
                    let piece = self.left.min(bytes.len() - at);
                    on(&bytes[at..at + piece]);
                    at += piece;
                    self.left -= piece;
                    if self.left == 0 {
                        self.place = Place::End;
                    }
                }
                Place::Size => {
                    match bytes[at] {
                        b'\n' => {
                            self.left = self.size;
                            self.place = if self.size == 0 { Place::End } else { Place::Payload };
                        }
                        b'\r' => (),
                        digit => {
                            let digit = (digit as char).to_digit(16).context("not a chunk size")?;
                            self.size = self.size * 16 + digit as usize;
                        }
                    }
                    at += 1;
                }
                Place::End => {
                    if bytes[at] == b'\n' {
                        self.ended = self.size == 0;
                        self.size = 0;
                        self.place = Place::Size;
                    }
                    at += 1;
                }
            }
        }
        Ok(at)
    }
}

/// Reads one answer as it streams in and finds the records in its body.
pub(crate) struct Body {
    request: Vec<u8>,
    head: Vec<u8>,
    length: Option<Length>,
    chunks: Chunks,
    marks: Marks,
}

impl Body {
    /// The answer to `request`.
    pub(crate) fn new(request: Vec<u8>) -> Self {
        Self { request, head: Vec::new(), length: None, chunks: Chunks::default(), marks: Marks::default() }
    }

    fn payload(&mut self, bytes: &[u8], on: &mut dyn FnMut(Mark)) -> anyhow::Result<()> {
        match &mut self.length {
            None => bail!("payload before the head"),
            Some(Length::Known(_)) => self.marks.feed(bytes, on),
            Some(Length::Chunked) => {
                let marks = &mut self.marks;
                self.chunks.feed(bytes, &mut |piece| marks.feed(piece, on))?;
            }
        }
        Ok(())
    }
}

impl Reader for Body {
    fn request(&self) -> Vec<u8> {
        self.request.clone()
    }

    fn ready(&self) -> bool {
        self.length.is_some()
    }

    fn feed(&mut self, bytes: &[u8], on: &mut dyn FnMut(Mark)) -> anyhow::Result<Option<Vec<u8>>> {
        if self.length.is_some() {
            self.payload(bytes, on)?;
            return Ok(None);
        }
        self.head.extend_from_slice(bytes);
        if let Some(head) = Head::parse(&self.head)? {
            ensure!(head.status == 200, "answered {}", String::from_utf8_lossy(&self.head));
            self.length = Some(head.body);
            let rest = std::mem::take(&mut self.head);
            self.payload(&rest[head.len..], on)?;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunked_answer_is_whole_only_with_its_last_chunk() {
        let answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n";
        assert_eq!(answered(answer).unwrap(), Some(answer.len()));
        assert_eq!(answered(&answer[..answer.len() - 1]).unwrap(), None);
    }

    #[test]
    fn a_refusal_is_an_error() {
        assert!(answered(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").is_err());
        assert_eq!(answered(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap(), Some(27));
    }
}
