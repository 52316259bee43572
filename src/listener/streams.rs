//! Tells an HTTP/2 connection on which something is under way from one that is only open.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use hyper::rt::Executor;
use tokio::time::sleep;
use tokio_util::task::TaskTracker;

use super::outgoing;
use crate::domain::Background;

/// The streams of one connection, and what moves on its socket.
#[derive(Clone, Debug)]
pub(super) struct Streams {
    running: TaskTracker,
    moved: Arc<AtomicU64>,
    write_timeout: Duration,
    background: Arc<Background>,
}

impl Streams {
    /// None yet. One whose client takes nothing of what waits for it for `write_timeout` is reset.
    pub(super) fn new(write_timeout: Duration, background: Arc<Background>) -> Self {
        Self { running: TaskTracker::new(), moved: Arc::default(), write_timeout, background }
    }

    /// Counts the bytes that move on the socket, both ways.
    pub(super) fn moved(&self) -> Arc<AtomicU64> {
        self.moved.clone()
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
        let background = self.background.clone();
        let watched = AssertUnwindSafe(outgoing::watched(stream, self.write_timeout)).catch_unwind();
        self.running.spawn(watched.map(move |ended| {
            if ended.is_err() {
                background.faulted("stream of a connection");
            }
        }));
    }
}
