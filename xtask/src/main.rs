//! Developer commands: `cargo xtask test | lint | schema | playground | chaos | bench`. With `cargo run`, the only commands
//! anyone must know.

mod bench;
mod chaos;
mod clickhouse;
mod lint;
mod node;
mod packages;
mod playground;
mod postgres;
mod process;
mod s2;
mod s3;
mod schema;
mod stage;
mod test;
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
    /// The quick checks: format, clippy, dependencies, the one-way rule
    Lint,
    /// Print `schema.graphql` anew
    Schema,
    /// Bundle the playground again, after a build that had to do without npm
    Playground,
    /// Break everything between Postgres and ClickHouse, and compare every column
    Chaos(chaos::ChaosArgs),
    /// Measure a release build
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Test(args) => test::run(&args),
        Command::Lint => lint::run(),
        Command::Schema => schema::run(),
        Command::Playground => playground::run(),
        Command::Chaos(args) => chaos::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
