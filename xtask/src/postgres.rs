//! A private Postgres for tests: run in a throw-away folder as a user that is not root,
//! reachable on a free loopback port, stopped and deleted on drop.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process;

/// Where Debian keeps server binaries, one folder per major version.
const DEBIAN_ROOT: &str = "/usr/lib/postgresql";
/// Whom the server runs as when we are root, because it refuses to run as root itself.
const USER: &str = "sessiond-postgres";
/// How long the server may take to accept connections.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to stop before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// A running server with a superuser `postgres` and no password.
pub struct Postgres {
    server: Child,
    folder: PathBuf,
    url: String,
}

impl Postgres {
    /// Makes a cluster and starts it.
    ///
    /// # Errors
    /// Says which step failed and shows what the step printed.
    pub fn start() -> Result<Self> {
        Self::start_below(&std::env::temp_dir())
    }

    /// One with a synchronous standby that never comes. Commits wait for it, for ever, in connections that set
    /// `synchronous_commit` to `on`, and in no others.
    ///
    /// # Errors
    /// As [`Postgres::start`].
    pub fn start_synchronous() -> Result<Self> {
        let settings = ["synchronous_standby_names=nobody", "synchronous_commit=local"];
        Self::start_with(&std::env::temp_dir(), &settings)
    }

    /// The same with its folder below `parent`, which the user that it runs as must be able to enter.
    ///
    /// # Errors
    /// As [`Postgres::start`].
    pub fn start_below(parent: &Path) -> Result<Self> {
        Self::start_with(parent, &[])
    }

    fn start_with(parent: &Path, settings: &[&str]) -> Result<Self> {
        let binaries = binaries()?;
        let owner = owner()?;
        // More than one of a process may run.
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(format!("sessiond-postgres-{}-{number}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
        if let Some((user, group)) = owner {
            chown(&folder, Some(user), Some(group))?;
        }
        let data = folder.join("data");
        let mut initdb = command(&binaries.join("initdb"), owner, &folder);
        initdb.args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8", "-D"]);
        process::quiet(initdb.arg(&data))?;
        let port = free_port()?;
        let server = spawn(&binaries, owner, &folder, port, settings)?;
        let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
        let mut postgres = Self { server, folder, url };
        postgres.wait_until_ready(&binaries, port)?;
        Ok(postgres)
    }

    /// The superuser's URL, of the database `postgres`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A client of that database: prints what is returned and nothing else, and ends at the first error.
    ///
    /// # Errors
    /// If there is none.
    #[cfg(feature = "bench")]
    pub fn psql(&self) -> Result<Command> {
        let mut psql = Command::new(binaries()?.join("psql"));
        psql.args(["-qAtX", "-v", "ON_ERROR_STOP=1", "-d", &self.url]);
        Ok(psql)
    }

    fn wait_until_ready(&mut self, binaries: &Path, port: u16) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < START_PATIENCE {
            if let Some(status) = self.server.try_wait()? {
                let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
                bail!("postgres ended with {status} instead of starting:\n{log}");
            }
            let mut probe = Command::new(binaries.join("pg_isready"));
            let probe = probe.args(["-q", "-h", "127.0.0.1", "-p", &port.to_string()]).status()?;
            if probe.success() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("postgres did not accept connections within {} s", START_PATIENCE.as_secs())
    }

    /// SIGINT is Postgres' fast shutdown: clients are cut off, files are left clean.
    fn stop(&mut self) -> Result<()> {
        let pid = self.server.id().to_string();
        process::quiet(Command::new("kill").args(["-s", "INT", &pid]))?;
        let asked = Instant::now();
        while self.server.try_wait()?.is_none() {
            if asked.elapsed() > STOP_PATIENCE {
                self.server.kill()?;
                self.server.wait()?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("could not stop postgres: {error:#}");
        }
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("could not remove {}: {error}", self.folder.display());
        }
    }
}

/// Where the programs are, and whom they run as (`UID:GID`; nobody else than us where it is empty): for tests that start servers
/// of their own.
///
/// # Errors
/// If there are none.
pub(crate) fn programs() -> Result<(PathBuf, String)> {
    let owner = owner()?.map(|(user, group)| format!("{user}:{group}"));
    Ok((binaries()?, owner.unwrap_or_default()))
}

/// The folder of the newest server installed.
fn binaries() -> Result<PathBuf> {
    newest()?
        .with_context(|| format!("no Postgres under {DEBIAN_ROOT}; the Debian package postgresql brings one"))
}

fn newest() -> Result<Option<PathBuf>> {
    let versions = match fs::read_dir(DEBIAN_ROOT) {
        Ok(entries) => entries.collect::<io::Result<Vec<_>>>()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).context(DEBIAN_ROOT),
    };
    let installed = versions.iter().filter_map(|entry| {
        let binaries = entry.path().join("bin");
        let version: u32 = entry.file_name().to_str()?.parse().ok()?;
        binaries.join("initdb").exists().then_some((version, binaries))
    });
    Ok(installed.max().map(|(_, binaries)| binaries))
}

/// User and group to run as, made if missing; `None` when we are not root and run it as ourselves.
fn owner() -> Result<Option<(u32, u32)>> {
    if id("-u", None)? != 0 {
        return Ok(None);
    }
    if id("-u", Some(USER)).is_err() {
        process::quiet(Command::new("useradd").args([
            "--system",
            "--no-create-home",
            "--shell",
            "/usr/sbin/nologin",
            USER,
        ]))?;
    }
    Ok(Some((id("-u", Some(USER))?, id("-g", Some(USER))?)))
}

fn id(what: &str, user: Option<&str>) -> Result<u32> {
    let text = process::quiet(Command::new("id").arg(what).args(user))?;
    text.trim().parse().with_context(|| format!("id printed {text:?}"))
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn spawn(
    binaries: &Path,
    owner: Option<(u32, u32)>,
    folder: &Path,
    port: u16,
    more: &[&str],
) -> Result<Child> {
    let log = fs::File::create(folder.join("log"))?;
    let settings = [
        "listen_addresses=127.0.0.1",
        "unix_socket_directories=",
        "wal_level=logical",
        "shared_buffers=64MB",
        "max_connections=200",
        // Tests run beside each other, and slots are of the whole server.
        "max_replication_slots=100",
        "max_wal_senders=100",
    ];
    let mut postgres = command(&binaries.join("postgres"), owner, folder);
    postgres.arg("-D").arg(folder.join("data")).args(["-p", &port.to_string()]);
    for setting in settings.iter().chain(more) {
        postgres.args(["-c", setting]);
    }
    // A group of its own, so that Ctrl-C reaches us first and we stop it in order.
    postgres.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    postgres.spawn().context("cannot start postgres")
}

fn command(program: &Path, owner: Option<(u32, u32)>, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder);
    if let Some((user, group)) = owner {
        command.uid(user).gid(group);
    }
    command
}
