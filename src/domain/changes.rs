//! What replicas on one metadata store tell each other.

use std::fmt;
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt};

use super::id::{EnvironmentId, SessionId};
use super::session::Session;

/// Carries changes from the replica that made them to all others.
///
/// A hint and no log: what it carries has been committed before, may come twice or in another order, and is read anew
/// from the store by whoever needs it. What it may have lost it says itself, with [`Heard::Missed`].
pub trait ChangeFeed: Send + Sync {
    /// Tells the other replicas of a session that has been created or changed. Neither waits nor fails.
    fn announce(&self, change: ChangedSession);

    /// What other replicas announce from now on. Never ends.
    fn subscribe(&self) -> BoxStream<'static, Heard>;
}

/// A session that has been created or changed, and committed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ChangedSession {
    /// Its environment.
    pub environment: EnvironmentId,
    /// Which one.
    pub id: SessionId,
    /// Whether it is closed now.
    pub closed: bool,
}

impl ChangedSession {
    /// The announcement of a version of a row.
    pub fn of(session: &Session) -> Self {
        Self {
            environment: session.environment.clone(),
            id: session.id.clone(),
            closed: session.closed.is_some(),
        }
    }
}

/// What comes from other replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// These sessions have been created or changed.
    Sessions(Vec<ChangedSession>),
    /// Keys have been added or have ended.
    Keys,
    /// Anything that was announced within this time before now may have been lost.
    Missed(Duration),
}

/// The feed of a server that shares its metadata store with nobody.
#[derive(Clone, Copy, Debug)]
pub struct NoReplicas;

impl ChangeFeed for NoReplicas {
    fn announce(&self, _: ChangedSession) {}

    fn subscribe(&self) -> BoxStream<'static, Heard> {
        stream::pending().boxed()
    }
}

impl fmt::Debug for dyn ChangeFeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChangeFeed")
    }
}
