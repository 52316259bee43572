//! SQL metadata.
