//! The room of what clients send, from before it is read until it is answered.

use std::time::Duration;

use super::error::Failure;
use crate::domain::send_budget::Reservation;
use crate::domain::{ConnectionBudget, Error};

/// What one value of JSON takes once it is read: `[0,0]` is the worst, with two bytes for each.
const VALUE_BYTES: usize = 72;
/// What takes less is not counted.
const SMALL: usize = 4 * 1024;

/// What JSON takes once it is read, about, and never less; 0 for little.
pub(super) fn size_of(text: &[u8]) -> usize {
    let begins_value = |byte: &&u8| matches!(byte, b',' | b'[' | b'{' | b':');
    let size = text.len() + VALUE_BYTES * text.iter().filter(begins_value).count();
    if size > SMALL { size } else { 0 }
}

/// Waits for room for so many bytes that are to be received.
///
/// # Errors
/// 503 if there is none for `patience`.
pub(super) async fn room(
    budget: &ConnectionBudget,
    bytes: usize,
    patience: Duration,
) -> Result<Reservation, Failure> {
    let room = tokio::time::timeout(patience, budget.receive(bytes)).await;
    Ok(room.map_err(|_| Error::unavailable("the server", "too much is received at once"))?)
}

/// Waits for room for what JSON takes once it is read; none for little.
///
/// # Errors
/// As [`room`].
pub(super) async fn reserve(
    budget: &ConnectionBudget,
    text: &[u8],
    patience: Duration,
) -> Result<Option<Reservation>, Failure> {
    match size_of(text) {
        0 => Ok(None),
        size => room(budget, size, patience).await.map(Some),
    }
}
