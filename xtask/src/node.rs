//! The suites that Node runs against the binary that was just built: the real SDK, the real GraphQL clients, and the
//! browser.

use std::process::Command;
use std::time::Duration;

use anyhow::ensure;

use crate::process;
use crate::slowest::Slowest;
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

/// What `node --test` says: the counts at the end (`# pass 12`), and how long each test took.
#[derive(Debug, Default, PartialEq)]
struct Counts {
    pass: u64,
    fail: u64,
    cancelled: u64,
    skipped: u64,
    todo: u64,
    slowest: Slowest,
    /// The test whose time comes next.
    current: String,
}

impl Counts {
    fn see(&mut self, line: &str) {
        let line = line.trim_start();
        let verdict = line.strip_prefix("not ").unwrap_or(line);
        if let Some((_, name)) = verdict.strip_prefix("ok ").and_then(|rest| rest.split_once(" - ")) {
            name.clone_into(&mut self.current);
        } else if let Some(millis) =
            line.strip_prefix("duration_ms: ").and_then(|text| text.parse::<f64>().ok())
        {
            self.slowest.add(std::mem::take(&mut self.current), millis / 1000.0);
        }
        let Some((name, count)) = line.strip_prefix("# ").and_then(|rest| rest.split_once(' ')) else {
            return;
        };
        let Ok(count) = count.parse() else { return };
        match name {
            "pass" => self.pass = count,
            "fail" => self.fail = count,
            "cancelled" => self.cancelled = count,
            "skipped" => self.skipped = count,
            "todo" => self.todo = count,
            _ => {}
        }
    }
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
    let passed = process::run_seen(&mut node, |line| counts.see(line))?;
    counts.slowest.print();
    ensure!(passed && counts.fail == 0 && counts.cancelled == 0, "{} failed", counts.fail + counts.cancelled);
    let skipped = counts.skipped + counts.todo;
    ensure!(skipped == 0 || !only.is_empty(), "{skipped} skipped");
    ensure!(counts.pass > 0, "no test ran");
    let engine = if s2.is_some() { " on S2" } else { "" };
    println!("{} tests of {folder} passed{engine}, 0 failed", counts.pass);
    Ok(counts.pass)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_lines_of_node_are_counted() {
        let mut counts = Counts::default();
        for line in
            ["ok 1 - # skipped words", "# tests 9", "# pass 4", "# fail 2", "# cancelled 0", "# skipped 1"]
        {
            counts.see(line);
        }
        assert_eq!(
            counts,
            Counts { pass: 4, fail: 2, skipped: 1, current: counts.current.clone(), ..Counts::default() }
        );
    }

    #[test]
    fn the_times_of_tests_are_taken() {
        let mut counts = Counts::default();
        for line in ["# Subtest: one", "not ok 7 - one - two", "  ---", "  duration_ms: 1500.25", "  ..."] {
            counts.see(line);
        }
        let mut slowest = Slowest::default();
        slowest.add("one - two".to_owned(), 1.50025);
        assert_eq!(counts.slowest, slowest);
    }
}
