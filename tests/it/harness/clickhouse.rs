//! A database of its own on the engine that tests share, and an engine of its own for tests that stop it.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use sessiond::domain::{MetadataStore, Timestamp};
use sessiond::store::index::clickhouse::{ClickHouse, ClickHouseOptions, Progress, Rebuild};
use tempfile::TempDir;

/// Where the engine that all tests share listens.
pub fn url() -> String {
    std::env::var("SESSIOND_TEST_CLICKHOUSE").expect(
        "SESSIOND_TEST_CLICKHOUSE is not set: `cargo xtask test` starts a ClickHouse and sets it, so run the tests through it",
    )
}

/// A database that does not exist yet, at `url`.
pub fn options(url: &str) -> ClickHouseOptions {
    ClickHouseOptions {
        url: url.to_owned(),
        database: format!("test_{}", uuid::Uuid::new_v4().simple()),
        user: "default".to_owned(),
        password: None,
        query_timeout: Duration::from_secs(30),
        insert_timeout: Duration::from_secs(30),
        cluster: None,
        metadata_column: false,
    }
}

/// That database.
pub fn connect(options: ClickHouseOptions) -> ClickHouse {
    ClickHouse::new(options).expect("no certificate is needed")
}

/// Copies everything, as `index rebuild` does.
pub async fn rebuild(clickhouse: &ClickHouse, store: Arc<dyn MetadataStore>, now: Timestamp) -> Progress {
    let mut rebuild = Rebuild::begin(clickhouse.clone(), store, false, now).await.expect("begins");
    loop {
        let progress = rebuild.step().await.expect("copies");
        if progress.finished {
            return progress;
        }
    }
}

/// What a test asks beside the index: the rows of a text without parameters.
pub async fn select<T: clickhouse::RowOwned + clickhouse::RowRead>(
    clickhouse: &ClickHouse,
    text: &str,
) -> Vec<T> {
    clickhouse.fetch(clickhouse.query(text)).await.expect("answers")
}

/// An engine of its own.
pub struct Engine {
    child: Child,
    folder: Arc<TempDir>,
    port: u16,
}

impl Engine {
    /// Starts it on an empty folder.
    pub fn start() -> Self {
        Self::on(Arc::new(tempfile::tempdir().expect("a temporary folder")), None)
    }

    fn on(folder: Arc<TempDir>, port: Option<u16>) -> Self {
        let library = std::env::var("SESSIOND_TEST_CLICKHOUSE_LIB")
            .expect("SESSIOND_TEST_CLICKHOUSE_LIB is not set: run the tests through `cargo xtask test`");
        let launcher = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/clickhouse/serve.py");
        let mut command = Command::new("python3");
        command.arg(launcher).arg(library).arg(folder.path().join("data"));
        command.args(port.map(|port| port.to_string())).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the engine starts");
        let mut line = String::new();
        let output = child.stdout.take().expect("piped");
        BufReader::new(output).read_line(&mut line).expect("a line");
        let port = line.trim().strip_prefix("READY http=").expect(&line).parse().expect("a port");
        Self { child, folder, port }
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// SIGKILL, and a start on the same folder and port.
    pub fn restart(self) -> Self {
        let (folder, port) = (self.folder.clone(), self.port);
        drop(self);
        Self::on(folder, Some(port))
    }

    /// Sends a signal, such as `STOP`.
    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args(["-s", signal, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// Ends its standard input, as the death of who started it does, and waits until it has ended.
    pub fn hang_up(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().expect("ends");
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // A stopped process dies of SIGKILL too.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
