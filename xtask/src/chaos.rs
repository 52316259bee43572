//! `cargo xtask chaos`: breaks everything between Postgres and ClickHouse, round after round, and compares every column of
//! every session after each.

use clap::Args;

use crate::test::Servers;
use crate::workspace::Workspace;
use crate::{packages, process};

const ROUND: &str = "replication::chaos::nothing_is_missing_stale_or_left_over_after_everything_has_broken";

/// Flags of `chaos`.
#[derive(Debug, Args)]
pub(crate) struct ChaosArgs {
    /// How many rounds
    #[arg(long, default_value_t = 10)]
    rounds: u32,
    /// Least length of a round
    #[arg(long, default_value_t = 30)]
    seconds: u32,
    /// Of the first round, which it prints; the next ones count up from it
    #[arg(long)]
    seed: Option<u32>,
    /// Prove that a build which confirms before the flush does not get through
    #[arg(long)]
    sabotage: bool,
}

/// Runs the rounds; each prints a line.
///
/// # Errors
/// If any session differs after any round.
pub(crate) fn run(args: &ChaosArgs) -> anyhow::Result<()> {
    let workspace = Workspace::locate()?;
    packages::install()?;
    let servers = Servers::start(&workspace)?;
    let mut cargo = workspace.cargo(&["test", "--package", "sessiond", "--test", "it"]);
    if args.sabotage {
        cargo.args(["--features", "sabotage"]);
    }
    cargo.args(["--", ROUND, "--exact", "--nocapture"]);
    servers.introduce(&mut cargo);
    cargo.env("SESSIOND_CHAOS_ROUNDS", args.rounds.to_string());
    cargo.env("SESSIOND_CHAOS_SECONDS", args.seconds.to_string());
    if let Some(seed) = args.seed {
        cargo.env("SESSIOND_CHAOS_SEED", seed.to_string());
    }
    process::run(&mut cargo)
}
