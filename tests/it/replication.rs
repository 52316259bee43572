//! From Postgres to ClickHouse: the table, the stream, who leads, what survives.

mod chaos;
mod operator;
mod pages;
mod plan;
mod stream;
mod table;
pub mod world;
