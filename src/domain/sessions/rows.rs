//! Session rows as the use cases read them: through a cache, and awaited where they do not exist yet.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use quick_cache::sync::Cache;
use tokio::sync::{Notify, broadcast};

use crate::domain::error::Result;
use crate::domain::id::{EnvironmentId, ExternalId, SessionId, SessionRef};
use crate::domain::port::MetadataStore;
use crate::domain::session::{Session, SharedSession};
use crate::domain::watch;

/// Changes kept for who is slow to take them.
const CHANGES_KEPT: usize = 1024;

type Key = (EnvironmentId, SessionRef);

/// Reads rows. A cached row may refuse an append but never allows one on its own: what allows is the log,
/// which checks the seal in the commit. `expires_at` and ids never change, so they may come from the cache.
pub(super) struct Rows {
    store: Arc<dyn MetadataStore>,
    cache: Cache<Key, SharedSession>,
    /// Counts invalidations, so that a read that began before one cannot put its stale row back.
    generation: Mutex<u64>,
    awaited: Awaited,
    /// The newest version of every session that changes.
    changes: broadcast::Sender<SharedSession>,
}

type Awaited = Mutex<HashMap<(EnvironmentId, ExternalId), Arc<Notify>>>;

/// One wait for an external id; the last one to give up takes the entry with it.
struct Awaiting<'a> {
    awaited: &'a Awaited,
    key: (EnvironmentId, ExternalId),
    waiters: Arc<Notify>,
}

impl<'a> Awaiting<'a> {
    fn new(awaited: &'a Awaited, key: (EnvironmentId, ExternalId)) -> Self {
        let waiters =
            awaited.lock().unwrap_or_else(PoisonError::into_inner).entry(key.clone()).or_default().clone();
        Self { awaited, key, waiters }
    }
}

impl Drop for Awaiting<'_> {
    fn drop(&mut self) {
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = awaited.get(&self.key).filter(|waiters| Arc::ptr_eq(waiters, &self.waiters));
        // Two owners are the map and this one.
        if entry.is_some_and(|waiters| Arc::strong_count(waiters) == 2) {
            awaited.remove(&self.key);
        }
    }
}

impl Rows {
    pub(super) fn new(store: Arc<dyn MetadataStore>, capacity: usize) -> Self {
        Self {
            store,
            cache: Cache::new(capacity),
            generation: Mutex::default(),
            awaited: Mutex::default(),
            changes: broadcast::Sender::new(CHANGES_KEPT),
        }
    }

    pub(super) async fn find(
        &self,
        environment: &EnvironmentId,
        address: &SessionRef,
    ) -> Result<Option<SharedSession>> {
        let key = (environment.clone(), address.clone());
        if let Some(session) = self.cache.get(&key) {
            return Ok(Some(session));
        }
        let before = *self.lock();
        let Some(session) = self.store.find_session(environment, address).await? else {
            return Ok(None);
        };
        let session = Arc::new(session);
        let generation = self.lock();
        if *generation == before {
            self.cache.insert(key, session.clone());
        }
        Ok(Some(session))
    }

    /// The rows with these ids, in the same order; at most one query.
    pub(super) async fn find_many(
        &self,
        environment: &EnvironmentId,
        ids: &[SessionId],
    ) -> Result<Vec<Option<SharedSession>>> {
        let cached = |id: &SessionId| self.cache.get(&(environment.clone(), SessionRef::Id(id.clone())));
        let mut found: HashMap<SessionId, SharedSession> =
            ids.iter().filter_map(|id| Some((id.clone(), cached(id)?))).collect();
        let missing: Vec<_> = ids.iter().filter(|id| !found.contains_key(*id)).cloned().collect();
        if !missing.is_empty() {
            let stored = self.store.find_sessions(environment, &missing).await?;
            found.extend(stored.into_iter().map(|session| (session.id.clone(), Arc::new(session))));
        }
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
    }

    /// From now on every session that is created or changed.
    pub(super) fn changes(&self) -> watch::Changes {
        self.changes.subscribe()
    }

    /// Forgets every address that leads to these versions of a row, wakes who waits for one of them, and tells the
    /// last version, which is the newest, to who watches.
    pub(super) fn changed(&self, versions: &[&Session]) {
        let mut generation = self.lock();
        *generation += 1;
        for session in versions {
            let environment = &session.environment;
            self.cache.remove(&(environment.clone(), SessionRef::Id(session.id.clone())));
            if let Some(external) = &session.external_id {
                self.cache.remove(&(environment.clone(), SessionRef::External(external.clone())));
                let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(waiters) = awaited.remove(&(environment.clone(), external.clone())) {
                    waiters.notify_waiters();
                }
            }
        }
        if let Some(newest) = versions.last().filter(|_| self.changes.receiver_count() > 0) {
            // Nobody may be listening any more, which is no fault.
            let _ = self.changes.send(Arc::new(Session::clone(newest)));
        }
    }

    /// Waits until a session has this external id.
    pub(super) async fn wait_for(
        &self,
        environment: &EnvironmentId,
        external: &ExternalId,
    ) -> Result<SharedSession> {
        let address = SessionRef::External(external.clone());
        loop {
            let awaiting = Awaiting::new(&self.awaited, (environment.clone(), external.clone()));
            let arrival = awaiting.waiters.notified();
            if let Some(session) = self.find(environment, &address).await? {
                return Ok(session);
            }
            arrival.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, u64> {
        self.generation.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
