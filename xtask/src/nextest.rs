//! The Rust tests: built once, run in two parts, counted, and the slowest named.
//!
//! The first part needs nothing but the build, so that a fault shows before any backend is there; the second needs the
//! backends. Both run what one build has made without asking cargo, which may be busy with something else by then.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::process;
use crate::slowest::Slowest;
use crate::workspace::Workspace;

/// What every build of ours selects: with other packages or features cargo builds the dependencies again.
pub(crate) const SELECTION: [&str; 3] = ["--workspace", "--features", "xtask/bench"];
/// What holds tests, which the servers of `tests/backends` do not.
pub(crate) const TARGETS: [&str; 1] = ["--tests"];
/// The tests that need a Postgres, a ClickHouse, an S2 or an S3. One that needs them and is not named here fails in the first part,
/// and says what it misses.
const ON_BACKENDS: &str = "binary(it) & test(/postgres|clickhouse|s2_engine|::s2::|on_s2|s3|bucket/)";

/// Which tests to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Those that need nothing but the build.
    Alone,
    /// Those that need the backends.
    OnBackends,
}

/// The test binaries of one build.
pub(crate) struct Tests {
    nextest: PathBuf,
    binaries: PathBuf,
    metadata: PathBuf,
    report: PathBuf,
}

impl Tests {
    /// Finds the binaries of a build that is done.
    ///
    /// # Errors
    /// If something does not compile after all.
    pub(crate) fn find(workspace: &Workspace, nextest: PathBuf) -> anyhow::Result<Self> {
        let folder = workspace.target.join("nextest");
        fs::create_dir_all(&folder)?;
        let tests = Self {
            nextest,
            binaries: folder.join("binaries.json"),
            metadata: folder.join("metadata.json"),
            // Wherever the build output is; see `store.dir` in the runner's reference.
            report: workspace.root.join("target/nextest/default/junit.xml"),
        };
        let mut metadata = workspace.cargo(&["metadata", "--format-version", "1", "--all-features"]);
        fs::write(&tests.metadata, process::output(&mut metadata)?)?;
        let mut list =
            workspace.subcommand(&tests.nextest, &["nextest", "list", "--list-type", "binaries-only"]);
        list.args(["--message-format", "json"]).args(SELECTION).args(TARGETS);
        fs::write(&tests.binaries, process::output(&mut list)?)?;
        Ok(tests)
    }

    /// Runs one part, or what of it `only` names, with `environment`, which is asked for only if there is a test to run.
    ///
    /// # Errors
    /// If a test failed or is ignored, or the part is empty.
    pub(crate) fn run(
        &self,
        workspace: &Workspace,
        part: Part,
        only: &[String],
        environment: impl FnOnce() -> anyhow::Result<Vec<(&'static str, String)>>,
    ) -> anyhow::Result<u64> {
        let expression = match part {
            Part::Alone => format!("not ({ON_BACKENDS})"),
            Part::OnBackends => ON_BACKENDS.to_owned(),
        };
        let command = |verb: &str| self.command(workspace, verb, &expression);
        let listed = process::output(command("list").args(["--message-format", "json"]).args(only))?;
        let Listed { wanted, ignored } = listed_tests(&serde_json::from_slice(&listed)?);
        ensure!(ignored == 0, "{ignored} tests are ignored");
        if wanted == 0 {
            ensure!(!only.is_empty(), "no test is in this part");
            return Ok(0);
        }
        let environment = environment()?;
        if self.report.exists() {
            fs::remove_file(&self.report)?;
        }
        let passed = process::run(command("run").args(only).envs(environment));
        let report = fs::read_to_string(&self.report).context("the runner left no report")?;
        let mut slowest = Slowest::default();
        let mut ran = 0;
        for (name, seconds) in cases(&report) {
            slowest.add(name, seconds);
            ran += 1;
        }
        slowest.print();
        passed?;
        ensure!(ran == wanted, "{ran} tests of {wanted} ran");
        println!("{ran} Rust tests passed, 0 failed, 0 ignored");
        Ok(ran)
    }

    /// Runs the tests that `expression` names, of which there must be one, and shows what they print.
    ///
    /// # Errors
    /// If one fails.
    pub(crate) fn show(
        &self,
        workspace: &Workspace,
        expression: &str,
        environment: &[(&str, String)],
    ) -> anyhow::Result<()> {
        let mut command = self.command(workspace, "run", expression);
        command.args(["--success-output", "immediate", "--failure-output", "immediate"]);
        command.args(["--final-status-level", "none"]);
        process::run(command.envs(environment.iter().map(|(name, value)| (name, value))))
    }

    fn command(&self, workspace: &Workspace, verb: &str, expression: &str) -> Command {
        let mut command = workspace.subcommand(&self.nextest, &["nextest", verb, "-E", expression]);
        command.arg("--binaries-metadata").arg(&self.binaries);
        command.arg("--cargo-metadata").arg(&self.metadata);
        command
    }
}

/// What a listing says.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    wanted: u64,
    ignored: u64,
}

/// Counts the tests of `nextest list --message-format json` that its filter lets through.
fn listed_tests(list: &Value) -> Listed {
    let suites = list["rust-suites"].as_object().into_iter().flat_map(|suites| suites.values());
    let cases = suites.filter_map(|suite| suite["testcases"].as_object()).flat_map(|cases| cases.values());
    let mut listed = Listed { wanted: 0, ignored: 0 };
    for case in cases {
        listed.wanted += u64::from(case["filter-match"]["status"] == "matches");
        listed.ignored += u64::from(case["ignored"] == true);
    }
    listed
}

/// The tests of a JUnit report and their seconds. Names are Rust paths, which need no unescaping.
fn cases(report: &str) -> Vec<(String, f64)> {
    let case = |tag: &str| {
        let value = |name: &str| {
            let (_, rest) = tag.split_once(&format!(" {name}=\""))?;
            rest.split_once('"').map(|(value, _)| value)
        };
        let name = format!("{} {}", value("classname")?, value("name")?);
        Some((name, value("time")?.parse().ok()?))
    };
    report.split("<testcase").skip(1).filter_map(|rest| case(rest.split_once('>')?.0)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_listing_is_counted_with_what_it_ignores() {
        let case = |ignored, status| json!({"ignored": ignored, "filter-match": {"status": status}});
        let list = json!({"rust-suites": {
            "a": {"testcases": {"one": case(false, "matches"), "two": case(true, "mismatch")}},
            "a::it": {"testcases": {"three": case(false, "matches"), "four": case(false, "mismatch")}},
        }});
        assert_eq!(listed_tests(&list), Listed { wanted: 2, ignored: 1 });
    }

    #[test]
    fn a_report_is_read_test_by_test() {
        let report = r#"<testsuites name="run" tests="2"><testsuite name="a::it">
            <testcase name="core::reads" classname="a::it" timestamp="2026-01-01" time="1.5">
            </testcase><testcase name="x" classname="a" time="0.002"><failure>name="y"</failure></testcase>"#;
        let expected = [("a::it core::reads".to_owned(), 1.5), ("a x".to_owned(), 0.002)];
        assert_eq!(cases(report), expected);
    }
}
