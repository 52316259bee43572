//! `cargo xtask bench`.

use anyhow::bail;
use clap::Args;

/// Flags of `bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {}

/// Measures.
pub(crate) fn run(_args: &BenchArgs) -> anyhow::Result<()> {
    bail!("replaced at merge")
}
