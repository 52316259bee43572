//! The checks that run nothing of ours: format, clippy, dependencies. And `cargo xtask lint`.

use std::process::Command;

use crate::process;
use crate::stage::Stages;
use crate::workspace::Workspace;

/// The release of cargo-deny that this workspace is checked with.
const CARGO_DENY: &str = "0.20.2";

/// `cargo xtask lint`.
pub(crate) fn run() -> anyhow::Result<()> {
    let workspace = Workspace::locate()?;
    let mut stages = Stages::new();
    stages.run("fmt", || fmt(&workspace));
    stages.run("clippy", || clippy(&workspace));
    stages.run("deny", || deny(&workspace));
    stages.run("layers", || process::run(&mut workspace.cargo(&["test", "--test", "layers"])));
    stages.finish()
}

/// Every file is as rustfmt writes it.
pub(crate) fn fmt(workspace: &Workspace) -> anyhow::Result<()> {
    process::run(&mut workspace.cargo(&["fmt", "--all", "--check"]))
}

/// No warning anywhere.
pub(crate) fn clippy(workspace: &Workspace) -> anyhow::Result<()> {
    process::run(&mut workspace.cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

/// Only the crates, licences and sources that `deny.toml` allows. Advisories are left out: their database
/// changes without us, and a proof must not.
pub(crate) fn deny(workspace: &Workspace) -> anyhow::Result<()> {
    let tools = workspace.cache.join("tools");
    let binary = tools.join("bin/cargo-deny");
    let installed = process::answer(Command::new(&binary).arg("--version"));
    if installed.as_deref() != Some(&format!("cargo-deny {CARGO_DENY}")) {
        let mut install = workspace.cargo(&["install", "cargo-deny", "--locked", "--version", CARGO_DENY]);
        // Its own build output, which cargo removes: ours stays free of a foreign tree.
        process::run(install.arg("--root").arg(&tools).env_remove("CARGO_TARGET_DIR"))?;
    }
    let mut check = Command::new(&binary);
    process::run(check.args(["check", "bans", "licenses", "sources"]).current_dir(&workspace.root))
}
