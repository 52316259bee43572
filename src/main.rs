//! Starts the command line; everything else is in the library.

use std::process::ExitCode;

use clap::Parser;

/// An append spends less in it than in the C library's, and an idle follower holds less.
#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match sessiond::cli::run(sessiond::cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sessiond: {error:#}");
            ExitCode::FAILURE
        }
    }
}
