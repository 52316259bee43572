//! `sessiond index ...`: the copy of all sessions that lists come from.

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::Common;
use super::output::OutputArgs;
use crate::domain::list::Filter;
use crate::domain::{ListIndex, MetadataStore};
use crate::server::{Control, open_clickhouse};
use crate::store::index::clickhouse::Rebuild;
use crate::store::index::sql::SqlIndex;
use crate::store::metadata::SqlMetadata;

/// `sessiond index ...`
#[derive(Debug, Subcommand)]
pub(super) enum IndexCommand {
    /// Copy every session from the metadata store into ClickHouse, beside a running server or without one
    ///
    /// Lists come from the copy as it was when this began, until the next one. Sessions that are gone from the metadata
    /// store are gone from lists afterwards.
    Rebuild(RebuildArgs),
}

/// Flags of `index rebuild`.
#[derive(Debug, Args)]
pub(super) struct RebuildArgs {
    /// Go on where the last one was cut off, if it was
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn run(common: &Common, command: IndexCommand) -> anyhow::Result<()> {
    let IndexCommand::Rebuild(RebuildArgs { resume, output }) = command;
    let config = common.load(None)?;
    ensure!(config.clickhouse.url.is_some(), "clickhouse.url is not set, so there is no index to rebuild");
    let clickhouse = open_clickhouse(&config.clickhouse)?;
    let control = common.control().await?;
    let total = total(&control).await?;
    let mut rebuild = Rebuild::begin(clickhouse, control.store.clone(), resume, control.clock.now()).await?;
    // Shows itself on a terminal only.
    let bar = ProgressBar::new(total).with_style(ProgressStyle::with_template(
        "{bar:40} {human_pos} of {human_len} sessions, {per_sec}, {eta} left",
    )?);
    loop {
        bar.set_position(rebuild.progress().sessions);
        if rebuild.progress().finished {
            break;
        }
        rebuild.step().await.context("cut off; `sessiond index rebuild --resume` goes on from here")?;
    }
    bar.finish_and_clear();
    let progress = rebuild.progress();
    let answer = json!({ "sessions": progress.sessions, "withoutMetadataColumn": progress.blanked });
    output.print(&answer, || match progress.blanked {
        0 => format!("copied {} sessions", progress.sessions),
        blanked => format!(
            "copied {} sessions, {blanked} of them with an empty metadata column: its type cannot hold what they have",
            progress.sessions
        ),
    });
    Ok(())
}

/// How many sessions there are, to tell how far the copy is.
async fn total(control: &Control) -> anyhow::Result<u64> {
    let index = SqlIndex::new(SqlMetadata::clone(&control.store));
    let mut total = 0;
    for environment in control.store.environments().await? {
        total += index.count(&environment.id, &Filter::default(), control.clock.now()).await?;
    }
    Ok(total)
}
