//! sessiond under test: sessions over REST, appends on the realtime routes, followers there or over GraphQL.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use super::http::{self, Body};
use super::record::{self, Request};
use super::report;
use super::server::Server;
use super::target::{Reader, Target};
use super::ws::Subscriptions;
use crate::process;

/// The root key of the measured server, which lives for one row.
pub(crate) const KEY: &str = "tr_dev_benchmarkbenchmark0001";

/// The `dist` build of this checkout.
pub(crate) struct Ours {
    pub(crate) binary: PathBuf,
    pub(crate) way: Way,
}

/// How it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Plain,
    /// Appends carry a part id, as those of the SDK do.
    PartIds,
    /// Followers subscribe over WebSocket.
    Graphql,
}

impl Target for Ours {
    fn name(&self) -> &'static str {
        match self.way {
            Way::Plain => report::OURS,
            Way::PartIds => "sessiond, X-Part-Id",
            Way::Graphql => report::GRAPHQL,
        }
    }

    fn prepare(&mut self) -> anyhow::Result<String> {
        process::answer(Command::new(&self.binary).arg("--version")).context("sessiond does not start")
    }

    fn start(&self, home: &Path) -> anyhow::Result<Server> {
        start(&self.binary, home, &[])
    }

    fn proof(&self, server: &Server) -> anyhow::Result<Vec<String>> {
        Ok(vec![
            format!("command: {}", server.command_line()?),
            "acks after fdatasync: shown by the strace test of the suite; there is no setting to read"
                .to_owned(),
        ])
    }

    fn create(&self, server: &Server, sessions: &[String]) -> anyhow::Result<()> {
        let mut stream = server.connect()?;
        for session in sessions {
            create(server, &mut stream, session)?;
        }
        Ok(())
    }

    fn append(&self, server: &Server, session: &str) -> Request {
        let line = format!("POST /realtime/v1/sessions/{session}/in/append");
        let length = record::LEN.to_string();
        let mut headers = vec![("Content-Type", "application/json"), ("Content-Length", length.as_str())];
        let part_ids = self.way == Way::PartIds;
        if part_ids {
            headers.push(("X-Part-Id", "part-00000000"));
        }
        let request = Request::new(&ask(&line, server, &headers), b"", http::answered);
        if part_ids { request.numbering(b"part-") } else { request }
    }

    fn follow(&self, server: &Server, session: &str) -> Box<dyn Reader> {
        if self.way == Way::Graphql {
            return Box::new(Subscriptions::new(server, &[session]));
        }
        let line = format!("GET /realtime/v1/sessions/{session}/in");
        let headers = [("Accept", "text/event-stream"), ("Timeout-Seconds", "600")];
        Box::new(Body::new(ask(&line, server, &headers)))
    }

    fn catch_up(&self, server: &Server, session: &str) -> Vec<(&'static str, Box<dyn Reader>)> {
        if self.way == Way::Graphql {
            return vec![("batch: 100", self.follow(server, session))];
        }
        let records = format!("GET /realtime/v1/sessions/{session}/in/records");
        vec![
            ("SSE", self.follow(server, session)),
            ("records", Box::new(Body::new(ask(&records, server, &[])))),
        ]
    }
}

/// Serves what is in `home`, with these settings of the environment beside the usual ones.
pub(crate) fn start(binary: &Path, home: &Path, settings: &[(&str, &str)]) -> anyhow::Result<Server> {
    let mut command = Command::new(binary);
    command.args(["serve", "--listen", "127.0.0.1:0", "--data"]).arg(home.join("data"));
    command.env("SESSIOND_SECRET_KEY", KEY).env("SESSIOND_HTTP__RATE_LIMIT__KEY_PER_10S", "0");
    command.envs(settings.iter().copied());
    Server::start(&mut command, home, base_url)
}

/// Creates a session that there is not yet.
pub(crate) fn create(server: &Server, stream: &mut TcpStream, session: &str) -> anyhow::Result<()> {
    let body = format!(
        r#"{{"type":"bench","externalId":"{session}","tags":["bench"],"taskIdentifier":"bench","triggerConfig":{{"basePayload":{{}}}}}}"#
    );
    let length = body.len().to_string();
    let headers = [("Content-Type", "application/json"), ("Content-Length", length.as_str())];
    let mut request = ask("POST /api/v1/sessions", server, &headers);
    request.extend_from_slice(body.as_bytes());
    let (status, body) = http::exchange(stream, &request)?;
    ensure!(status == 201, "create answered {status}: {}", String::from_utf8_lossy(&body));
    Ok(())
}

/// A request of the secret key.
pub(crate) fn ask(line: &str, server: &Server, headers: &[(&str, &str)]) -> Vec<u8> {
    let bearer = format!("Bearer {KEY}");
    let mut all = vec![("Authorization", bearer.as_str())];
    all.extend_from_slice(headers);
    http::request(line, server.address, &all)
}

fn base_url(printed: &str) -> Option<SocketAddr> {
    let line = printed.lines().find_map(|line| line.trim().strip_prefix("base URL"))?;
    line.trim().strip_prefix("http://")?.trim_end_matches('/').parse().ok()
}
