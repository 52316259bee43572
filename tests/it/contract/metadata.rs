//! The metadata contract.
