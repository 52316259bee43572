//! A running server: started in a folder of its own, metered through /proc, and gone when dropped.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// Longest a server may take to answer after its start.
const START_WITHIN: Duration = Duration::from_secs(30);
/// Linux counts processor time for user space in hundredths of a second.
const TICK: Duration = Duration::from_millis(10);

/// A server process.
pub(crate) struct Server {
    child: Child,
    home: PathBuf,
    keep: bool,
    /// Where it listens.
    pub(crate) address: SocketAddr,
}

impl Server {
    /// Starts `command`, whose port `address` finds: from what it has printed so far, or known before.
    pub(crate) fn start(
        command: &mut Command,
        home: &Path,
        address: impl Fn(&str) -> Option<SocketAddr>,
    ) -> anyhow::Result<Self> {
        let printed = home.join("printed");
        let log = File::create(&printed)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut server = Self { child, home: home.to_owned(), keep: false, address: nowhere };
        let deadline = Instant::now() + START_WITHIN;
        loop {
            let text = fs::read_to_string(&printed)?;
            if let Some(address) = address(&text)
                && TcpStream::connect(address).is_ok()
            {
                server.address = address;
                return Ok(server);
            }
            if server.child.try_wait()?.is_some() || Instant::now() > deadline {
                bail!("{:?} did not start; it printed:\n{text}", command.get_program());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it has printed so far.
    pub(crate) fn printed(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(self.home.join("printed"))?)
    }

    /// The folder of its data.
    pub(crate) fn home(&self) -> &Path {
        &self.home
    }

    /// Its command line, as the kernel knows it.
    pub(crate) fn command_line(&self) -> anyhow::Result<String> {
        let words = fs::read(format!("/proc/{}/cmdline", self.child.id()))?;
        Ok(String::from_utf8_lossy(&words).replace('\0', " ").trim().to_owned())
    }

    /// Processor time it has used, user and system.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        cpu(&self.child.id().to_string())
    }

    /// Its resident memory in KiB.
    pub(crate) fn rss(&self) -> anyhow::Result<u64> {
        rss(self.child.id())
    }

    /// Stops it and leaves its data where it is.
    pub(crate) fn stop_keeping_data(mut self) {
        self.keep = true;
    }

    /// A connection for requests that are not measured.
    pub(crate) fn connect(&self) -> anyhow::Result<TcpStream> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nobody wants the data again, so nothing is lost by not asking first.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !self.keep {
            let _ = fs::remove_dir_all(&self.home);
        }
    }
}

/// Resident memory of a process in KiB.
pub(crate) fn rss(process: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Processor time of this process.
pub(crate) fn own_cpu() -> anyhow::Result<Duration> {
    cpu("self")
}

fn cpu(process: &str) -> anyhow::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name before it may hold spaces; what follows its last parenthesis does not.
    let (_, fields) = stat.rsplit_once(')').context("no process name")?;
    let mut times = fields.split_whitespace().skip(11);
    let mut ticks = || -> anyhow::Result<u32> { Ok(times.next().context("no processor time")?.parse()?) };
    Ok(TICK * (ticks()? + ticks()?))
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
