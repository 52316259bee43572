//! The OpenAPI document, made from the handlers themselves: a route that is served is in it by construction.

use bytes::Bytes;
use serde_json::{Map, Value, json};
use utoipa::openapi::info::InfoBuilder;
use utoipa::openapi::{OpenApi, OpenApiBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{App, blobs, realtime, rest, s2};

/// What every route of a kind may refuse with, beside what its own annotation says.
const REFUSALS: [(&str, &str); 7] = [
    ("400", "The request cannot be read"),
    ("401", "No or invalid credentials"),
    ("403", "The caller's scopes do not allow this; says nothing about whether the session exists"),
    ("404", "No such session in the caller's environment"),
    ("429", "Too many requests, of this caller or of an address without valid credentials"),
    ("500", "A fault of the server's"),
    ("503", "A backend is away; retrying may help"),
];
const BODY_REFUSALS: [(&str, &str); 5] = [
    ("408", "The body did not arrive in time"),
    ("409", "The request contradicts what is stored; repeating it cannot help"),
    ("413", "The body is over its limit"),
    ("415", "The body has a Content-Encoding that is not decoded here"),
    ("422", "The body breaks rules; every one is listed"),
];

/// What the path of a named channel has more than that of the main one.
const NAMED: &str = "/channels/{channel}";

/// Every documented route.
pub fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(rest::sessions::create, rest::sessions::list))
        .routes(routes!(rest::sessions::retrieve, rest::sessions::update))
        .routes(routes!(rest::sessions::close))
        .routes(routes!(rest::sessions::end_and_continue))
        .routes(routes!(rest::waitpoints::wait))
        .routes(routes!(rest::waitpoints::block))
        .routes(routes!(rest::waitpoints::list))
        .routes(routes!(rest::waitpoints::retrieve))
        .routes(routes!(rest::waitpoints::complete))
        .routes(routes!(rest::snapshot::url_to_get, rest::snapshot::url_to_put))
        .routes(routes!(rest::snapshot::transcript))
        .routes(routes!(blobs::get, blobs::head, blobs::put))
        .routes(routes!(rest::auth::claims))
        .routes(routes!(rest::auth::jwt))
        .routes(routes!(rest::auth::public_tokens))
        .routes(routes!(realtime::sse::follow, realtime::head, s2::initialize::initialize))
        .routes(routes!(realtime::append::append))
        .routes(routes!(realtime::records::records))
        .routes(routes!(realtime::sse::follow_named, realtime::head_named))
        .routes(routes!(s2::initialize::initialize_named))
        .routes(routes!(realtime::append::append_named))
        .routes(routes!(realtime::records::records_named))
        .routes(routes!(s2::append, s2::read))
        .routes(routes!(s2::check_tail))
}

/// The document with everything that holds for all routes added, as it is served.
pub fn finished(document: OpenApi) -> Bytes {
    let info = InfoBuilder::new()
        .title("sessiond")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("Durable two-way sessions for agents and their users."))
        .build();
    let mut document = OpenApiBuilder::from(document).info(info).build();
    let schemas = rest::model::error_schemas();
    let components = document.components.get_or_insert_default();
    for (name, schema) in schemas {
        components.schemas.insert(name, schema);
    }
    let mut value = serde_json::to_value(&document).unwrap_or_default();
    complete(&mut value);
    Bytes::from(value.to_string())
}

fn complete(document: &mut Value) {
    document["components"]["securitySchemes"] = json!({
        "secretKey": {"type": "http", "scheme": "bearer", "description": "A secret key, tr_..."},
        "publicToken": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT",
                        "description": "A public access token with scopes"}
    });
    document["components"]["schemas"]["S2ErrorBody"] = json!({
        "type": "object",
        "description": "A refusal in the words of S2.",
        "required": ["code", "message"],
        "properties": {"code": {"type": "string"}, "message": {"type": "string"}}
    });
    let Some(paths) = document["paths"].as_object_mut() else { return };
    complete_named(paths);
    for (path, item) in paths {
        let Some(item) = item.as_object_mut() else { continue };
        let keys_only =
            path.starts_with("/api/v1/auth/") || path.contains("/runs/") || path.ends_with("/transcript");
        let by_url = path.starts_with("/blobs/");
        for (method, operation) in item {
            if !matches!(method.as_str(), "get" | "head" | "post" | "put" | "patch" | "delete") {
                continue;
            }
            operation["security"] = if by_url {
                json!([])
            } else if keys_only {
                json!([{"secretKey": []}])
            } else {
                json!([{"secretKey": []}, {"publicToken": []}])
            };
            let has_body = matches!(method.as_str(), "post" | "patch");
            let refusals = REFUSALS.iter().chain(BODY_REFUSALS.iter().filter(|_| has_body));
            for (status, description) in refusals {
                let body = if path.starts_with("/v1/") { "S2ErrorBody" } else { "ErrorBody" };
                let schema = format!("#/components/schemas/{body}");
                let content = json!({"application/json": {"schema": {"$ref": schema}}});
                let response = if method == "head" {
                    json!({"description": description})
                } else {
                    json!({"description": description, "content": content})
                };
                if operation["responses"].get(status).is_none() {
                    operation["responses"][*status] = response;
                }
            }
        }
    }
}

/// Says of the routes of named channels what their annotations leave out, because the main channel's say it: what they take
/// and answer.
fn complete_named(paths: &mut Map<String, Value>) {
    let named: Vec<String> = paths.keys().filter(|path| path.contains(NAMED)).cloned().collect();
    for path in named {
        let main = paths.get(&path.replacen(NAMED, "", 1)).and_then(Value::as_object).cloned();
        let Some(item) = paths.get_mut(&path).and_then(Value::as_object_mut) else { continue };
        for (method, mut said) in main.unwrap_or_default() {
            let Some(operation) = item.get_mut(&method).and_then(Value::as_object_mut) else { continue };
            let own = operation.get_mut("parameters").and_then(Value::as_array_mut);
            let also = said.get_mut("parameters").and_then(Value::as_array_mut);
            if let (Some(own), Some(also)) = (own, also) {
                own.append(also);
            }
            for field in ["requestBody", "responses"] {
                if let Some(value) = said.get(field) {
                    operation.insert(field.to_owned(), value.clone());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> Value {
        let (_, document) = routes().split_for_parts();
        serde_json::from_slice(&finished(document)).expect("JSON")
    }

    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(object) => {
                found.extend(object.get("$ref").and_then(Value::as_str));
                object.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn nothing_is_referred_to_that_is_not_there() {
        let document = document();
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(!found.is_empty());
        for reference in found {
            let pointer = reference.strip_prefix('#').expect("local");
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
    }

    #[test]
    fn a_named_channel_takes_and_answers_what_the_main_one_does() {
        let document = document();
        let paths = document["paths"].as_object().expect("paths");
        let mut operations = 0;
        for (path, item) in paths.iter().filter(|(path, _)| path.contains(NAMED)) {
            let main = &paths[&path.replacen(NAMED, "", 1)];
            for (method, operation) in item.as_object().expect("an item") {
                let (own, also) = (&operation["parameters"], &main[method]["parameters"]);
                let own = own.as_array().expect("parameters").split_first().expect("one");
                assert_eq!(
                    (own.0["name"].as_str(), own.1),
                    (Some("channel"), also.as_array().expect("parameters").as_slice())
                );
                for field in ["requestBody", "responses"] {
                    assert_eq!(operation.get(field), main[method].get(field), "{method} {path}");
                }
                operations += 1;
            }
        }
        assert_eq!(operations, 5);
    }

    #[test]
    fn every_documented_path_has_a_metric_label_and_every_operation_its_refusals() {
        let document = document();
        let paths = document["paths"].as_object().expect("paths");
        assert_eq!(paths.len(), 23);
        for (path, item) in paths {
            assert!(super::super::ROUTES.contains(&path.as_str()), "{path}");
            for (method, operation) in item.as_object().expect("an object") {
                assert!(operation["responses"]["401"].is_object(), "{method} {path}");
            }
        }
        assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")));
    }
}
