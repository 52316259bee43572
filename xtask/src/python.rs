//! The suite that Python runs against the binary that was just built: the GraphQL client of Python, and S2's own.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::tap::Counts;
use crate::workspace::{Workspace, keep};
use crate::{packages, process};

const FOLDER: &str = "tests/python";
/// Every package with its version and digest.
const REQUIREMENTS: &str = "requirements.txt";
/// Names what is installed: by which Python, and what.
const KEY: &str = "import hashlib, platform, sys; \
                   digest = hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest(); \
                   print(platform.python_version(), digest[:16], sep='-')";

/// The Python that has the suite's packages, installed into the cache if these are not there.
///
/// # Errors
/// If they cannot be installed as they are pinned.
pub(crate) fn install(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    if process::answer(Command::new("python3").args(["-c", "import ensurepip, venv"])).is_none() {
        packages::debian(&["python3", "python3-venv"])?;
    }
    let requirements = workspace.root.join(FOLDER).join(REQUIREMENTS);
    let key = process::answer(Command::new("python3").args(["-c", KEY]).arg(&requirements))
        .context("python3 does not run here")?;
    let home = workspace.tool(&format!("python-{key}"));
    let python = python_of(&home);
    if python.exists() {
        return Ok(python);
    }
    let work = workspace.scratch("python")?;
    let environment = work.path.join("environment");
    process::run(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
    let mut pip = Command::new(python_of(&environment));
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    process::run(pip.args(["--only-binary=:all:", "--require-hashes", "--requirement"]).arg(&requirements))?;
    // Scripts in it would name the old place; its Python does not.
    keep(&environment, &home, &python)?;
    Ok(python)
}

/// Runs the suite with an installed Python, or only its tests whose name matches a pattern of `only`.
///
/// # Errors
/// If a test failed or was skipped, or none ran.
pub(crate) fn run(workspace: &Workspace, python: &Path, only: &[String]) -> anyhow::Result<u64> {
    let mut command = Command::new(python);
    // Leaves no bytecode in the checkout, and takes no settings from whoever calls us.
    command.args(["-B", "-E", "run.py"]).args(only);
    command.current_dir(workspace.root.join(FOLDER)).env("SESSIOND_BIN", workspace.debug_binary("sessiond"));
    let mut counts = Counts::default();
    let success = process::run_seen(&mut command, |line| counts.see(line))?;
    let passed = counts.finish(success, !only.is_empty())?;
    println!("{passed} tests of {FOLDER} passed, 0 failed");
    Ok(passed)
}

fn python_of(environment: &Path) -> PathBuf {
    environment.join("bin/python")
}
