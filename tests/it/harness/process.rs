//! The real binary, as a process that can be killed.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// Longest start or stop that a test waits for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A `sessiond serve` of its own; dropping it kills it.
pub struct Process {
    /// Base URL, as the banner printed it.
    pub url: String,
    child: Child,
}

impl Process {
    /// The binary under test.
    pub fn binary() -> &'static str {
        env!("CARGO_BIN_EXE_sessiond")
    }

    /// Starts `serve` on a data folder, on a free port.
    pub async fn serve(data: &Path) -> Self {
        let mut command = Command::new(Self::binary());
        Self::start(&mut command, data).await
    }

    /// Starts `serve` where another one was.
    pub async fn serve_at(data: &Path, address: &str) -> Self {
        Self::start_at(&mut Command::new(Self::binary()), data, address).await
    }

    /// Starts `serve` through a prepared command, which may be a wrapper that takes the binary's arguments.
    pub async fn start(command: &mut Command, data: &Path) -> Self {
        Self::start_at(command, data, "127.0.0.1:0").await
    }

    async fn start_at(command: &mut Command, data: &Path, address: &str) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        command
            .args(["serve", "--listen", address, "--data"])
            .arg(data)
            .env("SESSIOND_SECRET_KEY", super::server::KEY)
            .env("SESSIOND_HTTP__RATE_LIMIT__KEY_PER_10S", "0")
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().expect("the binary starts");
        let stdout = child.stdout.take().expect("a pipe");
        let mut lines = BufReader::new(stdout).lines();
        let banner = async {
            while let Some(line) = lines.next_line().await.expect("readable output") {
                if let Some(url) = line.trim().strip_prefix("base URL") {
                    return url.trim().to_owned();
                }
            }
            panic!("the process ended before it was ready");
        };
        let url = tokio::time::timeout(PATIENCE, banner).await.expect("ready in time");
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self { url, child }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id().expect("still running")
    }

    /// A line of the process's status, such as `VmRSS`, in KiB.
    pub fn memory(&self, line: &str) -> usize {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("a running process");
        let line = status.lines().find_map(|text| text.strip_prefix(line)).expect("a line");
        line.trim_start_matches(':').trim_end_matches("kB").trim().parse().expect("a number")
    }

    /// Puts the peak of its memory back to what is in use now, and gives that, in KiB.
    pub fn forget_peak(&self) -> usize {
        std::fs::write(format!("/proc/{}/clear_refs", self.id()), "5").expect("the peak is forgotten");
        self.memory("VmRSS")
    }

    /// Makes strace change what a kind of system call does, such as `fdatasync:error=EIO`, for as long as what is returned
    /// lives. It holds the process when this returns.
    pub async fn inject(&self, fault: &str) -> Child {
        let call = fault.split(':').next().unwrap_or_default();
        let mut strace = Command::new("strace")
            .args(["-f", "-p", &self.id().to_string(), "-e", &format!("trace={call}")])
            .args(["-e", &format!("inject={fault}"), "-o", "/dev/null"])
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("strace");
        let mut lines = BufReader::new(strace.stderr.take().expect("a pipe")).lines();
        while let Some(line) = lines.next_line().await.expect("readable output") {
            if line.contains("attached") {
                tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
                return strace;
            }
        }
        panic!("strace did not attach");
    }

    /// kill -9, and waits until it is gone.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("killed");
    }

    /// SIGTERM, and waits for the end.
    pub async fn terminate(mut self) -> ExitStatus {
        self.signal(libc::SIGTERM);
        self.wait().await
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        send(self.id(), signal);
    }

    /// As [`Process::terminate`], where the process is a wrapper that ends with its only child.
    pub async fn terminate_traced(mut self) -> ExitStatus {
        let id = self.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
        let child = children.expect("a running wrapper").trim().parse().expect("one child");
        send(child, libc::SIGTERM);
        self.wait().await
    }

    /// Waits for the end.
    pub async fn wait(&mut self) -> ExitStatus {
        tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .expect("ends in time")
            .expect("an exit status")
    }
}

/// Sends a signal to a child that was not waited for.
#[expect(unsafe_code, reason = "kill(2) takes two numbers")]
pub fn send(id: u32, signal: i32) {
    let id = i32::try_from(id).expect("a process id");
    // SAFETY: kill takes no pointers, and the caller has not waited for the process, so the id is still its own.
    assert_eq!(unsafe { libc::kill(id, signal) }, 0);
}
