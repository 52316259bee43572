//! How many queries an answer takes: lists must not ask for their members one by one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tracing::span::{Attributes, Id};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use crate::harness::TestServer;
use crate::harness::server::KEY;

/// Counts the queries of the metadata store and of the index. The server runs on the test's own thread, so these are
/// the queries of this test only.
#[derive(Clone, Default)]
struct Queries(Arc<AtomicUsize>);

impl<S: tracing::Subscriber> Layer<S> for Queries {
    fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        let span = attributes.metadata();
        if span.name() == "query" && span.target().starts_with("sessiond_store") {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

async fn ask(server: &TestServer, query: &str, variables: Value) -> Value {
    let request = server.http.post(format!("{}/graphql", server.url)).bearer_auth(KEY);
    let answer =
        request.json(&json!({"query": query, "variables": variables})).send().await.expect("an answer");
    let answer: Value = answer.json().await.expect("JSON");
    assert!(answer.get("errors").is_none(), "{answer}");
    answer
}

/// A server that has 60 sessions and none of them in memory, and their ids, newest first.
async fn filled() -> (TestServer, Vec<Value>) {
    let server = TestServer::start().await;
    for n in 0..60 {
        server.create(json!({"externalId": format!("s{n}"), "tags": ["t"]})).await;
    }
    let all = ask(&server, "{ sessions(first: 50) { nodes { id } } }", json!({})).await;
    let ids = all["data"]["sessions"]["nodes"].as_array().expect("a list");
    let ids = ids.iter().map(|session| session["id"].clone()).collect();
    (server.restart().await, ids)
}

/// How many queries an operation takes.
async fn queries(server: &TestServer, query: &str, variables: Value) -> usize {
    let queries = Queries::default();
    let counting = tracing::subscriber::set_default(tracing_subscriber::registry().with(queries.clone()));
    ask(server, query, variables).await;
    drop(counting);
    queries.0.load(Ordering::SeqCst)
}

#[tokio::test]
async fn a_page_of_sessions_with_their_channels_is_two_queries_however_long_it_is() {
    const CHANNELS: &str =
        "query($n: Int) { sessions(first: $n) { nodes { in { tail { seqNum } } out { sealed earliest
        records(first: 1) { nodes { id } } } channel(name: \"a\", io: OUT) { tail { seqNum } } } } }";
    let (server, _) = filled().await;
    // The key, which is not in memory either.
    ask(&server, "{ viewer { environmentId } }", json!({})).await;
    assert_eq!(queries(&server, "{ sessions(first: 50) { nodes { id tags status } } }", json!({})).await, 1);
    assert_eq!(queries(&server, "{ sessions(first: 50) { totalCount nodes { id } } }", json!({})).await, 2);
    assert_eq!(queries(&server, CHANNELS, json!({"n": 10})).await, 2, "the list, and all rows at once");
    assert_eq!(queries(&server, CHANNELS, json!({"n": 60})).await, 2, "the list, and the rows not in memory");
}

#[tokio::test]
async fn many_nodes_are_one_query() {
    let (server, ids) = filled().await;
    ask(&server, "{ viewer { environmentId } }", json!({})).await;
    let nodes = "query($ids: [ID!]!) { nodes(ids: $ids) { id ... on Session { externalId } } }";
    assert_eq!(queries(&server, nodes, json!({"ids": ids})).await, 1);
    let one_by_one: Vec<_> = (0..20).map(|n| format!("n{n}: node(id: {}) {{ id }}", ids[n])).collect();
    let server = server.restart().await;
    ask(&server, "{ viewer { environmentId } }", json!({})).await;
    assert_eq!(queries(&server, &format!("{{ {} }}", one_by_one.join(" ")), json!({})).await, 1);
}
