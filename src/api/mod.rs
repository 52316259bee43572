//! The front ends: each handler translates in, calls one use case, translates out.
//!
//! Knows [`Sessions`] and [`Auth`]; never a store.

mod answers;
pub mod blobs;
pub mod cors;
pub mod error;
pub mod extract;
pub mod graphql;
pub mod openapi;
pub mod origin;
mod own_task;
pub mod period;
pub mod playground;
pub mod rate_limit;
pub mod realtime;
mod received;
pub mod rest;
pub mod s2;
pub mod stranger;
pub mod trace;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Json, Router, middleware};
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{StatusCode, Uri};
use ipnet::IpNet;
use serde_json::json;

use crate::auth::Auth;
use crate::config::{DirectConfig, GraphqlConfig};
use crate::domain::send_budget::Reserved;
use crate::domain::{Clock, Condition, Error, Sessions};
use crate::shutdown::Shutdown;
use crate::telemetry::{Chain, Metrics};
use answers::Answers;
use error::Failure;
use rate_limit::{RateLimiter, RateLimits};
use stranger::Strangers;

/// What of the front ends can be set.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// Origins that may read answers; `None` means any.
    pub allowed_origins: Option<Arc<[String]>>,
    /// Request limits.
    pub rate_limits: RateLimits,
    /// Where proxies are whose word on the client's address is taken.
    pub trusted_proxies: Vec<IpNet>,
    /// Longest wait for the next piece of a request body.
    pub body_chunk_timeout: Duration,
    /// Longest time for a whole request body.
    pub body_timeout: Duration,
    /// The GraphQL door.
    pub graphql: GraphqlConfig,
    /// Direct writes.
    pub direct: DirectConfig,
    /// Validity of signed URLs.
    pub url_ttl: Duration,
    /// Where callers reach this server; `None` reads it off each request.
    pub public_url: Option<String>,
    /// The listener itself speaks TLS.
    pub tls: bool,
}

/// What the front ends stand on.
#[derive(Clone)]
pub struct ApiState {
    /// The use cases.
    pub sessions: Arc<Sessions>,
    /// Bearer to caller.
    pub auth: Arc<Auth>,
    /// Wall clock.
    pub clock: Arc<dyn Clock>,
    /// Where requests are counted.
    pub metrics: Arc<Metrics>,
    /// Settings.
    pub config: ApiConfig,
    /// Says that the server will stop, from when on it is not ready, and then drains: followers end. Connections that have
    /// been taken over run in it.
    pub shutdown: Shutdown,
}

impl fmt::Debug for ApiState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiState").field("config", &self.config).finish_non_exhaustive()
    }
}

/// What handlers share.
#[derive(Clone, Debug)]
pub struct App(Arc<Shared>);

impl std::ops::Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// The state with what the front ends add to it.
#[derive(Debug)]
pub struct Shared {
    state: ApiState,
    rate_limiter: RateLimiter,
    answers: Answers,
    strangers: Strangers,
    graphql: Arc<graphql::Engine>,
    document: bytes::Bytes,
}

impl std::ops::Deref for Shared {
    type Target = ApiState;

    fn deref(&self) -> &ApiState {
        &self.state
    }
}

/// Every route template: the only values that the `route` label of a metric may have.
const ROUTES: [&str; 32] = [
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/playground",
    "/playground/",
    "/playground/{*path}",
    graphql::PATH,
    "/api/v1/sessions",
    "/api/v1/sessions/{session}",
    "/api/v1/sessions/{session}/close",
    "/api/v1/sessions/{session}/end-and-continue",
    "/api/v1/runs/{run}/session-streams/wait",
    "/engine/v1/runs/{run}/waitpoints/tokens/{waitpoint}/wait",
    "/api/v1/waitpoints/tokens",
    "/api/v1/waitpoints/tokens/{waitpoint}",
    "/api/v1/waitpoints/tokens/{waitpoint}/complete",
    "/api/v1/sessions/{session}/snapshot-url",
    "/api/v1/sessions/{session}/transcript",
    "/blobs/v1/{token}",
    "/api/v1/auth/jwt/claims",
    "/api/v1/auth/jwt",
    "/api/v1/auth/public-tokens",
    "/realtime/v1/sessions/{session}/{io}",
    "/realtime/v1/sessions/{session}/{io}/append",
    "/realtime/v1/sessions/{session}/{io}/records",
    "/realtime/v1/sessions/{session}/channels/{channel}/{io}",
    "/realtime/v1/sessions/{session}/channels/{channel}/{io}/append",
    "/realtime/v1/sessions/{session}/channels/{channel}/{io}/records",
    "/v1/streams/{stream}/records",
    "/v1/streams/{stream}/records/tail",
];

impl Shared {
    /// The label of a matched route.
    fn route_label(&self, matched: Option<&str>) -> Option<&'static str> {
        ROUTES.into_iter().find(|route| Some(*route) == matched)
    }
}

/// Every route of the public HTTP interface.
pub fn router(state: ApiState) -> Router {
    router_with(state, Router::new())
}

/// As [`router`], with routes of the caller's own behind the same layers.
pub fn router_with(state: ApiState, more: Router<App>) -> Router {
    let (routes, document) = openapi::routes().split_for_parts();
    let document = openapi::finished(document);
    let rate_limiter = RateLimiter::new(state.config.rate_limits);
    let answers = Answers::new();
    let graphql = Arc::new(graphql::Engine::new(state.config.graphql.clone(), answers.clone()));
    let strangers = Strangers::new(state.config.trusted_proxies.clone());
    let app = App(Arc::new(Shared { state, rate_limiter, answers, strangers, graphql, document }));
    routes
        .merge(graphql::routes())
        .merge(playground::routes())
        .route("/", get(index))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(document_json))
        .merge(more)
        .fallback(unrouted)
        .method_not_allowed_fallback(unallowed)
        .layer(middleware::from_fn_with_state(app.clone(), trace::observe))
        .with_state(app)
}

/// What the SDK calls beside sessions, by the version in the path and what follows: the routes of its run engine.
const RUN_ENGINE: [&str; 16] = [
    "batches",
    "bulk-actions",
    "concurrency-limits",
    "deployments",
    "idempotencyKeys",
    "packets",
    "projects",
    "prompts",
    "query",
    "queues",
    "reports",
    "runs",
    "schedules",
    "streams",
    "tasks",
    "webhooks",
];

async fn unrouted(uri: Uri) -> Failure {
    let mut segments = uri.path().trim_start_matches('/').split('/');
    let (kind, version, what) = (segments.next(), segments.next(), segments.next());
    let is_versioned = version
        .and_then(|version| version.strip_prefix('v'))
        .is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
    match (kind, what) {
        (Some("engine"), _) if is_versioned => Failure::no_run_engine(),
        (Some("api" | "realtime"), Some(what)) if is_versioned && RUN_ENGINE.contains(&what) => {
            Failure::no_run_engine()
        }
        (Some("v1"), _) => s2::unrouted(version.unwrap_or_default()),
        _ => Failure::no_route(),
    }
}

async fn unallowed(uri: Uri) -> Failure {
    if uri.path().starts_with("/v1/") { s2::unallowed() } else { Failure::method_not_allowed() }
}

async fn index() -> Response {
    Json(json!({
        "name": env!("CARGO_PKG_NAME"),
        "version": env!("CARGO_PKG_VERSION"),
        "links": {
            "openapi": "/openapi.json", "health": "/healthz", "ready": "/readyz", "metrics": "/metrics",
            "sessions": "/api/v1/sessions", "graphql": graphql::PATH, "playground": "/playground/"
        }
    }))
    .into_response()
}

/// What keeps the server from its work, and what an operator can do about it. For anyone to read: no address, no path.
struct Trouble {
    cause: String,
    cure: &'static str,
}

impl Trouble {
    fn new(cause: impl Into<String>, cure: &'static str) -> Self {
        Self { cause: cause.into(), cure }
    }

    /// What only a restart cures.
    fn broken() -> Self {
        Self::new(
            "a write to the log failed, and it takes no more appends",
            "restart the server: it reads back what the disk has; if that was full, make room first",
        )
    }
}

impl IntoResponse for Trouble {
    fn into_response(self) -> Response {
        let body = json!({"status": "unavailable", "cause": self.cause, "cure": self.cure});
        (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
    }
}

/// Whether it lives: no only to what a restart cures.
async fn healthz(State(app): State<App>) -> Response {
    match app.sessions.condition() {
        Condition::Broken => Trouble::broken().into_response(),
        Condition::Sound | Condition::Full => Json(json!({"status": "ok"})).into_response(),
    }
}

/// Whether it can take appends. What else is amiss is told, and is no reason to send nobody here.
async fn readyz(State(app): State<App>) -> Response {
    if app.shutdown.leaving().is_cancelled() {
        return Trouble::new("the server is shutting down", "none is needed: ask another one")
            .into_response();
    }
    let ready = app.sessions.ready().await;
    let trouble = match (app.sessions.condition(), ready) {
        (Condition::Sound, Ok(degraded)) if degraded.is_empty() => {
            return Json(json!({"status": "ok"})).into_response();
        }
        (Condition::Sound, Ok(degraded)) => {
            return Json(json!({"status": "ok", "degraded": degraded})).into_response();
        }
        (Condition::Broken, _) => Trouble::broken(),
        (Condition::Full, _) => Trouble::new(
            "the disk of the log is full",
            "make room on it: appends are taken again at once, without a restart",
        ),
        (Condition::Sound, Err(error)) => {
            tracing::warn!(error = %Chain(&error), "not ready");
            let cure = match &error {
                Error::Unavailable { what: "metadata", .. } => {
                    "see that the database that metadata.url names can be reached; no restart is needed"
                }
                Error::Unavailable { what: "log", .. } => {
                    "see that what log.url names can be reached; no restart is needed"
                }
                _ => "see the server's log",
            };
            Trouble::new(error.to_string(), cure)
        }
    };
    trouble.into_response()
}

async fn metrics(State(app): State<App>) -> Response {
    const FORMAT: HeaderValue =
        HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    ([(CONTENT_TYPE, FORMAT)], app.metrics.render()).into_response()
}

async fn document_json(State(app): State<App>) -> Response {
    // One copy for all.
    let headers = [(CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    (headers, Extension(Reserved), app.document.clone()).into_response()
}
