//! The suites that Node runs against the binary that was just built: the real SDK, the real GraphQL clients, and the
//! browser.

use std::process::Command;
use std::time::Duration;

use anyhow::ensure;

use crate::process;
use crate::workspace::Workspace;

/// The counts that close the output of `node --test` (`# pass 12`).
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    pass: u64,
    fail: u64,
    cancelled: u64,
    skipped: u64,
    todo: u64,
}

impl Counts {
    fn see(&mut self, line: &str) {
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

/// Installs the locked packages of `folder` and runs every `*.test.js` there, none for longer than `limit`.
pub(crate) fn test(workspace: &Workspace, folder: &str, limit: Duration) -> anyhow::Result<()> {
    let dir = workspace.root.join(folder);
    process::run(Command::new("npm").args(["ci", "--no-audit", "--no-fund"]).current_dir(&dir))?;
    run(workspace, folder, limit, None)
}

/// Runs the tests of an installed `folder`, with records kept in the data folder or on the S2 at `s2`.
pub(crate) fn run(
    workspace: &Workspace,
    folder: &str,
    limit: Duration,
    s2: Option<&str>,
) -> anyhow::Result<()> {
    let dir = workspace.root.join(folder);
    let mut node = Command::new("node");
    node.args(["--test", "--test-force-exit", "--test-reporter=tap"])
        .arg(format!("--test-timeout={}", limit.as_millis()))
        .current_dir(&dir)
        .env("SESSIOND_BIN", workspace.debug_binary("sessiond"))
        .env_remove("SESSIOND_TEST_S2")
        .envs(s2.map(|url| ("SESSIOND_TEST_S2", url)));
    let mut counts = Counts::default();
    let passed = process::run_seen(&mut node, |line| counts.see(line))?;
    ensure!(passed && counts.fail == 0 && counts.cancelled == 0, "{} failed", counts.fail + counts.cancelled);
    ensure!(counts.skipped == 0 && counts.todo == 0, "{} skipped", counts.skipped + counts.todo);
    ensure!(counts.pass > 0, "no test ran");
    let engine = if s2.is_some() { " on S2" } else { "" };
    println!("{} tests of {folder} passed{engine}, 0 failed, 0 skipped", counts.pass);
    Ok(())
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
        assert_eq!(counts, Counts { pass: 4, fail: 2, cancelled: 0, skipped: 1, todo: 0 });
    }
}
