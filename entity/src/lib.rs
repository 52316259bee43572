//! sea-orm rows.
