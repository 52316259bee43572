//! Seals that may not have reached their rows: a stream of announcements, each taken back by a later record.
//!
//! A seal is announced before it is made, so that one whose process died right behind it is found again.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use s2_sdk::types::{AppendRecord, SequencedRecord};
use serde::{Deserialize, Serialize};

use super::codec::{self, OUTBOX_STREAM};
use super::remote::{Fault, Guard, Keep, Remote};
use sessiond_domain::{Clock, Error, Result, SeqNum, SessionId, Timestamp};

/// An announcement this old without a seal will not be followed by one: sealing gives up long before.
const ABANDONED_AFTER: Duration = Duration::from_secs(15 * 60);
/// Settled seals after which the stream is trimmed.
const TRIM_EVERY: u64 = 64;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Notice {
    Sealing(String),
    Settled(String),
}

/// An announcement that was not taken back.
#[derive(Clone, Debug)]
pub(super) struct Open {
    pub session: SessionId,
    seq_num: SeqNum,
    at: Timestamp,
}

/// See the module.
pub(super) struct Outbox {
    remote: Arc<Remote>,
    clock: Arc<dyn Clock>,
    settled: AtomicU64,
}

impl Outbox {
    pub(super) fn new(remote: Arc<Remote>, clock: Arc<dyn Clock>) -> Self {
        Self { remote, clock, settled: AtomicU64::new(0) }
    }

    /// Says that a session is about to be sealed.
    pub(super) async fn announce(&self, session: &SessionId) -> Result<()> {
        self.put(Notice::Sealing(session.to_string())).await
    }

    /// Says that a seal has reached its row. Now and then also forgets what has been settled.
    pub(super) async fn settle(&self, session: &SessionId) -> Result<()> {
        self.put(Notice::Settled(session.to_string())).await?;
        if self.settled.fetch_add(1, Ordering::Relaxed) % TRIM_EVERY == TRIM_EVERY - 1 {
            self.open().await?;
        }
        Ok(())
    }

    /// Announcements that were not taken back, oldest first. Forgets everything before them.
    pub(super) async fn open(&self) -> Result<Vec<Open>> {
        let mut open = HashMap::new();
        let (mut first, mut next) = (None, 0);
        let read = |records: Vec<SequencedRecord>| {
            for record in records {
                first.get_or_insert(record.seq_num);
                next = record.seq_num + 1;
                if record.is_command_record() {
                    continue;
                }
                match serde_json::from_slice(&record.body).map_err(Error::internal)? {
                    Notice::Sealing(session) => {
                        open.insert(session, (record.seq_num, codec::timestamp(record.timestamp)));
                    }
                    Notice::Settled(session) => {
                        open.remove(&session);
                    }
                }
            }
            Ok(())
        };
        self.remote.scan(OUTBOX_STREAM, 0, read).await?;
        let mut open: Vec<_> = open
            .into_iter()
            .map(|(session, (seq_num, at))| Open { session: SessionId::from_stored(&session), seq_num, at })
            .collect();
        open.sort_by_key(|notice| notice.seq_num);
        let keep = open.first().map_or(next, |notice| notice.seq_num);
        if first.is_some_and(|first| keep >= first + TRIM_EVERY) {
            self.trim(keep).await?;
        }
        Ok(open)
    }

    /// Takes an announcement back that no seal has followed, once none will.
    pub(super) async fn abandon(&self, notice: &Open) -> Result<()> {
        if notice.at.plus(ABANDONED_AFTER) < self.clock.now() {
            self.put(Notice::Settled(notice.session.to_string())).await?;
        }
        Ok(())
    }

    async fn trim(&self, below: SeqNum) -> Result<()> {
        let done =
            self.remote.append_surely(OUTBOX_STREAM, Keep::Always, vec![codec::trim(below)?], Guard::NONE);
        done.await.map(drop).map_err(Fault::into_error)
    }

    async fn put(&self, notice: Notice) -> Result<()> {
        let body = Bytes::from(serde_json::to_vec(&notice).map_err(Error::internal)?);
        let record = AppendRecord::new(body).map_err(Error::internal)?;
        let done = self.remote.append_surely(OUTBOX_STREAM, Keep::Always, vec![record], Guard::NONE);
        done.await.map(drop).map_err(Fault::into_error)
    }
}
