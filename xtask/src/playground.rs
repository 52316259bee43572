//! `cargo xtask playground`, and what the browser suite asks of the playground's sources.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process;
use crate::workspace::Workspace;

/// Bundles the playground where it is, which shows what npm says, and has the next build of the server do it again.
pub(crate) fn run() -> anyhow::Result<()> {
    let dir = dir(&Workspace::locate()?);
    install(&dir)?;
    process::run(Command::new("npm").args(["run", "build"]).current_dir(&dir))?;
    // The same words with a new date, which is what `build.rs` watches.
    let page = dir.join("index.html");
    fs::write(&page, fs::read(&page)?)?;
    println!("the next `cargo build` or `cargo run` takes the playground in");
    Ok(())
}

/// Checks the types of the sources, which bundling does not.
pub(crate) fn check(workspace: &Workspace) -> anyhow::Result<()> {
    let dir = dir(workspace);
    install(&dir)?;
    process::run(Command::new("npm").args(["run", "check"]).current_dir(&dir))
}

fn dir(workspace: &Workspace) -> PathBuf {
    workspace.root.join("playground")
}

fn install(dir: &Path) -> anyhow::Result<()> {
    let options = ["ci", "--ignore-scripts", "--no-audit", "--no-fund"];
    process::run(Command::new("npm").args(options).current_dir(dir))
}
