//! The list contract.
