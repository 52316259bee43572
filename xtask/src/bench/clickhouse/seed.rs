//! A million sessions of six months, put into the table by the engine itself.

use std::time::Instant;

use super::engine::Engine;
use super::tenants::Tenant;

/// Sessions of the table.
pub(super) const SESSIONS: u64 = 1_000_000;
/// Milliseconds between two creations: six months in all.
const APART: u64 = 180 * 86_400_000 / SESSIONS;
/// Sessions of one insert.
const BATCH: u64 = 50_000;
/// Later than what any rebuild stores.
pub(super) const VERSION: u64 = (1 << 56) + 1;

/// The middle of the time in which they were created.
pub(super) fn middle(engine: &Engine) -> u64 {
    engine.began - SESSIONS * APART / 2
}

/// Stores all sessions in the order of their creation, then a second version of one in ten of every month, a tenth of
/// which are tombstones and the others closed. Waits for the merges, and says what there is.
pub(super) fn seed(engine: &Engine, tenants: &[Tenant; 2]) -> anyhow::Result<String> {
    let began = Instant::now();
    for from in (0..SESSIONS).step_by(usize::try_from(BATCH)?) {
        engine.tell(&insert(engine.began, tenants, &format!("numbers({from}, {BATCH})"), "0", "1"))?;
    }
    for part in 0..10 {
        let which = format!("cityHash64(number, 'again') % 10 = 0 AND number % 10 = {part}");
        let deleted = "cityHash64(number, 'again') % 100 = 0";
        engine.tell(&insert(engine.began, tenants, &format!("numbers({SESSIONS})"), deleted, &which))?;
    }
    let seconds = began.elapsed().as_secs_f64();
    let parts = engine.calm()?;
    let versions = engine.tell("SELECT count() FROM trigger_dev.sessions_v1")?;
    let text =
        format!("seeded {SESSIONS} sessions in {seconds:.0} s; {versions} versions in {parts} active parts");
    println!("{text}");
    Ok(text)
}

/// The statement that stores the numbered sessions of which `which` is true: a first version, or a second where `deleted`
/// is a condition.
fn insert(newest: u64, [large, small]: &[Tenant; 2], numbers: &str, deleted: &str, which: &str) -> String {
    let again = u64::from(deleted != "0");
    let owner = |large: &str, small: &str, others: &str| {
        format!("multiIf(number % 2 = 0, '{large}', number % 1200 = 1, '{small}', {others})")
    };
    let environment =
        owner(&large.environment, &small.environment, "concat('env_other', toString(number % 599))");
    let organization = owner(&large.organization, &small.organization, "'others'");
    let project = owner(&large.project, &small.project, "'others'");
    format!(
        "INSERT INTO trigger_dev.sessions_v1 (environment_id, organization_id, project_id, session_id, environment_type, \
         friendly_id, external_id, type, task_identifier, tags, metadata, closed_at, closed_reason, expires_at, created_at, \
         updated_at, is_test, _version, _is_deleted, document) \
         WITH {newest} - ({SESSIONS} - number) * {APART} AS millis, fromUnixTimestamp64Milli(toInt64(millis)) AS created, \
         {again} OR number % 97 < 39 AS closed, concat('session_', leftPad(lower(hex(toUInt64(millis))), 12, '0'), \
         right(leftPad(lower(hex(cityHash64(number))), 16, '0'), 14)) AS id \
         SELECT {environment}, {organization}, {project}, id, 'PRODUCTION', id, concat('seed-', toString(number)), \
         multiIf(number % 10 < 6, 'chat', number % 10 < 9, 'agent', 'batch'), concat('task-', toString(number % 23)), \
         arrayConcat(if(number % 3 = 0, ['prod'], []), if(number % 20011 = 1, ['rare'], []), \
         [concat('team-', toString(number % 997))]), '{{}}', if(closed, created + INTERVAL 1 HOUR, NULL), \
         if(closed, 'done', ''), multiIf(closed, NULL, number % 101 < 25, fromUnixTimestamp64Milli(toInt64({newest} - 1000)), \
         number % 101 < 50, fromUnixTimestamp64Milli(toInt64({newest} + 86400000)), NULL), created, \
         created + INTERVAL {again} HOUR, 0, {version}, {deleted}, \
         concat('{{\"metadata\":{{\"user\":\"user-', toString(number), '\",\"plan\":\"pro\"}},\"triggerConfig\":\
         {{\"basePayload\":{{\"model\":\"large\"}}}},\"closedReason\":', if(closed, '\"done\"', 'null'), \
         ',\"currentRunId\":\"run_', leftPad(lower(hex(number)), 26, '0'), '\"}}') \
         FROM {numbers} WHERE {which}",
        version = VERSION + again,
    )
}
