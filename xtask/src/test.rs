//! `cargo xtask test`: the one command that proves everything, or the named stages of it.

use std::cell::{OnceCell, RefCell};
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};

use crate::backends::{Backends, Building};
use crate::clickhouse::Fetching;
use crate::nextest::{Part, SELECTION, TARGETS, Tests};
use crate::node::Suite;
use crate::stage::Stages;
use crate::workspace::Workspace;
use crate::{lint, node, packages, playground, process, python, tools};

/// The SDK and S2's own client against the binary.
const SDK: Suite = Suite { folder: "tests/node", limit: Duration::from_secs(60), at_once: 3 };
/// The clients of GraphQL against the binary.
const GRAPHQL: Suite = Suite { folder: "tests/graphql", limit: Duration::from_secs(120), at_once: 3 };
/// The browser, which keeps both cores busy by itself.
const BROWSER: Suite = Suite { folder: "tests/browser", limit: Duration::from_secs(180), at_once: 1 };

/// Flags of `test`.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Only these; without any, all of them
    stages: Vec<Stage>,
    /// Only tests whose name contains one of these words (matches one, as a regular expression, in the suites of Node and
    /// Python)
    #[arg(last = true, value_name = "NAME")]
    only: Vec<String>,
}

/// The parts of the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// Format
    Fmt,
    /// Everything that the tests run, the server's binary among it
    Build,
    /// Unit, contract and integration tests
    Rust,
    /// Warnings
    Clippy,
    /// Dependencies: bans, licences, sources
    Deny,
    /// The SDK suite against the binary, on both engines
    Node,
    /// The suite of GraphQL clients against the binary
    Graphql,
    /// The GraphQL client of Python against the binary
    Python,
    /// The playground, and pages of other origins, in a browser
    Browser,
}

/// One line of the table: a stage, or a part of one.
struct Step {
    stage: Stage,
    name: &'static str,
    run: fn(&Run) -> anyhow::Result<u64>,
}

/// In the order in which they run: what finds most faults soonest comes first, and what needs a backend last.
const STEPS: &[Step] = &[
    Step { stage: Stage::Fmt, name: "fmt", run: |run| lint::fmt(&run.workspace).map(|()| 0) },
    Step { stage: Stage::Build, name: "build", run: |run| run.built().map(|_| 0) },
    Step { stage: Stage::Rust, name: "rust", run: |run| run.rust(Part::Alone) },
    Step { stage: Stage::Clippy, name: "clippy", run: |run| lint::clippy(&run.workspace).map(|()| 0) },
    Step { stage: Stage::Deny, name: "deny", run: |run| lint::deny(&run.workspace).map(|()| 0) },
    Step { stage: Stage::Rust, name: "rust on backends", run: |run| run.rust(Part::OnBackends) },
    Step { stage: Stage::Node, name: "node", run: |run| run.node(&SDK) },
    Step { stage: Stage::Node, name: "node on S2", run: Run::node_on_s2 },
    Step { stage: Stage::Graphql, name: "graphql", run: |run| run.node(&GRAPHQL) },
    Step { stage: Stage::Python, name: "python", run: Run::python },
    Step { stage: Stage::Browser, name: "browser", run: Run::browser },
];

/// What the steps of one run share.
struct Run {
    workspace: Workspace,
    only: Vec<String>,
    /// Nothing, if no Rust test is to run.
    built: OnceCell<anyhow::Result<Option<Tests>>>,
    runs_rust: bool,
    /// Whether a step needs the backends.
    needs_backends: bool,
    building: RefCell<Option<Building>>,
    engine: RefCell<Option<Fetching>>,
    backends: OnceCell<anyhow::Result<Backends>>,
}

/// Runs the proof.
///
/// # Errors
/// If anything failed, or was skipped.
pub(crate) fn run(args: &TestArgs) -> anyhow::Result<()> {
    let wanted = |stage| args.stages.is_empty() || args.stages.contains(&stage);
    // These drive what is built, so naming one alone builds it too.
    let drives =
        [Stage::Rust, Stage::Node, Stage::Graphql, Stage::Python, Stage::Browser].into_iter().any(wanted);
    let run = Run {
        workspace: Workspace::locate()?,
        only: args.only.clone(),
        built: OnceCell::new(),
        runs_rust: wanted(Stage::Rust),
        needs_backends: wanted(Stage::Rust) || wanted(Stage::Node),
        building: RefCell::new(None),
        engine: RefCell::new(None),
        backends: OnceCell::new(),
    };
    let mut stages = Stages::new(!args.only.is_empty());
    stages.run("packages", || packages::install().map(|()| 0));
    if run.needs_backends {
        run.engine.replace(Some(Fetching::start()));
    }
    for step in STEPS.iter().filter(|step| wanted(step.stage) || (step.stage == Stage::Build && drives)) {
        stages.run(step.name, || (step.run)(&run));
    }
    stages.finish()
}

impl Run {
    /// Builds what the tests run, and begins with the servers of the backends.
    fn built(&self) -> anyhow::Result<&Option<Tests>> {
        once(&self.built, || {
            let mut cargo = self.workspace.cargo(&["build"]);
            // Elsewhere a server without its playground will do; here it is part of what is proved.
            cargo.args(SELECTION).args(TARGETS).env("SESSIOND_REQUIRE_PLAYGROUND", "1");
            process::run(&mut cargo)?;
            let nextest = || Tests::find(&self.workspace, tools::NEXTEST.install(&self.workspace)?);
            let tests = self.runs_rust.then(nextest).transpose()?;
            if self.needs_backends {
                self.building.replace(Some(Building::start(&self.workspace)?));
            }
            Ok(tests)
        })
    }

    fn backends(&self) -> anyhow::Result<&Backends> {
        once(&self.backends, || {
            self.building.take().context("the build failed")?.finish()?;
            let library = self.engine.take().context("the backends were not to run")?.finish()?;
            Backends::start(&self.workspace, library)
        })
    }

    fn rust(&self, part: Part) -> anyhow::Result<u64> {
        let tests = self.built()?.as_ref().context("no Rust test was to run")?;
        tests.run(&self.workspace, part, &self.only, || match part {
            Part::Alone => Ok(Vec::new()),
            Part::OnBackends => self.backends()?.environment(),
        })
    }

    fn node(&self, suite: &Suite) -> anyhow::Result<u64> {
        self.built()?;
        node::install(&self.workspace, suite)?;
        node::run(&self.workspace, suite, &self.only, None)
    }

    fn node_on_s2(&self) -> anyhow::Result<u64> {
        let s2 = self.backends()?.s2_url();
        node::run(&self.workspace, &SDK, &self.only, Some(&s2))
    }

    fn python(&self) -> anyhow::Result<u64> {
        self.built()?;
        let python = python::install(&self.workspace)?;
        python::run(&self.workspace, &python, &self.only)
    }

    fn browser(&self) -> anyhow::Result<u64> {
        playground::check(&self.workspace)?;
        self.node(&BROWSER)
    }
}

/// What `make` made on the first call, or why it could not.
fn once<T>(
    cell: &OnceCell<anyhow::Result<T>>,
    make: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<&T> {
    cell.get_or_init(make).as_ref().map_err(|error| anyhow!("{error:#}"))
}
