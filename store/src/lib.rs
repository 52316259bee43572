//! Adapters: one per port and backend. Each converts its backend's errors at its edge, once.

pub mod blob;
pub mod channel;
pub mod index;
pub mod metadata;
