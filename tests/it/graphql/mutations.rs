//! What mutations do, and what they say when they cannot.

use std::time::Duration;

use serde_json::{Value, json};
use sessiond::domain::{Clock, Scopes};

use crate::harness::graphql::{code, user_errors};
use crate::harness::{Graphql, TestServer};

const HOUR: Duration = Duration::from_secs(3600);
const ERRORS: &str = "userErrors { code path message } clientMutationId";

fn pairs(errors: &[(&str, &str)]) -> Vec<(String, String)> {
    errors.iter().map(|(code, path)| ((*code).to_owned(), (*path).to_owned())).collect()
}

/// The payload of a mutation that takes this input.
async fn mutate(graphql: &Graphql, name: &str, fields: &str, input: Value) -> Value {
    let kind = format!("{}{}", name[..1].to_uppercase(), &name[1..]);
    let query = format!("mutation($input: {kind}Input!) {{ {name}(input: $input) {{ {fields} {ERRORS} }} }}");
    graphql.payload(&query, json!({"input": input})).await
}

async fn append(graphql: &Graphql, input: Value) -> Value {
    let mut whole = json!({"by": {"externalId": "s"}, "io": "IN"});
    whole.as_object_mut().expect("an object").extend(input.as_object().expect("an object").clone());
    mutate(
        graphql,
        "appendRecords",
        "repeated tail { seqNum } channel { io } records { seqNum data text partId }",
        whole,
    )
    .await
}

fn numbers(payload: &Value) -> Vec<&str> {
    let records = payload["records"].as_array().expect("records");
    records.iter().map(|record| record["seqNum"].as_str().expect("digits")).collect()
}

/// How many records `.in` of `s` has.
async fn stored(graphql: &Graphql) -> usize {
    let query = r#"{ session(by: {externalId: "s"}) { in { records(first: 100) { nodes { id } } } } }"#;
    graphql.data(query, json!({})).await["session"]["in"]["records"]["nodes"].as_array().expect("nodes").len()
}

#[tokio::test]
async fn a_create_makes_a_session_once_and_says_whether_it_did() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    let fields = "created publicAccessToken session { sessionId externalId type tags metadata expiresAt }";
    let create = async |input: Value| {
        let mut whole = json!({"type": "chat", "taskIdentifier": "agent"});
        whole.as_object_mut().expect("an object").extend(input.as_object().expect("an object").clone());
        mutate(&graphql, "createSession", fields, whole).await
    };
    let input = json!({"externalId": "s", "tags": ["a", "b", "a"], "metadata": {"x": {"y": [1.5, "z"]}},
        "expiresAt": "2026-01-02T01:00:00+01:00", "triggerConfig": {"basePayload": {}}, "clientMutationId": "m1"});
    let first = create(input.clone()).await;
    assert_eq!((&first["created"], &first["clientMutationId"]), (&json!(true), &json!("m1")));
    let session = &first["session"];
    assert_eq!(session["tags"], json!(["a", "b"]));
    assert_eq!(session["metadata"], input["metadata"]);
    assert_eq!(session["expiresAt"], "2026-01-02T00:00:00.000Z");
    let again = create(json!({"externalId": "s", "type": "other"})).await;
    assert_eq!((&again["created"], &again["session"]), (&json!(false), session));
    let token = first["publicAccessToken"].as_str().expect("a token");
    let public = server.graphql_as(Some(token));
    assert_eq!(append(&public, json!({"records": [{"text": "x"}]})).await["userErrors"], json!([]));

    let keyed = create(json!({"idempotencyKey": "k"})).await;
    let repeated = create(json!({"idempotencyKey": "k"})).await;
    assert_eq!((&repeated["created"], &repeated["session"]), (&json!(false), &keyed["session"]));
    assert_eq!(create(json!({"idempotencyKey": "l"})).await["created"], true);
    server.post("/api/v1/sessions/s/close", &json!({})).await.expect(200);
    let closed = create(json!({"externalId": "s"})).await;
    assert_eq!(user_errors(&closed), pairs(&[("CONFLICT", "input")]));
    assert_eq!((&closed["session"], &closed["publicAccessToken"]), (&Value::Null, &Value::Null));
}

#[tokio::test]
async fn every_fault_of_an_input_is_told_at_once_with_its_place() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let graphql = server.graphql();
    let by = json!({"externalId": "s"});
    let invalid = |paths: &[&str]| {
        paths.iter().map(|path| ("VALIDATION_FAILED".to_owned(), format!("input.{path}"))).collect::<Vec<_>>()
    };
    let create = json!({"externalId": "session_x", "type": "", "taskIdentifier": "x".repeat(129),
        "tags": ["ok", "", "x".repeat(129)], "expiresAt": "2026-01-01T00:00:00Z"});
    let large = json!({"x": "x".repeat(32_768)});
    let valid = json!({"type": "t", "taskIdentifier": "a"});
    let with = |field: &str, value: Value| {
        let mut input = valid.clone();
        input[field] = value;
        input
    };
    let records = |records: Value| json!({"by": by, "io": "IN", "records": records});
    let text = |text: &str, key: String| json!({"text": text, "idempotencyKey": key});
    let mut wrong = Vec::new();
    for (name, input, paths) in [
        (
            "createSession",
            create,
            &["externalId", "type", "taskIdentifier", "tags.1", "tags.2", "expiresAt"][..],
        ),
        ("createSession", with("metadata", large.clone()), &["metadata"]),
        ("createSession", with("metadata", json!([1])), &["metadata"]),
        ("createSession", with("tags", json!(vec!["t"; 11])), &["tags"]),
        ("createSession", with("idempotencyKey", json!("")), &["idempotencyKey"]),
        (
            "createSession",
            with("triggerConfig", json!({"maxAttempts": 11, "basePayload": {}})),
            &["triggerConfig.maxAttempts"],
        ),
        (
            "updateSession",
            json!({"by": by, "tags": [""], "externalId": "session_x"}),
            &["tags.0", "externalId"],
        ),
        ("updateSession", json!({"by": by, "metadata": large}), &["metadata"]),
        ("updateSession", json!({"by": by, "metadata": "x"}), &["metadata"]),
        ("closeSession", json!({"by": by, "reason": "x".repeat(257)}), &["reason"]),
        ("appendRecords", records(json!([])), &["records"]),
        ("appendRecords", records(json!(vec![json!({"data": 1}); 1001])), &["records"]),
        ("appendRecords", records(json!([{"text": "a"}, {}])), &["records.1"]),
        ("appendRecords", records(json!([{"text": "a", "data": 1}])), &["records.0"]),
        ("appendRecords", records(json!([text("a", String::new())])), &["records.0.idempotencyKey"]),
        ("appendRecords", records(json!([text("a", "x".repeat(257))])), &["records.0.idempotencyKey"]),
        (
            "appendRecords",
            json!({"by": by, "io": "IN", "channel": "a b", "records": [{"data": 1}]}),
            &["channel"],
        ),
        ("trimChannel", json!({"by": by, "io": "IN", "before": "1"}), &["before"]),
        ("createPublicToken", json!({"scopes": []}), &["scopes"]),
        ("createPublicToken", json!({"scopes": ["read:sessions"], "expiresIn": 0}), &["expiresIn"]),
        ("createPublicToken", json!({"scopes": ["read:sessions"], "expiresIn": 2_592_001}), &["expiresIn"]),
    ] {
        let payload = mutate(&graphql, name, "", input).await;
        let says_what_must_be =
            |error: &Value| error["message"].as_str().is_some_and(|text| text.starts_with("must "));
        let errors = payload["userErrors"].as_array().expect("errors");
        if user_errors(&payload) != invalid(paths) || !errors.iter().all(says_what_must_be) {
            wrong.push(format!("{name} {paths:?}: {payload}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let missing = json!({"externalId": "nothing"});
    for (name, input) in [
        ("updateSession", json!({"by": missing})),
        ("closeSession", json!({"by": missing})),
        ("appendRecords", json!({"by": missing, "io": "OUT", "records": [{"data": 1}]})),
        ("trimChannel", json!({"by": missing, "io": "OUT", "before": "0"})),
    ] {
        let payload = mutate(&graphql, name, "", input).await;
        assert_eq!(user_errors(&payload), pairs(&[("NOT_FOUND", "input.by")]), "{name}");
    }
    assert_eq!(stored(&graphql).await, 0);
}

#[tokio::test]
async fn an_update_changes_what_is_given_clears_what_is_null_and_leaves_the_rest() {
    let server = TestServer::start().await;
    let id =
        server.create(json!({"externalId": "s", "tags": ["a"], "metadata": {"n": 1}})).await["id"].take();
    server.create(json!({"externalId": "taken"})).await;
    let graphql = server.graphql();
    for (change, tags, metadata, external) in [
        (json!({}), json!(["a"]), json!({"n": 1}), json!("s")),
        (json!({"tags": ["b", "c"]}), json!(["b", "c"]), json!({"n": 1}), json!("s")),
        (json!({"tags": null}), json!(["b", "c"]), json!({"n": 1}), json!("s")),
        (json!({"metadata": {"m": 2}}), json!(["b", "c"]), json!({"m": 2}), json!("s")),
        (json!({"metadata": null}), json!(["b", "c"]), Value::Null, json!("s")),
        (json!({"externalId": "t"}), json!(["b", "c"]), Value::Null, json!("t")),
        (json!({"externalId": null, "tags": []}), json!([]), Value::Null, Value::Null),
    ] {
        let mut input = change.clone();
        input["by"] = json!({"sessionId": id});
        let payload = mutate(&graphql, "updateSession", "session { tags metadata externalId }", input).await;
        let expected = json!({"tags": tags, "metadata": metadata, "externalId": external});
        assert_eq!(payload["session"], expected, "{change}");
    }
    let clash = json!({"by": {"sessionId": id}, "externalId": "taken"});
    let clash = mutate(&graphql, "updateSession", "session { id }", clash).await;
    assert_eq!(user_errors(&clash)[0].0, "CONFLICT");
    assert_eq!(clash["session"], Value::Null);
}

#[tokio::test]
async fn of_several_closes_the_first_counts_and_nothing_is_written_after_it() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let graphql = server.graphql();
    let fields = "session { status closedAt closedReason in { sealed } }";
    let close = |reason: Value| json!({"by": {"externalId": "s"}, "reason": reason});
    let closed = json!({"status": "CLOSED", "closedAt": "2026-01-01T00:00:00.000Z", "closedReason": "done",
        "in": {"sealed": true}});
    for reason in ["done", "again"] {
        let payload = mutate(&graphql, "closeSession", fields, close(json!(reason))).await;
        assert_eq!((&payload["session"], &payload["userErrors"]), (&closed, &json!([])));
        server.clock.advance(HOUR);
    }
    for io in ["IN", "OUT"] {
        let late = append(&graphql, json!({"io": io, "records": [{"text": "late"}]})).await;
        assert_eq!(user_errors(&late), pairs(&[("SESSION_CLOSED", "input.by")]));
        assert_eq!(
            (&late["records"], &late["tail"], &late["channel"]),
            (&json!([]), &Value::Null, &Value::Null)
        );
    }
    let trim =
        mutate(&graphql, "trimChannel", "", json!({"by": {"externalId": "s"}, "io": "IN", "before": "0"}))
            .await;
    assert_eq!(user_errors(&trim)[0].0, "SESSION_CLOSED");
    let expiry = server.clock.now().plus(HOUR).to_string();
    server.create(json!({"externalId": "e", "expiresAt": expiry})).await;
    server.clock.advance(HOUR);
    let late = append(&graphql, json!({"by": {"externalId": "e"}, "records": [{"text": "late"}]})).await;
    assert_eq!(user_errors(&late), pairs(&[("SESSION_EXPIRED", "input.by")]));
}

#[tokio::test]
async fn a_batch_is_appended_as_one_and_comes_back_as_it_was_given() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let graphql = server.graphql();
    let values = [
        json!(null),
        json!(true),
        json!(0.1),
        json!(u64::MAX),
        json!(i64::MIN),
        json!("text"),
        json!("{not json"),
        json!([]),
        json!({"b": [1, {"a": "\u{1f600}\u{0}\n\""}], "a": null}),
    ];
    let records: Vec<_> = values.iter().map(|value| json!({"data": value})).collect();
    let payload = append(&graphql, json!({"records": records, "clientMutationId": "m"})).await;
    assert_eq!(numbers(&payload), ["0", "1", "2", "3", "4", "5", "6", "7", "8"]);
    assert_eq!((&payload["tail"]["seqNum"], &payload["repeated"]), (&json!("9"), &json!(false)));
    assert_eq!((&payload["channel"]["io"], &payload["clientMutationId"]), (&json!("IN"), &json!("m")));
    for (record, value) in payload["records"].as_array().expect("records").iter().zip(&values) {
        assert_eq!(record["data"], *value);
    }
    let texts = ["plain", "", "[1, 2]", "\"quoted\"", "null", "line\nend \u{1f600}"];
    let records: Vec<_> = texts.iter().map(|text| json!({"text": text})).collect();
    let payload = append(&graphql, json!({"records": records})).await;
    for (record, text) in payload["records"].as_array().expect("records").iter().zip(texts) {
        assert_eq!(record["text"], text);
    }
    let literal = r#"mutation { appendRecords(input: {by: {externalId: "s"}, io: IN, records: {data: {n: 1, l: [true]}}}) {
        records { data } } }"#;
    assert_eq!(
        graphql.payload(literal, json!({})).await["records"],
        json!([{"data": {"n": 1, "l": [true]}}])
    );
    let most: Vec<_> = (0..1000).map(|n| json!({"data": n})).collect();
    let payload = append(&graphql, json!({"channel": "side", "records": most})).await;
    assert_eq!((numbers(&payload).len(), &payload["tail"]["seqNum"]), (1000, &json!("1000")));
}

#[tokio::test]
async fn an_append_that_is_repeated_stores_nothing_and_answers_the_first_places() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let graphql = server.graphql();
    let record = |key: &str, text: &str| json!({"text": text, "idempotencyKey": key});
    let batch = json!({"records": [record("a", "1"), record("b", "2")]});
    let first = append(&graphql, batch.clone()).await;
    append(&graphql, json!({"records": [{"text": "between"}]})).await;
    let server = server.restart().await;
    let graphql = server.graphql();
    let again = append(&graphql, batch).await;
    assert_eq!((numbers(&first), numbers(&again)), (vec!["0", "1"], vec!["0", "1"]));
    assert_eq!((&first["repeated"], &again["repeated"]), (&json!(false), &json!(true)));
    assert_eq!((&again["records"], &again["tail"]["seqNum"]), (&first["records"], &json!("3")));
    for (records, expected) in [
        (json!([record("b", "2"), record("c", "3")]), "CONFLICT"),
        (json!([record("b", "2"), {"text": "without"}]), "CONFLICT"),
        (json!([record("a", "other")]), "IDEMPOTENCY_MISMATCH"),
    ] {
        let refused = append(&graphql, json!({"records": records})).await;
        assert_eq!(
            (user_errors(&refused)[0].0.as_str(), &refused["records"]),
            (expected, &json!([])),
            "{records}"
        );
    }
    let expected = append(&graphql, json!({"records": [record("c", "3")], "expectedSeqNum": "2"})).await;
    assert_eq!(user_errors(&expected), pairs(&[("SEQ_NUM_MISMATCH", "input.expectedSeqNum")]));
    assert_eq!(stored(&graphql).await, 3, "nothing of what was refused is stored");
    for (expected, number) in [(json!("3"), "3"), (json!(4), "4")] {
        let fits = append(&graphql, json!({"records": [{"text": "x"}], "expectedSeqNum": expected})).await;
        assert_eq!(numbers(&fits), [number]);
    }
}

#[tokio::test]
async fn a_trim_moves_the_beginning_and_never_back() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let graphql = server.graphql();
    append(&graphql, json!({"records": vec![json!({"data": 1}); 5]})).await;
    for (before, earliest) in [("0", "0"), ("3", "3"), ("1", "3"), ("3", "3"), ("7", "7")] {
        let input = json!({"by": {"externalId": "s"}, "io": "IN", "before": before});
        let payload = mutate(&graphql, "trimChannel", "channel { earliest }", input).await;
        assert_eq!(payload["channel"]["earliest"], earliest, "{payload}");
    }
    assert_eq!(stored(&graphql).await, 0);
}

#[tokio::test]
async fn a_token_never_exceeds_who_asks_for_it() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let (control, environment) = (server.control().await, server.first_environment().await);
    let scopes = Some(Scopes::new(vec!["read:sessions:s".to_owned()]));
    let key = control.keys().create(&environment, "scoped", scopes, None).await.expect("a key");
    let scoped = server.graphql_as(Some(secrecy::ExposeSecret::expose_secret(&key.secret)));
    let input = json!({"scopes": ["read:sessions:s"]});
    let made = mutate(&scoped, "createPublicToken", "token expiresAt", input.clone()).await;
    assert_eq!(made["expiresAt"], "2026-01-01T00:15:00.000Z", "a quarter of an hour by default");
    let public = server.graphql_as(made["token"].as_str());
    let found = public.data(r#"{ session(by: {externalId: "s"}) { externalId } }"#, json!({})).await;
    assert_eq!(found["session"]["externalId"], "s");
    let query = "mutation($input: CreatePublicTokenInput!) { createPublicToken(input: $input) { token } }";
    let beyond = json!({"input": {"scopes": ["read:sessions:s", "write:sessions:s"]}});
    let refused = scoped.result(query, beyond).await;
    assert_eq!(code(&refused), "SCOPES_EXCEED_KEY_ACCESS");
    assert_eq!(refused["errors"][0]["extensions"]["deniedScopes"], json!(["write:sessions:s"]));
    assert_eq!(code(&public.result(query, json!({"input": input})).await), "UNAUTHORIZED");
    let long = json!({"scopes": ["read:sessions:s"], "expiresIn": 2_592_000});
    let long = mutate(&scoped, "createPublicToken", "expiresAt", long).await;
    assert_eq!(long["expiresAt"], "2026-01-31T00:00:00.000Z");
}

#[tokio::test]
async fn a_request_that_cannot_be_read_whole_changes_nothing() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    let create = r#"createSession(input: {type: "t", taskIdentifier: "a"}) { created }"#;
    let mut wrong = Vec::new();
    for (second, variables) in [
        ("closeSession(input: $v) { clientMutationId }", json!({})),
        ("closeSession(input: $v) { clientMutationId }", json!({"v": null})),
        ("closeSession(input: $v) { clientMutationId }", json!({"v": 1})),
        ("closeSession(input: $v) { clientMutationId }", json!({"v": [1]})),
        ("closeSession(input: $v) { clientMutationId }", json!({"v": {"by": {}}})),
        ("closeSession(input: $v) { clientMutationId }", json!({"v": {"by": "x"}})),
        ("closeSession(input: $v) { nothing }", json!({"v": {"by": {"externalId": "s"}}})),
        (create, json!({"v": {"by": {"externalId": "s"}}})),
    ] {
        let query = format!("mutation($v: CloseSessionInput!) {{ {create} {second} }}");
        let answer = graphql.post(&json!({"query": query, "variables": variables})).await;
        let result = answer.json();
        if answer.status.as_u16() != 400 || code(&result) != "GRAPHQL_VALIDATION_FAILED" {
            wrong.push(format!("{second} {variables}: {result}"));
        }
    }
    let count = graphql.data("{ sessions { totalCount } }", json!({})).await;
    assert_eq!((&count["sessions"]["totalCount"], wrong), (&json!("0"), Vec::<String>::new()));
}

#[tokio::test]
async fn mutations_of_one_request_run_in_their_order_and_a_refused_one_stops_no_other() {
    let server = TestServer::start().await;
    let by = r#"by: {externalId: "s"}"#;
    let append = format!(
        "appendRecords(input: {{{by}, io: IN, records: [{{text: \"x\"}}]}}) {{ tail {{ seqNum }} userErrors {{ code }} }}"
    );
    let query = format!(
        r#"mutation {{ early: {append} createSession(input: {{type: "t", taskIdentifier: "a", externalId: "s"}}) {{ created }}
            one: {append} two: {append} closeSession(input: {{{by}}}) {{ session {{ status }} }} late: {append} }}"#
    );
    let data = server.graphql().data(&query, json!({})).await;
    let appended = |tail: Value, errors: Value| json!({"tail": tail, "userErrors": errors});
    assert_eq!(data["early"], appended(Value::Null, json!([{"code": "NOT_FOUND"}])));
    assert_eq!(data["one"], appended(json!({"seqNum": "1"}), json!([])));
    assert_eq!(data["two"], appended(json!({"seqNum": "2"}), json!([])));
    assert_eq!(data["closeSession"]["session"]["status"], "CLOSED");
    assert_eq!(data["late"], appended(Value::Null, json!([{"code": "SESSION_CLOSED"}])));
}

#[tokio::test]
async fn who_asks_too_often_is_told_when_to_come_back() {
    let server = TestServer::start_with(|config| config.http.rate_limit.token_per_minute = 3).await;
    server.create(json!({"externalId": "s"})).await;
    let token = server.token(&["read:sessions:s", "write:sessions:s"], HOUR).await;
    let graphql = server.graphql_as(Some(&token));
    let viewer = json!({"query": "{ viewer { tokenKind } }"});
    for _ in 0..3 {
        graphql.post(&viewer).await.expect(200);
    }
    let answer = graphql.post(&viewer).await;
    let result = answer.expect(429);
    assert_eq!(code(&result), "RATE_LIMITED");
    assert!(answer.header("x-ratelimit-reset").is_some());
    let wait = &result["errors"][0]["extensions"]["retryAfterMs"];
    assert!(wait.as_u64().is_some_and(|wait| (1..=60_000).contains(&wait)), "{result}");
    for _ in 0..5 {
        let free = append(&graphql, json!({"records": [{"text": "x"}]})).await;
        assert_eq!(free["userErrors"], json!([]), "records have no limit, as over REST");
    }
}
