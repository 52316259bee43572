//! The control plane over REST: sessions and tokens.

pub mod auth;
pub mod list;
pub mod model;
pub mod read;
pub mod sessions;
pub mod snapshot;
pub mod trigger;
