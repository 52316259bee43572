//! Direct writes over the S2 wire.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use url::Url;

use super::fault;
use crate::domain::Violation;

const TOKEN_TTL_MIN: Duration = Duration::from_secs(60);

/// What direct writers are told.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DirectConfig {
    /// Where they write, if not at the origin that they have asked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Url>,
    /// Validity of their tokens, which end earlier with the caller's own credentials.
    #[serde(with = "humantime_serde")]
    pub token_ttl: Duration,
    /// For how long the SDK's writer gathers records into a batch.
    #[serde(with = "humantime_serde")]
    pub flush_interval: Duration,
}

impl DirectConfig {
    pub(super) fn validate(&self, faults: &mut Vec<Violation>) {
        if self.token_ttl < TOKEN_TTL_MIN {
            faults.push(fault("direct.token_ttl", "must be at least 1m"));
        }
        if let Some(endpoint) = &self.endpoint
            && (!matches!(endpoint.scheme(), "http" | "https")
                || endpoint.query().is_some()
                || endpoint.fragment().is_some())
        {
            faults.push(fault("direct.endpoint", "must be an http or https URL without query and fragment"));
        }
    }
}
