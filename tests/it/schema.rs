//! The printed schema: it is what the code says, and it says something about everything.

use serde_json::Value;

use crate::harness::TestServer;

#[test]
fn the_file_is_what_the_code_prints() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/schema.graphql");
    let written = std::fs::read_to_string(file).expect("schema.graphql");
    assert!(written == sessiond::api::graphql::sdl(), "schema.graphql is old: run `cargo xtask schema`");
}

const INTROSPECTION: &str = "{ __schema { types { name kind description specifiedByURL
    fields(includeDeprecated: true) { name description isDeprecated deprecationReason type { name ofType { name } }
        args { name description } }
    inputFields { name description } enumValues(includeDeprecated: true) { name description } } } }";

#[tokio::test]
async fn everything_in_the_schema_is_described_and_every_scalar_specified() {
    let server = TestServer::start().await;
    let body = serde_json::json!({"query": INTROSPECTION});
    let answer =
        server.http.post(format!("{}/graphql", server.url)).json(&body).send().await.expect("an answer");
    let answer: Value = answer.json().await.expect("JSON");
    let types = answer["data"]["__schema"]["types"].as_array().unwrap_or_else(|| panic!("{answer}"));
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let is_text = |value: &Value| value.as_str().is_some_and(|text| !text.trim().is_empty());
    let mut silent = Vec::new();
    let standard = ["Int", "Float", "String", "Boolean", "ID"];
    for kind in types.iter().filter(|kind| !kind["name"].as_str().is_some_and(|name| name.starts_with("__")))
    {
        let name = kind["name"].as_str().expect("a name");
        if standard.contains(&name) {
            continue;
        }
        if !is_text(&kind["description"]) {
            silent.push(name.to_owned());
        }
        if kind["kind"] == "SCALAR" {
            assert!(is_text(&kind["specifiedByURL"]), "{name} is not specified");
        }
        let fields = list(&kind["fields"]);
        for field in &fields {
            assert!(
                field["type"]["name"] != "Int" && field["type"]["ofType"]["name"] != "Int",
                "{name}: {field}"
            );
            assert!(
                field["isDeprecated"] == false || is_text(&field["deprecationReason"]),
                "{name}: {field}"
            );
        }
        let arguments = fields.iter().flat_map(|field| list(&field["args"]));
        let members =
            fields.iter().cloned().chain(list(&kind["inputFields"])).chain(list(&kind["enumValues"]));
        for member in members.chain(arguments) {
            if !is_text(&member["description"]) {
                silent.push(format!("{name}.{}", member["name"].as_str().expect("a name")));
            }
        }
    }
    assert!(silent.is_empty(), "without a description: {silent:?}");
}
