//! A socket that gives up on a peer which does not read, or which sends more than it may.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::handshake::Handshake;
use crate::domain::ConnectionBudget;

/// Who is told what moves on a socket.
pub(super) enum Traffic {
    /// A budget, of what the peer takes. Over HTTP/1.1, which can be left for WebSocket.
    Taken(ConnectionBudget, Handshake),
    /// A budget, of what the peer takes of many streams; and a count, of bytes both ways.
    Streams(ConnectionBudget, Arc<AtomicU64>),
}

/// Fails a write that makes no progress for `limit`. Costs a timer only while a write is stuck. Fails a read once the peer
/// has sent more than the budget of its connection allows.
pub(super) struct StallGuard<S> {
    socket: S,
    limit: Duration,
    traffic: Traffic,
    stuck: Option<Pin<Box<Sleep>>>,
}

impl<S> StallGuard<S> {
    pub(super) fn new(socket: S, limit: Duration, traffic: Traffic) -> Self {
        Self { socket, limit, traffic, stuck: None }
    }

    fn written(
        &mut self,
        cx: &mut Context<'_>,
        progress: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &progress {
            match &self.traffic {
                Traffic::Taken(budget, _) => budget.took(*bytes),
                Traffic::Streams(budget, moved) => {
                    budget.sent(*bytes);
                    moved.fetch_add(*bytes as u64, Ordering::Relaxed);
                }
            }
        }
        self.guard(cx, progress)
    }

    fn take(&self, read: usize) -> io::Result<()> {
        let budget = match &self.traffic {
            Traffic::Taken(budget, _) => budget,
            Traffic::Streams(budget, moved) => {
                moved.fetch_add(read as u64, Ordering::Relaxed);
                budget
            }
        };
        let spent = || io::Error::new(io::ErrorKind::QuotaExceeded, "the peer sends more than it may");
        budget.spend(read).then_some(()).ok_or_else(spent)
    }

    fn guard<T>(&mut self, cx: &mut Context<'_>, progress: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if progress.is_ready() {
            self.stuck = None;
            return progress;
        }
        let limit = self.limit;
        let stuck = self.stuck.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(stuck.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for StallGuard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        Poll::Ready(self.take(buf.filled().len() - before))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for StallGuard<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.written(cx, progress)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { socket, traffic, .. } = &mut *self;
        // The HTTP library writes heads this way; what WebSocket writes is not looked at.
        let head = match (traffic, bufs.first()) {
            (Traffic::Taken(_, handshake), Some(first)) => handshake.poll_write(socket, cx, first),
            _ => None,
        };
        let progress = head.unwrap_or_else(|| Pin::new(socket).poll_write_vectored(cx, bufs));
        self.written(cx, progress)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let progress = Pin::new(&mut self.socket).poll_flush(cx);
        self.guard(cx, progress)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let progress = Pin::new(&mut self.socket).poll_shutdown(cx);
        self.guard(cx, progress)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;
    use crate::domain::SendBudget;

    #[tokio::test]
    async fn a_peer_that_does_not_read_is_given_up_and_one_that_reads_slowly_is_not() {
        let limit = Duration::from_millis(200);
        let (ours, mut theirs) = duplex(8);
        let budget = SendBudget::new(0, 1).connection();
        let mut guarded = StallGuard::new(ours, limit, Traffic::Taken(budget, Handshake::default()));
        let reader = async {
            let mut byte = [0; 1];
            for _ in 0..8 {
                sleep(limit / 4).await;
                theirs.read_exact(&mut byte).await.expect("a byte");
            }
        };
        let (written, ()) = tokio::join!(guarded.write_all(&[1; 16]), reader);
        written.expect("slow, but it reads");
        let error = guarded.write_all(&[1; 16]).await.expect_err("nobody reads any more");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_peer_that_sends_more_than_it_may_is_given_up() {
        let (ours, mut theirs) = duplex(64);
        let budget = SendBudget::new(0, 1).connection();
        let moved = Arc::new(AtomicU64::new(0));
        let traffic = Traffic::Streams(budget.clone(), moved.clone());
        let mut guarded = StallGuard::new(ours, Duration::from_secs(60), traffic);
        let mut read = [0; 8];
        theirs.write_all(&[1; 32]).await.expect("written");
        guarded.read_exact(&mut read).await.expect("without a limit");
        budget.allow(12, 0);
        guarded.read_exact(&mut read).await.expect("within it");
        let error = guarded.read_exact(&mut read).await.expect_err("beyond it");
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
        assert!(budget.is_spent());
        budget.allow(4, 8);
        guarded.read_exact(&mut read).await.expect("a large one");
        guarded.write_all(&[1; 4]).await.expect("written");
        assert_eq!(moved.load(Ordering::Relaxed), 4 * 8 + 4, "both ways, the refused bytes too");
    }
}
