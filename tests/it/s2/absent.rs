//! What of S2 this server does not have, and says so: its control plane, encryption, and most codings.

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::TestServer;
use crate::harness::s2::{batch, frame};
use crate::harness::server::KEY;

#[tokio::test]
async fn the_control_plane_answers_in_the_shape_of_s2_and_says_how_streams_are_made() {
    let server = TestServer::start().await;
    for path in [
        "/v1/basins",
        "/v1/basins/sessiond",
        "/v1/streams",
        "/v1/streams/sessions%2Fs%2Fout",
        "/v1/access-tokens",
        "/v1/access-tokens/mine",
        "/v1/metrics",
        "/v1/metrics/sessiond/sessions%2Fs%2Fout",
        "/v1/locations",
    ] {
        for method in [Method::GET, Method::PUT, Method::PATCH, Method::POST, Method::DELETE] {
            let request =
                server.request(method.clone(), path).header("s2-basin", "sessiond").json(&json!({}));
            let answer = server.send(request).await;
            let body = answer.expect(501);
            let message = body["message"].as_str().expect("a message");
            assert!(message.contains("POST /api/v1/sessions"), "{method} {path}: {message}");
            assert_eq!(body["code"], "not_implemented", "{method} {path}");
            assert!(body.get("error").is_none(), "{method} {path}: {body}");
            assert_eq!(answer.header("x-should-retry"), Some("false"), "{method} {path}");
        }
    }
    for (method, path, status, code) in [
        (Method::GET, "/v1/nothing", 404, "not_found"),
        (Method::GET, "/v1/", 404, "not_found"),
        (Method::DELETE, "/v1/streams/x/records", 405, "method_not_allowed"),
        (Method::POST, "/v1/streams/x/records/tail", 405, "method_not_allowed"),
    ] {
        let body = server.send(server.request(method.clone(), path)).await.expect(status);
        assert_eq!(body["code"], code, "{method} {path}");
        assert!(body["message"].is_string() && body.get("error").is_none(), "{method} {path}: {body}");
    }
}

#[tokio::test]
async fn an_encryption_key_is_refused_and_nothing_is_stored_in_the_clear() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let stream = server.wire().open("s", "out").await;
    let record = json!({"records": [{"body": "a secret"}]});
    for (method, query, content_type) in [
        (Method::POST, "", "application/json"),
        (Method::POST, "", "s2s/proto"),
        (Method::GET, "?seq_num=0", "application/json"),
        (Method::GET, "/tail", "application/json"),
    ] {
        let request = stream.request(method.clone(), query).header("s2-encryption-key", "c2VjcmV0");
        let request = request.header("content-type", content_type).body(record.to_string());
        let body = server.send(request).await.expect(400);
        assert_eq!(body["code"], "bad_header", "{method} {query} {content_type}");
        let message = body["message"].as_str().expect("a message");
        assert!(message.contains("s2-encryption-key") && !message.contains("c2VjcmV0"), "{message}");
    }
    assert_eq!(stream.tail().await, 0);
}

#[tokio::test]
async fn a_body_in_a_coding_that_is_not_decoded_is_refused_at_every_door_in_its_own_shape() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let stream = server.wire().open("s", "out").await;
    let url = server.send(server.request(Method::PUT, "/api/v1/sessions/s/snapshot-url")).await;
    let url = url.expect(200)["presignedUrl"].as_str().expect("a URL").to_owned();
    let append = "/realtime/v1/sessions/s/out/append";
    for coding in ["br", "deflate", "compress", "gzip, br", "aws-chunked"] {
        let post = |path: &str| server.request(Method::POST, path).header("content-encoding", coding);
        for (what, request) in [
            ("REST", post("/api/v1/sessions").body("{}")),
            ("append", post(append).body("text")),
            ("snapshot", server.http.put(&url).header("content-encoding", coding).body("text")),
        ] {
            let answer = server.send(request).await;
            assert_eq!(answer.expect(415)["code"], "unsupported_media_type", "{what}: {coding}");
            assert_eq!(answer.header("accept-encoding"), Some("identity"), "{what}: {coding}");
        }
        for bearer in [Some(KEY), None] {
            let request = server.http.post(format!("{}/graphql", server.url));
            let request = bearer.into_iter().fold(request, reqwest::RequestBuilder::bearer_auth);
            let request = request.header("content-encoding", coding).json(&json!({"query": "{__typename}"}));
            let answer = server.send(request).await;
            let code = &answer.expect(415)["errors"][0]["extensions"]["code"];
            assert_eq!(code, "UNSUPPORTED_MEDIA_TYPE", "{coding}");
        }
        for (content_type, body) in [
            ("application/json", br#"{"records":[{"body":"x"}]}"#.to_vec()),
            ("application/protobuf", vec![]),
            ("s2s/proto", frame(&batch(&["x"])).to_vec()),
        ] {
            let request = stream.request(Method::POST, "").header("content-encoding", coding);
            let answer = server.send(request.header("content-type", content_type).body(body)).await;
            let body = answer.expect(415);
            assert_eq!(body["code"], "unsupported_media_type", "{content_type}: {coding}");
            assert!(body["message"].is_string() && body.get("error").is_none(), "{body}");
            let taken = if content_type == "s2s/proto" { "identity" } else { "gzip, zstd" };
            assert_eq!(answer.header("accept-encoding"), Some(taken), "{content_type}: {coding}");
        }
    }
    let plain = server.request(Method::POST, append).header("content-encoding", "identity").body("text");
    server.send(plain).await.expect(200);
    assert_eq!(stream.tail().await, 1, "nothing else is stored");
}

#[tokio::test]
async fn what_is_in_no_envelope_is_read_as_text_or_as_bytes() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    server.append("s", "out", "enveloped").await;
    let stream = server.wire().open("s", "out").await;
    for (headers, body) in [
        (json!([]), "cGxhaW4gIvCfmIAi"),
        (json!([]), "AP+ACg=="),
        (json!([]), "eyJhIjoxfQ=="),
        (json!([["a2V5", "dmFsdWU="]]), ""),
    ] {
        let record = json!({"records": [{"headers": headers, "body": body}]});
        let request = stream.request(Method::POST, "").header("s2-format", "base64").json(&record);
        server.send(request).await.expect(200);
    }
    let read = server.get("/realtime/v1/sessions/s/out/records").await.expect(200);
    let records = read["records"].as_array().expect("records");
    assert_eq!((&records[0]["data"], records[0].get("text")), (&json!("enveloped"), None));
    let bare = |seq: u64, name: &str, value: &str| -> Value {
        let mut record = json!({"data": "", "id": "", "seqNum": seq});
        record[name] = json!(value);
        record
    };
    assert_eq!(records[1], bare(1, "text", "plain \"\u{1f600}\""));
    assert_eq!(records[2], bare(2, "base64", "AP+ACg=="));
    assert_eq!(records[3], bare(3, "text", r#"{"a":1}"#));
    assert_eq!(records[4], json!({"data": "", "id": "", "seqNum": 4, "headers": [["key", "value"]]}));
}
