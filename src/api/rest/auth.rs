//! Tokens over REST. Only secret keys may ask.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Map, Value};
use std::time::Duration;
use utoipa::ToSchema;

use super::read::Reader;
use crate::api::App;
use crate::api::error::Failure;
use crate::api::extract::{JsonObject, KeyAsker};
use crate::api::period::period;
use crate::domain::{Caller, Scopes, Timestamp};

const BODY_MAX: usize = 32_768;
const LONGEST: Duration = Duration::from_secs(30 * 86_400);

/// What a client puts into a token that it signs itself.
#[derive(Debug, Serialize, ToSchema)]
pub struct ClaimsResponse {
    /// The environment.
    pub sub: String,
    /// Always true.
    #[serde(rename = "pub")]
    pub public: bool,
}

/// A token.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenResponse {
    /// A public access token.
    pub token: String,
}

/// A token asked for in claims.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "camelCase")]
#[allow(dead_code, reason = "read field by field; the type documents the body")]
pub struct JwtBody {
    /// Claims; `scopes` is the one that is used.
    #[schema(value_type = Option<Object>)]
    claims: Option<Value>,
    /// Such as `15m`, a date, or seconds since the epoch; an hour by default.
    #[schema(value_type = Option<Value>)]
    expiration_time: Option<Value>,
}

/// A token asked for in scopes.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "camelCase")]
#[allow(dead_code, reason = "read field by field; the type documents the body")]
pub struct PublicTokenBody {
    /// At least one.
    #[schema(min_items = 1)]
    scopes: Vec<String>,
    /// As for `/api/v1/auth/jwt`; 15 minutes by default.
    #[schema(value_type = Option<Value>)]
    expiration_time: Option<Value>,
}

/// The claims with which a client may sign tokens itself.
#[utoipa::path(post, path = "/api/v1/auth/jwt/claims", tag = "auth", operation_id = "jwtClaims",
    responses((status = 200, description = "Claims", body = ClaimsResponse)))]
pub async fn claims(KeyAsker(caller): KeyAsker) -> Json<ClaimsResponse> {
    Json(ClaimsResponse { sub: caller.environment.to_string(), public: true })
}

/// Signs a token with the scopes of its claims.
#[utoipa::path(post, path = "/api/v1/auth/jwt", tag = "auth", operation_id = "mintJwt",
    request_body = JwtBody, responses((status = 200, description = "A token", body = TokenResponse)))]
pub async fn jwt(
    State(app): State<App>,
    KeyAsker(caller): KeyAsker,
    JsonObject(body): JsonObject<BODY_MAX>,
) -> Result<Json<TokenResponse>, Failure> {
    let mut reader = Reader::new(&body, "");
    let claims = reader.object("claims").unwrap_or_default();
    reader.finish()?;
    let mut reader = Reader::new(&claims, "claims.");
    let scopes = reader.texts("scopes").unwrap_or_default();
    reader.finish()?;
    mint(&app, &caller, scopes, &body, Duration::from_secs(3600)).await
}

/// Signs a token with these scopes.
#[utoipa::path(post, path = "/api/v1/auth/public-tokens", tag = "auth", operation_id = "mintPublicToken",
    request_body = PublicTokenBody,
    responses((status = 200, description = "A token", body = TokenResponse)))]
pub async fn public_tokens(
    State(app): State<App>,
    KeyAsker(caller): KeyAsker,
    JsonObject(body): JsonObject<BODY_MAX>,
) -> Result<Json<TokenResponse>, Failure> {
    let mut reader = Reader::new(&body, "");
    let scopes = reader.texts("scopes").unwrap_or_default();
    if scopes.is_empty() {
        reader.expected("scopes", "at least one scope");
    }
    reader.finish()?;
    mint(&app, &caller, scopes, &body, Duration::from_secs(900)).await
}

async fn mint(
    app: &App,
    caller: &Caller,
    scopes: Vec<String>,
    body: &Map<String, Value>,
    default: Duration,
) -> Result<Json<TokenResponse>, Failure> {
    let end = expiry(body.get("expirationTime"), app.clock.now(), default)?;
    Ok(Json(TokenResponse { token: app.auth.mint(caller, Scopes::new(scopes), end).await? }))
}

fn expiry(value: Option<&Value>, now: Timestamp, default: Duration) -> Result<Timestamp, Failure> {
    let end = match value {
        None | Some(Value::Null) => Some(now.plus(default)),
        Some(Value::Number(seconds)) => seconds
            .as_f64()
            .filter(|seconds| seconds.abs() < 8.64e12)
            .map(|seconds| Timestamp::from_millis((seconds * 1000.0) as i64)),
        Some(Value::String(text)) => {
            period(text).map(|period| now.plus(period)).or_else(|| Timestamp::parse(text))
        }
        Some(_) => None,
    };
    let end = end.ok_or_else(|| Failure::bad_request("Invalid expiration time"))?;
    if end <= now {
        return Err(Failure::bad_request("Expiration time must be in the future"));
    }
    if end > now.plus(LONGEST) {
        return Err(Failure::bad_request("Expiration time cannot exceed 30 days"));
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_expiry_is_a_period_a_date_or_seconds_within_thirty_days() {
        let now = Timestamp::from_millis(1_700_000_000_000);
        let read = |value: Value| expiry(Some(&value), now, Duration::from_secs(60));
        assert_eq!(
            expiry(None, now, Duration::from_secs(60)).expect("default"),
            now.plus(Duration::from_secs(60))
        );
        assert_eq!(read(json!("15m")).expect("a period"), now.plus(Duration::from_secs(900)));
        assert_eq!(read(json!(1_700_000_060)).expect("seconds"), now.plus(Duration::from_secs(60)));
        for (value, message) in [
            (json!("soon"), "Invalid expiration time"),
            (json!(true), "Invalid expiration time"),
            (json!(1_700_000_000), "Expiration time must be in the future"),
            (json!("31d"), "Expiration time cannot exceed 30 days"),
        ] {
            assert_eq!(read(value).expect_err(message).message, message);
        }
    }
}
