//! A Postgres of a test's own, which can be stopped, killed, copied and put back to its copy.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sea_orm::{ConnectionTrait, Database};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::process::send;

/// Longest start or stop that a test waits for.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether one is over.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// What replication needs, and what keeps a server small.
const SETTINGS: [&str; 6] = [
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "wal_level=logical",
    "max_replication_slots=10",
    "max_wal_senders=10",
    "shared_buffers=32MB",
];

/// How a server is made to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// It ends its connections once whoever reads a slot has been told everything, and leaves its files clean.
    Fast,
    /// It leaves everything as it is, and recovers at the next start.
    Immediate,
    /// kill -9.
    Kill,
}

/// A server of its own; it and its folder are gone when this is dropped. It dies with the thread that has started it, so start
/// it in the body of a test.
pub struct PostgresServer {
    server: Option<Child>,
    programs: Programs,
    folder: TempDir,
    port: u16,
    settings: Vec<String>,
}

/// The programs of Postgres, and whom they run as.
struct Programs {
    folder: PathBuf,
    /// User and group; `None` where nobody else than us is needed.
    owner: Option<(u32, u32)>,
}

impl Programs {
    fn of_the_run() -> Self {
        let setting = |name: &str| {
            std::env::var(name).unwrap_or_else(|_| {
                panic!("{name} is not set: `cargo xtask test` sets it, so run the tests through it")
            })
        };
        let user = setting("SESSIOND_TEST_POSTGRES_USER");
        let owner = user.split_once(':').map(|(user, group)| {
            let number = |text: &str| text.parse().expect("the number of a user or a group");
            (number(user), number(group))
        });
        Self { folder: setting("SESSIOND_TEST_POSTGRES_BIN").into(), owner }
    }

    fn own(&self, path: &Path) {
        if let Some((user, group)) = self.owner {
            chown(path, Some(user), Some(group)).expect("another owner");
        }
    }

    /// One that ends before the test goes on.
    fn run(&self, name: &str, configure: impl FnOnce(&mut Command) -> &mut Command) {
        let mut command = Command::new(self.folder.join(name));
        if let Some((user, group)) = self.owner {
            command.uid(user).gid(group);
        }
        let output = configure(command.current_dir("/")).stdin(Stdio::null()).output().expect("it runs");
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The server, which nobody can leave behind: it is killed when we are.
    fn server(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if let Some((user, group)) = self.owner {
            command.args([
                format!("--reuid={user}"),
                format!("--regid={group}"),
                "--clear-groups".to_owned(),
            ]);
        }
        command.arg("--").arg(self.folder.join("postgres"));
        command
    }
}

impl PostgresServer {
    /// Makes a cluster with a superuser `postgres`, and starts it with these settings beside its own, such as `fsync=off`.
    pub async fn start(settings: &[&str]) -> Self {
        let (programs, folder) = (Programs::of_the_run(), tempfile::tempdir().expect("a temporary folder"));
        programs.own(folder.path());
        let data = folder.path().join("data");
        programs.run("initdb", |initdb| {
            initdb.args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8"]);
            initdb.args(["--no-sync", "-D"]).arg(&data)
        });
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let port = free.expect("a free port").port();
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        let mut server = Self { server: None, programs, folder, port, settings };
        server.start_again().await;
        server
    }

    /// The superuser's URL, of the database `postgres`.
    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Its port on the loopback interface.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts it where it was, and waits until it answers.
    pub async fn start_again(&mut self) {
        let begun = Instant::now();
        // What is left of a killed one may still be there.
        while !self.try_start().await {
            assert!(begun.elapsed() < PATIENCE, "it does not start: {}", self.log());
            sleep(LOOK_EVERY).await;
        }
    }

    /// Whether it runs and answers.
    async fn try_start(&mut self) -> bool {
        let log = File::options().create(true).append(true).open(self.folder.path().join("log"));
        let log = log.expect("a log");
        let mut command = self.programs.server();
        command.arg("-D").arg(self.data()).args(["-p", &self.port.to_string()]);
        for setting in SETTINGS.into_iter().chain(self.settings.iter().map(String::as_str)) {
            command.args(["-c", setting]);
        }
        command.current_dir(self.folder.path()).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a log")).stderr(log);
        let mut server = command.spawn().expect("it starts");
        let begun = Instant::now();
        while !self.is_ready().await {
            if server.try_wait().expect("a child").is_some() {
                return false;
            }
            assert!(begun.elapsed() < PATIENCE, "it does not answer: {}", self.log());
            sleep(LOOK_EVERY).await;
        }
        self.server = Some(server);
        true
    }

    async fn is_ready(&self) -> bool {
        let mut probe = tokio::process::Command::new(self.programs.folder.join("pg_isready"));
        probe.args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]);
        probe.status().await.expect("it runs").success()
    }

    /// Ends it, and waits until it has ended.
    pub async fn stop(&mut self, shutdown: Shutdown) {
        let mut server = self.server.take().expect("it runs");
        send(server.id(), shutdown.signal());
        let begun = Instant::now();
        while server.try_wait().expect("a child").is_none() {
            assert!(begun.elapsed() < PATIENCE, "it does not stop: {}", self.log());
            sleep(LOOK_EVERY).await;
        }
    }

    /// Copies the folder, while it is stopped.
    pub fn copy(&self) {
        assert!(self.server.is_none(), "what is copied while it runs is no copy");
        let copied = Command::new("cp").arg("-a").args([self.data(), self.kept()]).status();
        assert!(copied.expect("cp runs").success());
    }

    /// Puts the copy in the place of the folder, while it is stopped. The copy is used up.
    pub fn put_back(&self) {
        assert!(self.server.is_none(), "it must be stopped");
        fs::remove_dir_all(self.data()).expect("removed");
        fs::rename(self.kept(), self.data()).expect("put back");
    }

    /// Makes a base backup in the place of a copy, while it runs.
    pub fn back_up(&self) {
        let port = self.port.to_string();
        self.programs.run("pg_basebackup", |backup| {
            backup.args(["-h", "127.0.0.1", "-U", "postgres", "--checkpoint=fast", "--no-sync", "-p", &port]);
            backup.arg("-D").arg(self.kept())
        });
    }

    /// Puts the base backup back, starts it as a standby of nobody, and promotes it: it goes on on another timeline.
    pub async fn promote_backup(&mut self) {
        self.put_back();
        let standby = self.data().join("standby.signal");
        File::create(&standby).expect("a file");
        self.programs.own(&standby);
        self.start_again().await;
        let connection = Database::connect(self.url()).await.expect("connects");
        connection.execute_unprepared("SELECT pg_promote()").await.expect("promoted");
        connection.close().await.expect("closes");
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn kept(&self) -> PathBuf {
        self.folder.path().join("kept")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        let Some(server) = &mut self.server else { return };
        // Of an immediate shutdown nothing is left behind; after kill -9 some would still write into the folder.
        send(server.id(), Shutdown::Immediate.signal());
        let _ = server.wait();
    }
}

impl Shutdown {
    fn signal(self) -> i32 {
        match self {
            Self::Fast => libc::SIGINT,
            Self::Immediate => libc::SIGQUIT,
            Self::Kill => libc::SIGKILL,
        }
    }
}
