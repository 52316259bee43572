//! Settings: embedded defaults < TOML file < `SESSIOND_*` environment < flags. Nobody else reads the environment.

mod aliases;
mod blobs;
mod clickhouse;
mod direct;
mod graphql;
mod http;
mod replication;
mod store;

use std::path::PathBuf;

use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize, Serializer};

pub use self::clickhouse::{ClickHouseConfig, Fallback, ListSource};
use crate::domain::{Error, Result, Violation};
pub use blobs::{BlobPlace, BlobsConfig};
pub use direct::DirectConfig;
pub use graphql::GraphqlConfig;
pub use http::{HttpConfig, RateLimitConfig, TlsConfig};
pub use replication::ReplicationConfig;
pub use store::{AuthConfig, LogConfig, MetadataConfig};

/// Every setting with its default and a comment each.
pub const DEFAULTS: &str = include_str!("../../config.default.toml");
/// What every variable of ours starts with.
const PREFIX: &str = "SESSIOND_";
/// Variables with our prefix that are not settings of the server: those of the client
/// commands, the test suite and the build.
const NOT_SETTINGS: [&str; 17] = [
    "config",
    "url",
    "token",
    "bin",
    "test_postgres",
    "test_postgres_synchronous",
    "test_postgres_bin",
    "test_postgres_user",
    "test_chaos_seconds",
    "test_chaos_seed",
    "test_clickhouse",
    "test_clickhouse_lib",
    "test_s2",
    "test_s2_bin",
    "test_s3",
    "skip_playground",
    "require_playground",
];

/// The whole configuration.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Folder of the embedded stores.
    pub data: PathBuf,
    /// Root key of the default environment, taken verbatim.
    #[serde(serialize_with = "masked", skip_serializing_if = "Option::is_none")]
    pub secret_key: Option<SecretString>,
    /// The listener and what it allows.
    pub http: HttpConfig,
    /// The GraphQL door.
    pub graphql: GraphqlConfig,
    /// Direct writes.
    pub direct: DirectConfig,
    /// The metadata store.
    pub metadata: MetadataConfig,
    /// The log.
    pub log: LogConfig,
    /// Lists from ClickHouse.
    pub clickhouse: ClickHouseConfig,
    /// What keeps ClickHouse up to date.
    pub replication: ReplicationConfig,
    /// Snapshots.
    pub blobs: BlobsConfig,
    /// Protection of keys.
    pub auth: AuthConfig,
    /// Logging.
    pub telemetry: TelemetryConfig,
    /// Variables of another system that are known, and have no effect here.
    #[serde(skip)]
    without_effect: Vec<String>,
}

/// Logging.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TelemetryConfig {
    /// A filter as `tracing` reads it.
    pub log: String,
    /// How log lines look.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines, one object a line.
    Json,
}

/// What flags say; an absent flag leaves the setting as it is.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--config`.
    pub file: Option<PathBuf>,
    /// `--data`.
    pub data: Option<PathBuf>,
    /// `--listen`.
    pub listen: Option<String>,
}

impl Config {
    /// Reads every source and validates the result.
    ///
    /// # Errors
    /// [`Error::Invalid`] with every fault that was found.
    pub fn load(overrides: &Overrides) -> Result<Self> {
        let environment = Env::prefixed(PREFIX).filter(|key| {
            let key = key.as_str().to_ascii_lowercase();
            !NOT_SETTINGS.contains(&key.as_str())
        });
        let mut figment = Figment::from(Toml::string(DEFAULTS));
        if let Some(file) = &overrides.file {
            figment = figment.merge(Toml::file_exact(file));
        }
        // What is not UTF-8 is none of them.
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        let (mut figment, without_effect) = aliases::merge(figment, variables)?;
        figment = figment.merge(environment.split("__"));
        if let Some(data) = &overrides.data {
            figment = figment.merge(Serialized::default("data", data));
        }
        if let Some(listen) = &overrides.listen {
            figment = figment.merge(Serialized::default("http.listen", listen));
        }
        let mut config: Self = figment.extract().map_err(|faults| {
            let violation = |fault: figment::Error| Violation {
                field: fault.path.join("."),
                message: fault.kind.to_string(),
            };
            Error::Invalid(faults.into_iter().map(violation).collect())
        })?;
        config.without_effect = without_effect;
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        self.http.validate(&mut faults);
        self.graphql.validate(&mut faults);
        self.direct.validate(&mut faults);
        self.metadata.validate(&mut faults);
        self.log.validate(&mut faults);
        self.clickhouse.validate(&mut faults);
        self.replication.validate(&mut faults);
        self.blobs.validate(&mut faults);
        if self.metadata.is_postgres() && self.auth.master_key.is_none() {
            faults.push(fault("auth.master_key", "is required with Postgres"));
        }
        if self.replication.enabled {
            self.demand_two_sides(&mut faults);
        }
        if faults.is_empty() { Ok(()) } else { Err(Error::Invalid(faults)) }
    }

    /// Checks that there is what a replicator copies from and to.
    ///
    /// # Errors
    /// [`Error::Invalid`] with what is missing.
    pub fn require_replicable(&self) -> Result<()> {
        let mut faults = Vec::new();
        self.demand_two_sides(&mut faults);
        if faults.is_empty() { Ok(()) } else { Err(Error::Invalid(faults)) }
    }

    fn demand_two_sides(&self, faults: &mut Vec<Violation>) {
        if !self.metadata.is_postgres() {
            faults.push(fault("metadata.url", "must be of a Postgres, which replication copies from"));
        }
        if self.clickhouse.url.is_none() {
            faults.push(fault("clickhouse.url", "is required: replication copies to it"));
        }
    }

    /// Names once, in the log, what is set and has no effect.
    pub fn tell_without_effect(&self) {
        if !self.without_effect.is_empty() {
            tracing::warn!(
                variables = self.without_effect.join(" "),
                "variables that have no effect here: nothing is acknowledged early or given up, and the slot is the only lock"
            );
        }
    }

    /// The URL that a replicator uses: it must lead to the primary, past any pooler.
    pub fn replication_url(&self) -> SecretString {
        self.replication.url.clone().unwrap_or_else(|| self.metadata_url().into())
    }

    /// The URL of the metadata store.
    pub fn metadata_url(&self) -> String {
        match &self.metadata.url {
            Some(url) => url.expose_secret().to_owned(),
            None => format!("sqlite:{}", self.data.join("metadata.db").display()),
        }
    }

    /// The folder of the embedded log.
    pub fn log_dir(&self) -> PathBuf {
        self.data.join("log")
    }

    /// The folder of blobs, where no other place is set.
    pub fn blobs_dir(&self) -> PathBuf {
        self.data.join("blobs")
    }

    /// The file of the generated master key.
    pub fn master_key_file(&self) -> PathBuf {
        self.data.join("master.key")
    }
}

/// Shows that a secret is set, and nothing of it.
fn masked<S: Serializer>(_: &Option<SecretString>, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str("***")
}

fn fault(field: &str, message: &str) -> Violation {
    Violation { field: field.to_owned(), message: message.to_owned() }
}
