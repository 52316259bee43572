//! Lists from ClickHouse: what the contract of `ListIndex` does not say.

mod outage;
mod pages;
mod rebuild;
mod table;
