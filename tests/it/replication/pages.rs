//! Pages of the ClickHouse index beside plain `FINAL`, on a table with many versions that nothing has merged.

use std::sync::Arc;
use std::time::Duration;

use sessiond::clickhouse::SessionRow;
use sessiond::domain::list::Anchor;
use sessiond::domain::{
    Cursor, EnvironmentId, Filter, ListIndex, PageRequest, SessionId, Status, StatusSet, Timestamp,
};
use sessiond::store::index::clickhouse::ClickHouseIndex;

use crate::harness::clickhouse::{fresh, row};
use crate::harness::database::{HERE, Sql};

/// A few numbers that look random and are the same in every run.
fn scatter(n: u64) -> u64 {
    (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 17) ^ n
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_page_is_that_of_plain_final() {
    let (sql, clickhouse) = (Sql::postgres().await, fresh().await);
    clickhouse.query("SYSTEM STOP MERGES sessions_v1").execute().await.expect("no merges");
    // 3000 sessions over three months, most of them with several versions; one in eight ends as a tombstone. Versions come
    // late and early, and the last tags and states are of the greatest.
    for version in 1..=6u64 {
        let rows: Vec<SessionRow> = (0..3000u64)
            .filter(|n| version == 1 || scatter(n * 7 + version).is_multiple_of(2))
            .map(|n| {
                let dice = scatter(n * 31 + version);
                SessionRow {
                    tags: vec![
                        ["red", "green", "blue"][usize::try_from(dice % 3).expect("small")].to_owned(),
                    ],
                    closed_at: dice.is_multiple_of(4).then_some(5),
                    _is_deleted: u8::from(version == 5 && n.is_multiple_of(8)),
                    ..row(
                        &format!("session_{n:06}"),
                        i64::try_from(n / 2 * 5_000_000).expect("fits"),
                        scatter(version) % 100,
                    )
                }
            })
            .collect();
        clickhouse.insert(&rows).await.expect("stored");
    }
    let index =
        ClickHouseIndex::new(clickhouse.clone(), Arc::new(sql.store.clone()), Duration::from_secs(10));
    let environment = EnvironmentId::from_stored(HERE);
    let filters = [
        ("1", Filter::default()),
        ("hasAny(tags, ['red'])", Filter { tags_any: vec!["red".to_owned()], ..Filter::default() }),
        (
            "closed_at IS NOT NULL",
            Filter { statuses: StatusSet::new(vec![Status::Closed]), ..Filter::default() },
        ),
        (
            "closed_at IS NULL AND hasAll(tags, ['blue'])",
            Filter {
                tags_all: vec!["blue".to_owned()],
                statuses: StatusSet::new(vec![Status::Active]),
                ..Filter::default()
            },
        ),
    ];
    let now = Timestamp::from_millis(10_000);
    for (condition, filter) in &filters {
        for place in 0..12u64 {
            let cursor = (place > 0).then(|| Cursor {
                created_at: Timestamp::from_millis(
                    i64::try_from(scatter(place) % 1500 * 5_000_000).expect("fits"),
                ),
                id: SessionId::from_stored(&format!("session_{:06}", scatter(place) % 3000)),
            });
            for (forward, order, than) in [(true, "DESC", "<"), (false, "ASC", ">")] {
                let bound = cursor.as_ref().map_or_else(String::new, |cursor| {
                    let millis = cursor.created_at.millis();
                    format!(
                        "AND (created_at, session_id) {than} (fromUnixTimestamp64Milli({millis}), '{}')",
                        cursor.id
                    )
                });
                let plain = format!(
                    "SELECT session_id FROM sessions_v1 FINAL WHERE environment_id = '{HERE}' AND {condition} {bound} \
                     ORDER BY created_at {order}, session_id {order} LIMIT 50"
                );
                let mut expected: Vec<String> =
                    clickhouse.fetch(clickhouse.query(&plain)).await.expect("plain");
                let anchor =
                    if forward { Anchor::After(cursor.clone()) } else { Anchor::Before(cursor.clone()) };
                let request = PageRequest::new(50, anchor).expect("a size in range");
                let page = index.list(&environment, filter, &request, now).await.expect("lists");
                if !forward {
                    expected.reverse();
                }
                let found: Vec<_> = page.sessions.iter().map(|session| session.id.to_string()).collect();
                assert_eq!(found, expected, "{condition} {bound}");
            }
        }
        let plain =
            format!("SELECT count() FROM sessions_v1 FINAL WHERE environment_id = '{HERE}' AND {condition}");
        let expected: Vec<u64> = clickhouse.fetch(clickhouse.query(&plain)).await.expect("plain");
        assert_eq!(index.count(&environment, filter, now).await.expect("counts"), expected[0], "{condition}");
    }
}
