//! `cargo xtask bench` in an xtask without the load generator: builds the one that has it, optimised, because a load
//! generator without optimisation would measure itself, and hands the arguments on.

use std::ffi::OsString;
use std::process::Command;

use clap::Args;

use crate::process;
use crate::workspace::Workspace;

/// Whatever follows `bench`.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct BenchArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Builds the server and the load generator, and measures.
///
/// # Errors
/// If one does not build, or as the measurement says.
pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let workspace = Workspace::locate()?;
    // Both in one call, so that they share what they depend on.
    let packages = ["--package", "sessiond", "--package", "xtask", "--features", "xtask/bench"];
    process::run(workspace.cargo(&["build", "--profile", "dist"]).args(packages))?;
    let mut bench = Command::new(workspace.target.join("dist/xtask"));
    process::run(bench.arg("bench").args(&args.rest).env("CARGO_TARGET_DIR", &workspace.target))
}
