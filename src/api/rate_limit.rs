//! Request limits of `/api/*` and `/graphql`: per environment for secret keys, per token for public ones.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
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

    /// How long one request takes to be regained.
    fn period(self) -> Duration {
        (self.per / self.refill.get()).max(Duration::from_nanos(1))
    }

    fn quota(self) -> Quota {
        Quota::with_period(self.period())
            .map_or_else(|| Quota::per_second(self.refill), |q| q.allow_burst(self.burst))
    }
}

/// The limits of all kinds of callers; `None` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimits {
    /// Per environment, for secret keys.
    pub environment: Option<Rate>,
    /// Per public token.
    pub token: Option<Rate>,
    /// Per address of those that show neither.
    pub address: Option<Rate>,
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

    fn check(
        &self,
        key: u64,
        cost: NonZeroU32,
        clock: &DefaultClock,
        now: &dyn Clock,
    ) -> Result<(), Exceeded> {
        if self.checks.fetch_add(1, Ordering::Relaxed) % SWEEP_EVERY == SWEEP_EVERY - 1 {
            self.used.retain_recent();
        }
        let limit = self.rate.burst.get();
        let checked = self.used.check_key_n(&key, cost).map_err(|_| Exceeded::Burst(limit))?;
        checked.map_err(|until| {
            let wait = until.wait_time_from(clock.now()).max(Duration::from_millis(1));
            // Those that are missing are regained in the wait.
            let missing = wait.as_nanos().div_ceil(self.rate.period().as_nanos());
            let remaining = cost.get().saturating_sub(u32::try_from(missing).unwrap_or(u32::MAX));
            Exceeded::Rate(RateLimit { limit, remaining, reset: now.now().plus(wait), wait })
        })
    }
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exceeded {
    /// It costs more than this, the burst, and would be refused at any time.
    Burst(u32),
    /// It may come later.
    Rate(RateLimit),
}

impl From<Exceeded> for Error {
    fn from(exceeded: Exceeded) -> Self {
        match exceeded {
            Exceeded::Rate(limit) => Self::RateLimited(limit),
            Exceeded::Burst(limit) => Self::malformed(
                "request",
                format!("costs more than the {limit} that the rate limit allows at once"),
            ),
        }
    }
}

/// Who is counted: an environment for its secret keys, a public token for itself, an address for whoever shows neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    kind: Kind,
    key: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Environment,
    Token,
    Address,
}

/// The state of the limits.
pub struct RateLimiter {
    environments: Option<Limit>,
    tokens: Option<Limit>,
    addresses: Option<Limit>,
    hasher: RandomState,
    clock: DefaultClock,
}

impl RateLimiter {
    /// Everybody starts with a full burst.
    pub fn new(limits: RateLimits) -> Self {
        Self {
            environments: limits.environment.map(Limit::new),
            tokens: limits.token.map(Limit::new),
            addresses: limits.address.map(Limit::new),
            hasher: RandomState::new(),
            clock: DefaultClock::default(),
        }
    }

    /// Whom a request of `caller`, who showed `bearer`, is counted with.
    pub fn counted(&self, caller: &Caller, bearer: &str) -> Counted {
        let (kind, name) = match caller.is_private() {
            true => (Kind::Environment, caller.environment.as_str()),
            false => (Kind::Token, bearer),
        };
        Counted { kind, key: self.hasher.hash_one(name) }
    }

    /// Whom a request without valid credentials is counted with. Who has one address of IPv6 has a /64 of them.
    pub fn counted_by_address(&self, address: IpAddr) -> Counted {
        let key = match address.to_canonical() {
            IpAddr::V4(address) => self.hasher.hash_one(address),
            IpAddr::V6(address) => self.hasher.hash_one(&address.segments()[..4]),
        };
        Counted { kind: Kind::Address, key }
    }

    /// Counts a request as `cost` requests; what is refused is not counted.
    ///
    /// # Errors
    /// [`Exceeded::Burst`] whenever a cost above the burst is asked for; [`Exceeded::Rate`].
    pub fn check(&self, counted: Counted, cost: u32, now: &dyn Clock) -> Result<(), Exceeded> {
        let limit = match counted.kind {
            Kind::Environment => &self.environments,
            Kind::Token => &self.tokens,
            Kind::Address => &self.addresses,
        };
        match limit.as_ref().zip(NonZeroU32::new(cost)) {
            Some((limit, cost)) => limit.check(counted.key, cost, &self.clock, now),
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
            address: None,
        };
        let limiter = RateLimiter::new(limits);
        let clock = TestClock::at(Timestamp::from_millis(1000));
        let check = |caller: &Caller, bearer: &str| limiter.check(limiter.counted(caller, bearer), 1, &clock);
        let public = caller(CallerKind::Public(Scopes::default()));
        assert!(check(&public, "a").is_ok());
        assert!(check(&public, "b").is_ok());
        let Err(Exceeded::Rate(refused)) = check(&public, "a") else { panic!("refused") };
        assert_eq!((refused.limit, refused.remaining), (1, 0));
        assert!(refused.reset > clock.now());
        let root = caller(CallerKind::Root);
        assert!(check(&root, "k1").is_ok());
        assert!(check(&root, "k2").is_ok());
        assert!(check(&root, "k3").is_err());
    }

    #[test]
    fn a_request_costs_what_it_says_and_all_of_it_or_nothing() {
        let hour = Duration::from_secs(3600);
        let limiter = RateLimiter::new(RateLimits {
            environment: Rate::new(10, 10, 10 * hour),
            token: None,
            address: None,
        });
        let clock = TestClock::at(Timestamp::from_millis(1000));
        let counted = limiter.counted(&caller(CallerKind::Root), "k");
        let check = |cost| limiter.check(counted, cost, &clock);
        assert_eq!(check(11), Err(Exceeded::Burst(10)));
        assert_eq!(check(0), Ok(()));
        assert_eq!(check(6), Ok(()));
        let Err(Exceeded::Rate(refused)) = check(6) else { panic!("refused") };
        assert_eq!((refused.limit, refused.remaining), (10, 4));
        assert!(refused.wait <= 2 * hour && refused.wait > hour, "{:?}", refused.wait);
        assert_eq!(check(11), Err(Exceeded::Burst(10)), "at any time");
        assert_eq!(check(4), Ok(()), "what was refused was not counted");
        assert!(matches!(check(1), Err(Exceeded::Rate(refused)) if refused.remaining == 0));
        let free = limiter.counted(&caller(CallerKind::Public(Scopes::default())), "t");
        assert_eq!(limiter.check(free, 1_000_000, &clock), Ok(()), "no limit");
    }

    #[test]
    fn an_address_is_one_caller_and_of_ipv6_a_whole_network_is() {
        let address = Rate::new(1, 1, Duration::from_secs(3600));
        let limiter = RateLimiter::new(RateLimits { environment: None, token: None, address });
        let clock = TestClock::at(Timestamp::from_millis(1000));
        let check = |address: &str| {
            limiter.check(limiter.counted_by_address(address.parse().expect("an address")), 1, &clock).is_ok()
        };
        for (address, passes) in [
            ("192.0.2.1", true),
            ("192.0.2.1", false),
            ("::ffff:192.0.2.1", false),
            ("192.0.2.2", true),
            ("2001:db8::1", true),
            ("2001:db8::ffff:1", false),
            ("2001:db8:0:1::1", true),
        ] {
            assert_eq!(check(address), passes, "{address}");
        }
    }
}
