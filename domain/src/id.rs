//! Identifiers and how an address names a session.

use std::fmt;
use std::sync::Arc;

use data_encoding::{Encoding, Specification};
use std::sync::LazyLock;

use super::clock::Timestamp;
use super::error::{Error, Result};

/// What tells our session ids from a caller's own; no external id may start with it.
pub const SESSION_PREFIX: &str = "session_";
/// What public run ids start with.
pub const RUN_PREFIX: &str = "run_";
/// What ids of waitpoints start with; the word is the one that clients know.
pub const WAITPOINT_PREFIX: &str = "waitpoint_";
/// Longest waitpoint id accepted in an address; ours are shorter.
const WAITPOINT_ID_MAX: usize = 64;
/// Longest external id, in UTF-16 code units (JavaScript's `length`, which is what clients count).
pub const EXTERNAL_ID_MAX: usize = 256;
/// Longest session id accepted in an address; ours are shorter.
const SESSION_ID_MAX: usize = 64;

/// Length as JavaScript counts it, because every limit of the wire is written for JavaScript clients.
pub fn utf16_len(text: &str) -> usize {
    text.encode_utf16().count()
}

/// Base 32 in an alphabet whose byte order is its value order, lower case.
static BASE32: LazyLock<Encoding> = LazyLock::new(|| {
    let mut spec = Specification::new();
    spec.symbols.push_str("0123456789abcdefghijklmnopqrstuv");
    spec.encoding().expect("32 distinct symbols make an encoding")
});

/// 26 characters: 48 bits of milliseconds, then random bits, in base 32 (UUID version 7).
/// Sorts by time as text.
fn time_ordered(now: Timestamp) -> String {
    let millis = u64::try_from(now.millis()).unwrap_or(0);
    let (secs, nanos) = (millis / 1000, (millis % 1000) * 1_000_000);
    let nanos = u32::try_from(nanos).expect("less than a second of nanoseconds fits 32 bits");
    let id = uuid::Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, secs, nanos));
    BASE32.encode(id.as_bytes())
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The id as it stands on the wire.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// An id that a store of ours has given out before.
            pub fn from_stored(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

text_id! {
    /// Our id of a session: `session_` and 26 lower-case characters that sort by creation time.
    SessionId
}
text_id! {
    /// The caller's own id of a session, unique inside one environment.
    ExternalId
}
text_id! {
    /// Public id of an agent's run, `run_...`. There is no run engine: the id is only recorded.
    RunId
}
text_id! {
    /// Our id of a waitpoint: `waitpoint_` and 26 lower-case characters that sort by creation time.
    WaitpointId
}
text_id! {
    /// An environment, the unit of tenancy: every session, key and query belongs to exactly one.
    EnvironmentId
}
text_id! {
    /// A secret key's own, non-secret id.
    KeyId
}

impl SessionId {
    /// A fresh id for a session created at `now`.
    pub fn generate(now: Timestamp) -> Self {
        Self(format!("{SESSION_PREFIX}{}", time_ordered(now)).into())
    }
}

impl RunId {
    /// A fresh run id.
    pub fn generate(now: Timestamp) -> Self {
        Self(format!("{RUN_PREFIX}{}", time_ordered(now)).into())
    }
}

impl WaitpointId {
    /// A fresh id for a waitpoint created at `now`.
    pub fn generate(now: Timestamp) -> Self {
        Self(format!("{WAITPOINT_PREFIX}{}", time_ordered(now)).into())
    }

    /// Reads an id as a path names it.
    ///
    /// # Errors
    /// [`Error::Malformed`] when no waitpoint could ever have it.
    pub fn parse(text: &str) -> Result<Self> {
        let fits = text.len() <= WAITPOINT_ID_MAX
            && text.starts_with(WAITPOINT_PREFIX)
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if fits { Ok(Self(text.into())) } else { Err(Error::malformed("waitpoint", "is not a waitpoint id")) }
    }
}

impl EnvironmentId {
    /// A fresh id for an environment.
    pub fn generate(now: Timestamp) -> Self {
        Self(format!("env_{}", time_ordered(now)).into())
    }
}

impl KeyId {
    /// A fresh id for a key.
    pub fn generate(now: Timestamp) -> Self {
        Self(format!("key_{}", time_ordered(now)).into())
    }
}

impl ExternalId {
    /// Checks a caller's own id: trimmed, 1 to 256 UTF-16 units, no NUL, not starting with `session_`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field `externalId`.
    pub fn parse(text: &str) -> Result<Self> {
        let text = text.trim();
        let fault = if text.is_empty() {
            Some("must not be empty".to_owned())
        } else if utf16_len(text) > EXTERNAL_ID_MAX {
            Some(format!("must be at most {EXTERNAL_ID_MAX} characters"))
        } else if text.contains('\0') {
            Some("must not contain a NUL character".to_owned())
        } else if text.starts_with(SESSION_PREFIX) {
            Some(format!("must not start with \"{SESSION_PREFIX}\", which is reserved"))
        } else {
            None
        };
        match fault {
            Some(message) => Err(Error::invalid("externalId", message)),
            None => Ok(Self(text.into())),
        }
    }
}

/// What a path segment or argument names: the `session_` prefix decides which id it is, and never falls through.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SessionRef {
    /// Our own id.
    Id(SessionId),
    /// The caller's id.
    External(ExternalId),
}

impl SessionRef {
    /// Reads an address as the caller wrote it (percent-decoded).
    ///
    /// # Errors
    /// [`Error::Malformed`] when no session could ever have this address as its external id.
    pub fn parse(text: &str) -> Result<Self> {
        if text.starts_with(SESSION_PREFIX) {
            let is_id =
                text.len() <= SESSION_ID_MAX && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            // What cannot be an id is looked for as one that nothing has, so that it is answered as an unknown one is.
            return Ok(Self::Id(SessionId::from_stored(if is_id { text } else { SESSION_PREFIX })));
        }
        match ExternalId::parse(text) {
            Ok(id) if id.as_str() == text => Ok(Self::External(id)),
            Ok(_) => Err(Error::malformed("session", "must not start or end with white space")),
            Err(error) => Err(Error::malformed("session", error.detail())),
        }
    }

    /// The address as the caller wrote it.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Id(id) => id.as_str(),
            Self::External(id) => id.as_str(),
        }
    }
}

impl fmt::Display for SessionRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<SessionId> for SessionRef {
    fn from(id: SessionId) -> Self {
        Self::Id(id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_prefix_alone_decides_which_id_an_address_is() {
        assert!(matches!(SessionRef::parse("session_x"), Ok(SessionRef::Id(_))));
        assert!(matches!(SessionRef::parse("Session_x"), Ok(SessionRef::External(_))));
        assert!(matches!(SessionRef::parse("a/b ü"), Ok(SessionRef::External(_))));
        for text in ["", " a", "a\0", &"x".repeat(257)] {
            assert!(SessionRef::parse(text).is_err(), "{text:?}");
        }
        for text in ["session_", "session_\u{fc}", "session_\0", &format!("session_{}", "x".repeat(9000))] {
            assert_eq!(
                SessionRef::parse(text).expect("an address").as_str(),
                SESSION_PREFIX,
                "names no session"
            );
        }
    }

    #[test]
    fn an_external_id_is_measured_in_utf16_units() {
        assert!(ExternalId::parse(&"x".repeat(256)).is_ok());
        assert!(ExternalId::parse(&"x".repeat(257)).is_err());
        assert!(ExternalId::parse(&"\u{1f600}".repeat(128)).is_ok());
        assert!(ExternalId::parse(&"\u{1f600}".repeat(129)).is_err());
        assert_eq!(ExternalId::parse(" a ").expect("trimmed").as_str(), "a");
        assert!(ExternalId::parse("session_a").is_err());
    }

    proptest! {
        #[test]
        fn session_ids_sort_by_time(a in 0_i64..4_102_444_800_000, b in 0_i64..4_102_444_800_000) {
            let [x, y] = [a, b].map(|t| SessionId::generate(Timestamp::from_millis(t)));
            prop_assert_eq!(x.as_str().len(), 34);
            if a != b {
                prop_assert_eq!(a < b, x < y);
            } else {
                prop_assert_ne!(x, y);
            }
        }
    }
}
