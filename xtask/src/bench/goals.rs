//! What the numbers should be, and whether they are.

use super::clickhouse;
use super::delivery::Pace;
use super::direct::{DIRECT, direct};
use super::graphql;
use super::memory::weighed;
use super::replication::{self, freshness};
use super::report::{GRAPHQL, Metric, OURS, Samples, Table, align};
use super::rows;
use super::stats::Spread;

/// One goal and what the run says to it.
struct Goal {
    what: String,
    wanted: String,
    measured: Option<String>,
    reached: bool,
}

impl Goal {
    fn new(
        what: impl Into<String>,
        wanted: Option<(String, f64)>,
        measured: Option<f64>,
        unit: &str,
        reached: impl Fn(f64, f64) -> bool,
    ) -> Self {
        let verdict = wanted.as_ref().zip(measured).is_some_and(|((_, bound), value)| reached(value, *bound));
        Self {
            what: what.into(),
            wanted: wanted.map_or("needs --peers".to_owned(), |(text, _)| text),
            measured: measured.map(|value| format!("{value:.2} {unit}")),
            reached: verdict,
        }
    }

    fn line(self) -> Vec<String> {
        let judged = self.wanted != "needs --peers" && self.measured.is_some();
        let verdict = match (judged, self.reached) {
            (false, _) => "not measured",
            (true, true) => "reached",
            (true, false) => "MISSED",
        };
        vec![self.what, self.wanted, self.measured.unwrap_or_default(), verdict.to_owned()]
    }
}

/// The goals of which this run has measured something, as a table.
pub(crate) fn table(samples: &Samples, floor: Spread) -> String {
    let mut lines = vec![["goal", "wanted", "measured", ""].map(str::to_owned).to_vec()];
    let told = goals(samples, floor).into_iter().filter(|goal| goal.measured.is_some());
    lines.extend(told.map(Goal::line));
    align(&lines)
}

fn goals(samples: &Samples, floor: Spread) -> Vec<Goal> {
    let at_most = |value: f64, bound: f64| value <= bound;
    let at_least = |value: f64, bound: f64| value >= bound;
    let ours = |table, row: &str, metric| samples.value(table, row, OURS, metric);
    let peers = |table, row: &str, metric| -> Vec<f64> {
        let servers = samples.servers(table, row);
        let peers = servers.into_iter().filter(|server| !server.starts_with(OURS));
        peers.filter_map(|peer| samples.value(table, row, peer, metric)).collect()
    };
    let (ack, serial, fan) = (rows::ack(64), rows::ack(1), rows::delivery(1, 1000));
    let best_rate = peers(Table::Ack, &ack, Metric::PerSecond).into_iter().reduce(f64::max);
    let best_p99 = peers(Table::Delivery, &fan, Metric::P99).into_iter().reduce(f64::min);
    let read = |server| samples.value(Table::CatchUp, rows::CATCH_UP, server, Metric::MegabytesPerSecond);
    let catch_up = |what, peer: Option<f64>| {
        let wanted =
            peer.map(|peer| (format!(">= {:.0} MB/s (0.75 x durable-streams)", 0.75 * peer), 0.75 * peer));
        Goal::new(what, wanted, read("sessiond, SSE"), "MB/s", at_least)
    };
    let bound = |text: &str, value: f64| Some((text.to_owned(), value));
    let floor_bound = floor.p50 + 0.15;
    let per_follower = rows::MEMORY.iter().map(|(row, ..)| ours(Table::Memory, row, Metric::KibPerFollower));
    let per_follower = per_follower.flatten().reduce(f64::max);
    let mut goals = vec![
        Goal::new(
            "acks a second, 64 sessions",
            best_rate.map(|best| (format!(">= {best:.0} (better peer)"), best)),
            ours(Table::Ack, &ack, Metric::PerSecond),
            "",
            at_least,
        ),
        Goal::new(
            "serial ack p50",
            bound(&format!("<= {floor_bound:.2} ms (floor {:.2} + 0.15)", floor.p50), floor_bound),
            ours(Table::Ack, &serial, Metric::P50),
            "ms",
            at_most,
        ),
        Goal::new(
            "server CPU per append, 64 sessions",
            bound("<= 20 us", 20.0),
            ours(Table::Ack, &ack, Metric::ServerUs),
            "us",
            at_most,
        ),
        Goal::new(
            "delivery p99, 1 channel x 1000",
            best_p99.map(|best| (format!("<= {best:.2} ms (better peer)"), best)),
            ours(Table::Delivery, &fan, Metric::P99),
            "ms",
            at_most,
        ),
        Goal::new(
            "server CPU per delivery, 1 channel x 1000",
            bound("<= 10 us", 10.0),
            ours(Table::Delivery, &fan, Metric::ServerUs),
            "us",
            at_most,
        ),
        catch_up("catch-up over SSE, their SSE", read("durable-streams, SSE")),
        catch_up("catch-up over SSE, their plain read", read("durable-streams, plain read")),
        Goal::new("memory of an idle SSE follower", bound("<= 13 KiB", 13.0), per_follower, "KiB", at_most),
        Goal::new("the same, stretch", bound("<= 8 KiB", 8.0), per_follower, "KiB", at_most),
    ];
    goals.extend(direct_goals(samples));
    goals.extend(graphql_goals(samples));
    goals.extend(clickhouse_goals(samples));
    goals.extend(replication_goals(samples));
    goals
}

/// Those of lists from ClickHouse, by what plain FINAL and rows without metadata cost in the same run.
fn clickhouse_goals(samples: &Samples) -> Vec<Goal> {
    let at_most = |value: f64, bound: f64| value <= bound;
    let mut goals = Vec::new();
    for row in clickhouse::JUDGED_PAGES {
        let p50 = |server| samples.value(Table::ClickHouse, row, server, Metric::P50);
        let wanted = Some(("<= 60 ms".to_owned(), 60.0));
        goals.push(Goal::new(format!("{row}: p50"), wanted, p50(OURS), "ms", at_most));
        let plain = p50(clickhouse::PLAIN);
        let wanted =
            plain.map(|plain| (format!("<= {:.2} ms (0.35 x plain FINAL)", 0.35 * plain), 0.35 * plain));
        goals.push(Goal::new("the same beside plain FINAL", wanted, p50(OURS), "ms", at_most));
    }
    for (what, metric, unit) in
        [("insert p50", Metric::P50, "ms"), ("engine memory after inserts", Metric::MibAfter, "MiB")]
    {
        let value = |row| samples.value(Table::Inserts, row, clickhouse::ENGINE, metric);
        let wanted = value(clickhouse::NO_METADATA)
            .map(|empty| (format!("<= {:.2} {unit} (1.5 x {{}})", 1.5 * empty), 1.5 * empty));
        let measured = value(clickhouse::MANY_KEYS);
        goals.push(Goal::new(format!("{what}, 300 random keys"), wanted, measured, unit, at_most));
    }
    goals
}

/// Those of the way from Postgres to ClickHouse.
fn replication_goals(samples: &Samples) -> Vec<Goal> {
    let mut goals = Vec::new();
    for (rate, _) in freshness::RATES {
        let row = freshness::row(rate);
        for (what, metric, most, stretch) in
            [("p50", Metric::P50, 150.0, 50.0), ("p99", Metric::P99, 500.0, 200.0)]
        {
            let measured = samples.value(Table::Freshness, &row, OURS, metric);
            for (what, most) in [
                (format!("from create to list, {row}: {what}"), most),
                ("the same, stretch".to_owned(), stretch),
            ] {
                let wanted = Some((format!("<= {most} ms"), most));
                goals.push(Goal::new(what, wanted, measured, "ms", |value, bound| value <= bound));
            }
        }
    }
    let drained = samples.value(Table::Drain, replication::BACKLOG_ROW, OURS, Metric::PerSecond);
    for (what, least) in [("backlog drain, sessions a second", 40_000.0), ("the same, stretch", 60_000.0)] {
        let wanted = Some((format!(">= {least}"), least));
        goals.push(Goal::new(what, wanted, drained, "", |value, bound| value >= bound));
    }
    goals
}

/// Those of direct writes, by what the open server of S2 does in the same run.
fn direct_goals(samples: &Samples) -> Vec<Goal> {
    let rows = DIRECT.iter().flat_map(|(way, streams)| {
        let row = direct(*way, *streams);
        let value = |server, metric| samples.value(Table::Direct, &row, server, metric);
        let theirs = |metric| value("s2-lite", metric);
        let wanted = |unit: &str, sign: &str, bound: Option<f64>| {
            bound.map(|bound| (format!("{sign} {bound:.2} {unit} (s2-lite)"), bound))
        };
        [
            Goal::new(
                format!("{row}: ack p50"),
                wanted("ms", "<", theirs(Metric::P50)),
                value(OURS, Metric::P50),
                "ms",
                |ours, theirs| ours < theirs,
            ),
            Goal::new(
                format!("{row}: acks a second"),
                wanted("", ">", theirs(Metric::PerSecond)),
                value(OURS, Metric::PerSecond),
                "",
                |ours, theirs| ours > theirs,
            ),
        ]
    });
    rows.collect()
}

/// Those of the GraphQL door, most of them by what the other door costs in the same run.
fn graphql_goals(samples: &Samples) -> Vec<Goal> {
    let at_most = |value: f64, bound: f64| value <= bound;
    let value = |table, row: &str, server, metric| samples.value(table, row, server, metric);
    let fan = rows::delivery(1, 1000);
    let per_delivery = |server| value(Table::Delivery, &fan, server, Metric::ServerUs);
    let delivery = |what, times: f64| {
        let wanted =
            per_delivery(OURS).map(|sse| (format!("<= {:.2} us ({times} x SSE)", times * sse), times * sse));
        Goal::new(what, wanted, per_delivery(GRAPHQL), "us", at_most)
    };
    let weight = |row: &str| value(Table::Memory, row, GRAPHQL, Metric::KibPerFollower);
    let subscribed =
        |pace| rows::MEMORY.iter().filter_map(|(row, ..)| weight(&weighed(row, pace))).reduce(f64::max);
    let memory = |what, most: f64, measured| {
        Goal::new(what, Some((format!("<= {most} KiB"), most)), measured, "KiB", at_most)
    };
    vec![
        delivery("server CPU per delivery over WebSocket, 1 channel x 1000", 2.0),
        delivery("the same, stretch", 0.5),
        memory("memory of a WebSocket that follows nothing", 20.0, weight(graphql::IDLE)),
        memory("the same, stretch", 11.0, weight(graphql::IDLE)),
        memory("memory of a WebSocket with one subscription", 20.0, subscribed(Pace::OneByOne)),
        memory("the same, stretch", 11.0, subscribed(Pace::OneByOne)),
        memory("the same, all opened at once", 20.0, subscribed(Pace::AtOnce)),
        Goal::new(
            "catch-up over WebSocket, bytes of records",
            Some((">= 100 MB/s".to_owned(), 100.0)),
            value(Table::CatchUp, rows::CATCH_UP, "sessiond, GraphQL, batch: 100", Metric::RecordMegabytes),
            "MB/s",
            |value, bound| value >= bound,
        ),
    ]
}
