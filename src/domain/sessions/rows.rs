//! Session rows as the use cases read them: through a cache, and awaited where they do not exist yet.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::sync::broadcast;

use super::SessionsConfig;
use super::waiters::{Waiter, Waiters};
use super::watched::{Watched, Watching};
use crate::domain::changes::{ChangeFeed, ChangedSession};
use crate::domain::clock::Timestamp;
use crate::domain::error::Result;
use crate::domain::id::{EnvironmentId, ExternalId, SessionId, SessionRef};
use crate::domain::port::{ChangeCursor, MetadataStore};
use crate::domain::session::{Session, SharedSession};
use crate::domain::watch;

/// Changes kept for who is slow to take them.
const CHANGES_KEPT: usize = 1024;
/// Sessions whose last version told is remembered: more than can be told while one change is on its way here.
const VERSIONS_KEPT: usize = CHANGES_KEPT;
/// How often a row that another process may create is looked for, whatever that process tells.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Most ids that one query asks for.
const QUERY_IDS: usize = 200;

type Key = (EnvironmentId, SessionRef);

/// Reads rows. A cached row may refuse an append but never allows one on its own: what allows is the log,
/// which checks the seal in the commit. `expires_at` and ids never change, so they may come from the cache.
pub(super) struct Rows {
    store: Arc<dyn MetadataStore>,
    /// Hears of what is changed here.
    feed: Arc<dyn ChangeFeed>,
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
    /// Sessions that are watched one by one.
    watched: Watched,
    /// What was told last of a session. Changed under the lock of `generation`.
    told: Cache<SessionId, SharedSession>,
}

impl Rows {
    pub(super) fn new(
        store: Arc<dyn MetadataStore>,
        feed: Arc<dyn ChangeFeed>,
        config: SessionsConfig,
    ) -> Self {
        Self {
            store,
            feed,
            replicated: config.replicated,
            cache: Cache::new(config.cached_rows),
            generation: Mutex::default(),
            awaited: Waiters::default(),
            open: Waiters::default(),
            changes: broadcast::Sender::new(CHANGES_KEPT),
            watched: Watched::default(),
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
        for session in self.read_many(environment, &Vec::from_iter(missing)).await? {
            found.insert(session.id.clone(), session);
        }
        Ok(found)
    }

    /// The rows with these ids as they stand.
    async fn read_many(&self, environment: &EnvironmentId, ids: &[SessionId]) -> Result<Vec<SharedSession>> {
        let mut found = Vec::with_capacity(ids.len());
        for some in ids.chunks(QUERY_IDS) {
            let before = *self.lock();
            for session in self.store.find_sessions(environment, some).await? {
                let session = Arc::new(session);
                self.remember(before, &SessionRef::Id(session.id.clone()), &session);
                found.push(session);
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

    /// One who watches a session, which he has just read. He must have begun to listen to [`Rows::changes`] before,
    /// and stop to listen after.
    pub(super) fn watch(&self, session: &SharedSession) -> Watching {
        self.watched.join(session)
    }

    /// As [`Rows::learned`], of what has been changed here.
    pub(super) fn changed(&self, versions: &[&Session]) {
        self.learned(versions);
        if let Some(newest) = versions.last() {
            self.feed.announce(ChangedSession::of(newest));
        }
    }

    /// Takes in what other replicas have changed: forgets it, and reads anew what somebody here waits for.
    pub(super) async fn heard(&self, changes: &[ChangedSession]) -> Result<()> {
        {
            let mut generation = self.lock();
            *generation += 1;
            for ChangedSession { environment, id, .. } in changes {
                self.cache.remove(&(environment.clone(), SessionRef::Id(id.clone())));
            }
        }
        let all = self.has_free_watchers();
        let mut wanted: HashMap<&EnvironmentId, Vec<SessionId>> = HashMap::new();
        for ChangedSession { environment, id, .. } in changes {
            let key = (environment.clone(), id.clone());
            if all
                || self.open.contains(&key)
                || self.watched.contains(&key)
                || self.awaited.any(|(awaited, _)| awaited == environment)
            {
                wanted.entry(environment).or_default().push(id.clone());
            }
        }
        for (environment, ids) in wanted {
            for some in ids.chunks(QUERY_IDS) {
                for session in self.read_many(environment, some).await? {
                    self.learned(&[&session]);
                }
                // Watchers take what they were told before there is too much of it.
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Makes up for changes that nobody has told of: everything that is not older than `since` is looked at, as far as
    /// somebody here waits for it.
    pub(super) async fn catch_up(&self, since: Timestamp) -> Result<()> {
        {
            let mut generation = self.lock();
            *generation += 1;
            self.cache.clear();
        }
        self.look_again().await?;
        let mut cursor = ChangeCursor { updated_at: since, id: SessionId::from_stored("") };
        while self.has_free_watchers() {
            let page = self.store.changed_since(&cursor, QUERY_IDS).await?;
            page.iter().for_each(|session| self.learned(&[session]));
            let Some(last) = page.last().filter(|_| page.len() == QUERY_IDS) else { break };
            cursor = ChangeCursor { updated_at: last.updated_at, id: last.id.clone() };
            tokio::task::yield_now().await;
        }
        self.awaited.names().iter().for_each(|name| self.awaited.wake(name));
        Ok(())
    }

    /// Reads the sessions that somebody here watches or writes to, and tells what is new about them.
    pub(super) async fn look_again(&self) -> Result<()> {
        let mut ids: HashMap<EnvironmentId, BTreeSet<SessionId>> = HashMap::new();
        for (environment, id) in self.open.names().into_iter().chain(self.watched.names()) {
            ids.entry(environment).or_default().insert(id);
        }
        for (environment, ids) in ids {
            for session in self.read_many(&environment, &Vec::from_iter(ids)).await? {
                if session.closed.is_some() || self.watched.is_news(&session) {
                    self.learned(&[&session]);
                }
            }
        }
        Ok(())
    }

    /// Whether somebody watches who has not said which session: a list, or one that is still being looked for.
    fn has_free_watchers(&self) -> bool {
        self.changes.receiver_count() > self.watched.watchers()
    }

    /// Forgets every address that leads to these versions of a row, wakes who waits for one of them, and tells the
    /// last version, which is the newest, to who watches.
    ///
    /// Two changes of a session may come here in another order than that in which they were stored. The older one is
    /// not told then: who watches has seen a version that includes it.
    fn learned(&self, versions: &[&Session]) {
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
            self.watched.told(&newest);
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
                // What another process tells of a create may be lost with it.
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
