//! S2 for tests: basins of their own on the s2-lite that the run started.

use std::sync::Arc;

use sessiond::store::channel::s2::S2Options;

/// The s2-lite of this run.
pub fn endpoint() -> String {
    std::env::var("SESSIOND_TEST_S2").expect(
        "SESSIOND_TEST_S2 is not set: `cargo xtask test` starts an s2-lite and sets it, so run the tests through it",
    )
}

/// A basin that does not exist yet.
pub fn options(endpoint: &str) -> S2Options {
    S2Options {
        endpoint: Some(endpoint.to_owned()),
        basin: format!("test-{}", uuid::Uuid::new_v4().simple()),
        token: "ignored".into(),
        retention: None,
        observer: Arc::new(()),
    }
}
