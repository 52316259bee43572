//! How the server stops: no new connections, let the open ones finish, then cut.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

use crate::domain::Background;

/// The state of a stop, shared by everything that runs.
#[derive(Clone, Debug)]
pub struct Shutdown {
    tasks: TaskTracker,
    leaving: CancellationToken,
    draining: CancellationToken,
    cut: CancellationToken,
    background: Arc<Background>,
}

impl Shutdown {
    /// A server that runs, whose tasks tell `listener` when they fail.
    pub fn new(listener: impl Fn(&'static str) + Send + Sync + 'static) -> Self {
        let draining = CancellationToken::new();
        Self {
            background: Arc::new(Background::new(draining.clone(), listener)),
            draining,
            tasks: TaskTracker::new(),
            leaving: CancellationToken::new(),
            cut: CancellationToken::new(),
        }
    }

    /// What watches tasks that end with the server, or before it drains.
    pub fn background(&self) -> &Arc<Background> {
        &self.background
    }

    /// Cancelled when it is known that the server will stop: whoever asks whether to send it traffic is told no, and
    /// everything is served as before.
    pub fn leaving(&self) -> &CancellationToken {
        &self.leaving
    }

    /// Cancelled when the server begins to stop: end streams, answer what is under way, take nothing new.
    pub fn draining(&self) -> &CancellationToken {
        &self.draining
    }

    /// Runs a task that a stop waits for, and drops it at the deadline. A panic is counted under `name`.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        // Boxed, because every async layer around a future keeps room for it twice.
        let task = Box::pin(task);
        let background = self.background.clone();
        let caught = async move {
            background.caught(name, task).await;
        };
        self.tasks.spawn(self.cut.clone().run_until_cancelled_owned(caught).map(drop));
    }

    /// Announces the stop.
    pub fn announce(&self) {
        self.leaving.cancel();
    }

    /// Begins the stop.
    pub fn begin(&self) {
        self.announce();
        self.draining.cancel();
        self.tasks.close();
    }

    /// Waits for every task, at most until `deadline`; then cuts the rest. Returns how many had to be cut.
    pub async fn finish(&self, deadline: Duration) -> usize {
        if tokio::time::timeout(deadline, self.tasks.wait()).await.is_ok() {
            return 0;
        }
        let left = self.tasks.len();
        self.cut.cancel();
        self.tasks.wait().await;
        left
    }
}

/// From this call on SIGTERM, SIGINT and SIGHUP no longer end the process. What it returns completes at the first
/// SIGTERM or SIGINT, and at the second. SIGHUP, which asks other servers to read their settings again, is logged.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn signalled() -> std::io::Result<[WaitForCancellationFutureOwned; 2]> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let [first, second] = [CancellationToken::new(), CancellationToken::new()];
    let completed = [first.clone().cancelled_owned(), second.clone().cancelled_owned()];
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hang_up.recv() => {
                    tracing::info!("SIGHUP does nothing: settings are read at the start only");
                    continue;
                }
            }
            let next = if first.is_cancelled() { &second } else { &first };
            next.cancel();
        }
    });
    Ok(completed)
}
