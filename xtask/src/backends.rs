//! What the tests run against: a Postgres from Debian's packages, an engine of ClickHouse, and the S2 and S3 servers of
//! `tests/backends`. And `cargo xtask up`, which keeps them running.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::clickhouse::{ClickHouse, Fetching};
use crate::nextest::SELECTION;
use crate::postgres::{self, Postgres};
use crate::server::Server;
use crate::workspace::Workspace;
use crate::{interrupt, packages};

/// What to build. The test among it is built already; it has cargo choose the features that the tests have, so that
/// what both depend on is built once.
const SERVERS: [&str; 6] = ["--bin", "s2-lite", "--bin", "s3s-fs", "--test", "layers"];
/// How long s2-lite lets records wait to be written together: the least that its timer can tell apart.
const S2_FLUSH_INTERVAL: &str = "1ms";
/// What opens the S3 server, and its only bucket.
const S3_KEY: &str = "test";
const S3_SECRET: &str = "secret";
const S3_BUCKET: &str = "sessiond";

/// The servers of `tests/backends` while they are built, at low priority, beside whatever needs none of them.
pub(crate) struct Building {
    cargo: Child,
    log: PathBuf,
}

impl Building {
    /// Begins. Until it has finished, cargo builds nothing else in this folder.
    ///
    /// # Errors
    /// If cargo cannot be started.
    pub(crate) fn start(workspace: &Workspace) -> Result<Self> {
        fs::create_dir_all(&workspace.target)?;
        let log = workspace.target.join("backends.log");
        let output = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let cargo = workspace.cargo(&[&["build"], &SELECTION[..], &SERVERS[..]].concat());
        let mut nice = Command::new("nice");
        nice.arg(cargo.get_program()).args(cargo.get_args()).current_dir(&workspace.root);
        nice.envs(cargo.get_envs().filter_map(|(name, value)| Some((name, value?))));
        nice.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let cargo = nice.spawn().context("cannot start cargo")?;
        Ok(Self { cargo, log })
    }

    /// Waits until they are built.
    ///
    /// # Errors
    /// With what cargo said, if one does not compile.
    pub(crate) fn finish(mut self) -> Result<()> {
        println!("waiting for the servers of tests/backends ({})", self.log.display());
        let status = self.cargo.wait()?;
        let said = || fs::read_to_string(&self.log).unwrap_or_default();
        ensure!(status.success(), "the servers of tests/backends: {status}\n{}", said());
        Ok(())
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        // Nothing to do once it has ended.
        let _ = self.cargo.kill().and_then(|()| self.cargo.wait());
    }
}

/// The running backends; dropping them stops them.
pub(crate) struct Backends {
    postgres: Postgres,
    postgres_synchronous: Postgres,
    clickhouse: ClickHouse,
    clickhouse_library: PathBuf,
    s2: Server,
    s2_binary: PathBuf,
    s3: Server,
}

impl Backends {
    /// Starts them, once their servers are built and the engine of ClickHouse is at `library`.
    ///
    /// # Errors
    /// Says which one did not start, and what it printed.
    pub(crate) fn start(workspace: &Workspace, library: PathBuf) -> Result<Self> {
        let s2_binary = workspace.debug_binary("s2-lite");
        Ok(Self {
            postgres: Postgres::start()?,
            postgres_synchronous: Postgres::start_synchronous()?,
            clickhouse: ClickHouse::start(workspace, &library)?,
            clickhouse_library: library,
            s2: Server::start("s2-lite", |port, _| Ok(s2(&s2_binary, port)))?,
            s3: Server::start("s3s-fs", |port, folder| s3(&workspace.debug_binary("s3s-fs"), port, folder))?,
            s2_binary,
        })
    }

    /// Where the tests find them.
    ///
    /// # Errors
    /// As [`programs`].
    pub(crate) fn environment(&self) -> Result<Vec<(&'static str, String)>> {
        let s3 = format!("http://{S3_KEY}:{S3_SECRET}@127.0.0.1:{}/{S3_BUCKET}", self.s3.port);
        let mut environment = programs(&self.clickhouse_library)?;
        environment.extend([
            ("SESSIOND_TEST_POSTGRES", self.postgres.url().to_owned()),
            ("SESSIOND_TEST_POSTGRES_SYNCHRONOUS", self.postgres_synchronous.url().to_owned()),
            ("SESSIOND_TEST_CLICKHOUSE", self.clickhouse.url()),
            ("SESSIOND_TEST_S2", self.s2_url()),
            ("SESSIOND_TEST_S2_BIN", self.s2_binary.display().to_string()),
            ("SESSIOND_TEST_S3", s3),
        ]);
        Ok(environment)
    }

    /// The endpoint of the S2 that all tests share.
    pub(crate) fn s2_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.s2.port)
    }
}

/// What tests start servers of their own from. The engine of ClickHouse is at `library`.
///
/// # Errors
/// If there is no Postgres.
pub(crate) fn programs(library: &Path) -> Result<Vec<(&'static str, String)>> {
    let (folder, user) = postgres::programs()?;
    Ok(vec![
        ("SESSIOND_TEST_POSTGRES_BIN", folder.display().to_string()),
        ("SESSIOND_TEST_POSTGRES_USER", user),
        ("SESSIOND_TEST_CLICKHOUSE_LIB", library.display().to_string()),
    ])
}

/// Keeps everything in memory. It listens on every interface and can be told only the port; it holds nothing but what
/// tests write.
fn s2(binary: &Path, port: u16) -> Command {
    let mut command = Command::new(binary);
    command.args(["--no-cors", "--no-dashboard", "--port", &port.to_string()]);
    command.env("SL8_FLUSH_INTERVAL", S2_FLUSH_INTERVAL).env("RUST_LOG", "warn");
    command
}

fn s3(binary: &Path, port: u16, folder: &Path) -> Result<Command> {
    let root = folder.join("root");
    fs::create_dir_all(root.join(S3_BUCKET))?;
    let mut command = Command::new(binary);
    command.args(["--access-key", S3_KEY, "--secret-key", S3_SECRET, "--port", &port.to_string()]);
    command.arg(root).env("RUST_LOG", "warn");
    Ok(command)
}

/// `cargo xtask up`: starts the backends, prints the environment of the tests, and waits for Ctrl-C.
///
/// # Errors
/// If something cannot be built or started.
pub(crate) fn up() -> Result<()> {
    let workspace = Workspace::locate()?;
    packages::install()?;
    let engine = Fetching::start();
    Building::start(&workspace)?.finish()?;
    let backends = Backends::start(&workspace, engine.finish()?)?;
    println!("\n# The backends run until Ctrl-C. In another terminal:");
    for (name, value) in backends.environment()? {
        println!("export {name}='{value}'");
    }
    println!("# and then, for one test: cargo test {} NAME", SELECTION.join(" "));
    interrupt::wait();
    Ok(())
}
