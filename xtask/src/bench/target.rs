//! What a server under test must offer. The load generator knows servers through this only.

use std::path::Path;

use super::record::{Mark, Request};
use super::server::Server;

/// A kind of server.
pub(crate) trait Target {
    /// Its name in the tables.
    fn name(&self) -> &'static str;

    /// Installs what is missing, and answers the version.
    fn prepare(&mut self) -> anyhow::Result<String>;

    /// Starts a fresh one with its data in `home`.
    fn start(&self, home: &Path) -> anyhow::Result<Server>;

    /// What proves that an ack means fsync, asked of the running server.
    fn proof(&self, server: &Server) -> anyhow::Result<Vec<String>>;

    /// Creates the sessions, or whatever its streams are called.
    fn create(&self, server: &Server, sessions: &[String]) -> anyhow::Result<()>;

    /// The request that appends one record.
    fn append(&self, server: &Server, session: &str) -> Request;

    /// Follows a session from its first record on.
    fn follow(&self, server: &Server, session: &str) -> Box<dyn Reader>;

    /// Returns once `count` followers wait, where the server's answer does not tell each of them.
    fn settle(&self, _server: &Server, _count: usize) -> anyhow::Result<()> {
        Ok(())
    }

    /// The ways to read a whole session at once, with their names.
    fn catch_up(&self, server: &Server, session: &str) -> Vec<(&'static str, Box<dyn Reader>)>;
}

/// The client's side of one connection that reads records.
pub(crate) trait Reader: Send {
    /// What to send first.
    fn request(&self) -> Vec<u8>;

    /// Whether the server has accepted the request.
    fn ready(&self) -> bool;

    /// Takes what arrived, hands the records in it to `on`, and answers what to send next, if anything.
    fn feed(&mut self, bytes: &[u8], on: &mut dyn FnMut(Mark)) -> anyhow::Result<Option<Vec<u8>>>;
}
