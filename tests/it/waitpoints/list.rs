//! The list: filters, cursors, who sees what.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::{ended, session, wait};
use crate::harness::TestServer;

const LIST: &str = "/api/v1/waitpoints/tokens";

fn ids(page: &Value) -> Vec<String> {
    let rows = page["data"].as_array().expect("rows");
    rows.iter().map(|row| row["id"].as_str().expect("an id").to_owned()).collect()
}

async fn list(server: &TestServer, query: &str) -> Vec<String> {
    ids(&server.get(&format!("{LIST}?{query}")).await.expect(200))
}

#[tokio::test]
async fn the_inbox_is_what_waits_and_every_filter_narrows_it() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let other = server.create(json!({"externalId": "other"})).await;
    let other_run = other["runId"].as_str().expect("a run");
    let done = wait(&server, &run, json!({"io": "out", "tags": ["a", "b"]})).await;
    server.append("s", "out", "x").await;
    assert_eq!(ended(&server, &done).await["status"], "COMPLETED");
    server.clock.advance(Duration::from_secs(60));
    let late = wait(&server, &run, json!({"timeout": "1s", "tags": ["a"]})).await;
    server.clock.advance(Duration::from_secs(60));
    assert_eq!(ended(&server, &late).await["status"], "TIMED_OUT");
    let open = wait(&server, &run, json!({"tags": ["c"], "idempotencyKey": "k"})).await;
    server.clock.advance(Duration::from_secs(60));
    let theirs = wait(&server, other_run, json!({"session": "other"})).await;
    let all = [&theirs, &open, &late, &done];
    let other_id = other["id"].as_str().expect("an id");
    for (query, found) in [
        (String::new(), &all[..]),
        ("filter[status]=WAITING".into(), &[&theirs, &open]),
        ("filter[status]=COMPLETED,TIMED_OUT".into(), &[&late, &done]),
        ("filter[status]=TIMED_OUT".into(), &[&late]),
        ("filter[session]=s".into(), &[&open, &late, &done]),
        (format!("filter[session]={other_id}"), &[&theirs]),
        ("filter[session]=nothing".into(), &[]),
        (format!("filter[run]={other_run}"), &[&theirs]),
        ("filter[run]=nothing".into(), &[]),
        ("filter[tags]=a".into(), &[&late, &done]),
        ("filter[tags]=b,c".into(), &[&open, &done]),
        ("filter[tags]=%00".into(), &[]),
        ("filter[idempotencyKey]=k".into(), &[&open]),
        ("filter[createdAt][period]=90s".into(), &[&theirs, &open]),
        ("filter[createdAt][to]=2026-01-01T00:01:00Z".into(), &[&late, &done]),
        ("filter[status]=WAITING&filter[session]=s".into(), &[&open]),
    ] {
        let found: Vec<String> = found.iter().map(|id| (*id).clone()).collect();
        assert_eq!(list(&server, &query).await, found, "{query}");
    }
    for query in ["filter[status]=waiting", "page[size]=0", "page[after]=x", "filter[session]=%20"] {
        let refused = server.get(&format!("{LIST}?{query}")).await.expect(400);
        assert_eq!(refused["error"], "Query Error", "{query}");
    }
}

#[tokio::test]
async fn pages_go_both_ways_without_a_gap() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let mut all = Vec::new();
    for _ in 0..7 {
        all.insert(0, wait(&server, &run, json!({})).await);
    }
    // A clock that stands still leaves their order to their ids.
    all.sort_by(|one, other| other.cmp(one));
    let (mut seen, mut pages, mut query) = (Vec::new(), Vec::new(), "page[size]=3".to_owned());
    loop {
        let page = server.get(&format!("{LIST}?{query}")).await.expect(200);
        seen.extend(ids(&page));
        pages.push(ids(&page));
        let Some(next) = page["pagination"]["next"].as_str() else {
            assert_eq!(seen, all);
            query = format!(
                "page[size]=3&page[before]={}",
                page["pagination"]["previous"].as_str().expect("a cursor")
            );
            break;
        };
        query = format!("page[size]=3&page[after]={next}");
    }
    assert_eq!(list(&server, &query).await, pages[1]);
}

#[tokio::test]
async fn who_may_read_one_session_sees_its_waits_and_no_others() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let mine = wait(&server, &run, json!({})).await;
    server.create(json!({"externalId": "other"})).await;
    wait(&server, &run, json!({"session": "other"})).await;
    let token = server.token(&["read:sessions:s"], Duration::from_secs(60)).await;
    let as_reader = async |query: &str| {
        server.send(server.request_as(&token, Method::GET, &format!("{LIST}?{query}"))).await
    };
    assert_eq!(ids(&as_reader("filter[session]=s").await.expect(200)), [mine]);
    let refused = as_reader("filter[session]=other").await.expect(403);
    assert_eq!(as_reader("filter[session]=nothing").await.expect(403), refused);
    assert_eq!(as_reader("").await.expect(403), refused);
    let (_, foreign) = server.environment("other").await;
    let page = server.send(server.request_as(&foreign, Method::GET, LIST)).await.expect(200);
    assert_eq!(ids(&page), Vec::<String>::new());
}
