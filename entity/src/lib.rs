//! sea-orm rows of the metadata store: one module per table and nothing else. No rule lives here.
//!
//! Times are milliseconds since the Unix epoch. The columns are explained in the `migration` crate.

pub mod environments;
pub mod installation;
pub mod keys;
pub mod session_runs;
pub mod session_tags;
pub mod sessions;
pub mod waitpoint_tags;
pub mod waitpoints;
