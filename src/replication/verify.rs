//! Both sides compared, session by session and column by column, while sessions change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::backfill::wait_for_older_commits;
use super::flush::{Flusher, tuple};
use super::repair::{PORTION, current_epoch, repair};
use super::row::{COLUMNS, Version};
use super::slot::SlotError;
use super::{Epoch, Lsn, RowVersion};
use crate::domain::MetadataStore;
use crate::domain::tenant::Environment;
use crate::store::index::clickhouse::{SessionRow, filed_environments, stored_as, stored_behind};
use crate::store::metadata::Phase;

/// Sessions of Postgres that are read at once, and bytes that what is large in them may take together.
const PAGE: (u32, u32) = (500, 4 << 20);
/// Rows of ClickHouse that are read at once: more than a page only where some are there that should not be.
const STORED: usize = 600;
/// How often it is looked at a session that changes meanwhile before it is left.
const ATTEMPTS: usize = 5;
/// How often it is looked how far the slot is read, and for how long nothing may come of it.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Verified {
    /// Sessions of Postgres that were compared.
    pub compared: u64,
    /// Ids of those that ClickHouse lacks.
    pub missing: BTreeSet<String>,
    /// Ids of those of which ClickHouse says something else.
    pub stale: BTreeSet<String>,
    /// Ids that only ClickHouse has, or has at another creation time.
    pub phantom: BTreeSet<String>,
    /// Ids of those that changed whenever they were looked at.
    pub unsettled: BTreeSet<String>,
    /// Whether what differed was stored again, and is the same now.
    pub repaired: bool,
}

impl Verified {
    /// Sessions that differ.
    pub fn differences(&self) -> usize {
        self.missing.len() + self.stale.len() + self.phantom.len()
    }
}

/// What one side has of a session, by when it was created, which moves it in lists.
type Rows = BTreeMap<i64, (SessionRow, Value)>;

/// A comparison under way.
struct Comparison<'a> {
    flusher: &'a Flusher,
    slot: &'a str,
    epoch: Epoch,
    verified: Verified,
}

/// Compares every session. What is on its way is waited for, so a replicator must run. With `repairs`, what differs is stored again.
/// `told` is told how many have been compared.
///
/// # Errors
/// [`SlotError`], also if the slot is not read.
pub async fn verify(
    flusher: &Flusher,
    slot: &str,
    repairs: bool,
    told: impl Fn(u64),
) -> Result<Verified, SlotError> {
    let context = flusher.context();
    let epoch = current_epoch(context, slot).await?;
    if context.postgres.state(slot).await?.is_some_and(|state| state.phase == Phase::Backfilling) {
        return Err(SlotError::Unfit("older sessions are still being copied: verify afterwards".to_owned()));
    }
    let mut comparison = Comparison { flusher, slot, epoch, verified: Verified::default() };
    let stored = context.postgres.metadata().environments().await?;
    let filed = filed_environments(&context.clickhouse, None).await?;
    let environments: HashMap<_, _> =
        filed.into_iter().chain(stored).map(|environment| (environment.id.clone(), environment)).collect();
    let mut is_repaired = true;
    for environment in environments.into_values() {
        let differing = comparison.environment(&environment, &told).await?;
        if repairs {
            let ids: Vec<_> = differing.iter().map(String::as_str).collect();
            for portion in ids.chunks(PORTION) {
                repair(flusher, epoch, &environment, portion).await?;
                let again = portion.iter().map(ToString::to_string).collect();
                is_repaired &= comparison.recheck(&environment, again).await?.is_empty();
            }
        }
    }
    comparison.verified.repaired = repairs && is_repaired && comparison.verified.unsettled.is_empty();
    Ok(comparison.verified)
}

impl Comparison<'_> {
    /// Compares the sessions of an environment. Returns the ids of those that differ.
    async fn environment(
        &mut self,
        environment: &Environment,
        told: impl Fn(u64),
    ) -> Result<BTreeSet<String>, SlotError> {
        let context = self.flusher.context().clone();
        let (mut after, mut differing) = ((i64::MIN, String::new()), BTreeSet::new());
        loop {
            let behind = (after.0, after.1.as_str());
            let page = context.postgres.page_of(COLUMNS, environment.id.as_str(), behind, PAGE).await?;
            let ours: Vec<_> =
                page.into_iter().filter_map(|columns| Version::new(tuple(columns)).ok()).collect();
            let last = ours.last().map(|row| (row.key().created_at, row.key().session.clone()));
            let to = last.as_ref().map(|(created_at, id)| (*created_at, id.as_str()));
            let theirs = stored_behind(&context.clickhouse, environment, behind, to, STORED).await?;
            let last_stored = theirs.last().map(|row| (row.created_at, row.session_id.clone()));
            // What ClickHouse has more of than fits is looked at with the next page.
            let end = if theirs.len() == STORED { last_stored } else { last.or(last_stored) };
            let Some(end) = end else { break };
            let is_within = |row: &Version| (row.key().created_at, &row.key().session) <= (end.0, &end.1);
            let ours = ours.into_iter().filter(is_within).filter_map(|row| session_row(&row, environment));
            let ours: Vec<_> = ours.collect();
            self.verified.compared += ours.len() as u64;
            told(self.verified.compared);
            let candidates = differing_ids(ours, theirs);
            differing.extend(self.recheck(environment, candidates).await?);
            after = end;
        }
        Ok(differing)
    }

    /// Looks again at what may only be on its way. Returns what differs all the same.
    async fn recheck(
        &mut self,
        environment: &Environment,
        mut candidates: BTreeSet<String>,
    ) -> Result<BTreeSet<String>, SlotError> {
        let mut differing = BTreeSet::new();
        for _ in 0..ATTEMPTS {
            if candidates.is_empty() {
                return Ok(differing);
            }
            let ids: Vec<_> = candidates.iter().map(String::as_str).collect();
            let before = self.ours(environment, &ids).await?;
            // Whatever was seen stands before this place.
            self.pass(Lsn(self.flusher.context().postgres.position().await?)).await?;
            let theirs = by_id(stored_as(&self.flusher.context().clickhouse, environment, &ids).await?);
            let mut now = self.ours(environment, &ids).await?;
            if now != theirs {
                // A change may be told before a query sees it.
                wait_for_older_commits(self.flusher.context()).await;
                now = self.ours(environment, &ids).await?;
            }
            let mut unsettled = BTreeSet::new();
            for id in &candidates {
                let (was, ours, theirs) = (before.get(id), now.get(id), theirs.get(id));
                if ours == theirs {
                    continue;
                }
                if was != ours {
                    unsettled.insert(id.clone());
                    continue;
                }
                differing.insert(id.clone());
                let created_at = ours.and_then(|rows| rows.keys().next());
                let verified = &mut self.verified;
                match (created_at, theirs) {
                    (Some(at), Some(theirs)) if theirs.contains_key(at) && theirs.len() == 1 => {
                        verified.stale.insert(id.clone())
                    }
                    (Some(at), theirs) if theirs.is_none_or(|theirs| !theirs.contains_key(at)) => {
                        verified.missing.insert(id.clone())
                    }
                    _ => verified.phantom.insert(id.clone()),
                };
            }
            candidates = unsettled;
        }
        self.verified.unsettled.extend(candidates);
        Ok(differing)
    }

    async fn ours(
        &self,
        environment: &Environment,
        ids: &[&str],
    ) -> Result<HashMap<String, Rows>, SlotError> {
        let found = self.flusher.context().postgres.sessions(COLUMNS, ids, &[]).await?.unwrap_or_default();
        let rows = found.into_iter().filter_map(|columns| Version::new(tuple(columns)).ok());
        // One that has moved to another environment is gone from this one.
        let rows = rows.filter(|row| row.key().environment == environment.id.as_str());
        Ok(by_id(rows.filter_map(|row| session_row(&row, environment)).collect()))
    }

    /// Waits until everything before `place` is stored.
    async fn pass(&self, place: Lsn) -> Result<(), SlotError> {
        let postgres = &self.flusher.context().postgres;
        let (mut moved, mut reached) = (Instant::now(), 0);
        loop {
            if current_epoch(self.flusher.context(), self.slot).await? != self.epoch {
                return Err(SlotError::Unfit(
                    "replication has begun anew meanwhile: verify again".to_owned(),
                ));
            }
            let confirmed = postgres.slot(self.slot).await?.map_or(0, |slot| slot.confirmed);
            if confirmed >= place.0 {
                return Ok(());
            }
            if confirmed > reached {
                (moved, reached) = (Instant::now(), confirmed);
            }
            if moved.elapsed() > STALL_TIMEOUT {
                return Err(SlotError::Unfit(
                    "nothing is stored, so what differs may be on its way: see `sessiond replicate status`"
                        .to_owned(),
                ));
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

/// The row that ClickHouse should have, without what is not compared.
fn session_row(version: &Version, environment: &Environment) -> Option<SessionRow> {
    let row = version.row(environment, RowVersion(0));
    let id = &version.key().session;
    row.inspect_err(|error| tracing::error!(%error, session.id = id, "a session that cannot be read")).ok()
}

/// What both sides do not have alike.
fn differing_ids(ours: Vec<SessionRow>, theirs: Vec<SessionRow>) -> BTreeSet<String> {
    let (ours, theirs) = (by_id(ours), by_id(theirs));
    let ids = ours.keys().chain(theirs.keys());
    ids.filter(|id| ours.get(*id) != theirs.get(*id)).cloned().collect()
}

/// By id; documents as JSON, since their texts depend on who wrote them.
fn by_id(rows: Vec<SessionRow>) -> HashMap<String, Rows> {
    let mut found: HashMap<String, Rows> = HashMap::new();
    for mut row in rows {
        let document = std::mem::take(&mut row.document);
        let document = serde_json::from_str(&document).unwrap_or(Value::String(document));
        found.entry(row.session_id.clone()).or_default().insert(row.created_at, (row, document));
    }
    found
}
