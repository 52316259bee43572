//! What bearers have turned out to be, within a budget of bytes. A bearer can have 16 KiB and say as many scopes as fit,
//! so neither it nor their number may decide how much is kept.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::digest;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::domain::{Caller, CallerKind};

/// Bytes of one cache.
const BUDGET: u64 = 8 * 1024 * 1024;
/// How many bearers the budget is expected to hold.
const EXPECTED: usize = 10_000;
/// What an allocation takes beside what was asked for, about.
const ALLOCATION: usize = 16;
/// What a cache takes for an entry beside key and value, about.
const ENTRY: usize = 64;

/// A bearer's name in the caches: its SHA-256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct BearerHash([u8; digest::SHA256_OUTPUT_LEN]);

impl BearerHash {
    pub(super) fn of(bearer: &str) -> Self {
        let mut hash = [0; digest::SHA256_OUTPUT_LEN];
        hash.copy_from_slice(digest::digest(&digest::SHA256, bearer.as_bytes()).as_ref());
        Self(hash)
    }
}

/// What knows how much memory it takes.
pub(super) trait Footprint {
    /// Bytes on the heap that are its own, about.
    fn heap(&self) -> usize;
}

impl Footprint for Caller {
    fn heap(&self) -> usize {
        let scopes: &[String] = match &self.kind {
            CallerKind::Root => &[],
            CallerKind::ScopedKey(scopes) | CallerKind::Public(scopes) => scopes.as_slice(),
        };
        let texts = scopes.iter().map(|scope| size_of::<String>() + ALLOCATION + scope.len()).sum::<usize>();
        let ids = [Some(self.environment.as_str()), Some(self.key.as_str())];
        let ids = ids.into_iter().chain([self.signed_with.as_ref().map(|key| key.as_str())]).flatten();
        texts + ids.map(|id| ALLOCATION + id.len()).sum::<usize>()
    }
}

#[derive(Clone)]
struct Weight;

impl<T: Footprint> Weighter<BearerHash, Arc<T>> for Weight {
    fn weight(&self, _: &BearerHash, value: &Arc<T>) -> u64 {
        (ENTRY + size_of::<BearerHash>() + size_of::<T>() + value.heap()) as u64
    }
}

/// Bearers, and what each opens.
pub(super) struct BearerCache<T: Footprint>(Cache<BearerHash, Arc<T>, Weight>);

impl<T: Footprint> Default for BearerCache<T> {
    fn default() -> Self {
        Self(Cache::with_weighter(EXPECTED, BUDGET, Weight))
    }
}

impl<T: Footprint> BearerCache<T> {
    pub(super) fn get(&self, bearer: &BearerHash) -> Option<Arc<T>> {
        self.0.get(bearer)
    }

    pub(super) fn insert(&self, bearer: BearerHash, value: Arc<T>) {
        self.0.insert(bearer, value);
    }

    pub(super) fn remove(&self, bearer: &BearerHash) {
        self.0.remove(bearer);
    }

    pub(super) fn clear(&self) {
        self.0.clear();
    }
}

impl<T: Footprint> fmt::Debug for BearerCache<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerCache")
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::domain::{EnvironmentId, KeyId, Scopes};

    fn caller(scopes: usize) -> Arc<Caller> {
        Arc::new(Caller {
            environment: EnvironmentId::from_stored("env_a"),
            kind: CallerKind::Public(Scopes::new(vec!["a".to_owned(); scopes])),
            key: KeyId::from_stored("key_a"),
            signed_with: None,
            expires_at: None,
            revoked: CancellationToken::new(),
        })
    }

    #[test]
    fn many_bearers_with_many_scopes_stay_within_the_budget() {
        let cache = BearerCache::default();
        for n in 0..2_000 {
            cache.insert(BearerHash::of(&n.to_string()), caller(2_800));
        }
        assert!(cache.0.len() > 10, "{} are kept", cache.0.len());
        assert!(cache.0.weight() <= BUDGET, "{} bytes", cache.0.weight());
        // Each has at least the texts of its scopes.
        assert!(cache.0.len() * 2_800 * size_of::<String>() <= usize::try_from(BUDGET).expect("fits"));
    }

    #[test]
    fn as_many_usual_bearers_fit_as_are_expected() {
        let cache = BearerCache::default();
        for n in 0..EXPECTED {
            cache.insert(BearerHash::of(&n.to_string()), caller(2));
        }
        assert!(cache.0.len() > EXPECTED * 9 / 10, "{} are kept", cache.0.len());
        let hash = BearerHash::of("shown");
        cache.insert(hash, caller(1));
        assert!(cache.get(&hash).is_some() && cache.get(&BearerHash::of("other")).is_none());
        cache.remove(&hash);
        assert!(cache.get(&hash).is_none());
    }
}
