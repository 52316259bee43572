//! The one integration test binary. Run it through `cargo xtask test`, which starts the backends it needs.

mod access;
mod access_matrix;
mod background;
mod blobs;
mod cli;
mod clickhouse;
mod contract;
mod control_plane;
mod core;
mod crash;
mod data_plane;
mod errors;
mod files;
mod graphql;
mod harness;
mod local_users;
mod log;
mod queries;
mod replication;
mod runs;
mod s2;
mod s2_engine;
mod schema;
mod slow_readers;
mod stopping;
mod transcripts;

mod waitpoints;
