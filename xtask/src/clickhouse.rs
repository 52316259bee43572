//! A private ClickHouse for tests: the real engine, published as a library for other languages, which the launcher in
//! `tests/clickhouse` serves on a throw-away folder and a free loopback port.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::{env, panic, thread};

use anyhow::{Context, Result, bail, ensure};

use crate::workspace::{Scratch, Workspace, keep};
use crate::{packages, process};

/// The npm package that holds the library. Other versions lack what the launcher needs, the newest among them.
const PACKAGE: &str = "@chdb/lib-linux-x64-gnu@26.7.3-stable.1";
const TARBALL: &str = "chdb-lib-linux-x64-gnu-26.7.3-stable.1.tgz";
const SHA512: &str = "5cff7b98caa7739b59a4a432c11f0dedc2d3b073624e61ebdf4a42e66ce8de35a6ba48ca9f62016bad1cd81fe059435cb858ce3235a8a2b408082a81563e70a7";
const LIBRARY: &str = "libchdb.so";
const LAUNCHER: &str = "tests/clickhouse/serve.py";

/// The library while it is brought into the cache (170 MiB, once), beside whatever needs no engine.
pub(crate) struct Fetching(JoinHandle<Result<PathBuf>>);

impl Fetching {
    /// Begins.
    pub(crate) fn start() -> Self {
        Self(thread::spawn(|| install(&Workspace::locate()?)))
    }

    /// Waits for it: the path of the library.
    ///
    /// # Errors
    /// If it cannot be had, or is not the one that was tested.
    pub(crate) fn finish(self) -> Result<PathBuf> {
        self.0.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked))
    }
}

fn install(workspace: &Workspace) -> Result<PathBuf> {
    let (_, version) = PACKAGE.rsplit_once('@').context("the package has a version")?;
    let home = workspace.tool(&format!("clickhouse-{version}"));
    let library = home.join(LIBRARY);
    if library.exists() {
        return Ok(library);
    }
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64")),
        "the engine of ClickHouse that the tests run against is for x86-64 Linux"
    );
    if process::answer(Command::new("python3").arg("--version")).is_none() {
        packages::debian(&["python3"])?;
    }
    let work = workspace.scratch("clickhouse")?;
    process::quiet(Command::new("npm").args(["pack", "--silent", PACKAGE]).current_dir(&work.path))?;
    let found = process::quiet(Command::new("sha512sum").arg(TARBALL).current_dir(&work.path))?;
    ensure!(found.starts_with(SHA512), "{PACKAGE} is not the package that was tested: its SHA-512 differs");
    let root = work.path.join("root");
    fs::create_dir(&root)?;
    let file = format!("package/{LIBRARY}");
    let mut tar = Command::new("tar");
    tar.args(["-xzf", TARBALL, "--strip-components=1", "-C"]).arg(&root).arg(file);
    process::quiet(tar.current_dir(&work.path))?;
    keep(&root, &home, &library)?;
    Ok(library)
}

/// A running engine without any table; it ends with us, because its standard input does.
pub(crate) struct ClickHouse {
    engine: Child,
    /// Gone after the engine.
    _folder: Scratch,
    port: u16,
}

impl ClickHouse {
    /// Starts the engine of `library` on an empty folder and waits until it answers.
    ///
    /// # Errors
    /// With what it printed, if it ends instead.
    pub(crate) fn start(workspace: &Workspace, library: &Path) -> Result<Self> {
        Self::start_below(workspace, library, &env::temp_dir())
    }

    /// The same with its folder below `parent`.
    ///
    /// # Errors
    /// As [`ClickHouse::start`].
    pub(crate) fn start_below(workspace: &Workspace, library: &Path, parent: &Path) -> Result<Self> {
        let folder = Scratch::new(parent, "sessiond-clickhouse")?;
        let log = fs::File::create(folder.path.join("log"))?;
        let mut command = Command::new("python3");
        command.arg(workspace.root.join(LAUNCHER)).arg(library).arg(folder.path.join("data"));
        // A group of its own, so that Ctrl-C reaches us first.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut engine = command.spawn().context("cannot start ClickHouse")?;
        let mut line = String::new();
        BufReader::new(engine.stdout.take().context("its output is piped")?).read_line(&mut line)?;
        let Some(port) = line.trim().strip_prefix("READY http=").and_then(|port| port.parse().ok()) else {
            let status = engine.wait()?;
            let said = fs::read_to_string(folder.path.join("log")).unwrap_or_default();
            bail!("ClickHouse ended with {status} instead of starting:\n{said}");
        };
        println!("ClickHouse on port {port}");
        Ok(Self { engine, _folder: folder, port })
    }

    /// Its HTTP interface; the user `default` needs no password.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Its port on the loopback interface, and the number of its process.
    #[cfg(feature = "bench")]
    pub(crate) fn port_and_process(&self) -> (u16, u32) {
        (self.port, self.engine.id())
    }
}

impl Drop for ClickHouse {
    fn drop(&mut self) {
        // It holds nothing but what tests wrote, so there is nothing to leave in order.
        if let Err(error) = self.engine.kill().and_then(|()| self.engine.wait().map(drop)) {
            eprintln!("could not stop ClickHouse: {error}");
        }
    }
}
