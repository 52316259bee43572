//! Tells an HTTP/2 connection on which something is under way from one that is only open.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::rt::Executor;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::sleep;
use tokio_util::task::TaskTracker;

use super::outgoing;

/// The streams of one connection, and what moves on its socket.
#[derive(Clone, Debug)]
pub(super) struct Streams {
    running: TaskTracker,
    moved: Arc<AtomicU64>,
    write_timeout: Duration,
}

impl Streams {
    /// None yet. One whose client takes nothing of what waits for it for `write_timeout` is reset.
    pub(super) fn new(write_timeout: Duration) -> Self {
        Self { running: TaskTracker::new(), moved: Arc::default(), write_timeout }
    }

    /// Watches a socket.
    pub(super) fn watch<S>(&self, socket: S) -> Watched<S> {
        Watched { socket, moved: self.moved.clone() }
    }

    /// Completes when no stream runs and the client has been silent for `patience`. What a stream has left to be sent is no
    /// silence: a client that lives takes it, and makes room for more.
    pub(super) async fn silent(&self, patience: Duration) {
        self.running.close();
        loop {
            self.running.wait().await;
            let before = self.moved.load(Ordering::Relaxed);
            sleep(patience).await;
            if self.running.is_empty() && self.moved.load(Ordering::Relaxed) == before {
                return;
            }
        }
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        self.running.spawn(outgoing::watched(stream, self.write_timeout));
    }
}

/// A socket whose traffic is counted.
pub(super) struct Watched<S> {
    socket: S,
    moved: Arc<AtomicU64>,
}

impl<S> Watched<S> {
    fn count(&self, bytes: usize) {
        self.moved.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(cx, buf);
        self.count(buf.filled().len() - before);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, buf);
        if let Poll::Ready(Ok(bytes)) = &written {
            self.count(*bytes);
        }
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        if let Poll::Ready(Ok(bytes)) = &written {
            self.count(*bytes);
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
