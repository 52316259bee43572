//! Adapters of the list port.

pub mod sql;
