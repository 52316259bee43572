//! The engines that keep channels: what must hold on each of them runs on all of them.

use sessiond::config::Config;

use super::TestServer;

/// One engine behind a server.
#[derive(Clone, Copy, Debug)]
pub struct Engine {
    /// For messages.
    pub name: &'static str,
    configure: fn(&mut Config),
}

impl Engine {
    /// A fresh server on this engine.
    pub async fn start(self) -> TestServer {
        TestServer::start_with(self.configure).await
    }
}

/// Every engine that this run can reach.
pub fn engines() -> Vec<Engine> {
    vec![Engine { name: "embedded log", configure: |_| {} }]
}
