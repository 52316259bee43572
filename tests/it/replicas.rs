//! Two servers on one Postgres and one basin of S2: what one of them changes, those who watch through the other see.

mod visibility;

use std::collections::HashSet;

use reqwest::Method;
use sea_orm::ConnectionTrait;
use serde_json::{Value, json};
use sessiond::config::Config;

use crate::harness::database::TestDatabase;
use crate::harness::proxy::Wire;
use crate::harness::s2_lite::{endpoint, fresh_basin};
use crate::harness::server::KEY;
use crate::harness::{Socket, TestServer};

const MASTER_KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const LIST: &str =
    "subscription($f: SessionFilter) { sessionsChanged(filter: $f) { externalId tags status closedReason } }";
const ONE: &str = "subscription($by: SessionBy!) { sessionChanged(by: $by) { externalId tags status } }";

/// Two servers, the second of which hears of the first through a wire that can be cut.
struct Pair {
    a: TestServer,
    b: TestServer,
    wire: Wire,
    database: TestDatabase,
}

impl Pair {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// With settings that both get.
    async fn start_with(change: impl Fn(&mut Config)) -> Self {
        let database = TestDatabase::postgres().await;
        let basin = fresh_basin();
        let set = |config: &mut Config| {
            config.metadata.url = Some(database.url.clone().into());
            config.metadata.connections = 6;
            config.auth.master_key = Some(MASTER_KEY.to_owned().into());
            config.log.url = Some(format!("s2://{basin}").parse().expect("a URL"));
            config.log.endpoint = Some(endpoint().parse().expect("a URL"));
            change(config);
        };
        let (_, place) = database.url.split_once('@').expect("a user");
        let (host, name) = place.split_once('/').expect("a database");
        let wire = Wire::to(host).await;
        let through = format!("postgres://postgres@{}/{name}", wire.address);
        let a = TestServer::start_with(set).await;
        let b = TestServer::start_with(|config| {
            set(config);
            config.replication.url = Some(through.into());
        })
        .await;
        Self { a, b, wire, database }
    }

    /// Subscribes through the second server, and waits until it is there.
    async fn watch(&self, filter: Value) -> Socket {
        let mut socket = self.socket().await;
        socket.subscribe("l", LIST, json!({"f": filter})).await;
        socket.silent().await;
        socket
    }

    async fn socket(&self) -> Socket {
        let mut socket = Socket::open(&format!("{}/graphql", self.b.url), &[]).await.expect("accepted");
        socket.init(Some(KEY)).await;
        socket
    }

    async fn tag(&self, session: &str, tag: &str) {
        let path = format!("/api/v1/sessions/{session}");
        self.a.json(Method::PATCH, &path, &json!({"tags": [tag]})).await.expect(200);
    }

    async fn close(&self, session: &str) {
        let path = format!("/api/v1/sessions/{session}/close");
        self.a.post(&path, &json!({"reason": "done"})).await.expect(200);
    }

    /// Waits until the second server listens, or does not.
    async fn until_listening(&self, listening: bool) {
        let connection = self.database.connect().await;
        let sql = "SELECT FROM pg_stat_activity WHERE application_name = 'sessiond changes' \
                   AND datname = current_database() AND query LIKE 'LISTEN%'";
        let expected = if listening { 2 } else { 1 };
        loop {
            let statement = sea_orm::Statement::from_string(connection.get_database_backend(), sql);
            if connection.query_all_raw(statement).await.expect("asks").len() == expected {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_watched_on_one_replica_shows_what_the_other_creates_changes_and_closes() {
    let pair = Pair::start().await;
    let mut socket = pair.watch(json!({"types": ["chat"]})).await;
    pair.a.create(json!({"externalId": "far"})).await;
    let seen = socket.event("l").await;
    assert_eq!(seen, json!({"externalId": "far", "tags": [], "status": "ACTIVE", "closedReason": null}));
    pair.a.create(json!({"externalId": "other", "type": "batch"})).await;
    pair.tag("far", "x").await;
    assert_eq!(socket.event("l").await["tags"], json!(["x"]));
    pair.close("far").await;
    let closed = socket.event("l").await;
    assert_eq!((&closed["status"], &closed["closedReason"]), (&json!("CLOSED"), &json!("done")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_awaited_by_its_external_id_arrives_from_the_other_replica_and_is_followed_to_its_close() {
    let pair = Pair::start().await;
    pair.until_listening(true).await;
    let mut socket = pair.socket().await;
    socket.subscribe("s", ONE, json!({"by": {"externalId": "late"}})).await;
    socket.silent().await;
    let begin = std::time::Instant::now();
    pair.a.create(json!({"externalId": "late"})).await;
    assert_eq!(socket.event("s").await, json!({"externalId": "late", "tags": [], "status": "ACTIVE"}));
    pair.tag("late", "x").await;
    assert_eq!(socket.event("s").await["tags"], json!(["x"]));
    pair.close("late").await;
    assert_eq!(socket.event("s").await["status"], json!("CLOSED"));
    socket.completed("s").await;
    assert!(begin.elapsed().as_secs() < 4, "told, and not found by looking now and then");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_while_the_wire_is_cut_is_made_up_for() {
    let pair = Pair::start().await;
    let mut list = pair.watch(json!({})).await;
    for name in ["watched", "listed"] {
        pair.a.create(json!({"externalId": name})).await;
    }
    pair.until_listening(true).await;
    let mut one = pair.socket().await;
    one.subscribe("s", ONE, json!({"by": {"externalId": "watched"}})).await;
    assert_eq!(one.event("s").await["tags"], json!([]));
    let mut awaited = pair.socket().await;
    awaited.subscribe("s", ONE, json!({"by": {"externalId": "new"}})).await;
    awaited.silent().await;
    pair.wire.cut();
    pair.until_listening(false).await;
    pair.tag("listed", "meanwhile").await;
    pair.tag("watched", "meanwhile").await;
    pair.a.create(json!({"externalId": "new"})).await;
    pair.wire.heal();
    assert_eq!(one.event("s").await["tags"], json!(["meanwhile"]));
    assert_eq!(awaited.event("s").await["externalId"], "new");
    let mut missing = HashSet::from(["listed".to_owned(), "watched".to_owned(), "new".to_owned()]);
    while !missing.is_empty() {
        let event = list.event("l").await;
        let name = event["externalId"].as_str().expect("a name");
        if name == "new" || event["tags"] == json!(["meanwhile"]) {
            missing.remove(name);
        }
    }
    pair.until_listening(true).await;
    pair.tag("watched", "healed").await;
    assert_eq!(one.event("s").await["tags"], json!(["healed"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_replica_commits_and_dies_before_it_tells_is_found() {
    let pair = Pair::start().await;
    pair.a.create(json!({"externalId": "s"})).await;
    pair.until_listening(true).await;
    let mut list = pair.watch(json!({"tags": {"any": ["last words"]}})).await;
    // A replica that is heard once, and then no more.
    let connection = pair.database.connect().await;
    for sql in [
        "SELECT pg_notify('sessiond_changes', 'somebody')",
        "UPDATE sessions SET tags = '[\"last words\"]', updated_at = updated_at + 1",
    ] {
        connection.execute_unprepared(sql).await.expect(sql);
    }
    assert_eq!(list.event("l").await["externalId"], "s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_quick_changes_end_in_the_last_one() {
    const SESSIONS: usize = 20;
    const CHANGES: usize = 100;
    let pair = Pair::start().await;
    let mut list = pair.watch(json!({})).await;
    for number in 0..SESSIONS {
        pair.a.create(json!({"externalId": format!("s{number}")})).await;
    }
    let changes = (0..SESSIONS).map(|number| {
        let pair = &pair;
        async move {
            for change in 0..CHANGES {
                pair.tag(&format!("s{number}"), &format!("t{change}")).await;
            }
        }
    });
    let seen = async {
        let mut seen = HashSet::new();
        while seen.len() < SESSIONS {
            let event = list.event("l").await;
            if event["tags"] == json!([format!("t{}", CHANGES - 1)]) {
                seen.insert(event["externalId"].as_str().expect("a name").to_owned());
            }
        }
        seen
    };
    let (seen, _) = tokio::join!(seen, futures_util::future::join_all(changes));
    assert_eq!(seen.len(), SESSIONS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_revoked_anywhere_ends_the_streams_of_every_replica() {
    let pair = Pair::start().await;
    let control = sessiond::server::Control {
        store: std::sync::Arc::new(
            sessiond::store::metadata::SqlMetadata::open(&pair.database.url, Default::default())
                .await
                .expect("opens"),
        ),
        vault: std::sync::Arc::new(
            sessiond::auth::vault::Vault::new(&MASTER_KEY.to_owned().into()).expect("a vault"),
        ),
        clock: std::sync::Arc::new(pair.a.clock.clone()),
    };
    let (environment, _) = control.default_environment(None).await.expect("the environment");
    let key = control.keys().create(&environment, "short-lived", None, None).await.expect("a key");
    let bearer = secrecy::ExposeSecret::expose_secret(&key.secret).to_owned();
    let mut sockets = Vec::new();
    for server in [&pair.a, &pair.b] {
        let mut socket = Socket::open(&format!("{}/graphql", server.url), &[]).await.expect("accepted");
        socket.init(Some(&bearer)).await;
        socket.subscribe("l", LIST, json!({})).await;
        socket.silent().await;
        sockets.push(socket);
    }
    control.keys().revoke(&environment.id, &key.key.id).await.expect("revoked");
    for mut socket in sockets {
        assert_eq!(socket.closed().await.0, 4403);
    }
}
