//! Where callers reach this server, for answers that carry an address of ours.

use axum::extract::FromRequestParts;
use http::header::HOST;
use http::request::Parts;

use super::App;
use super::error::Failure;

/// Scheme and authority, such as `https://sessions.example.com`: as configured, or else as the caller wrote it.
#[derive(Clone, Debug)]
pub struct Origin(pub String);

impl FromRequestParts<App> for Origin {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        if let Some(configured) = &app.config.public_url {
            return Ok(Self(configured.clone()));
        }
        let text = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
        let authority = parts.uri.authority().map(|authority| authority.as_str());
        let host = text("x-forwarded-host").or(authority).or_else(|| text(HOST.as_str()));
        let host = host.map(first).filter(|host| is_authority(host));
        let host = host.ok_or_else(|| Failure::bad_request("Missing or malformed Host header"))?;
        let scheme = match text("x-forwarded-proto").map(first) {
            Some("https") => "https",
            Some("http") => "http",
            _ if app.config.tls => "https",
            _ => "http",
        };
        Ok(Self(format!("{scheme}://{host}")))
    }
}

/// The first of a list, which the outermost proxy has written.
fn first(list: &str) -> &str {
    list.split(',').next().unwrap_or_default().trim()
}

fn is_authority(host: &str) -> bool {
    !host.contains('@') && host.parse::<http::uri::Authority>().is_ok()
}
