//! What a stream of changes promises.

use async_trait::async_trait;
use bytes::Bytes;

use super::Lsn;

/// A stream of committed changes, in the order of their commits.
#[async_trait]
pub trait WalSource: Send {
    /// The next event. Cancel safe.
    ///
    /// # Errors
    /// [`SourceError`]; the stream is over then.
    async fn next(&mut self) -> Result<WalEvent, SourceError>;

    /// Everything before `place` is durable elsewhere: the server may forget it. Never goes back.
    fn confirm(&self, place: Lsn);

    /// Ends the stream in order, with the last confirmation, so that another process can read on at once.
    ///
    /// # Errors
    /// [`SourceError`] if it ended otherwise; the server finds out by itself then.
    async fn stop(self: Box<Self>) -> Result<(), SourceError>;
}

/// What a stream tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WalEvent {
    /// A transaction begins; its changes follow, then its commit.
    Begin {
        /// Where its commit stands.
        commit: Lsn,
        /// When it was committed, in milliseconds since 1970 by Postgres' clock.
        committed_at: i64,
        /// The lower 32 bits of its id.
        xid: u32,
    },
    /// A message of `pgoutput`, for [`Decoder`](super::pgoutput::Decoder).
    Change(Bytes),
    /// A transaction ends.
    Commit {
        /// Everything of the transaction, and of all before it, stands before this place.
        end: Lsn,
    },
    /// What `pg_logical_emit_message` has put into the log.
    Message {
        /// Whose it is.
        prefix: String,
        /// What it says.
        content: Bytes,
    },
    /// The server lives.
    KeepAlive {
        /// No change that was not told stands before this place, but for those of a transaction that is being told.
        wal_end: Lsn,
    },
}

/// Why there is no stream, or no more of it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SourceError {
    /// Another process reads the slot.
    #[error("another process reads the replication slot")]
    Busy,
    /// There is no such slot.
    #[error("there is no such replication slot: {0}")]
    SlotMissing(String),
    /// The log that the slot needs is gone, or the slot cannot be read at all.
    #[error("the replication slot is lost: {0}")]
    SlotLost(String),
    /// There was no such publication when the change was made.
    #[error("there is no such publication: {0}")]
    PublicationMissing(String),
    /// The server does not let us in, or not do this.
    #[error("Postgres refuses: {0}")]
    Refused(String),
    /// Nothing was heard in time, or the connection broke.
    #[error("Postgres cannot be reached: {0}")]
    Away(String),
    /// The server says what nobody expects.
    #[error("the replication stream cannot be read: {0}")]
    Protocol(String),
}
