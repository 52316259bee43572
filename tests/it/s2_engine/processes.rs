//! Real processes: two servers on one Postgres and one s2-lite, killed whenever it hurts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures_util::stream::FuturesUnordered;
use reqwest::{Method, RequestBuilder, Response};
use sea_orm::{ConnectionTrait, Statement, TransactionTrait};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::sync::Notify;

use super::*;
use crate::harness::Process;
use crate::harness::database::TestDatabase;
use crate::harness::server::KEY;
use crate::harness::sse::SseReader;

const MASTER_KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const ROUNDS: usize = 4;
/// Acks of one round after which a server is killed.
const ACKS: usize = 150;

/// Where replicas keep everything.
struct Stores {
    database: TestDatabase,
    basin: String,
    data: TempDir,
}

impl Stores {
    async fn fresh() -> Self {
        let data = tempfile::tempdir().expect("a folder");
        Self { database: TestDatabase::postgres().await, basin: fresh_basin(), data }
    }

    async fn replica(&self, name: &str) -> Process {
        let mut command = Command::new(Process::binary());
        command
            .env("SESSIOND_METADATA__URL", &self.database.url)
            .env("SESSIOND_METADATA__CONNECTIONS", "4")
            .env("SESSIOND_AUTH__MASTER_KEY", MASTER_KEY)
            .env("SESSIOND_LOG__URL", format!("s2://{}", self.basin))
            .env("SESSIOND_LOG__ENDPOINT", endpoint());
        Process::start(&mut command, &self.data.path().join(name)).await
    }
}

fn request(url: &str, method: Method, path: &str) -> RequestBuilder {
    reqwest::Client::new().request(method, format!("{url}{path}")).bearer_auth(KEY)
}

async fn answer(request: RequestBuilder) -> (u16, Value) {
    let response = request.send().await.expect("an answer");
    (response.status().as_u16(), response.json().await.expect("whole JSON"))
}

async fn create(url: &str, external_id: &str) -> String {
    let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": external_id});
    let (status, created) = answer(request(url, Method::POST, "/api/v1/sessions").json(&body)).await;
    assert!(matches!(status, 200 | 201), "{created}");
    created["id"].as_str().expect("an id").to_owned()
}

async fn append(url: &str, session: &str, io: &str, part_id: &str, body: &str) -> (u16, Value) {
    let path = format!("/realtime/v1/sessions/{session}/{io}/append");
    answer(request(url, Method::POST, &path).header("X-Part-Id", part_id).body(body.to_owned())).await
}

async fn close(url: &str, session: &str) -> (u16, Value) {
    let path = format!("/api/v1/sessions/{session}/close");
    answer(request(url, Method::POST, &path).json(&json!({"reason": "done"}))).await
}

async fn listed(url: &str, status: &str) -> Vec<String> {
    let path = format!("/api/v1/sessions?filter[status]={status}");
    let (code, list) = answer(request(url, Method::GET, &path)).await;
    assert_eq!(code, 200, "{list}");
    let rows = list["data"].as_array().expect("rows");
    rows.iter().map(|row| row["externalId"].as_str().expect("a name").to_owned()).collect()
}

async fn follow(url: &str, session: &str, io: &str, after: Option<u64>) -> reqwest::Result<Response> {
    let path = format!("/realtime/v1/sessions/{session}/{io}");
    let mut request = request(url, Method::GET, &path);
    if let Some(after) = after {
        request = request.header("Last-Event-ID", after.to_string());
    }
    request.send().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_are_one_server_in_writing_following_and_closing() {
    let stores = Stores::fresh().await;
    let (a, b) = (stores.replica("a").await, stores.replica("b").await);
    create(&a.url, "both").await;
    let mut through_b = SseReader::new(follow(&b.url, "both", "in", None).await.expect("an answer")).ok();
    for (number, url) in [&a.url, &b.url, &a.url].into_iter().enumerate() {
        let (status, ack) = append(url, "both", "in", &format!("p{number}"), &format!("body {number}")).await;
        assert_eq!((status, &ack["seq"]), (200, &json!(number)), "{ack}");
    }
    let (status, again) = append(&b.url, "both", "in", "p0", "body 0").await;
    assert_eq!((status, &again["seq"]), (200, &json!(0)));
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let event = through_b.next().await.expect("an event");
        if event.name == "batch" {
            seen.extend(event.records().into_iter().map(|(seq, _)| seq));
        }
    }
    assert_eq!(seen, [0, 1, 2]);
    let (status, closed) = close(&a.url, "both").await;
    assert_eq!(status, 200, "{closed}");
    let (status, refused) = append(&b.url, "both", "in", "late", "late").await;
    assert_eq!((status, &refused["code"]), (409, &json!("session_closed")), "{refused}");
    assert_eq!(refused["closedAt"], closed["closedAt"]);
    let mut last = String::new();
    while let Ok(event) = through_b.next().await {
        last = event.data;
    }
    assert_eq!(last, "[DONE]");
    assert_eq!(listed(&b.url, "CLOSED").await, ["both"]);
    let (_, again) = close(&b.url, "both").await;
    assert_eq!(again["closedAt"], closed["closedAt"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_between_seal_and_row_a_retry_and_the_list_agree() {
    let stores = Stores::fresh().await;
    let (a, b) = (stores.replica("a").await, stores.replica("b").await);
    let direct = open(&endpoint(), &stores.basin).await;
    let connection = stores.database.connect().await;
    let mut ids = Vec::new();
    for name in ["retried", "restarted"] {
        let id = create(&a.url, name).await;
        append(&a.url, name, "in", "p", "x").await;
        ids.push(id);
    }
    // Their rows can be read and not written: a close stops behind its seal.
    let transaction = connection.begin().await.expect("begins");
    let backend = connection.get_database_backend();
    let lock = Statement::from_string(backend, "SELECT id FROM sessions FOR UPDATE");
    assert_eq!(transaction.query_all_raw(lock).await.expect("locks").len(), 2);
    let mut closes = Vec::new();
    for (name, id) in ["retried", "restarted"].into_iter().zip(&ids) {
        let url = a.url.clone();
        closes.push(tokio::spawn(async move {
            request(&url, Method::POST, &format!("/api/v1/sessions/{name}/close"))
                .json(&json!({}))
                .send()
                .await
        }));
        let key = ChannelKey::main(SessionId::from_stored(id), Direction::In);
        Follower::of(&direct, &key).await.drain().await;
    }
    a.kill().await;
    for close in closes {
        assert!(close.await.expect("ends").is_err(), "nobody may have been told that it is closed");
    }
    transaction.rollback().await.expect("unlocks");
    assert_eq!(direct.unsettled().await.expect("lists").len(), 2);
    let (status, closed) = close(&b.url, "retried").await;
    assert_eq!(status, 200, "{closed}");
    assert_eq!(closed["closedReason"], Value::Null, "the first close holds, and it gave no reason");
    assert!(listed(&b.url, "CLOSED").await.contains(&"retried".to_owned()));
    let restarted = stores.replica("a").await;
    assert_eq!(listed(&b.url, "CLOSED").await.len(), 2, "a start finishes what it finds");
    let (status, _) = append(&restarted.url, "restarted", "in", "late", "late").await;
    assert_eq!(status, 409);
    assert!(direct.unsettled().await.expect("lists").is_empty());
}

/// The data of every record of a channel.
async fn data(url: &str, session: &str, io: &str) -> Vec<Value> {
    let path = format!("/realtime/v1/sessions/{session}/{io}/records");
    let (status, page) = answer(request(url, Method::GET, &path)).await;
    assert_eq!(status, 200, "{page}");
    let records = page["records"].as_array().expect("records");
    records.iter().map(|record| record["data"].clone()).collect()
}

/// Checks that the close of a session is told once on each main channel, or on none if it is not made.
async fn told_once_or_not_made(url: &str, session: &str, may_be_open: bool) {
    let (status, row) = answer(request(url, Method::GET, &format!("/api/v1/sessions/{session}"))).await;
    assert_eq!(status, 200, "{row}");
    let close = json!({"kind": "message", "payload": {"trigger": "close"}}).to_string();
    let [input, output] = [data(url, session, "in").await, data(url, session, "out").await];
    if row["closedAt"].is_null() {
        assert!(may_be_open, "{session} was closed");
        assert_eq!((input, output.len()), (vec![json!("first")], 0), "{session}");
    } else {
        assert_eq!((input, output.len()), (vec![json!("first"), json!(close)], 1), "{session}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_that_kill_9_meets_is_told_once_or_not_made() {
    const CLOSES: usize = 32;
    let stores = Stores::fresh().await;
    let (a, b) = (stores.replica("a").await, stores.replica("b").await);
    let sessions: Vec<String> = (0..CLOSES).map(|index| format!("close-{index}")).collect();
    for session in &sessions {
        create(&a.url, session).await;
        assert_eq!(append(&a.url, session, "in", "first", "first").await.0, 200);
    }
    // All at once, so that some are at every step whenever it is killed.
    let closes = sessions.iter().map(|session| {
        let path = format!("/api/v1/sessions/{session}/close");
        let sent = request(&a.url, Method::POST, &path).json(&json!({"reason": "done"})).send();
        let session = session.clone();
        tokio::spawn(async move { (session, sent.await.is_ok_and(|answer| answer.status() == 200)) })
    });
    let mut closes: FuturesUnordered<_> = closes.collect();
    let mut acked = HashSet::new();
    while acked.len() < CLOSES / 4 {
        let (session, done) = closes.next().await.expect("closes enough").expect("a close");
        assert!(done, "before it was killed");
        acked.insert(session);
    }
    a.kill().await;
    while let Some(closed) = closes.next().await {
        let (session, done) = closed.expect("a close");
        if done {
            acked.insert(session);
        }
    }
    assert!(acked.len() < CLOSES, "some were on their way");

    // A start finishes what it finds, and so may the other one, beside it, whatever each of them meets.
    let a = stores.replica("a").await;
    for session in &sessions {
        told_once_or_not_made(&b.url, session, !acked.contains(session)).await;
    }
    for session in &sessions {
        let (one, other) = tokio::join!(close(&a.url, session), close(&b.url, session));
        assert_eq!((one.0, other.0), (200, 200), "{one:?} {other:?}");
        told_once_or_not_made(&a.url, session, false).await;
    }
}

/// The servers that writers and followers may use, by turns.
struct Servers(Mutex<[String; 2]>);

impl Servers {
    fn url(&self, turn: usize) -> String {
        self.0.lock().expect("no panic")[turn % 2].clone()
    }

    fn moved(&self, index: usize, url: &str) {
        self.0.lock().expect("no panic")[index] = url.to_owned();
    }
}

/// How far the test has come.
#[derive(Default)]
struct Progress {
    acked: AtomicUsize,
    more: Notify,
    stop: AtomicBool,
}

impl Progress {
    async fn acks(&self, by: usize) {
        let goal = self.acked.load(Ordering::SeqCst) + by;
        while self.acked.load(Ordering::SeqCst) < goal {
            self.more.notified().await;
        }
    }
}

/// Appends until told to stop, each body with its part id and again through the next server until it is taken.
async fn write(servers: Arc<Servers>, name: usize, progress: Arc<Progress>) -> BTreeMap<u64, String> {
    let client = reqwest::Client::new();
    let (mut acked, mut turn) = (BTreeMap::new(), name);
    for number in 0.. {
        let body = format!("writer {name} {number}");
        loop {
            let url = format!("{}/realtime/v1/sessions/killed/in/append", servers.url(turn));
            let sent =
                client.post(url).bearer_auth(KEY).header("X-Part-Id", &body).body(body.clone()).send().await;
            if let Ok(response) = sent
                && response.status() == 200
                && let Ok(ack) = response.json::<Value>().await
            {
                let seq = ack["seq"].as_u64().expect("a number");
                assert!(acked.last_key_value().is_none_or(|(last, _)| *last < seq), "{body} was reordered");
                acked.insert(seq, body);
                progress.acked.fetch_add(1, Ordering::SeqCst);
                progress.more.notify_one();
                break;
            }
            turn += 1;
        }
        if progress.stop.load(Ordering::SeqCst) {
            return acked;
        }
    }
    unreachable!("counts for ever")
}

/// Follows through whichever server is there, resuming behind what it has, until the session is closed.
async fn follow_through(servers: Arc<Servers>, mut turn: usize) -> Vec<(u64, String)> {
    let mut seen: Vec<(u64, String)> = Vec::new();
    loop {
        let after = seen.last().map(|(seq, _)| *seq);
        turn += 1;
        let Ok(response) = follow(&servers.url(turn), "killed", "in", after).await else { continue };
        if response.status() != 200 {
            continue;
        }
        let mut reader = SseReader::new(response);
        while let Ok(event) = reader.next().await {
            if event.data == "[DONE]" {
                return seen;
            }
            if event.name == "batch" {
                seen.extend(event.records().into_iter().map(|(seq, record)| {
                    let body: Value =
                        serde_json::from_str(record["body"].as_str().expect("text")).expect("JSON");
                    (seq, body["data"].as_str().expect("text").to_owned())
                }));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_process_may_be_killed_at_any_time() {
    let stores = Stores::fresh().await;
    let mut running = [Some(stores.replica("a").await), Some(stores.replica("b").await)];
    let urls = [0, 1].map(|index: usize| running[index].as_ref().expect("runs").url.clone());
    create(&urls[0], "killed").await;
    let (servers, progress) = (Arc::new(Servers(Mutex::new(urls))), Arc::new(Progress::default()));
    let writers: Vec<_> =
        (0..6).map(|name| tokio::spawn(write(servers.clone(), name, progress.clone()))).collect();
    let followers: Vec<_> = (0..2).map(|turn| tokio::spawn(follow_through(servers.clone(), turn))).collect();
    for round in 0..ROUNDS {
        progress.acks(ACKS).await;
        let index = round % 2;
        running[index].take().expect("runs").kill().await;
        progress.acks(ACKS).await;
        let name = ["a", "b"][index];
        let back = stores.replica(name).await;
        servers.moved(index, &back.url);
        running[index] = Some(back);
    }
    progress.acks(ACKS).await;
    progress.stop.store(true, Ordering::SeqCst);
    let mut acked = BTreeMap::new();
    for writer in writers {
        acked.extend(writer.await.expect("writes"));
    }
    close(&servers.url(1), "killed").await;
    let told: Vec<(u64, String)> = acked.into_iter().collect();
    let mut times: HashMap<&str, usize> = HashMap::new();
    told.iter().for_each(|(_, body)| *times.entry(body).or_default() += 1);
    assert!(times.values().all(|times| *times == 1));
    for follower in followers {
        let mut seen = follower.await.expect("follows");
        let (last, close) = seen.pop().expect("what tells of the close");
        assert!(last == told.len() as u64 && close.contains("\"trigger\":\"close\""), "{close}");
        // Every append was answered in the end, so what is stored is exactly what was acknowledged.
        assert_eq!(seen, told);
    }
    assert_eq!(told.last().map(|(seq, _)| *seq + 1), Some(told.len() as u64));
}
