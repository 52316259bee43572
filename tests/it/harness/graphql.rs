//! Asks the GraphQL door of any server, as anybody.

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use super::server::{Answer, KEY};
use super::websocket::Socket;
use super::{Process, TestServer};

/// A client with some bearer, or none.
#[derive(Clone, Debug)]
pub struct Graphql {
    /// Address of the door.
    pub url: String,
    bearer: Option<String>,
    http: reqwest::Client,
}

impl TestServer {
    /// The door, with the root key.
    pub fn graphql(&self) -> Graphql {
        self.graphql_as(Some(KEY))
    }

    /// The door, with some bearer or none.
    pub fn graphql_as(&self, bearer: Option<&str>) -> Graphql {
        let url = format!("{}/graphql", self.url);
        Graphql { url, bearer: bearer.map(str::to_owned), http: self.http.clone() }
    }
}

impl Process {
    /// The door, with the root key.
    pub fn graphql(&self) -> Graphql {
        let url = format!("{}/graphql", self.url);
        Graphql { url, bearer: Some(KEY.to_owned()), http: reqwest::Client::new() }
    }
}

impl Graphql {
    /// A request without a body.
    pub fn request(&self, method: Method) -> RequestBuilder {
        let request = self.http.request(method, &self.url);
        match &self.bearer {
            Some(bearer) => request.bearer_auth(bearer),
            None => request,
        }
    }

    /// Sends a request and reads the whole answer.
    pub async fn send(&self, request: RequestBuilder) -> Answer {
        let response = request.send().await.expect("an answer");
        let (status, headers) = (response.status(), response.headers().clone());
        Answer { status, headers, text: response.text().await.expect("a whole body") }
    }

    /// POST of any JSON, answered as `application/graphql-response+json`.
    pub async fn post(&self, body: &Value) -> Answer {
        let request = self.request(Method::POST).header("accept", "application/graphql-response+json");
        self.send(request.json(body)).await
    }

    /// GET with these parameters, answered likewise.
    pub async fn get(&self, parameters: &[(&str, &str)]) -> Answer {
        let request = self.request(Method::GET).header("accept", "application/graphql-response+json");
        self.send(request.query(parameters)).await
    }

    /// The execution result of an operation.
    pub async fn result(&self, query: &str, variables: Value) -> Value {
        self.post(&json!({"query": query, "variables": variables})).await.json()
    }

    /// The data of an operation that has no errors.
    #[track_caller]
    pub fn data(&self, query: &str, variables: Value) -> impl Future<Output = Value> {
        let caller = std::panic::Location::caller();
        let result = self.result(query, variables);
        async move {
            let mut result = result.await;
            assert!(result.get("errors").is_none(), "{caller}: {result}");
            result["data"].take()
        }
    }

    /// The payload of the only mutation of an operation.
    #[track_caller]
    pub fn payload(&self, query: &str, variables: Value) -> impl Future<Output = Value> {
        let data = self.data(query, variables);
        async move {
            let Value::Object(data) = data.await else { panic!("no object") };
            data.into_iter().next().expect("a field").1
        }
    }

    /// A WebSocket that has been accepted with the bearer.
    pub async fn socket(&self) -> Socket {
        let mut socket = Socket::open(&self.url, &[]).await.expect("a socket");
        socket.init(self.bearer.as_deref()).await;
        socket
    }
}

/// The code of the first error of a result, or of a member of `errors`.
#[track_caller]
pub fn code(value: &Value) -> &str {
    let error = value["errors"].get(0).unwrap_or(value);
    error["extensions"]["code"].as_str().unwrap_or_else(|| panic!("no code: {value}"))
}

/// Codes and paths of a payload's user errors.
pub fn user_errors(payload: &Value) -> Vec<(String, String)> {
    let errors = payload["userErrors"].as_array().unwrap_or_else(|| panic!("no userErrors: {payload}"));
    let word = |value: &Value| value.as_str().expect("text").to_owned();
    let path =
        |value: &Value| value.as_array().expect("a path").iter().map(word).collect::<Vec<_>>().join(".");
    errors.iter().map(|error| (word(&error["code"]), path(&error["path"]))).collect()
}
