//! Holds every answer of a test run against the server's own API document.

use std::sync::Mutex;

use reqwest::Method;
use serde_json::{Value, json};

use super::server::Answer;

/// The document is the same for every server of a run.
static DOCUMENT: Mutex<Option<Value>> = Mutex::new(None);

/// Fails if the answer's status is not documented for its route, or its JSON does not fit the schema.
pub async fn check(http: &reqwest::Client, url: &str, method: &Method, path: &str, answer: &Answer) {
    let known = DOCUMENT.lock().expect("no panic while held").clone();
    let document = match known {
        Some(document) => document,
        None => {
            let response = http.get(format!("{url}/openapi.json")).send().await.expect("the document");
            let document: Value = response.json().await.expect("JSON");
            *DOCUMENT.lock().expect("no panic while held") = Some(document.clone());
            document
        }
    };
    if let Some(fault) = fault(&document, method, path, answer) {
        panic!("{method} {path} {}: {fault}\n{}", answer.status, answer.text);
    }
}

fn fault(document: &Value, method: &Method, path: &str, answer: &Answer) -> Option<String> {
    let paths = document["paths"].as_object()?;
    // An unknown path or method is no operation; its 404 and 405 are the router's.
    let (template, item) = paths.iter().find(|(template, _)| matches(template, path))?;
    let operation = item.get(method.as_str().to_ascii_lowercase())?;
    let responses = &operation["responses"];
    let Some(response) = responses.get(answer.status.as_str()) else {
        return Some(format!("the status is not documented for {template}"));
    };
    let content_type = answer.header("content-type").unwrap_or_default();
    // The answer to HEAD has the type of a body and none.
    if !content_type.starts_with("application/json") || answer.text.is_empty() {
        return None;
    }
    let response = resolve(document, response);
    let schema = response["content"]["application/json"].get("schema");
    let Some(schema) = schema else { return Some("the JSON body is not documented".to_owned()) };
    let whole = json!({"allOf": [schema], "components": document["components"]});
    let compiled = jsonschema::draft202012::new(&whole).expect("a valid schema");
    let errors: Vec<_> = compiled.iter_errors(&answer.json()).map(|error| error.to_string()).collect();
    (!errors.is_empty()).then(|| errors.join("; "))
}

fn resolve<'a>(document: &'a Value, node: &'a Value) -> &'a Value {
    match node["$ref"].as_str().and_then(|path| path.strip_prefix('#')) {
        Some(pointer) => document.pointer(pointer).expect("a reference that leads somewhere"),
        None => node,
    }
}

fn matches(template: &str, path: &str) -> bool {
    let (template, path): (Vec<_>, Vec<_>) = (template.split('/').collect(), path.split('/').collect());
    template.len() == path.len()
        && template.iter().zip(path).all(|(part, given)| part.starts_with('{') || *part == given)
}
