//! `sessiond replicate`: the replicator alone, and how it is.

use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::{bail, ensure};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::Common;
use super::output::{OutputArgs, table};
use crate::config::Config;
use crate::domain::{Background, SystemClock, Timestamp};
use crate::replication::flush::Flusher;
use crate::replication::repair::{Replayed, replay};
use crate::replication::status::{Status, status};
use crate::replication::verify::{Verified, verify};
use crate::replication::{Context, Lsn, slot};
use crate::server::{open_context, prepare_process, replicator, source_options};
use crate::store::metadata::{OpenError, OpenOptions, SqlMetadata};
use crate::telemetry::Metrics;
use crate::{shutdown, telemetry};

/// Ids of one kind of difference that are shown to people.
const SHOWN: usize = 20;
/// Dead letters that are listed.
const LISTED: u32 = 1_000;

/// Flags and commands of `replicate`.
#[derive(Debug, Args)]
pub(super) struct ReplicateArgs {
    #[command(subcommand)]
    command: Option<ReplicateCommand>,
}

#[derive(Debug, Subcommand)]
enum ReplicateCommand {
    /// Say how the replication is, and what is wrong with it; the exit code is 1 if anything is
    Status(OutputArgs),
    /// Compare every session in Postgres with ClickHouse while a replicator runs; the exit code is 1 if any differs, and was not repaired
    Verify {
        /// Store again what differs
        #[arg(long)]
        repair: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// List the changes that ClickHouse has refused for what they hold
    DeadLetters {
        /// Store the sessions that they are of as they stand now
        #[arg(long)]
        replay: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Drop the replication slot, so that Postgres keeps nothing for it, and leave it dropped until `start`
    DropSlot,
    /// Let a replicator make the slot anew that was dropped, and copy everything
    Start,
}

pub(super) async fn replicate(common: &Common, args: ReplicateArgs) -> anyhow::Result<()> {
    let config = common.load(None)?;
    config.require_replicable()?;
    match args.command {
        None => run(&config).await,
        Some(ReplicateCommand::Status(output)) => show_status(&config, output).await,
        Some(ReplicateCommand::Verify { repair, output }) => compare(&config, repair, output).await,
        Some(ReplicateCommand::DeadLetters { replay: false, output }) => {
            list_dead_letters(&config, output).await
        }
        Some(ReplicateCommand::DeadLetters { replay: true, output }) => {
            replay_dead_letters(&config, output).await
        }
        Some(ReplicateCommand::DropSlot) => {
            slot::drop_slot(&operator(&config).await?, &config.replication.slot).await?;
            println!("dropped; `sessiond replicate start` begins anew");
            Ok(())
        }
        Some(ReplicateCommand::Start) => {
            slot::start(&operator(&config).await?, &config.replication.slot).await?;
            println!("a replicator makes the slot anew, and copies everything");
            Ok(())
        }
    }
}

async fn run(config: &Config) -> anyhow::Result<()> {
    telemetry::start_logging(&config.telemetry)?;
    config.tell_without_effect();
    prepare_process()?;
    let [stop, _] = shutdown::signalled()?;
    let metadata = open_metadata(config).await?;
    let (stopping, metrics) = (CancellationToken::new(), Metrics::new());
    let faults = metrics.clone();
    let background = Arc::new(Background::new(stopping.clone(), move |task| faults.task_fault(task)));
    let replicator = replicator(config, context(config, metadata, background, &metrics)?)?;
    tracing::info!(slot = config.replication.slot, "replicating");
    let running = replicator.start(stopping.clone());
    stop.await;
    tracing::info!("stopping");
    stopping.cancel();
    running.await?;
    tracing::info!("stopped");
    Ok(())
}

/// Makes no store where there is none: a server does, with its keys.
async fn open_metadata(config: &Config) -> anyhow::Result<SqlMetadata> {
    let options =
        OpenOptions { connections: config.metadata.connections, create: false, ..OpenOptions::default() };
    match SqlMetadata::open(&config.metadata_url(), options).await {
        Err(missing @ OpenError::Missing(_)) => bail!("{missing}: `sessiond serve` makes one"),
        other => Ok(other?),
    }
}

fn context(
    config: &Config,
    metadata: SqlMetadata,
    background: Arc<Background>,
    metrics: &Metrics,
) -> anyhow::Result<Context> {
    open_context(config, metadata, (background, metrics.replication().clone()), Arc::new(SystemClock))
}

/// What a command of an operator works with, beside the replicators that run.
async fn operator(config: &Config) -> anyhow::Result<Context> {
    prepare_process()?;
    let metadata = open_metadata(config).await?;
    context(config, metadata, Arc::default(), &Metrics::new())
}

async fn show_status(config: &Config, output: OutputArgs) -> anyhow::Result<()> {
    let context = operator(config).await?;
    let seen = status(&source_options(config)?, config.replication.heartbeat(), &context).await?;
    output.print(&serde_json::to_value(&seen)?, || describe(&seen));
    ensure!(seen.problems.is_empty(), "{} found", many(seen.problems.len(), "problem"));
    Ok(())
}

async fn compare(config: &Config, repair: bool, output: OutputArgs) -> anyhow::Result<()> {
    let (context, slot) = (operator(config).await?, config.replication.slot.as_str());
    let flusher = Flusher::new(context, slot);
    // Shows itself on a terminal only.
    let style = ProgressStyle::with_template("{spinner} {human_pos} sessions compared, {per_sec}")?;
    let progress = ProgressBar::new_spinner().with_style(style);
    let found = verify(&flusher, slot, repair, |compared| progress.set_position(compared)).await;
    progress.finish_and_clear();
    let found = found?;
    output.print(&serde_json::to_value(&found)?, || describe_comparison(&found));
    let differences = found.differences();
    ensure!(differences == 0 || found.repaired, "{} of sessions", many(differences, "difference"));
    Ok(())
}

fn describe_comparison(found: &Verified) -> String {
    let mut lines = vec![format!("{} sessions compared", found.compared)];
    for (what, ids) in [
        ("missing in ClickHouse", &found.missing),
        ("different in ClickHouse", &found.stale),
        ("only in ClickHouse", &found.phantom),
        ("changed whenever looked at", &found.unsettled),
    ] {
        if ids.is_empty() {
            continue;
        }
        lines.push(format!("{} {what}:", ids.len()));
        lines.extend(ids.iter().take(SHOWN).map(|id| format!("  {id}")));
        if let Some(more) = ids.len().checked_sub(SHOWN).filter(|more| *more > 0) {
            lines.push(format!("  and {more} more"));
        }
    }
    if found.repaired && found.differences() > 0 {
        lines.push("stored again, and the same now".to_owned());
    }
    lines.join("\n")
}

async fn list_dead_letters(config: &Config, output: OutputArgs) -> anyhow::Result<()> {
    let (context, slot) = (operator(config).await?, &config.replication.slot);
    let count = context.postgres.count_dead_letters(slot).await?;
    let letters = context.postgres.dead_letters(slot, Some(LISTED)).await?;
    let json: Vec<_> = letters
        .iter()
        .map(|letter| {
            json!({
                "session": letter.session, "environment": letter.environment, "reason": letter.reason,
                "refusedAt": Timestamp::from_millis(letter.created_at).to_string(), "epoch": letter.epoch, "lsn": Lsn(letter.lsn).to_string(),
            })
        })
        .collect();
    output.print(&json!({"count": count, "deadLetters": json}), || {
        if letters.is_empty() {
            return "no dead letters".to_owned();
        }
        let rows: Vec<_> = letters
            .iter()
            .map(|letter| {
                let refused_at = Timestamp::from_millis(letter.created_at).to_string();
                vec![letter.session.clone(), letter.environment.clone(), refused_at, letter.reason.clone()]
            })
            .collect();
        let mut text = table(&["SESSION", "ENVIRONMENT", "REFUSED AT", "REASON"], &rows);
        if let Some(more) = count.checked_sub(rows.len() as u64).filter(|more| *more > 0) {
            let _ = write!(text, "\nand {more} more");
        }
        text
    });
    Ok(())
}

async fn replay_dead_letters(config: &Config, output: OutputArgs) -> anyhow::Result<()> {
    let (context, slot) = (operator(config).await?, config.replication.slot.as_str());
    let Replayed { stored, refused } = replay(&Flusher::new(context, slot), slot).await?;
    output.print(&json!({"stored": stored, "refused": refused}), || {
        format!("{} stored", many(stored, "session"))
    });
    ensure!(refused == 0, "{} refused again", many(refused, "change"));
    Ok(())
}

fn many(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

fn describe(seen: &Status) -> String {
    let phase = match (seen.phase, &seen.backfilled_to) {
        (Some(phase), Some(to)) => format!("{phase}, up to {to}"),
        (phase, _) => phase.unwrap_or("-").to_owned(),
    };
    let leader = match (&seen.leader, seen.leader_unheard_ms) {
        (Some(leader), Some(millis)) => format!("{leader}, heard of {} s ago", millis / 1000),
        _ => "-".to_owned(),
    };
    let bytes = |bytes: Option<u64>| bytes.map_or("-".to_owned(), |bytes| format!("{bytes} bytes"));
    let read = if seen.is_read { "is read" } else { "is not read" };
    let rows = [
        ("slot", format!("{} ({read})", seen.slot)),
        ("phase", phase),
        ("epoch", seen.epoch.map_or("-".to_owned(), |epoch| epoch.to_string())),
        ("leader", leader),
        ("stored", seen.flushed.clone().map_or("-".to_owned(), |place| format!("up to {place}"))),
        ("behind", bytes(seen.behind_bytes)),
        ("log kept", bytes(seen.retained_bytes)),
        ("refused", many(usize::try_from(seen.dead_letters).unwrap_or(usize::MAX), "change")),
    ];
    let rows = rows.map(|(name, value)| format!("{name:10}{value}"));
    let problems = seen.problems.iter().map(|problem| format!("! {problem}"));
    rows.into_iter().chain(problems).collect::<Vec<_>>().join("\n")
}
