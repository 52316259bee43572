//! A private S3-compatible server for tests: built once into the cache, on a throw-away folder and a free loopback port,
//! stopped and deleted on drop.

use std::env;
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::process;
use crate::workspace::Workspace;

/// The version that the store of blobs is proved with; later ones need a newer compiler.
const VERSION: &str = "0.14.1";
const START_PATIENCE: Duration = Duration::from_secs(30);
/// What opens it, and the only bucket.
const KEY: &str = "test";
const SECRET: &str = "secret";
const BUCKET: &str = "sessiond";

/// The path of the binary, built from its published source if this version is not in the cache.
///
/// # Errors
/// If it cannot be built.
pub(crate) fn install(workspace: &Workspace) -> Result<PathBuf> {
    let root = workspace.cache.join(format!("s3s-fs-{VERSION}"));
    let binary = root.join("bin").join("s3s-fs");
    if binary.exists() {
        println!("s3s-fs {VERSION} at {}", binary.display());
        return Ok(binary);
    }
    let build = workspace.cache.join("s3s-fs-build");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut install = Command::new("nice");
    install
        .arg(cargo)
        .args(["install", "s3s-fs", "--locked", "--debug", "--features", "binary", "--version", VERSION])
        .arg("--root")
        .arg(&root)
        .current_dir(env::temp_dir())
        .env("CARGO_TARGET_DIR", &build)
        .env("CARGO_PROFILE_DEV_DEBUG", "0");
    process::run(&mut install)?;
    ensure!(binary.exists(), "the package s3s-fs brought no {}", binary.display());
    fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))?;
    Ok(binary)
}

/// A running server with one empty bucket.
pub(crate) struct S3 {
    server: Child,
    folder: PathBuf,
    port: u16,
}

impl S3 {
    /// Starts the server and waits until it answers.
    ///
    /// # Errors
    /// Says what the server printed if it does not.
    pub(crate) fn start(binary: &Path) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let folder = env::temp_dir().join(format!("sessiond-s3-{}", std::process::id()));
        let root = folder.join("root");
        fs::create_dir_all(root.join(BUCKET)).with_context(|| format!("cannot make {}", folder.display()))?;
        let output = File::create(folder.join("log"))?;
        let mut command = Command::new(binary);
        command.args(["--access-key", KEY, "--secret-key", SECRET, "--host", "127.0.0.1"]);
        command.args(["--port", &port.to_string()]).arg(&root).env("RUST_LOG", "warn");
        // A group of its own, so that Ctrl-C reaches us first.
        command.process_group(0).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let server = command.spawn().context("cannot start s3s-fs")?;
        let mut s3 = Self { server, folder, port };
        s3.wait_until_ready()?;
        println!("s3s-fs {VERSION} at {}", s3.url());
        Ok(s3)
    }

    /// Its bucket, with what opens it.
    pub(crate) fn url(&self) -> String {
        format!("http://{KEY}:{SECRET}@127.0.0.1:{}/{BUCKET}", self.port)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < START_PATIENCE {
            if let Some(status) = self.server.try_wait()? {
                let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
                bail!("s3s-fs ended with {status} instead of starting:\n{log}");
            }
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("s3s-fs did not accept connections within {} s", START_PATIENCE.as_secs())
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        if let Err(error) = self.server.kill().and_then(|()| self.server.wait().map(drop)) {
            eprintln!("could not stop s3s-fs: {error}");
        }
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("could not remove {}: {error}", self.folder.display());
        }
    }
}
