//! Lists from ClickHouse.

use std::time::Duration;

use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use url::Url;

use super::fault;
use super::store::is_origin;
use crate::domain::Violation;

/// A copy of all sessions that lists, counts and tags come from.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ClickHouseConfig {
    /// The HTTP interface, without credentials; `None` if there is no ClickHouse.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<Url>,
    /// Database of the tables.
    pub database: String,
    /// Who we are there.
    pub user: String,
    /// What proves it.
    #[serde(default, serialize_with = "super::masked", skip_serializing_if = "Option::is_none")]
    pub password: Option<SecretString>,
    /// Longest a list, a count or a list of tags may take.
    #[serde(with = "humantime_serde")]
    pub query_timeout: Duration,
    /// Longest an insert may take.
    #[serde(with = "humantime_serde")]
    pub insert_timeout: Duration,
    /// The cluster that has the tables; `None` for a single server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Where lists come from.
    pub lists: ListSource,
    /// Where they come from while ClickHouse is away.
    pub fallback: Fallback,
    /// Whether metadata is kept in a column of type `JSON` too.
    pub metadata_column: bool,
}

/// Where lists come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ListSource {
    /// ClickHouse.
    ClickHouse,
    /// The metadata store.
    Sql,
}

/// Where lists come from while ClickHouse is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fallback {
    /// Nowhere: they are refused.
    None,
    /// The metadata store.
    Sql,
}

impl ClickHouseConfig {
    pub(super) fn validate(&self, faults: &mut Vec<Violation>) {
        if self.url.as_ref().is_some_and(|url| !is_origin(url)) {
            faults.push(fault(
                "clickhouse.url",
                "must be an http or https URL of a host, without a path; user and password are settings of their own",
            ));
        }
        for (field, empty) in [
            ("clickhouse.database", self.database.is_empty()),
            ("clickhouse.user", self.user.is_empty()),
            ("clickhouse.cluster", self.cluster.as_ref().is_some_and(String::is_empty)),
        ] {
            if empty {
                faults.push(fault(field, "must not be empty"));
            }
        }
        for (field, limit) in [
            ("clickhouse.query_timeout", self.query_timeout),
            ("clickhouse.insert_timeout", self.insert_timeout),
        ] {
            if limit.is_zero() {
                faults.push(fault(field, "must be longer than 0"));
            }
        }
    }
}
