//! Whoever shows no credentials, or some that are none: counted by address, and read within a small budget of bytes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use axum::extract::ConnectInfo;
use http::header::{HeaderName, HeaderValue, RETRY_AFTER};
use http::{Extensions, HeaderMap, StatusCode};
use ipnet::IpNet;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::App;
use super::error::Failure;
use super::rate_limit::Counted;
use crate::domain::{Code, Error};

/// Largest body of a stranger's, in bytes: some twenty times the query that asks for the whole schema.
pub const BODY_MAX: usize = 64 * 1024;
/// Bytes that the bodies of all strangers may take at once.
const BODIES: usize = 8 * 1024 * 1024;
/// What a body takes at least.
const BODY_MIN: usize = 1024;
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// What is kept of strangers.
pub struct Strangers {
    proxies: Vec<IpNet>,
    bodies: Arc<Semaphore>,
}

impl Strangers {
    /// Believes these proxies.
    pub fn new(proxies: Vec<IpNet>) -> Self {
        Self { proxies, bodies: Arc::new(Semaphore::new(BODIES)) }
    }

    /// The address that a request comes from: its peer's, or the last one that no proxy of ours is known by.
    fn address(&self, headers: &HeaderMap, extensions: &Extensions) -> IpAddr {
        let peer = extensions.get::<ConnectInfo<SocketAddr>>();
        // Without a peer, which the listener always names, all are one.
        let mut address = peer.map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.0.ip().to_canonical());
        let lines = headers.get_all(FORWARDED_FOR).into_iter().rev();
        let mut hops = lines.flat_map(|line| line.to_str().unwrap_or_default().rsplit(','));
        while self.proxies.iter().any(|network| network.contains(&address)) {
            let Some(hop) = hops.next().and_then(hop) else { break };
            address = hop;
        }
        address
    }

    /// Room for a body of `announced` bytes, or of any length, until it is dropped.
    ///
    /// # Errors
    /// 413 for one that is too large; 503 while other strangers have all there is. Nobody waits: a body that waits would
    /// take its room in the connection.
    pub fn room(&self, announced: Option<u64>) -> Result<OwnedSemaphorePermit, Failure> {
        let bytes = announced.map_or(BODY_MAX, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        if bytes > BODY_MAX {
            return Err(too_large());
        }
        let bytes = u32::try_from(bytes.max(BODY_MIN)).unwrap_or(u32::MAX);
        self.bodies.clone().try_acquire_many_owned(bytes).map_err(|_| busy())
    }
}

/// One entry of a list that proxies have written, with or without a port.
fn hop(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let address = bare.unwrap_or(text).parse().ok();
    Some(address.or_else(|| text.parse().ok().map(|address: SocketAddr| address.ip()))?.to_canonical())
}

/// The refusal of a stranger's body over its limit.
pub fn too_large() -> Failure {
    let mut failure = Failure::body_too_large();
    failure.message = format!("Request body too large: without credentials it may have {BODY_MAX} bytes");
    failure
}

fn busy() -> Failure {
    let message = "Too many requests without credentials; please try again";
    Failure::new(StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable.as_str(), message)
        .header(RETRY_AFTER, HeaderValue::from_static("1"))
}

impl App {
    /// Whom a stranger's requests are counted with.
    pub(super) fn stranger(&self, headers: &HeaderMap, extensions: &Extensions) -> Counted {
        self.rate_limiter.counted_by_address(self.strangers.address(headers, extensions))
    }

    /// Counts a request of a stranger's.
    ///
    /// # Errors
    /// [`Error::RateLimited`].
    pub(super) fn admit_stranger(&self, stranger: Counted) -> Result<(), Error> {
        Ok(self.rate_limiter.check(stranger, 1, self.clock.as_ref())?)
    }

    /// What is said to whom `error` makes a stranger: that, or that there were too many of them.
    pub(super) fn refuse_stranger(
        &self,
        headers: &HeaderMap,
        extensions: &Extensions,
        error: Error,
    ) -> Error {
        match error {
            Error::Unauthenticated(_) => {
                self.admit_stranger(self.stranger(headers, extensions)).err().unwrap_or(error)
            }
            other => other,
        }
    }
}

impl fmt::Debug for Strangers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Strangers").field("proxies", &self.proxies).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(proxies: &[&str], peer: &str, forwarded: &[&'static str]) -> String {
        let proxies = proxies.iter().map(|network| network.parse().expect("a network")).collect();
        let mut extensions = Extensions::new();
        extensions.insert(ConnectInfo(SocketAddr::new(peer.parse().expect("an address"), 1)));
        let mut headers = HeaderMap::new();
        for line in forwarded {
            headers.append(FORWARDED_FOR, HeaderValue::from_static(line));
        }
        Strangers::new(proxies).address(&headers, &extensions).to_string()
    }

    #[test]
    fn only_proxies_that_are_trusted_are_believed_and_no_further_than_they_can_know() {
        let trusted = ["10.0.0.0/8", "fd00::/8"];
        for (peer, forwarded, expected) in [
            ("192.0.2.1", &["203.0.113.9"][..], "192.0.2.1"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["203.0.113.9"], "203.0.113.9"),
            ("::ffff:10.0.0.1", &["203.0.113.9"], "203.0.113.9"),
            ("10.0.0.1", &["198.51.100.7, 203.0.113.9"], "203.0.113.9"),
            ("10.0.0.1", &["198.51.100.7, 203.0.113.9 , 10.2.3.4"], "203.0.113.9"),
            ("10.0.0.1", &["198.51.100.7", "203.0.113.9", "10.2.3.4"], "203.0.113.9"),
            ("10.0.0.1", &["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
            ("10.0.0.1", &["203.0.113.9, unknown"], "10.0.0.1"),
            ("10.0.0.1", &["203.0.113.9:4711"], "203.0.113.9"),
            ("fd00::1", &["[2001:db8::1]:4711"], "2001:db8::1"),
            ("fd00::1", &["[2001:db8::1]"], "2001:db8::1"),
            ("fd00::1", &[""], "fd00::1"),
        ] {
            assert_eq!(address(&trusted, peer, forwarded), expected, "{peer} {forwarded:?}");
        }
        assert_eq!(address(&[], "127.0.0.1", &["203.0.113.9"]), "127.0.0.1");
    }

    #[test]
    fn bodies_get_room_while_there_is_some_and_give_it_back() {
        let strangers = Strangers::new(Vec::new());
        let held: Vec<_> = (0..BODIES / BODY_MAX).map(|_| strangers.room(None).expect("room")).collect();
        let refused = strangers.room(Some(1)).expect_err("no room");
        assert_eq!((refused.status.as_u16(), refused.code), (503, "unavailable"));
        assert_eq!(refused.headers()[RETRY_AFTER], "1");
        assert_eq!(strangers.room(Some(BODY_MAX as u64 + 1)).expect_err("large").status.as_u16(), 413);
        drop(held);
        let small: Vec<_> = (0..BODIES / BODY_MIN).map(|_| strangers.room(Some(9)).expect("room")).collect();
        assert!(strangers.room(Some(9)).is_err());
        drop(small);
        assert!(strangers.room(Some(BODY_MAX as u64)).is_ok());
    }
}
