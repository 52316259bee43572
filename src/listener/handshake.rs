//! Spells one header of the answer to a WebSocket handshake as RFC 6455 does.
//!
//! Names of headers have no case, but the `gql` library of Python (4.0) asks for exactly `Sec-WebSocket-Protocol`, and the
//! HTTP library writes lower case. It writes what it has queued before it takes another answer, so what comes to the socket
//! after a request was answered with 101 begins with a head.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

const STATUS: &[u8] = b"HTTP/1.1 101 ";
const GIVEN: &[u8] = b"\r\nsec-websocket-protocol: ";
const SPELLED: &[u8; GIVEN.len()] = b"\r\nSec-WebSocket-Protocol: ";

/// The answer to a handshake on its way to the socket of one connection.
#[derive(Default)]
pub(super) struct Handshake {
    /// Set when a request is answered with 101, until the next write.
    switching: Arc<AtomicBool>,
    /// What is left to write of the head; empty for every other write.
    rest: Bytes,
}

impl Handshake {
    /// None until `switching` is set.
    pub(super) fn new(switching: Arc<AtomicBool>) -> Self {
        Self { switching, rest: Bytes::new() }
    }

    /// Writes `given` with that name respelled, if it is such a head or the rest of one.
    pub(super) fn poll_write(
        &mut self,
        socket: &mut (impl AsyncWrite + Unpin),
        cx: &mut Context<'_>,
        given: &[u8],
    ) -> Option<Poll<io::Result<usize>>> {
        if self.switching.load(Ordering::Relaxed) {
            self.switching.store(false, Ordering::Relaxed);
            let name = given.windows(GIVEN.len()).position(|bytes| bytes == GIVEN);
            if let (true, Some(at)) = (given.starts_with(STATUS), name) {
                self.rest = [&given[..at], SPELLED, &given[at + GIVEN.len()..]].concat().into();
            }
        }
        // Equal but for the case of letters, so that whatever else were to come would pass as it is.
        if self.rest.is_empty() || !self.rest.eq_ignore_ascii_case(given) {
            return None;
        }
        let progress = Pin::new(socket).poll_write(cx, &self.rest);
        if let Poll::Ready(Ok(bytes)) = &progress {
            self.rest.advance(*bytes);
        }
        Some(progress)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;
    use crate::domain::SendBudget;
    use crate::listener::stall::{StallGuard, Traffic};

    const HEAD: &str = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nsec-websocket-protocol: p\r\nvary: x\r\n\r\n";
    const ANSWER: &str = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nSec-WebSocket-Protocol: p\r\nvary: x\r\n\r\n";
    const BODY: &str = "HTTP/1.1 200 OK\r\n\r\n\r\nsec-websocket-protocol: p";

    /// What comes of `writes` where the peer has room for so many bytes, and a request was answered with 101 just before.
    async fn written(room: usize, switching: bool, writes: &[&str]) -> String {
        let (ours, mut theirs) = duplex(room);
        let handshake = Handshake::new(Arc::new(AtomicBool::new(switching)));
        let traffic = Traffic::Taken(SendBudget::new(0, 1).connection(), handshake);
        let mut socket = StallGuard::new(ours, Duration::from_secs(60), traffic);
        let mut read = String::new();
        let writing = async move {
            for write in writes {
                let mut left = write.as_bytes();
                while !left.is_empty() {
                    left.advance(socket.write_vectored(&[io::IoSlice::new(left)]).await.expect("written"));
                }
            }
        };
        tokio::join!(writing, async { theirs.read_to_string(&mut read).await.expect("text") });
        read
    }

    #[tokio::test]
    async fn the_name_is_respelled_however_little_the_peer_takes_at_once() {
        for room in [1, 7, 64, 1000] {
            assert_eq!(written(room, true, &[HEAD]).await, ANSWER);
            let more = written(room, true, &[HEAD, HEAD, BODY]).await;
            assert_eq!(more, [ANSWER, HEAD, BODY].concat(), "nothing behind it");
        }
    }

    #[tokio::test]
    async fn nothing_else_is_respelled() {
        for room in [7, 1000] {
            assert_eq!(written(room, false, &[HEAD]).await, HEAD, "no answer of ours");
            assert_eq!(
                written(room, true, &[BODY, HEAD]).await,
                [BODY, HEAD].concat(),
                "behind another answer"
            );
            let nameless = "HTTP/1.1 101 Switching Protocols\r\nupgrade: other\r\n\r\n";
            assert_eq!(
                written(room, true, &[nameless, HEAD]).await,
                [nameless, HEAD].concat(),
                "no such name"
            );
        }
    }
}
