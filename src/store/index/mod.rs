//! Adapters of the list port.
