//! Adapters of the channel port, and the live window that they share.
//!
//! [`log`] keeps channels on this machine's disk. Neither knows what a session's row says.

pub(crate) mod live;
pub mod log;
