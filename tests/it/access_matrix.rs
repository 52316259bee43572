//! Every operation through every door with every kind of token: the verdicts must be those of the rules, and so agree.
//!
//! The rows are held against the router (`/openapi.json`) and the schema (introspection): a route or a field without
//! a row fails.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use sessiond::domain::Scopes;
use tokio_tungstenite::tungstenite::Message;

use crate::harness::server::KEY;
use crate::harness::{Socket, TestServer};

const HOUR: Duration = Duration::from_secs(3600);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Allowed,
    Denied,
    Unauthenticated,
    NotFound,
}
use Verdict::{Allowed, Denied, NotFound, Unauthenticated};

/// What an operation takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// An action on the session.
    Session(&'static str),
    /// An action on the session, and a secret key.
    KeyOnSession(&'static str),
    /// An action on all sessions.
    All(&'static str),
    /// A secret key that covers a scope to read.
    Mint,
    /// A secret key.
    Key,
    /// Any credentials.
    Somebody,
    /// The token in the path alone; a bearer counts for nothing.
    Url,
    /// As `Session`, but who may not see it is told that there is nothing.
    Hidden(&'static str),
    /// An action on the session of a waitpoint, whose id no scope names.
    Waitpoint(&'static str),
}

/// One logical operation.
struct Row {
    name: &'static str,
    need: Need,
    /// Method, route and body.
    rest: &'static [(&'static str, &'static str, &'static str)],
    /// Fields of the schema that the document uses.
    fields: &'static [&'static str],
    /// With `$by`, or `$id`; empty without a twin in GraphQL.
    document: &'static str,
    /// A stream that says nothing until the session exists.
    waits: bool,
}

const ROW: Row = Row { name: "", need: Need::Somebody, rest: &[], fields: &[], document: "", waits: false };

const SESSION: &str = "/api/v1/sessions/{session}";

/// Batches of direct writers: data, and a trim command.
const DIRECT: &str = r#"{"records":[{"body":"x"}]}"#;
const TRIM: &str =
    r#"{"records":[{"headers":[["","trim"]],"body":"\u0000\u0000\u0000\u0000\u0000\u0000\u0000\u0000"}]}"#;

fn rows() -> Vec<Row> {
    vec![
        Row {
            name: "create",
            need: Need::All("write"),
            rest: &[("post", "/api/v1/sessions", r#"{"type":"t","taskIdentifier":"other"}"#)],
            fields: &["Mutation.createSession"],
            document: r#"mutation { createSession(input: {type: "t", taskIdentifier: "other"}) { userErrors { code } } }"#,
            ..ROW
        },
        Row {
            name: "list",
            need: Need::All("read"),
            rest: &[("get", "/api/v1/sessions", "")],
            fields: &["Query.sessions"],
            document: "{ sessions(first: 1) { nodes { id } } }",
            ..ROW
        },
        Row {
            name: "count",
            need: Need::All("read"),
            document: "{ sessions(first: 1) { totalCount } }",
            ..ROW
        },
        Row {
            name: "tags",
            need: Need::All("read"),
            fields: &["Query.sessionTags"],
            document: "{ sessionTags }",
            ..ROW
        },
        Row {
            name: "watch a list",
            need: Need::All("read"),
            fields: &["Subscription.sessionsChanged"],
            document: "subscription { sessionsChanged { id } }",
            waits: true,
            ..ROW
        },
        Row {
            name: "get",
            need: Need::Session("read"),
            rest: &[("get", SESSION, "")],
            fields: &["Query.session"],
            document: "query($by: SessionBy!) { session(by: $by) { id } }",
            ..ROW
        },
        Row {
            name: "watch",
            need: Need::Session("read"),
            fields: &["Subscription.sessionChanged"],
            document: "subscription($by: SessionBy!) { sessionChanged(by: $by) { id } }",
            waits: true,
            ..ROW
        },
        Row {
            name: "load by node",
            need: Need::Hidden("read"),
            fields: &["Query.node"],
            document: "query($id: ID!) { node(id: $id) { id } }",
            ..ROW
        },
        Row {
            name: "load by nodes",
            need: Need::Hidden("read"),
            fields: &["Query.nodes"],
            document: "query($id: ID!) { nodes(ids: [$id]) { id } }",
            ..ROW
        },
        Row {
            name: "update",
            need: Need::Session("admin"),
            rest: &[("patch", SESSION, r#"{"tags":["t"]}"#)],
            fields: &["Mutation.updateSession"],
            document: r#"mutation($by: SessionBy!) { updateSession(input: {by: $by, tags: ["t"]}) { userErrors { code } } }"#,
            ..ROW
        },
        Row {
            name: "runs",
            need: Need::Session("read"),
            document: "query($by: SessionBy!) { session(by: $by) { runs { runId } } }",
            ..ROW
        },
        Row {
            name: "hand over",
            need: Need::Session("write"),
            rest: &[(
                "post",
                "/api/v1/sessions/{session}/end-and-continue",
                r#"{"callingRunId":"{run}","reason":"upgrade"}"#,
            )],
            fields: &["Mutation.endAndContinueSession"],
            document: r#"mutation($by: SessionBy!, $run: String!) { endAndContinueSession(input: {by: $by, runId: $run}) { userErrors { code } } }"#,
            ..ROW
        },
        Row {
            name: "wait",
            need: Need::KeyOnSession("write"),
            rest: &[(
                "post",
                "/api/v1/runs/{run}/session-streams/wait",
                r#"{"session":"{session}","io":"out"}"#,
            )],
            fields: &["Mutation.createWaitpoint"],
            document: "mutation($by: SessionBy!) { createWaitpoint(input: {by: $by, io: OUT}) { userErrors { code } } }",
            ..ROW
        },
        // Before anything else can end the wait.
        Row {
            name: "answer",
            need: Need::Waitpoint("write"),
            rest: &[("post", "/api/v1/waitpoints/tokens/{waitpoint}/complete", r#"{"data":1}"#)],
            fields: &["Mutation.completeWaitpoint"],
            document: "mutation($waitpoint: ID!) { completeWaitpoint(input: {id: $waitpoint, data: 1}) { userErrors { code } } }",
            ..ROW
        },
        Row {
            name: "block on a wait",
            need: Need::KeyOnSession("read"),
            rest: &[("post", "/engine/v1/runs/{run}/waitpoints/tokens/{waitpoint}/wait", "{}")],
            ..ROW
        },
        Row {
            name: "see a wait",
            need: Need::Waitpoint("read"),
            rest: &[("get", "/api/v1/waitpoints/tokens/{waitpoint}", "")],
            fields: &["Query.waitpoint"],
            document: "query($waitpoint: ID!) { waitpoint(id: $waitpoint) { id } }",
            ..ROW
        },
        Row {
            name: "await",
            need: Need::Waitpoint("read"),
            rest: &[("get", "/api/v1/waitpoints/tokens/{waitpoint}?wait=300", "")],
            fields: &["Subscription.waitpointCompleted"],
            document: "subscription($waitpoint: ID!) { waitpointCompleted(id: $waitpoint) { id } }",
            ..ROW
        },
        Row {
            name: "list waits",
            need: Need::All("read"),
            rest: &[("get", "/api/v1/waitpoints/tokens", "")],
            fields: &["Query.waitpoints"],
            document: "{ waitpoints(first: 1) { nodes { id } } }",
            ..ROW
        },
        Row {
            name: "append to in",
            need: Need::Session("write"),
            rest: &[
                ("post", "/realtime/v1/sessions/{session}/in/append", "x"),
                ("post", "/realtime/v1/sessions/{session}/channels/a/in/append", "x"),
                ("post", "/v1/streams/sessions%2F{session}%2Fin/records", DIRECT),
            ],
            fields: &["Mutation.appendRecords"],
            document: r#"mutation($by: SessionBy!) { appendRecords(input: {by: $by, io: IN, records: [{text: "x"}]}) { records { id } userErrors { code } } }"#,
            ..ROW
        },
        Row {
            name: "append to out",
            need: Need::KeyOnSession("write"),
            rest: &[
                ("post", "/realtime/v1/sessions/{session}/out/append", "x"),
                ("post", "/realtime/v1/sessions/{session}/channels/a/out/append", "x"),
                ("post", "/v1/streams/sessions%2F{session}%2Fchannels%2Fa%2Fout/records", DIRECT),
            ],
            document: r#"mutation($by: SessionBy!) { appendRecords(input: {by: $by, io: OUT, channel: "a", records: [{data: 1}]}) { userErrors { code } } }"#,
            ..ROW
        },
        Row {
            name: "initialize in",
            need: Need::Session("write"),
            rest: &[
                ("put", "/realtime/v1/sessions/{session}/in", ""),
                ("put", "/realtime/v1/sessions/{session}/channels/a/in", ""),
            ],
            waits: true,
            ..ROW
        },
        Row {
            name: "initialize out",
            need: Need::KeyOnSession("write"),
            rest: &[
                ("put", "/realtime/v1/sessions/{session}/out", ""),
                ("put", "/realtime/v1/sessions/{session}/channels/a/out", ""),
            ],
            waits: true,
            ..ROW
        },
        Row {
            name: "trim",
            need: Need::KeyOnSession("write"),
            rest: &[("post", "/v1/streams/sessions%2F{session}%2Fin/records", TRIM)],
            fields: &["Mutation.trimChannel"],
            document: r#"mutation($by: SessionBy!) { trimChannel(input: {by: $by, io: IN, before: "0"}) { userErrors { code } } }"#,
            ..ROW
        },
        Row {
            name: "read",
            need: Need::Session("read"),
            rest: &[
                ("get", "/realtime/v1/sessions/{session}/out/records", ""),
                ("get", "/realtime/v1/sessions/{session}/channels/a/in/records", ""),
                ("head", "/realtime/v1/sessions/{session}/out", ""),
                ("head", "/realtime/v1/sessions/{session}/channels/a/out", ""),
                ("get", "/v1/streams/sessions%2F{session}%2Fout/records?count=0", ""),
                ("get", "/v1/streams/sessions%2F{session}%2Fout/records/tail", ""),
            ],
            document: "query($by: SessionBy!) { session(by: $by) { in { records { nodes { id } } tail { seqNum } } } }",
            waits: true,
            ..ROW
        },
        Row {
            name: "follow",
            need: Need::Session("read"),
            rest: &[
                ("get", "/realtime/v1/sessions/{session}/out", ""),
                ("get", "/realtime/v1/sessions/{session}/channels/a/out", ""),
            ],
            fields: &["Subscription.channelRecords"],
            document: "subscription($by: SessionBy!) { channelRecords(by: $by, io: OUT) { caughtUp } }",
            waits: true,
        },
        Row {
            name: "snapshot to get",
            need: Need::Session("read"),
            rest: &[("get", "/api/v1/sessions/{session}/snapshot-url", "")],
            ..ROW
        },
        Row {
            name: "snapshot to put",
            need: Need::Session("write"),
            rest: &[("put", "/api/v1/sessions/{session}/snapshot-url", "")],
            ..ROW
        },
        Row {
            name: "transcript",
            need: Need::KeyOnSession("read"),
            rest: &[("get", "/api/v1/sessions/{session}/transcript", "")],
            ..ROW
        },
        Row {
            name: "a snapshot by no URL of ours",
            need: Need::Url,
            rest: &[
                ("get", "/blobs/v1/{session}", ""),
                ("head", "/blobs/v1/{session}", ""),
                ("put", "/blobs/v1/{session}", "x"),
            ],
            ..ROW
        },
        Row { name: "claims", need: Need::Key, rest: &[("post", "/api/v1/auth/jwt/claims", "")], ..ROW },
        Row {
            name: "mint",
            need: Need::Mint,
            rest: &[
                ("post", "/api/v1/auth/jwt", r#"{"claims":{"scopes":["read:sessions:a"]}}"#),
                ("post", "/api/v1/auth/public-tokens", r#"{"scopes":["read:sessions:a"]}"#),
            ],
            fields: &["Mutation.createPublicToken"],
            document: r#"mutation { createPublicToken(input: {scopes: ["read:sessions:a"]}) { token userErrors { code } } }"#,
            ..ROW
        },
        Row {
            name: "viewer",
            need: Need::Somebody,
            fields: &["Query.viewer"],
            document: "{ viewer { environmentId } }",
            ..ROW
        },
        // Last, because nothing can be appended afterwards.
        Row {
            name: "close",
            need: Need::Session("admin"),
            rest: &[("post", "/api/v1/sessions/{session}/close", "{}")],
            fields: &["Mutation.closeSession"],
            document: "mutation($by: SessionBy!) { closeSession(input: {by: $by}) { userErrors { code } } }",
            ..ROW
        },
    ]
}

/// Who asks, as the rules see it.
struct Token {
    name: &'static str,
    bearer: Option<String>,
    known: bool,
    key: bool,
    /// Actions on all sessions.
    all: &'static [&'static str],
    /// Actions on the session in question, by whichever id.
    named: &'static [&'static str],
    /// In another environment there is no session.
    foreign: bool,
}

const TOKEN: Token =
    Token { name: "", bearer: None, known: true, key: false, all: &[], named: &[], foreign: false };
const EVERYTHING: &[&str] = &["read", "write", "admin"];

async fn tokens(server: &TestServer, id: &str) -> Vec<Token> {
    let scoped = |scope: &str| Some(Scopes::new(vec![scope.to_owned()]));
    let control = server.control().await;
    let environment = server.first_environment().await;
    let key = async |scope: &str| {
        let made = control.keys().create(&environment, "matrix", scoped(scope), None).await.expect("a key");
        secrecy::ExposeSecret::expose_secret(&made.secret).to_owned()
    };
    let (reads, writes) = (key("read:all").await, key("write:all").await);
    let narrow = key("read:sessions:s").await;
    let (_, foreign) = server.environment("other").await;
    let all = ["read:sessions:s", "write:sessions:s", "admin:sessions:s"];
    let elsewhere = server.token_of(&foreign, &all, HOUR).await;
    let short = server.token(&all, Duration::from_secs(60)).await;
    server.clock.advance(Duration::from_secs(60));
    let public = async |scopes: &[&str]| Some(server.token(scopes, HOUR).await);
    let by_id = format!("read:sessions:{id}");
    let other = ["read:sessions:else", "write:sessions:else", "admin:sessions:else"];
    vec![
        Token { name: "nobody", known: false, ..TOKEN },
        Token { name: "garbage", bearer: Some("tr_dev_garbage_garbage".to_owned()), known: false, ..TOKEN },
        Token { name: "a forged token", bearer: Some("a.b.c".to_owned()), known: false, ..TOKEN },
        Token { name: "an expired token", bearer: Some(short), known: false, ..TOKEN },
        Token { name: "a root key", bearer: Some(KEY.to_owned()), key: true, all: EVERYTHING, ..TOKEN },
        Token { name: "a reading key", bearer: Some(reads), key: true, all: &["read"], ..TOKEN },
        Token { name: "a writing key", bearer: Some(writes), key: true, all: &["write"], ..TOKEN },
        Token { name: "a narrow key", bearer: Some(narrow), key: true, named: &["read"], ..TOKEN },
        Token {
            name: "another root key",
            bearer: Some(foreign),
            key: true,
            all: EVERYTHING,
            foreign: true,
            ..TOKEN
        },
        Token {
            name: "who may do all in another environment",
            bearer: Some(elsewhere),
            named: EVERYTHING,
            foreign: true,
            ..TOKEN
        },
        Token { name: "a reader", bearer: public(&["read:sessions:s"]).await, named: &["read"], ..TOKEN },
        Token { name: "a reader by id", bearer: public(&[&by_id]).await, named: &["read"], ..TOKEN },
        Token { name: "a writer", bearer: public(&["write:sessions:s"]).await, named: &["write"], ..TOKEN },
        Token { name: "an admin", bearer: public(&["admin:sessions:s"]).await, named: &["admin"], ..TOKEN },
        Token { name: "who may do all", bearer: public(&["*:sessions:s"]).await, named: EVERYTHING, ..TOKEN },
        Token { name: "of another session", bearer: public(&other).await, ..TOKEN },
        Token { name: "of a task", bearer: public(&["read:tasks:agent"]).await, ..TOKEN },
        Token { name: "without scopes", bearer: public(&[]).await, ..TOKEN },
    ]
}

/// The rules, written down a second time and as short as can be.
fn expected(need: Need, token: &Token, address: &str, exists: bool) -> Verdict {
    let there = exists && !token.foreign;
    // The scopes of a session hold for its other id only where there is a session that has both.
    let named = address == "s" || there;
    let may = |action| token.all.contains(&action) || token.named.contains(&action) && exists && named;
    let session = |action| match may(action) {
        true if there => Allowed,
        true => NotFound,
        false => Denied,
    };
    let allowed = |yes| if yes { Allowed } else { Denied };
    match need {
        Need::Url => Denied,
        _ if !token.known => Unauthenticated,
        Need::Session(action) => session(action),
        Need::KeyOnSession(action) if token.key => session(action),
        Need::KeyOnSession(_) => Denied,
        Need::All(action) => allowed(token.all.contains(&action)),
        Need::Mint => allowed(token.key && token.all.contains(&"read")),
        Need::Key => allowed(token.key),
        Need::Somebody => Allowed,
        Need::Hidden(action) if session(action) == Allowed => Allowed,
        Need::Hidden(_) => NotFound,
        Need::Waitpoint(action) if token.all.contains(&action) => session(action),
        Need::Waitpoint(action) => allowed(token.named.contains(&action) && there),
    }
}

fn of_status(status: u16) -> Verdict {
    match status {
        401 => Unauthenticated,
        403 => Denied,
        404 => NotFound,
        200..300 => Allowed,
        other => panic!("status {other} is no verdict"),
    }
}

/// The verdict of an execution result.
fn of_result(result: &Value) -> Verdict {
    if let Some(error) = result["errors"].get(0) {
        return match error["extensions"]["code"].as_str() {
            Some("UNAUTHENTICATED") => Unauthenticated,
            Some("UNAUTHORIZED" | "SCOPES_EXCEED_KEY_ACCESS") => Denied,
            Some("NOT_FOUND") => NotFound,
            _ => panic!("{result} is no verdict"),
        };
    }
    let data = result["data"].as_object().and_then(|data| data.values().next()).unwrap_or(&Value::Null);
    match data["userErrors"].get(0).map(|error| &error["code"]) {
        Some(code) if code == "NOT_FOUND" => NotFound,
        Some(_) => panic!("{result} is no verdict"),
        None if data.is_null() || data.get(0).is_some_and(Value::is_null) => NotFound,
        None => Allowed,
    }
}

/// What the placeholders of a row stand for.
struct Names<'a> {
    session: &'a str,
    run: &'a str,
    waitpoint: &'a str,
}

impl Names<'_> {
    fn fill(&self, text: &str) -> String {
        let text = text.replace("{session}", self.session).replace("{run}", self.run);
        text.replace("{waitpoint}", self.waitpoint)
    }
}

async fn over_rest(
    server: &TestServer,
    token: &Token,
    names: &Names<'_>,
    call: (&str, &str, &str),
) -> Verdict {
    let (method, route, body) = call;
    let method = Method::from_bytes(method.to_uppercase().as_bytes()).expect("a method");
    let mut request = server.http.request(method, format!("{}{}", server.url, names.fill(route)));
    if let Some(bearer) = &token.bearer {
        request = request.bearer_auth(bearer);
    }
    if !body.is_empty() {
        request = request.header("content-type", "application/json").body(names.fill(body));
    }
    // The head is the verdict: a follower's body has no end.
    of_status(request.send().await.expect("an answer").status().as_u16())
}

/// The first result over HTTP, as a stream for subscriptions.
async fn over_http(server: &TestServer, token: &Token, document: &str, variables: &Value) -> Verdict {
    let mut request = server.http.post(format!("{}/graphql", server.url));
    if let Some(bearer) = &token.bearer {
        request = request.bearer_auth(bearer);
    }
    let accept = if document.starts_with("subscription") { "text/event-stream" } else { "application/json" };
    let body = json!({"query": document, "variables": variables});
    let mut answer = request.header("accept", accept).json(&body).send().await.expect("an answer");
    let mut text = String::new();
    while let Some(chunk) = answer.chunk().await.expect("a body") {
        text.push_str(std::str::from_utf8(&chunk).expect("text"));
        if accept == "text/event-stream" && text.contains("data: ") && text.ends_with("\n\n") {
            break;
        }
    }
    let result = text.lines().find_map(|line| line.strip_prefix("data: ")).unwrap_or(&text);
    of_result(&serde_json::from_str(result).unwrap_or_else(|error| panic!("{error}: {text}")))
}

/// The first message over a WebSocket of its own.
async fn over_websocket(server: &TestServer, token: &Token, document: &str, variables: &Value) -> Verdict {
    let mut socket = Socket::open(&server.graphql().url, &[]).await.expect("a socket");
    let authorization = token.bearer.as_ref().map(|bearer| format!("Bearer {bearer}"));
    socket.say(json!({"type": "connection_init", "payload": {"authorization": authorization}})).await;
    socket.subscribe("1", document, variables.clone()).await;
    loop {
        match socket.frame().await.expect("a frame") {
            Message::Close(Some(frame)) if u16::from(frame.code) == 4403 => return Unauthenticated,
            Message::Text(text) => {
                let message: Value = serde_json::from_str(&text).expect("JSON");
                match message["type"].as_str() {
                    Some("connection_ack") => {}
                    Some("next") => return of_result(&message["payload"]),
                    Some("error") => return of_result(&json!({"errors": message["payload"]})),
                    _ => panic!("{message} is no verdict"),
                }
            }
            other => panic!("{other:?} is no verdict"),
        }
    }
}

/// How a row names the session.
#[derive(Clone, Copy)]
enum Address {
    ExternalId,
    Id,
    UnknownExternalId,
    UnknownId,
}

#[tokio::test]
async fn every_door_gives_every_token_the_verdict_of_the_rules_on_an_external_id() {
    every_door_gives_every_token_the_verdict_of_the_rules(Address::ExternalId).await;
}

#[tokio::test]
async fn every_door_gives_every_token_the_verdict_of_the_rules_on_an_id() {
    every_door_gives_every_token_the_verdict_of_the_rules(Address::Id).await;
}

#[tokio::test]
async fn every_door_gives_every_token_the_verdict_of_the_rules_on_an_unknown_external_id() {
    every_door_gives_every_token_the_verdict_of_the_rules(Address::UnknownExternalId).await;
}

#[tokio::test]
async fn every_door_gives_every_token_the_verdict_of_the_rules_on_an_unknown_id() {
    every_door_gives_every_token_the_verdict_of_the_rules(Address::UnknownId).await;
}

async fn every_door_gives_every_token_the_verdict_of_the_rules(address: Address) {
    let server = TestServer::start().await;
    let session = server.create(json!({"externalId": "s", "taskIdentifier": "agent"})).await;
    let id = session["id"].as_str().expect("an id").to_owned();
    let missing = format!("{}x", &id[..id.len() - 1]);
    let tokens = tokens(&server, &id).await;
    let run = session["runId"].as_str().expect("a run");
    let wait = format!("/api/v1/runs/{run}/session-streams/wait");
    let wait = server.post(&wait, &json!({"session": "s", "io": "in"})).await.expect(200);
    let waitpoint = wait["waitpointId"].as_str().expect("a waitpoint");
    let mut disagreements = Vec::new();
    let (address, exists) = match address {
        Address::ExternalId => ("s", true),
        Address::Id => (id.as_str(), true),
        Address::UnknownExternalId => ("nothing", false),
        Address::UnknownId => (missing.as_str(), false),
    };
    for row in rows() {
        let by = if address.starts_with("session_") { "sessionId" } else { "externalId" };
        let node = data_encoding::BASE64URL_NOPAD.encode(format!("s:{address}").as_bytes());
        let waitpoint = if exists { waitpoint } else { "waitpoint_nothing" };
        let names = Names { session: address, run, waitpoint };
        let variables = match row.document {
            document if document.contains("$run") => json!({"by": {by: address}, "run": run}),
            document if document.contains("$waitpoint") => json!({"waitpoint": waitpoint}),
            document if document.contains("$by") => json!({"by": {by: address}}),
            document if document.contains("$id") => json!({"id": node}),
            _ => json!({}),
        };
        // The third way to name a session, through one of the doors.
        let mut opaque = variables.clone();
        if by == "sessionId" && opaque.get("by").is_some() {
            opaque["by"] = json!({"id": node});
        }
        // There is no opaque id of what has only an external id.
        if matches!(row.need, Need::Hidden(_)) && by == "externalId" {
            continue;
        }
        for token in &tokens {
            let expected = expected(row.need, token, address, exists);
            // An external id that nobody has yet is nothing to read, and waited for by who follows.
            let waits = row.waits && by == "externalId" && expected == NotFound;
            let mut verdicts = Vec::new();
            for call in row.rest {
                let verdict = over_rest(&server, token, &names, *call).await;
                verdicts.push(("REST", if waits && verdict == Allowed { NotFound } else { verdict }));
            }
            let silent = matches!(row.need, Need::All(_)) && row.waits && expected == Allowed;
            let streams = row.document.starts_with("subscription");
            let answers = !row.document.is_empty() && !silent;
            if answers && !(waits && streams) {
                verdicts.push(("HTTP", over_http(&server, token, row.document, &variables).await));
                verdicts.push(("WebSocket", over_websocket(&server, token, row.document, &opaque).await));
            }
            for (door, verdict) in verdicts {
                if verdict != expected {
                    let case = format!("{} {address} by {} over {door}", row.name, token.name);
                    disagreements.push(format!("{case}: {verdict:?}, not {expected:?}"));
                }
            }
        }
    }
    assert!(disagreements.is_empty(), "{}", disagreements.join("\n"));
}

#[tokio::test]
async fn every_route_and_every_field_has_a_row() {
    let server = TestServer::start().await;
    let document = server.get("/openapi.json").await.json();
    let rows = rows();
    // A row may spell parameters out.
    let matches = |route: &str, template: &str| {
        let parts = |path: &str| path.split('/').map(str::to_owned).collect::<Vec<_>>();
        let route = route.split_once('?').map_or(route, |(path, _)| path);
        let (route, template) = (parts(route), parts(template));
        route.len() == template.len()
            && route.iter().zip(&template).all(|(part, known)| part == known || known.starts_with('{'))
    };
    let mut missing = BTreeSet::new();
    for (template, item) in document["paths"].as_object().expect("paths") {
        for method in item.as_object().expect("methods").keys().filter(|key| *key != "parameters") {
            let of_row = rows.iter().flat_map(|row| row.rest).any(|(known, route, _)| {
                let path = route.split('?').next().unwrap_or_default();
                known == method && matches(path, template)
            });
            if !of_row {
                missing.insert(format!("{method} {template}"));
            }
        }
    }
    let query = "{ __schema { types { name fields { name } } } }";
    let schema = server.http.post(format!("{}/graphql", server.url)).json(&json!({"query": query}));
    let schema: Value = schema.send().await.expect("an answer").json().await.expect("JSON");
    let roots = ["Query", "Mutation", "Subscription"];
    for kind in schema["data"]["__schema"]["types"].as_array().expect("types") {
        let name = kind["name"].as_str().expect("a name");
        for field in kind["fields"].as_array().into_iter().flatten().filter(|_| roots.contains(&name)) {
            let field = format!("{name}.{}", field["name"].as_str().expect("a name"));
            if !rows.iter().any(|row| row.fields.contains(&field.as_str())) {
                missing.insert(field);
            }
        }
    }
    assert!(missing.is_empty(), "without a row: {missing:?}");
}

#[tokio::test]
async fn an_expired_token_is_nobody_at_every_door() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let bearer = server.token(&["read:sessions:s"], Duration::from_secs(60)).await;
    let token = Token { bearer: Some(bearer), ..TOKEN };
    let document = "query($by: SessionBy!) { session(by: $by) { id } }";
    let by = json!({"by": {"externalId": "s"}});
    assert_eq!(over_http(&server, &token, document, &by).await, Allowed);
    server.clock.advance(Duration::from_secs(61));
    let names = Names { session: "s", run: "", waitpoint: "" };
    assert_eq!(over_rest(&server, &token, &names, ("get", SESSION, "")).await, Unauthenticated);
    assert_eq!(over_http(&server, &token, document, &by).await, Unauthenticated);
    assert_eq!(over_websocket(&server, &token, document, &by).await, Unauthenticated);
}
