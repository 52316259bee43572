//! The plan of the original proposal, step by step, against the real process and the real engines.

use std::time::Duration;

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::process::Command;

use super::world::World;
use crate::harness::Process;
use crate::harness::clickhouse;
use crate::harness::server::KEY;

const MASTER_KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
/// How soon the plan wants a session to be in ClickHouse.
const SOON: Duration = Duration::from_secs(2);
const TOKEN: &str = "x-sessiond-consistency";

struct Client<'a> {
    process: &'a Process,
}

impl Client<'_> {
    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        reqwest::Client::new().request(method, format!("{}{path}", self.process.url)).bearer_auth(KEY)
    }

    /// The answer, with the consistency token of a write.
    async fn send(&self, request: RequestBuilder) -> (u16, Value, String) {
        let response = request.send().await.expect("an answer");
        let status = response.status().as_u16();
        let token = response.headers().get(TOKEN).map(|token| token.to_str().expect("text").to_owned());
        (status, response.json().await.unwrap_or(Value::Null), token.unwrap_or_default())
    }

    async fn list(&self, query: &str, token: &str) -> Value {
        let request = self.request(Method::GET, &format!("/api/v1/sessions?{query}")).header(TOKEN, token);
        let (status, page, _) = self.send(request).await;
        assert_eq!(status, 200, "{page}");
        page
    }
}

fn names(page: &Value) -> Vec<&str> {
    page["data"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| row["externalId"].as_str().expect("a name"))
        .collect()
}

/// Waits until ClickHouse holds `wanted` of the session; a minute means never.
async fn lands(
    world: &World,
    id: &str,
    wanted: impl Fn(&sessiond::clickhouse::SessionRow) -> bool,
) -> Duration {
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_secs(60) {
        let found = world.clickhouse.find(&[id.to_owned()]).await.unwrap_or_default();
        if found.first().is_some_and(&wanted) {
            return began.elapsed();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{id} does not land");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_original_plan_holds() {
    let world = World::new().await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(Process::binary());
    let clickhouse = format!(
        "{}/?database={}",
        clickhouse::url(),
        world.clickhouse.table().split('.').next().expect("a name")
    );
    command
        .env("SESSIOND_METADATA__URL", &world.sql.database.url)
        .env("SESSIOND_AUTH__MASTER_KEY", MASTER_KEY)
        .env("SESSION_REPLICATION_CLICKHOUSE_URL", clickhouse)
        .env("SESSION_REPLICATION_ENABLED", "1")
        .env("SESSION_REPLICATION_SLOT_NAME", &world.config.slot)
        .env("SESSION_REPLICATION_INSERT_MAX_RETRIES", "3");
    // The fixture's environments would be older than the one that the process makes.
    world.execute("DELETE FROM environments").await;
    let process = Process::start(&mut command, folder.path()).await;
    let client = Client { process: &process };

    let slots =
        format!("SELECT count(*)::text FROM pg_replication_slots WHERE slot_name = '{}'", world.config.slot);
    let publications =
        "SELECT count(*)::text FROM pg_publication WHERE pubname = 'sessions_to_clickhouse_v1_publication'";
    world.until_streaming().await;
    assert_eq!((world.text(&slots).await.as_str(), world.text(publications).await.as_str()), ("1", "1"));

    let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "plan", "tags": ["red"], "metadata": {"a": {"b": [1]}}});
    let (status, created, _) =
        client.send(client.request(Method::POST, "/api/v1/sessions").json(&body)).await;
    assert_eq!(status, 201, "{created}");
    let id = created["id"].as_str().expect("an id");
    let took = lands(&world, id, |row| row.external_id == "plan" && row.tags == ["red"]).await;
    assert!(took < SOON, "{took:?}");

    let patch = json!({"tags": ["red", "blue"], "metadata": {"c": 1}});
    let (status, _, _) =
        client.send(client.request(Method::PATCH, "/api/v1/sessions/plan").json(&patch)).await;
    assert_eq!(status, 200);
    lands(&world, id, |row| row.tags == ["red", "blue"] && row.metadata_text == r#"{"c": 1}"#).await;
    for (name, tag) in [("other", "red"), ("third", "green")] {
        let body = json!({"type": "voice", "taskIdentifier": "agent", "externalId": name, "tags": [tag]});
        client.send(client.request(Method::POST, "/api/v1/sessions").json(&body)).await;
    }
    let close =
        client.request(Method::POST, "/api/v1/sessions/plan/close").json(&json!({"reason": "plan is done"}));
    let (status, closed, token) = client.send(close).await;
    assert_eq!((status, &closed["closedReason"]), (200, &json!("plan is done")));
    lands(&world, id, |row| row.closed_reason == "plan is done" && row.closed_at.is_some()).await;

    let append = client.request(Method::POST, "/realtime/v1/sessions/plan/out/append").body("late");
    let (status, refused, _) = client.send(append).await;
    assert!(matches!(status, 400 | 409), "{status} {refused}");
    // The SDK's own header asks for the status that the SDK knows.
    let append = client
        .request(Method::POST, "/realtime/v1/sessions/plan/out/append")
        .header("trigger-version", "4.4.0");
    let (status, refused, _) = client.send(append.body("late")).await;
    assert_eq!(status, 400, "{refused}");

    assert_eq!(names(&client.list("filter[tags]=red", &token).await), ["other", "plan"]);
    assert_eq!(names(&client.list("filter[type]=voice", &token).await), ["third", "other"]);
    assert_eq!(names(&client.list("filter[status]=CLOSED", &token).await), ["plan"]);
    assert_eq!(names(&client.list("filter[externalId]=third", &token).await), ["third"]);
    let first = client.list("page[size]=2", &token).await;
    assert_eq!(names(&first), ["third", "other"]);
    let next = first["pagination"]["next"].as_str().expect("a cursor");
    assert_eq!(names(&client.list(&format!("page[size]=2&page[after]={next}"), &token).await), ["plan"]);
    assert!(process.terminate().await.success());
    world.forget_slot().await;
}
