//! What other processes on the same stores do, as far as something here waits for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Sessions;
use crate::background::Ticker;
use crate::error::Result;
use crate::id::{EnvironmentId, SessionId};

/// How often the rows are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

impl Sessions {
    /// Ends open writers of sessions that another process closes, until `stop` is cancelled. The log refuses what they
    /// send from the moment of the close; this tells those who send nothing.
    pub async fn watch_replicas(self: Arc<Self>, stop: CancellationToken) {
        let mut ticker = Ticker::new(LOOK_EVERY, stop);
        while ticker.tick().await {
            if let Err(error) = self.look_at_open().await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "cannot look for sessions that another replica has closed");
            }
        }
    }

    async fn look_at_open(&self) -> Result<()> {
        let mut open: HashMap<EnvironmentId, Vec<SessionId>> = HashMap::new();
        for (environment, session) in self.rows.open() {
            open.entry(environment).or_default().push(session);
        }
        for (environment, sessions) in open {
            let rows = self.rows.find_many(&environment, sessions.iter()).await?;
            rows.values().filter(|row| row.closed.is_some()).for_each(|row| self.rows.changed(&[row]));
        }
        Ok(())
    }
}
