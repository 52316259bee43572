//! What ends a long-poll.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use sessiond::domain::MetadataStore;

use super::{path, session, wait};
use crate::harness::TestServer;
use crate::harness::server::KEY;

/// A long-poll that has begun.
async fn poll(
    server: &TestServer,
    bearer: &str,
    id: &str,
    wait: &str,
) -> tokio::task::JoinHandle<(u16, Value)> {
    let request = server.request_as(bearer, Method::GET, &format!("{}{wait}", path(id)));
    let polling = tokio::spawn(async move {
        let answer = request.send().await.expect("an answer");
        (answer.status().as_u16(), answer.json().await.expect("JSON"))
    });
    // Whoever connects after it is served after it has begun, or the test proves less than it could.
    server.get("/api/v1/waitpoints/tokens").await.expect(200);
    assert!(!polling.is_finished(), "it was answered at once");
    polling
}

#[tokio::test]
async fn its_time_ends_it() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let id = wait(&server, &run, json!({})).await;
    let polling = poll(&server, KEY, &id, "?wait=20").await;
    let mut request = server.request_as(KEY, Method::GET, &path(&id));
    request = request.header("prefer", "wait=20");
    let preferring = tokio::spawn(async move {
        let answer = request.send().await.expect("an answer");
        (answer.status().as_u16(), answer.json::<Value>().await.expect("JSON"))
    });
    for _ in 0..60 {
        server.clock.advance(Duration::from_secs(1));
        tokio::task::yield_now().await;
        if polling.is_finished() && preferring.is_finished() {
            break;
        }
        server.get("/healthz").await;
    }
    // The clock may have run ahead of a request; then it is moved once more.
    server.clock.advance(Duration::from_secs(30));
    let (status, body) = polling.await.expect("polled");
    assert_eq!((status, &body["status"]), (200, &json!("WAITING")));
    let (status, body) = preferring.await.expect("polled");
    assert_eq!((status, &body["status"]), (200, &json!("WAITING")));
    let refused = server.get(&format!("{}?wait=301", path(&id))).await.expect(400);
    assert_eq!(refused["details"][0]["field"], "wait", "{refused}");
}

#[tokio::test]
async fn the_end_of_its_token_ends_it() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let id = wait(&server, &run, json!({})).await;
    let token = server.token(&["read:sessions:s"], Duration::from_secs(60)).await;
    let polling = poll(&server, &token, &id, "?wait=300").await;
    server.clock.advance(Duration::from_secs(61));
    let (status, body) = polling.await.expect("polled");
    assert_eq!((status, &body["error"]), (401, &json!("Public Access Token is expired")));
}

#[tokio::test]
async fn the_revocation_of_its_key_ends_it() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let id = wait(&server, &run, json!({})).await;
    let (control, environment) = (server.control().await, server.first_environment().await);
    let made = control.keys().create(&environment, "k", None, None).await.expect("a key");
    let secret = secrecy::ExposeSecret::expose_secret(&made.secret).to_owned();
    let polling = poll(&server, &secret, &id, "?wait=300").await;
    let ended = control
        .store
        .end_key(&environment.id, &made.key.id, sessiond::domain::Clock::now(&server.clock))
        .await;
    assert!(ended.expect("ends").is_some());
    let (status, body) = polling.await.expect("polled");
    assert_eq!((status, &body["error"]), (401, &json!("the key has been revoked")));
}

#[tokio::test]
async fn a_stop_of_the_server_ends_it() {
    let mut server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let id = wait(&server, &run, json!({})).await;
    let polling = poll(&server, KEY, &id, "?wait=300").await;
    server.stop().await;
    let (status, body) = polling.await.expect("polled");
    assert_eq!((status, &body["status"]), (200, &json!("WAITING")), "{body}");
}
