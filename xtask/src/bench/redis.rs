//! Redis under test: one stream per session, `appendfsync always`.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::record::{self, Request};
use super::resp::{self, Ask, Entries};
use super::server::{Server, free_port};
use super::target::{Reader, Target};
use crate::{packages, process};

/// What decides whether an ack means fsync, and how much Redis then does besides.
const SETTINGS: [&str; 4] = ["appendonly", "appendfsync", "no-appendfsync-on-rewrite", "save"];

/// Debian's Redis.
pub(crate) struct Redis;

impl Target for Redis {
    fn name(&self) -> &'static str {
        "redis"
    }

    fn prepare(&mut self) -> anyhow::Result<String> {
        packages::debian(&["redis-server"])?;
        let version = process::answer(Command::new("redis-server").arg("--version"));
        let version = version.context("redis-server does not start")?;
        let number = version.split("v=").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or(&version);
        Ok(format!("redis {number}"))
    }

    fn start(&self, home: &Path) -> anyhow::Result<Server> {
        let port = free_port()?;
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--dir"]).arg(home);
        command.args(["--appendonly", "yes", "--appendfsync", "always", "--save", ""]);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Server::start(&mut command, home, |_| Some(address))
    }

    fn proof(&self, server: &Server) -> anyhow::Result<Vec<String>> {
        let mut read_back = Vec::new();
        for setting in SETTINGS {
            let answer = ask(server, &["CONFIG", "GET", setting])?;
            read_back.push(format!("{setting}={:?}", answer.get(1).map_or("", String::as_str)));
        }
        let read_back = read_back.join(" ");
        ensure!(read_back.contains("appendfsync=\"always\""), "redis would not sync: {read_back}");
        Ok(vec![
            format!("command: {}", server.command_line()?),
            format!("read back with CONFIG GET: {read_back}"),
        ])
    }

    fn create(&self, _server: &Server, _sessions: &[String]) -> anyhow::Result<()> {
        Ok(())
    }

    fn append(&self, _server: &Server, session: &str) -> Request {
        let length = record::LEN;
        let key = session.len();
        let head = format!("*5\r\n$4\r\nXADD\r\n${key}\r\n{session}\r\n$1\r\n*\r\n$1\r\nd\r\n${length}\r\n");
        Request::new(head.as_bytes(), b"\r\n", resp::answered)
    }

    fn follow(&self, _server: &Server, session: &str) -> Box<dyn Reader> {
        Box::new(Entries::new(session, Ask::Block))
    }

    fn settle(&self, server: &Server, count: usize) -> anyhow::Result<()> {
        let wanted = format!("blocked_clients:{count}\r\n");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !ask(server, &["INFO", "clients"])?.concat().contains(&wanted) {
            ensure!(Instant::now() < deadline, "redis never had {count} blocked clients");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn catch_up(&self, _server: &Server, session: &str) -> Vec<(&'static str, Box<dyn Reader>)> {
        vec![("XRANGE of 1000", Box::new(Entries::new(session, Ask::Page)))]
    }
}

/// One command over a connection of its own; the strings of the answer.
fn ask(server: &Server, words: &[&str]) -> anyhow::Result<Vec<String>> {
    let mut stream = server.connect()?;
    stream.write_all(&resp::command(words))?;
    let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let read = stream.read(&mut piece)?;
        ensure!(read > 0, "redis hung up");
        bytes.extend_from_slice(&piece[..read]);
        let mut strings = Vec::new();
        if resp::walk(&bytes, 0, &mut |string| strings.push(string))?.is_some() {
            return Ok(strings
                .into_iter()
                .map(|string| String::from_utf8_lossy(string).into_owned())
                .collect());
        }
    }
}
