//! The engines that keep channels: what must hold on each of them runs on all of them.

use sessiond::config::Config;

use super::{TestServer, s2_lite};

/// One engine behind a server.
#[derive(Clone, Copy, Debug)]
pub struct Engine {
    /// For messages.
    pub name: &'static str,
    configure: fn(&mut Config),
}

impl Engine {
    /// The log in the data folder.
    pub fn log() -> Self {
        Self { name: "embedded log", configure: |_| {} }
    }

    /// A basin of its own on the S2 of this run.
    pub fn s2() -> Self {
        Self { name: "S2", configure: on_s2 }
    }

    /// A fresh server on this engine.
    pub async fn start(self) -> TestServer {
        TestServer::start_with(self.configure).await
    }
}

fn on_s2(config: &mut Config) {
    let url = format!("s2://{}", s2_lite::fresh_basin());
    config.log.url = Some(url.parse().expect("a URL"));
    config.log.endpoint = Some(s2_lite::endpoint().parse().expect("a URL"));
}
