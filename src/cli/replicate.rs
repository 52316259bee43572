//! `sessiond replicate`: the replicator alone, and the operator's view of it.

use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::Common;
use super::output::{OutputArgs, table};
use crate::clickhouse::ClickHouse;
use crate::config::Config;
use crate::domain::{Clock, SystemClock};
use crate::replication::{self, Difference, Overview, Postgres, Replicator, ReplicatorOptions, Verifier};
use crate::server::{prepare_process, replica_name};
use crate::store::metadata::{self, OpenError};
use crate::{shutdown, telemetry};

/// How long to wait for a Postgres that is away.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// Ids that a report names.
const EXAMPLES: usize = 20;

/// Flags and commands of `replicate`.
#[derive(Debug, Args)]
pub(super) struct ReplicateArgs {
    #[command(subcommand)]
    command: Option<ReplicateCommand>,
}

#[derive(Debug, Subcommand)]
enum ReplicateCommand {
    /// Show where the replication stands, and what is wrong; exit code 1 if anything is
    Status(OutputArgs),
    /// Compare every session in Postgres and ClickHouse; exit code 1 if any differs
    Verify {
        /// Mend what differs, and compare again
        #[arg(long)]
        repair: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Drop the slot, so that Postgres keeps no WAL for it; the next start of a replicator copies every session
    DropSlot {
        /// Drop it even while a replicator reads it
        #[arg(long)]
        force: bool,
    },
    /// List the sessions that ClickHouse refuses
    DeadLetters {
        /// Let them come once more
        #[arg(long)]
        replay: bool,
        /// Only these; without any, all of them
        sessions: Vec<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Both sides, as the settings name them.
struct Sides {
    config: Config,
    postgres: Postgres,
    clickhouse: ClickHouse,
}

impl Sides {
    fn open(common: &Common) -> anyhow::Result<Self> {
        let config = common.load(None)?;
        ensure!(
            config.clickhouse.url.is_some(),
            "set clickhouse.url (and metadata.url to a Postgres) to replicate"
        );
        let postgres = Postgres::new(&config.replication_url()).context("cannot read the URL of Postgres")?;
        let clickhouse = ClickHouse::new(&config.clickhouse);
        Ok(Self { config, postgres, clickhouse })
    }

    fn slot(&self) -> &str {
        &self.config.replication.slot
    }
}

pub(super) async fn replicate(common: &Common, args: ReplicateArgs) -> anyhow::Result<()> {
    let sides = Sides::open(common)?;
    match args.command {
        None => run(sides).await,
        Some(ReplicateCommand::Status(output)) => status(&sides, output).await,
        Some(ReplicateCommand::Verify { repair, output }) => verify(&sides, repair, output).await,
        Some(ReplicateCommand::DropSlot { force }) => drop_slot(&sides, force).await,
        Some(ReplicateCommand::DeadLetters { replay, sessions, output }) => {
            dead_letters(&sides, replay, &sessions, output).await
        }
    }
}

async fn run(sides: Sides) -> anyhow::Result<()> {
    telemetry::start_logging(&sides.config.telemetry)?;
    sides.config.tell_ignored();
    prepare_process()?;
    let stop = shutdown::signalled()?;
    let stopping = CancellationToken::new();
    let migrating = migrate(sides.config.metadata_url());
    tokio::pin!(stop);
    tokio::select! {
        migrated = migrating => migrated?,
        () = &mut stop => return Ok(()),
    }
    let options = ReplicatorOptions {
        url: sides.config.replication_url(),
        config: sides.config.replication,
        clickhouse: sides.clickhouse,
        name: replica_name(),
        metrics: telemetry::Metrics::new().replication().clone(),
    };
    let running = tokio::spawn(Replicator::new(options)?.run(stopping.clone()));
    stop.await;
    stopping.cancel();
    running.await?;
    Ok(())
}

/// The tables of the replication are part of the metadata store's schema. A Postgres that is away will come back.
async fn migrate(url: String) -> anyhow::Result<()> {
    loop {
        match metadata::migrate(&url).await {
            Err(error @ (OpenError::Connect(_) | OpenError::Database(_))) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot open the metadata store, trying again"
                );
                tokio::time::sleep(TRY_AGAIN).await;
            }
            other => return Ok(other.map(drop)?),
        }
    }
}

async fn status(sides: &Sides, output: OutputArgs) -> anyhow::Result<()> {
    let now = SystemClock.now().millis();
    let overview = replication::overview(&sides.postgres, &sides.clickhouse, &sides.config.replication, now)
        .await
        .context("Postgres does not answer")?;
    output.print(&serde_json::to_value(&overview)?, || describe(&overview));
    ensure!(overview.problems.is_empty(), "{} problems", overview.problems.len());
    Ok(())
}

fn describe(seen: &Overview) -> String {
    let none = || "-".to_owned();
    let read = if seen.active { "being read" } else { "read by nobody" };
    let slot = if seen.exists { read } else { "missing" };
    let rows = [
        ("slot", format!("{} ({slot})", seen.slot)),
        ("leader", seen.leader.clone().unwrap_or_else(none)),
        ("epoch", format!("{} {}", seen.epoch, seen.status.unwrap_or("not begun"))),
        ("flushed", format!("{}, {} bytes behind", seen.flushed.clone().unwrap_or_else(none), seen.behind)),
        (
            "WAL held",
            format!(
                "{} of {} bytes, {}",
                seen.retained,
                seen.max_wal,
                seen.wal_status.as_deref().unwrap_or("-")
            ),
        ),
        ("dead letters", seen.dead_letters.to_string()),
        ("ClickHouse", seen.clickhouse.clone().unwrap_or_else(|| "answers".to_owned())),
    ];
    let rows = rows.map(|(name, value)| format!("{name:14}{value}"));
    let problems = seen.problems.iter().map(|problem| format!("! {problem}"));
    rows.into_iter().chain(problems).collect::<Vec<_>>().join("\n")
}

async fn verify(sides: &Sides, repair: bool, output: OutputArgs) -> anyhow::Result<()> {
    let verifier = Verifier::new(sides.postgres.clone(), sides.clickhouse.clone(), sides.slot().to_owned());
    let mut report = verifier.compare().await?;
    let found = report.differences.len();
    if repair && found > 0 {
        verifier.repair(&report).await?;
        report = verifier.compare().await?;
    }
    let count = |difference| report.count(difference);
    let (missing, stale, phantom) =
        (count(Difference::Missing), count(Difference::Stale), count(Difference::Phantom));
    let examples: Vec<_> = report
        .differences
        .iter()
        .take(EXAMPLES)
        .map(|(id, found)| format!("{id} {found:?}").to_lowercase())
        .collect();
    let json = json!({
        "compared": report.compared, "missing": missing, "stale": stale, "phantom": phantom,
        "repaired": if repair { found.saturating_sub(report.differences.len()) } else { 0 }, "examples": examples,
    });
    output.print(&json, || {
        let repaired = if repair { format!(", {} repaired", json["repaired"]) } else { String::new() };
        let head = format!(
            "{} sessions compared: {missing} missing, {stale} stale, {phantom} phantom{repaired}",
            report.compared
        );
        [head].into_iter().chain(examples.iter().cloned()).collect::<Vec<_>>().join("\n")
    });
    ensure!(report.differences.is_empty(), "{} sessions differ", report.differences.len());
    Ok(())
}

async fn drop_slot(sides: &Sides, force: bool) -> anyhow::Result<()> {
    let Some(slot) = sides.postgres.slot(sides.slot()).await? else {
        println!("there is no slot {}", sides.slot());
        return Ok(());
    };
    ensure!(
        force || slot.active_pid.is_none(),
        "a replicator reads the slot {} and would make it anew at once; stop it first, or give --force",
        sides.slot()
    );
    sides.postgres.drop_slot(sides.slot()).await?;
    println!(
        "dropped the slot {}, which held {} bytes of WAL; the next start of a replicator begins a new epoch and copies \
         every session",
        sides.slot(),
        slot.retained
    );
    Ok(())
}

async fn dead_letters(
    sides: &Sides,
    replay: bool,
    sessions: &[String],
    output: OutputArgs,
) -> anyhow::Result<()> {
    let mut letters = replication::dead_letters(&sides.postgres, sides.slot()).await?;
    letters.retain(|letter| sessions.is_empty() || sessions.contains(&letter.session));
    if replay {
        let ids: Vec<_> = letters.iter().map(|letter| letter.session.clone()).collect();
        replication::replay(&sides.postgres, sides.slot(), &ids).await?;
    }
    let json: Vec<_> = letters
        .iter()
        .map(|letter| {
            json!({
                "session": letter.session, "environment": letter.environment, "version": letter.version,
                "error": letter.error, "foundAt": letter.found_at,
            })
        })
        .collect();
    output.print(&json.into(), || {
        let rows: Vec<_> = letters
            .iter()
            .map(|letter| vec![letter.session.clone(), letter.environment.clone(), letter.error.clone()])
            .collect();
        let sent = if replay { "\nsent once more" } else { "" };
        format!("{}{sent}", table(&["session", "environment", "error"], &rows))
    });
    Ok(())
}
