//! The channels contract.
