//! Snapshots through the wire: URLs, uploads, downloads, transcripts.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use sessiond::config::Config;

use crate::harness::server::KEY;
use crate::harness::{Answer, Process, TestServer};

const MAX: usize = 33_554_432;
const NDJSON: &str = "application/vnd.trigger.transcript+ndjson";
const QUARTER: Duration = Duration::from_secs(15 * 60);

/// The URL that a method is given, as an absolute one.
async fn url_as(server: &TestServer, bearer: &str, method: &Method, session: &str) -> Answer {
    let path = format!("/api/v1/sessions/{session}/snapshot-url");
    server.send(server.request_as(bearer, method.clone(), &path)).await
}

async fn url(server: &TestServer, method: Method, session: &str) -> String {
    let answer = url_as(server, KEY, &method, session).await.expect(200);
    assert_eq!(answer.as_object().expect("an object").len(), 1);
    answer["presignedUrl"].as_str().expect("a URL").to_owned()
}

/// Without any credentials, and held against the document.
async fn send(server: &TestServer, method: Method, url: &str, body: impl Into<reqwest::Body>) -> Answer {
    server.send(server.http.request(method, url).header("content-type", NDJSON).body(body)).await
}

async fn put(server: &TestServer, session: &str, body: impl Into<reqwest::Body>) {
    let url = url(server, Method::PUT, session).await;
    let answer = send(server, Method::PUT, &url, body).await;
    assert_eq!((answer.status.as_u16(), answer.text.as_str()), (200, ""));
}

async fn download(server: &TestServer, url: &str, headers: &[(&'static str, &str)]) -> Response {
    let request =
        headers.iter().fold(server.http.get(url), |request, (name, value)| request.header(*name, *value));
    request.send().await.expect("an answer")
}

fn header(response: &Response, name: &str) -> String {
    response.headers()[name].to_str().expect("text").to_owned()
}

async fn server() -> TestServer {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    server
}

#[tokio::test]
async fn what_was_put_comes_back_with_its_type_and_cannot_become_a_page() {
    let server = server().await;
    let to_get = url(&server, Method::GET, "s").await;
    assert_eq!(send(&server, Method::GET, &to_get, "").await.expect(404)["code"], "not_found");
    assert_eq!(send(&server, Method::HEAD, &to_get, "").await.status.as_u16(), 404);
    put(&server, "s", "one\ntwo\n").await;
    let response = download(&server, &to_get, &[("origin", "https://a.example")]).await;
    assert_eq!(response.status().as_u16(), 200);
    assert_eq!(header(&response, "content-type"), NDJSON);
    assert_eq!(header(&response, "content-length"), "8");
    assert_eq!(header(&response, "x-content-type-options"), "nosniff");
    assert!(header(&response, "content-security-policy").contains("sandbox"));
    assert_eq!(header(&response, "access-control-allow-origin"), "https://a.example");
    let etag = header(&response, "etag");
    assert!(etag.starts_with('"') && etag.ends_with('"') && etag.len() > 2, "{etag}");
    assert_eq!(response.text().await.expect("whole"), "one\ntwo\n");
    let head = server.http.head(&to_get).send().await.expect("an answer");
    assert_eq!((header(&head, "etag"), header(&head, "content-length")), (etag.clone(), "8".to_owned()));
    put(&server, "s", "").await;
    let response = download(&server, &to_get, &[]).await;
    assert_ne!(header(&response, "etag"), etag);
    assert_eq!(response.text().await.expect("whole"), "");
}

#[tokio::test]
async fn a_snapshot_is_there_after_a_restart_and_of_its_session_alone() {
    let server = server().await;
    server.create(json!({"externalId": "other"})).await;
    put(&server, "s", "kept").await;
    let server = server.restart().await;
    let to_get = url(&server, Method::GET, "s").await;
    assert_eq!(send(&server, Method::GET, &to_get, "").await.text, "kept");
    let to_get = url(&server, Method::GET, "other").await;
    send(&server, Method::GET, &to_get, "").await.expect(404);
}

#[tokio::test]
async fn ranges_are_answered_as_http_says() {
    let server = server().await;
    put(&server, "s", "0123456789").await;
    let to_get = url(&server, Method::GET, "s").await;
    for (range, status, place, text) in [
        ("bytes=0-0", 206, "bytes 0-0/10", "0"),
        ("bytes=2-4", 206, "bytes 2-4/10", "234"),
        ("bytes=7-", 206, "bytes 7-9/10", "789"),
        ("bytes=7-99", 206, "bytes 7-9/10", "789"),
        ("bytes=-3", 206, "bytes 7-9/10", "789"),
        ("bytes=-99", 206, "bytes 0-9/10", "0123456789"),
        ("bytes=1-2,4-5", 200, "", "0123456789"),
        ("pages=1-2", 200, "", "0123456789"),
    ] {
        let response = download(&server, &to_get, &[("range", range)]).await;
        assert_eq!(response.status().as_u16(), status, "{range}");
        if status == 206 {
            assert_eq!(header(&response, "content-range"), place);
        }
        assert_eq!(header(&response, "content-length"), text.len().to_string());
        assert_eq!(response.text().await.expect("whole"), text, "{range}");
    }
    for range in ["bytes=10-", "bytes=10-12", "bytes=-0"] {
        let request = server.http.get(&to_get).header("range", range);
        let answer = server.send(request).await;
        assert_eq!(answer.expect(416)["code"], "range_not_satisfiable", "{range}");
        assert_eq!(answer.header("content-range"), Some("bytes */10"));
    }
    let response = download(&server, &to_get, &[("range", "bytes=0-0"), ("if-range", "\"x\"")]).await;
    assert_eq!(response.status().as_u16(), 200);
}

#[tokio::test]
async fn the_limit_is_33_554_432_bytes_and_one_more_leaves_the_old_snapshot() {
    let server = server().await;
    let (to_put, to_get) = (url(&server, Method::PUT, "s").await, url(&server, Method::GET, "s").await);
    let full = Bytes::from(vec![b'x'; MAX]);
    assert_eq!(send(&server, Method::PUT, &to_put, full.clone()).await.status.as_u16(), 200);
    let head = server.http.head(&to_get).send().await.expect("an answer");
    assert_eq!(header(&head, "content-length"), MAX.to_string());
    // Announced: refused before a byte is read. A client may see the connection close instead of the answer.
    let announced = server.http.put(&to_put).body(vec![b'y'; MAX + 1]).send().await;
    if let Ok(response) = announced {
        assert_eq!(response.status().as_u16(), 413);
    }
    // Unannounced: refused at the byte that is too much.
    let pieces = stream::iter([Ok::<_, std::io::Error>(full), Ok(Bytes::from_static(b"y"))]);
    let over = server.http.put(&to_put).body(reqwest::Body::wrap_stream(pieces));
    let answer = server.send(over).await;
    assert_eq!(answer.expect(413)["code"], "too_large");
    let head = server.http.head(&to_get).send().await.expect("an answer");
    assert_eq!(header(&head, "content-length"), MAX.to_string());
    let last = download(&server, &to_get, &[("range", "bytes=-1")]).await;
    assert_eq!(last.text().await.expect("whole"), "x");
    assert_eq!(files(&server), ["snapshot"]);
}

/// Names of the files below the folder of blobs.
fn files(server: &TestServer) -> Vec<String> {
    let mut folders = vec![server.data().join("blobs")];
    let mut names = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let entry = entry.expect("an entry");
            match entry.file_type().expect("a type").is_dir() {
                true => folders.push(entry.path()),
                false => names.push(entry.file_name().into_string().expect("UTF-8")),
            }
        }
    }
    names.sort();
    names
}

#[tokio::test]
async fn a_url_is_for_one_session_one_method_and_a_quarter_of_an_hour() {
    let server = server().await;
    let (to_put, to_get) = (url(&server, Method::PUT, "s").await, url(&server, Method::GET, "s").await);
    put(&server, "s", "kept").await;
    let denied = async |method: Method, url: &str| {
        let answer = send(&server, method.clone(), url, "evil").await;
        assert_eq!(answer.status.as_u16(), 403, "{method} {url}: {answer:?}");
    };
    denied(Method::PUT, &to_get).await;
    denied(Method::GET, &to_put).await;
    denied(Method::HEAD, &to_put).await;
    assert_eq!(send(&server, Method::POST, &to_put, "").await.status.as_u16(), 405);
    assert_eq!(send(&server, Method::DELETE, &to_put, "").await.status.as_u16(), 405);
    let forged = |url: &str| {
        let (rest, signature) = url.rsplit_once('.').expect("a token");
        let flipped: String = signature.chars().rev().collect();
        [format!("{rest}.{flipped}"), format!("{rest}."), rest.to_owned()]
    };
    for forged in forged(&to_put) {
        denied(Method::PUT, &forged).await;
    }
    let public = server.token(&["write:sessions:s", "read:sessions:s"], QUARTER).await;
    for bearer in [KEY, public.as_str(), &direct_token(&server).await, "x"] {
        denied(Method::PUT, &format!("{}/blobs/v1/{bearer}", server.url)).await;
        denied(Method::GET, &format!("{}/blobs/v1/{bearer}", server.url)).await;
    }
    // Nor is the token of a URL a bearer.
    let token = to_get.rsplit_once('/').expect("a path").1;
    let request = server.request_as(token, Method::GET, "/api/v1/sessions/s");
    assert_eq!(server.send(request).await.status.as_u16(), 401);
    server.clock.advance(QUARTER - Duration::from_secs(1));
    assert_eq!(send(&server, Method::GET, &to_get, "").await.text, "kept");
    server.clock.advance(Duration::from_secs(1));
    denied(Method::GET, &to_get).await;
    denied(Method::PUT, &to_put).await;
}

async fn direct_token(server: &TestServer) -> String {
    let response =
        server.request(Method::PUT, "/realtime/v1/sessions/s/out").send().await.expect("an answer");
    header(&response, "x-s2-access-token")
}

#[tokio::test]
async fn a_url_ends_with_the_credentials_that_asked_for_it() {
    let server = server().await;
    put(&server, "s", "kept").await;
    let token = server.token(&["read:sessions:s"], Duration::from_secs(60)).await;
    assert_eq!(url_as(&server, &token, &Method::PUT, "s").await.expect(403)["code"], "unauthorized");
    let answer = url_as(&server, &token, &Method::GET, "s").await.expect(200);
    let by_token = answer["presignedUrl"].as_str().expect("a URL").to_owned();
    let (control, environment) = (server.control().await, server.first_environment().await);
    let key = control.keys().create(&environment, "short", None, None).await.expect("a key");
    let secret = secrecy::ExposeSecret::expose_secret(&key.secret).to_owned();
    let answer = url_as(&server, &secret, &Method::GET, "s").await.expect(200);
    let by_key = answer["presignedUrl"].as_str().expect("a URL").to_owned();
    for url in [&by_token, &by_key] {
        assert_eq!(send(&server, Method::GET, url, "").await.text, "kept");
    }
    control.keys().revoke(&environment.id, &key.key.id).await.expect("revoked");
    send(&server, Method::GET, &by_key, "").await.expect(403);
    server.clock.advance(Duration::from_secs(61));
    send(&server, Method::GET, &by_token, "").await.expect(403);
}

#[tokio::test]
async fn a_url_leads_where_callers_reach_the_server() {
    let server = TestServer::start_with(|config| {
        config.http.public_url = Some("https://sessions.example.com/".parse().expect("a URL"));
        config.blobs.url_ttl = Duration::from_secs(60);
    })
    .await;
    server.create(json!({"externalId": "s"})).await;
    let public = url(&server, Method::PUT, "s").await;
    let path = public.strip_prefix("https://sessions.example.com").expect("the public origin");
    let local = format!("{}{path}", server.url);
    assert_eq!(send(&server, Method::PUT, &local, "x").await.status.as_u16(), 200);
    server.clock.advance(Duration::from_secs(60));
    send(&server, Method::PUT, &local, "x").await.expect(403);
}

#[tokio::test]
async fn the_snapshot_of_a_closed_or_expired_session_can_still_be_put_and_got() {
    let server = server().await;
    server.create(json!({"externalId": "expires", "expiresAt": "2026-01-01T00:00:10Z"})).await;
    server.post("/api/v1/sessions/s/close", &json!({})).await.expect(200);
    server.clock.advance(Duration::from_secs(11));
    for session in ["s", "expires"] {
        put(&server, session, "the last turn").await;
        let to_get = url(&server, Method::GET, session).await;
        assert_eq!(send(&server, Method::GET, &to_get, "").await.text, "the last turn");
    }
}

#[tokio::test]
async fn an_upload_that_stalls_or_breaks_stores_nothing() {
    let server = TestServer::start_with(|config| {
        config.http.body_pause_timeout = Duration::from_millis(100);
    })
    .await;
    server.create(json!({"externalId": "s"})).await;
    put(&server, "s", "kept").await;
    let (to_put, to_get) = (url(&server, Method::PUT, "s").await, url(&server, Method::GET, "s").await);
    let stalled = futures_util::StreamExt::chain(
        stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"half"))]),
        stream::pending(),
    );
    let request = server.http.put(&to_put).body(reqwest::Body::wrap_stream(stalled));
    assert_eq!(server.send(request).await.expect(408)["code"], "request_timeout");
    let broken = stream::iter([Ok(Bytes::from(vec![b'x'; 9 << 20])), Err(std::io::Error::other("broke"))]);
    let request = server.http.put(&to_put).body(reqwest::Body::wrap_stream(broken));
    request.send().await.expect_err("the client gave up");
    assert_eq!(send(&server, Method::GET, &to_get, "").await.text, "kept");
}

/// Settings for a bucket at this endpoint.
fn in_bucket(bucket: &str, endpoint: &str) -> impl FnOnce(&mut Config) {
    let (url, endpoint) =
        (format!("s3://{bucket}/wire/{}", uuid::Uuid::new_v4().simple()), endpoint.to_owned());
    move |config| {
        config.blobs.url = Some(url.parse().expect("a URL"));
        config.blobs.endpoint = Some(endpoint.parse().expect("a URL"));
        config.blobs.allow_http = true;
        config.blobs.access_key = Some("test".to_owned().into());
        config.blobs.secret_key = Some("secret".to_owned().into());
    }
}

#[tokio::test]
async fn a_bucket_keeps_snapshots_as_the_folder_does() {
    let test = std::env::var("SESSIOND_TEST_S3").expect("SESSIOND_TEST_S3 is set by `cargo xtask test`");
    let test: url::Url = test.parse().expect("a URL");
    let endpoint = format!("http://127.0.0.1:{}", test.port().expect("a port"));
    let server = TestServer::start_with(in_bucket(test.path().trim_matches('/'), &endpoint)).await;
    server.create(json!({"externalId": "s"})).await;
    let to_get = url(&server, Method::GET, "s").await;
    send(&server, Method::GET, &to_get, "").await.expect(404);
    let messages: Vec<_> =
        (0..5).map(|n| json!({"id": format!("m{n}"), "text": "x".repeat(60_000)})).collect();
    let blob = version_2(&messages);
    put(&server, "s", blob.clone()).await;
    let response = download(&server, &to_get, &[]).await;
    assert_eq!(header(&response, "content-type"), NDJSON);
    assert!(response.text().await.expect("whole") == blob);
    let tail = download(&server, &to_get, &[("range", "bytes=-22")]).await;
    assert_eq!(tail.status().as_u16(), 206);
    assert_eq!(tail.text().await.expect("whole"), blob[blob.len() - 22..]);
    let page = server.get("/api/v1/sessions/s/transcript?limit=1&before=m3").await.expect(200);
    assert_eq!(page["messages"], json!([messages[2]]));
    let to_put = url(&server, Method::PUT, "s").await;
    let full = Bytes::from(vec![b'x'; MAX]);
    assert_eq!(send(&server, Method::PUT, &to_put, full.clone()).await.status.as_u16(), 200);
    let pieces = stream::iter([Ok::<_, std::io::Error>(full), Ok(Bytes::from_static(b"y"))]);
    let over = server.http.put(&to_put).body(reqwest::Body::wrap_stream(pieces));
    server.send(over).await.expect(413);
    let head = server.http.head(&to_get).send().await.expect("an answer");
    assert_eq!(header(&head, "content-length"), MAX.to_string());
}

#[tokio::test]
async fn while_the_bucket_is_away_its_routes_are_503_and_everything_else_works() {
    // Bound and never listened on: whoever connects is refused.
    let closed = tokio::net::TcpSocket::new_v4().expect("a socket");
    closed.bind("127.0.0.1:0".parse().expect("an address")).expect("bound");
    let endpoint = format!("http://{}", closed.local_addr().expect("an address"));
    let server = TestServer::start_with(in_bucket("bucket", &endpoint)).await;
    server.create(json!({"externalId": "s"})).await;
    let (to_put, to_get) = (url(&server, Method::PUT, "s").await, url(&server, Method::GET, "s").await);
    for (method, url) in [(Method::GET, &to_get), (Method::PUT, &to_put)] {
        assert_eq!(send(&server, method, url, "x").await.expect(503)["code"], "unavailable");
    }
    server.get("/api/v1/sessions/s/transcript").await.expect(503);
    assert_eq!(server.append("s", "in", "x").await, 0);
}

#[tokio::test]
async fn a_transcript_is_read_in_pages_from_every_version_of_a_snapshot() {
    let server = server().await;
    let transcript =
        async |query: &str| server.get(&format!("/api/v1/sessions/s/transcript{query}")).await.expect(200);
    assert_eq!(transcript("").await, json!({"messages": []}));
    assert_eq!(transcript("?limit=3").await, json!({"messages": []}));
    let message = |n: usize, size: usize| json!({"id": format!("m{n}"), "parts": ["x".repeat(size)]});
    let ids = |page: &Value| {
        let messages = page["messages"].as_array().expect("messages");
        messages.iter().map(|message| message["id"].as_str().expect("an id").to_owned()).collect::<Vec<_>>()
    };
    // The large ones are read through their index.
    for (size, lines) in [(1, false), (1, true), (60_000, true), (60_000, false)] {
        let messages: Vec<_> = (0..5).map(|n| message(n, size)).collect();
        put(&server, "s", if lines { version_2(&messages) } else { version_1(&messages) }).await;
        let all = transcript("").await;
        assert_eq!(all["messages"], json!(messages));
        assert_eq!(all["cursors"], json!({"lastOutEventId": "41", "lastInEventId": "2"}));
        assert!(all.get("nextCursor").is_none() && all.get("state").is_none());
        let newest = transcript("?limit=2").await;
        assert_eq!(
            (ids(&newest), &newest["nextCursor"]),
            (vec!["m3".to_owned(), "m4".to_owned()], &json!("m3"))
        );
        let older = transcript("?limit=2&before=m3").await;
        assert_eq!(
            (ids(&older), &older["nextCursor"]),
            (vec!["m1".to_owned(), "m2".to_owned()], &json!("m1"))
        );
        let oldest = transcript("?limit=2&before=m1").await;
        assert_eq!(ids(&oldest), ["m0"]);
        assert!(oldest.get("nextCursor").is_none());
        assert_eq!(ids(&transcript("?limit=0").await).len(), 5);
        assert!(ids(&transcript("?before=gone").await).is_empty());
    }
    put(&server, "s", "no snapshot at all").await;
    assert_eq!(transcript("").await, json!({"messages": []}));
    let refused = server.get("/api/v1/sessions/s/transcript?limit=two").await.expect(400);
    assert_eq!(refused["details"][0]["field"], "limit");
    let public = server.token(&["read:sessions:s"], QUARTER).await;
    let request = server.request_as(&public, Method::GET, "/api/v1/sessions/s/transcript");
    server.send(request).await.expect(403);
}

fn version_1(messages: &[Value]) -> String {
    json!({"version": 1, "savedAt": 1, "messages": messages, "lastOutEventId": "41", "lastInEventId": "2"})
        .to_string()
}

fn version_2(messages: &[Value]) -> String {
    let cursors = r#""savedAt":1,"lastOutEventId":"41","lastInEventId":"2""#;
    let mut blob = format!("{{\"v\":2,{cursors},\"state\":{{\"private\":true}}}}\n");
    let mut offsets = vec![blob.len()];
    for message in messages {
        let line = json!({"id": message["id"], "final": true, "message": message});
        blob.push_str(&format!("{line}\n"));
        offsets.push(blob.len());
    }
    let ids: Vec<_> = messages.iter().map(|message| &message["id"]).collect();
    let footer = format!("{{\"ids\":{},\"offsets\":{},{cursors}}}", json!(ids), json!(offsets));
    format!("{blob}{footer}\n#tt2:{:016}\n", footer.len())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_in_the_middle_of_an_upload_leaves_the_old_snapshot_or_the_new_one() {
    let data = tempfile::tempdir().expect("a folder");
    let http = reqwest::Client::new();
    let url = async |process: &Process, method: Method| {
        let path = format!("{}/api/v1/sessions/s/snapshot-url", process.url);
        let response = http.request(method, path).bearer_auth(KEY).send().await.expect("an answer");
        let body: Value = response.json().await.expect("JSON");
        body["presignedUrl"].as_str().expect("a URL").to_owned()
    };
    let snapshot = async |process: &Process| {
        let response = http.get(url(process, Method::GET).await).send().await.expect("an answer");
        response.bytes().await.expect("whole")
    };
    let mut process = Process::serve(data.path()).await;
    let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "s"});
    let create = http.post(format!("{}/api/v1/sessions", process.url)).bearer_auth(KEY).json(&body);
    assert_eq!(create.send().await.expect("an answer").status().as_u16(), 201);
    let to_put = url(&process, Method::PUT).await;
    let old = Bytes::from(vec![b'0'; 1000]);
    assert!(http.put(to_put).body(old.clone()).send().await.expect("an answer").status().is_success());
    // Killed when so many pieces of a MiB have been taken from the client: early, between parts, at the very end.
    let mut current = old;
    for (round, taken) in (1u8..).zip([1usize, 9, 17, 20]) {
        let new = Bytes::from(vec![b'0' + round; 20 << 20]);
        let (reached, waits) = tokio::sync::oneshot::channel();
        let mut reached = Some(reached);
        let pieces: Vec<_> = (0..20).map(|n| new.slice(n << 20..(n + 1) << 20)).collect();
        let pieces = pieces.into_iter().enumerate().map(move |(n, piece)| {
            if n + 1 == taken {
                let _ = reached.take().map(|reached| reached.send(()));
            }
            Ok::<_, std::io::Error>(piece)
        });
        let to_put = url(&process, Method::PUT).await;
        let upload = http.put(to_put).body(reqwest::Body::wrap_stream(stream::iter(pieces))).send();
        let upload = tokio::spawn(upload);
        waits.await.expect("the upload has begun");
        process.kill().await;
        let acknowledged =
            upload.await.expect("no panic").is_ok_and(|response| response.status().is_success());
        process = Process::serve(data.path()).await;
        let found = snapshot(&process).await;
        assert!(
            found == new || (found == current && !acknowledged),
            "{} bytes in round {round}",
            found.len()
        );
        current = found;
    }
}
