//! Adapters of the list port.

pub mod clickhouse;
pub mod fallback;
pub mod sql;
