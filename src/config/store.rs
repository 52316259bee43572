//! The stores and the protection of keys.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use url::Url;

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

/// The log: embedded, or in S2.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    /// `s2://BASIN`; `None` for the embedded log in the data folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<Url>,
    /// Where an s2-lite listens; `None` for s2.dev.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Url>,
    /// Access token of S2. Required for s2.dev; s2-lite looks at none.
    #[serde(default, serialize_with = "super::masked", skip_serializing_if = "Option::is_none")]
    pub token: Option<SecretString>,
    /// Forget records older than this; `None` keeps them for ever.
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub retention: Option<Duration>,
    /// Mebibytes of the disk that appends leave free; `None` for a tenth of it, at most 512. Of the embedded log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_reserve_mib: Option<u64>,
}

/// Protection of keys.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AuthConfig {
    /// 64 hex digits.
    #[serde(serialize_with = "super::masked", skip_serializing_if = "Option::is_none")]
    pub master_key: Option<SecretString>,
}

impl LogConfig {
    /// The basin, if the log is in S2.
    pub fn basin(&self) -> Option<&str> {
        self.url.as_ref()?.host_str()
    }

    pub(super) fn validate(&self, faults: &mut Vec<Violation>) {
        let Some(url) = &self.url else {
            for (field, set) in
                [("log.endpoint", self.endpoint.is_some()), ("log.token", self.token.is_some())]
            {
                if set {
                    faults.push(fault(field, "has no meaning without log.url"));
                }
            }
            return;
        };
        if self.disk_reserve_mib.is_some() {
            faults.push(fault("log.disk_reserve_mib", "has no meaning with log.url"));
        }
        let whole = url.scheme() == "s2" && matches!(url.path(), "" | "/");
        let named = self.basin().is_some_and(is_basin) && url.username().is_empty() && url.port().is_none();
        if !whole || !named || url.query().is_some() || url.fragment().is_some() {
            faults.push(fault(
                "log.url",
                "must be s2://BASIN, where a basin is 8 to 48 of a-z, 0-9 and inner '-'",
            ));
        }
        match &self.endpoint {
            None if self.token.is_none() => {
                faults.push(fault("log.token", "is required for s2.dev; set log.endpoint for an s2-lite"));
            }
            Some(endpoint) if !is_origin(endpoint) => {
                faults.push(fault("log.endpoint", "must be an http or https URL of a host, without a path"));
            }
            _ => {}
        }
    }
}

/// What S2 takes for the name of a basin.
fn is_basin(name: &str) -> bool {
    (8..=48).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Scheme, host and port of an HTTP server, and nothing else.
pub(super) fn is_origin(url: &Url) -> bool {
    matches!(url.scheme(), "http" | "https")
        && url.path() == "/"
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none()
}

/// Whether a URL names a Postgres.
pub(super) fn is_postgres(url: &str) -> bool {
    url.starts_with("postgres:") || url.starts_with("postgresql:")
}

impl MetadataConfig {
    /// True if the URL names a Postgres server.
    pub fn is_postgres(&self) -> bool {
        self.url.as_ref().is_some_and(|url| is_postgres(url.expose_secret()))
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
