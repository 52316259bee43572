//! A private Postgres for the tests.

use anyhow::bail;

/// Stops on drop.
pub(crate) struct Postgres;

impl Postgres {
    pub(crate) fn start() -> anyhow::Result<Self> {
        bail!("replaced at merge")
    }

    pub(crate) fn url(&self) -> &str {
        ""
    }
}
