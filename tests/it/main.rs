//! The one integration test binary. Run it through `cargo xtask test`, which starts the backends it needs.

mod contract;
mod harness;
mod log;
