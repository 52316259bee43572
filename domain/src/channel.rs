//! One append-only log per session and direction, and side channels below it.

use std::fmt;
use std::sync::Arc;

use super::error::{Error, Result};
use super::id::SessionId;

/// Who writes a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Clients to agent.
    In,
    /// Agent to clients; only secret keys write it.
    Out,
}

impl Direction {
    /// The wire word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
        }
    }

    /// Reads the wire word.
    ///
    /// # Errors
    /// [`Error::Malformed`] for anything but `in` and `out`.
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "in" => Ok(Self::In),
            "out" => Ok(Self::Out),
            _ => Err(Error::malformed("io", "must be \"in\" or \"out\"")),
        }
    }
}

/// Name of a side channel: 1 to 128 of `A-Z a-z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChannelName(Arc<str>);

impl ChannelName {
    /// Longest name, in bytes.
    pub const MAX: usize = 128;

    /// Checks a name.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming the field `channel`.
    pub fn parse(text: &str) -> Result<Self> {
        let fits = (1..=Self::MAX).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if fits {
            Ok(Self(text.into()))
        } else {
            Err(Error::malformed("channel", "must be 1 to 128 of A-Z, a-z, 0-9, '.', '_' and '-'"))
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Which of a session's channels is meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ChannelAddress {
    /// Its direction.
    pub direction: Direction,
    /// `None` for the session's main channel.
    pub name: Option<ChannelName>,
}

impl ChannelAddress {
    /// The session's main channel in this direction.
    pub fn main(direction: Direction) -> Self {
        Self { direction, name: None }
    }
}

/// What a log is stored under. Always the session's own id, so an `externalId` may change or be reused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ChannelKey {
    /// The session.
    pub session: SessionId,
    /// Its channel.
    pub address: ChannelAddress,
}

impl ChannelKey {
    /// The key of a session's main channel.
    pub fn main(session: SessionId, direction: Direction) -> Self {
        Self { session, address: ChannelAddress::main(direction) }
    }
}

/// `sessions/{id}/{in|out}`, and `sessions/{id}/channels/{name}/{in|out}` for a side channel.
impl fmt::Display for ChannelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let io = self.address.direction.as_str();
        match &self.address.name {
            None => write!(f, "sessions/{}/{io}", self.session),
            Some(name) => write!(f, "sessions/{}/channels/{}/{io}", self.session, name.as_str()),
        }
    }
}
