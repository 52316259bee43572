//! The stores and the protection of keys.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::fault;
use crate::domain::Violation;

/// The metadata store.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MetadataConfig {
    /// `sqlite:PATH` or `postgres://...`; may hold a password.
    #[serde(serialize_with = "super::masked", skip_serializing_if = "Option::is_none")]
    pub url: Option<SecretString>,
    /// Connections at most.
    pub connections: u32,
    /// Session rows kept in memory.
    pub cached_rows: usize,
}

/// The embedded log.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    /// Forget records older than this; `None` keeps them for ever.
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub retention: Option<Duration>,
}

/// Protection of keys.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AuthConfig {
    /// 64 hex digits.
    #[serde(serialize_with = "super::masked", skip_serializing_if = "Option::is_none")]
    pub master_key: Option<SecretString>,
}

impl MetadataConfig {
    /// True if the URL names a Postgres server.
    pub fn is_postgres(&self) -> bool {
        let url = self.url.as_ref().map(SecretString::expose_secret);
        url.is_some_and(|url| url.starts_with("postgres:") || url.starts_with("postgresql:"))
    }

    pub(super) fn validate(&self, faults: &mut Vec<Violation>) {
        let url = self.url.as_ref().map(SecretString::expose_secret);
        if url.is_some_and(|url| !url.starts_with("sqlite:")) && !self.is_postgres() {
            faults.push(fault("metadata.url", "must begin with sqlite: or postgres:"));
        }
        if self.connections == 0 {
            faults.push(fault("metadata.connections", "must be at least 1"));
        }
    }
}
