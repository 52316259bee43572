//! The open server of S2 under test, as it comes: data on the local disk, synced, flushed every 5 ms.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use super::direct::Wire;
use super::http;
use super::server::{Server, free_port};
use crate::process;
use crate::workspace::Workspace;

const CRATE: &str = "s2-lite";
/// The version that the tests run against (`Cargo.toml`).
const VERSION: &str = "0.43.4";
const BASIN: &str = "benchmark";

/// The crate's own binary, installed with cargo.
pub(crate) struct S2Lite {
    root: PathBuf,
    build: PathBuf,
}

impl S2Lite {
    pub(crate) fn new(workspace: &Workspace) -> Self {
        let root = workspace.cache.join(format!("{CRATE}-{VERSION}-optimized"));
        Self { root, build: workspace.cache.join("target-tools") }
    }

    fn binary(&self) -> PathBuf {
        self.root.join("bin/server")
    }
}

impl Wire for S2Lite {
    fn name(&self) -> &'static str {
        CRATE
    }

    fn prepare(&self) -> anyhow::Result<String> {
        if !self.binary().exists() {
            let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            cargo.args(["install", CRATE, "--version", VERSION, "--locked", "--root"]);
            process::run(cargo.arg(&self.root).env("CARGO_TARGET_DIR", &self.build))
                .context("cannot install the peer")?;
        }
        Ok(format!("{CRATE} {VERSION}, its own release build"))
    }

    fn start(&self, home: &Path) -> anyhow::Result<Server> {
        let port = free_port()?;
        let mut command = Command::new(self.binary());
        command.args(["--port", &port.to_string(), "--no-dashboard", "--local-root"]).arg(home.join("data"));
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Server::start(&mut command, home, |_| Some(address))
    }

    fn create(&self, server: &Server, streams: &[String]) -> anyhow::Result<()> {
        let mut stream = server.connect()?;
        let mut put = |path: &str| -> anyhow::Result<()> {
            let headers =
                [("Content-Type", "application/json"), ("Content-Length", "2"), ("s2-basin", BASIN)];
            let mut request = http::request(&format!("PUT {path}"), server.address, &headers);
            request.extend_from_slice(b"{}");
            let (status, body) = http::exchange(&mut stream, &request)?;
            ensure!(
                (200..300).contains(&status),
                "{path} answered {status}: {}",
                String::from_utf8_lossy(&body)
            );
            Ok(())
        };
        put(&format!("/v1/basins/{BASIN}"))?;
        streams.iter().try_for_each(|name| put(&format!("/v1/streams/{name}")))
    }

    fn path(&self, stream: &str) -> String {
        format!("/v1/streams/{stream}/records")
    }

    fn headers(&self) -> Vec<(&'static str, String)> {
        vec![("s2-basin", BASIN.to_owned())]
    }
}
