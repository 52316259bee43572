//! Fills a SQLite database with very many sessions in seconds, by SQL alone, to measure lists on.

use sea_orm::{ConnectionTrait, Database, DbErr};

/// Which rows to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// A third closed, a third expiring (half of these in the past of [`NOW`]); 10 types, 100 tasks, 1000 tags.
    Uniform,
    /// Every session is open and expires after [`NOW`].
    AllExpireLater,
    /// Every session is open and expired before [`NOW`].
    AllExpired,
}

/// The moment that the lists are asked at.
pub const NOW: i64 = 2_000_000_000_000;

/// Adds `count` sessions, one millisecond apart, each with two tags, to an environment that exists.
///
/// # Errors
/// What the database says.
pub async fn sessions(url: &str, environment: &str, count: u64, spread: Spread) -> Result<(), DbErr> {
    let (expires_at, closed_at) = match spread {
        Spread::Uniform => (
            format!("CASE n % 6 WHEN 1 THEN {NOW} - 1000 WHEN 2 THEN {NOW} + 1000 END"),
            "CASE n % 3 WHEN 0 THEN 1800000000000 END",
        ),
        Spread::AllExpireLater => (format!("{NOW} + 1 + n"), "NULL"),
        Spread::AllExpired => (format!("{NOW} - n"), "NULL"),
    };
    let db = Database::connect(url).await?;
    let numbers =
        format!("WITH RECURSIVE ns(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM ns WHERE n < {count})");
    // Multiplying by an odd number shuffles, so that neighbours in time differ in type, task and tags.
    let sessions = format!(
        "{numbers} INSERT INTO sessions (id, environment_id, external_id, kind, task_identifier, tags, metadata, \
         current_run_id, created_at, updated_at, expires_at, closed_at, lapsed) \
         SELECT printf('session_%026d', n), '{environment}', printf('external-%d', n), \
         printf('kind-%d', n * 7919 % 10), printf('task-%d', n * 104729 % 100), \
         json_array(printf('tag-%03d', n * 1299709 % 1000), printf('team-%d', n % 5)), \
         '{{\"plan\":\"pro\",\"seats\":12,\"note\":\"seeded to measure lists\"}}', printf('run_%026d', n), \
         1700000000000 + n, 1700000000000 + n, {expires_at}, {closed_at}, 0 FROM ns"
    );
    let tags = format!(
        "INSERT INTO session_tags (environment_id, tag, created_at, session_id) \
         SELECT s.environment_id, t.value, s.created_at, s.id FROM sessions AS s, json_each(s.tags) AS t \
         WHERE s.environment_id = '{environment}' ORDER BY 1, 2, 3, 4"
    );
    for step in ["PRAGMA synchronous = OFF", &sessions, &tags, "PRAGMA wal_checkpoint(TRUNCATE)"] {
        db.execute_unprepared(step).await?;
    }
    db.close().await
}
