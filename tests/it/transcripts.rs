//! Transcripts of snapshots that were made to hurt whoever reads them. The server is a process of its own, so that its
//! memory is, too.

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::harness::server::KEY;
use crate::harness::{Process, TestServer};

/// Bytes of a snapshot.
const SIZE: usize = 1 << 20;
/// What eight readers at once may add to the peak of the server's memory, in KiB. Two of them read at a time.
const MEMORY: usize = 32 * 1024;

/// `text` again and again, up to a size.
fn filled(begin: &str, text: &str, last: &str, end: &str) -> String {
    let count = (SIZE - begin.len() - last.len() - end.len()) / text.len();
    [begin, &text.repeat(count), last, end].concat()
}

/// A snapshot of version 2 whose index is most of it.
fn index_of(id: &str, count: usize) -> String {
    let ids = format!("{id},").repeat(count);
    let offsets: String = (0..=count).map(|n| format!("{n},")).collect();
    let index =
        format!("{{\"ids\":[{}],\"offsets\":[{}]}}", &ids[..ids.len() - 1], &offsets[..offsets.len() - 1]);
    format!("{{\"v\":2}}\n{}\n{index}\n#tt2:{:016}\n", " ".repeat(count), index.len())
}

/// Name, snapshot, and how many messages a reader of one gets.
fn snapshots() -> Vec<(&'static str, String, usize)> {
    let first = r#"{"version":1,"messages":["#;
    let message = r#"{"id":"a"}"#;
    vec![
        ("zeros", filled(first, "0,", message, "]}"), 1),
        ("objects", filled(first, "{},", message, "]}"), 1),
        ("zeros, and the version last", filled(r#"{"messages":["#, "0,", message, r#"],"version":1}"#), 1),
        (
            "entries",
            filled(r#"{"version":2,"messages":["#, r#"{"id":"a","message":{"id":"a"}},"#, "0", "]}"),
            1,
        ),
        (
            "a cursor that is a list",
            filled(r#"{"version":1,"messages":[{"id":"a"}],"lastOutEventId":["#, "0,", "0", "]}"),
            1,
        ),
        ("a long id", filled(r#"{"version":1,"messages":[{"id":""#, "x", "", r#""}]}"#), 0),
        ("lines", filled("{\"v\":2}\n", "{\"id\":\"a\",\"message\":{\"id\":\"a\"}}\n", "", ""), 1),
        ("an index", index_of("\"\"", SIZE / 12), 0),
        ("an index of anything", index_of("[]", SIZE / 12), 0),
    ]
}

/// Puts a snapshot through a URL of its own.
async fn put(http: &reqwest::Client, url: &str, snapshot: String) {
    let asked = http.put(format!("{url}/api/v1/sessions/s/snapshot-url")).bearer_auth(KEY).send().await;
    let answer: Value = asked.expect("an answer").json().await.expect("JSON");
    let place = answer["presignedUrl"].as_str().expect("a URL");
    let put = http.put(place).body(snapshot).send().await.expect("an answer");
    assert_eq!(put.status().as_u16(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_readers_at_once_cost_little_whatever_is_in_the_snapshot() {
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let http = reqwest::Client::new();
    let session = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "s"});
    let create = http.post(format!("{}/api/v1/sessions", process.url)).bearer_auth(KEY).json(&session);
    assert!(create.send().await.expect("an answer").status().is_success());
    let read = async || {
        let url = format!("{}/api/v1/sessions/s/transcript?limit=1", process.url);
        let answer = http.get(url).bearer_auth(KEY).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), 200);
        answer.json::<Value>().await.expect("JSON")["messages"].as_array().expect("messages").len()
    };
    for (name, snapshot, messages) in snapshots() {
        assert!(snapshot.len() > SIZE / 2, "{name} has {} bytes", snapshot.len());
        put(&http, &process.url, snapshot).await;
        let before = process.forget_peak();
        let answers = join_all((0..8).map(|_| read())).await;
        assert_eq!(answers, [messages; 8], "{name}");
        let peak = process.memory("VmHWM");
        assert!(peak < before + MEMORY, "{name}: {before} KiB grew to {peak} KiB");
    }
}

#[tokio::test]
async fn a_page_is_bounded_with_and_without_a_limit_and_pages_show_every_message_once() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let message = |n: usize, size: usize| json!({"id": format!("m{n}"), "text": "x".repeat(size)});
    // Many small ones, and a few of which one alone is more than a page.
    let many: Vec<_> = (0..10_003).map(|n| message(n, 1)).collect();
    let large: Vec<_> = [3, 9, 3, 3].iter().enumerate().map(|(n, mib)| message(n, mib << 20)).collect();
    let entry = |message: &Value| format!("{}\n", json!({"id": message["id"], "message": message}));
    let lines = format!("{{\"v\":2}}\n{}", many.iter().map(entry).collect::<String>());
    let object = json!({"version": 1, "messages": large}).to_string();
    for (messages, snapshot, pages) in [(many, lines, vec![10_000, 3]), (large, object, vec![2, 1, 1])] {
        put(&server.http, &server.url, snapshot).await;
        for limit in ["", "limit=1000000&"] {
            let (mut seen, mut before, mut sizes) = (Vec::new(), String::new(), Vec::new());
            loop {
                let path = format!("/api/v1/sessions/s/transcript?{limit}{before}");
                let answer = server.http.get(format!("{}{path}", server.url)).bearer_auth(KEY);
                let answer = answer.send().await.expect("an answer");
                let announced = answer.content_length();
                let bytes = answer.bytes().await.expect("a whole body");
                assert_eq!(announced, Some(bytes.len() as u64));
                let mut page: Value = serde_json::from_slice(&bytes).expect("JSON");
                let Value::Array(messages) = page["messages"].take() else { panic!("no messages") };
                assert!(bytes.len() < (8 << 20) + 1000 || messages.len() == 1);
                sizes.push(messages.len());
                seen.splice(0..0, messages);
                let Some(next) = page["nextCursor"].as_str() else { break };
                before = format!("before={next}");
            }
            assert!(seen == messages, "every message, as it was written");
            assert_eq!(sizes, pages, "{limit}");
        }
    }
}
