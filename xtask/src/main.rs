//! Developer commands: `cargo xtask test | chaos | up | lint | schema | playground | bench | timings`. With
//! `cargo run`, the only commands anyone must know.

mod backends;
#[cfg(feature = "bench")]
mod bench;
#[cfg(not(feature = "bench"))]
#[path = "bench_build.rs"]
mod bench;
mod chaos;
mod clickhouse;
mod interrupt;
mod lint;
mod nextest;
mod node;
mod packages;
mod playground;
mod postgres;
mod process;
mod python;
mod schema;
mod server;
mod slowest;
mod stage;
mod tap;
mod test;
mod timings;
mod tools;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer commands of sessiond.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prove everything: install what is missing, check, build, run every test
    Test(test::TestArgs),
    /// Break everything between Postgres and ClickHouse, round after round, and compare
    Chaos(chaos::ChaosArgs),
    /// Start the backends of the tests and keep them running
    Up,
    /// The quick checks: format, clippy, dependencies, the one-way rule
    Lint,
    /// Print `schema.graphql` anew
    Schema,
    /// Bundle the playground again, after a build that had to do without npm
    Playground,
    /// Measure a `dist` build
    Bench(bench::BenchArgs),
    /// Measure what building costs, from nothing
    Timings(timings::TimingsArgs),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let done = interrupt::install().and_then(|()| match command {
        Command::Test(args) => test::run(&args),
        Command::Chaos(args) => chaos::run(&args),
        Command::Up => backends::up(),
        Command::Lint => lint::run(),
        Command::Schema => schema::run(),
        Command::Playground => playground::run(),
        Command::Bench(args) => bench::run(&args),
        Command::Timings(args) => timings::run(&args),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
