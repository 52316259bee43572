//! How the server stops: no new connections, let the open ones finish, then cut.

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The state of a stop, shared by everything that runs.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    tasks: TaskTracker,
    draining: CancellationToken,
    cut: CancellationToken,
}

impl Shutdown {
    /// Cancelled when the server begins to stop: end streams, answer what is under way, take nothing new.
    pub fn draining(&self) -> &CancellationToken {
        &self.draining
    }

    /// Runs a task that a stop waits for, and drops it at the deadline.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let cut = self.cut.clone();
        self.tasks.spawn(async move {
            cut.run_until_cancelled(task).await;
        });
    }

    /// Begins the stop and waits for every task, at most until `deadline`; then cuts the rest.
    /// Returns how many had to be cut.
    pub async fn finish(&self, deadline: Duration) -> usize {
        self.draining.cancel();
        self.tasks.close();
        if tokio::time::timeout(deadline, self.tasks.wait()).await.is_ok() {
            return 0;
        }
        let left = self.tasks.len();
        self.cut.cancel();
        self.tasks.wait().await;
        left
    }
}

/// From this call on SIGTERM and SIGINT no longer end the process; what it returns completes at the first one.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn signalled() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
