//! Consistency tokens through the wire. The replicator is played by the test, so that nothing is visible before it says.

use std::time::Duration;

use http::header::ORIGIN;
use reqwest::Method;
use sea_orm::{ConnectOptions, ConnectionTrait, Database, DatabaseConnection, Statement};
use serde_json::{Value, json};
use sessiond::config::Config;
use sessiond::domain::ConsistencyToken;
use sessiond::store::metadata::{OpenOptions, SqlMetadata};

use crate::harness::database::TestDatabase;
use crate::harness::server::{Answer, KEY};
use crate::harness::{Socket, TestServer};

const MASTER_KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const HEADER: &str = "x-sessiond-consistency";
const SLOT: &str = "sessions_to_clickhouse_v1";
/// Longer than any test waits: whoever waits for this has hung.
const LONG: Duration = Duration::from_secs(30);
/// Passes while nothing is published.
const SHORT: Duration = Duration::from_millis(60);
const LIST: &str = "{ sessions { totalCount nodes { externalId } } sessionTags }";

/// A server whose lists are behind until the test, in the place of the replicator, publishes a position.
struct Stage {
    server: TestServer,
    connection: DatabaseConnection,
}

impl Stage {
    async fn open(visibility_timeout: Duration) -> Self {
        let database = TestDatabase::postgres().await;
        SqlMetadata::open(&database.url, OpenOptions::default()).await.expect("migrates").close().await;
        // One, because a temporary slot belongs to its connection.
        let mut options = ConnectOptions::new(&database.url);
        options.max_connections(1);
        let connection = Database::connect(options).await.expect("connects");
        let stage = |server| Self { server, connection };
        let server = TestServer::start_with(|config: &mut Config| {
            config.metadata.url = Some(database.url.clone().into());
            config.metadata.connections = 4;
            config.auth.master_key = Some(MASTER_KEY.to_owned().into());
            // Nothing listens there, so lists come from Postgres, as soon as they may.
            config.clickhouse.url = Some("http://127.0.0.1:9".parse().expect("a URL"));
            config.clickhouse.fallback = true;
            config.replication.visibility_timeout = visibility_timeout;
        })
        .await;
        stage(server)
    }

    async fn run(&self, sql: &str) -> Vec<sea_orm::QueryResult> {
        let statement = Statement::from_string(self.connection.get_database_backend(), sql);
        self.connection.query_all_raw(statement).await.expect("runs")
    }

    /// What the leader does after a flush.
    async fn publish(&self, epoch: u8, lsn: u64, status: &str) {
        self.run(&format!(
            "WITH row AS (INSERT INTO replication_state VALUES \
             ('{SLOT}', {epoch}, '1', 1, 0, '{status}', NULL, {lsn}, 'test', 0, 0) ON CONFLICT (slot) DO UPDATE \
             SET epoch = EXCLUDED.epoch, flushed_lsn = EXCLUDED.flushed_lsn, status = EXCLUDED.status RETURNING slot) \
             SELECT pg_notify('sessiond_replication', slot || ':{epoch}:{lsn}:{status}')::text FROM row"
        ))
        .await;
    }

    /// Writes until the server has learned of this epoch, and gives the last token.
    async fn written_in(&self, epoch: u8) -> ConsistencyToken {
        loop {
            let token = token(&self.create(json!({"externalId": "written"})).await);
            if token.epoch == epoch {
                return token;
            }
        }
    }

    async fn create(&self, extra: Value) -> Answer {
        let mut body = json!({"type": "chat", "taskIdentifier": "agent"});
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        self.server.post("/api/v1/sessions", &body).await
    }

    async fn list(&self, token: &str) -> Answer {
        let request = self.server.request(Method::GET, "/api/v1/sessions").header(HEADER, token);
        self.server.send(request).await
    }

    async fn graphql(&self, body: Value) -> Value {
        self.server.post("/graphql", &body).await.json()
    }

    async fn socket(&self) -> Socket {
        let mut socket = Socket::open(&format!("{}/graphql", self.server.url), &[]).await.expect("accepted");
        socket.init(Some(KEY)).await;
        socket
    }

    /// Keeps every message in the WAL from now on.
    async fn record_messages(&self) {
        self.run(&format!(
            "SELECT pg_create_logical_replication_slot('{}', 'test_decoding', true)::text",
            self.wal().await
        ))
        .await;
    }

    async fn wal(&self) -> String {
        let rows = self.run("SELECT 'wal_' || current_database()").await;
        rows[0].try_get_by_index::<String>(0).expect("a name")
    }

    /// How many messages of waiting lists there have been.
    async fn nudges(&self) -> usize {
        let rows = self
            .run(&format!(
                "SELECT data FROM pg_logical_slot_peek_changes('{}', NULL, NULL) \
                 WHERE data LIKE 'message: transactional: 1 prefix: sessiond.barrier,%'",
                self.wal().await
            ))
            .await;
        rows.len()
    }

    async fn until_nudged(&self) {
        while self.nudges().await == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn token(answer: &Answer) -> ConsistencyToken {
    let text = answer.header(HEADER).unwrap_or_else(|| panic!("no token: {answer:?}"));
    ConsistencyToken::decode(HEADER, text).expect("a token")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_write_that_lists_show_answers_a_token_and_nothing_else_does() {
    let stage = Stage::open(LONG).await;
    stage.publish(1, 1, "streaming").await;
    let first = stage.written_in(1).await;
    let created = stage.create(json!({"externalId": "s"})).await;
    let run = created.expect(201)["runId"].clone();
    let mut last = token(&created);
    assert!(last.epoch == 1 && last.lsn > first.lsn, "{first:?} {last:?}");
    for (method, path, body) in [
        (Method::PATCH, "/api/v1/sessions/s", json!({"tags": ["x"]})),
        (
            Method::POST,
            "/api/v1/sessions/s/end-and-continue",
            json!({"callingRunId": run, "reason": "handover"}),
        ),
        (Method::POST, "/api/v1/sessions/s/close", json!({})),
        (Method::POST, "/api/v1/sessions", json!({"type": "chat", "taskIdentifier": "agent"})),
    ] {
        let answer = stage.server.json(method, path, &body).await;
        assert!(answer.status.is_success(), "{answer:?}");
        let next = token(&answer);
        assert!(next.lsn >= last.lsn, "{path}");
        last = next;
    }
    for answer in [
        stage.server.get("/api/v1/sessions/s").await,
        stage.server.get("/api/v1/sessions").await,
        stage.create(json!({"externalId": "s"})).await,
        stage.server.post("/realtime/v1/sessions/written/in/append", &json!("x")).await,
    ] {
        assert_eq!(answer.header(HEADER), None, "{answer:?}");
    }
    let request = stage.server.request(Method::GET, "/api/v1/sessions").header(ORIGIN, "https://a.example");
    let exposed = stage.server.send(request).await;
    let exposed = exposed.header("access-control-expose-headers").expect("a list").to_owned();
    assert!(exposed.contains(HEADER) && exposed.contains("retry-after"), "{exposed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_waits_until_the_position_is_published_and_lists_that_wait_together_nudge_once() {
    let stage = Stage::open(LONG).await;
    stage.publish(1, 1, "streaming").await;
    stage.create(json!({"externalId": "another"})).await;
    let token = stage.written_in(1).await;
    stage.record_messages().await;
    let text = token.encode();
    let lists = futures_util::future::join_all((0..30).map(|_| stage.list(&text)));
    let publish = async {
        stage.until_nudged().await;
        // Another slot's position, and one just before the write, are not enough.
        stage
            .run("SELECT pg_notify('sessiond_replication', 'other:1:9000000000000000:streaming')::text")
            .await;
        stage.publish(1, token.lsn - 1, "streaming").await;
        stage.publish(1, token.lsn, "streaming").await;
    };
    let (answers, ()) = tokio::join!(lists, publish);
    for answer in answers {
        assert_eq!(answer.expect(200)["data"].as_array().map(Vec::len), Some(2));
    }
    assert_eq!(stage.nudges().await, 1);
    let page = |query: String| {
        let path = format!("/api/v1/sessions?page[size]=1{query}");
        stage.server.send(stage.server.request(Method::GET, &path).header(HEADER, &text))
    };
    let first = page(String::new()).await.expect(200);
    let next = first["pagination"]["next"].as_str().expect("a second page");
    let second = page(format!("&page[after]={next}")).await.expect(200);
    assert_ne!(first["data"][0]["id"], second["data"][0]["id"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_visible_in_time_is_told_and_no_stale_page_is_shown() {
    let stage = Stage::open(SHORT).await;
    stage.publish(1, 1, "streaming").await;
    let token = stage.written_in(1).await.encode();
    let answer = stage.list(&token).await;
    let body = answer.expect(503);
    assert_eq!((&body["code"], &body["retryAfterMs"]), (&json!("not_yet_visible"), &json!(1000)), "{body}");
    assert_eq!(answer.header("retry-after"), Some("1"));
    let after = stage.server.get("/api/v1/sessions?page[size]=1").await.expect(200);
    assert_eq!(after["data"][0]["externalId"], "written", "without a token a list does not wait");
    for field in ["sessions { totalCount }", "sessionTags"] {
        let request = json!({"query": format!("{{ {field} }}"), "extensions": {"consistencyToken": token}});
        let answer = stage.graphql(request.clone()).await;
        let extensions = &answer["errors"][0]["extensions"];
        assert_eq!(extensions["code"], "NOT_YET_VISIBLE", "{answer}");
        assert_eq!(extensions["retryAfterMs"], 1000);
        let batch = stage.graphql(json!([request, {"query": LIST}])).await;
        assert_eq!(batch[0]["errors"][0]["extensions"]["code"], "NOT_YET_VISIBLE", "{batch}");
        assert!(batch[1]["errors"].is_null(), "{batch}");
        let mut socket = stage.socket().await;
        socket.say(json!({"type": "subscribe", "id": "q", "payload": request})).await;
        let result = socket.result("q").await;
        assert_eq!(result["errors"][0]["extensions"]["code"], "NOT_YET_VISIBLE", "{result}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mutations_answer_a_token_that_queries_of_every_transport_take() {
    let stage = Stage::open(LONG).await;
    stage.publish(1, 1, "streaming").await;
    stage.written_in(1).await;
    let create = "mutation($name: String!) { createSession(input: {type: \"chat\", taskIdentifier: \"agent\", \
                  externalId: $name}) { session { id } userErrors { code } } }";
    let created = stage.graphql(json!({"query": create, "variables": {"name": "http"}})).await;
    let read = |answer: &Value| {
        let text = answer["extensions"]["consistencyToken"].as_str().expect("a token").to_owned();
        ConsistencyToken::decode("token", &text).expect("a token")
    };
    let first = read(&created);
    let mut socket = stage.socket().await;
    socket.subscribe("m", create, json!({"name": "ws"})).await;
    let second = read(&socket.result("m").await);
    assert!(second.lsn > first.lsn);
    socket.completed("m").await;
    let append = "mutation { appendRecords(input: {by: {externalId: \"http\"}, io: IN, records: [{text: \"x\"}]}) \
                  { userErrors { code } } }";
    let appended = stage.graphql(json!({"query": append})).await;
    assert!(appended["extensions"]["consistencyToken"].is_null(), "{appended}");
    stage.publish(1, second.lsn, "streaming").await;
    let extensions = json!({"consistencyToken": second.encode()});
    let request = json!({"query": LIST, "extensions": extensions});
    let shown = |answer: &Value| {
        assert!(answer["errors"].is_null(), "{answer}");
        assert_eq!(answer["data"]["sessions"]["totalCount"], "3", "{answer}");
    };
    shown(&stage.graphql(request.clone()).await);
    shown(&stage.graphql(json!([request])).await[0]);
    socket.say(json!({"type": "subscribe", "id": "q", "payload": request})).await;
    shown(&socket.result("q").await);
    let by_header = stage.server.request(Method::POST, "/graphql").json(&json!({"query": LIST}));
    shown(&stage.server.send(by_header.header(HEADER, second.encode())).await.expect(200));
    let stream = stage.server.request(Method::POST, "/graphql").json(&request);
    let stream = stream.header("accept", "text/event-stream").send().await.expect("an answer");
    let text = stream.text().await.expect("a stream");
    assert!(text.contains("\"totalCount\":\"3\""), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_of_an_earlier_epoch_waits_for_the_backfill_and_everything_up_to_now() {
    let stage = Stage::open(Duration::from_secs(2)).await;
    stage.publish(1, 1, "streaming").await;
    let token = stage.written_in(1).await;
    // Farther than the WAL will ever be, but old rows are still being copied.
    let far = 1 << 50;
    stage.publish(2, far, "backfilling").await;
    let own = stage.written_in(2).await;
    stage.list(&own.encode()).await.expect(200);
    let text = token.encode();
    let (waited, _) = tokio::join!(stage.list(&text), stage.publish(2, far, "backfilling"));
    assert_eq!(waited.expect(503)["code"], "not_yet_visible");
    stage.publish(2, far, "streaming").await;
    stage.list(&text).await.expect(200);
    // And with a position that is not yet behind a message of now.
    stage.publish(3, own.lsn, "streaming").await;
    stage.written_in(3).await;
    assert_eq!(stage.list(&text).await.expect(503)["code"], "not_yet_visible");
    // A token from before there was any epoch is only older.
    let before = ConsistencyToken { epoch: 0, lsn: 1 }.encode();
    stage.publish(3, far, "streaming").await;
    stage.list(&before).await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_token_is_refused_by_name_and_scopes_are_judged_before_any_wait() {
    let stage = Stage::open(LONG).await;
    stage.publish(1, 1, "streaming").await;
    let answer = stage.list("nonsense").await.expect(400);
    assert_eq!(answer["error"], format!("{HEADER} is not a consistency token"));
    for (value, message) in [
        (json!("nonsense"), "extensions.consistencyToken is not a consistency token"),
        (json!(7), "extensions.consistencyToken must be a string"),
    ] {
        let request = json!({"query": LIST, "extensions": {"consistencyToken": value}});
        let answer = stage.graphql(request.clone()).await;
        assert_eq!(answer["errors"][0]["message"], message, "{answer}");
        let mut socket = stage.socket().await;
        socket.say(json!({"type": "subscribe", "id": "q", "payload": request})).await;
        assert_eq!(socket.refused("q").await[0]["message"], message);
    }
    let far = ConsistencyToken { epoch: 1, lsn: 1 << 50 }.encode();
    let body = json!({"scopes": ["read:sessions:s"]});
    let minted = stage.server.post("/api/v1/auth/public-tokens", &body).await.expect(200);
    let bearer = minted["token"].as_str().expect("a token").to_owned();
    let request = stage.server.request_as(&bearer, Method::GET, "/api/v1/sessions").header(HEADER, far);
    stage.server.send(request).await.expect(403);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_lists_are_read_from_the_metadata_store_there_are_no_tokens_and_none_is_waited_for() {
    let server = TestServer::start().await;
    let created = server.post("/api/v1/sessions", &json!({"type": "chat", "taskIdentifier": "agent"})).await;
    created.expect(201);
    assert_eq!(created.header(HEADER), None);
    let far = ConsistencyToken { epoch: 9, lsn: u64::MAX }.encode();
    let list = |token: &str| server.request(Method::GET, "/api/v1/sessions").header(HEADER, token);
    assert_eq!(server.send(list(&far)).await.expect(200)["data"].as_array().map(Vec::len), Some(1));
    server.send(list("nonsense")).await.expect(400);
    let query = json!({"query": LIST, "extensions": {"consistencyToken": far}});
    assert!(server.post("/graphql", &query).await.expect(200)["errors"].is_null());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_reads_what_keeps_lists_stale_and_the_server_stays_ready() {
    let stage = Stage::open(SHORT).await;
    let ready = stage.server.get("/readyz").await.expect(200);
    assert!(
        ready["lists"].as_str().is_some_and(|words| words.contains("nothing has been replicated yet")),
        "{ready}"
    );
    stage.publish(1, 1, "backfilling").await;
    stage.written_in(1).await;
    let ready = stage.server.get("/readyz").await.expect(200);
    assert!(ready["lists"].as_str().is_some_and(|words| words.contains("being copied")), "{ready}");
}
