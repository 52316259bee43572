//! Real processes: servers that replicate beside their work, and replicators alone.

use std::process::Output;

use reqwest::Method;
use sea_orm::{Database, TransactionTrait};
use sessiond::store::index::clickhouse::{ClickHouse, SessionRow};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::compare::ROW;
use super::*;
use crate::harness::database::TestDatabase;
use crate::harness::replication::{drop_slot, slot_name};
use crate::harness::server::KEY;
use crate::harness::{Process, clickhouse};

/// Protects the keys of the test's database.
const MASTER_KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

/// A Postgres, a ClickHouse, and processes between them.
pub(super) struct Installation {
    /// URL of the database.
    pub(super) postgres: String,
    pub(super) clickhouse: ClickHouse,
    pub(super) slot: String,
    /// Where the processes reach ClickHouse.
    pub(super) url: String,
    pub(super) data: TempDir,
}

impl Installation {
    pub(super) async fn fresh() -> Self {
        let clickhouse = clickhouse::connect(clickhouse::options(&clickhouse::url()));
        let (postgres, url) = (TestDatabase::postgres().await.url, clickhouse::url());
        let data = tempfile::tempdir().expect("a folder");
        Self { postgres, clickhouse, slot: slot_name(), url, data }
    }

    /// With the names that the other system has for the settings.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(Process::binary());
        let url = format!("{}/?database={}", self.url, self.clickhouse.options().database);
        command
            .env("SESSION_REPLICATION_ENABLED", "1")
            .env("SESSION_REPLICATION_CLICKHOUSE_URL", url)
            .env("SESSION_REPLICATION_SLOT_NAME", &self.slot)
            .env("SESSION_REPLICATION_LEADER_LOCK_RETRY_INTERVAL_MS", "50")
            .env("SESSIOND_CLICKHOUSE__LISTS", "clickhouse")
            .env("SESSIOND_REPLICATION__HEARTBEAT", "200ms")
            .env("SESSIOND_METADATA__URL", &self.postgres)
            .env("SESSIOND_METADATA__CONNECTIONS", "4")
            .env("SESSIOND_AUTH__MASTER_KEY", MASTER_KEY)
            .kill_on_drop(true);
        command
    }

    pub(super) async fn serve(&self, name: &str) -> Process {
        Process::start(&mut self.command(), &self.data.path().join(name)).await
    }

    /// A replicator without a server.
    pub(super) fn replicate(&self) -> Child {
        self.command().arg("replicate").spawn().expect("the binary starts")
    }

    async fn status(&self) -> (Output, Value) {
        let mut command = self.command();
        let output = command.args(["replicate", "status", "--json"]).output().await.expect("the binary runs");
        let seen = serde_json::from_slice(&output.stdout).expect("JSON");
        (output, seen)
    }

    /// What a command of `replicate` answers, and whether it ended well.
    pub(super) async fn run(&self, arguments: &[&str]) -> (bool, Value) {
        let mut command = self.command();
        let output =
            command.arg("replicate").args(arguments).arg("--json").output().await.expect("the binary runs");
        let answer = serde_json::from_slice(&output.stdout);
        (
            output.status.success(),
            answer.unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&output.stderr).into())),
        )
    }

    /// Has ClickHouse do what is no query; `{database}` stands for the database.
    pub(super) async fn clickhouse_does(&self, text: &str) {
        let text = text.replace("{database}", &self.clickhouse.options().database);
        let client = ::clickhouse::Client::default().with_url(&self.url);
        client.query_raw(&text).execute().await.expect("done");
    }

    /// Waits until this is true of the status.
    pub(super) async fn wait_for(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let (_, seen) = self.status().await;
            if is_so(&seen) {
                return seen;
            }
            assert!(begun.elapsed() < PATIENCE, "{what}: {seen}");
            // Each look is a process.
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a session is in ClickHouse as wanted, and says for how long.
    pub(super) async fn stored(&self, id: &str, wanted: impl Fn(&SessionRow) -> bool) -> Duration {
        let begun = Instant::now();
        let text = format!("SELECT {ROW} FROM sessions_v1 FINAL WHERE session_id = '{id}'");
        loop {
            let query = self.clickhouse.query(&text);
            let found: Vec<SessionRow> = self.clickhouse.fetch(query).await.unwrap_or_default();
            if found.first().is_some_and(&wanted) {
                return begun.elapsed();
            }
            assert!(begun.elapsed() < PATIENCE, "{found:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub(super) async fn end(self) {
        drop_slot(&self.postgres, &self.slot).await;
    }
}

async fn ask(url: &str, method: Method, path: &str, body: Value) -> (u16, Value) {
    let request = reqwest::Client::new().request(method, format!("{url}{path}")).bearer_auth(KEY);
    let request = if body.is_null() { request } else { request.json(&body) };
    let response = request.send().await.expect("an answer");
    (response.status().as_u16(), response.json().await.expect("JSON"))
}

pub(super) async fn create(url: &str, extra: Value) -> String {
    let mut body = json!({"type": "chat", "taskIdentifier": "agent"});
    let (Value::Object(fields), Some(all)) = (extra, body.as_object_mut()) else { panic!("not an object") };
    all.extend(fields);
    let (status, created) = ask(url, Method::POST, "/api/v1/sessions", body).await;
    assert!(matches!(status, 200 | 201), "{created}");
    created["id"].as_str().expect("an id").to_owned()
}

/// Waits until `/readyz` names under `degraded` what is wanted; `null` if nothing is wrong.
pub(super) async fn degraded(url: &str, wanted: impl Fn(&str) -> bool) {
    let told = async {
        loop {
            let (status, body) = ask(url, Method::GET, "/readyz", Value::Null).await;
            assert_eq!(status, 200, "{body}");
            if wanted(&body["degraded"].to_string()) {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, told).await.expect("it is told");
}

/// The ids that a list gives.
async fn listed(url: &str, query: &str) -> Vec<String> {
    let (status, list) = ask(url, Method::GET, &format!("/api/v1/sessions?{query}"), Value::Null).await;
    assert_eq!(status, 200, "{list}");
    let rows = list["data"].as_array().expect("rows").iter();
    rows.map(|row| row["id"].as_str().expect("an id").to_owned()).collect()
}

/// Whether Postgres has this.
async fn has(database: &DatabaseConnection, what: &str) -> bool {
    let query = Statement::from_string(DbBackend::Postgres, format!("SELECT 1 FROM {what}"));
    database.query_one_raw(query).await.expect("asked").is_some()
}

/// What the proposal of the original system says that must be seen: its own words are in the comments.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_test_plan_of_the_proposal_holds_on_postgres_and_clickhouse() {
    let here = Installation::fresh().await;
    let server = here.serve("a").await;
    let url = server.url.as_str();

    // "Slot and publication are created on boot."
    let database = Database::connect(&here.postgres).await.expect("connects");
    let slot = format!("pg_replication_slots WHERE slot_name = '{}' AND active", here.slot);
    let made = async {
        while !has(&database, &slot).await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, made).await.expect("a slot that is read");
    let published = "pg_publication_tables WHERE pubname = 'sessions_to_clickhouse_v1_publication' AND tablename = 'sessions'";
    assert!(has(&database, published).await);

    // "A session that is created lands in trigger_dev.sessions_v1 within two seconds."
    here.wait_for("older rows are copied", |seen| seen["phase"] == "streaming").await;
    let extra = json!({"externalId": "one", "tags": ["a", "b:c"], "metadata": {"n": 1.0, "nothing": null}});
    let one = create(url, extra).await;
    let took = here.stored(&one, |row| row.external_id == "one" && row.tags == ["a", "b:c"]).await;
    assert!(took < Duration::from_secs(2), "{took:?}");

    // "Update and close round-trip, with closedReason intact."
    let path = format!("/api/v1/sessions/{one}");
    let (status, changed) = ask(url, Method::PATCH, &path, json!({"tags": ["changed"]})).await;
    assert_eq!(status, 200, "{changed}");
    here.stored(&one, |row| row.tags == ["changed"]).await;
    let (status, closed) =
        ask(url, Method::POST, &format!("{path}/close"), json!({"reason": "it's \"over\""})).await;
    assert_eq!(status, 200, "{closed}");
    here.stored(&one, |row| row.closed_reason == "it's \"over\"" && row.closed_at.is_some()).await;

    // "An append to .out after the close answers 400."
    let append = format!("/realtime/v1/sessions/{one}/out/append");
    let (status, refused) = ask(url, Method::POST, &append, json!("late")).await;
    assert_eq!(status, 400, "{refused}");

    // "Lists by tag, type, status CLOSED, externalId and cursor are right."
    let two = create(url, json!({"type": "other", "externalId": "two", "tags": ["a"]})).await;
    let three = create(url, json!({"tags": ["a"]})).await;
    here.stored(&three, |_| true).await;
    assert_eq!(listed(url, "filter[tags]=a").await, [three.clone(), two.clone()]);
    assert_eq!(listed(url, "filter[type]=other").await, [two.as_str()]);
    assert_eq!(listed(url, "filter[status]=CLOSED").await, [one.as_str()]);
    assert_eq!(listed(url, "filter[externalId]=two").await, [two.as_str()]);
    let all = [three, two, one];
    for size in 1..=3 {
        let (mut walked, mut cursor) = (Vec::new(), String::new());
        loop {
            let path = format!("/api/v1/sessions?page[size]={size}{cursor}");
            let (_, page) = ask(url, Method::GET, &path, Value::Null).await;
            let rows = page["data"].as_array().expect("rows").iter();
            walked.extend(rows.map(|row| row["id"].as_str().expect("an id").to_owned()));
            let Some(next) = page["pagination"]["next"].as_str() else { break };
            cursor = format!("&page[after]={next}");
        }
        assert_eq!(walked, all, "pages of {size}");
    }
    let (_, page) = ask(url, Method::GET, "/api/v1/sessions?filter[externalId]=one", Value::Null).await;
    assert_eq!(page["data"][0]["metadata"], json!({"n": 1.0, "nothing": null}));

    let (output, seen) = here.status().await;
    assert!(output.status.success() && seen["problems"] == json!([]), "{seen}");
    let metrics = reqwest::get(format!("{url}/metrics")).await.expect("answers").text().await.expect("text");
    for line in
        ["sessiond_replication_leading 1", "sessiond_replication_events_processed_total{event=\"Insert\"} 3"]
    {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
    assert!(server.terminate().await.success());
    here.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_on_postgres_goes_on_where_one_was_killed_or_stopped() {
    let here = Installation::fresh().await;
    let server = here.serve("a").await;
    let leads = |seen: &Value, process: u32| {
        let is_its = |name: &str| name.ends_with(&format!("/{process}"));
        seen["isRead"] == true && seen["leader"].as_str().is_some_and(is_its)
    };
    let first = server.id();
    here.wait_for("the server leads", |seen| seen["phase"] == "streaming" && leads(seen, first)).await;
    let mut alone = here.replicate();
    let process = alone.id().expect("it runs");
    let one = create(&server.url, json!({"externalId": "one"})).await;
    assert!(server.terminate().await.success());
    here.stored(&one, |row| row.external_id == "one").await;
    here.wait_for("the replicator alone leads", |seen| leads(seen, process)).await;

    let server = here.serve("a").await;
    let two = create(&server.url, json!({"externalId": "two"})).await;
    here.stored(&two, |row| row.external_id == "two").await;
    alone.kill().await.expect("killed");
    let three = create(&server.url, json!({"externalId": "three"})).await;
    here.stored(&three, |row| row.external_id == "three").await;
    let second = server.id();
    here.wait_for("the server leads again", |seen| leads(seen, second)).await;
    assert_eq!(listed(&server.url, "").await, [three, two, one]);
    assert!(server.terminate().await.success());
    let (output, seen) = here.status().await;
    assert!(
        !output.status.success() && seen["problems"].to_string().contains("nobody reads the slot"),
        "{seen}"
    );
    here.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_a_clickhouse_that_is_away_nor_a_missing_right_on_postgres_keeps_a_server_from_its_work() {
    let mut here = Installation::fresh().await;
    for command in [&["replicate"][..], &["replicate", "status"]] {
        let output = here.command().args(command).output().await.expect("the binary runs");
        let text = String::from_utf8(output.stderr).expect("UTF-8");
        assert!(!output.status.success() && text.contains("there is no metadata store"), "{text}");
    }
    here.url = "http://127.0.0.1:1".to_owned();
    let server = here.serve("a").await;
    let id = create(&server.url, json!({"externalId": "one"})).await;
    degraded(&server.url, |text| text.contains("do not come to ClickHouse")).await;
    let (_, seen) = here.status().await;
    let problems = seen["problems"].to_string();
    assert!(problems.contains("ClickHouse cannot be reached") && !problems.contains("secret"), "{seen}");
    let (status, _) = ask(&server.url, Method::GET, &format!("/api/v1/sessions/{id}"), Value::Null).await;
    assert_eq!(status, 200);
    let begun = Instant::now();
    assert!(server.terminate().await.success());
    assert!(begun.elapsed() < Duration::from_secs(20), "nothing waits for it: {:?}", begun.elapsed());
    here.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_installations_on_postgres_do_not_fill_one_database_of_clickhouse() {
    let here = Installation::fresh().await;
    let there = Installation { clickhouse: here.clickhouse.clone(), ..Installation::fresh().await };
    let server = here.serve("a").await;
    here.wait_for("it leads", |seen| seen["phase"] == "streaming").await;
    let other = there.serve("b").await;
    let refused = |seen: &Value| seen["problems"].to_string().contains("is filled from another database");
    there.wait_for("the second one is refused", refused).await;
    create(&other.url, json!({"externalId": "elsewhere"})).await;
    let one = create(&server.url, json!({"externalId": "one"})).await;
    here.stored(&one, |row| row.external_id == "one").await;
    assert!(refused(&there.status().await.1));
    assert_eq!(listed(&server.url, "").await, [one]);
    for installation in [here, there] {
        installation.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clickhouse_that_has_lost_everything_gets_everything_from_postgres_again() {
    let here = Installation::fresh().await;
    let server = here.serve("a").await;
    let one = create(&server.url, json!({"externalId": "one"})).await;
    here.stored(&one, |_| true).await;
    here.wait_for("all is copied", |seen| seen["phase"] == "streaming").await;
    let database = &here.clickhouse.options().database;
    let client = ::clickhouse::Client::default().with_url(clickhouse::url());
    client.query_raw(&format!("DROP DATABASE {database} SYNC")).execute().await.expect("dropped");
    let two = create(&server.url, json!({"externalId": "two"})).await;
    for id in [&one, &two] {
        here.stored(id, |_| true).await;
    }
    let again = |seen: &Value| seen["phase"] == "streaming" && seen["problems"] == json!([]);
    let seen = here.wait_for("all is copied again", again).await;
    assert_eq!(seen["epoch"], 2, "nothing counts that is late of the first copy");
    assert_eq!(listed(&server.url, "").await, [two, one]);
    assert!(server.terminate().await.success());
    here.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_of_postgres_that_stays_open_delays_the_slot_and_no_server() {
    let here = Installation::fresh().await;
    let database = Database::connect(&here.postgres).await.expect("connects");
    let open = database.begin().await.expect("begins");
    open.execute_unprepared("SELECT pg_current_xact_id()").await.expect("an id");
    // It is ready when this returns.
    let server = here.serve("a").await;
    let waits = |seen: &Value| {
        let problems = seen["problems"].to_string();
        problems
            .contains("the slot is being made, which waits until every transaction that has written is over")
            && problems.contains("the oldest, of process")
    };
    here.wait_for("it is told what the slot waits for", waits).await;
    let one = create(&server.url, json!({"externalId": "one"})).await;
    open.commit().await.expect("committed");
    here.stored(&one, |row| row.external_id == "one").await;
    here.wait_for("all is well", |seen| seen["phase"] == "streaming" && seen["problems"] == json!([])).await;
    assert!(server.terminate().await.success());
    here.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_of_postgres_that_an_operator_has_dropped_stays_dropped_until_it_is_started() {
    let here = Installation::fresh().await;
    let run = async |command: &str| {
        let output = here.command().args(["replicate", command]).output().await.expect("the binary runs");
        (output.status.success(), String::from_utf8(output.stderr).expect("UTF-8"))
    };
    let server = here.serve("a").await;
    let (done, refusal) = run("start").await;
    assert!(
        !done && refusal.contains("not one that `sessiond replicate drop-slot` has dropped"),
        "{refusal}"
    );
    let one = create(&server.url, json!({"externalId": "one"})).await;
    here.stored(&one, |_| true).await;
    here.wait_for("all is copied", |seen| seen["phase"] == "streaming").await;
    assert!(run("drop-slot").await.0);
    let database = Database::connect(&here.postgres).await.expect("connects");
    let slot = format!("pg_replication_slots WHERE slot_name = '{}'", here.slot);
    assert!(!has(&database, &slot).await);
    let two = create(&server.url, json!({"externalId": "two"})).await;
    assert!(server.terminate().await.success());
    let server = here.serve("a").await;
    let mut replicator = here.replicate();
    let is_told = |seen: &Value| {
        seen["phase"] == "dropped" && seen["problems"].to_string().contains("sessiond replicate start")
    };
    assert!(is_told(&here.status().await.1));
    degraded(&server.url, |text| text.contains("do not come to ClickHouse")).await;
    assert!(!has(&database, &slot).await, "nobody has made it");
    assert!(run("drop-slot").await.0, "twice is once");
    assert!(run("start").await.0);
    here.stored(&two, |_| true).await;
    let whole = |seen: &Value| seen["phase"] == "streaming" && seen["problems"] == json!([]);
    let seen = here.wait_for("all is copied again", whole).await;
    assert_eq!(seen["epoch"], 2);
    assert_eq!(listed(&server.url, "").await, [two, one]);
    replicator.kill().await.expect("killed");
    assert!(server.terminate().await.success());
    here.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_of_clickhouse_say_when_no_replicator_of_postgres_keeps_them_up_to_date() {
    let here = Installation::fresh().await;
    let mut command = here.command();
    let (url, database) = (&here.url, &here.clickhouse.options().database);
    command.env("SESSION_REPLICATION_ENABLED", "0").env("SESSIOND_CLICKHOUSE__URL", url);
    command.env("SESSIOND_CLICKHOUSE__DATABASE", database);
    let server = Process::start(&mut command, &here.data.path().join("a")).await;
    let replicator = here.replicate();
    here.wait_for("all is copied", |seen| seen["phase"] == "streaming").await;
    degraded(&server.url, |text| text == "null").await;
    drop(replicator);
    degraded(&server.url, |text| text.contains("no replicator keeps them up to date")).await;
    drop(server);
    here.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_on_postgres_that_leads_to_another_database_is_refused() {
    let here = Installation::fresh().await;
    let server = here.serve("a").await;
    here.wait_for("it leads", |seen| seen["phase"] == "streaming").await;
    let other = Sql::postgres().await;
    let mut command = here.command();
    command.env("SESSIOND_REPLICATION__URL", &other.database.url);
    let output = command.args(["replicate", "status"]).output().await.expect("the binary runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(!output.status.success() && text.contains("leads to another database"), "{text}");
    // A rebuild would be outweighed by what is there.
    let output = here.command().args(["index", "rebuild"]).output().await.expect("the binary runs");
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(!output.status.success() && text.contains("a replicator keeps this index"), "{text}");
    drop(server);
    here.end().await;
}
