//! `cargo xtask bench`: measures a `dist` build over loopback, beside its peers if asked.
//!
//! One load generator serves all servers as far as their protocols allow, it shares the machine with them, and its
//! own processor time is shown. Every answer is checked: a record lost, repeated or refused fails the run.

mod catchup;
mod clickhouse;
mod delivery;
mod direct;
mod durable_streams;
mod goals;
mod graphql;
mod http;
mod lists;
mod load;
mod machine;
mod memory;
mod ours;
mod record;
mod redis;
mod replication;
mod report;
mod resp;
mod rows;
mod s2lite;
mod server;
mod stats;
mod target;
mod ws;

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs, process};

use anyhow::{Context, ensure};
use clap::Args;
use tokio::runtime::Builder;

use self::delivery::Pace;
use self::direct::Wire;
use self::durable_streams::DurableStreams;
use self::machine::{Machine, sync_floor};
use self::ours::{Ours, Way};
use self::redis::Redis;
use self::report::{OURS, Samples};
use self::rows::{Bench, DELIVERIES, Row, fresh};
use self::s2lite::S2Lite;
use self::stats::{Spread, median};
use self::target::Target;
use crate::workspace::Workspace;

/// Where `--write` puts the report.
const REPORT: &str = "docs/benchmarks.md";

type Targets = Vec<Box<dyn Target>>;

/// Flags of `bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// What to measure [default: all but lists, clickhouse-lists and replication]
    #[arg(value_enum)]
    rows: Vec<Row>,
    /// Measure Redis, durable-streams and s2-lite in the same run, installing what is missing
    #[arg(long)]
    peers: bool,
    /// Measure only the peers
    #[arg(long, requires = "peers")]
    without_ours: bool,
    /// Seconds of one measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// Alternating rounds of the ack rows; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=9))]
    rounds: u32,
    /// Where the servers keep their data; must be on a disk [default: bench in the target folder]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Another build of the server than this checkout's `dist` build
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Write docs/benchmarks.md too
    #[arg(long)]
    write: bool,
}

/// Measures.
pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let workspace = Workspace::locate()?;
    ensure!(!cfg!(debug_assertions), "a load generator without optimisation would measure itself");
    let _ = rlimit::increase_nofile_limit(16 * 1024)?;
    let parent = args.dir.clone().unwrap_or_else(|| workspace.target.join("bench"));
    let home = fresh(&parent, &process::id().to_string())?;
    let measured = measure(args, &workspace, &home);
    fs::remove_dir_all(&home)?;
    measured
}

fn measure(args: &BenchArgs, workspace: &Workspace, home: &Path) -> anyhow::Result<()> {
    let machine = Machine::look(home)?;
    let (mut targets, extra) = targets(args, workspace);
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let time = Duration::from_secs(args.seconds);
    let mut bench = Bench {
        runtime: &runtime,
        home: home.to_owned(),
        time,
        rounds: args.rounds,
        samples: Samples::default(),
    };
    let mut head = machine.lines;
    for target in &mut targets {
        let version = target.prepare()?;
        let server = bench.start(target.as_ref())?;
        head.push(format!("server: {version}"));
        head.extend(target.proof(&server)?.into_iter().map(|line| without(&line, home)));
    }
    head.iter().for_each(|line| println!("{line}"));
    println!("data: {}", home.display());
    let mut floors = vec![sync_floor(home)?];
    let asked_for_only = [Row::Lists, Row::ClickhouseLists, Row::Replication];
    let wanted = |row: Row| match args.rows.as_slice() {
        [] => !asked_for_only.contains(&row),
        rows => rows.contains(&row),
    };
    if wanted(Row::Ack) {
        bench.ack(&targets, &extra, &mut floors)?;
    }
    if wanted(Row::Delivery) {
        bench.delivery(&targets, &DELIVERIES)?;
    }
    if wanted(Row::CatchUp) {
        bench.catch_up(&targets)?;
    }
    if wanted(Row::Direct) {
        let wires = wires(args, workspace);
        for wire in &wires {
            let version = wire.prepare()?;
            if !version.is_empty() {
                head.push(format!("server: {version}"));
                let server = wire.start(&fresh(home, "server")?)?;
                head.push(without(&format!("command: {}", server.command_line()?), home));
            }
        }
        bench.direct(&wires)?;
    }
    if wanted(Row::Memory) {
        bench.memory(&targets, Pace::AtOnce)?;
    }
    if let Some(ours) = targets.iter().find(|target| target.name() == OURS) {
        if wanted(Row::Graphql) {
            bench.graphql(&binary(args, workspace))?;
        }
        if wanted(Row::Lists) {
            bench.lists(ours.as_ref())?;
        }
        if wanted(Row::ClickhouseLists) {
            head.extend(bench.clickhouse_lists(workspace, &binary(args, workspace))?);
        }
        if wanted(Row::Replication) {
            head.extend(bench.replication(workspace, &binary(args, workspace))?);
        }
    }
    floors.push(sync_floor(home)?);
    let text = report(&head, &floors, &bench.samples)?;
    println!("\n{text}");
    if args.write {
        fs::write(workspace.root.join(REPORT), &text)?;
    }
    Ok(())
}

/// The servers to measure, ours first; and those that get the 64 session row only.
fn targets(args: &BenchArgs, workspace: &Workspace) -> (Targets, Targets) {
    let ours = |way| Box::new(Ours { binary: binary(args, workspace), way });
    let (mut targets, mut extra) = (Targets::new(), Targets::new());
    if !args.without_ours {
        targets.push(ours(Way::Plain));
        extra.push(ours(Way::PartIds));
    }
    if args.peers {
        targets.push(Box::new(Redis));
        targets.push(Box::new(DurableStreams::new(workspace)));
    }
    (targets, extra)
}

/// The servers of the S2 wire, ours first.
fn wires(args: &BenchArgs, workspace: &Workspace) -> Vec<Box<dyn Wire>> {
    let mut wires: Vec<Box<dyn Wire>> = Vec::new();
    if !args.without_ours {
        wires.push(Box::new(Ours { binary: binary(args, workspace), way: Way::Plain }));
    }
    if args.peers {
        wires.push(Box::new(S2Lite::new(workspace)));
    }
    wires
}

fn binary(args: &BenchArgs, workspace: &Workspace) -> PathBuf {
    args.binary.clone().unwrap_or_else(|| workspace.target.join("dist/sessiond"))
}

/// No path of this machine goes into the report.
fn without(line: &str, home: &Path) -> String {
    let line = line.replace(&home.display().to_string(), "DIR");
    let name = |word: &str| match word.strip_prefix('/') {
        Some(path) => path.rsplit('/').next().unwrap_or(path).to_owned(),
        None => word.to_owned(),
    };
    line.split(' ').map(name).collect::<Vec<_>>().join(" ")
}

fn report(head: &[String], floors: &[Spread], samples: &Samples) -> anyhow::Result<String> {
    let of = |pick: fn(&Spread) -> f64| median(floors.iter().map(pick).collect());
    let (p50, p99) = (of(|floor| floor.p50).context("no floor")?, of(|floor| floor.p99).context("no floor")?);
    ensure!(floors.iter().all(|floor| floor.count > 0), "nothing was synced");
    let floor = Spread { count: floors.iter().map(|floor| floor.count).sum(), p50, p99 };
    let arguments: Vec<_> = env::args().skip(1).collect();
    let mut text = format!("# Benchmarks\n\nMade by `cargo xtask {}`.\n\n", arguments.join(" "));
    text.extend(head.iter().map(|line| format!("- {line}\n")));
    let range: Vec<_> = floors.iter().map(|floor| format!("{:.2}", floor.p50)).collect();
    text.push_str(&format!(
        "- fdatasync floor, appending 512 bytes: p50 {p50:.2} ms, p99 {p99:.2} ms (p50 in turn {})\n\n",
        range.join(", ")
    ));
    text.push_str("Records are 256 bytes of JSON; loopback; every ack is after fsync. ");
    text.push_str("Rows of alternating rounds are their median. A ratio is ours over theirs, or GraphQL over the other door.\n\n");
    text.push_str(&samples.tables());
    text.push_str("\n## Goals\n\n");
    text.push_str(&goals::table(samples, floor));
    Ok(text)
}
