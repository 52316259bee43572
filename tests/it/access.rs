//! Who may do what, through the wire: tokens, scopes, keys, and what a refusal gives away.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use sessiond::auth::token;
use sessiond::domain::{Clock, EnvironmentId, KeyId, Scopes, SystemClock};

use crate::harness::server::KEY;
use crate::harness::sse::End;
use crate::harness::{Process, TestServer};

const HOUR: Duration = Duration::from_secs(3600);

/// One call of each kind on a session: its name and status for this bearer.
async fn statuses(server: &TestServer, bearer: &str, session: &str) -> Vec<(&'static str, u16)> {
    let control = format!("/api/v1/sessions/{session}");
    let data = format!("/realtime/v1/sessions/{session}");
    let calls = [
        ("get", Method::GET, control.clone(), None),
        ("patch", Method::PATCH, control.clone(), Some(json!({"tags": ["t"]}).to_string())),
        ("close", Method::POST, format!("{control}/close"), Some("{}".to_owned())),
        ("records", Method::GET, format!("{data}/out/records"), None),
        ("head", Method::HEAD, format!("{data}/out"), None),
        ("append in", Method::POST, format!("{data}/in/append"), Some("x".to_owned())),
        ("append out", Method::POST, format!("{data}/out/append"), Some("x".to_owned())),
    ];
    let mut statuses = Vec::new();
    for (name, method, path, body) in calls {
        let mut request = server.request_as(bearer, method, &path);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        statuses.push((name, server.send(request).await.status.as_u16()));
    }
    statuses
}

#[tokio::test]
async fn a_scope_opens_exactly_what_it_names() {
    let server = TestServer::start().await;
    let allowed = |names: &[&'static str]| {
        let all = ["get", "patch", "close", "records", "head", "append in", "append out"];
        all.map(|name| (name, names.contains(&name))).to_vec()
    };
    let reads = ["get", "records", "head"];
    for (index, (scope, names)) in [
        ("read:sessions:{}", reads.to_vec()),
        ("read:sessions", reads.to_vec()),
        ("read:all", reads.to_vec()),
        ("write:sessions:{}", vec!["append in"]),
        ("write:sessions", vec!["append in"]),
        ("admin:sessions:{}", vec!["patch", "close"]),
        ("*:sessions:{}", vec!["get", "patch", "close", "records", "head", "append in"]),
        ("admin", vec!["get", "patch", "close", "records", "head", "append in"]),
        ("read:sessions:{}x", vec![]),
        ("read:session:{}", vec![]),
        ("read:tasks:agent", vec![]),
        ("trigger:sessions:{}", vec![]),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("s{index}");
        server.create(json!({"externalId": name})).await;
        let token = server.token(&[&scope.replace("{}", &name)], HOUR).await;
        // Closing comes before the appends in the calls, so that a scope which closes is tried on its own.
        let got: Vec<_> = statuses(&server, &token, &name)
            .await
            .into_iter()
            .map(|(call, status)| (call, !matches!(status, 401 | 403)))
            .collect();
        assert_eq!(got, allowed(&names), "{scope}");
    }
}

#[tokio::test]
async fn a_token_for_one_id_opens_the_session_under_its_other_id() {
    let server = TestServer::start().await;
    let session = server.create(json!({"externalId": "both"})).await;
    let id = session["id"].as_str().expect("an id");
    let by_external = server.token(&["admin:sessions:both", "read:sessions:both"], HOUR).await;
    let by_id = server.token(&[&format!("admin:sessions:{id}"), &format!("read:sessions:{id}")], HOUR).await;
    for token in [&by_external, &by_id] {
        for name in ["both", id] {
            let path = format!("/api/v1/sessions/{name}");
            server.send(server.request_as(token, Method::GET, &path)).await.expect(200);
            let patch = server.request_as(token, Method::PATCH, &path).json(&json!({"tags": ["t"]}));
            server.send(patch).await.expect(200);
        }
    }
}

#[tokio::test]
async fn a_refusal_does_not_tell_whether_the_session_exists() {
    let server = TestServer::start().await;
    let session = server.create(json!({"externalId": "secret"})).await;
    let id = session["id"].as_str().expect("an id").to_owned();
    server.post("/api/v1/sessions/secret/close", &json!({})).await.expect(200);
    let unknown = format!("{}0", &id[..id.len() - 1]);
    for scopes in [&["read:sessions:mine", "write:sessions:mine", "admin:sessions:mine"][..], &[]] {
        let token = server.token(scopes, HOUR).await;
        for [known, unknown] in [["secret", "nothing"], [&id, &unknown]] {
            let (a, b) = (statuses(&server, &token, known).await, statuses(&server, &token, unknown).await);
            assert_eq!(a, b);
            assert!(a.iter().all(|(_, status)| *status == 403), "{a:?}");
        }
    }
}

#[tokio::test]
async fn bad_credentials_answer_401_in_the_words_that_clients_know() {
    let server = TestServer::start().await;
    let good = server.token(&["read:sessions"], HOUR).await;
    let short = server.token(&["read:sessions"], Duration::from_secs(1)).await;
    let (_, foreign_key) = server.environment("other").await;
    let parts: Vec<&str> = good.split('.').collect();
    let none = format!("{}..", data_encoding::BASE64URL_NOPAD.encode(br#"{"alg":"none"}"#));
    let none = none.replacen("..", &format!(".{}.", parts[1]), 1);
    let tampered = format!("{}.{}.{}", parts[0], parts[1], parts[2].chars().rev().collect::<String>());
    let end = crate::harness::server::START.plus(Duration::from_secs(60));
    let own = server.first_environment().await.id;
    let scopes = Scopes::new(vec!["read:sessions".to_owned()]);
    let foreign = token::sign(&foreign_key, &own, &scopes, None, end, end).expect("a token");
    server.clock.advance(Duration::from_secs(2));
    for (bearer, message) in [
        (foreign.as_str(), "Public Access Token is invalid"),
        ("tr_dev_nobodys_key_at_all", "Invalid API key"),
        ("pk_dev_x", "Invalid API key"),
        (&KEY[..KEY.len() - 1], "Invalid API key"),
        (&none, "Public Access Token is invalid"),
        (&tampered, "Public Access Token is invalid"),
        (&short, "Public Access Token is invalid"),
    ] {
        let answer = server.send(server.request_as(bearer, Method::GET, "/api/v1/sessions")).await;
        assert_eq!(answer.expect(401)["error"], message, "{bearer}");
    }
    let missing = server.http.get(format!("{}/api/v1/sessions", server.url));
    assert_eq!(server.send(missing).await.expect(401)["error"], "Invalid or Missing API key");
    let theirs = server.send(server.request_as(&foreign_key, Method::GET, "/api/v1/sessions/x")).await;
    theirs.expect(404);
}

#[tokio::test]
async fn listing_and_creating_follow_the_tasks_of_the_scopes() {
    let server = TestServer::start().await;
    for task in ["a", "b"] {
        server.create(json!({"externalId": format!("of-{task}"), "taskIdentifier": task})).await;
    }
    let status = async |scopes: &[&str], query: &str| {
        let token = server.token(scopes, HOUR).await;
        let path = format!("/api/v1/sessions{query}");
        server.send(server.request_as(&token, Method::GET, &path)).await.status.as_u16()
    };
    assert_eq!(status(&["read:tasks:a"], "?filter[taskIdentifier]=a").await, 200);
    assert_eq!(status(&["read:tasks:a"], "?filter[taskIdentifier]=a,b").await, 403);
    assert_eq!(status(&["read:tasks:a", "read:tasks:b"], "?filter[taskIdentifier]=a,b").await, 200);
    assert_eq!(status(&["read:tasks:a"], "").await, 403);
    assert_eq!(status(&["read:tasks"], "").await, 200);
    assert_eq!(status(&["read:sessions:of-a"], "").await, 403);

    let create = async |scopes: &[&str], body: Value| {
        let token = server.token(scopes, HOUR).await;
        let answer =
            server.send(server.request_as(&token, Method::POST, "/api/v1/sessions").json(&body)).await;
        (answer.status.as_u16(), answer)
    };
    let body = |task: &str, id: &str| json!({"type": "chat", "taskIdentifier": task, "externalId": id});
    assert_eq!(create(&["write:tasks:a"], body("a", "new")).await.0, 201);
    assert_eq!(create(&["write:tasks:a"], body("b", "newer")).await.0, 403);
    assert_eq!(create(&["write:tasks:a"], body("a", "of-a")).await.0, 200);
    assert_eq!(create(&["write:tasks:a"], body("a", "of-b")).await.0, 403, "found, but out of reach");
    assert_eq!(create(&["write:sessions"], body("a", "of-b")).await.0, 200);
}

#[tokio::test]
async fn a_token_made_for_a_public_caller_never_exceeds_or_outlives_its_own() {
    let server = TestServer::start().await;
    let claims = |token: &str| -> Value {
        let payload = token.split('.').nth(1).expect("a payload");
        serde_json::from_slice(&data_encoding::BASE64URL_NOPAD.decode(payload.as_bytes()).expect("base64"))
            .expect("JSON")
    };
    let own = server.token(&["write:sessions", "write:tasks:agent"], Duration::from_secs(60)).await;
    let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "pub"});
    let answer =
        server.send(server.request_as(&own, Method::POST, "/api/v1/sessions").json(&body)).await.expect(201);
    let minted = claims(answer["publicAccessToken"].as_str().expect("a token"));
    assert_eq!(minted["scopes"], json!(["write:sessions:pub"]));
    assert_eq!(minted["exp"], claims(&own)["exp"]);
    let by_key = server.post("/api/v1/sessions", &body).await.expect(200);
    let minted = claims(by_key["publicAccessToken"].as_str().expect("a token"));
    assert_eq!(minted["scopes"], json!(["read:sessions:pub", "write:sessions:pub"]));

    for path in ["/api/v1/auth/jwt/claims", "/api/v1/auth/jwt", "/api/v1/auth/public-tokens"] {
        let body = json!({"scopes": ["write:sessions"], "claims": {"scopes": ["write:sessions"]}});
        let answer = server.send(server.request_as(&own, Method::POST, path).json(&body)).await;
        assert_eq!(answer.status.as_u16(), 403, "{path}");
    }
}

#[tokio::test]
async fn the_mint_routes_give_tokens_that_work_and_refuse_what_the_key_lacks() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "m"})).await;
    let environment = server.first_environment().await;
    let claims = server.send(server.request(Method::POST, "/api/v1/auth/jwt/claims")).await.expect(200);
    assert_eq!(claims, json!({"sub": environment.id.as_str(), "pub": true}));

    let control = server.control().await;
    let scopes = Scopes::new(vec!["read:sessions:m".to_owned()]);
    let scoped = control.keys().create(&environment, "scoped", Some(scopes), None).await.expect("a key");
    let scoped_secret = secrecy::ExposeSecret::expose_secret(&scoped.secret).to_owned();
    let mint = async |bearer: &str, body: Value| {
        server.send(server.request_as(bearer, Method::POST, "/api/v1/auth/public-tokens").json(&body)).await
    };
    let token = mint(&scoped_secret, json!({"scopes": ["read:sessions:m"]})).await.expect(200);
    let token = token["token"].as_str().expect("a token").to_owned();
    server.send(server.request_as(&token, Method::GET, "/api/v1/sessions/m")).await.expect(200);
    let beyond = mint(&scoped_secret, json!({"scopes": ["read:sessions:m", "read:sessions"]})).await;
    let beyond = beyond.expect(403);
    assert_eq!(beyond["code"], "scopes_exceed_key_access");
    assert_eq!(beyond["deniedScopes"], json!(["read:sessions"]));
    for (expiration, message) in [
        (json!("soon"), "Invalid expiration time"),
        (json!("31d"), "Expiration time cannot exceed 30 days"),
        (json!(1_000_000), "Expiration time must be in the future"),
    ] {
        let answer = mint(KEY, json!({"scopes": ["read:sessions"], "expirationTime": expiration})).await;
        assert_eq!(answer.expect(400)["error"], message);
    }
    let jwt =
        server.post("/api/v1/auth/jwt", &json!({"claims": {"scopes": ["read:sessions"]}})).await.expect(200);
    let jwt = jwt["token"].as_str().expect("a token").to_owned();
    server.send(server.request_as(&jwt, Method::GET, "/api/v1/sessions")).await.expect(200);

    control.keys().revoke(&environment.id, &scoped.key.id).await.expect("revoked");
    refused_soon(&server, &token, "/api/v1/sessions/m").await;
    refused_soon(&server, &scoped_secret, "/api/v1/sessions/m").await;
}

/// Waits until a bearer is refused; the server notices by itself within a second.
async fn refused_soon(server: &TestServer, bearer: &str, path: &str) {
    let begun = std::time::Instant::now();
    while server.send(server.request_as(bearer, Method::GET, path)).await.status.as_u16() != 401 {
        assert!(begun.elapsed() < Duration::from_secs(5), "still let in");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_key_cuts_its_streams_and_a_rotated_one_works_through_its_grace() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "r"})).await;
    let (control, environment) = (server.control().await, server.first_environment().await);
    let keys = control.keys();
    let first = keys.create(&environment, "second root", None, None).await.expect("a key");
    let secret = secrecy::ExposeSecret::expose_secret(&first.secret).to_owned();
    let mut follower = server.follow_as(&secret, "r", "out", &[("Timeout-Seconds", "600")]).await.ok();

    let grace = Duration::from_secs(300);
    let second = keys.rotate(&environment, &first.key.id, grace).await.expect("rotated");
    let second_secret = secrecy::ExposeSecret::expose_secret(&second.secret).to_owned();
    for bearer in [&secret, &second_secret] {
        server.send(server.request_as(bearer, Method::GET, "/api/v1/sessions/r")).await.expect(200);
    }
    server.append("r", "out", "still here").await;
    follower.records(1).await;
    server.clock.advance(grace);
    let (events, end) = follower.rest().await;
    assert_eq!((events.last().map(|event| event.name.as_str()), end), (Some("error"), End::Broken));
    refused_soon(&server, &secret, "/api/v1/sessions/r").await;

    let mut follower = server.follow_as(&second_secret, "r", "in", &[]).await.ok();
    keys.revoke(&environment.id, &KeyId::from_stored(second.key.id.as_str())).await.expect("revoked");
    let (events, end) = follower.rest().await;
    assert_eq!((events.last().map(|event| event.name.as_str()), end), (Some("error"), End::Broken));
}

#[tokio::test]
async fn a_stream_ends_when_its_token_does() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "t"})).await;
    let token = server.token(&["read:sessions:t"], Duration::from_secs(30)).await;
    let patient = ("Timeout-Seconds", "600");
    let mut follower = server.follow_as(&token, "t", "out", &[patient]).await.ok();
    // As the SDK's own reader, which renews its token when a stream breaks.
    let renewing = [patient, ("trigger-version", "4.8.3")];
    let mut renewing = server.follow_as(&token, "t", "out", &renewing).await.ok();
    server.append("t", "out", "one").await;
    follower.records(1).await;
    renewing.records(1).await;
    server.clock.advance(Duration::from_secs(30));
    let (events, end) = follower.rest().await;
    let [last] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(
        (last.name.as_str(), last.json(), end),
        ("end", json!({"reason": "token_expired"}), End::Clean)
    );
    let (events, end) = renewing.rest().await;
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].name.as_str(), end), ("error", End::Broken));
}

#[tokio::test]
async fn a_long_read_of_records_breaks_off_when_its_token_ends() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "t"})).await;
    let big = "x".repeat(500_000);
    for _ in 0..60 {
        server.append("t", "out", &big).await;
    }
    let token = server.token(&["read:sessions:t"], Duration::from_secs(30)).await;
    let path = "/realtime/v1/sessions/t/out/records";
    let mut slow = server.request_as(&token, Method::GET, path).send().await.expect("an answer");
    assert!(slow.chunk().await.expect("a first piece").is_some());
    server.clock.advance(Duration::from_secs(30));
    let rest = async {
        while slow.chunk().await?.is_some() {}
        Ok::<_, reqwest::Error>(())
    };
    rest.await.expect_err("more than the sockets hold was left, and nobody may read it now");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_with_long_tokens_are_remembered_within_a_budget_of_bytes() {
    /// What these tokens may add to the server's memory, in KiB; each is worth 150 KiB once it is read.
    const MEMORY: usize = 48 * 1024;
    const TOKENS: usize = 800;
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let http = reqwest::Client::new();
    let claims = http.post(format!("{}/api/v1/auth/jwt/claims", process.url)).bearer_auth(KEY).send().await;
    let claims: Value = claims.expect("an answer").json().await.expect("JSON");
    let environment = EnvironmentId::from_stored(claims["sub"].as_str().expect("an id"));
    let now = SystemClock.now();
    let long = |n: usize| {
        let scopes =
            std::iter::once(n.to_string()).chain(std::iter::repeat_n("a".to_owned(), 2_800)).collect();
        token::sign(KEY, &environment, &Scopes::new(scopes), None, now, now.plus(HOUR)).expect("a token")
    };
    // Realtime routes have no limit; the token is good and opens nothing.
    let show = async |token: String| {
        let path = format!("{}/realtime/v1/sessions/s/in/records", process.url);
        let answer = http.get(path).bearer_auth(token).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), 403);
    };
    for n in 0..10 {
        show(long(n)).await;
    }
    let before = process.forget_peak();
    for n in 10..TOKENS {
        show(long(n)).await;
    }
    let peak = process.memory("VmHWM");
    assert!(peak < before + MEMORY, "{before} KiB grew to {peak} KiB");
}
