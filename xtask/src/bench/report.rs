//! The numbers of a run: kept as samples, told as tables.

use super::stats::median;

/// How the tables name ours, and what is told beside it.
pub(crate) const OURS: &str = "sessiond";
pub(crate) const GRAPHQL: &str = "sessiond, GraphQL";

/// What a number measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metric {
    PerSecond,
    P50,
    P99,
    ServerUs,
    ClientUs,
    Lost,
    MegabytesPerSecond,
    RecordMegabytes,
    BytesPerRecord,
    KibPerFollower,
    EmptyMib,
    FirstP50,
    FirstP99,
    MidP50,
    MidP99,
    MibBefore,
    MibAfter,
}

impl Metric {
    fn title(self) -> &'static str {
        match self {
            Self::PerSecond => "per second",
            Self::P50 => "p50 ms",
            Self::P99 => "p99 ms",
            Self::ServerUs => "server CPU us",
            Self::ClientUs => "client CPU us",
            Self::Lost => "lost",
            Self::MegabytesPerSecond => "MB/s on the wire",
            Self::RecordMegabytes => "MB/s of records",
            Self::BytesPerRecord => "bytes a record",
            Self::KibPerFollower => "KiB a follower",
            Self::EmptyMib => "empty server MiB",
            Self::FirstP50 => "first page p50 ms",
            Self::FirstP99 => "first page p99 ms",
            Self::MidP50 => "middle page p50 ms",
            Self::MidP99 => "middle page p99 ms",
            Self::MibBefore => "engine MiB before",
            Self::MibAfter => "engine MiB after",
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Self::PerSecond
            | Self::Lost
            | Self::MegabytesPerSecond
            | Self::RecordMegabytes
            | Self::BytesPerRecord => format!("{value:.0}"),
            Self::ClientUs | Self::KibPerFollower | Self::EmptyMib | Self::MibBefore | Self::MibAfter => {
                format!("{value:.1}")
            }
            _ => format!("{value:.2}"),
        }
    }

    /// Whether ours over theirs says something.
    fn compares(self) -> bool {
        !matches!(self, Self::Lost | Self::ClientUs)
    }
}

/// The tables, in the order in which they are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    Ack,
    Delivery,
    CatchUp,
    Direct,
    Memory,
    Page,
    Lists,
    ClickHouse,
    Inserts,
    Freshness,
    Drain,
}

impl Table {
    const ALL: [Self; 11] = [
        Self::Ack,
        Self::Delivery,
        Self::CatchUp,
        Self::Direct,
        Self::Memory,
        Self::Page,
        Self::Lists,
        Self::ClickHouse,
        Self::Inserts,
        Self::Freshness,
        Self::Drain,
    ];

    fn title(self) -> &'static str {
        match self {
            Self::Ack => "Append to ack, one sequential writer per session",
            Self::Delivery => "Append to delivery at the followers; CPU per delivery",
            Self::CatchUp => "Catch-up of 100,000 records over one connection; CPU per record",
            Self::Direct => "Direct writes over the S2 wire: batches of one record, append to ack",
            Self::Memory => "Resident memory of idle followers",
            Self::Page => "A page of 50 of 1000 sessions, six fields of each over GraphQL; CPU per page",
            Self::Lists => "Lists over HTTP, pages of 50 of 1,000,000 sessions in SQLite",
            Self::ClickHouse => {
                "Lists from ClickHouse over HTTP, pages of 50 of 1,000,000 sessions; plain FINAL is asked of the engine itself"
            }
            Self::Inserts => "Inserts of 10,000 sessions into ClickHouse, batches of 1000",
            Self::Freshness => {
                "From the answer of a create, sessions in Postgres, to the session in lists from ClickHouse"
            }
            Self::Drain => {
                "A backlog of sessions from Postgres into ClickHouse, from the start of the process that brings them"
            }
        }
    }
}

/// One measurement of one row on one server.
pub(crate) struct Sample {
    pub(crate) table: Table,
    pub(crate) row: String,
    pub(crate) server: String,
    pub(crate) values: Vec<(Metric, f64)>,
}

/// Every sample of a run.
#[derive(Default)]
pub(crate) struct Samples(Vec<Sample>);

impl Samples {
    /// Takes a sample and shows it, so that a long run can be watched.
    pub(crate) fn push(&mut self, sample: Sample) {
        let values: Vec<_> = sample
            .values
            .iter()
            .map(|(metric, value)| format!("{} {}", metric.title(), metric.show(*value)))
            .collect();
        println!("{:<28} {:<24} {}", sample.row, sample.server, values.join(", "));
        self.0.push(sample);
    }

    /// The median over the rounds.
    pub(crate) fn value(&self, table: Table, row: &str, server: &str, metric: Metric) -> Option<f64> {
        let samples = self.0.iter().filter(|s| s.table == table && s.row == row && s.server == server);
        median(
            samples.flat_map(|s| &s.values).filter(|(m, _)| *m == metric).map(|(_, value)| *value).collect(),
        )
    }

    /// Every server that has this row.
    pub(crate) fn servers(&self, table: Table, row: &str) -> Vec<&str> {
        let samples = self.0.iter().filter(|s| s.table == table && s.row == row);
        unique(samples.map(|s| s.server.as_str()))
    }

    /// The tables as Markdown, which reads well as it is.
    pub(crate) fn tables(&self) -> String {
        let tables = Table::ALL.into_iter().filter(|table| self.0.iter().any(|s| s.table == *table));
        tables.map(|table| format!("## {}\n\n{}\n", table.title(), self.table(table))).collect()
    }

    fn table(&self, table: Table) -> String {
        let samples = || self.0.iter().filter(|s| s.table == table);
        let metrics = samples().next().map(|s| s.values.iter().map(|(m, _)| *m).collect::<Vec<_>>());
        let metrics = metrics.unwrap_or_default();
        let mut lines = vec![["", "server"].map(str::to_owned).to_vec()];
        lines[0].extend(metrics.iter().map(|metric| metric.title().to_owned()));
        for row in unique(samples().map(|s| s.row.as_str())) {
            let servers = self.servers(table, row);
            for server in &servers {
                let values = metrics.iter().map(|m| self.value(table, row, server, *m).map(|v| m.show(v)));
                lines.push(line(row, server, values));
            }
            let Some((ours, others)) = servers.split_first().filter(|(first, _)| first.starts_with(OURS))
            else {
                continue;
            };
            for other in others {
                let (one, beside) = match other {
                    door if door.starts_with(GRAPHQL) => (door, ours),
                    variant if variant.starts_with(OURS) => continue,
                    peer => (ours, peer),
                };
                let ratios = metrics.iter().map(|metric| self.ratio(table, row, one, beside, *metric));
                lines.push(line("", &format!("{one} / {beside}"), ratios));
            }
        }
        align(&lines)
    }

    fn ratio(&self, table: Table, row: &str, ours: &str, peer: &str, metric: Metric) -> Option<String> {
        let (ours, theirs) = (self.value(table, row, ours, metric)?, self.value(table, row, peer, metric)?);
        (metric.compares() && theirs > 0.0).then(|| format!("{:.2}x", ours / theirs))
    }
}

fn line(row: &str, server: &str, values: impl Iterator<Item = Option<String>>) -> Vec<String> {
    let mut line = vec![row.to_owned(), server.to_owned()];
    line.extend(values.map(Option::unwrap_or_default));
    line
}

/// Rows of cells as a Markdown table whose columns line up; the first line is its head.
pub(crate) fn align(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0).max(3))
        .collect();
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        for (cell, width) in line.iter().zip(&widths) {
            text.push_str(&format!("| {cell:<width$} "));
        }
        text.push_str("|\n");
        if number == 0 {
            text.extend(widths.iter().map(|width| format!("|-{}-", "-".repeat(*width))));
            text.push_str("|\n");
        }
    }
    text
}

/// Each once, in the order of first sight.
fn unique<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_become_their_median_and_peers_a_ratio() {
        let mut samples = Samples::default();
        for (server, value) in [("sessiond", 10.0), ("redis", 5.0), ("sessiond", 30.0), ("sessiond", 20.0)] {
            let values = vec![(Metric::PerSecond, value)];
            samples.push(Sample {
                table: Table::Ack,
                row: "r".to_owned(),
                server: server.to_owned(),
                values,
            });
        }
        assert_eq!(samples.value(Table::Ack, "r", "sessiond", Metric::PerSecond), Some(20.0));
        assert!(samples.tables().contains("4.00x"));
    }
}
