//! The checks that run nothing of ours: format, clippy, dependencies. And `cargo xtask lint`.

use crate::nextest::SELECTION;
use crate::stage::Stages;
use crate::workspace::Workspace;
use crate::{process, tools};

/// `cargo xtask lint`.
pub(crate) fn run() -> anyhow::Result<()> {
    let workspace = Workspace::locate()?;
    let mut stages = Stages::new(false);
    stages.run("fmt", || fmt(&workspace).map(|()| 0));
    stages.run("clippy", || clippy(&workspace).map(|()| 0));
    stages.run("deny", || deny(&workspace).map(|()| 0));
    stages.run("layers", || {
        process::run(workspace.cargo(&["test", "--test", "layers"]).args(SELECTION)).map(|()| 1)
    });
    stages.finish()
}

/// Every file is as rustfmt writes it.
pub(crate) fn fmt(workspace: &Workspace) -> anyhow::Result<()> {
    process::run(&mut workspace.cargo(&["fmt", "--all", "--check"]))
}

/// No warning anywhere.
pub(crate) fn clippy(workspace: &Workspace) -> anyhow::Result<()> {
    let run = |selection: &[&str]| {
        let mut clippy = workspace.cargo(&["clippy"]);
        process::run(clippy.args(selection).args(["--", "-D", "warnings"]))
    };
    run(&[&["--all-targets"], &SELECTION[..]].concat())?;
    // Alone, as `cargo run` builds it: without the features that other packages and the tests ask of the same crates.
    run(&["--package", "sessiond", "--bin", "sessiond"])
}

/// Only the crates, licences and sources that `deny.toml` allows. Advisories are left out: their database
/// changes without us, and a proof must not.
pub(crate) fn deny(workspace: &Workspace) -> anyhow::Result<()> {
    let tool = tools::DENY.install(workspace)?;
    process::run(&mut workspace.subcommand(&tool, &["check", "bans", "licenses", "sources"]))
}
