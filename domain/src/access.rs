//! Who asks, and what they may do. Asked inside every use case, before anything is looked up.
//!
//! Scopes follow the published grammar `action[:type[:id]]`; the id may itself hold colons.

use std::fmt;

use tokio_util::sync::CancellationToken;

use super::clock::Timestamp;
use super::error::{Error, Result};
use super::id::{EnvironmentId, KeyId, SessionRef};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// See rows and records.
    Read,
    /// Create sessions and append.
    Write,
    /// Change and close sessions.
    Admin,
}

impl Action {
    /// The word in a scope.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Admin => "admin",
        }
    }
}

/// What it is to be done to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource<'a> {
    /// The collection of all sessions.
    Sessions,
    /// One session, by either of its ids.
    Session(&'a str),
    /// The collection of all tasks.
    Tasks,
    /// Everything of one task.
    Task(&'a str),
}

impl<'a> Resource<'a> {
    fn parts(self) -> (&'static str, Option<&'a str>) {
        match self {
            Self::Sessions => ("sessions", None),
            Self::Session(id) => ("sessions", Some(id)),
            Self::Tasks => ("tasks", None),
            Self::Task(id) => ("tasks", Some(id)),
        }
    }
}

/// The scopes of a token or key, as they were written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scopes(Vec<String>);

impl Scopes {
    /// Any list of words is a list of scopes; one that means nothing grants nothing.
    pub fn new(scopes: Vec<String>) -> Self {
        Self(scopes)
    }

    /// The words.
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }

    /// Whether any of them grants `action` on `resource`.
    pub fn grant(&self, action: Action, resource: Resource<'_>) -> bool {
        self.0.iter().any(|scope| scope_grants(scope, action.as_str(), resource.parts()))
    }

    /// Whether everything that `scope` grants is granted by one of these too.
    pub fn cover(&self, scope: &str) -> bool {
        let (action, kind, id) = split(scope);
        self.0.iter().any(|own| {
            let (own_action, own_kind, own_id) = split(own);
            if own == "admin" {
                return true;
            }
            (own_action == action || own_action == "*")
                && match (own_kind, kind) {
                    (Some("all"), _) => true,
                    (own_kind, kind) if own_kind != kind => false,
                    _ => own_id.is_none() || own_id == id,
                }
                && scope != "admin"
        })
    }

    /// Whether a session might be granted by an id that the address does not show.
    fn names_sessions(&self, action: Action) -> bool {
        self.0.iter().any(|scope| {
            let (own, kind, id) = split(scope);
            (own == action.as_str() || own == "*") && kind == Some("sessions") && id.is_some()
        })
    }
}

fn split(scope: &str) -> (&str, Option<&str>, Option<&str>) {
    let mut parts = scope.splitn(3, ':');
    (parts.next().unwrap_or_default(), parts.next(), parts.next())
}

fn scope_grants(scope: &str, action: &str, (kind, id): (&str, Option<&str>)) -> bool {
    if scope == "admin" {
        return true;
    }
    let (own_action, own_kind, own_id) = split(scope);
    if own_action != action && own_action != "*" {
        return false;
    }
    match (own_kind, own_id) {
        (Some("all"), _) => true,
        (Some(own), None) => own == kind,
        (Some(own), Some(own_id)) => own == kind && id == Some(own_id),
        (None, _) => false,
    }
}

/// What kind of credentials were shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallerKind {
    /// A root key: everything in its environment.
    Root,
    /// A secret key with scopes.
    ScopedKey(Scopes),
    /// A public token, handed to a browser.
    Public(Scopes),
}

/// Who asks.
#[derive(Clone)]
pub struct Caller {
    /// The only environment this caller can see.
    pub environment: EnvironmentId,
    /// Kind and scopes.
    pub kind: CallerKind,
    /// The key shown, or the key that the token was signed with or minted by.
    pub key: KeyId,
    /// The key that the token was signed with, where another one minted it: the caller stands on both.
    pub signed_with: Option<KeyId>,
    /// When the credentials end; every stream of theirs ends with them.
    pub expires_at: Option<Timestamp>,
    /// Cancelled when the key is revoked.
    pub revoked: CancellationToken,
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caller").field("environment", &self.environment).field("kind", &self.kind).finish()
    }
}

/// The refusal of a missing scope, in the words the SDK knows.
pub const UNAUTHORIZED: Error = Error::Denied("Unauthorized");

impl Caller {
    /// True for a secret key, scoped or not.
    pub fn is_private(&self) -> bool {
        !matches!(self.kind, CallerKind::Public(_))
    }

    /// Refuses once the credentials have ended, for whatever outlives the request that showed them.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`].
    pub fn require_current(&self, now: Timestamp) -> Result<()> {
        if self.revoked.is_cancelled() {
            return Err(Error::Unauthenticated("the key has been revoked"));
        }
        if self.expires_at.is_some_and(|at| at <= now) {
            return Err(Error::Unauthenticated("Public Access Token is expired"));
        }
        Ok(())
    }

    /// The scopes that bound this caller; `None` for a root key.
    pub fn scopes(&self) -> Option<&Scopes> {
        match &self.kind {
            CallerKind::Root => None,
            CallerKind::ScopedKey(scopes) | CallerKind::Public(scopes) => Some(scopes),
        }
    }

    /// Whether this caller may.
    pub fn may(&self, action: Action, resource: Resource<'_>) -> bool {
        self.scopes().is_none_or(|scopes| scopes.grant(action, resource))
    }

    /// Whether this caller's own scopes cover `scope`, so that a token of theirs may carry it.
    pub fn covers(&self, scope: &str) -> bool {
        self.scopes().is_none_or(|scopes| scopes.cover(scope))
    }

    /// Refuses unless one of the resources is granted.
    ///
    /// # Errors
    /// [`Error::Denied`].
    pub fn require_any(&self, action: Action, resources: &[Resource<'_>]) -> Result<()> {
        if resources.iter().any(|resource| self.may(action, *resource)) { Ok(()) } else { Err(UNAUTHORIZED) }
    }

    /// Judges an address before anything is looked up.
    pub fn judge(&self, action: Action, address: &SessionRef) -> Verdict {
        match self.scopes() {
            None => Verdict::Granted,
            Some(scopes) if scopes.grant(action, Resource::Session(address.as_str())) => Verdict::Granted,
            Some(scopes) if scopes.names_sessions(action) => Verdict::ByOtherId,
            Some(_) => Verdict::Denied,
        }
    }
}

/// What an address alone tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Allowed, whether or not the session exists.
    Granted,
    /// Allowed only if the session's other id is one the caller's scopes name; if there is no such
    /// session the answer is the same refusal.
    ByOtherId,
    /// Refused, whether or not the session exists.
    Denied,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scopes(words: &[&str]) -> Scopes {
        Scopes::new(words.iter().map(|word| (*word).to_owned()).collect())
    }

    #[test]
    fn scopes_grant_exactly_what_the_grammar_says() {
        let one = Resource::Session("a:b");
        for (scope, action, resource, granted) in [
            ("admin", Action::Read, Resource::Sessions, true),
            ("admin", Action::Admin, one, true),
            ("read", Action::Read, Resource::Sessions, false),
            ("read:all", Action::Read, one, true),
            ("read:all", Action::Write, one, false),
            ("*:sessions", Action::Admin, one, true),
            ("read:sessions", Action::Read, Resource::Sessions, true),
            ("read:sessions", Action::Read, one, true),
            ("read:sessions:a:b", Action::Read, one, true),
            ("read:sessions:a", Action::Read, one, false),
            ("read:sessions:a:bc", Action::Read, one, false),
            ("read:sessions:a:b", Action::Read, Resource::Sessions, false),
            ("read:session:a:b", Action::Read, one, false),
            ("admin:sessions", Action::Read, one, false),
            ("admin:sessions", Action::Admin, one, true),
            ("write:tasks:foo", Action::Write, Resource::Task("foo"), true),
            ("write:tasks:foo", Action::Write, Resource::Task("fo"), false),
            ("write:tasks:foo", Action::Write, Resource::Sessions, false),
            ("Read:sessions", Action::Read, one, false),
            ("", Action::Read, one, false),
        ] {
            assert_eq!(scopes(&[scope]).grant(action, resource), granted, "{scope} {action:?} {resource:?}");
        }
    }

    #[test]
    fn a_token_is_covered_only_by_equal_or_wider_scopes() {
        for (own, asked, covered) in [
            ("admin", "admin", true),
            ("admin", "write:all", true),
            ("read:sessions", "read:sessions:a", true),
            ("read:sessions:a", "read:sessions:a", true),
            ("read:sessions:a", "read:sessions", false),
            ("read:sessions:a", "read:sessions:b", false),
            ("read:all", "read:tasks:a", true),
            ("read:sessions", "read:all", false),
            ("read:sessions", "write:sessions", false),
            ("*:sessions", "admin:sessions:a", true),
            ("*:all", "admin", false),
            ("*:sessions", "*:sessions:a", true),
            ("read:sessions", "*:sessions", false),
        ] {
            assert_eq!(scopes(&[own]).cover(asked), covered, "{own} covers {asked}");
        }
    }
}
