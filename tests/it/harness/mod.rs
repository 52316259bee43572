//! What tests share: a real server in this process with a clock of its own, the real binary as a process of its
//! own, databases, and readers for what comes back.

pub mod clickhouse;
pub mod database;
pub mod dice;
pub mod engine;
pub mod graphql;
pub mod openapi;
pub mod postgres_server;
pub mod process;
pub mod proxy;
pub mod replication;
pub mod s2;
pub mod s2_lite;
pub mod seed;
pub mod server;
pub mod sse;
pub mod websocket;

pub use dice::Dice;
pub use graphql::Graphql;
pub use process::Process;
pub use server::{Answer, TestServer};
pub use sse::SseReader;
pub use websocket::Socket;

/// A budget that nothing in a test uses up.
pub fn ample_budget() -> sessiond::domain::ConnectionBudget {
    sessiond::domain::SendBudget::new(usize::MAX, 1).connection()
}
