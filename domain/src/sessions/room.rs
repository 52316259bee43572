//! What may be on its way to the log: bounded in bytes, so that a flood waits in its callers and not in memory.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::record::AppendInput;

/// Most bytes on their way.
const BYTES: usize = 32 << 20;
/// What a batch takes besides its records.
const BATCH_BYTES: usize = 512;

/// Room for appends that are not answered yet. Given out in the order in which it was asked for.
pub(super) struct Room(Arc<Semaphore>);

/// The room that one append takes, until it is answered.
#[derive(Debug)]
pub(super) struct Reserved {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Default for Room {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(BYTES)))
    }
}

impl Room {
    /// Waits for room for a batch.
    pub(super) async fn reserve(&self, input: &AppendInput) -> Reserved {
        let cost = u32::try_from((BATCH_BYTES + input.cost()).min(BYTES)).unwrap_or(u32::MAX);
        // Never closed, so there is always a permit.
        Reserved { _permit: self.0.clone().acquire_many_owned(cost).await.ok() }
    }
}
