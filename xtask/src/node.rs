//! The suites that Node runs against the binary that was just built: the real SDK, the real GraphQL clients, and the
//! browser.

use std::process::Command;
use std::time::Duration;

use crate::process;
use crate::tap::Counts;
use crate::workspace::Workspace;

/// A folder of tests that Node runs.
pub(crate) struct Suite {
    /// Where it is in the checkout.
    pub(crate) folder: &'static str,
    /// Longest that one test may take.
    pub(crate) limit: Duration,
    /// Test files that run beside each other. Each has a server of its own, and most wait most of the time.
    pub(crate) at_once: usize,
}

/// Installs the locked packages of a suite.
pub(crate) fn install(workspace: &Workspace, suite: &Suite) -> anyhow::Result<()> {
    let mut npm = Command::new("npm");
    process::run(npm.args(["ci", "--no-audit", "--no-fund"]).current_dir(workspace.root.join(suite.folder)))
}

/// Runs an installed suite, or only its tests whose name matches a pattern of `only`, with records kept in the data
/// folder or on the S2 at `s2`.
pub(crate) fn run(
    workspace: &Workspace,
    suite: &Suite,
    only: &[String],
    s2: Option<&str>,
) -> anyhow::Result<u64> {
    let Suite { folder, limit, at_once } = suite;
    let mut node = Command::new("node");
    node.args(["--test", "--test-force-exit", "--test-reporter=tap"])
        .arg(format!("--test-concurrency={at_once}"))
        .arg(format!("--test-timeout={}", limit.as_millis()))
        .args(only.iter().map(|pattern| format!("--test-name-pattern={pattern}")))
        .current_dir(workspace.root.join(folder))
        .env("SESSIOND_BIN", workspace.debug_binary("sessiond"))
        .env_remove("SESSIOND_TEST_S2")
        .envs(s2.map(|url| ("SESSIOND_TEST_S2", url)));
    let mut counts = Counts::default();
    let success = process::run_seen(&mut node, |line| counts.see(line))?;
    let passed = counts.finish(success, !only.is_empty())?;
    let engine = if s2.is_some() { " on S2" } else { "" };
    println!("{passed} tests of {folder} passed{engine}, 0 failed");
    Ok(passed)
}
