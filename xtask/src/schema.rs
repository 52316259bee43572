//! `cargo xtask schema`: writes `schema.graphql` as the code prints it.

use std::fs;
use std::process::Command;

use anyhow::{Context, ensure};

use crate::nextest::SELECTION;
use crate::process;
use crate::workspace::Workspace;

/// Prints the schema.
///
/// # Errors
/// If the server cannot be built or the file cannot be written.
pub(crate) fn run() -> anyhow::Result<()> {
    let workspace = Workspace::locate()?;
    // With a test among it, cargo takes the features, and so the build, that the tests have.
    let targets = ["--bin", "sessiond", "--test", "layers"];
    process::run(workspace.cargo(&["build"]).args(SELECTION).args(targets))?;
    let printed = Command::new(workspace.debug_binary("sessiond")).arg("schema").output()?;
    ensure!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
    let file = workspace.root.join("schema.graphql");
    fs::write(&file, printed.stdout).with_context(|| format!("cannot write {}", file.display()))?;
    println!("wrote {}", file.display());
    Ok(())
}
