//! Session rows as the use cases read them: through a cache, and awaited where they do not exist yet.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::sync::broadcast;

use super::SessionsConfig;
use super::waiters::{Waiter, Waiters};
use crate::error::Result;
use crate::id::{EnvironmentId, ExternalId, SessionId, SessionRef};
use crate::port::MetadataStore;
use crate::session::{Session, SharedSession};
use crate::watch;

/// Changes kept for who is slow to take them.
const CHANGES_KEPT: usize = 1024;
/// Sessions whose last version told is remembered: more than can be told while one change is on its way here.
const VERSIONS_KEPT: usize = CHANGES_KEPT;
/// How often a row that another process may create is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Most ids that one query asks for.
const QUERY_IDS: usize = 200;

type Key = (EnvironmentId, SessionRef);

/// Reads rows. A cached row may refuse an append but never allows one on its own: what allows is the log,
/// which checks the seal in the commit. `expires_at` and ids never change, so they may come from the cache.
pub(super) struct Rows {
    store: Arc<dyn MetadataStore>,
    replicated: bool,
    cache: Cache<Key, SharedSession>,
    /// Counts invalidations, so that a read that began before one cannot put its stale row back.
    generation: Mutex<u64>,
    /// Who waits for an external id to be given to a session.
    awaited: Waiters<(EnvironmentId, ExternalId)>,
    /// Who must know when a session is closed.
    open: Waiters<(EnvironmentId, SessionId)>,
    /// The newest version of every session that changes.
    changes: broadcast::Sender<SharedSession>,
    /// What was told last of a session. Changed under the lock of `generation`.
    told: Cache<SessionId, SharedSession>,
}

impl Rows {
    pub(super) fn new(store: Arc<dyn MetadataStore>, config: SessionsConfig) -> Self {
        Self {
            store,
            replicated: config.replicated,
            cache: Cache::new(config.cached_rows),
            generation: Mutex::default(),
            awaited: Waiters::default(),
            open: Waiters::default(),
            changes: broadcast::Sender::new(CHANGES_KEPT),
            told: Cache::new(VERSIONS_KEPT),
        }
    }

    /// The row at an address. What never changes of it is right: which session it is, when it was created, when it
    /// expires. A close, an external id that was changed and the rest may be of a moment ago where other processes
    /// write, too.
    pub(super) async fn find(
        &self,
        environment: &EnvironmentId,
        address: &SessionRef,
    ) -> Result<Option<SharedSession>> {
        if self.replicated && matches!(address, SessionRef::External(_)) {
            return self.read(environment, address).await;
        }
        let key = (environment.clone(), address.clone());
        if let Some(session) =
            self.cache.get(&key).filter(|session| self.is_current(environment, address, session))
        {
            return Ok(Some(session));
        }
        self.read(environment, address).await
    }

    /// The row at an address as it stands.
    pub(super) async fn current(
        &self,
        environment: &EnvironmentId,
        address: &SessionRef,
    ) -> Result<Option<SharedSession>> {
        match self.replicated {
            true => self.read(environment, address).await,
            false => self.find(environment, address).await,
        }
    }

    async fn read(&self, environment: &EnvironmentId, address: &SessionRef) -> Result<Option<SharedSession>> {
        let before = *self.lock();
        let Some(session) = self.store.find_session(environment, address).await? else {
            return Ok(None);
        };
        let session = Arc::new(session);
        self.remember(before, address, &session);
        Ok(Some(session))
    }

    /// Keeps a row that was read while the generation was `before`, unless something has changed since.
    fn remember(&self, before: u64, address: &SessionRef, session: &SharedSession) {
        let generation = self.lock();
        if *generation == before {
            let key = |address| (session.environment.clone(), address);
            self.cache.insert(key(SessionRef::Id(session.id.clone())), session.clone());
            self.cache.insert(key(address.clone()), session.clone());
        }
    }

    /// The rows with these ids, as far as there are any. One query for all that are not in the cache.
    pub(super) async fn find_many<'a>(
        &self,
        environment: &EnvironmentId,
        ids: impl Iterator<Item = &'a SessionId>,
    ) -> Result<HashMap<SessionId, SharedSession>> {
        let (mut found, mut missing) = (HashMap::new(), BTreeSet::new());
        for id in ids {
            let known = self.cache.get(&(environment.clone(), SessionRef::Id(id.clone())));
            match known.filter(|_| !self.replicated) {
                Some(session) => drop(found.insert(id.clone(), session)),
                None => drop(missing.insert(id.clone())),
            }
        }
        for some in Vec::from_iter(missing).chunks(QUERY_IDS) {
            let before = *self.lock();
            for session in self.store.find_sessions(environment, some).await? {
                let session = Arc::new(session);
                self.remember(before, &SessionRef::Id(session.id.clone()), &session);
                found.insert(session.id.clone(), session);
            }
        }
        Ok(found)
    }

    /// From now on every session that is created or changed.
    pub(super) fn changes(&self) -> watch::Changes {
        self.changes.subscribe()
    }

    /// A row under an external id counts only together with the one under its id, which every change forgets: two
    /// changes of the external id may come from versions that do not know of each other.
    fn is_current(&self, environment: &EnvironmentId, address: &SessionRef, session: &SharedSession) -> bool {
        match address {
            SessionRef::Id(_) => true,
            SessionRef::External(_) => {
                let by_id = self.cache.get(&(environment.clone(), SessionRef::Id(session.id.clone())));
                by_id.is_some_and(|known| Arc::ptr_eq(&known, session))
            }
        }
    }

    /// Wakes who waits for a session that was there before: whoever created it may not have come to it.
    pub(super) fn found(&self, session: &Session) {
        if let Some(external) = &session.external_id {
            self.awaited.wake(&(session.environment.clone(), external.clone()));
        }
    }

    /// One who is woken when this session is closed, if it was open when he joined.
    pub(super) fn until_closed(
        &self,
        environment: &EnvironmentId,
        session: &SessionId,
    ) -> Waiter<(EnvironmentId, SessionId)> {
        self.open.join((environment.clone(), session.clone()))
    }

    /// The sessions of whose close somebody must know.
    pub(super) fn open(&self) -> Vec<(EnvironmentId, SessionId)> {
        self.open.names()
    }

    /// Forgets every address that leads to these versions of a row, wakes who waits for one of them, and tells the
    /// last version, which is the newest, to who watches.
    ///
    /// Two changes of a session may come here in another order than that in which they were stored. The older one is
    /// not told then: who watches has seen a version that includes it.
    pub(super) fn changed(&self, versions: &[&Session]) {
        let mut generation = self.lock();
        *generation += 1;
        for session in versions {
            let environment = &session.environment;
            self.cache.remove(&(environment.clone(), SessionRef::Id(session.id.clone())));
            if let Some(external) = &session.external_id {
                self.cache.remove(&(environment.clone(), SessionRef::External(external.clone())));
                self.awaited.wake(&(environment.clone(), external.clone()));
            }
        }
        if let Some(closed) = versions.last().filter(|session| session.closed.is_some()) {
            self.open.wake(&(closed.environment.clone(), closed.id.clone()));
        }
        let Some(newest) = versions.last().filter(|_| self.changes.receiver_count() > 0) else { return };
        if self.told.get(&newest.id).is_none_or(|told| newest.is_newer_than(&told)) {
            let newest = Arc::new(Session::clone(newest));
            self.told.insert(newest.id.clone(), newest.clone());
            // Nobody may be listening any more, which is no fault.
            let _ = self.changes.send(newest);
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
            let waiter = self.awaited.join((environment.clone(), external.clone()));
            let arrival = waiter.woken();
            if let Some(session) = self.find(environment, &address).await? {
                return Ok(session);
            }
            if self.replicated {
                // Nobody here hears of what another process creates.
                let _ = tokio::time::timeout(LOOK_AGAIN, arrival).await;
            } else {
                arrival.await;
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, u64> {
        self.generation.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
