//! The shape of `triggerConfig`. There is no run engine: it is checked, kept and given back.

use serde_json::{Map, Value};

use super::read::Reader;
use crate::api::error::Failure;
use crate::domain::id::utf16_len;
use crate::domain::{Error, Violation};

const MACHINES: [&str; 7] =
    ["micro", "small-1x", "small-2x", "medium-1x", "medium-2x", "large-1x", "large-2x"];
const NAME_MAX: usize = 128;
const TAGS_MAX: usize = 10;
const CONCURRENCY_MAX: usize = 2;
const CONCURRENCY_NAME_MAX: usize = 122;

/// What is wrong with a trigger config.
#[derive(Debug)]
pub enum Faults {
    /// Fields of the wrong type.
    Types(Vec<Violation>),
    /// Broken limits.
    Rules(Vec<Violation>),
}

/// 400 for wrong types, 422 for broken limits.
impl From<Faults> for Failure {
    fn from(faults: Faults) -> Self {
        match faults {
            Faults::Types(list) => Self::types(&list),
            Faults::Rules(list) => Error::Invalid(list).into(),
        }
    }
}

impl From<Faults> for Error {
    fn from(faults: Faults) -> Self {
        let (Faults::Types(list) | Faults::Rules(list)) = faults;
        Self::Invalid(list)
    }
}

/// Checks a trigger config, and drops its nulls.
///
/// # Errors
/// [`Faults`], all of one kind at once.
pub fn checked(mut config: Map<String, Value>) -> Result<Map<String, Value>, Faults> {
    config.retain(|_, value| !value.is_null());
    let mut reader = Reader::new(&config, "triggerConfig.");
    let mut rules = Rules::default();
    if reader.object("basePayload").is_none() && !config.contains_key("basePayload") {
        reader.expected("basePayload", "an object");
    }
    for name in ["lockToVersion", "region", "machine", "queue", "externalDeploymentId"] {
        let text = reader.text(name);
        let limited = matches!(name, "queue" | "externalDeploymentId");
        rules.check(name, text.is_none_or(|text| !limited || utf16_len(&text) <= NAME_MAX), || {
            format!("must be at most {NAME_MAX} characters")
        });
    }
    if let Some(machine) = config.get("machine").and_then(Value::as_str) {
        rules.check("machine", MACHINES.contains(&machine), || {
            format!("must be one of {}", MACHINES.join(", "))
        });
    }
    for (name, min, max) in
        [("maxAttempts", 1, 10), ("maxDuration", 1, i64::MAX), ("idleTimeoutInSeconds", 1, 3600)]
    {
        let number = reader.field(name, "an integer", integer);
        rules.check(name, number.is_none_or(|n| (min..=max).contains(&n)), || {
            if max == i64::MAX {
                format!("must be at least {min}")
            } else {
                format!("must be {min} to {max}")
            }
        });
    }
    let tags = reader.texts("tags").unwrap_or_default();
    rules.check("tags", tags.len() <= TAGS_MAX, || format!("must hold at most {TAGS_MAX} tags"));
    rules.check("tags", tags.iter().all(|tag| utf16_len(tag) <= NAME_MAX), || {
        format!("must hold tags of at most {NAME_MAX} characters")
    });
    let names = reader.texts("concurrency").unwrap_or_default();
    rules.check("concurrency", names.len() <= CONCURRENCY_MAX && names.iter().all(|n| is_name(n)), || {
        format!("must hold at most {CONCURRENCY_MAX} names of 1 to {CONCURRENCY_NAME_MAX} of A-Z, a-z, 0-9, '_', '-'")
    });
    let text_or_number = |value: &Value| (value.is_string() || value.is_number()).then_some(());
    reader.field("concurrencyKey", "a string or a number", text_or_number);
    reader.field("ttl", "a string or an integer", |value| {
        (value.is_string() || integer(value).is_some()).then_some(())
    });
    rules.check("ttl", config.get("ttl").and_then(integer).is_none_or(|ttl| ttl >= 0), || {
        "must be at least 0".to_owned()
    });
    let types = reader.faults();
    if !types.is_empty() {
        return Err(Faults::Types(types));
    }
    if rules.0.is_empty() { Ok(config) } else { Err(Faults::Rules(rules.0)) }
}

/// An integer, also when it is written as `3.0`.
fn integer(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| {
        let number = value.as_f64()?;
        (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64)
    })
}

fn is_name(text: &str) -> bool {
    (1..=CONCURRENCY_NAME_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
}

#[derive(Default)]
struct Rules(Vec<Violation>);

impl Rules {
    fn check(&mut self, name: &str, holds: bool, message: impl FnOnce() -> String) {
        if !holds {
            self.0.push(Violation { field: format!("triggerConfig.{name}"), message: message() });
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(config: &Value) -> u16 {
        let mut whole = json!({"basePayload": {}});
        let whole = whole.as_object_mut().expect("an object");
        whole.extend(config.as_object().cloned().expect("an object"));
        checked(whole.clone()).map_or_else(|faults| Failure::from(faults).status.as_u16(), |_| 200)
    }

    #[test]
    fn every_field_holds_at_its_edge() {
        for (config, expected) in [
            (json!({}), 200),
            (json!({"unknown": [1], "machine": null}), 200),
            (json!({"machine": "micro"}), 200),
            (json!({"machine": "huge"}), 422),
            (json!({"machine": 1}), 400),
            (json!({"queue": "x".repeat(128)}), 200),
            (json!({"queue": "x".repeat(129)}), 422),
            (json!({"tags": vec!["t"; 10]}), 200),
            (json!({"tags": vec!["t"; 11]}), 422),
            (json!({"tags": "t"}), 400),
            (json!({"maxAttempts": 10}), 200),
            (json!({"maxAttempts": 11}), 422),
            (json!({"maxAttempts": 0}), 422),
            (json!({"maxAttempts": 1.5}), 400),
            (json!({"maxDuration": 0}), 422),
            (json!({"idleTimeoutInSeconds": 3600}), 200),
            (json!({"idleTimeoutInSeconds": 3601}), 422),
            (json!({"concurrency": ["a", "b-1_c"]}), 200),
            (json!({"concurrency": ["a", "b", "c"]}), 422),
            (json!({"concurrency": ["a b"]}), 422),
            (json!({"concurrencyKey": 3}), 200),
            (json!({"concurrencyKey": {}}), 400),
            (json!({"ttl": "10m"}), 200),
            (json!({"ttl": -1}), 422),
            (json!({"ttl": true}), 400),
            (json!({"basePayload": []}), 400),
        ] {
            assert_eq!(status(&config), expected, "{config}");
        }
        assert!(matches!(checked(Map::new()), Err(Faults::Types(_))));
    }

    #[test]
    fn nulls_are_dropped_and_the_rest_is_kept() {
        let config = json!({"basePayload": {"a": null}, "region": null, "own": 1});
        let kept = checked(config.as_object().cloned().expect("an object")).expect("valid");
        assert_eq!(Value::Object(kept), json!({"basePayload": {"a": null}, "own": 1}));
    }
}
