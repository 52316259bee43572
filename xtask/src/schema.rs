//! `cargo xtask schema`: writes `schema.graphql` as the code prints it.

use std::fs;

use anyhow::{Context, ensure};

use crate::workspace::Workspace;

/// Prints the schema.
///
/// # Errors
/// If the server cannot be built or the file cannot be written.
pub(crate) fn run() -> anyhow::Result<()> {
    let workspace = Workspace::locate()?;
    let printed = workspace.cargo(&["run", "--quiet", "--bin", "sessiond", "--", "schema"]).output()?;
    ensure!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
    let file = workspace.root.join("schema.graphql");
    fs::write(&file, printed.stdout).with_context(|| format!("cannot write {}", file.display()))?;
    println!("wrote {}", file.display());
    Ok(())
}
