//! Request limits of `/api/*`: per environment for secret keys, per token for public ones.

use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
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
    const fn new(burst: u32, refill: u32, per: Duration) -> Self {
        match (NonZeroU32::new(burst), NonZeroU32::new(refill)) {
            (Some(burst), Some(refill)) => Self { burst, refill, per },
            _ => Self { burst: NonZeroU32::MIN, refill: NonZeroU32::MIN, per },
        }
    }

    fn quota(self) -> Quota {
        let period = (self.per / self.refill.get()).max(Duration::from_nanos(1));
        Quota::with_period(period)
            .map_or_else(|| Quota::per_second(self.refill), |q| q.allow_burst(self.burst))
    }
}

/// The limits of both kinds of callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimits {
    /// Per environment, for secret keys.
    pub environment: Rate,
    /// Per public token.
    pub token: Rate,
}

impl Default for RateLimits {
    fn default() -> Self {
        Self {
            environment: Rate::new(750, 250, Duration::from_secs(10)),
            token: Rate::new(60, 60, Duration::from_secs(60)),
        }
    }
}

/// The state of the limits.
pub struct RateLimiter {
    limits: RateLimits,
    environments: DefaultKeyedRateLimiter<u64>,
    tokens: DefaultKeyedRateLimiter<u64>,
    hasher: RandomState,
    clock: DefaultClock,
    checks: AtomicU32,
}

impl RateLimiter {
    /// Everybody starts with a full burst.
    pub fn new(limits: RateLimits) -> Self {
        Self {
            limits,
            environments: DefaultKeyedRateLimiter::keyed(limits.environment.quota()),
            tokens: DefaultKeyedRateLimiter::keyed(limits.token.quota()),
            hasher: RandomState::new(),
            clock: DefaultClock::default(),
            checks: AtomicU32::new(0),
        }
    }

    /// Counts a request.
    ///
    /// # Errors
    /// [`Error::RateLimited`].
    pub fn check(&self, caller: &Caller, bearer: &str, now: &dyn Clock) -> Result<()> {
        let (limiter, rate, key) = if caller.is_private() {
            (&self.environments, self.limits.environment, self.key(caller.environment.as_str()))
        } else {
            (&self.tokens, self.limits.token, self.key(bearer))
        };
        if self.checks.fetch_add(1, Ordering::Relaxed) % SWEEP_EVERY == SWEEP_EVERY - 1 {
            self.environments.retain_recent();
            self.tokens.retain_recent();
        }
        limiter.check_key(&key).map_err(|until| {
            let wait = until.wait_time_from(self.clock.now());
            let reset = now.now().plus(wait.max(Duration::from_millis(1)));
            Error::RateLimited(RateLimit { limit: rate.burst.get(), reset })
        })
    }

    fn key(&self, text: impl Hash) -> u64 {
        self.hasher.hash_one(text)
    }
}

impl fmt::Debug for RateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimiter").field("limits", &self.limits).finish()
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::domain::{CallerKind, EnvironmentId, KeyId, Scopes, TestClock, Timestamp};

    fn caller(kind: CallerKind) -> Caller {
        Caller {
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
