//! `cargo xtask test`: the one command that proves everything, or the named stages of it.

use std::time::Duration;

use anyhow::ensure;
use clap::{Args, ValueEnum};

use crate::postgres::Postgres;
use crate::s2::{self, S2};
use crate::s3::{self, S3};
use crate::stage::Stages;
use crate::workspace::Workspace;
use crate::{lint, node, packages, playground, process};

/// Flags of `test`.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Only these; without any, all of them
    stages: Vec<Stage>,
}

/// The parts of the proof, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// Format
    Fmt,
    /// Warnings
    Clippy,
    /// Dependencies: bans, licences, sources
    Deny,
    /// The server's binary
    Build,
    /// Unit, contract, integration and documentation tests
    Rust,
    /// The SDK suite against the binary, on both engines
    Node,
    /// The suite of GraphQL clients against the binary
    Graphql,
    /// The playground, and pages of other origins, in a browser
    Browser,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Fmt => "fmt",
            Self::Clippy => "clippy",
            Self::Deny => "deny",
            Self::Build => "build",
            Self::Rust => "rust",
            Self::Node => "node",
            Self::Graphql => "graphql",
            Self::Browser => "browser",
        }
    }

    fn run(self, workspace: &Workspace) -> anyhow::Result<()> {
        match self {
            Self::Fmt => lint::fmt(workspace),
            Self::Clippy => lint::clippy(workspace),
            Self::Deny => lint::deny(workspace),
            Self::Build => build(workspace),
            Self::Rust => rust(workspace),
            Self::Node => sdk(workspace),
            Self::Graphql => node::test(workspace, "tests/graphql", Duration::from_secs(120)),
            Self::Browser => browser(workspace),
        }
    }
}

/// Runs the proof.
///
/// # Errors
/// If anything failed, or was skipped.
pub(crate) fn run(args: &TestArgs) -> anyhow::Result<()> {
    let workspace = Workspace::locate()?;
    let wanted = |stage: &Stage| args.stages.is_empty() || args.stages.contains(stage);
    // These suites drive the binary, so naming one alone builds it too.
    let drives = [Stage::Node, Stage::Graphql, Stage::Browser].iter().any(wanted);
    let needed = |stage: &Stage| *stage == Stage::Build && drives;
    let mut stages = Stages::new();
    stages.run("packages", packages::install);
    for stage in Stage::value_variants().iter().filter(|stage| wanted(stage) || needed(stage)) {
        stages.run(stage.name(), || stage.run(&workspace));
    }
    stages.finish()
}

fn build(workspace: &Workspace) -> anyhow::Result<()> {
    // Elsewhere a server without its playground will do; here it is part of what is proved.
    process::run(workspace.cargo(&["build", "--bin", "sessiond"]).env("SESSIOND_REQUIRE_PLAYGROUND", "1"))
}

/// On the embedded log, and again on S2.
fn sdk(workspace: &Workspace) -> anyhow::Result<()> {
    let limit = Duration::from_secs(60);
    node::test(workspace, "tests/node", limit)?;
    let s2 = S2::start(&s2::install(workspace)?)?;
    node::run(workspace, "tests/node", limit, Some(&s2.url()))
}

fn browser(workspace: &Workspace) -> anyhow::Result<()> {
    playground::check(workspace)?;
    node::test(workspace, "tests/browser", Duration::from_secs(180))
}

fn rust(workspace: &Workspace) -> anyhow::Result<()> {
    let postgres = Postgres::start()?;
    let binary = s2::install(workspace)?;
    let s2 = S2::start(&binary)?;
    let s3 = S3::start(&s3::install(workspace)?)?;
    let mut cargo = workspace.cargo(&["test", "--workspace", "--no-fail-fast"]);
    cargo.env("SESSIOND_TEST_POSTGRES", postgres.url());
    cargo.env("SESSIOND_TEST_S2", s2.url()).env("SESSIOND_TEST_S2_BIN", &binary);
    cargo.env("SESSIOND_TEST_S3", s3.url());
    let mut counts = Counts::default();
    let passed = process::run_seen(&mut cargo, |line| counts.see(line))?;
    let Counts { passed: ok, failed, ignored, filtered } = counts;
    ensure!(passed && failed == 0, "{failed} failed of {}", ok + failed);
    ensure!(ignored == 0 && filtered == 0, "{ignored} ignored, {filtered} filtered out");
    ensure!(ok > 0, "no test ran");
    println!("{ok} Rust tests passed, 0 failed, 0 ignored");
    Ok(())
}

/// The sum of the closing lines of every test binary.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
    filtered: u64,
}

impl Counts {
    /// Reads `test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s`.
    fn see(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for part in counts.split("; ") {
            let Some((count, name)) = part.split_once(' ') else { continue };
            let Ok(count) = count.parse::<u64>() else { continue };
            match name {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.ignored += count,
                "filtered out" => self.filtered += count,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_lines_of_every_binary_are_summed() {
        let mut counts = Counts::default();
        for line in [
            "test domain::x ... ok",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 5 filtered out; finished in 1.25s",
        ] {
            counts.see(line);
        }
        assert_eq!(counts, Counts { passed: 7, failed: 2, ignored: 1, filtered: 5 });
    }
}
