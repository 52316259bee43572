//! Lists from ClickHouse: what the contract of `ListIndex` does not say.

mod pages;
mod table;
