//! Lists from the real ClickHouse, fed by whichever replica leads: a write through one is in the lists of the other.

use futures_util::future::join_all;
use reqwest::RequestBuilder;
use sessiond::replication::Postgres;

use super::*;
use crate::harness::clickhouse;

const HEADER: &str = "x-sessiond-consistency";

/// Two servers with lists from ClickHouse; both replicate, and one leads.
struct Lists {
    pair: Pair,
    slot: String,
}

impl Lists {
    async fn start() -> Self {
        let settings = clickhouse::config(&clickhouse::url());
        let slot = format!("slot_{}", uuid::Uuid::new_v4().simple());
        let pair = Pair::start_with(|config| {
            config.clickhouse = settings.clone();
            config.replication.enabled = true;
            config.replication.slot.clone_from(&slot);
            config.replication.retry_interval = std::time::Duration::from_millis(100);
            // A machine with a hundred tests at work; a page that is late is a failure all the same.
            config.replication.visibility_timeout = std::time::Duration::from_secs(20);
        })
        .await;
        let lists = Self { pair, slot };
        lists.until_replicated().await;
        lists
    }

    async fn until_replicated(&self) {
        for server in [&self.pair.a, &self.pair.b] {
            while server.get("/readyz").await.expect(200)["lists"] != Value::Null {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
    }

    /// A slot belongs to the cluster, and a cluster has few.
    async fn end(mut self) {
        self.pair.a.stop().await;
        self.pair.b.stop().await;
        let postgres = Postgres::new(&self.pair.database.url.as_str().into()).expect("a URL");
        postgres.drop_slot(&self.slot).await.expect("dropped");
    }
}

/// The rows of a list that has to show what the token stands for.
async fn listed(server: &TestServer, query: &str, token: &str) -> Vec<Value> {
    let request: RequestBuilder = server.request(Method::GET, &format!("/api/v1/sessions?{query}"));
    let answer = server.send(request.header(HEADER, token)).await;
    answer.expect(200)["data"].as_array().expect("rows").clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_token_every_write_through_one_replica_is_in_the_next_list_of_the_other() {
    const WRITERS: usize = 8;
    const ROUNDS: usize = 25;
    let lists = Lists::start().await;
    let writers = (0..WRITERS).map(|writer| {
        let (a, b) = match writer % 2 {
            0 => (&lists.pair.a, &lists.pair.b),
            _ => (&lists.pair.b, &lists.pair.a),
        };
        async move {
            for round in 0..ROUNDS {
                let name = format!("s{writer}-{round}");
                let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": name});
                let created = a.post("/api/v1/sessions", &body).await;
                let token = created.header(HEADER).expect("a token");
                let found = listed(b, &format!("filter[externalId]={name}"), token).await;
                assert_eq!(found.len(), 1, "{name}");
                let path = format!("/api/v1/sessions/{name}");
                let changed = a.json(Method::PATCH, &path, &json!({"tags": [name]})).await;
                let token = changed.header(HEADER).expect("a token");
                assert_eq!(listed(b, &format!("filter[tags]={name}"), token).await.len(), 1, "{name}");
                let closed = a.post(&format!("{path}/close"), &json!({"reason": "done"})).await;
                let token = closed.header(HEADER).expect("a token");
                let query = format!("filter[externalId]={name}&filter[status]=CLOSED");
                let found = listed(b, &query, token).await;
                assert_eq!(found[0]["closedReason"], "done", "{name}");
            }
        }
    });
    join_all(writers).await;
    lists.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_outlives_the_replica_that_led_and_the_replication_that_it_was_made_in() {
    let mut lists = Lists::start().await;
    let created = lists
        .pair
        .b
        .post("/api/v1/sessions", &json!({"type": "chat", "taskIdentifier": "agent", "externalId": "kept"}))
        .await;
    let token = created.header(HEADER).expect("a token").to_owned();
    lists.pair.a.stop().await;
    assert_eq!(listed(&lists.pair.b, "filter[externalId]=kept", &token).await.len(), 1);
    // Without its slot the replication begins anew and copies everything once more.
    let drop = format!(
        "SELECT pg_terminate_backend(active_pid), pg_sleep(0.2), pg_drop_replication_slot(slot_name) \
         FROM pg_replication_slots WHERE slot_name = '{}'",
        lists.slot
    );
    let connection = lists.pair.database.connect().await;
    while connection.execute_unprepared(&drop).await.is_err() {}
    let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "between"});
    let between = lists.pair.b.post("/api/v1/sessions", &body).await;
    let between = between.header(HEADER).expect("a token").to_owned();
    for (name, token) in [("kept", token), ("between", between)] {
        assert_eq!(
            listed(&lists.pair.b, &format!("filter[externalId]={name}"), &token).await.len(),
            1,
            "{name}"
        );
    }
    lists.end().await;
}
