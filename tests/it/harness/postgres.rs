//! A Postgres of its own, for tests that restart it.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

/// A cluster in a folder of its own, on a free port.
pub struct Cluster {
    folder: TempDir,
    binaries: PathBuf,
    port: u16,
    server: Option<Child>,
}

/// How a server is told to end.
#[derive(Clone, Copy, Debug)]
pub enum Shutdown {
    /// SIGINT: it ends every connection, and leaves its files in order.
    Fast,
    /// SIGQUIT: it ends as it is, and recovers at the next start.
    Immediate,
}

impl Cluster {
    /// Makes the cluster and starts it.
    pub async fn start() -> Self {
        let binaries =
            std::env::var("SESSIOND_TEST_POSTGRES_BIN").expect("SESSIOND_TEST_POSTGRES_BIN is set");
        let folder = tempfile::Builder::new().prefix("sessiond-cluster").tempdir().expect("a folder");
        if let Some((user, group)) = owner() {
            std::os::unix::fs::chown(folder.path(), Some(user), Some(group)).expect("a folder of its own");
        }
        let port = super::rough::steady_port();
        let mut cluster = Self { folder, binaries: binaries.into(), port, server: None };
        let mut initdb = cluster.command("initdb");
        initdb.args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8", "-D"]);
        let made = initdb.arg(cluster.data()).stdout(Stdio::null()).status().expect("initdb");
        assert!(made.success(), "initdb: {made}");
        cluster.run().await;
        cluster
    }

    /// The superuser's URL.
    pub fn url(&self) -> String {
        self.url_at(self.port)
    }

    /// As [`Cluster::url`], through a proxy on another port.
    pub fn url_at(&self, port: u16) -> String {
        format!("postgres://postgres@127.0.0.1:{port}/postgres?sslmode=disable")
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Ends the server and starts it again.
    pub async fn restart(&mut self, how: Shutdown) {
        let signal = match how {
            Shutdown::Fast => "INT",
            Shutdown::Immediate => "QUIT",
        };
        let mut server = self.server.take().expect("it runs");
        let status =
            Command::new("kill").args(["-s", signal, &server.id().to_string()]).status().expect("kill");
        assert!(status.success());
        tokio::task::spawn_blocking(move || server.wait()).await.expect("no panic").expect("it ends");
        self.run().await;
    }

    async fn run(&mut self) {
        let mut postgres = self.command("postgres");
        postgres.arg("-D").arg(self.data()).args(["-p", &self.port.to_string()]);
        for setting in [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "wal_level=logical",
            "shared_buffers=32MB",
        ] {
            postgres.args(["-c", setting]);
        }
        let log = std::fs::File::create(self.folder.path().join("log")).expect("a log");
        postgres.stdin(Stdio::null()).stdout(log.try_clone().expect("a file")).stderr(log);
        self.server = Some(postgres.spawn().expect("postgres"));
        let ready = || {
            let mut probe = Command::new(self.binaries.join("pg_isready"));
            probe
                .args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()])
                .status()
                .expect("a probe")
                .success()
        };
        while !ready() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.binaries.join(program));
        command.current_dir(self.folder.path()).process_group(0);
        if let Some((user, group)) = owner() {
            command.uid(user).gid(group);
        }
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = Command::new("kill").args(["-s", "QUIT", &server.id().to_string()]).status();
            let _ = server.wait();
        }
    }
}

/// Postgres does not run as root.
fn owner() -> Option<(u32, u32)> {
    let id = |flag: &str, user: &[&str]| -> u32 {
        let output = Command::new("id").arg(flag).args(user).output().expect("id");
        String::from_utf8(output.stdout).expect("a number").trim().parse().expect("a number")
    };
    (id("-u", &[]) == 0).then(|| (id("-u", &["postgres"]), id("-g", &["postgres"])))
}
