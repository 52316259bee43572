//! Sessions that somebody watches one by one, and how each of them was known last.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::domain::id::{EnvironmentId, SessionId};
use crate::domain::session::{Session, SharedSession};

type Key = (EnvironmentId, SessionId);

/// Everything that is watched.
#[derive(Default)]
pub(super) struct Watched(Arc<Mutex<HashMap<Key, Known>>>);

struct Known {
    watchers: usize,
    /// The newest version that was read or told.
    session: SharedSession,
}

/// One watcher; the last one to leave takes the entry along.
pub(super) struct Watching {
    all: Arc<Mutex<HashMap<Key, Known>>>,
    key: Key,
}

impl Watched {
    /// One more watches this session, who has just read it.
    pub(super) fn join(&self, session: &SharedSession) -> Watching {
        let key = key(session);
        let mut all = lock(&self.0);
        let known = all.entry(key.clone()).or_insert_with(|| Known { watchers: 0, session: session.clone() });
        known.watchers += 1;
        drop(all);
        Watching { all: self.0.clone(), key }
    }

    /// Every watcher is about to hear of this version.
    pub(super) fn told(&self, session: &SharedSession) {
        if let Some(known) = lock(&self.0).get_mut(&key(session)) {
            known.session = session.clone();
        }
    }

    /// Whether somebody watches the session and has not heard of this version.
    pub(super) fn is_news(&self, session: &Session) -> bool {
        lock(&self.0).get(&key(session)).is_some_and(|known| session.is_newer_than(&known.session))
    }

    /// Whether somebody watches the session.
    pub(super) fn contains(&self, key: &Key) -> bool {
        lock(&self.0).contains_key(key)
    }

    /// How many watch.
    pub(super) fn watchers(&self) -> usize {
        lock(&self.0).values().map(|known| known.watchers).sum()
    }

    /// What is watched.
    pub(super) fn names(&self) -> Vec<Key> {
        lock(&self.0).keys().cloned().collect()
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        if let Some(known) = all.get_mut(&self.key) {
            known.watchers -= 1;
            if known.watchers == 0 {
                all.remove(&self.key);
            }
        }
    }
}

fn key(session: &Session) -> Key {
    (session.environment.clone(), session.id.clone())
}

fn lock(all: &Mutex<HashMap<Key, Known>>) -> MutexGuard<'_, HashMap<Key, Known>> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::clock::Timestamp;
    use crate::domain::session::NewSession;

    fn version(of: &Session, at: i64) -> SharedSession {
        Arc::new(Session { updated_at: Timestamp::from_millis(at), ..of.clone() })
    }

    #[test]
    fn only_a_version_that_nobody_told_is_news_and_nobody_leaves_anything_behind() {
        let new =
            NewSession { kind: "a".to_owned(), task_identifier: "t".to_owned(), ..NewSession::default() };
        let session = new.into_session(EnvironmentId::from_stored("env"), Timestamp::from_millis(1));
        let session = session.expect("valid");
        let watched = Watched::default();
        assert!(!watched.is_news(&version(&session, 9)), "nobody watches");
        let (one, two) = (watched.join(&version(&session, 1)), watched.join(&version(&session, 2)));
        assert_eq!(watched.watchers(), 2);
        assert!(watched.is_news(&version(&session, 2)), "the first one has seen an older version");
        watched.told(&version(&session, 2));
        assert!(!watched.is_news(&version(&session, 2)) && watched.is_news(&version(&session, 3)));
        drop(one);
        assert!(watched.contains(&key(&session)));
        drop(two);
        assert!(watched.names().is_empty());
    }
}
