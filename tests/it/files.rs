//! The limit on open files: connections must not take what the log, the tables and the blobs need.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::task::JoinSet;

use crate::harness::Process;
use crate::harness::server::KEY;

/// Open files that the server under attack may have.
const LIMIT: usize = 1024;

/// The binary under a limit on open files.
fn limited(limit: usize) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!(r#"ulimit -n {limit} && exec "$0" "$@""#), Process::binary()]);
    shell
}

/// One connection, kept for one request after another.
struct Kept(TcpStream);

impl Kept {
    async fn to(url: &str) -> Self {
        let address: SocketAddr = url.trim_start_matches("http://").parse().expect("an address");
        Self(TcpStream::connect(address).await.expect("connected"))
    }

    /// The status and the body of an answer that says its length.
    async fn ask(&mut self, method: &str, path: &str, body: &[u8]) -> (u16, String) {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.0.write_all(head.as_bytes()).await.expect("sent");
        self.0.write_all(body).await.expect("sent");
        let mut read = Vec::new();
        loop {
            assert!(self.0.read_buf(&mut read).await.expect("readable") > 0, "{method} {path}: hung up");
            let text = String::from_utf8_lossy(&read);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
            });
            if body.len() >= length.unwrap_or(0) {
                let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
                return (status.expect("a status"), body.to_owned());
            }
        }
    }

    async fn connections(&mut self) -> usize {
        let (_, metrics) = self.ask("GET", "/metrics", b"").await;
        let line = metrics.lines().find_map(|line| line.strip_prefix("sessiond_connections "));
        line.and_then(|count| count.parse().ok()).expect("a gauge")
    }
}

fn open_files(process: &Process) -> usize {
    fs::read_dir(format!("/proc/{}/fd", process.id())).expect("a running process").count()
}

/// What does not compress, so that it fills what is to be flushed.
fn noise(bytes: usize) -> Vec<u8> {
    let words = (0..bytes.div_ceil(32)).map(|_| uuid::Uuid::new_v4().simple().to_string());
    words.collect::<String>().into_bytes()
}

async fn write_and_read_everything(client: &mut Kept) {
    // Some megabytes more than one memtable: the log must open files for new tables.
    for number in 0..24 {
        let (status, answer) = client.ask("POST", "/realtime/v1/sessions/s/in/append", &noise(900_000)).await;
        assert_eq!(status, 200, "append {number}: {answer}");
    }
    let (status, answer) = client.ask("PUT", "/api/v1/sessions/s/snapshot-url", b"").await;
    assert_eq!(status, 200, "{answer}");
    let answer: Value = serde_json::from_str(&answer).expect("JSON");
    let url = answer["presignedUrl"].as_str().expect("a URL");
    let path = &url[url.find("/blobs/").expect("a path of ours")..];
    let (status, answer) = client.ask("PUT", path, &noise(100_000)).await;
    assert!((200..300).contains(&status), "{status}: {answer}");
    for path in ["/healthz", "/readyz", "/api/v1/sessions", "/api/v1/sessions/s"] {
        let (status, answer) = client.ask("GET", path, b"").await;
        assert_eq!(status, 200, "{path}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_up_to_the_limit_leave_the_stores_the_files_they_need() {
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit");
    let folder = tempfile::tempdir().expect("a folder");
    let stderr = folder.path().join("stderr");
    let mut command = limited(LIMIT);
    command.env("SESSIOND_HTTP__HEADER_TIMEOUT", "1h").stderr(File::create(&stderr).expect("a file"));
    let process = Process::start(&mut command, &folder.path().join("data")).await;
    let said = fs::read_to_string(&stderr).expect("UTF-8");
    let warning = said.lines().find(|line| line.contains("WARN") && line.contains("http.max_connections"));
    let warning = warning.unwrap_or_else(|| panic!("it says that it takes fewer: {said}"));
    let most =
        warning.split_once("max_connections=").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    let most: usize = most.unwrap_or_else(|| panic!("how many it takes: {warning}"));

    let mut client = Kept::to(&process.url).await;
    let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "s"}).to_string();
    let (status, answer) = client.ask("POST", "/api/v1/sessions", body.as_bytes()).await;
    assert_eq!(status, 201, "{answer}");
    // In tasks of their own: the kernel lets in no more than the server takes, and a few that wait.
    let mut silent = JoinSet::new();
    for _ in 0..LIMIT + 100 {
        let url = process.url.clone();
        silent.spawn(async move {
            let _held = Kept::to(&url).await;
            std::future::pending::<()>().await;
        });
    }
    while client.connections().await < most {
        tokio::task::yield_now().await;
    }
    write_and_read_everything(&mut client).await;
    assert_eq!(client.connections().await, most, "the rest waits");
    let open = open_files(&process);
    assert!(open < LIMIT && open > most, "{open} files with {most} connections");
    drop(silent);
    assert!(process.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downloads_that_nobody_reads_hold_up_no_other() {
    // More than may be written and read at once under this limit, and longer than what sockets take by themselves.
    const STUCK: usize = 24;
    const LENGTH: usize = 16_000_000;
    let folder = tempfile::tempdir().expect("a folder");
    let process = Process::start(&mut limited(640), &folder.path().join("data")).await;
    let mut client = Kept::to(&process.url).await;
    let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "s"}).to_string();
    let (status, answer) = client.ask("POST", "/api/v1/sessions", body.as_bytes()).await;
    assert_eq!(status, 201, "{answer}");
    let mut urls = Vec::new();
    for method in ["PUT", "GET"] {
        let (status, answer) = client.ask(method, "/api/v1/sessions/s/snapshot-url", b"").await;
        assert_eq!(status, 200, "{answer}");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        let url = answer["presignedUrl"].as_str().expect("a URL");
        let path = &url[url.find("/blobs/").expect("a path of ours")..];
        urls.push(format!("{}{path}", process.url));
    }
    let http = reqwest::Client::new();
    let put = http.put(&urls[0]).body(noise(LENGTH)).send().await.expect("an answer");
    assert_eq!(put.status().as_u16(), 200);
    let mut stuck = Vec::new();
    for _ in 0..STUCK {
        let mut reader = Kept::to(&process.url).await;
        let path = urls[1].trim_start_matches(&process.url);
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        reader.0.write_all(request.as_bytes()).await.expect("sent");
        stuck.push(reader);
    }
    // The first few are being answered.
    for reader in &stuck[..4] {
        reader.0.readable().await.expect("an answer");
    }
    let put = http.put(&urls[0]).body(noise(LENGTH)).send().await.expect("an answer");
    assert_eq!(put.status().as_u16(), 200, "writers do not wait for readers");
    let got = http.get(&urls[1]).send().await.expect("an answer");
    assert_eq!(got.status().as_u16(), 200, "those that do not read make place");
    assert_eq!(got.bytes().await.expect("a whole body").len(), LENGTH);
    drop(stuck);
}

async fn start_fails(mut command: Command, data: &Path) -> String {
    let output =
        command.args(["serve", "--listen", "127.0.0.1:0", "--data"]).arg(data).kill_on_drop(true).output();
    let output = output.await.expect("the binary runs");
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_that_leaves_nothing_for_connections_stops_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let refusal = start_fails(limited(256), &data).await;
    assert!(refusal.contains("the limit on open files is 256, and the server needs at least"), "{refusal}");
    assert!(!data.exists(), "before it makes anything");
}
