//! What survives: kill -9 under load, a disk that fails, a second process, a stranger's log.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::sync::Notify;

use crate::harness::Process;
use crate::harness::server::KEY;

const SESSIONS: usize = 4;
const WRITERS_PER_SESSION: usize = 4;
const ROUNDS: usize = 6;
/// Acks of one round after which the process is killed.
const ACKS_PER_ROUND: usize = 400;

struct Client {
    http: reqwest::Client,
    url: String,
}

impl Client {
    fn new(process: &Process) -> Self {
        Self { http: reqwest::Client::new(), url: process.url.clone() }
    }

    async fn create(&self, external_id: &str) {
        let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": external_id});
        let request = self.http.post(format!("{}/api/v1/sessions", self.url)).bearer_auth(KEY).json(&body);
        assert!(request.send().await.expect("an answer").status().is_success());
    }

    /// The status and the body of an append; `None` if the connection broke.
    async fn append(&self, session: &str, part_id: &str, body: &str) -> Option<(u16, Value)> {
        let url = format!("{}/realtime/v1/sessions/{session}/in/append", self.url);
        let request = self.http.post(url).bearer_auth(KEY).header("X-Part-Id", part_id).body(body.to_owned());
        let response = request.send().await.ok()?;
        let status = response.status().as_u16();
        Some((status, response.json().await.ok()?))
    }

    async fn records(&self, session: &str, io: &str) -> Vec<Value> {
        let url = format!("{}/realtime/v1/sessions/{session}/{io}/records", self.url);
        let response = self.http.get(url).bearer_auth(KEY).send().await.expect("an answer");
        let body: Value = response.json().await.expect("whole JSON");
        body["records"].as_array().expect("records").clone()
    }

    async fn ready(&self) -> u16 {
        self.asked("/readyz").await.0
    }

    /// The status and the body of one of the operator's routes.
    async fn asked(&self, path: &str) -> (u16, Value) {
        let response = self.http.get(format!("{}{path}", self.url)).send().await.expect("an answer");
        (response.status().as_u16(), response.json().await.expect("JSON"))
    }

    /// Checks that both routes say that only a restart helps.
    async fn needs_a_restart(&self) {
        for path in ["/healthz", "/readyz"] {
            let (status, body) = self.asked(path).await;
            let cure = body["cure"].as_str().unwrap_or_default();
            assert!(status == 503 && cure.starts_with("restart the server"), "{path}: {status} {body}");
            assert!(body["cause"].as_str().is_some_and(|cause| cause.contains("log")), "{path}: {body}");
        }
    }
}

/// What the writers of one session were told.
#[derive(Default)]
struct Told {
    /// Body by sequence number.
    acked: BTreeMap<u64, String>,
    /// Part ids whose append was never answered, with their bodies.
    unanswered: HashMap<String, String>,
}

async fn write_until_killed(client: Arc<Client>, session: String, count: Arc<AtomicU64>, acks: Acks) -> Told {
    let mut told = Told::default();
    loop {
        let number = count.fetch_add(1, Ordering::Relaxed);
        let (part_id, body) =
            (format!("part-{session}-{number}"), format!("body {number} {}", "x".repeat(200)));
        match client.append(&session, &part_id, &body).await {
            Some((200, answer)) => {
                told.acked.insert(answer["seq"].as_u64().expect("a number"), body);
                acks.one_more();
            }
            Some((status, answer)) => panic!("{status}: {answer}"),
            None => {
                told.unanswered.insert(part_id, body);
                return told;
            }
        }
    }
}

/// Says when enough has been acknowledged.
#[derive(Clone, Default)]
struct Acks(Arc<(AtomicUsize, Notify)>);

impl Acks {
    fn one_more(&self) {
        if self.0.0.fetch_add(1, Ordering::Relaxed) + 1 == ACKS_PER_ROUND {
            self.0.1.notify_one();
        }
    }

    async fn enough(&self) {
        self.0.1.notified().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_acknowledged_record_survives_kill_9_under_load_and_no_retry_doubles_one() {
    let data = tempfile::tempdir().expect("a folder");
    let sessions: Vec<String> = (0..SESSIONS).map(|index| format!("kill-{index}")).collect();
    let count = Arc::new(AtomicU64::new(0));
    let mut acked: HashMap<String, BTreeMap<u64, String>> = HashMap::new();
    for round in 0..ROUNDS {
        let process = Process::serve(data.path()).await;
        let client = Arc::new(Client::new(&process));
        for session in &sessions {
            client.create(session).await;
        }
        let acks = Acks::default();
        let writers: Vec<_> = sessions
            .iter()
            .flat_map(|session| std::iter::repeat_n(session.clone(), WRITERS_PER_SESSION))
            .map(|session| {
                let writing =
                    write_until_killed(client.clone(), session.clone(), count.clone(), acks.clone());
                (session, tokio::spawn(writing))
            })
            .collect();
        acks.enough().await;
        process.kill().await;
        let mut unanswered = Vec::new();
        for (session, writer) in writers {
            let told = writer.await.expect("the writer");
            acked.entry(session.clone()).or_default().extend(told.acked);
            unanswered.extend(told.unanswered.into_iter().map(|(part, body)| (session.clone(), part, body)));
        }
        assert!(!unanswered.is_empty(), "round {round}: nobody was writing when it was killed");

        let process = Process::serve(data.path()).await;
        let client = Client::new(&process);
        for (session, part_id, body) in &unanswered {
            let (status, answer) = client.append(session, part_id, body).await.expect("an answer");
            assert_eq!(status, 200, "{answer}");
            let seq = answer["seq"].as_u64().expect("a number");
            acked.entry(session.clone()).or_default().insert(seq, body.clone());
        }
        for session in &sessions {
            check(&client.records(session, "in").await, &acked[session], round);
        }
        process.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_that_kill_9_meets_is_told_once_or_not_made() {
    const CLOSES: usize = 96;
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let client = Client::new(&process);
    let sessions: Vec<String> = (0..CLOSES).map(|index| format!("close-{index}")).collect();
    for session in &sessions {
        client.create(session).await;
        assert_eq!(client.append(session, "first", "first").await.expect("an answer").0, 200);
    }
    // All at once, so that some are on their way whenever it is killed.
    let closes = sessions.iter().map(|session| {
        let close = format!("{}/api/v1/sessions/{session}/close", client.url);
        let request = client.http.post(close).bearer_auth(KEY).json(&json!({"reason": "done"}));
        let session = session.clone();
        tokio::spawn(
            async move { (session, request.send().await.is_ok_and(|answer| answer.status() == 200)) },
        )
    });
    let mut closes: FuturesUnordered<_> = closes.collect();
    let mut acked = HashSet::new();
    while acked.len() < CLOSES / 4 {
        let (session, done) = closes.next().await.expect("closes enough").expect("a close");
        assert!(done, "before it was killed");
        acked.insert(session);
    }
    process.kill().await;
    while let Some(closed) = closes.next().await {
        let (session, done) = closed.expect("a close");
        if done {
            acked.insert(session);
        }
    }

    let process = Process::serve(data.path()).await;
    let client = Client::new(&process);
    let close = json!({"kind": "message", "payload": {"trigger": "close"}}).to_string();
    for session in &sessions {
        let row = format!("{}/api/v1/sessions/{session}", client.url);
        let row: Value = client
            .http
            .get(row)
            .bearer_auth(KEY)
            .send()
            .await
            .expect("an answer")
            .json()
            .await
            .expect("JSON");
        let closed = !row["closedAt"].is_null();
        assert!(closed || !acked.contains(session), "{session} was closed");
        let [input, output] = [client.records(session, "in").await, client.records(session, "out").await];
        let told: Vec<_> = input.iter().map(|record| record["data"].as_str().expect("text")).collect();
        if closed {
            assert_eq!((told, output.len()), (vec!["first", &close], 1), "{session}");
        } else {
            assert_eq!((told, output.len()), (vec!["first"], 0), "{session}");
        }
    }
}

/// Exactly the acknowledged records, each once, each whole, without a gap.
fn check(records: &[Value], acked: &BTreeMap<u64, String>, round: usize) {
    assert_eq!(records.len(), acked.len(), "round {round}");
    for (index, record) in records.iter().enumerate() {
        let seq = record["seqNum"].as_u64().expect("a number");
        assert_eq!(seq, index as u64, "round {round}: a gap");
        let body = acked.get(&seq).unwrap_or_else(|| panic!("round {round}: {seq} was never acknowledged"));
        assert_eq!(record["data"].as_str(), Some(body.as_str()), "round {round}: record {seq}");
    }
}

/// Acks in a trace whose record was not synced in between, by their marker.
///
/// A line of the trace is one system call as it ended, or its two halves when another thread's came in between.
fn unsynced_acks(trace: &str, markers: &[String]) -> Vec<String> {
    let lines: Vec<&str> = trace.lines().collect();
    let find = |from: usize, wanted: &dyn Fn(&str) -> bool| {
        lines.iter().enumerate().skip(from).find(|(_, line)| wanted(line)).map(|(index, _)| index)
    };
    let is_sync_begin = |line: &str| line.contains(" fdatasync(") && !line.contains("INJECTED");
    let mut missing = Vec::new();
    let mut from = 0;
    for marker in markers {
        let received = find(from, &|line| is_receive(line) && line.contains(marker)).expect("the request");
        let acked = find(received, &|line| is_send(line) && line.contains("HTTP/1.1 200")).expect("the ack");
        let synced = lines[received..acked].iter().enumerate().any(|(offset, line)| {
            is_sync_begin(line) && {
                let thread = line.split_whitespace().next().unwrap_or_default();
                line.ends_with("= 0")
                    || lines[received + offset..acked].iter().any(|later| {
                        later.starts_with(thread)
                            && later.contains("fdatasync resumed")
                            && later.ends_with("= 0")
                    })
            }
        });
        if !synced {
            missing.push(marker.clone());
        }
        from = acked;
    }
    missing
}

fn is_receive(line: &str) -> bool {
    line.contains(" recvfrom(") || line.contains("recvfrom resumed") || line.contains(" read(")
}

fn is_send(line: &str) -> bool {
    ["sendto(", "sendmsg(", "writev(", "write("].iter().any(|call| line.contains(call))
}

/// Appends one record after another under strace and says which acks came without a sync.
async fn trace_appends(injection: Option<&str>) -> Vec<String> {
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("trace");
    let mut command = Command::new("strace");
    // What is not traced runs at full speed.
    command.args([
        "-f",
        "--seccomp-bpf",
        "-s",
        "2000",
        "-e",
        "trace=fdatasync,recvfrom,read,sendto,sendmsg,write,writev",
    ]);
    if let Some(injection) = injection {
        command.args(["-e", injection]);
    }
    command.arg("-o").arg(&trace).arg(Process::binary()).stderr(Stdio::null());
    let process = Process::start(&mut command, &folder.path().join("data")).await;
    let client = Client::new(&process);
    client.create("traced").await;
    let markers: Vec<String> = (0..20).map(|index| format!("marker-{index}-end")).collect();
    for marker in &markers {
        let (status, answer) = client.append("traced", marker, marker).await.expect("an answer");
        assert_eq!(status, 200, "{answer}");
    }
    process.terminate_traced().await;
    unsynced_acks(&std::fs::read_to_string(&trace).expect("a trace"), &markers)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_ack_is_written_to_the_socket_after_its_fdatasync() {
    assert_eq!(trace_appends(None).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_trace_of_a_server_whose_syncs_are_taken_out_fails_the_check() {
    let missing = trace_appends(Some("inject=fdatasync:retval=0")).await;
    assert_eq!(missing.len(), 20, "every ack must be found out");
}

/// Makes one kind of write fail on a running server, and checks that nothing is acknowledged from then on.
async fn fails_closed(break_it: impl AsyncFnOnce(&Process) -> Option<tokio::process::Child>) {
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let client = Client::new(&process);
    client.create("broken").await;
    let (status, _) = client.append("broken", "before", "before").await.expect("an answer");
    assert_eq!((status, client.ready().await), (200, 200));
    assert_eq!(client.asked("/healthz").await.0, 200);

    let breaker = break_it(&process).await;
    // Longer than what still fits, and not compressible.
    let big: String = (0..4000).map(|_| uuid::Uuid::new_v4().simple().to_string()).collect();
    let (status, answer) = client.append("broken", "during", &big).await.expect("an answer");
    assert_eq!((status, &answer["code"]), (503, &json!("unavailable")), "{answer}");
    if let Some(mut breaker) = breaker {
        breaker.kill().await.expect("killed");
    }
    let (status, answer) = client.append("broken", "after", "after").await.expect("an answer");
    assert_eq!(status, 503, "a poisoned log takes nothing until a restart: {answer}");
    client.needs_a_restart().await;
    assert_eq!(client.records("broken", "in").await.len(), 1, "what was durable stays readable");
    process.kill().await;

    let process = Process::serve(data.path()).await;
    let client = Client::new(&process);
    let (status, _) = client.append("broken", "again", "again").await.expect("an answer");
    assert_eq!((status, client.ready().await), (200, 200));
    let bodies: Vec<_> =
        client.records("broken", "in").await.iter().map(|record| record["data"].clone()).collect();
    assert_eq!(bodies.first(), Some(&json!("before")));
    assert_eq!(bodies.last(), Some(&json!("again")));
    process.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_fails_the_append_and_poisons_the_log() {
    fails_closed(async |process| {
        let limit = Command::new("prlimit")
            .args(["--pid", &process.id().to_string(), "--fsize=4096"])
            .status()
            .await
            .expect("prlimit");
        assert!(limit.success());
        None
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_that_fails_fails_the_append_and_poisons_the_log() {
    fails_closed(async |process| Some(process.inject("fdatasync:error=EIO").await)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_behind_the_appends_shows_without_another_one() {
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let client = Client::new(&process);
    client.create("broken").await;
    // The engine's own threads need files; those who append do not.
    let _breaker = process.inject("openat:error=EMFILE").await;
    let big: String = (0..28_000).map(|_| uuid::Uuid::new_v4().simple().to_string()).collect();
    for number in 0..22 {
        let (status, answer) = client.append("broken", &number.to_string(), &big).await.expect("an answer");
        assert!(status == 200 || number > 15, "{number}: {status} {answer}");
    }
    let noticed = async {
        while client.asked("/healthz").await.0 == 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), noticed).await.expect("it shows without another append");
    client.needs_a_restart().await;
    process.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_without_room_is_for_the_operator_and_needs_no_restart() {
    let data = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(Process::binary());
    // More than any disk has.
    command.env("SESSIOND_LOG__DISK_RESERVE_MIB", "1000000000000");
    let process = Process::start(&mut command, data.path()).await;
    let client = Client::new(&process);
    client.create("full").await;
    let (status, answer) = client.append("full", "p", "refused").await.expect("an answer");
    assert_eq!((status, &answer["code"]), (503, &json!("unavailable")), "{answer}");
    assert_eq!(client.asked("/healthz").await.0, 200);
    let (status, body) = client.asked("/readyz").await;
    assert!(status == 503 && body["cause"].as_str().is_some_and(|cause| cause.contains("full")), "{body}");
    assert!(body["cure"].as_str().is_some_and(|cure| cure.contains("make room")), "{body}");
    assert!(client.records("full", "in").await.is_empty());
    let close = format!("{}/api/v1/sessions/full/close", client.url);
    let closed = client.http.post(close).bearer_auth(KEY).json(&json!({})).send().await.expect("an answer");
    assert_eq!(closed.status(), 200, "closing takes next to none");
    assert!(process.terminate().await.success());
}

async fn start_fails(data: &Path) -> String {
    let output = Command::new(Process::binary())
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(data)
        .env("SESSIOND_SECRET_KEY", KEY)
        .kill_on_drop(true)
        .output();
    let output = output.await.expect("the binary runs");
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_on_the_same_folder_is_refused_and_the_first_goes_on() {
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let refusal = start_fails(data.path()).await;
    assert!(refusal.contains("another process"), "{refusal}");
    let client = Client::new(&process);
    client.create("alone").await;
    let (status, _) = client.append("alone", "p", "still here").await.expect("an answer");
    assert_eq!(status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_of_another_metadata_store_is_refused() {
    let [ours, theirs] = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
    for data in [&ours, &theirs] {
        assert!(Process::serve(data.path()).await.terminate().await.success());
    }
    let log = |data: &Path| -> PathBuf { data.join("log") };
    std::fs::remove_dir_all(log(ours.path())).expect("removed");
    std::fs::rename(log(theirs.path()), log(ours.path())).expect("moved");
    let refusal = start_fails(ours.path()).await;
    assert!(refusal.contains("belongs to another metadata store"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_ends_within_its_deadline_and_breaks_followers_instead_of_ending_them() {
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let client = Client::new(&process);
    client.create("stopped").await;
    client.append("stopped", "p", "one").await.expect("an answer");
    let url = format!("{}/realtime/v1/sessions/stopped/in", process.url);
    let response = client.http.get(url).bearer_auth(KEY).send().await.expect("an answer");
    let mut follower = crate::harness::SseReader::new(response).ok();
    follower.records(1).await;
    let (status, (events, end)) = tokio::join!(process.terminate(), follower.rest());
    assert!(status.success());
    assert_eq!(events.iter().map(|event| event.name.as_str()).collect::<Vec<_>>(), ["error"]);
    assert_eq!(end, crate::harness::sse::End::Broken);
}
