//! Bearer text to [`Caller`], and tokens from callers. The only user of JWTs and of encryption.
//!
//! Knows no transport: what a refusal looks like on the wire is `api`'s.

mod cache;
pub mod direct;
pub mod keys;
mod leases;
pub mod signed_url;
pub mod token;
pub mod vault;

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quick_cache::sync::Cache;
use secrecy::{ExposeSecret, SecretString};
use tokio_util::sync::CancellationToken;

use crate::domain::timer::Timers;
use crate::domain::{
    Caller, CallerKind, Clock, EnvironmentId, Error, KeyId, MetadataStore, Result, Scopes, Session, Ticker,
    Timestamp,
};
use cache::{BearerCache, BearerHash};
use direct::Grant;
use leases::Leases;
use token::Bearer;
use vault::Vault;

/// How often the key revision is read: a revocation by another process takes effect within a second.
const REVISION_EVERY: Duration = Duration::from_millis(400);
/// Environments whose signing keys are kept in memory.
const CACHED_ENVIRONMENTS: usize = 10_000;
/// Validity of the token that a create answers with.
const SESSION_TOKEN_TTL: Duration = Duration::from_secs(3600);
/// A longer bearer is nobody's; it is not even hashed.
const BEARER_MAX: usize = 16 * 1024;

const INVALID_KEY: Error = Error::Unauthenticated("Invalid API key");

/// A root key that verifies and signs an environment's tokens.
#[derive(Clone)]
struct SigningKey {
    id: KeyId,
    secret: SecretString,
    created_at: Timestamp,
    ends_at: Option<Timestamp>,
}

/// Authentication of every door.
pub struct Auth {
    store: Arc<dyn MetadataStore>,
    vault: Arc<Vault>,
    clock: Arc<dyn Clock>,
    callers: BearerCache<Caller>,
    /// With the sweep that they were read under: keys from before one are worth nothing after it.
    signing: Cache<EnvironmentId, (u64, Arc<[SigningKey]>)>,
    grants: BearerCache<Grant>,
    leases: Leases,
    /// Wakes the streams that a revocation ends.
    timers: Arc<Timers>,
    /// The key revision that the caches were filled under.
    revision: AtomicI64,
    /// Counts sweeps, so that a look-up that began before one is not cached after it.
    sweeps: AtomicU64,
    /// The next moment at which a key's grace ends.
    next_end: Mutex<Option<Timestamp>>,
}

impl Auth {
    /// Authentication over a store and the vault that seals its keys.
    pub fn new(
        store: Arc<dyn MetadataStore>,
        vault: Arc<Vault>,
        clock: Arc<dyn Clock>,
        timers: Arc<Timers>,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            vault,
            clock,
            callers: BearerCache::default(),
            signing: Cache::new(CACHED_ENVIRONMENTS),
            grants: BearerCache::default(),
            leases: Leases::default(),
            timers,
            revision: AtomicI64::new(-1),
            sweeps: AtomicU64::new(0),
            next_end: Mutex::new(None),
        })
    }

    /// Who shows this bearer.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] in the words that clients know; [`Error::Unavailable`].
    pub async fn authenticate(&self, bearer: &str) -> Result<Arc<Caller>> {
        if bearer.len() > BEARER_MAX || bearer.starts_with("pk_") {
            return Err(INVALID_KEY);
        }
        let hash = BearerHash::of(bearer);
        if let Some(caller) = self.callers.get(&hash) {
            let current = caller.expires_at.is_none_or(|at| self.clock.now() < at);
            if current && !caller.revoked.is_cancelled() {
                return Ok(caller);
            }
            self.callers.remove(&hash);
        }
        loop {
            let before = self.sweeps.load(Ordering::Acquire);
            let caller = Arc::new(match Bearer::of(bearer) {
                Bearer::Public(environment) => self.public(bearer, environment).await?,
                Bearer::Secret => self.secret(bearer).await?,
            });
            self.callers.insert(hash, caller.clone());
            if self.sweeps.load(Ordering::Acquire) == before {
                return Ok(caller);
            }
            self.callers.remove(&hash);
        }
    }

    async fn secret(&self, bearer: &str) -> Result<Caller> {
        let now = self.clock.now();
        let key = self.store.find_key(&self.vault.lookup_hash(bearer)).await?;
        let key = key.filter(|key| key.is_live(now)).ok_or(INVALID_KEY)?;
        let revoked = self.leases.of(&key.environment, &key.id, None);
        let kind = key.scopes.map_or(CallerKind::Root, CallerKind::ScopedKey);
        Ok(Caller {
            environment: key.environment,
            kind,
            key: key.id,
            signed_with: None,
            expires_at: key.ends_at,
            revoked,
        })
    }

    async fn public(&self, bearer: &str, environment: Option<EnvironmentId>) -> Result<Caller> {
        const UNKNOWN: Error = Error::Unauthenticated("Invalid Public Access Token");
        const INVALID: Error = Error::Unauthenticated("Public Access Token is invalid");
        let environment = environment.ok_or(UNKNOWN)?;
        let now = self.clock.now();
        let signing = self.signing_keys(&environment).await?;
        if signing.is_empty() {
            return Err(UNKNOWN);
        }
        let live = signing.iter().filter(|key| key.ends_at.is_none_or(|at| now < at));
        let mut verified = live.filter_map(|key| {
            token::verify(bearer, key.secret.expose_secret(), now).map(|claims| (key, claims))
        });
        let (key, claims) = verified.next().ok_or(INVALID)?;
        let minted_by = claims.minted_by.as_deref().map(KeyId::from_stored);
        let mut ends = vec![Some(token::expiry(&claims)), key.ends_at];
        if let Some(by) = &minted_by {
            let keys = self.store.keys(&environment).await?;
            let by = keys.iter().find(|key| key.id == *by && key.is_live(now)).ok_or(INVALID)?;
            ends.push(by.ends_at);
        }
        Ok(Caller {
            revoked: self.leases.of(&environment, &key.id, minted_by.as_ref()),
            signed_with: minted_by.is_some().then(|| key.id.clone()),
            key: minted_by.unwrap_or_else(|| key.id.clone()),
            environment,
            kind: CallerKind::Public(Scopes::new(claims.scopes)),
            expires_at: ends.into_iter().flatten().min(),
        })
    }

    /// The live root keys of an environment; the one that signs comes first.
    async fn signing_keys(&self, environment: &EnvironmentId) -> Result<Arc<[SigningKey]>> {
        let sweep = self.sweeps.load(Ordering::Acquire);
        if let Some((read_under, keys)) = self.signing.get(environment)
            && read_under == sweep
        {
            return Ok(keys);
        }
        let now = self.clock.now();
        let mut keys = Vec::new();
        for key in self.store.keys(environment).await? {
            if key.is_root() && key.is_live(now) {
                keys.push(SigningKey {
                    secret: self.vault.open(&key.sealed_secret, environment, &key.id)?,
                    created_at: key.created_at,
                    ends_at: key.ends_at,
                    id: key.id,
                });
            }
        }
        keys.sort_by_key(|key| (key.ends_at.is_some(), std::cmp::Reverse(key.created_at)));
        let keys: Arc<[SigningKey]> = keys.into();
        if !keys.is_empty() {
            self.signing.insert(environment.clone(), (sweep, keys.clone()));
        }
        Ok(keys)
    }

    /// A token with exactly these scopes, ending at `expires_at` or with the caller, whichever is first.
    ///
    /// # Errors
    /// [`Error::ScopesExceeded`] naming every scope that the caller does not have itself.
    pub async fn mint(&self, caller: &Caller, scopes: Scopes, expires_at: Timestamp) -> Result<String> {
        let beyond: Vec<_> =
            scopes.as_slice().iter().filter(|scope| !caller.covers(scope)).cloned().collect();
        if !beyond.is_empty() {
            return Err(Error::ScopesExceeded(beyond));
        }
        let expires_at = caller.expires_at.map_or(expires_at, |own| own.min(expires_at));
        let keys = self.signing_keys(&caller.environment).await?;
        let key = keys.first().ok_or_else(|| {
            Error::Conflict("the environment has no root key to sign tokens with; create one".to_owned())
        })?;
        let minted_by = (key.id != caller.key).then_some(&caller.key);
        let (environment, now) = (&caller.environment, self.clock.now());
        token::sign(key.secret.expose_secret(), environment, &scopes, minted_by, now, expires_at)
    }

    /// The token that a create answers with: read and write on the session, as far as the caller's own scopes
    /// go, for at most an hour.
    ///
    /// # Errors
    /// As [`Auth::mint`].
    pub async fn session_token(&self, caller: &Caller, session: &Session) -> Result<String> {
        let name = session.canonical_ref();
        let mut scopes = vec![format!("read:sessions:{name}"), format!("write:sessions:{name}")];
        scopes.retain(|scope| caller.covers(scope));
        let end = self.clock.now().plus(SESSION_TOKEN_TTL);
        self.mint(caller, Scopes::new(scopes), end).await
    }

    /// Watches for keys that change or end, until `stop` is cancelled.
    pub async fn watch_keys(self: Arc<Self>, stop: CancellationToken) {
        let mut ticker = Ticker::new(REVISION_EVERY, stop);
        while ticker.tick().await {
            if let Err(error) = self.refresh().await {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot check for revoked keys");
            }
        }
    }

    /// Ends every caller whose key has ended, if any key has changed or come to its end since the last time.
    async fn refresh(&self) -> Result<()> {
        let (revision, now) = (self.store.key_revision().await?, self.clock.now());
        let ended = self.next_end().is_some_and(|at| at <= now);
        if revision == self.revision.load(Ordering::Acquire) && !ended {
            return Ok(());
        }
        self.sweeps.fetch_add(1, Ordering::AcqRel);
        self.callers.clear();
        self.signing.clear();
        self.grants.clear();
        let mut next_end = None;
        let mut failed = None;
        for environment in self.leases.environments() {
            let keys = match self.store.keys(&environment).await {
                Ok(keys) => keys,
                Err(error) => {
                    failed = Some(error);
                    continue;
                }
            };
            let live: Vec<_> = keys.iter().filter(|key| key.is_live(now)).collect();
            self.leases.keep(&environment, |id| live.iter().any(|key| key.id == *id));
            next_end = live.iter().filter_map(|key| key.ends_at).chain(next_end).min();
        }
        // Whatever failed, those whose leases have ended must see it.
        self.timers.wake_all();
        if let Some(error) = failed {
            return Err(error);
        }
        *self.next_end.lock().unwrap_or_else(PoisonError::into_inner) = next_end;
        self.revision.store(revision, Ordering::Release);
        Ok(())
    }

    fn next_end(&self) -> Option<Timestamp> {
        *self.next_end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
