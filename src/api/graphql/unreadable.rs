//! Requests of the right shape with a text in them that cannot be read: JSON may spell half of a surrogate pair, which no
//! string of ours holds. That is a fault of one operation, and of one variable of it, not of whoever carries it.

use std::collections::HashMap;

use http::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::error::protocol;
use crate::api::error::Failure;

/// A request whose parts are not looked at.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Unread<'a> {
    #[serde(borrow)]
    query: Option<&'a RawValue>,
    #[serde(borrow)]
    operation_name: Option<&'a RawValue>,
    #[serde(borrow)]
    variables: Option<&'a RawValue>,
    #[serde(borrow)]
    extensions: Option<&'a RawValue>,
}

/// What is wrong with a request that could not be read; `None` if it is no request at all.
pub(super) fn part_of(request: &str) -> Option<Failure> {
    // A list would be read as the parts in turn.
    request.trim_start().strip_prefix('{')?;
    let Unread { query, operation_name, variables, extensions } = serde_json::from_str(request).ok()?;
    let parts = [("query", query), ("operationName", operation_name), ("extensions", extensions)];
    let other =
        || parts.into_iter().find_map(|(name, part)| Some(Failure::bad_request(fault(name, part?.get())?)));
    variables.and_then(|variables| variable_of(variables.get())).or_else(other)
}

/// What is wrong with variables that could not be read; `None` if that is something else: they are no JSON, or no object.
pub(super) fn variable_of(variables: &str) -> Option<Failure> {
    let variables: &RawValue = serde_json::from_str(variables).ok()?;
    let each: HashMap<String, &RawValue> = serde_json::from_str(variables.get()).unwrap_or_default();
    let named = each.into_iter().find_map(|(name, value)| fault(&format!("variables.{name}"), value.get()));
    // What cannot be read may be a name.
    let message = named.or_else(|| fault("variables", variables.get()))?;
    Some(protocol(StatusCode::BAD_REQUEST, "bad_user_input", message))
}

fn fault(name: &str, part: &str) -> Option<String> {
    let error = serde_json::from_str::<serde_json::Value>(part).err()?.to_string();
    // The library has several words for it, and these in common.
    Some(match error.contains("hex escape") {
        true => format!("{name} must not contain half of a surrogate pair"),
        false => format!("{name} cannot be read: {}", reason(&error)),
    })
}

/// What a JSON error says, without the place, which means nothing to who has not written the JSON by hand.
pub(super) fn reason(error: &str) -> &str {
    error.split(" at line ").next().unwrap_or_default()
}
