//! Records on their way to one client.

use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;

use super::{BYTES_PER_RECORD, COPIES, ConnectionBudget, RECORD_BYTES, Reservation, holding_room};
use crate::error::Result;
use crate::record::{BATCH_RECORDS_MAX, ReadLimit, Record, RecordBatch, metered_size};

impl ConnectionBudget {
    /// Reads the next piece in room that is waited for. `read` gets the limit of a read, and is asked a second time when
    /// the first record alone is larger than the piece: nothing is kept while more room is waited for. Cancel safe.
    ///
    /// # Errors
    /// Those of `read`.
    pub async fn read<F>(&self, read: impl Fn(ReadLimit) -> F) -> Result<Delivery>
    where
        F: Future<Output = Result<Arc<RecordBatch>>>,
    {
        let piece = self.piece();
        let limit = ReadLimit { count: (piece / BYTES_PER_RECORD).clamp(1, BATCH_RECORDS_MAX), bytes: piece };
        let mut room = self.reserve(cost_of_read(limit)).await;
        let mut batch = read(limit).await?;
        let needed = cost(&batch.records);
        if needed > room.bytes() {
            drop((batch, room));
            room = self.reserve(needed).await;
            batch = read(ReadLimit::count(1)).await?;
        }
        room.shrink(cost(&batch.records));
        Ok(Delivery::new(batch, room))
    }
}

/// Records on their way to one client, and the room that they take until it has them.
#[derive(Clone, Debug)]
pub struct Delivery {
    batch: Arc<RecordBatch>,
    room: Arc<Reservation>,
}

impl Delivery {
    /// A batch in the room that was reserved for it.
    pub fn new(batch: Arc<RecordBatch>, room: Reservation) -> Self {
        Self { batch, room: Arc::new(room) }
    }

    /// The batch, which others may share.
    pub fn batch(&self) -> &Arc<RecordBatch> {
        &self.batch
    }

    /// The room.
    pub fn room(&self) -> Arc<Reservation> {
        self.room.clone()
    }

    /// Bytes made of these records, which keep the room until they are dropped.
    pub fn holding(&self, bytes: Bytes) -> Bytes {
        holding_room(bytes, self.room.clone())
    }
}

impl Deref for Delivery {
    type Target = RecordBatch;

    fn deref(&self) -> &RecordBatch {
        &self.batch
    }
}

/// The room that records take until their client has them.
pub fn cost(records: &[Record]) -> usize {
    let sizes = records.iter().map(|record| metered_size(&record.headers, &record.body));
    sizes.map(|size| COPIES * size + RECORD_BYTES).sum()
}

/// The room that a read takes at most, unless one record alone is larger.
pub fn cost_of_read(limit: ReadLimit) -> usize {
    COPIES * limit.bytes + RECORD_BYTES * limit.count
}
