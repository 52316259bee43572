//! A private s2-lite for tests: built once into the cache, kept in memory, reachable on a free port, stopped on drop.
//!
//! s2-lite listens on every interface and can be told only the port. It holds nothing but what tests write.

use std::env;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::process;
use crate::workspace::Workspace;

/// The version that the engine is proved with.
pub(crate) const VERSION: &str = "0.43.4";
/// How long the server may take to answer: it sleeps a second first, lest another one writes the same store.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long records may wait to be written together: the least that s2-lite's timer can tell apart.
pub(crate) const FLUSH_INTERVAL: &str = "1ms";

/// The path of the binary, built from its published source if this version is not in the cache.
///
/// # Errors
/// If it cannot be built.
pub(crate) fn install(workspace: &Workspace) -> Result<PathBuf> {
    let root = workspace.cache.join(format!("s2-lite-{VERSION}"));
    // Its package calls it so.
    let binary = root.join("bin").join("server");
    if binary.exists() {
        println!("s2-lite {VERSION} at {}", binary.display());
        return Ok(binary);
    }
    let build = workspace.cache.join("s2-lite-build");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut install = Command::new("nice");
    // Correct is enough, and these build it in a third of the time.
    install
        .arg(cargo)
        .args(["install", "s2-lite", "--locked", "--version", VERSION, "--root"])
        .arg(&root)
        .current_dir(env::temp_dir())
        .env("CARGO_TARGET_DIR", &build)
        .envs([
            ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
            ("CARGO_PROFILE_RELEASE_LTO", "off"),
            ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
            ("CARGO_PROFILE_RELEASE_DEBUG", "0"),
        ]);
    process::run(&mut install)?;
    ensure!(binary.exists(), "the package s2-lite brought no {}", binary.display());
    // A gigabyte that is not needed again before the next version.
    fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))?;
    Ok(binary)
}

/// A running server without any basin.
pub(crate) struct S2 {
    server: Child,
    log: PathBuf,
    port: u16,
}

impl S2 {
    /// Starts the server and waits until it answers.
    ///
    /// # Errors
    /// Says what the server printed if it does not.
    pub(crate) fn start(binary: &Path) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let log = env::temp_dir().join(format!("sessiond-s2-{}.log", std::process::id()));
        let output = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let mut command = Command::new(binary);
        command.args(["--no-cors", "--no-dashboard", "--port", &port.to_string()]);
        command.env("SL8_FLUSH_INTERVAL", FLUSH_INTERVAL).env("RUST_LOG", "warn");
        // A group of its own, so that Ctrl-C reaches us first.
        command.process_group(0).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let server = command.spawn().context("cannot start s2-lite")?;
        let mut s2 = Self { server, log, port };
        s2.wait_until_ready()?;
        println!("s2-lite {VERSION} at {}", s2.url());
        Ok(s2)
    }

    /// Its only endpoint.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < START_PATIENCE {
            if let Some(status) = self.server.try_wait()? {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                bail!("s2-lite ended with {status} instead of starting:\n{log}");
            }
            if std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("s2-lite did not accept connections within {} s", START_PATIENCE.as_secs())
    }
}

impl Drop for S2 {
    fn drop(&mut self) {
        // It keeps everything in memory, so there is nothing to leave in order.
        if let Err(error) = self.server.kill().and_then(|()| self.server.wait().map(drop)) {
            eprintln!("could not stop s2-lite: {error}");
        }
        let _ = fs::remove_file(&self.log);
    }
}
