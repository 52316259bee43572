//! GraphQL over HTTP: <https://graphql.github.io/graphql-over-http/draft/>.
//!
//! async-graphql-axum's own service executes mutations over GET and of any content type, has no limits, and puts its
//! errors into words of its own; so everything around its body extractor is done here (ADR 9).

use std::sync::Arc;

use async_graphql::{BatchRequest, Extensions, ParseRequestError, Request as Operation, Variables};
use async_graphql_axum::GraphQLBatchRequest;
use axum::Extension;
use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use http::{Extensions as Attached, HeaderMap, Method, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use tokio::sync::OwnedSemaphorePermit;

use super::accept::{Accept, Media};
use super::{multipart, sse};
use crate::api::App;
use crate::api::error::Failure;
use crate::api::extract::{LimitedBody, announced, authenticate, read_within, require_plain};
use crate::api::graphql::engine::{Asked, Credentials};
use crate::api::graphql::error::{Fault, protocol};
use crate::api::graphql::reply::Reply;
use crate::api::graphql::unreadable;
use crate::api::trace::RequestId;
use crate::api::{received, stranger};
use crate::domain::send_budget::{Reservation, Reserved};
use crate::domain::{ConnectionBudget, Error};
use crate::telemetry::Door;

/// Largest body, and largest query string in decoded bytes.
const BODY_MAX: usize = 1_048_576;
/// Most operations in one body.
const BATCH_MAX: usize = 10;

/// Answers one request.
pub(super) async fn answer(app: App, id: RequestId, mut request: Request) -> Response {
    let accept = Accept::of(request.headers());
    let may_change = request.method() == Method::POST;
    let door = match accept.stream() {
        Some(Media::Multipart) => Door::Multipart,
        _ => Door::GraphqlSse,
    };
    let budget = request.extensions().get::<ConnectionBudget>().cloned();
    let read = async {
        let budget = budget.ok_or_else(|| Error::internal("a request without a budget"))?;
        let credentials = credentials(&app, request.headers(), request.extensions()).await?;
        let is_stranger = credentials.is_none();
        if is_stranger {
            app.admit_stranger(app.stranger(request.headers(), request.extensions()))?;
        }
        let (bytes, body) = match may_change {
            true if is_stranger => from_stranger(&app, &mut request).await?,
            true => (from_body(&app, &mut request).await?, None),
            false => (Bytes::new(), None),
        };
        let query = request.uri().query().unwrap_or_default();
        let text = if may_change { &bytes } else { query.as_bytes() };
        let received = received::weigh(&budget, text)?.map(Arc::new);
        let operations = if may_change { parse(bytes).await? } else { from_query(request.uri().query())? };
        // From here on a client that takes no answers is waited for: strangers do not keep what others of them want.
        drop(body);
        let room = app.graphql.room(&budget).await;
        Ok::<_, Failure>((credentials, budget, room, operations, received))
    };
    let (credentials, budget, room, operations, received) = match read.await {
        Ok(read) => read,
        Err(failure) => return refuse(failure, accept, &id),
    };
    let asked = Asked { credentials, id, may_change, door, budget, _received: received };
    match operations {
        BatchRequest::Single(operation) => one(&app, operation, asked, accept, room).await,
        BatchRequest::Batch(operations) => batch(&app, operations, &asked, accept, room).await,
    }
}

/// Who asks; `None` without a header. A header that is no good is refused rather than ignored.
pub(super) async fn credentials(
    app: &App,
    headers: &HeaderMap,
    extensions: &Attached,
) -> Result<Option<Credentials>, Failure> {
    if !headers.contains_key(AUTHORIZATION) {
        return Ok(None);
    }
    let (caller, bearer) = authenticate(app, headers, extensions).await?;
    Ok(Some(Credentials::new(app, caller, bearer)))
}

async fn one(
    app: &App,
    operation: Operation,
    asked: Asked,
    accept: Accept,
    mut room: Reservation,
) -> Response {
    let id = asked.id.clone();
    let prepared = match app.graphql.prepare(app, operation, asked) {
        Ok(prepared) => prepared,
        Err(fault) if accept.single() == Some(Media::EventStream) && is_in_document(&fault) => {
            return sse::refusal(fault, id);
        }
        Err(fault) => return refuse(fault, accept, &id),
    };
    let media = if prepared.is_subscription() { accept.stream() } else { accept.single() };
    match media {
        Some(Media::EventStream) => sse::response(app.graphql.answers(prepared, room), id),
        Some(Media::Multipart) => multipart::response(app.graphql.answers(prepared, room), id),
        Some(media @ (Media::Json | Media::GraphqlResponse)) => {
            let reply = app.graphql.execute(prepared, &mut room, 0).await;
            respond(reply, media, Some(room))
        }
        None => {
            let message = if prepared.is_subscription() {
                "a subscription needs a stream: accept text/event-stream, or multipart/mixed with \
                 subscriptionSpec=1.0, or use a WebSocket (graphql-transport-ws)"
            } else {
                "accept application/graphql-response+json, application/json or text/event-stream"
            };
            refuse(protocol(StatusCode::NOT_ACCEPTABLE, "not_acceptable", message), accept, &id)
        }
    }
}

/// Several operations, executed one after the other.
async fn batch(
    app: &App,
    operations: Vec<Operation>,
    asked: &Asked,
    accept: Accept,
    mut room: Reservation,
) -> Response {
    if !(1..=BATCH_MAX).contains(&operations.len()) {
        let message = format!("a batch must hold 1 to {BATCH_MAX} operations");
        return refuse(Failure::bad_request(message), accept, &asked.id);
    }
    let (mut replies, mut taken) = (Vec::with_capacity(operations.len()), 0);
    // When to come back, if an operation came too early.
    let mut headers = HeaderMap::new();
    for operation in operations {
        let reply = match app.graphql.prepare(app, operation, asked.clone()) {
            Ok(prepared) if prepared.is_subscription() => {
                Reply::refusal(Failure::bad_request("a batch must not hold subscriptions"), &asked.id)
            }
            Ok(prepared) => app.graphql.execute(prepared, &mut room, taken).await,
            Err(fault) => Reply::refusal(fault, &asked.id),
        };
        if reply.is_rate_limited() {
            headers = reply.headers;
        }
        taken += reply.json.len();
        replies.push(reply.json);
    }
    let (reserved, body) = body(format!("[{}]", replies.join(",")), Some(room));
    let mut response = (reserved, body).into_response();
    *response.headers_mut() = headers;
    response.headers_mut().insert(CONTENT_TYPE, content_type(accept.refusal()));
    response
}

/// A body that keeps its room until the client has it.
fn body(json: String, room: Option<Reservation>) -> (Extension<Reserved>, Body) {
    let bytes = Bytes::from(json);
    let bytes = match room {
        Some(room) => room.around(bytes),
        None => bytes,
    };
    (Extension(Reserved), Body::from(bytes))
}

fn refuse(fault: impl Into<Fault>, accept: Accept, id: &RequestId) -> Response {
    respond(Reply::refusal(fault, id), accept.refusal(), None)
}

/// `application/json` keeps the old rule that every well-formed request gets a 200; only what is refused before
/// the document counts has a status of its own.
fn respond(reply: Reply, media: Media, room: Option<Reservation>) -> Response {
    let in_document = reply.refused.iter().flatten().all(is_in_document);
    let status = if media == Media::Json && in_document { StatusCode::OK } else { reply.status };
    let (reserved, body) = body(reply.json, room);
    let mut response = (status, reserved, body).into_response();
    *response.headers_mut() = reply.headers;
    response.headers_mut().insert(CONTENT_TYPE, content_type(media));
    response
}

/// Whether the refusal is about the GraphQL in a request that is well-formed otherwise.
fn is_in_document(fault: &Fault) -> bool {
    const WORDS: [&str; 5] = [
        "graphql_parse_failed",
        "graphql_validation_failed",
        "query_too_large",
        "query_too_complex",
        "persisted_query_not_found",
    ];
    WORDS.contains(&fault.failure.code)
}

fn content_type(media: Media) -> HeaderValue {
    HeaderValue::from_static(match media {
        Media::GraphqlResponse => "application/graphql-response+json; charset=utf-8",
        _ => "application/json; charset=utf-8",
    })
}

/// A body that could not be read as operations.
struct Unreadable;

impl From<ParseRequestError> for Unreadable {
    fn from(_: ParseRequestError) -> Self {
        Self
    }
}

impl IntoResponse for Unreadable {
    fn into_response(self) -> Response {
        Failure::from(self).into_response()
    }
}

impl From<Unreadable> for Failure {
    fn from(_: Unreadable) -> Self {
        Self::bad_request(
            "the body must be a JSON object with query (string) and, if given, operationName (string), variables \
             (object) and extensions (object), or an array of such objects",
        )
    }
}

async fn from_body(app: &App, request: &mut Request) -> Result<Bytes, Failure> {
    require_json(request.headers())?;
    let LimitedBody(bytes) = LimitedBody::<BODY_MAX>::read(request, app).await?;
    Ok(bytes)
}

/// The body of a stranger, which is small and soon there; and the room that it takes until it is answered.
async fn from_stranger(
    app: &App,
    request: &mut Request,
) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Failure> {
    require_json(request.headers())?;
    require_plain(request.headers())?;
    let announced = announced(request.headers());
    let room = app.strangers.room(announced)?;
    let limit = announced.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(stranger::BODY_MAX);
    let pause = app.config.body_chunk_timeout;
    let bytes = read_within(std::mem::take(request.body_mut()), limit, pause, pause, |_| Ok(()))
        .await
        .map_err(|failure| {
            let is_large = failure.status == StatusCode::PAYLOAD_TOO_LARGE;
            if is_large { stranger::too_large() } else { failure }
        })?;
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(Error::Unauthenticated("a batch of operations needs an API key").into());
    }
    Ok((bytes, Some(room)))
}

fn require_json(headers: &HeaderMap) -> Result<(), Failure> {
    if is_json(headers) {
        return Ok(());
    }
    let message = "the body must be application/json, in UTF-8";
    Err(protocol(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message))
}

async fn parse(bytes: Bytes) -> Result<BatchRequest, Failure> {
    let body = Body::from(bytes.clone());
    let request = Request::post(super::super::PATH).header(CONTENT_TYPE, "application/json").body(body);
    let request = request.map_err(|_| Failure::from(Unreadable))?;
    match GraphQLBatchRequest::<Unreadable>::from_request(request, &()).await {
        Ok(request) => Ok(request.into_inner()),
        Err(unreadable) => Err(unreadable_part(&bytes).unwrap_or_else(|| unreadable.into())),
    }
}

/// What cannot be read in a body of the right shape.
fn unreadable_part(body: &[u8]) -> Option<Failure> {
    let body = std::str::from_utf8(body).ok()?;
    unreadable::part_of(body).or_else(|| {
        let batch: Vec<&RawValue> = serde_json::from_str(body).ok()?;
        batch.into_iter().find_map(|request| unreadable::part_of(request.get()))
    })
}

/// Nothing else, because a browser sends other types across origins without asking.
fn is_json(headers: &HeaderMap) -> bool {
    let mut parts =
        headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default().split(';');
    let json = parts.next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"));
    let mut charsets = parts.filter_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("charset").then(|| value.trim().trim_matches('"'))
    });
    json && charsets.all(|charset| charset.eq_ignore_ascii_case("utf-8"))
}

fn from_query(query: Option<&str>) -> Result<BatchRequest, Failure> {
    let mut operation = Operation::new("");
    for (name, value) in url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        match name.as_ref() {
            "query" => operation.query = value.into_owned(),
            "operationName" if !value.is_empty() => operation.operation_name = Some(value.into_owned()),
            "variables" => {
                let read = json::<Variables>("variables", &value);
                operation.variables =
                    read.map_err(|failure| unreadable::variable_of(&value).unwrap_or(failure))?;
            }
            "extensions" => {
                operation.extensions = json::<Option<Extensions>>("extensions", &value)?.unwrap_or_default();
            }
            _ => {}
        }
    }
    Ok(BatchRequest::Single(operation))
}

fn json<T: DeserializeOwned + Default>(name: &str, text: &str) -> Result<T, Failure> {
    if text.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_str(text).map_err(|_| Failure::bad_request(format!("{name} must be a JSON object")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_json_in_utf8_is_a_body() {
        for (text, json) in [
            ("application/json", true),
            ("application/json; charset=utf-8", true),
            ("Application/JSON;charset=\"UTF-8\"", true),
            ("application/json; charset=utf-16", false),
            ("text/plain", false),
            ("application/graphql", false),
            ("multipart/form-data; boundary=x", false),
            ("", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_str(text).expect("a header"));
            assert_eq!(is_json(&headers), json, "{text}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }

    #[test]
    fn a_query_string_carries_every_parameter() {
        let query = "query=%7Ba%7D&operationName=A&variables=%7B%22x%22%3A1%7D&extensions=%7B%7D&other=1";
        let BatchRequest::Single(operation) = from_query(Some(query)).expect("reads") else { panic!("one") };
        assert_eq!((operation.query.as_str(), operation.operation_name.as_deref()), ("{a}", Some("A")));
        assert_eq!(operation.variables.len(), 1);
        for query in ["variables=1", "variables=%5B%5D", "extensions=x"] {
            assert_eq!(from_query(Some(query)).expect_err(query).status.as_u16(), 400);
        }
    }
}
