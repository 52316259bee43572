//! The command line against a real server process.

use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

use crate::harness::Process;
use crate::harness::proxy::Relay;
use crate::harness::server::KEY;

/// Longest that a refusal takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn command(data: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(Process::binary());
    command.arg("--data").arg(data).args(args).kill_on_drop(true);
    command
}

async fn run(data: &Path, args: &[&str]) -> Result<String, String> {
    let output = command(data, args).output().await.expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// What a server prints until it is ready; then it is killed.
async fn banner(mut serve: Command) -> String {
    let mut child = serve.stdout(Stdio::piped()).spawn().expect("the binary starts");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let mut text = String::new();
    while !text.contains("curl -sN") {
        let line = lines.next_line().await.expect("output").expect("more of it");
        text.push_str(&line);
        text.push('\n');
    }
    child.kill().await.expect("killed");
    text
}

async fn json_of(data: &Path, args: &[&str]) -> Value {
    let text =
        run(data, &[args, &["--json"]].concat()).await.unwrap_or_else(|error| panic!("{args:?}: {error}"));
    serde_json::from_str(&text).expect("JSON")
}

async fn status(process: &Process, bearer: &str) -> u16 {
    let url = format!("{}/api/v1/sessions", process.url);
    reqwest::Client::new().get(url).bearer_auth(bearer).send().await.expect("an answer").status().as_u16()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_change_under_a_running_server_within_a_second() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    let process = Process::serve(data).await;
    let created = json_of(data, &["keys", "create", "--label", "second"]).await;
    let secret = created["secretKey"].as_str().expect("a secret").to_owned();
    assert_eq!(status(&process, &secret).await, 200);
    let listed = run(data, &["keys", "list"]).await.expect("a table");
    assert!(listed.contains("second") && !listed.contains(&secret), "{listed}");

    let id = created["id"].as_str().expect("an id");
    let rotated = json_of(data, &["keys", "rotate", id, "--grace", "1h"]).await;
    let rotated_secret = rotated["secretKey"].as_str().expect("a secret").to_owned();
    assert_eq!((status(&process, &secret).await, status(&process, &rotated_secret).await), (200, 200));

    for (id, secret) in [(id, &secret), (rotated["id"].as_str().expect("an id"), &rotated_secret)] {
        run(data, &["keys", "revoke", id]).await.expect("revoked");
        let revoked = std::time::Instant::now();
        while status(&process, secret).await != 401 {
            // A second is what is promised; the rest is for a machine that runs every test at once.
            assert!(revoked.elapsed() < Duration::from_secs(4), "still let in");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let unknown = run(data, &["keys", "revoke", "key_nobody"]).await.expect_err("refused");
    assert!(unknown.contains("key not found"), "{unknown}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn environments_are_tenants_with_keys_and_tokens_of_their_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    let process = Process::serve(data).await;
    let created = json_of(data, &["environments", "create", "blue", "--kind", "stg"]).await;
    let secret = created["secretKey"].as_str().expect("a secret");
    assert!(secret.starts_with("tr_stg_"));
    assert_eq!(status(&process, secret).await, 200);
    let again = run(data, &["environments", "create", "blue"]).await.expect_err("taken");
    assert!(again.starts_with("sessiond: "), "{again}");
    assert_eq!(json_of(data, &["environments", "list"]).await.as_array().expect("a list").len(), 2);

    let scoped =
        json_of(data, &["keys", "create", "--environment", "blue", "--scope", "read:sessions"]).await;
    assert!(scoped["secretKey"].as_str().expect("a secret").starts_with("tr_stg_sk_"));
    let token =
        run(data, &["token", "--scope", "read:sessions", "--environment", "blue"]).await.expect("a token");
    assert_eq!(status(&process, token.trim()).await, 200);
    let token = run(data, &["token", "--scope", "read:sessions:x"]).await.expect("a token");
    assert_eq!(status(&process, token.trim()).await, 403);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_terminals_hold_a_conversation() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    let process = Process::serve(data).await;
    let client = |args: &[&str]| {
        let mut command = command(data, args);
        command.env("SESSIOND_URL", &process.url);
        command
    };
    let missing = client(&["send", "talk", "hi"]).env("SESSIOND_TOKEN", KEY).output().await.expect("runs");
    assert!(String::from_utf8_lossy(&missing.stderr).contains("404"));
    let sent = client(&["send", "talk", r#"{"text":"hi"}"#, "--create"]).output().await.expect("runs");
    assert_eq!(String::from_utf8_lossy(&sent.stdout), "0\n", "{}", String::from_utf8_lossy(&sent.stderr));

    let mut tail = client(&["tail", "talk", "in"]).stdout(Stdio::piped()).spawn().expect("runs");
    let mut lines = BufReader::new(tail.stdout.take().expect("a pipe")).lines();
    assert_eq!(lines.next_line().await.expect("output").as_deref(), Some(r#"{"text":"hi"}"#));
    let sent = client(&["send", "talk", "live"]).output().await.expect("runs");
    assert!(sent.status.success());
    assert_eq!(lines.next_line().await.expect("output").as_deref(), Some("live"));

    let answer =
        client(&["send", "talk", "from the agent", "--io", "out", "--json"]).output().await.expect("runs");
    let answer: Value = serde_json::from_slice(&answer.stdout).expect("JSON");
    assert_eq!(answer, json!({"ok": true, "seq": 0}));
    let close = format!("{}/api/v1/sessions/talk/close", process.url);
    reqwest::Client::new().post(close).bearer_auth(KEY).json(&json!({})).send().await.expect("an answer");
    let told = lines.next_line().await.expect("output");
    assert_eq!(told.as_deref(), Some(r#"{"kind":"message","payload":{"trigger":"close"}}"#));
    assert_eq!(lines.next_line().await.expect("output"), None);
    assert!(tail.wait().await.expect("a status").success());
    let resumed = client(&["tail", "talk", "in", "--after", "0", "--json"]).output().await.expect("runs");
    let numbers = resumed.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let numbers = numbers.map(|line| serde_json::from_slice::<Value>(line).expect("JSON")["seqNum"].take());
    assert_eq!(numbers.collect::<Vec<_>>(), [1, 2]);
    let ahead = client(&["tail", "talk", "in", "--after", "99"]).output().await.expect("runs");
    let said = String::from_utf8_lossy(&ahead.stderr);
    assert!(said.starts_with("the channel ends before --after 99; going on at record "), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_goes_on_where_it_was_when_the_server_is_back_and_ends_quietly_when_nobody_reads() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    let process = Process::serve(data).await;
    let url = process.url.clone();
    let client = |args: &[&str]| {
        let mut command = command(data, args);
        command.env("SESSIOND_URL", &url);
        command
    };
    let send = async |text: &str| {
        let sent = client(&["send", "talk", text, "--create"]).output().await.expect("runs");
        assert!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    };
    send("one").await;
    let mut tail =
        client(&["tail", "talk", "in"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runs");
    let mut lines = BufReader::new(tail.stdout.take().expect("a pipe")).lines();
    let mut said = BufReader::new(tail.stderr.take().expect("a pipe")).lines();
    assert_eq!(lines.next_line().await.expect("output").as_deref(), Some("one"));
    process.kill().await;
    let lost = said.next_line().await.expect("output").expect("a line");
    assert!(lost.ends_with("going on --after 0"), "{lost}");
    let address = url.strip_prefix("http://").expect("an address");
    let process = Process::serve_at(data, address).await;
    send("two").await;
    assert_eq!(lines.next_line().await.expect("output").as_deref(), Some("two"));

    // As `tail | head -1` leaves it.
    drop(lines);
    send("three").await;
    assert!(tail.wait().await.expect("a status").success());
    while let Some(line) = said.next_line().await.expect("output") {
        assert!(!line.contains("panicked"), "{line}");
    }
    drop(process);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_from_the_latest_record_on_misses_nothing_over_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    let process = Process::serve(data).await;
    let send = async |url: &str, text: &str| {
        let mut send = command(data, &["send", "talk", text, "--create"]);
        let sent = send.env("SESSIOND_URL", url).output().await.expect("runs");
        assert!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    };
    send(&process.url, "before").await;
    let mut relay = Relay::to(&process.url).await;
    let mut tail = command(data, &["tail", "talk", "in", "--latest"]);
    tail.env("SESSIOND_URL", &relay.url).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut tail = tail.spawn().expect("runs");
    let mut lines = BufReader::new(tail.stdout.take().expect("a pipe")).lines();
    let mut said = BufReader::new(tail.stderr.take().expect("a pipe")).lines();
    relay.said("event: ping").await;
    process.kill().await;
    let lost = said.next_line().await.expect("output").expect("a line");
    assert!(lost.ends_with("going on --after 0"), "{lost}");
    // At another address, which the tail does not find before the record is stored.
    let process = Process::serve(data).await;
    send(&process.url, "meanwhile").await;
    relay.lead_to(&process.url);
    assert_eq!(lines.next_line().await.expect("output").as_deref(), Some("meanwhile"));
}

#[tokio::test]
async fn what_listen_fds_names_is_refused_unless_it_is_one_listening_socket() {
    let folder = tempfile::tempdir().expect("a folder");
    let serve = |pid: &str, count: &str, socket: Stdio| {
        let script = format!(r#"export LISTEN_PID={pid} LISTEN_FDS="$0"; exec "$@" 3<&0"#);
        let mut command = Command::new("sh");
        command.args(["-c", &script, count, Process::binary(), "serve", "--listen", "127.0.0.1:0", "--data"]);
        command.arg(folder.path()).stdin(socket).kill_on_drop(true);
        command
    };
    let refused = async |count: &str, socket: Stdio, sentence: &str| {
        let output = timeout(PATIENCE, serve("$$", count, socket).output()).await;
        let output = output.unwrap_or_else(|_| panic!("{sentence}: it serves")).expect("runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(sentence), "{sentence}: {said}");
    };
    for count in ["one", "-1", "1.5", "99999999999"] {
        let sentence = format!("LISTEN_FDS is \"{count}\", which is no number of sockets");
        refused(count, Stdio::null(), &sentence).await;
    }
    refused("2", Stdio::null(), "LISTEN_FDS names 2 sockets; one is served").await;
    refused("1", Stdio::null(), "LISTEN_FDS names no TCP socket: fd 3 is not a socket").await;
    let datagrams = OwnedFd::from(UdpSocket::bind("127.0.0.1:0").expect("a port"));
    refused("1", datagrams.into(), "LISTEN_FDS names no TCP socket: fd 3 is not a valid tcp socket").await;
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let connection = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    let connection = OwnedFd::from(connection);
    refused("1", connection.into(), "LISTEN_FDS names a TCP socket that does not listen").await;
    let elsewhere = banner(serve("1", "2", Stdio::null())).await;
    assert!(elsewhere.contains("is ready"), "meant for another process: {elsewhere}");
}

#[tokio::test]
async fn settings_come_from_defaults_file_environment_and_flags_in_that_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    let file = data.join("settings.toml");
    std::fs::write(&file, "[http]\nmax_connections = 1\nwrite_timeout = \"1s\"\n[log]\nretention = \"1h\"\n[replication]\nflush_rows = 60\n")
        .expect("written");
    let mut shown = command(data, &["config", "--json", "--config", file.to_str().expect("UTF-8")]);
    shown.env("SESSIOND_HTTP__MAX_CONNECTIONS", "2").env("SESSIOND_SECRET_KEY", "tr_dev_a_secret_to_hide");
    shown.env("SESSIOND_BLOBS__URL", "s3://bucket/prefix").env("SESSIOND_BLOBS__REGION", "here");
    shown
        .env("SESSIOND_BLOBS__ACCESS_KEY", "a_secret_to_hide")
        .env("SESSIOND_BLOBS__SECRET_KEY", "a_secret_to_hide");
    // Those of another system, of which our own count for more.
    shown.env("SESSION_REPLICATION_FLUSH_BATCH_SIZE", "70").env("SESSION_REPLICATION_SLOT_NAME", "theirs");
    shown.env("SESSIOND_REPLICATION__SLOT", "ours").env("SESSION_REPLICATION_ACK_INTERVAL_SECONDS", "10");
    let output = shown.output().await.expect("runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let settings: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(settings["http"]["max_connections"], 2);
    assert_eq!(settings["http"]["write_timeout"], "1s");
    assert_eq!(settings["http"]["listen"], "127.0.0.1:3030");
    assert_eq!(settings["data"], data.to_str().expect("UTF-8"));
    assert_eq!(settings["replication"]["flush_rows"], 70);
    assert_eq!(settings["replication"]["slot"], "ours");
    assert_eq!(settings["blobs"]["secret_key"], "***");
    assert!(!text.contains("a_secret_to_hide"));

    for (name, value, fault) in [
        ("SESSIOND_HTTP__LISTEN", "nowhere", "http.listen"),
        ("SESSIOND_HTTP__MAX_CONECTIONS", "2", "max_conections"),
        ("SESSIOND_HTTP__MAX_CONNECTIONS", "0", "http.max_connections"),
        ("SESSIOND_HTTP__TRUSTED_PROXIES", "[\"10.0.0\"]", "http.trusted_proxies"),
        ("SESSIOND_METADATA__URL", "mysql://x", "metadata.url"),
        ("SESSIOND_METADATA__URL", "postgres://x", "auth.master_key"),
        ("SESSIOND_BLOBS__URL", "s3://bucket", "blobs.region"),
        ("SESSIOND_REPLICATION__ENABLED", "true", "clickhouse.url"),
        ("SESSIOND_REPLICATION__SLOT", "Slot", "replication.slot"),
        ("SESSIOND_REPLICATION__HEARTBEAT", "6ms", "replication.heartbeat"),
        ("SESSION_REPLICATION_FLUSH_INTERVAL_MS", "soon", "SESSION_REPLICATION_FLUSH_INTERVAL_MS"),
    ] {
        let output = command(data, &["config"]).env(name, value).output().await.expect("runs");
        let text = String::from_utf8(output.stderr).expect("UTF-8");
        assert!(!output.status.success() && text.contains(fault), "{name}={value}: {text}");
    }
}

#[tokio::test]
async fn a_first_start_generates_a_key_and_later_ones_keep_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    assert!(run(data, &["migrate"]).await.expect("migrated").starts_with("applied"));
    assert_eq!(run(data, &["migrate"]).await.expect("migrated"), "the schema is up to date\n");
    let made = banner(command(data, &["serve", "--listen", "127.0.0.1:0"])).await;
    let line = made.lines().find_map(|line| line.trim().strip_prefix("secret key")).expect("a key").trim();
    assert!(
        line.starts_with("tr_dev_") && made.matches(line).count() == 4,
        "shown, and used in three lines: {made}"
    );
    let later = banner(command(data, &["serve", "--listen", "127.0.0.1:0"])).await;
    assert!(!later.contains("tr_dev_"), "a later start does not print it: {later}");

    let id = json_of(data, &["keys", "list"]).await[0]["id"].as_str().expect("an id").to_owned();
    let hint = format!("--data {} keys show {id}", data.display());
    assert!(later.contains(&hint), "but says what does: {later}");
    let shown = command(data, &["keys", "show", &id]).output().await.expect("runs");
    assert_eq!(String::from_utf8_lossy(&shown.stdout).trim(), line, "alone on standard output");
    let warning = String::from_utf8_lossy(&shown.stderr);
    assert!(warning.contains("keep it out of logs") && !warning.contains(line), "{warning}");
    assert_eq!(json_of(data, &["keys", "show", &id]).await["secretKey"], line);
    let unknown = run(data, &["keys", "show", "key_nobody"]).await.expect_err("refused");
    assert!(unknown.contains("key not found"), "{unknown}");
    let mode = |name: &str| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::metadata(data.join(name)).expect("a file").permissions().mode() & 0o777
    };
    assert_eq!((mode("master.key"), mode("metadata.db")), (0o600, 0o600));
}
