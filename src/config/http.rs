//! The listener: address, limits, timeouts, TLS.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use url::Url;

use super::fault;
use crate::domain::Violation;
use crate::domain::send_budget::{BUDGET_MAX as SEND_BUFFER_MAX, CONNECTION_BYTES};

/// The listener and what it allows.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where callers reach this server, if not as each request says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_url: Option<Url>,
    /// Addresses and networks of proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<String>,
    /// Connections served at once.
    pub max_connections: usize,
    /// Longest time to send the head of a request.
    #[serde(with = "humantime_serde")]
    pub header_timeout: Duration,
    /// Longest time to send a body.
    #[serde(with = "humantime_serde")]
    pub body_timeout: Duration,
    /// Longest pause inside a body.
    #[serde(with = "humantime_serde")]
    pub body_pause_timeout: Duration,
    /// Longest time that what we send may stay unread.
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
    /// Bytes that may wait for all clients together to read them, and that they may have sent without being answered; at
    /// least 4 MiB, at most 4 GiB.
    pub send_buffer: usize,
    /// How long everything is still served after a stop was asked for, while `/readyz` says no already.
    #[serde(with = "humantime_serde")]
    pub shutdown_delay: Duration,
    /// Longest time that a stop may take after that.
    #[serde(with = "humantime_serde")]
    pub shutdown_deadline: Duration,
    /// Origins whose pages may call the API; `*` reflects any.
    pub cors_origins: Vec<String>,
    /// Served when both files are set.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Limits of `/api/*` and `/graphql`.
    pub rate_limit: RateLimitConfig,
}

/// PEM files of the listener.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// Certificate chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// Private key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub private_key: Option<PathBuf>,
}

/// Limits of `/api/*` and `/graphql`, where each root field is a request; zero turns one off.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimitConfig {
    /// Requests per ten seconds of one environment, by secret keys.
    pub key_per_10s: u32,
    /// Burst of one environment.
    pub key_burst: u32,
    /// Requests a minute of one public token.
    pub token_per_minute: u32,
    /// Requests per ten seconds of one address that shows no valid credentials.
    pub anonymous: u32,
}

/// A network, or the one address that `text` is.
fn network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

impl HttpConfig {
    /// Where trusted proxies are.
    pub fn trusted_networks(&self) -> Vec<IpNet> {
        self.trusted_proxies.iter().filter_map(|text| network(text)).collect()
    }

    pub(super) fn validate(&self, faults: &mut Vec<Violation>) {
        if self.max_connections == 0 {
            faults.push(fault("http.max_connections", "must be at least 1"));
        }
        if !(CONNECTION_BYTES..=SEND_BUFFER_MAX).contains(&self.send_buffer) {
            let message = format!("must be {CONNECTION_BYTES} to {SEND_BUFFER_MAX} bytes");
            faults.push(fault("http.send_buffer", &message));
        }
        for (field, value) in [
            ("http.header_timeout", self.header_timeout),
            ("http.body_timeout", self.body_timeout),
            ("http.body_pause_timeout", self.body_pause_timeout),
            ("http.write_timeout", self.write_timeout),
        ] {
            if value.is_zero() {
                faults.push(fault(field, "must be longer than zero"));
            }
        }
        if self.tls.certificate.is_some() != self.tls.private_key.is_some() {
            faults.push(fault("http.tls", "needs both certificate and private_key, or neither"));
        }
        for proxy in &self.trusted_proxies {
            if network(proxy).is_none() {
                faults.push(fault(
                    "http.trusted_proxies",
                    "must be addresses such as 10.0.0.1 or networks such as 10.0.0.0/8",
                ));
            }
        }
        for origin in &self.cors_origins {
            if origin != "*" && (!origin.contains("://") || origin.ends_with('/')) {
                faults
                    .push(fault("http.cors_origins", "must be \"*\" or origins such as https://app.example"));
            }
        }
    }
}
