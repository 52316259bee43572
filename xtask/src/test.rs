//! `cargo xtask test`: the one command that proves everything, or the named stages of it.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use clap::{Args, ValueEnum};

use crate::clickhouse::{self, ClickHouse};
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

/// The real servers that the tests of the binary talk to.
pub(crate) struct Servers {
    postgres: Postgres,
    s2: S2,
    s2_binary: PathBuf,
    s3: S3,
    clickhouse: ClickHouse,
    clickhouse_program: PathBuf,
}

impl Servers {
    /// Installs what is missing, and starts them all.
    ///
    /// # Errors
    /// The first one's that does not start.
    pub(crate) fn start(workspace: &Workspace) -> anyhow::Result<Self> {
        let (s2_binary, clickhouse_program) = (s2::install(workspace)?, clickhouse::install(workspace)?);
        Ok(Self {
            postgres: Postgres::start()?,
            s2: S2::start(&s2_binary)?,
            s2_binary,
            s3: S3::start(&s3::install(workspace)?)?,
            clickhouse: ClickHouse::start(&clickhouse_program)?,
            clickhouse_program,
        })
    }

    /// Tells a test run where they are.
    pub(crate) fn introduce<'a>(&self, cargo: &'a mut Command) -> &'a mut Command {
        cargo
            .env("SESSIOND_TEST_POSTGRES", self.postgres.url())
            .env("SESSIOND_TEST_POSTGRES_BIN", self.postgres.binaries())
            .env("SESSIOND_TEST_S2", self.s2.url())
            .env("SESSIOND_TEST_S2_BIN", &self.s2_binary)
            .env("SESSIOND_TEST_S3", self.s3.url())
            .env("SESSIOND_TEST_CLICKHOUSE", self.clickhouse.url())
            .env("SESSIOND_TEST_CLICKHOUSE_BIN", &self.clickhouse_program)
    }
}

fn rust(workspace: &Workspace) -> anyhow::Result<()> {
    let servers = Servers::start(workspace)?;
    let mut cargo = workspace.cargo(&["test", "--workspace", "--no-fail-fast"]);
    servers.introduce(&mut cargo);
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
