//! sessiond: durable two-way sessions for agents and their users.
//!
//! [`domain`] is the core and knows nothing of the rest; [`store`] and [`auth`] serve it, [`api`] translates for
//! it, [`server`] puts them together. `ARCHITECTURE.md` walks through it.

pub mod api;
pub mod auth;
pub mod cli;
pub mod config;
pub mod listener;
pub mod replication;
pub mod server;
pub mod shutdown;
pub mod telemetry;

pub use sessiond_domain as domain;
pub use sessiond_store as store;
