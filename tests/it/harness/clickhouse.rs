//! A database of its own on the test engine, and an engine of its own for tests that kill it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use sessiond::clickhouse::{ClickHouse, SessionRow};
use sessiond::config::{ClickHouseConfig, ClickHouseEngine};

/// The sessions table of a new database.
pub async fn fresh() -> ClickHouse {
    let clickhouse = ClickHouse::new(&config(&url()));
    clickhouse.migrate().await.expect("migrates");
    clickhouse
}

/// Where the engine that all tests share listens.
pub fn url() -> String {
    std::env::var("SESSIOND_TEST_CLICKHOUSE").expect(
        "SESSIOND_TEST_CLICKHOUSE is not set: `cargo xtask test` starts a ClickHouse and sets it, so run the tests through it",
    )
}

/// Settings that name a database which does not exist yet.
pub fn config(url: &str) -> ClickHouseConfig {
    ClickHouseConfig {
        url: Some(url.parse().expect("a URL")),
        user: "default".to_owned(),
        password: None,
        database: format!("test_{}", uuid::Uuid::new_v4().simple()),
        table: "sessions_v1".to_owned(),
        cluster: None,
        engine: ClickHouseEngine::Single,
        query_timeout: Duration::from_secs(10),
        fallback: false,
    }
}

/// A version of a session as the replicator writes it.
pub fn row(id: &str, created_at: i64, version: u64) -> SessionRow {
    SessionRow {
        environment_id: super::database::HERE.to_owned(),
        organization_id: "acme".to_owned(),
        project_id: "main".to_owned(),
        session_id: id.to_owned(),
        environment_type: "prod".to_owned(),
        friendly_id: id.to_owned(),
        external_id: String::new(),
        r#type: "chat".to_owned(),
        task_identifier: "agent".to_owned(),
        tags: Vec::new(),
        metadata: r#"{"data":null}"#.to_owned(),
        closed_at: None,
        closed_reason: String::new(),
        expires_at: None,
        created_at,
        updated_at: created_at,
        _version: version,
        _is_deleted: 0,
        metadata_text: String::new(),
        trigger_config: String::new(),
        current_run_id: "run_a".to_owned(),
    }
}

/// An engine on a folder of the caller's, for tests that stop and kill it.
pub struct Engine {
    child: Child,
    /// Open for as long as it runs: what writes into a closed pipe is killed.
    _output: BufReader<ChildStdout>,
    port: u16,
}

impl Engine {
    /// Starts it on `port`; 0 for a free one.
    pub fn start(folder: &Path, port: u16) -> Self {
        let program =
            std::env::var("SESSIOND_TEST_CLICKHOUSE_BIN").expect("SESSIOND_TEST_CLICKHOUSE_BIN is set");
        let port = if port == 0 { super::rough::steady_port() } else { port };
        let mut command = Command::new(program);
        command.arg(folder).arg(port.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the engine starts");
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        output.read_line(&mut line).expect("a line");
        let port = line.trim().strip_prefix("READY http=").expect(&line).parse().expect("a port");
        Self { child, _output: output, port }
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Its port, for a start at the same place.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().expect("a child of ours")
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("gone");
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
