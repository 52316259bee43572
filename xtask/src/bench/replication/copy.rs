//! The peer of the drain: what a simple job does that copies sessions from Postgres to ClickHouse. It reads by a cursor and
//! inserts batches through the HTTP interface, one after the other. Postgres makes the JSON of the rows.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::Installation;
use super::drain::BACKLOG;
use crate::bench::clickhouse::ask;

/// How the table names it.
pub(super) const NAME: &str = "plain copy";
/// Rows of an insert, and of what the cursor fetches at once.
pub(super) const BATCH: u64 = 1000;
/// The table, made as the one that ours is.
const TABLE: &str = "sessions_copied";

/// Copies the sessions of `task` into a new table. Returns what that takes.
///
/// # Errors
/// If the table does not hold all of the backlog then.
pub(super) fn copy(installation: &Installation, task: &str) -> anyhow::Result<Duration> {
    let engine = &installation.engine;
    engine.tell(&format!("CREATE TABLE trigger_dev.{TABLE} AS trigger_dev.sessions_v1"))?;
    let began = Instant::now();
    let mut psql = installation.postgres.psql()?;
    // With it psql reads by a cursor.
    psql.args(["-v", &format!("FETCH_COUNT={BATCH}"), "-c", &rows_of(task)]);
    let mut psql = psql.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start psql")?;
    let mut lines = BufReader::new(psql.stdout.take().context("its output is piped")?);
    loop {
        let (mut rows, mut count) = (String::new(), 0);
        while count < BATCH && lines.read_line(&mut rows)? > 0 {
            count += 1;
        }
        if count == 0 {
            break;
        }
        // A connection that has waited for its rows may have been closed.
        ask(&mut engine.connect()?, &engine.insertion(TABLE, &rows))?;
    }
    let took = began.elapsed();
    let status = psql.wait()?;
    ensure!(status.success(), "psql ended with {status}");
    let stored = installation.count(&format!("SELECT count() FROM trigger_dev.{TABLE} FINAL"))?;
    ensure!(stored == BACKLOG, "{stored} sessions are copied instead of {BACKLOG}");
    engine.tell(&format!("DROP TABLE trigger_dev.{TABLE} SYNC"))?;
    Ok(took)
}

/// The query of the rows as ClickHouse takes them, one a line.
fn rows_of(task: &str) -> String {
    let time = |column: &str| format!("s.{column} / 1000 || '.' || lpad((s.{column} % 1000)::text, 3, '0')");
    format!(
        "SELECT json_build_object('environment_id', e.id, 'organization_id', e.organization, 'project_id', e.project, \
         'session_id', s.id, 'environment_type', upper(e.kind), 'friendly_id', s.id, \
         'external_id', coalesce(s.external_id, ''), 'type', s.kind, 'task_identifier', s.task_identifier, 'tags', s.tags, \
         'metadata', '{{}}'::json, 'closed_at', {closed}, 'closed_reason', coalesce(s.closed_reason, ''), \
         'expires_at', {expires}, 'created_at', {created}, 'updated_at', {updated}, 'is_test', 0, '_version', 1, \
         'document', json_build_object('metadata', s.metadata, 'triggerConfig', s.trigger_config, \
         'closedReason', s.closed_reason, 'currentRunId', s.current_run_id)::text) \
         FROM sessions s JOIN environments e ON e.id = s.environment_id WHERE s.task_identifier = '{task}'",
        closed = time("closed_at"),
        expires = time("expires_at"),
        created = time("created_at"),
        updated = time("updated_at"),
    )
}
