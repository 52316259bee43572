//! The Rust server of Durable Streams under test, in its WAL mode: one JSON stream per session.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, iter};

use anyhow::{Context, ensure};

use super::http::{self, Body};
use super::record::{self, Request};
use super::server::{Server, free_port};
use super::target::{Reader, Target};
use crate::process;
use crate::workspace::Workspace;

const CRATE: &str = "durable-streams";
const VERSION: &str = "0.1.5";
const JSON: (&str, &str) = ("Content-Type", "application/json");

/// The crate's own binary, installed with cargo.
pub(crate) struct DurableStreams {
    binary: PathBuf,
    root: PathBuf,
    build: PathBuf,
}

impl DurableStreams {
    pub(crate) fn new(workspace: &Workspace) -> Self {
        let root = workspace.cache.join("tools");
        let binary = root.join("bin/durable-streams-server");
        Self { binary, root, build: workspace.cache.join("target-tools") }
    }

    fn installed(&self) -> bool {
        let list = fs::read_to_string(self.root.join(".crates.toml")).unwrap_or_default();
        self.binary.exists() && list.contains(&format!("\"{CRATE} {VERSION} "))
    }

    fn run(&self, home: &Path, extra: &[&str]) -> anyhow::Result<Server> {
        let port = free_port()?;
        let mut command = Command::new(&self.binary);
        command.args(["--host", "127.0.0.1", "--port", &port.to_string(), "--durability", "wal"]);
        command.args(extra).arg("--data-dir").arg(home.join("data"));
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Server::start(&mut command, home, |_| Some(address))
    }

    /// Runs a second server that counts its syncs, appends to it one by one, and answers the line it prints.
    fn counted_syncs(&self, home: &Path) -> anyhow::Result<String> {
        let home = home.with_extension("probe");
        fs::create_dir_all(&home)?;
        let server = self.run(&home, &["--wal-stats", "1"])?;
        self.create(&server, &["probe".to_owned()])?;
        let mut request = self.append(&server, "probe");
        let mut stream = server.connect()?;
        let start = Instant::now();
        for number in iter::successors(Some(0), |number| Some(number + 1)) {
            http::exchange(&mut stream, request.stamp(number))?;
            let printed = server.printed()?;
            if let Some(line) = printed.lines().filter(|line| line.starts_with("WAL_CONT")).nth(1) {
                return Ok(line.split(' ').take(4).collect::<Vec<_>>().join(" "));
            }
            ensure!(start.elapsed() < Duration::from_secs(10), "no WAL_CONT line: {printed}");
            thread::sleep(Duration::from_millis(2));
        }
        Ok(String::new())
    }
}

impl Target for DurableStreams {
    fn name(&self) -> &'static str {
        CRATE
    }

    fn prepare(&mut self) -> anyhow::Result<String> {
        if !self.installed() {
            let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            cargo.args(["install", CRATE, "--version", VERSION, "--locked", "--force", "--root"]);
            process::run(cargo.arg(&self.root).env("CARGO_TARGET_DIR", &self.build))
                .context("cannot install the peer")?;
        }
        Ok(format!("{CRATE} {VERSION}"))
    }

    fn start(&self, home: &Path) -> anyhow::Result<Server> {
        self.run(home, &[])
    }

    fn proof(&self, server: &Server) -> anyhow::Result<Vec<String>> {
        let wal = server.home().join("data/wal");
        ensure!(wal.is_dir(), "durable-streams keeps no WAL in its data folder");
        Ok(vec![
            format!("command: {}", server.command_line()?),
            format!(
                "a second one with --wal-stats, one sequential writer, printed: {}",
                self.counted_syncs(server.home())?
            ),
        ])
    }

    fn create(&self, server: &Server, sessions: &[String]) -> anyhow::Result<()> {
        let mut stream = server.connect()?;
        for session in sessions {
            let headers = [JSON, ("Content-Length", "0")];
            let request = http::request(&format!("PUT /{session}"), server.address, &headers);
            let (status, body) = http::exchange(&mut stream, &request)?;
            ensure!(status == 201, "create answered {status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(())
    }

    fn append(&self, server: &Server, session: &str) -> Request {
        let length = record::LEN.to_string();
        let headers = [JSON, ("Content-Length", length.as_str())];
        let head = http::request(&format!("POST /{session}"), server.address, &headers);
        Request::new(&head, b"", http::answered)
    }

    fn follow(&self, server: &Server, session: &str) -> Box<dyn Reader> {
        let line = format!("GET /{session}?offset=-1&live=sse");
        Box::new(Body::new(http::request(&line, server.address, &[("Accept", "text/event-stream")])))
    }

    fn catch_up(&self, server: &Server, session: &str) -> Vec<(&'static str, Box<dyn Reader>)> {
        let read = http::request(&format!("GET /{session}?offset=-1"), server.address, &[]);
        vec![("plain read", Box::new(Body::new(read))), ("SSE", self.follow(server, session))]
    }
}
