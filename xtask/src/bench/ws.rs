//! GraphQL subscriptions over WebSocket: a handshake by hand and the headers of frames, so that the client, which
//! shares the cores with the server, costs no more than one that reads server-sent events.

use std::collections::VecDeque;

use anyhow::{bail, ensure};
use serde_json::json;

use super::http::{self, Head};
use super::ours::KEY;
use super::record::{Mark, Marks};
use super::server::Server;
use super::target::Reader;

const DOCUMENT: &str = "subscription($by: SessionBy!) {
    channelRecords(by: $by, io: IN, batch: 100) { records { seqNum data } endCursor }
}";
const TEXT: u8 = 1;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
/// How much of a message is kept to tell what it is; the payload of a control frame is never longer.
const START: usize = 125;

/// One socket and what is subscribed over it.
#[derive(Default)]
pub(crate) struct Subscriptions {
    handshake: Vec<u8>,
    /// The frames that subscribe, one by one: the next when the one before has had its first event.
    subscribe: VecDeque<Vec<u8>>,
    open: bool,
    /// Nothing is awaited but records.
    ready: bool,
    /// The head of the answer to the handshake, then the header of a frame, as far as it has arrived.
    head: Vec<u8>,
    frame: Option<Frame>,
    start: Vec<u8>,
    marks: Marks,
}

impl Subscriptions {
    /// Follows each of the sessions from its first record on.
    pub(crate) fn new(server: &Server, sessions: &[&str]) -> Self {
        let headers = [
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("Sec-WebSocket-Protocol", "graphql-transport-ws"),
        ];
        let subscribe = |(id, session): (usize, &&str)| {
            let variables = json!({ "by": { "externalId": session } });
            let payload = json!({ "query": DOCUMENT, "variables": variables });
            let message = json!({ "type": "subscribe", "id": id.to_string(), "payload": payload });
            frame(TEXT, message.to_string().as_bytes())
        };
        Self {
            handshake: http::request("GET /graphql", server.address, &headers),
            subscribe: sessions.iter().enumerate().map(subscribe).collect(),
            ..Self::default()
        }
    }

    fn frames(
        &mut self,
        mut bytes: &[u8],
        on: &mut dyn FnMut(Mark),
        reply: &mut Vec<u8>,
    ) -> anyhow::Result<()> {
        loop {
            let Some(frame) = &mut self.frame else {
                let Some((first, rest)) = bytes.split_first() else { return Ok(()) };
                self.head.push(*first);
                self.frame = Frame::parse(&self.head);
                bytes = rest;
                continue;
            };
            let (piece, rest) = bytes.split_at(frame.left.min(bytes.len()));
            let wanted = (START - self.start.len()).min(piece.len());
            self.start.extend_from_slice(&piece[..wanted]);
            if frame.kind == TEXT {
                self.marks.feed(piece, on);
            }
            frame.left -= piece.len();
            bytes = rest;
            if frame.left > 0 {
                return Ok(());
            }
            let kind = frame.kind;
            self.take(kind, reply)?;
            self.frame = None;
            self.head.clear();
            self.start.clear();
        }
    }

    /// A frame has come to its end.
    fn take(&mut self, kind: u8, reply: &mut Vec<u8>) -> anyhow::Result<()> {
        match kind {
            TEXT if self.says("next") && self.ready => (),
            TEXT if self.says("next") || self.says("connection_ack") => match self.subscribe.pop_front() {
                Some(next) => reply.extend(next),
                None => self.ready = true,
            },
            PING => reply.extend(frame(PONG, &self.start)),
            PONG => (),
            CLOSE => bail!("the server closed the socket: {}", String::from_utf8_lossy(&self.start)),
            _ => bail!("the server sent {}", String::from_utf8_lossy(&self.start)),
        }
        Ok(())
    }

    fn says(&self, kind: &str) -> bool {
        let wanted = format!(r#""type":"{kind}""#);
        self.start.windows(wanted.len()).any(|bytes| bytes == wanted.as_bytes())
    }
}

impl Reader for Subscriptions {
    fn request(&self) -> Vec<u8> {
        self.handshake.clone()
    }

    fn ready(&self) -> bool {
        self.ready
    }

    fn feed(&mut self, bytes: &[u8], on: &mut dyn FnMut(Mark)) -> anyhow::Result<Option<Vec<u8>>> {
        let mut reply = Vec::new();
        if self.open {
            self.frames(bytes, on, &mut reply)?;
        } else {
            self.head.extend_from_slice(bytes);
            let Some(head) = Head::parse(&self.head)? else { return Ok(None) };
            ensure!(head.status == 101, "answered {}", String::from_utf8_lossy(&self.head));
            self.open = true;
            let authorization = format!("Bearer {KEY}");
            let init = json!({ "type": "connection_init", "payload": { "authorization": authorization } });
            reply = frame(TEXT, init.to_string().as_bytes());
            let rest = std::mem::take(&mut self.head).split_off(head.len);
            self.frames(&rest, on, &mut reply)?;
        }
        Ok((!reply.is_empty()).then_some(reply))
    }
}

/// A frame of the server, of which `left` bytes have not arrived.
#[derive(Clone, Copy)]
struct Frame {
    kind: u8,
    left: usize,
}

impl Frame {
    /// The frame that `header` announces, once it is complete. Fragments are no kind that anybody takes.
    fn parse(header: &[u8]) -> Option<Self> {
        let (first, length) = (*header.first()?, *header.get(1)?);
        let left = match length {
            126 => u16::from_be_bytes(header.get(2..4)?.try_into().ok()?).into(),
            127 => usize::try_from(u64::from_be_bytes(header.get(2..10)?.try_into().ok()?)).ok()?,
            short => short.into(),
        };
        Some(Self { kind: first ^ 0x80, left })
    }
}

/// A frame of ours. The mask that clients must have is zero, which leaves the payload as it is.
fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x80 | kind];
    match u16::try_from(payload.len()) {
        Ok(length @ ..126) => bytes.push(0x80 | length as u8),
        Ok(length) => {
            bytes.push(0x80 | 126);
            bytes.extend(length.to_be_bytes());
        }
        Err(_) => unreachable!("no message of ours is that long"),
    }
    bytes.extend([0; 4]);
    bytes.extend_from_slice(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::record::Request;
    use super::*;

    fn sent(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x80 | kind, 126];
        bytes.extend((payload.len() as u16).to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn records_are_found_wherever_the_stream_is_cut() {
        let mut stream = b"HTTP/1.1 101 Switching Protocols\r\n\r\n".to_vec();
        stream.extend(sent(TEXT, br#"{"type":"connection_ack"}"#));
        stream.extend([0x80 | PING, 0]);
        let mut request = Request::new(br#"{"id":"0","type":"next","payload":"#, b"}", |_| Ok(None));
        for number in [7, 8] {
            stream.extend(sent(TEXT, request.stamp(number)));
        }
        for cut in 0..stream.len() {
            let mut socket =
                Subscriptions { subscribe: [b"subscribe".to_vec()].into(), ..Subscriptions::default() };
            let (mut seen, mut replies) = (Vec::new(), Vec::new());
            for part in [&stream[..cut], &stream[cut..]] {
                replies.extend(
                    socket.feed(part, &mut |mark| seen.push(mark.number)).unwrap().unwrap_or_default(),
                );
            }
            assert_eq!(seen, [7, 8], "cut at {cut}");
            assert!(socket.ready());
            assert!(
                replies.ends_with(&[b"subscribe".as_slice(), &frame(PONG, b"")].concat()),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn a_refusal_is_an_error() {
        let mut socket = Subscriptions { open: true, ..Subscriptions::default() };
        assert!(socket.feed(&sent(TEXT, br#"{"id":"0","type":"error"}"#), &mut |_| ()).is_err());
    }
}
