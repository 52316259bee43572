//! What handlers take out of a request: the caller, addresses, bodies within their limits.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, RawPathParams, Request};
use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH};
use http::request::Parts;
use http::{Extensions, HeaderMap};
use http_body_util::BodyExt;
use serde_json::{Map, Value};

use super::App;
use super::error::Failure;
use super::received::{self, Received};
use crate::domain::run::named_run;
use crate::domain::{
    Caller, ChannelAddress, ChannelName, ConnectionBudget, Direction, Error, RunId, SessionRef, Violation,
    WaitpointId,
};

/// Who asks, through the realtime routes, which have no rate limit.
#[derive(Debug)]
pub struct Asker(pub Arc<Caller>);

/// Who asks, through `/api/*`, within its rate limit.
#[derive(Debug)]
pub struct ApiAsker(pub Arc<Caller>);

/// A secret key that asks, through `/api/*`.
#[derive(Debug)]
pub struct KeyAsker(pub Arc<Caller>);

/// The bearer token of a request.
///
/// # Errors
/// [`Error::Unauthenticated`].
pub fn bearer(headers: &HeaderMap) -> Result<&str, Error> {
    const MISSING: Error = Error::Unauthenticated("Invalid or Missing API key");
    let text = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).ok_or(MISSING)?;
    let (scheme, bearer) = text.split_once(' ').ok_or(MISSING)?;
    let bearer = bearer.trim();
    if !scheme.eq_ignore_ascii_case("bearer") || bearer.is_empty() {
        return Err(MISSING);
    }
    Ok(bearer)
}

/// Who shows the bearer of a request, and the bearer. Whoever shows none that is valid is counted by address.
///
/// # Errors
/// [`Error::Unauthenticated`], [`Error::RateLimited`], [`Error::Unavailable`].
pub async fn authenticate<'a>(
    app: &App,
    headers: &'a HeaderMap,
    extensions: &Extensions,
) -> Result<(Arc<Caller>, &'a str), Error> {
    let found = async {
        let bearer = bearer(headers)?;
        Ok::<_, Error>((app.auth.authenticate(bearer).await?, bearer))
    };
    found.await.map_err(|error| app.refuse_stranger(headers, extensions, error))
}

impl FromRequestParts<App> for Asker {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let (caller, _) = authenticate(app, &parts.headers, &parts.extensions).await?;
        Ok(Self(caller))
    }
}

impl FromRequestParts<App> for ApiAsker {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let (caller, bearer) = authenticate(app, &parts.headers, &parts.extensions).await?;
        let counted = app.rate_limiter.counted(&caller, bearer);
        app.rate_limiter.check(counted, 1, app.clock.as_ref()).map_err(Error::from)?;
        Ok(Self(caller))
    }
}

impl FromRequestParts<App> for KeyAsker {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let ApiAsker(caller) = ApiAsker::from_request_parts(parts, app).await?;
        if !caller.is_private() {
            return Err(crate::domain::access::UNAUTHORIZED.into());
        }
        Ok(Self(caller))
    }
}

/// The session that a path names.
#[derive(Debug)]
pub struct SessionPath(pub SessionRef);

/// The session and the channel that a path names, a side channel included.
#[derive(Debug)]
pub struct ChannelPath {
    /// The session.
    pub session: SessionRef,
    /// Its channel.
    pub channel: ChannelAddress,
}

/// Path parameters, percent-decoded once; `%2F` is part of a segment.
async fn path_params(parts: &mut Parts) -> Result<RawPathParams, Failure> {
    RawPathParams::from_request_parts(parts, &()).await.map_err(|_| {
        Failure::params(&Violation { field: "path".to_owned(), message: "is not valid UTF-8".to_owned() })
    })
}

fn param<'a>(params: &'a RawPathParams, name: &str) -> Option<&'a str> {
    params.iter().find(|(key, _)| *key == name).map(|(_, value)| value)
}

fn in_path<T>(result: crate::domain::Result<T>) -> Result<T, Failure> {
    result.map_err(|error| match error {
        Error::Malformed(fault) => Failure::params(&fault),
        other => other.into(),
    })
}

fn session(params: &RawPathParams) -> Result<SessionRef, Failure> {
    in_path(SessionRef::parse(param(params, "session").unwrap_or_default()))
}

impl FromRequestParts<App> for SessionPath {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Failure> {
        session(&path_params(parts).await?).map(Self)
    }
}

/// The run that a path names.
#[derive(Debug)]
pub struct RunPath(pub RunId);

/// The waitpoint that a path names.
#[derive(Debug)]
pub struct WaitpointPath(pub WaitpointId);

impl FromRequestParts<App> for RunPath {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Failure> {
        let params = path_params(parts).await?;
        Ok(Self(named_run(param(&params, "run").unwrap_or_default())))
    }
}

impl FromRequestParts<App> for WaitpointPath {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Failure> {
        let params = path_params(parts).await?;
        in_path(WaitpointId::parse(param(&params, "waitpoint").unwrap_or_default())).map(Self)
    }
}

impl FromRequestParts<App> for ChannelPath {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Failure> {
        let params = path_params(parts).await?;
        let direction = in_path(Direction::parse(param(&params, "io").unwrap_or_default()))?;
        let name = in_path(param(&params, "channel").map(ChannelName::parse).transpose())?;
        Ok(Self { session: session(&params)?, channel: ChannelAddress { direction, name } })
    }
}

/// A body of at most `LIMIT` bytes, read within the configured time.
#[derive(Debug)]
pub struct LimitedBody<const LIMIT: usize>(pub Bytes);

impl<const LIMIT: usize> FromRequest<App> for LimitedBody<LIMIT> {
    type Rejection = Failure;

    async fn from_request(mut request: Request, app: &App) -> Result<Self, Failure> {
        Self::read(&mut request, app).await
    }
}

impl<const LIMIT: usize> LimitedBody<LIMIT> {
    /// Takes the body of a request, in room that is kept until that is answered.
    ///
    /// # Errors
    /// 400, 408, 413; 415 if it is encoded; 503 without room.
    pub async fn read(request: &mut Request, app: &App) -> Result<Self, Failure> {
        require_plain(request.headers())?;
        Self::read_encoded(request, app).await
    }

    /// Takes the body of a request as it is sent, in whatever coding.
    ///
    /// # Errors
    /// As [`LimitedBody::read`], without 415.
    pub async fn read_encoded(request: &mut Request, app: &App) -> Result<Self, Failure> {
        let announced = announced(request.headers());
        let length = announced.map_or(LIMIT, |length| usize::try_from(length).unwrap_or(usize::MAX));
        if length > LIMIT {
            return Err(Failure::body_too_large());
        }
        let body = std::mem::take(request.body_mut());
        let budget = request.extensions().get::<ConnectionBudget>();
        let budget = budget.ok_or_else(|| Error::internal("a request without a budget"))?;
        let mut received = Received::default();
        let count = |bytes| received.add(budget, bytes, length);
        let (pause, whole) = (app.config.body_chunk_timeout, app.config.body_timeout);
        let bytes = read_within(body, LIMIT, pause, whole, count).await?;
        if let Some(room) = received.into_room() {
            budget.keep(room);
        }
        Ok(Self(bytes))
    }
}

/// The codings that a request says its body is in.
pub(super) fn codings(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(CONTENT_ENCODING).into_iter();
    // What is no text names no coding that anybody knows.
    let words = lines.flat_map(|line| line.to_str().unwrap_or("?").split(',')).map(str::trim);
    words.filter(|word| !word.is_empty() && !word.eq_ignore_ascii_case("identity"))
}

/// Refuses a body that would have to be decoded, so that nobody stores or reads the codes for what they mean.
///
/// # Errors
/// 415.
pub(super) fn require_plain(headers: &HeaderMap) -> Result<(), Failure> {
    if codings(headers).next().is_some() { Err(Failure::body_encoded()) } else { Ok(()) }
}

/// The length that a request says its body has.
pub(super) fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok())
}

/// A body of at most `limit` bytes, with no pause longer than `pause`, within `whole`. `count` is told of each piece.
///
/// # Errors
/// 400, 408, 413; those of `count`.
pub(super) async fn read_within(
    body: Body,
    limit: usize,
    pause: Duration,
    whole: Duration,
    count: impl FnMut(usize) -> Result<(), Failure>,
) -> Result<Bytes, Failure> {
    let read = tokio::time::timeout(whole, read(body, limit, pause, count)).await;
    read.unwrap_or_else(|_| Err(Failure::body_timeout()))
}

async fn read(
    mut body: Body,
    limit: usize,
    chunk: Duration,
    mut count: impl FnMut(usize) -> Result<(), Failure>,
) -> Result<Bytes, Failure> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    loop {
        let frame = tokio::time::timeout(chunk, body.frame()).await.map_err(|_| Failure::body_timeout())?;
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|_| Failure::bad_request("Request body could not be read"))?;
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + rest.len() + data.len() > limit {
            return Err(Failure::body_too_large());
        }
        count(data.len())?;
        if first.is_empty() {
            first = data;
        } else {
            rest.extend_from_slice(&data);
        }
    }
    if rest.is_empty() {
        return Ok(first);
    }
    let mut whole = BytesMut::with_capacity(first.len() + rest.len());
    whole.extend_from_slice(&first);
    whole.extend_from_slice(&rest);
    Ok(whole.freeze())
}

/// A body that is one JSON object.
#[derive(Debug)]
pub struct JsonObject<const LIMIT: usize>(pub Map<String, Value>);

impl<const LIMIT: usize> FromRequest<App> for JsonObject<LIMIT> {
    type Rejection = Failure;

    async fn from_request(mut request: Request, app: &App) -> Result<Self, Failure> {
        let LimitedBody(bytes) = LimitedBody::<LIMIT>::read(&mut request, app).await?;
        let budget = request.extensions().get::<ConnectionBudget>();
        let room = budget.map_or(Ok(None), |budget| received::weigh(budget, &bytes))?;
        if let (Some(budget), Some(room)) = (budget, room) {
            budget.keep(room);
        }
        json_object(&bytes).map(Self)
    }
}

fn json_object(bytes: &[u8]) -> Result<Map<String, Value>, Failure> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(Failure::bad_request("Request body is empty"));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(Value::Null | Value::Bool(false)) | Err(_) => Err(Failure::bad_request("Invalid JSON")),
        Ok(_) => Err(Failure::types(&[Violation {
            field: String::new(),
            message: "expected an object".to_owned(),
        }])),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    #[test]
    fn a_body_must_be_one_json_object() {
        for (body, message) in [
            ("", "Request body is empty"),
            (" \n", "Request body is empty"),
            ("{", "Invalid JSON"),
            ("null", "Invalid JSON"),
            ("{} {}", "Invalid JSON"),
            ("[]", "Validation error: expected an object at \"\""),
        ] {
            assert_eq!(json_object(body.as_bytes()).expect_err(body).message, message);
        }
        assert!(json_object(b"{\"a\":1}").is_ok());
    }

    #[test]
    fn only_a_bearer_is_a_credential() {
        for text in ["", "Bearer", "Bearer ", "Basic abc", "abc"] {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, text.parse().expect("a header"));
            let refused = bearer(&headers).expect_err(text);
            assert!(matches!(refused, Error::Unauthenticated("Invalid or Missing API key")));
        }
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, "bearer  abc".parse().expect("a header"));
        assert_eq!(bearer(&headers).expect("a bearer"), "abc");
    }

    #[tokio::test]
    async fn a_body_without_a_length_is_read_up_to_its_limit_exactly() {
        let chunks =
            |n: usize| Body::from_stream(stream::iter((0..n).map(|_| Ok::<_, std::io::Error>("ab"))));
        let wait = Duration::from_secs(5);
        assert_eq!(read(chunks(3), 6, wait, |_| Ok(())).await.expect("fits"), "ababab");
        assert_eq!(read(chunks(4), 6, wait, |_| Ok(())).await.expect_err("over").status.as_u16(), 413);
    }

    #[tokio::test]
    async fn a_body_that_stalls_is_given_up() {
        let stalled = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
        let refused = read(stalled, 6, Duration::from_millis(5), |_| Ok(())).await.expect_err("stalled");
        assert_eq!(refused.status.as_u16(), 408);
    }
}
