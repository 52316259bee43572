//! What subscriptions over server-sent events yield to whom no client library is like: slow readers, and channels of
//! commands.

use reqwest::Response;
use serde_json::{Value, json};

use crate::harness::TestServer;
use crate::harness::server::KEY;

/// Reads the results of a subscription over server-sent events.
struct Results {
    answer: Response,
    text: String,
}

impl Results {
    async fn of(server: &TestServer, arguments: &str, fields: &str) -> Self {
        let query = format!(
            "subscription {{ channelRecords(by: {{externalId: \"s\"}}, io: OUT {arguments}) {{ {fields} }} }}"
        );
        let request = server.http.post(format!("{}/graphql", server.url)).bearer_auth(KEY);
        let request = request.header("accept", "text/event-stream").json(&json!({"query": query}));
        Self { answer: request.send().await.expect("an answer"), text: String::new() }
    }

    /// The next event of the channel.
    async fn next(&mut self) -> Value {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let data = event.lines().find_map(|line| line.strip_prefix("data: ")).map(str::to_owned);
                self.text = rest.to_owned();
                if let Some(data) = data {
                    let mut result: Value = serde_json::from_str(&data).expect("JSON");
                    return result["data"]["channelRecords"].take();
                }
                continue;
            }
            let chunk = self.answer.chunk().await.expect("a body").expect("more");
            self.text.push_str(std::str::from_utf8(&chunk).expect("text"));
        }
    }
}

async fn trim(server: &TestServer, before: u64) {
    let query = format!(
        "mutation {{ trimChannel(input: {{by: {{externalId: \"s\"}}, io: OUT, before: \"{before}\"}}) {{ userErrors {{ message }} }} }}"
    );
    let request =
        server.http.post(format!("{}/graphql", server.url)).bearer_auth(KEY).json(&json!({"query": query}));
    let answer: Value = request.send().await.expect("an answer").json().await.expect("JSON");
    assert_eq!(answer["data"]["trimChannel"]["userErrors"], json!([]), "{answer}");
}

#[tokio::test]
async fn a_channel_that_holds_nothing_but_commands_is_caught_up_at_once() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    server.append("s", "out", "gone").await;
    trim(&server, 1).await;
    let mut results = Results::of(&server, "", "records { seqNum } caughtUp endCursor tail { seqNum }").await;
    let first = results.next().await;
    assert_eq!(first, json!({"records": [], "caughtUp": true, "endCursor": "1", "tail": {"seqNum": "2"}}));
    server.append("s", "out", "live").await;
    assert_eq!(results.next().await["records"], json!([{"seqNum": "2"}]));
}

#[tokio::test]
async fn a_reader_who_pauses_gets_every_record_in_order() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let mut results = Results::of(&server, "batch: 7", "records { seqNum } caughtUp").await;
    assert_eq!(results.next().await["caughtUp"], true);
    // Far more than the socket and the live window hold, while nobody reads.
    let body = "x".repeat(50_000);
    for _ in 0..300 {
        server.append("s", "out", &body).await;
    }
    let mut seen = Vec::new();
    while seen.len() < 300 {
        let event = results.next().await;
        let numbers = event["records"].as_array().expect("records").iter();
        seen.extend(
            numbers
                .map(|record| record["seqNum"].as_str().expect("digits").parse::<u64>().expect("a number")),
        );
    }
    assert_eq!(seen, (0..300).collect::<Vec<_>>());
}
