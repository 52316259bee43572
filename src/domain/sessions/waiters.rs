//! Waiting for something that has a name: many may wait for one name, and none leaves anything behind.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

type Names<K> = Mutex<HashMap<K, Arc<Notify>>>;

/// Everybody who waits.
pub(super) struct Waiters<K: Hash + Eq + Clone>(Arc<Names<K>>);

/// One who waits; the last one to give up takes the name along.
pub(super) struct Waiter<K: Hash + Eq + Clone> {
    names: Arc<Names<K>>,
    key: K,
    /// Taken when it is given up.
    notify: Option<Arc<Notify>>,
}

impl<K: Hash + Eq + Clone> Default for Waiters<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Hash + Eq + Clone> Waiters<K> {
    /// Joins those who wait for `key`.
    pub(super) fn join(&self, key: K) -> Waiter<K> {
        let notify = lock(&self.0).entry(key.clone()).or_default().clone();
        Waiter { names: self.0.clone(), key, notify: Some(notify) }
    }

    /// Wakes all who wait for `key`; who joins later waits for the next time.
    pub(super) fn wake(&self, key: &K) {
        let woken = lock(&self.0).remove(key);
        if let Some(notify) = woken {
            notify.notify_waiters();
        }
    }

    /// The names that are waited for.
    pub(super) fn names(&self) -> Vec<K> {
        lock(&self.0).keys().cloned().collect()
    }

    /// Whether somebody waits for `key`.
    pub(super) fn contains(&self, key: &K) -> bool {
        lock(&self.0).contains_key(key)
    }

    /// Whether somebody waits for such a name.
    pub(super) fn any(&self, is_such: impl FnMut(&K) -> bool) -> bool {
        lock(&self.0).keys().any(is_such)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        lock(&self.0).len()
    }
}

impl<K: Hash + Eq + Clone> Waiter<K> {
    /// Completes at the next wake after this call.
    pub(super) fn woken(&self) -> OwnedNotified {
        self.notify.clone().unwrap_or_default().notified_owned()
    }
}

impl<K: Hash + Eq + Clone> Drop for Waiter<K> {
    fn drop(&mut self) {
        let mut names = lock(&self.names);
        // Under the lock, so that of two that give up together the second one sees the first one gone.
        let own = self.notify.take();
        let is_own = |notify: &Arc<Notify>| own.as_ref().is_some_and(|own| Arc::ptr_eq(own, notify));
        // The name itself and this one.
        if names.get(&self.key).is_some_and(|notify| is_own(notify) && Arc::strong_count(notify) == 2) {
            names.remove(&self.key);
        }
    }
}

fn lock<K>(names: &Names<K>) -> MutexGuard<'_, HashMap<K, Arc<Notify>>> {
    names.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_who_wait_for_a_name_are_woken_and_none_leaves_it_behind() {
        let waiters = Waiters::default();
        let (a, b, other) = (waiters.join("a"), waiters.join("a"), waiters.join("b"));
        let (first, second) = (a.woken(), b.woken());
        waiters.wake(&"a");
        tokio::join!(first, second);
        assert_eq!(waiters.len(), 1);
        let again = waiters.join("a");
        drop((a, b));
        assert_eq!(waiters.len(), 2, "those who were woken do not take along the name of who joined later");
        drop((again, other));
        assert_eq!(waiters.len(), 0);
    }
}
