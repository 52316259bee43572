//! Request limits of `/api/*`: per environment for secret keys, per token for public ones.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota};

use crate::domain::error::RateLimit;
use crate::domain::{Caller, Clock, Error, Result};

/// How many checks pass between two sweeps of limiters that are full again.
const SWEEP_EVERY: u32 = 4096;

/// One limit: `burst` at once, refilled evenly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Requests that may come at once.
    pub burst: NonZeroU32,
    /// Requests regained...
    pub refill: NonZeroU32,
    /// ...in this time.
    pub per: Duration,
}

impl Rate {
    /// A rate, or `None` (no limit) if either number is zero.
    pub fn new(burst: u32, refill: u32, per: Duration) -> Option<Self> {
        Some(Self { burst: NonZeroU32::new(burst)?, refill: NonZeroU32::new(refill)?, per })
    }

    fn quota(self) -> Quota {
        let period = (self.per / self.refill.get()).max(Duration::from_nanos(1));
        Quota::with_period(period)
            .map_or_else(|| Quota::per_second(self.refill), |q| q.allow_burst(self.burst))
    }
}

/// The limits of both kinds of callers; `None` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimits {
    /// Per environment, for secret keys.
    pub environment: Option<Rate>,
    /// Per public token.
    pub token: Option<Rate>,
}

/// One limit and who has used how much of it.
struct Limit {
    rate: Rate,
    used: DefaultKeyedRateLimiter<u64>,
    checks: AtomicU32,
}

impl Limit {
    fn new(rate: Rate) -> Self {
        Self { rate, used: DefaultKeyedRateLimiter::keyed(rate.quota()), checks: AtomicU32::new(0) }
    }

    fn check(&self, key: u64, clock: &DefaultClock, now: &dyn Clock) -> Result<()> {
        if self.checks.fetch_add(1, Ordering::Relaxed) % SWEEP_EVERY == SWEEP_EVERY - 1 {
            self.used.retain_recent();
        }
        self.used.check_key(&key).map_err(|until| {
            let wait = until.wait_time_from(clock.now()).max(Duration::from_millis(1));
            Error::RateLimited(RateLimit { limit: self.rate.burst.get(), reset: now.now().plus(wait), wait })
        })
    }
}

/// The state of the limits.
pub struct RateLimiter {
    environments: Option<Limit>,
    tokens: Option<Limit>,
    hasher: RandomState,
    clock: DefaultClock,
}

impl RateLimiter {
    /// Everybody starts with a full burst.
    pub fn new(limits: RateLimits) -> Self {
        Self {
            environments: limits.environment.map(Limit::new),
            tokens: limits.token.map(Limit::new),
            hasher: RandomState::new(),
            clock: DefaultClock::default(),
        }
    }

    /// Counts a request.
    ///
    /// # Errors
    /// [`Error::RateLimited`].
    pub fn check(&self, caller: &Caller, bearer: &str, now: &dyn Clock) -> Result<()> {
        let (limit, name) = if caller.is_private() {
            (&self.environments, caller.environment.as_str())
        } else {
            (&self.tokens, bearer)
        };
        match limit {
            Some(limit) => limit.check(self.hasher.hash_one(name), &self.clock, now),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for RateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RateLimiter")
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::domain::{CallerKind, EnvironmentId, KeyId, Scopes, TestClock, Timestamp};

    fn caller(kind: CallerKind) -> Caller {
        Caller {
            signed_with: None,
            environment: EnvironmentId::from_stored("env_a"),
            kind,
            key: KeyId::from_stored("key_a"),
            expires_at: None,
            revoked: CancellationToken::new(),
        }
    }

    #[test]
    fn a_token_is_limited_by_itself_and_a_key_with_its_environment() {
        let limits = RateLimits {
            environment: Rate::new(2, 1, Duration::from_secs(3600)),
            token: Rate::new(1, 1, Duration::from_secs(3600)),
        };
        let limiter = RateLimiter::new(limits);
        let clock = TestClock::at(Timestamp::from_millis(1000));
        let public = caller(CallerKind::Public(Scopes::default()));
        assert!(limiter.check(&public, "a", &clock).is_ok());
        assert!(limiter.check(&public, "b", &clock).is_ok());
        let Err(Error::RateLimited(refused)) = limiter.check(&public, "a", &clock) else { panic!("refused") };
        assert_eq!(refused.limit, 1);
        assert!(refused.reset > clock.now());
        let root = caller(CallerKind::Root);
        assert!(limiter.check(&root, "k1", &clock).is_ok());
        assert!(limiter.check(&root, "k2", &clock).is_ok());
        assert!(limiter.check(&root, "k3", &clock).is_err());
    }
}
