//! Adapters of the channel port, and the live window that they share.
//!
//! [`log`] keeps channels on this machine's disk, [`s2`] in a basin of S2 that any number of replicas share. Neither knows
//! what a session's row says.

mod follow;
pub(crate) mod live;
pub mod log;
mod observer;
mod part;
pub mod s2;

pub use observer::{CommitStats, LogObserver};
