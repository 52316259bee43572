//! Tenancy and keys: organization, project, environment, and the secrets that open an environment.

use super::access::Scopes;
use super::clock::Timestamp;
use super::id::{EnvironmentId, KeyId};

/// Kind of an environment; the second part of its keys (`tr_dev_...`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EnvironmentKind {
    /// `dev`
    Development,
    /// `stg`
    Staging,
    /// `preview`
    Preview,
    /// `prod`
    Production,
}

impl EnvironmentKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Development, Self::Staging, Self::Preview, Self::Production];

    /// The word in keys and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Development => "dev",
            Self::Staging => "stg",
            Self::Preview => "preview",
            Self::Production => "prod",
        }
    }

    /// Reads the word.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}

/// The unit of tenancy, with the names of what it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// Its id, which is also the `sub` of public tokens.
    pub id: EnvironmentId,
    /// Organization slug.
    pub organization: String,
    /// Project slug.
    pub project: String,
    /// Environment slug, unique within the project.
    pub slug: String,
    /// Kind.
    pub kind: EnvironmentKind,
    /// Creation time.
    pub created_at: Timestamp,
}

/// A secret key at rest: recoverable (clients sign tokens with it), never readable without the master key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKey {
    /// Its id; safe to show.
    pub id: KeyId,
    /// The environment it opens.
    pub environment: EnvironmentId,
    /// A name for people.
    pub label: String,
    /// Keyed hash of the secret, to look it up by.
    pub lookup: Vec<u8>,
    /// The secret under AEAD, bound to `environment` and `id`.
    pub sealed_secret: Vec<u8>,
    /// First characters of the secret, to recognise it by.
    pub hint: String,
    /// `None` for a root key; otherwise all that the key may do (such a key cannot sign tokens itself).
    pub scopes: Option<Scopes>,
    /// Creation time.
    pub created_at: Timestamp,
    /// When it stops working: the end of the grace window after a rotation, or the moment of revocation.
    pub ends_at: Option<Timestamp>,
    /// The operator gave the secret, rather than we made it: it is theirs to keep, and is never shown.
    pub given: bool,
}

impl StoredKey {
    /// True while the key opens its environment.
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.ends_at.is_none_or(|at| now < at)
    }

    /// True for a key that may do everything and signs public tokens.
    pub fn is_root(&self) -> bool {
        self.scopes.is_none()
    }
}
