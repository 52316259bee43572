//! A server on port 0 with a temporary data folder and a clock that only the test moves.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderValue};
use reqwest::{Method, RequestBuilder, StatusCode};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sessiond::auth::Auth;
use sessiond::config::{Config, Overrides};
use sessiond::domain::tenant::{Environment, EnvironmentKind};
use sessiond::domain::{Clock, MetadataStore, Scopes, TestClock, Timestamp};
use sessiond::server::{Control, Server};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::openapi;
use super::sse::SseReader;

/// The root key of every test server's first environment.
pub const KEY: &str = "tr_dev_test_key_of_the_first_environment";
/// When every test begins: 2026-01-01T00:00:00Z.
pub const START: Timestamp = Timestamp::from_millis(1_767_225_600_000);

/// A running server; dropping it stops it.
pub struct TestServer {
    /// Base URL.
    pub url: String,
    /// The server's clock.
    pub clock: TestClock,
    /// Client without any default header.
    pub http: reqwest::Client,
    data: Arc<TempDir>,
    stop: Option<oneshot::Sender<()>>,
    running: Option<JoinHandle<()>>,
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub text: String,
}

impl Answer {
    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks the status and gives the body.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        if self.text.is_empty() { Value::Null } else { self.json() }
    }

    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// A server that is bound and does not run yet.
pub async fn start(data: &Path, clock: Arc<dyn Clock>, change: impl FnOnce(&mut Config)) -> Server {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    Server::start(config(data, change), clock).await.expect("the server starts")
}

impl TestServer {
    /// A fresh server with default settings, but for the rate limits, which are off.
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// A fresh server with changed settings.
    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let data = Arc::new(tempfile::tempdir().expect("a temporary folder"));
        Self::on(data, TestClock::at(START), change).await
    }

    async fn on(data: Arc<TempDir>, clock: TestClock, change: impl FnOnce(&mut Config)) -> Self {
        let server = start(data.path(), Arc::new(clock.clone()), change).await;
        let url = server.base_url().expect("an address");
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(async move {
            let stop = async {
                let _ = stopped.await;
            };
            server.run(stop, std::future::pending()).await.expect("the server stops");
        });
        let http = reqwest::Client::new();
        Self { url, clock, http, data, stop: Some(stop), running: Some(running) }
    }

    /// Stops the server and waits until it has.
    pub async fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(running) = self.running.take() {
            running.await.expect("the server stops cleanly");
        }
    }

    /// Stops it and starts another one on the same data folder and clock.
    pub async fn restart(mut self) -> Self {
        self.stop().await;
        Self::on(self.data.clone(), self.clock.clone(), |_| {}).await
    }

    /// The data folder.
    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// The control plane as the command line would open it beside the running server.
    pub async fn control(&self) -> Control {
        let config = config(self.data(), |_| {});
        Control::open(&config, Arc::new(self.clock.clone())).await.expect("the control plane opens")
    }

    /// A request with the root key.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.request_as(KEY, method, path)
    }

    /// A request with some bearer.
    pub fn request_as(&self, bearer: &str, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).bearer_auth(bearer)
    }

    /// Sends a request, reads the whole answer and checks it against the server's own API document.
    pub async fn send(&self, request: RequestBuilder) -> Answer {
        let request = request.build().expect("a valid request");
        let (method, path) = (request.method().clone(), request.url().path().to_owned());
        let response = self.http.execute(request).await.expect("an answer");
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.expect("a whole body");
        let answer = Answer { status, headers, text };
        openapi::check(&self.http, &self.url, &method, &path, &answer).await;
        answer
    }

    /// GET with the root key.
    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    /// A JSON request with the root key.
    pub async fn json(&self, method: Method, path: &str, body: &Value) -> Answer {
        self.send(self.request(method, path).json(body)).await
    }

    /// POST of JSON with the root key.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.json(Method::POST, path, body).await
    }

    /// Creates a session; `extra` overrides fields of the body.
    pub async fn create(&self, extra: Value) -> Value {
        let mut body = json!({"type": "chat", "taskIdentifier": "agent"});
        let (Value::Object(fields), Some(all)) = (extra, body.as_object_mut()) else {
            panic!("not an object")
        };
        all.extend(fields);
        let answer = self.post("/api/v1/sessions", &body).await;
        assert!(answer.status.is_success(), "{answer:?}");
        answer.json()
    }

    /// Appends with the root key and gives the sequence number.
    pub async fn append(&self, session: &str, io: &str, body: &str) -> u64 {
        let path = format!("/realtime/v1/sessions/{session}/{io}/append");
        let answer = self.send(self.request(Method::POST, &path).body(body.to_owned())).await;
        answer.expect(200)["seq"].as_u64().expect("a sequence number")
    }

    /// Follows a channel with the root key and these headers.
    pub async fn follow(&self, session: &str, io: &str, headers: &[(&'static str, &str)]) -> SseReader {
        self.follow_as(KEY, session, io, headers).await
    }

    /// Follows a channel with some bearer.
    pub async fn follow_as(
        &self,
        bearer: &str,
        session: &str,
        io: &str,
        headers: &[(&'static str, &str)],
    ) -> SseReader {
        let path = format!("/realtime/v1/sessions/{session}/{io}");
        let mut request = self.request_as(bearer, Method::GET, &path).header("Accept", "text/event-stream");
        for (name, value) in headers {
            request = request.header(*name, HeaderValue::from_str(value).expect("a header value"));
        }
        SseReader::new(request.send().await.expect("an answer"))
    }

    /// A public token of the first environment.
    pub async fn token(&self, scopes: &[&str], ttl: Duration) -> String {
        self.token_of(KEY, scopes, ttl).await
    }

    /// A public token of the environment of a root key.
    pub async fn token_of(&self, key: &str, scopes: &[&str], ttl: Duration) -> String {
        let control = self.control().await;
        let timers = sessiond::domain::timer::Timers::new(control.clock.clone());
        let auth = Auth::new(control.store.clone(), control.vault.clone(), control.clock.clone(), timers);
        let caller = auth.authenticate(key).await.expect("the root key");
        let scopes = Scopes::new(scopes.iter().map(|scope| (*scope).to_owned()).collect());
        auth.mint(&caller, scopes, self.clock.now().plus(ttl)).await.expect("a token")
    }

    /// Another environment and its root key.
    pub async fn environment(&self, slug: &str) -> (Environment, String) {
        let new = sessiond::auth::keys::NewEnvironment {
            organization: "default".to_owned(),
            project: "default".to_owned(),
            slug: slug.to_owned(),
            kind: EnvironmentKind::Staging,
        };
        let control = self.control().await;
        let (environment, key) = control.keys().create_environment(new, None).await.expect("an environment");
        (environment, key.secret.expose_secret().to_owned())
    }

    /// The environment of [`KEY`]. By its slug: a clock that stands still makes all of them equally old.
    pub async fn first_environment(&self) -> Environment {
        let environments = self.control().await.store.environments().await.expect("environments");
        environments.into_iter().find(|one| one.slug == "dev").expect("made at the first start")
    }
}

/// The settings of every test server.
pub fn config(data: &Path, change: impl FnOnce(&mut Config)) -> Config {
    let overrides = Overrides {
        data: Some(data.to_path_buf()),
        listen: Some("127.0.0.1:0".to_owned()),
        ..Overrides::default()
    };
    let mut config = Config::load(&overrides).expect("valid settings");
    config.secret_key = Some(KEY.to_owned().into());
    config.http.rate_limit.key_per_10s = 0;
    config.http.rate_limit.key_burst = 0;
    config.http.rate_limit.token_per_minute = 0;
    config.http.rate_limit.anonymous = 0;
    change(&mut config);
    config
}
