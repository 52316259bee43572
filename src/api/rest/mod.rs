//! The control plane over REST: sessions, waitpoints and tokens.

pub mod auth;
pub mod consistency;
pub mod list;
pub mod model;
pub mod read;
pub mod sessions;
pub mod snapshot;
pub mod trigger;
pub mod waitpoint_model;
pub mod waitpoints;
