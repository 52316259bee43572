//! A private server for tests: a process in a throw-away folder, reachable on a free loopback port, killed and deleted
//! on drop. For servers that leave nothing worth keeping in order.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, bail};

use crate::workspace::Scratch;

/// How long a server may take to answer.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// A running server.
pub(crate) struct Server {
    name: &'static str,
    child: Child,
    folder: Scratch,
    /// Where it listens.
    pub(crate) port: u16,
}

impl Server {
    /// Starts what `command` makes of a free port and an empty folder, and waits until it listens.
    ///
    /// # Errors
    /// Says what the server printed if it does not.
    pub(crate) fn start(
        name: &'static str,
        command: impl FnOnce(u16, &Path) -> Result<Command>,
    ) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let folder = Scratch::new(&env::temp_dir(), &format!("sessiond-{name}"))?;
        let log = File::create(folder.path.join("log"))?;
        let mut command = command(port, &folder.path)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // A group of its own, so that Ctrl-C reaches us first.
        let child = command.process_group(0).spawn().with_context(|| format!("cannot start {name}"))?;
        let mut server = Self { name, child, folder, port };
        server.wait_until_ready()?;
        Ok(server)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < START_PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                let log = fs::read_to_string(self.folder.path.join("log")).unwrap_or_default();
                bail!("{} ended with {status} instead of starting:\n{log}", self.name);
            }
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                println!("{} on port {}", self.name, self.port);
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
        bail!("{} did not accept connections within {} s", self.name, START_PATIENCE.as_secs())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
            eprintln!("could not stop {}: {error}", self.name);
        }
    }
}
