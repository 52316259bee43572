//! Sessions as they change: one of them, or all that match.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use futures_util::future::{BoxFuture, OptionFuture};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::clock::Timestamp;
use super::error::{Error, Result};
use super::id::{EnvironmentId, SessionId};
use super::lifeline::Lifeline;
use super::list::Filter;
use super::session::{SharedSession, Status};

/// What comes next.
#[derive(Debug)]
pub enum WatchEvent {
    /// A session as it now is.
    Session(SharedSession),
    /// The session is closed or expired and has been shown as such. The last event.
    Ended,
    /// The server stops. The last event.
    Stopping,
}

/// Every change of every session, for [`Watch`]es to pick from.
pub(super) type Changes = Receiver<SharedSession>;

/// Reads a session anew, after changes were missed.
pub(super) type Reread =
    Arc<dyn Fn(SessionId) -> BoxFuture<'static, Result<Option<SharedSession>>> + Send + Sync>;

/// Held as long as a session is watched, so that it is looked at even if nobody tells of a change.
pub(super) type Interest = Box<dyn Any + Send + Sync>;

/// A session that was looked for.
pub(super) type Arrival = BoxFuture<'static, Result<(SharedSession, Interest)>>;

/// Which sessions are watched.
pub(super) enum Scope {
    /// One, which may not be there yet.
    One { arrival: Option<Arrival>, reread: Reread },
    /// Those of an environment that match.
    List { environment: EnvironmentId, filter: Filter },
}

/// A caller's live view of sessions. Changes that come faster than they are taken may be given as one.
pub struct Watch {
    /// Given up before `changes`, as whoever counts both expects.
    interest: Option<Interest>,
    changes: Changes,
    lifeline: Lifeline,
    scope: Scope,
    /// The one session, as it was last shown.
    shown: Option<SharedSession>,
    /// Changes were missed, so the one session must be read anew.
    lagged: bool,
    ended: bool,
}

impl Watch {
    pub(super) fn new(changes: Changes, lifeline: Lifeline, scope: Scope) -> Self {
        Self { interest: None, changes, lifeline, scope, shown: None, lagged: false, ended: false }
    }

    /// The next event. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] when the caller's credentials end; [`Error::Unavailable`] if a list has missed
    /// changes, and must be read anew. Nothing comes after an error or a last event.
    pub async fn next(&mut self) -> Result<WatchEvent> {
        loop {
            if self.ended {
                return Ok(WatchEvent::Ended);
            }
            let now = self.lifeline.now();
            let expiry = self.shown.as_ref().and_then(|session| session.expires_at);
            if let Some(cut) = self.lifeline.check(now, expiry.unwrap_or(Timestamp::from_millis(i64::MAX))) {
                cut.credentials()?;
                return Ok(WatchEvent::Stopping);
            }
            if let Some(session) = self.shown.clone().filter(|_| expiry.is_some_and(|at| at <= now)) {
                return Ok(self.show(session, now));
            }
            if let Some(session) = self.reread().await? {
                return Ok(self.show(session, now));
            }
            let arrival = match &mut self.scope {
                Scope::One { arrival, .. } => arrival.as_mut(),
                Scope::List { .. } => None,
            };
            let arriving = arrival.is_some();
            let news = tokio::select! {
                biased;
                // Changes stay in the feed until then, for the row that arrives may have been read before them.
                Some(session) = OptionFuture::from(arrival) => Some(self.arrived(session)?),
                change = self.changes.recv(), if !arriving => self.changed(change)?,
                () = self.lifeline.ring() => None,
            };
            if let Some(session) = news {
                let now = self.lifeline.now();
                return Ok(self.show(session, now));
            }
        }
    }

    fn arrived(&mut self, arrived: Result<(SharedSession, Interest)>) -> Result<SharedSession> {
        if let Scope::One { arrival, .. } = &mut self.scope {
            *arrival = None;
        }
        let (session, interest) = arrived?;
        self.interest = Some(interest);
        Ok(session)
    }

    /// What of a change is news.
    fn changed(
        &mut self,
        change: std::result::Result<SharedSession, RecvError>,
    ) -> Result<Option<SharedSession>> {
        match (&self.scope, change) {
            (_, Err(RecvError::Closed)) => Err(Error::Unavailable { what: "sessions", source: None }),
            (Scope::List { environment, filter }, Ok(session)) => {
                let matches =
                    session.environment == *environment && filter.matches(&session, self.lifeline.now());
                Ok(matches.then_some(session))
            }
            (Scope::List { .. }, Err(RecvError::Lagged(_))) => {
                Err(Error::Unavailable { what: "the feed of changes", source: None })
            }
            (Scope::One { .. }, Ok(session)) => Ok(self.news(Some(session))),
            (Scope::One { .. }, Err(RecvError::Lagged(_))) => {
                self.lagged = true;
                Ok(None)
            }
        }
    }

    /// The one session after a lag, if it has changed.
    async fn reread(&mut self) -> Result<Option<SharedSession>> {
        let (Scope::One { reread, .. }, Some(shown), true) = (&self.scope, &self.shown, self.lagged) else {
            return Ok(None);
        };
        let session = reread(shown.id.clone()).await?;
        self.lagged = false;
        Ok(self.news(session))
    }

    /// The session if it is the watched one and newer than what was shown.
    fn news(&self, session: Option<SharedSession>) -> Option<SharedSession> {
        let shown = self.shown.as_ref()?;
        session.filter(|session| session.id == shown.id && session.is_newer_than(shown))
    }

    fn show(&mut self, session: SharedSession, now: Timestamp) -> WatchEvent {
        if matches!(self.scope, Scope::One { .. }) {
            self.ended = session.status(now) != Status::Active;
            self.shown = Some(session.clone());
        }
        WatchEvent::Session(session)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}
