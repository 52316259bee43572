//! `cargo xtask chaos`: rounds of the test that breaks everything between Postgres and ClickHouse, one seed after the other.

use clap::Args;

use crate::clickhouse::Fetching;
use crate::nextest::{SELECTION, TARGETS, Tests};
use crate::workspace::Workspace;
use crate::{backends, packages, process, tools};

/// The test. It starts its servers itself.
const ROUND: &str = "binary(it) & test(/^replication::chaos::.*_on_postgres_and_clickhouse/)";

/// Flags of `chaos`.
#[derive(Debug, Args)]
pub(crate) struct ChaosArgs {
    /// Rounds, with the seeds from 1 on
    #[arg(long, default_value_t = 10)]
    rounds: u64,
    /// How long each of them breaks something, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// Runs the rounds, and shows what each of them counts.
///
/// # Errors
/// At the first round that fails.
pub(crate) fn run(args: &ChaosArgs) -> anyhow::Result<()> {
    let workspace = Workspace::locate()?;
    packages::install()?;
    let engine = Fetching::start();
    process::run(workspace.cargo(&["build"]).args(SELECTION).args(TARGETS))?;
    let tests = Tests::find(&workspace, tools::NEXTEST.install(&workspace)?)?;
    let mut environment = backends::programs(&engine.finish()?)?;
    environment.push(("SESSIOND_TEST_CHAOS_SECONDS", args.seconds.to_string()));
    for seed in 1..=args.rounds {
        println!("\n# Round {seed} of {}", args.rounds);
        let mut environment = environment.clone();
        environment.push(("SESSIOND_TEST_CHAOS_SEED", seed.to_string()));
        tests.show(&workspace, ROUND, &environment)?;
    }
    println!("\n{} rounds, and nothing is missing, stale or left over", args.rounds);
    Ok(())
}
