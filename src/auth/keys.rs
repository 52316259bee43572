//! Life of secret keys: create, list, rotate with a grace window, revoke. Used by the command line.

use std::sync::Arc;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};

use super::vault::{self, Vault};
use crate::domain::tenant::{Environment, EnvironmentKind, StoredKey};
use crate::domain::{Clock, EnvironmentId, Error, KeyId, MetadataStore, Result, Scopes};

/// Shortest secret that may be given verbatim.
const SECRET_MIN: usize = 16;

/// A new environment, as the operator names it.
#[derive(Clone, Debug)]
pub struct NewEnvironment {
    /// Organization slug.
    pub organization: String,
    /// Project slug.
    pub project: String,
    /// Environment slug.
    pub slug: String,
    /// Kind.
    pub kind: EnvironmentKind,
}

/// A key together with its secret.
pub struct RevealedKey {
    /// The key.
    pub key: StoredKey,
    /// What opens the environment.
    pub secret: SecretString,
}

/// Key management over a store and its vault.
pub struct Keys<'a> {
    store: Arc<dyn MetadataStore>,
    vault: &'a Vault,
    clock: Arc<dyn Clock>,
}

impl<'a> Keys<'a> {
    /// Key management.
    pub fn new(store: Arc<dyn MetadataStore>, vault: &'a Vault, clock: Arc<dyn Clock>) -> Self {
        Self { store, vault, clock }
    }

    /// Adds an environment with its first root key, which may be given verbatim.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the project has such an environment; [`Error::Invalid`].
    pub async fn create_environment(
        &self,
        new: NewEnvironment,
        secret: Option<SecretString>,
    ) -> Result<(Environment, RevealedKey)> {
        for (field, slug) in
            [("organization", &new.organization), ("project", &new.project), ("environment", &new.slug)]
        {
            check_slug(field, slug)?;
        }
        if let Some(secret) = &secret {
            check_root(secret)?;
        }
        let now = self.clock.now();
        let environment = Environment {
            id: EnvironmentId::generate(now),
            organization: new.organization,
            project: new.project,
            slug: new.slug,
            kind: new.kind,
            created_at: now,
        };
        self.store.create_environment(environment.clone()).await?;
        let key = self.create(&environment, "first key", None, secret).await?;
        Ok((environment, key))
    }

    /// Adds a key: a root key, or one that may do only what `scopes` say.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the same secret exists; [`Error::Invalid`] for a verbatim secret that is too weak
    /// or that clients would take for another kind.
    pub async fn create(
        &self,
        environment: &Environment,
        label: &str,
        scopes: Option<Scopes>,
        secret: Option<SecretString>,
    ) -> Result<RevealedKey> {
        let given = secret.is_some();
        let secret = match (secret, &scopes) {
            (Some(_), Some(_)) => {
                return Err(Error::invalid("secret", "cannot be given for a key with scopes"));
            }
            (Some(secret), None) => {
                check_root(&secret)?;
                secret
            }
            (None, None) => vault::generate_root(environment.kind)?,
            (None, Some(_)) => vault::generate_scoped(environment.kind)?,
        };
        let now = self.clock.now();
        let id = KeyId::generate(now);
        let key = StoredKey {
            lookup: self.vault.lookup_hash(secret.expose_secret()),
            sealed_secret: self.vault.seal(secret.expose_secret(), &environment.id, &id)?,
            hint: vault::hint(secret.expose_secret()),
            environment: environment.id.clone(),
            label: label.to_owned(),
            scopes,
            created_at: now,
            ends_at: None,
            given,
            id,
        };
        self.store.insert_key(key.clone()).await?;
        Ok(RevealedKey { key, secret })
    }

    /// Every key of an environment, newest first.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn list(&self, environment: &EnvironmentId) -> Result<Vec<StoredKey>> {
        self.store.keys(environment).await
    }

    /// The newest root key without an end.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn current_root(&self, environment: &EnvironmentId) -> Result<Option<StoredKey>> {
        let keys = self.store.keys(environment).await?;
        Ok(keys.into_iter().find(|key| key.is_root() && key.ends_at.is_none()))
    }

    /// Opens a stored key. Whoever shows the secret asks [`StoredKey::given`] first.
    ///
    /// # Errors
    /// [`Error::Internal`] if the master key is not the one it was sealed with.
    pub fn open(&self, key: StoredKey) -> Result<RevealedKey> {
        let secret = self.vault.open(&key.sealed_secret, &key.environment, &key.id)?;
        Ok(RevealedKey { key, secret })
    }

    /// A key by its id, live or not.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn find(&self, environment: &EnvironmentId, id: &KeyId) -> Result<StoredKey> {
        let keys = self.store.keys(environment).await?;
        keys.into_iter().find(|key| key.id == *id).ok_or(Error::NotFound("key"))
    }

    /// Whether `secret` is what the key was made of.
    pub fn is_secret_of(&self, key: &StoredKey, secret: &SecretString) -> bool {
        self.vault.lookup_hash(secret.expose_secret()) == key.lookup
    }

    /// Makes sure that this verbatim secret is a live root key of the environment. True if it is a new one.
    ///
    /// # Errors
    /// [`Error::Conflict`] if it was revoked, or belongs to another environment.
    pub async fn adopt(&self, environment: &Environment, secret: SecretString) -> Result<(StoredKey, bool)> {
        check_root(&secret)?;
        let lookup = self.vault.lookup_hash(secret.expose_secret());
        match self.store.find_key(&lookup).await? {
            None => {
                let made = self.create(environment, "given at start", None, Some(secret)).await?;
                Ok((made.key, true))
            }
            Some(mut key) if key.environment == environment.id && key.is_live(self.clock.now()) => {
                if !key.given {
                    self.store.mark_key_given(&environment.id, &key.id).await?;
                    key.given = true;
                }
                Ok((key, false))
            }
            Some(_) => Err(Error::Conflict(
                "the given secret key was revoked or belongs to another environment".to_owned(),
            )),
        }
    }

    /// Replaces a key by a new one with the same rights; the old one works for `grace` longer.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] if the key has ended.
    pub async fn rotate(
        &self,
        environment: &Environment,
        id: &KeyId,
        grace: Duration,
    ) -> Result<RevealedKey> {
        let now = self.clock.now();
        let old = self.find(&environment.id, id).await?;
        if !old.is_live(now) {
            return Err(Error::Conflict("the key has ended already".to_owned()));
        }
        let new = self.create(environment, &old.label, old.scopes, None).await?;
        self.store.end_key(&environment.id, id, now.plus(grace)).await?;
        Ok(new)
    }

    /// Ends a key now. Running servers notice within a second.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn revoke(&self, environment: &EnvironmentId, id: &KeyId) -> Result<StoredKey> {
        self.store.end_key(environment, id, self.clock.now()).await?.ok_or(Error::NotFound("key"))
    }
}

fn check_slug(field: &'static str, slug: &str) -> Result<()> {
    let fits = (1..=64).contains(&slug.len())
        && slug.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if fits { Ok(()) } else { Err(Error::invalid(field, "must be 1 to 64 of a-z, 0-9 and '-'")) }
}

fn check_root(secret: &SecretString) -> Result<()> {
    let text = secret.expose_secret();
    let fault = if text.len() < SECRET_MIN || !text.bytes().all(|b| b.is_ascii_graphic()) {
        "must be at least 16 visible ASCII characters"
    } else if vault::looks_scoped(text) || text.starts_with("pk_") {
        "must not look like a scoped (_sk_) or publishable (pk_) key, because clients would treat it as one"
    } else if text.contains('.') {
        "must not contain a dot, because it would look like a token"
    } else {
        return Ok(());
    };
    Err(Error::invalid("secret key", fault))
}
