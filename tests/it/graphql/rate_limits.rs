//! What an operation costs of the rate limit, through every transport.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;

use crate::harness::graphql::code;
use crate::harness::{Answer, Graphql, TestServer};

const HOUR: Duration = Duration::from_secs(3600);
const COUNT: &str = "{ sessions { totalCount } }";

/// A mutation that creates so many sessions.
fn creates(count: usize) -> String {
    let create = |n: usize| {
        format!("a{n}: createSession(input: {{type: \"t\", taskIdentifier: \"a\"}}) {{ created }} ")
    };
    format!("mutation {{ {} }}", (0..count).map(create).collect::<String>())
}

/// A server whose keys have six requests at once, and one more every ten seconds.
async fn server() -> TestServer {
    let server = TestServer::start_with(|config| {
        config.http.rate_limit.key_burst = 6;
        config.http.rate_limit.key_per_10s = 1;
        config.http.rate_limit.token_per_minute = 3;
    })
    .await;
    server.create(json!({"externalId": "s"})).await;
    server
}

async fn post(graphql: &Graphql, query: &str) -> Answer {
    graphql.post(&json!({"query": query})).await
}

/// How many sessions a server has, by a key that has requests left.
async fn sessions(graphql: &Graphql) -> String {
    let result = post(graphql, COUNT).await.expect(200);
    result["data"]["sessions"]["totalCount"].as_str().expect("a number").to_owned()
}

#[tokio::test]
async fn every_root_field_is_a_request_and_more_than_the_burst_is_too_large_at_any_time() {
    let server = server().await;
    let graphql = server.graphql();
    let in_fragments =
        format!("mutation {{ ...f }} fragment f on Mutation {}", &creates(7)["mutation ".len()..]);
    let fields = "viewer { tokenKind } ".repeat(7);
    for query in [creates(7), creates(30), in_fragments, format!("{{ {fields} }}")] {
        let result = post(&graphql, &query).await.expect(400);
        assert_eq!(code(&result), "QUERY_TOO_LARGE", "{query}");
        let message = result["errors"][0]["message"].as_str().expect("text");
        assert!(message.contains("rate limit of 6"), "{message}");
    }
    // The harness has made one session, for one of six.
    assert_eq!(code(&post(&graphql, &creates(7)).await.expect(400)), "QUERY_TOO_LARGE");
    post(&graphql, &creates(3)).await.expect(200);
    let refused = post(&graphql, &creates(3)).await;
    assert_eq!(code(&refused.expect(429)), "RATE_LIMITED");
    assert_eq!(refused.header("x-ratelimit-remaining"), Some("2"), "all of it or nothing");
    assert_eq!(sessions(&graphql).await, "4");
    post(&graphql, "{ __typename viewer { tokenKind } }").await.expect(200);
    assert_eq!(code(&post(&graphql, "{ viewer { tokenKind } }").await.expect(429)), "RATE_LIMITED");
    assert_eq!(
        code(&post(&graphql, "{ __schema { queryType { name } } }").await.expect(429)),
        "RATE_LIMITED"
    );
    assert_eq!(code(&post(&graphql, &creates(7)).await.expect(400)), "QUERY_TOO_LARGE");
    post(&graphql, "{ __typename }").await.expect(200);
}

#[tokio::test]
async fn appends_are_free_beside_what_is_not() {
    let server = server().await;
    let token = server.token(&["read:sessions:s", "write:sessions:s", "admin:sessions:s"], HOUR).await;
    let graphql = server.graphql_as(Some(&token));
    let append = |n: usize| {
        format!(
            "p{n}: appendRecords(input: {{by: {{externalId: \"s\"}}, io: IN, records: [{{text: \"x\"}}]}}) {{ userErrors {{ code }} }} "
        )
    };
    let appends: String = (0..20).map(append).collect();
    let update = r#"updateSession(input: {by: {externalId: "s"}, tags: ["a"]}) { userErrors { code } }"#;
    for _ in 0..3 {
        post(&graphql, &format!("mutation {{ {appends} {update} }}")).await.expect(200);
    }
    assert_eq!(
        code(&post(&graphql, &format!("mutation {{ {appends} {update} }}")).await.expect(429)),
        "RATE_LIMITED"
    );
    for _ in 0..5 {
        let result = post(&graphql, &format!("mutation {{ {appends} }}")).await.expect(200);
        assert_eq!(result["data"]["p19"]["userErrors"], json!([]));
    }
}

#[tokio::test]
async fn whoever_comes_too_early_is_told_when_to_come_back_through_every_door() {
    let server = server().await;
    let graphql = server.graphql();
    post(&graphql, &creates(5)).await.expect(200);
    let body = json!({"query": COUNT});
    let accepting = |accept: &str| graphql.request(Method::POST).header("accept", accept).json(&body);
    for (door, request, status) in [
        ("rest", server.request(Method::GET, "/api/v1/sessions"), 429),
        ("post", accepting("application/graphql-response+json"), 429),
        ("json", accepting("application/json"), 429),
        ("get", graphql.request(Method::GET).query(&[("query", COUNT)]), 429),
        ("sse", accepting("text/event-stream"), 429),
        ("multipart", accepting("multipart/mixed;subscriptionSpec=1.0, application/json"), 429),
        ("batch", graphql.request(Method::POST).json(&json!([{"query": "{ __typename }"}, body])), 200),
    ] {
        let answer = graphql.send(request.header("origin", "https://a.example")).await;
        assert_eq!(answer.status.as_u16(), status, "{door}: {answer:?}");
        let number = |name: &str| {
            let text = answer.header(name).unwrap_or_else(|| panic!("no {name} over {door}: {answer:?}"));
            text.parse::<u64>().expect("a number")
        };
        assert!((1..=10_000).contains(&number("retry-after")), "{door}");
        assert_eq!((number("x-ratelimit-limit"), number("x-ratelimit-remaining")), (6, 0), "{door}");
        assert!(number("x-ratelimit-reset") > 0);
        assert!(answer.text.to_ascii_lowercase().contains("rate_limited"), "{door}: {}", answer.text);
        let exposed = answer.header("access-control-expose-headers").expect("exposed");
        assert!(exposed.contains("retry-after"), "{exposed}");
    }
    // Where there are no headers, the refusal itself says it.
    let mut socket = graphql.socket().await;
    socket.subscribe("1", COUNT, json!({})).await;
    let refused = &socket.refused("1").await[0]["extensions"];
    assert_eq!(refused["code"], "RATE_LIMITED");
    assert_eq!((&refused["limit"], &refused["remaining"]), (&json!(6), &json!(0)));
    assert!(refused["retryAfterMs"].as_u64().is_some_and(|wait| wait > 0), "{refused}");
    assert!(refused["reset"].is_i64(), "{refused}");
}
