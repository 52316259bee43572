//! S2 for tests: basins of their own on the s2-lite that the run started, and an s2-lite of a test's own that can be
//! killed.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use sessiond::domain::SystemClock;
use sessiond::store::channel::s2::{S2Channels, S2Options};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// Longest start that a test waits for: s2-lite sleeps a second first, lest another one writes the same store.
const PATIENCE: Duration = Duration::from_secs(60);

fn setting(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: `cargo xtask test` installs an s2-lite and sets it, so run the tests through it")
    })
}

/// The s2-lite of this run.
pub fn endpoint() -> String {
    setting("SESSIOND_TEST_S2")
}

/// The name of a basin that does not exist yet.
pub fn fresh_basin() -> String {
    format!("test-{}", uuid::Uuid::new_v4().simple())
}

/// The engine's longest pause between two tries, a tenth of what it is outside tests.
pub const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// How to reach a basin.
pub fn options(endpoint: &str, basin: &str) -> S2Options {
    S2Options {
        endpoint: Some(endpoint.to_owned()),
        basin: basin.to_owned(),
        token: "ignored".into(),
        retention: None,
        longest_pause: LONGEST_PAUSE,
        observer: Arc::new(()),
        background: Arc::default(),
    }
}

/// The engine on a basin, as one more replica.
pub async fn open(endpoint: &str, basin: &str) -> Arc<S2Channels> {
    let channels = S2Channels::open(options(endpoint, basin), Arc::new(SystemClock)).await;
    Arc::new(channels.expect("the engine opens"))
}

/// An s2-lite of a test's own, on a disk that outlives it.
pub struct S2Lite {
    root: TempDir,
    binary: PathBuf,
    port: u16,
    child: Child,
}

impl S2Lite {
    /// Starts it empty.
    pub async fn start() -> Self {
        let root = tempfile::tempdir().expect("a temporary folder");
        let binary = PathBuf::from(setting("SESSIOND_TEST_S2_BIN"));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        let child = spawn(&binary, root.path(), port).await;
        Self { root, binary, port, child }
    }

    /// Its endpoint, which stays the same.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// kill -9, and waits until it is gone.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("killed");
    }

    /// Starts it again on what it had written.
    pub async fn restart(&mut self) {
        self.child = spawn(&self.binary, self.root.path(), self.port).await;
    }
}

async fn spawn(binary: &Path, root: &Path, port: u16) -> Child {
    let mut command = Command::new(binary);
    command
        .args(["--no-cors", "--no-dashboard", "--port", &port.to_string(), "--local-root"])
        .arg(root)
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let mut child = command.spawn().expect("s2-lite starts");
    let listening = async {
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            assert!(child.try_wait().expect("a status").is_none(), "s2-lite ended instead of starting");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, listening).await.expect("s2-lite listens in time");
    child
}
