//! The GraphQL door.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::fault;
use crate::domain::Violation;

/// What the GraphQL door allows. The limits on documents are not settings: they keep the process alive.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct GraphqlConfig {
    /// Whether `__schema` and `__type` are answered, and error messages suggest names.
    pub introspection: bool,
    /// Longest time that a query or mutation may take.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
    /// Longest time until a WebSocket client says `connection_init`.
    #[serde(with = "humantime_serde")]
    pub init_timeout: Duration,
    /// Pause between pings; a WebSocket client that answers none in it is gone.
    #[serde(with = "humantime_serde")]
    pub ping_interval: Duration,
    /// Operations that one WebSocket may have under way.
    pub max_subscriptions: usize,
}

impl GraphqlConfig {
    pub(super) fn validate(&self, faults: &mut Vec<Violation>) {
        for (field, value) in [
            ("graphql.request_timeout", self.request_timeout),
            ("graphql.init_timeout", self.init_timeout),
            ("graphql.ping_interval", self.ping_interval),
        ] {
            if value.is_zero() {
                faults.push(fault(field, "must be longer than zero"));
            }
        }
        if self.max_subscriptions == 0 {
            faults.push(fault("graphql.max_subscriptions", "must be at least 1"));
        }
    }
}
