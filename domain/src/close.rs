//! What a close leaves behind in the two main channels of a session, so that whoever reads them learns of it as of any
//! record. The agent runtime of the SDK and its chat transport (4.8.3) wait for exactly these two.

use bytes::Bytes;

use super::envelope::{self, CONTROL_HEADER};
use super::id::SessionId;
use super::record::{Header, NewRecord, Record};
use super::session::Closure;

/// Subtype of the control record on `.out`.
const SESSION_CLOSED: &str = "session-closed";
/// Header of that record: the reason, if there is one.
const REASON_HEADER: &str = "session-closed-reason";
/// What an agent that listens on `.in` takes for the order to end.
const CLOSE_MESSAGE: &str = r#"{"kind":"message","payload":{"trigger":"close"}}"#;
/// What the part id of the record on `.in` begins with, before the session's id. No writer may use it.
pub(super) const PART_PREFIX: &str = "session-closed:";

/// A close as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// When and why.
    pub closure: Closure,
    /// The agent has said so on `.out` itself, so nothing is added there.
    pub told: bool,
}

impl From<Closure> for Close {
    /// A close that nobody has told of.
    fn from(closure: Closure) -> Self {
        Self { closure, told: false }
    }
}

/// The last record of a closed session's `.in`: a data record, as the append route would store it.
pub fn input_record(session: &SessionId) -> NewRecord {
    NewRecord::data(envelope::wrap_text(CLOSE_MESSAGE, &format!("{PART_PREFIX}{session}")))
}

/// The last record of a closed session's `.out`: a control record with the reason.
pub fn output_record(closure: &Closure) -> NewRecord {
    let header = |name: &'static [u8], value: &str| {
        (Bytes::from_static(name), Bytes::copy_from_slice(value.as_bytes()))
    };
    let mut headers = vec![header(CONTROL_HEADER, SESSION_CLOSED)];
    headers.extend(closure.reason.as_deref().map(|reason| header(REASON_HEADER.as_bytes(), reason)));
    NewRecord { headers, ..NewRecord::default() }
}

/// True for the headers of a control record that says that the session is closed.
pub fn says_closed(headers: &[Header]) -> bool {
    envelope::control(headers) == Some(SESSION_CLOSED)
}

/// True for the record that [`input_record`] makes.
pub(super) fn is_input_record(record: &Record, session: &SessionId) -> bool {
    record.headers.is_empty() && record.body == input_record(session).body
}

/// True for a part id that only [`input_record`] may have: readers drop a record whose id they have seen, so one of a
/// client's would hide the close.
pub(super) fn is_reserved(part_id: &str) -> bool {
    part_id.starts_with(PART_PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::record::Position;

    #[test]
    fn the_records_are_what_the_published_clients_wait_for() {
        let session = SessionId::from_stored("session_a");
        let input = input_record(&session);
        let text = r#"{"data":"{\"kind\":\"message\",\"payload\":{\"trigger\":\"close\"}}","id":"session-closed:session_a"}"#;
        assert_eq!(input.body, text);
        let stored =
            Record { position: Position::default(), headers: vec![], body: input.body, metered_end: 0 };
        assert!(is_input_record(&stored, &session));
        assert!(!is_input_record(&stored, &SessionId::from_stored("session_b")));
        assert!(!envelope::is_message(&stored) && envelope::is_data(&stored));

        let closure =
            |reason: Option<&str>| Closure { at: Timestamp::from_millis(1), reason: reason.map(Into::into) };
        let output = output_record(&closure(Some("done")));
        let headers = [("trigger-control", "session-closed"), ("session-closed-reason", "done")];
        assert_eq!(output.headers, headers.map(|(name, value)| (Bytes::from(name), Bytes::from(value))));
        assert!(says_closed(&output.headers) && output.body.is_empty());
        assert_eq!(output_record(&closure(None)).headers.len(), 1);
    }
}
