//! The engine of a run: statements over HTTP, its memory, and whether its merges are done.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;

use super::ask;
use crate::bench::{http, server};
use crate::clickhouse::{ClickHouse, Fetching};
use crate::workspace::Workspace;

/// Longest that merges may go on, and how long there must have been none.
const CALM_WITHIN: Duration = Duration::from_secs(300);
const CALM_FOR: u32 = 5;

/// A running engine, which no other run uses.
pub(in crate::bench) struct Engine {
    url: String,
    address: SocketAddr,
    process: u32,
    /// Its clock at the start, in milliseconds since 1970: the time of the whole run.
    pub(super) began: u64,
    /// Ends the engine.
    _running: ClickHouse,
}

impl Engine {
    /// Starts one with its data below `home`.
    pub(in crate::bench) fn start(workspace: &Workspace, home: &Path) -> anyhow::Result<Self> {
        let running = ClickHouse::start_below(workspace, &Fetching::start().finish()?, home)?;
        let (port, process) = running.port_and_process();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut engine = Self { url: running.url(), address, process, began: 0, _running: running };
        engine.began = engine.tell("SELECT toUnixTimestamp64Milli(now64(3))")?.parse()?;
        Ok(engine)
    }

    /// Its HTTP interface.
    pub(in crate::bench) fn url(&self) -> &str {
        &self.url
    }

    /// A connection that is kept.
    pub(in crate::bench) fn connect(&self) -> anyhow::Result<TcpStream> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// The request of a statement with the server's default settings.
    pub(in crate::bench) fn request(&self, sql: &str) -> Vec<u8> {
        self.post("POST /", sql)
    }

    /// The request of rows for a table, as JSON; stored when it answers.
    pub(in crate::bench) fn insertion(&self, table: &str, rows: &str) -> Vec<u8> {
        let line = format!(
            "POST /?async_insert=0&max_partitions_per_insert_block=0\
             &query=INSERT+INTO+trigger_dev.{table}+FORMAT+JSONEachRow"
        );
        self.post(&line, rows)
    }

    fn post(&self, line: &str, body: &str) -> Vec<u8> {
        let length = body.len().to_string();
        let mut request = http::request(line, self.address, &[("Content-Length", &length)]);
        request.extend_from_slice(body.as_bytes());
        request
    }

    /// What a statement answers, without the last line end.
    pub(in crate::bench) fn tell(&self, sql: &str) -> anyhow::Result<String> {
        let (_, body) = ask(&mut self.connect()?, &self.request(sql))?;
        Ok(String::from_utf8(body)?.trim_end().to_owned())
    }

    /// Waits until nothing has been merged for a while; returns the number of active parts.
    pub(in crate::bench) fn calm(&self) -> anyhow::Result<String> {
        let deadline = Instant::now() + CALM_WITHIN;
        let mut calm = 0;
        while calm < CALM_FOR {
            ensure!(Instant::now() < deadline, "merges have not ended within {CALM_WITHIN:?}");
            let quiet = self.tell("SELECT count() FROM system.merges")? == "0";
            calm = if quiet { calm + 1 } else { 0 };
            thread::sleep(Duration::from_secs(1));
        }
        self.tell("SELECT count() FROM system.parts WHERE active AND database = 'trigger_dev' AND table = 'sessions_v1'")
    }

    /// Its resident memory in MiB.
    pub(super) fn mib(&self) -> anyhow::Result<f64> {
        Ok(server::rss(self.process)? as f64 / 1024.0)
    }
}
