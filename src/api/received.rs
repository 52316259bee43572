//! The room of what clients send, from when it is read until it is answered.

use http::StatusCode;
use http::header::{HeaderValue, RETRY_AFTER};

use super::error::Failure;
use crate::domain::send_budget::Reservation;
use crate::domain::{Code, ConnectionBudget};

/// What one value of JSON takes once it is read: `[0,0]` is the worst, with two bytes for each.
const VALUE_BYTES: usize = 72;
/// JSON that takes less once it is read is not counted.
const SMALL_VALUES: usize = 64 * 1024;
/// What of a body is not counted.
const SMALL: usize = 16 * 1024;

/// The room of a body that grows with it.
#[derive(Debug, Default)]
pub(super) struct Received {
    bytes: usize,
    room: Option<Reservation>,
}

impl Received {
    /// Counts the next bytes of a body, of which there will be at most `limit`.
    ///
    /// # Errors
    /// 503 if there is no room for them.
    pub(super) fn add(
        &mut self,
        budget: &ConnectionBudget,
        bytes: usize,
        limit: usize,
    ) -> Result<(), Failure> {
        budget.received(bytes);
        self.hold(budget, bytes, limit)
    }

    /// Counts the next bytes of what a body is decoded to, of which there will be at most `limit`.
    ///
    /// # Errors
    /// As [`Received::add`].
    pub(super) fn hold(
        &mut self,
        budget: &ConnectionBudget,
        bytes: usize,
        limit: usize,
    ) -> Result<(), Failure> {
        self.bytes += bytes;
        let has = self.room.as_ref().map_or(0, Reservation::bytes);
        if self.bytes > has.max(SMALL) {
            // Twice as much, so that a body which comes in small pieces does not ask for each.
            let all = (2 * self.bytes).min(limit.max(self.bytes));
            let more = budget.try_receive(all, has).ok_or_else(busy)?;
            match &mut self.room {
                Some(room) => room.merge(more),
                None => self.room = Some(more),
            }
        }
        Ok(())
    }

    /// The room, if it takes any.
    pub(super) fn into_room(self) -> Option<Reservation> {
        self.room
    }
}

/// What JSON takes once it is read, about, and never less; the query string of a URL may have it percent-encoded.
fn weight(text: &[u8]) -> usize {
    let begins_value = |byte: &&u8| matches!(byte, b',' | b'[' | b'{' | b':' | b'%');
    text.len() + VALUE_BYTES * text.iter().filter(begins_value).count()
}

/// Room for what JSON takes once it is read; none for little.
///
/// # Errors
/// 503 if there is no room.
pub(super) fn weigh(budget: &ConnectionBudget, text: &[u8]) -> Result<Option<Reservation>, Failure> {
    match weight(text) {
        ..=SMALL_VALUES => Ok(None),
        weight => budget.try_receive(weight, 0).map(Some).ok_or_else(busy),
    }
}

fn busy() -> Failure {
    let message = "Too much is being received at once; please try again";
    Failure::new(StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable.as_str(), message)
        .header(RETRY_AFTER, HeaderValue::from_static("1"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::SendBudget;

    #[test]
    fn a_body_takes_room_as_it_comes_and_not_as_it_is_announced() {
        let budget = SendBudget::new(8 << 20, 1);
        let connection = budget.connection();
        let mut received = Received::default();
        received.add(&connection, SMALL, 1 << 20).expect("small");
        assert_eq!(budget.lent(), 0);
        for _ in 0..(1 << 20) / SMALL - 1 {
            received.add(&connection, SMALL, 1 << 20).expect("room");
        }
        assert_eq!(budget.lent(), 1 << 20);
        let mut next = Received::default();
        // A quarter of all is the most that one connection may send at once.
        next.add(&connection, 1 << 20, 1 << 20).expect("room");
        let refused = Received::default().add(&connection, 1 << 20, 1 << 20).expect_err("no room");
        assert_eq!(
            (refused.status.as_u16(), &refused.headers()[RETRY_AFTER]),
            (503, &HeaderValue::from_static("1"))
        );
        let other = budget.connection();
        Received::default().add(&other, 1 << 20, 1 << 20).expect("another one may");
        drop((received.into_room(), next));
        assert_eq!(budget.lent(), 0);
    }

    #[test]
    fn json_is_weighed_by_its_values() {
        let connection = SendBudget::new(64 << 20, 1).connection();
        assert!(weigh(&connection, &[b'x'; SMALL_VALUES]).expect("little").is_none());
        let zeros = [b"[".as_slice(), &b"0,".repeat(4096), b"0]"].concat();
        let room = weigh(&connection, &zeros).expect("room").expect("some");
        assert!(room.bytes() > 4096 * VALUE_BYTES, "{room:?}");
    }
}
