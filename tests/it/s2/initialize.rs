//! Who may write directly, for how long, and to what.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;

use crate::harness::TestServer;
use crate::harness::server::KEY;

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn the_answer_names_everything_that_a_writer_needs_and_pages_may_read_it() {
    let server = TestServer::start().await;
    let session = server.create(json!({"externalId": "a/b"})).await;
    let id = session["id"].as_str().expect("an id");
    for (address, io, name) in [
        ("a%2Fb", "in", format!("sessions/{id}/in")),
        (id, "out", format!("sessions/{id}/out")),
        (id, "channels/side.1/in", format!("sessions/{id}/channels/side.1/in")),
    ] {
        let path = format!("/realtime/v1/sessions/{address}/{io}");
        let request = server.request(Method::PUT, &path).header("origin", "https://page.example");
        let answer = server.send(request).await;
        assert_eq!(answer.expect(202), json!({"version": "v2"}));
        assert_eq!(answer.header("x-s2-stream-name"), Some(&*name));
        assert_eq!(answer.header("x-s2-basin"), Some("sessiond"));
        assert_eq!(answer.header("x-s2-endpoint"), Some(&*format!("{}/v1", server.url)));
        assert_eq!(answer.header("x-s2-flush-interval-ms"), Some("10"));
        assert_eq!(answer.header("x-s2-max-retries"), Some("10"));
        assert!(answer.header("x-s2-access-token").is_some_and(|token| token.matches('.').count() == 2));
        assert_eq!(answer.header("access-control-allow-origin"), Some("https://page.example"));
        let exposed = answer.header("access-control-expose-headers").expect("exposed").to_lowercase();
        let exposed: Vec<_> = exposed.split(',').map(str::trim).collect();
        for header in answer.headers.keys().filter(|name| name.as_str().starts_with("x-s2-")) {
            assert!(exposed.contains(&header.as_str()), "{header} is hidden from pages");
        }
    }
}

#[tokio::test]
async fn a_token_opens_one_channel_of_one_session_of_one_environment() {
    let server = TestServer::start().await;
    let wire = server.wire();
    for name in ["mine", "other"] {
        server.create(json!({"externalId": name})).await;
    }
    let (_, foreign_key) = server.environment("elsewhere").await;
    let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "mine"});
    let create = server.request_as(&foreign_key, Method::POST, "/api/v1/sessions").json(&body);
    server.send(create).await.expect(201);

    let mine = wire.open("mine", "in").await;
    assert_eq!(mine.append(&json!({"records": [{"body": "x"}]})).await.expect(200)["start"]["seq_num"], 0);
    let others = [
        wire.open("other", "in").await,
        wire.open("mine", "out").await,
        wire.open("mine", "channels/side/in").await,
        wire.open_as(&foreign_key, "mine", "in").await,
    ];
    for other in &others {
        let wrong = other.with_token(&mine.token);
        for answer in [
            wrong.append(&json!({"records": [{"body": "x"}]})).await,
            wrong.read("?seq_num=0").await,
            wrong.read("/tail").await,
            wrong.session().await.err().expect("refused"),
        ] {
            assert_eq!(answer.expect(403)["code"], "permission_denied", "{}", other.name);
        }
        assert_eq!(other.tail().await, 0, "{}", other.name);
    }
    // The same place under another spelling is another name, so the token does not open it.
    for spelled in ["sessions/mine/in", "/sessions/mine/in", "Sessions/mine/in"] {
        let mut spelling = mine.clone();
        spelled.clone_into(&mut spelling.name);
        assert_eq!(spelling.append(&json!({"records": [{}]})).await.status.as_u16(), 403, "{spelled}");
    }
}

#[tokio::test]
async fn a_direct_token_is_no_bearer_of_any_other_door() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let token = server.wire().open("s", "in").await.token;
    for (method, path) in [
        (Method::GET, "/api/v1/sessions"),
        (Method::GET, "/api/v1/sessions/s"),
        (Method::POST, "/api/v1/sessions/s/close"),
        (Method::POST, "/realtime/v1/sessions/s/in/append"),
        (Method::GET, "/realtime/v1/sessions/s/in/records"),
        (Method::GET, "/realtime/v1/sessions/s/in"),
        (Method::PUT, "/realtime/v1/sessions/s/in"),
        (Method::POST, "/api/v1/auth/jwt/claims"),
    ] {
        let answer = server.send(server.request_as(&token, method.clone(), path)).await;
        assert_eq!(answer.status.as_u16(), 401, "{method} {path}: {}", answer.text);
    }
    let body = json!({"query": "{ sessions(first: 1) { nodes { id } } }"});
    let request = server.request_as(&token, Method::POST, "/graphql").json(&body);
    let text = request.send().await.expect("an answer").text().await.expect("a body");
    assert!(text.contains("UNAUTHENTICATED"), "{text}");
}

#[tokio::test]
async fn what_is_no_direct_token_opens_a_stream_only_as_far_as_it_reaches() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let stream = server.wire().open("s", "in").await;
    let reads = server.token(&["read:sessions:s"], HOUR).await;
    let parts: Vec<&str> = stream.token.split('.').collect();
    let public = server.token(&["write:sessions:s"], HOUR).await;
    let public: Vec<&str> = public.split('.').collect();
    let batch = json!({"records": [{"body": "x"}]});
    for (token, status, code) in [
        (reads, 403, "permission_denied"),
        (String::new(), 401, "authn"),
        ("garbage".to_owned(), 401, "authn"),
        // The head of one kind on the claims and signature of the other.
        (format!("{}.{}.{}", parts[0], public[1], public[2]), 401, "authn"),
        (format!("{}.{}.{}", public[0], parts[1], parts[2]), 401, "authn"),
        (format!("{}.{}.", parts[0], parts[1]), 401, "authn"),
        (format!("{}x", stream.token), 401, "authn"),
    ] {
        let answer = stream.with_token(&token).append(&batch).await;
        assert_eq!(answer.expect(status)["code"], code, "{token}");
        let session = stream.with_token(&token).session().await.err().expect("refused");
        assert_eq!(session.expect(status)["code"], code, "{token}");
    }
    let none = stream.request(Method::GET, "/tail").build().expect("a request");
    let url = none.url().clone();
    let answer = server.send(server.http.get(url)).await;
    assert_eq!(answer.expect(401)["code"], "authn");
    assert_eq!(stream.tail().await, 0);
}

#[tokio::test]
async fn a_token_ends_with_its_time_with_the_key_and_with_the_public_token_that_asked() {
    let server = TestServer::start().await;
    let wire = server.wire();
    server.create(json!({"externalId": "s"})).await;
    let batch = json!({"records": [{"body": "x"}]});

    let public = server.token(&["write:sessions:s"], HOUR).await;
    let by_public = wire.open_as(&public, "s", "in").await;
    let by_key = wire.open("s", "in").await;
    by_public.append(&batch).await.expect(200);
    by_key.append(&batch).await.expect(200);
    server.clock.advance(HOUR);
    assert_eq!(by_public.append(&batch).await.expect(401)["code"], "authn");
    by_key.append(&batch).await.expect(200);
    // `token_ttl` is a day.
    server.clock.advance(HOUR * 23);
    assert_eq!(by_key.append(&batch).await.expect(401)["code"], "authn");

    let environment = server.first_environment().await;
    let control = server.control().await;
    let extra = control.keys().create(&environment, "a second one", None, None).await.expect("a key");
    let secret = secrecy::ExposeSecret::expose_secret(&extra.secret).to_owned();
    let by_extra = wire.open_as(&secret, "s", "in").await;
    let by_root = wire.open("s", "in").await;
    by_extra.append(&batch).await.expect(200);
    control.keys().revoke(&environment.id, &extra.key.id).await.expect("revoked");
    // The key's end is noticed within a second; a request that is refused is the event to wait for.
    let refused = async {
        loop {
            let answer = by_extra.append(&batch).await;
            if answer.status.as_u16() != 200 {
                return answer;
            }
            tokio::task::yield_now().await;
        }
    };
    let refused = tokio::time::timeout(Duration::from_secs(20), refused).await.expect("noticed");
    assert_eq!(refused.expect(401)["code"], "authn");
    by_root.append(&batch).await.expect(200);
}

#[tokio::test]
async fn initialize_refuses_in_the_words_that_clients_know() {
    let server = TestServer::start().await;
    let wire = server.wire();
    server.create(json!({"externalId": "open"})).await;
    server.create(json!({"externalId": "closed"})).await;
    server.post("/api/v1/sessions/closed/close", &json!({})).await.expect(200);
    server.create(json!({"externalId": "expiring", "expiresAt": "2026-01-01T01:00:00Z"})).await;
    server.clock.advance(HOUR);
    let public = server.token(&["write:sessions"], HOUR).await;
    let reads = server.token(&["read:sessions"], HOUR).await;
    for (bearer, session, io, status, message) in [
        (KEY, "closed", "in", 400, "Cannot initialize a channel on a closed session"),
        (KEY, "closed", "out", 400, "Cannot initialize a channel on a closed session"),
        (KEY, "expiring", "in", 400, "Cannot initialize a channel on an expired session"),
        (KEY, "session_unknown", "in", 404, "Session not found"),
        (&public, "open", "out", 403, "Initializing the out channel requires secret key authentication"),
        (
            &public,
            "open",
            "channels/a/out",
            403,
            "Initializing the out channel requires secret key authentication",
        ),
        (&reads, "open", "in", 403, "Unauthorized"),
        (KEY, "open", "up", 400, "Params Error"),
        ("nobody", "open", "in", 401, "Invalid API key"),
    ] {
        let answer = wire.initialize(bearer, session, io).await;
        assert_eq!(answer.status.as_u16(), status, "{session} {io}: {}", answer.text);
        let text = answer.json()["error"].as_str().map(str::to_owned);
        assert_eq!(text.as_deref(), Some(message), "{session} {io}");
        assert!(!answer.headers.keys().any(|name| name.as_str().starts_with("x-s2-")), "{session} {io}");
    }
}

#[tokio::test]
async fn an_external_id_is_open_to_writers_once_a_session_has_it() {
    let server = TestServer::start().await;
    let wire = server.wire();
    let batch = json!({"records": [{"body": "x"}]});
    let early = wire.open("later", "out").await;
    assert_eq!(early.append(&batch).await.expect(404)["code"], "stream_not_found");
    assert_eq!(early.session().await.err().expect("refused").expect(404)["code"], "stream_not_found");
    server.create(json!({"externalId": "later"})).await;
    assert_eq!(early.append(&batch).await.expect(200)["start"]["seq_num"], 0);
    let mut session = early.session().await.expect("a session");
    assert_eq!(session.write("y").await, 1);
    // Another name of the same channel, and another token: both go on in the same log.
    assert_eq!(wire.open("later", "out").await.append(&batch).await.expect(200)["start"]["seq_num"], 2);
}

#[tokio::test]
async fn pages_of_other_origins_may_write_and_read() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let stream = server.wire().open("s", "in").await;
    let asked = "authorization,content-type,s2-basin,s2-format";
    let preflight = stream
        .request(Method::OPTIONS, "")
        .header("origin", "https://page.example")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", asked);
    let preflight = preflight.send().await.expect("an answer");
    assert_eq!(preflight.status().as_u16(), 200);
    assert_eq!(preflight.headers()["access-control-allow-headers"], asked);
    for (method, query, status) in
        [(Method::POST, "", 200), (Method::GET, "?seq_num=0", 200), (Method::GET, "", 416)]
    {
        let request = stream.request(method, query).header("origin", "https://page.example");
        let answer = request.json(&json!({"records": [{"body": "x"}]})).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), status, "{query}");
        assert_eq!(answer.headers()["access-control-allow-origin"], "https://page.example");
    }
}
