//! The GraphQL door beside the others: subscriptions over WebSocket against SSE, a page of sessions against REST.

use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::delivery::{Followers, Pace};
use super::http;
use super::load;
use super::ours::{self, Ours, Way};
use super::record::Request;
use super::report::{GRAPHQL, OURS, Sample, Table};
use super::rows::{Bench, names};
use super::server::Server;
use super::target::{Reader, Target};
use super::ws::Subscriptions;

/// Those of the delivery rows that are told of both doors.
const DELIVERIES: [(usize, usize, f64); 2] = [(1, 1000, 10.0), (1000, 1, 500.0)];
/// Memory rows that only sockets have: sockets, and channels that each follows. They come one by one.
const SOCKETS: [(&str, usize, usize); 2] = [(IDLE, 1000, 0), ("100 connections x 100, one by one", 100, 100)];
/// Connections that follow nothing, after the acknowledgement.
pub(crate) const IDLE: &str = "1000 connections x 0, one by one";
/// Connections that ask for a page, one request at a time each.
const ASKING: [usize; 2] = [1, 16];
const PAGE: &str =
    "{ sessions(first: 50) { nodes { id sessionId type status createdAt tags } pageInfo { endCursor } } }";

impl Bench<'_> {
    /// Both doors by turns, so that a busy moment of the machine does not hit one alone.
    pub(crate) fn graphql(&mut self, binary: &Path) -> anyhow::Result<()> {
        let door = |way| Box::new(Ours { binary: binary.to_owned(), way }) as Box<dyn Target>;
        let doors = [door(Way::Plain), door(Way::Graphql)];
        for _ in 0..self.rounds {
            self.delivery(&doors, &DELIVERIES)?;
        }
        self.catch_up(&doors)?;
        self.memory(&doors, Pace::AtOnce)?;
        self.memory(&doors, Pace::OneByOne)?;
        let [_, graphql] = &doors;
        self.sockets(graphql.as_ref())?;
        self.pages(graphql.as_ref())
    }

    fn sockets(&mut self, target: &dyn Target) -> anyhow::Result<()> {
        for (row, sockets, followed) in SOCKETS {
            let idle = self.idle(target, followed)?;
            let channels: Vec<_> = idle.channels.iter().map(String::as_str).collect();
            let socket = || Box::new(Subscriptions::new(&idle.server, &channels)) as Box<dyn Reader>;
            let readers = (0..sockets).map(|_| (0, socket()));
            let grown =
                self.growth(&idle.server, Followers::connect(&idle.server, readers, Pace::OneByOne))?;
            self.weigh(target, row, &idle, grown / (sockets * followed.max(1)) as f64);
        }
        Ok(())
    }

    fn pages(&mut self, target: &dyn Target) -> anyhow::Result<()> {
        let server = self.start(target)?;
        target.create(&server, &names("listed", 1000))?;
        let doors =
            [(OURS, rest_page(&server), "/data"), (GRAPHQL, graphql_page(&server), "/data/sessions/nodes")];
        for (door, request, list) in &doors {
            let (_, body) = http::exchange(&mut server.connect()?, request.clone().stamp(0))?;
            let body: Value = serde_json::from_slice(&body)?;
            let count = body.pointer(list).and_then(Value::as_array).map_or(0, Vec::len);
            ensure!(count == 50, "{door}: {count} sessions on a page: {body}");
        }
        for connections in ASKING {
            for _ in 0..self.rounds {
                for (door, request, _) in &doors {
                    let requests = vec![request.clone(); connections];
                    let answers = self.runtime.block_on(load::answers(&server, requests, self.time))?;
                    self.samples.push(Sample {
                        table: Table::Page,
                        row: format!("{connections} asking"),
                        server: (*door).to_owned(),
                        values: answers.values(),
                    });
                }
            }
        }
        Ok(())
    }
}

fn rest_page(server: &Server) -> Request {
    Request::plain(ours::ask("GET /api/v1/sessions?page%5Bsize%5D=50", server, &[]), http::answered)
}

fn graphql_page(server: &Server) -> Request {
    let body = json!({ "query": PAGE }).to_string();
    let length = body.len().to_string();
    let headers = [("Content-Type", "application/json"), ("Content-Length", length.as_str())];
    let mut request = ours::ask("POST /graphql", server, &headers);
    request.extend_from_slice(body.as_bytes());
    Request::plain(request, listed)
}

/// A whole answer without errors: one error would leave no list of sessions.
fn listed(bytes: &[u8]) -> anyhow::Result<Option<usize>> {
    let whole = http::answered(bytes)?;
    if whole.is_some() {
        let head = http::Head::parse(bytes)?.context("no head")?;
        let listed = bytes[head.len..].starts_with(br#"{"data":{"sessions":{"nodes":[{"#);
        ensure!(listed, "answered {}", String::from_utf8_lossy(bytes));
    }
    Ok(whole)
}
