//! Answers to introspection, by document. The schema is the same for everyone and for as long as the process lives, so a
//! document that asks for nothing else needs to be executed once.

use std::fmt;
use std::sync::Arc;

use async_graphql::Request;
use aws_lc_rs::digest;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

/// Bytes of answers kept.
const BUDGET: u64 = 8 * 1024 * 1024;
/// How many answers the budget is expected to hold.
const EXPECTED: usize = 64;
/// Longest document and largest variables of a request whose answer is kept, in bytes: to look for it takes time, too.
const QUERY_MAX: usize = 16_384;
const VARIABLES_MAX: usize = 1024;

/// Everything that an answer depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key([u8; digest::SHA256_OUTPUT_LEN]);

impl Key {
    /// The key of a request that may ask for the schema; `None` for one that does not, or whose answer is not kept.
    pub fn of(request: &Request) -> Option<Self> {
        let query = Some(&request.query).filter(|query| query.len() <= QUERY_MAX)?;
        let mut mentions = query.match_indices("__").map(|(at, _)| &query[at + 2..]);
        if !mentions.any(|word| word.starts_with("schema") || is_type(word)) {
            return None;
        }
        let variables = serde_json::to_vec(&request.variables).ok()?;
        if variables.len() > VARIABLES_MAX {
            return None;
        }
        let name = request.operation_name.as_deref();
        let mut hash = digest::Context::new(&digest::SHA256);
        for part in [query.as_bytes(), name.unwrap_or_default().as_bytes(), &variables] {
            // With its length, so that no part can pass for the end of another.
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hash.update(&[u8::from(name.is_some())]);
        hash.finish().as_ref().try_into().ok().map(Self)
    }
}

/// `__type`, and not `__typename`.
fn is_type(word: &str) -> bool {
    word.strip_prefix("type").is_some_and(|rest| !rest.starts_with("name"))
}

#[derive(Clone)]
struct Length;

impl Weighter<Key, Arc<str>> for Length {
    fn weight(&self, _: &Key, answer: &Arc<str>) -> u64 {
        (answer.len() + size_of::<Key>()) as u64
    }
}

/// What has been asked of the schema, and answered without a fault.
pub(super) struct Introspections(Cache<Key, Arc<str>, Length>);

impl Introspections {
    pub fn new() -> Self {
        Self(Cache::with_weighter(EXPECTED, BUDGET, Length))
    }

    /// The answer to a request.
    pub fn get(&self, key: &Key) -> Option<Arc<str>> {
        self.0.get(key)
    }

    /// Keeps an answer.
    pub fn keep(&self, key: Key, answer: &str) {
        self.0.insert(key, answer.into());
    }
}

impl fmt::Debug for Introspections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Introspections")
    }
}

#[cfg(test)]
mod tests {
    use async_graphql::Variables;
    use serde_json::json;

    use super::*;

    fn request(query: &str, name: Option<&str>, variables: serde_json::Value) -> Request {
        let mut request = Request::new(query).variables(Variables::from_json(variables));
        request.operation_name = name.map(str::to_owned);
        request
    }

    #[test]
    fn whatever_changes_the_answer_changes_the_key() {
        let query =
            "query A($b: Boolean) { __schema { types { name @include(if: $b) } } } query B { __typename }";
        let mut keys = vec![
            Key::of(&request(query, None, json!({}))),
            Key::of(&request(query, Some(""), json!({}))),
            Key::of(&request(query, Some("A"), json!({}))),
            Key::of(&request(query, Some("B"), json!({}))),
            Key::of(&request(query, Some("A"), json!({"b": true}))),
            Key::of(&request(query, Some("A"), json!({"b": false}))),
            Key::of(&request(&format!("{query}A"), None, json!({}))),
        ];
        assert!(keys.iter().all(Option::is_some));
        assert_eq!(keys[4], Key::of(&request(query, Some("A"), json!({"b": true}))));
        while let Some(key) = keys.pop() {
            assert!(!keys.contains(&key), "{keys:?}");
        }
    }

    #[test]
    fn only_what_asks_for_the_schema_has_a_key() {
        for (query, has) in [
            ("{ __schema { queryType { name } } }", true),
            ("{__type(name:\"A\"){name}}", true),
            ("{ __typename }", false),
            ("{ viewer { tokenKind __typename } }", false),
            ("{ __typename __type(name: \"A\") { name } }", true),
            ("{ _ __", false),
        ] {
            assert_eq!(Key::of(&request(query, None, json!({}))).is_some(), has, "{query}");
        }
        let long = json!({"a": "x".repeat(VARIABLES_MAX)});
        assert_eq!(Key::of(&request("{ __schema { queryType { name } } }", None, long)), None);
    }

    #[test]
    fn answers_are_kept_within_a_budget() {
        let kept = Introspections::new();
        let answer = "x".repeat(100_000);
        for n in 0..1000 {
            let key = Key::of(&request(&format!("{{a{n}:__type}}"), None, json!({}))).expect("a key");
            kept.keep(key, &answer);
        }
        assert!(kept.0.len() > 10 && kept.0.weight() <= BUDGET, "{} bytes", kept.0.weight());
    }
}
