//! The messages of `graphql-transport-ws` and its close codes:
//! <https://github.com/enisdenjo/graphql-ws/blob/master/PROTOCOL.md>.

use std::borrow::Cow;

use async_graphql::{Extensions, Request, Variables};
use axum::extract::ws::CloseFrame;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::api::error::Failure;
use crate::api::graphql::unreadable;

/// The subprotocol.
pub(super) const PROTOCOL: &str = "graphql-transport-ws";
/// Longest id of an operation.
pub(super) const ID_MAX: usize = 256;
/// Longest reason of a close frame: 125 bytes of payload less two of code.
const REASON_MAX: usize = 123;

/// What a client says.
#[derive(Debug)]
pub(super) enum ClientMessage {
    ConnectionInit {
        payload: Option<Map<String, Value>>,
    },
    Ping {
        payload: Option<Map<String, Value>>,
    },
    Pong,
    Subscribe {
        id: String,
        /// Or what in it cannot be read, which is a fault of this operation alone.
        payload: Result<Subscribe, Failure>,
    },
    Complete {
        id: String,
    },
}

/// A message whose payload is not looked at.
#[derive(Deserialize)]
struct Frame<'a> {
    #[serde(borrow)]
    r#type: Cow<'a, str>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
}

/// An operation.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Subscribe {
    /// Absent only where a persisted query is named.
    query: Option<String>,
    operation_name: Option<String>,
    variables: Option<Variables>,
    extensions: Option<Extensions>,
}

impl ClientMessage {
    /// Reads a text frame.
    ///
    /// # Errors
    /// [`Close::invalid`] for anything that is not a message.
    pub fn parse(text: &str) -> Result<Self, Close> {
        let Frame { r#type, id, payload } = serde_json::from_str(text).map_err(|error| invalid(&error))?;
        let id = || match id.map(|id| serde_json::from_str::<String>(id.get())).transpose() {
            Err(error) => Err(invalid(&error)),
            Ok(None) => Err(Close::invalid("missing field `id`")),
            Ok(Some(id)) if id.is_empty() => Err(Close::invalid("the id must not be empty")),
            Ok(Some(id)) if id.len() > ID_MAX => {
                Err(Close::invalid(&format!("the id must be at most {ID_MAX} bytes")))
            }
            Ok(Some(id)) => Ok(id),
        };
        let object = || {
            let read = |payload: &RawValue| serde_json::from_str(payload.get());
            payload.map(read).transpose().map_err(|error| invalid(&error))
        };
        Ok(match &*r#type {
            "connection_init" => Self::ConnectionInit { payload: object()? },
            "ping" => Self::Ping { payload: object()? },
            "pong" => {
                object()?;
                Self::Pong
            }
            "complete" => Self::Complete { id: id()? },
            "subscribe" => {
                let payload = payload.ok_or_else(|| Close::invalid("missing field `payload`"))?;
                Self::Subscribe { id: id()?, payload: Subscribe::parse(payload.get())? }
            }
            other => return Err(Close::invalid(&format!("unknown type {other:?}"))),
        })
    }
}

fn invalid(error: &serde_json::Error) -> Close {
    Close::invalid(unreadable::reason(&error.to_string()))
}

impl Subscribe {
    /// Reads a payload.
    fn parse(text: &str) -> Result<Result<Self, Failure>, Close> {
        let read: Self = match serde_json::from_str(text) {
            Ok(read) => read,
            Err(error) => return unreadable::part_of(text).map(Err).ok_or_else(|| invalid(&error)),
        };
        if read.query.is_none() && !read.is_persisted() {
            return Err(Close::invalid("the payload has no query"));
        }
        Ok(Ok(read))
    }

    fn is_persisted(&self) -> bool {
        self.extensions.as_ref().is_some_and(|extensions| extensions.contains_key("persistedQuery"))
    }

    /// The request that the engine takes.
    pub fn into_request(self) -> Request {
        let mut request = Request::new(self.query.unwrap_or_default());
        request.operation_name = self.operation_name;
        request.variables = self.variables.unwrap_or_default();
        request.extensions = self.extensions.unwrap_or_default();
        request
    }
}

/// A message to the client, as text.
pub(super) fn message(kind: &str, id: &str, payload: &str) -> String {
    // Ids are the client's and may hold anything.
    let id = Value::from(id).to_string();
    let mut text = String::with_capacity(kind.len() + id.len() + payload.len() + 30);
    for part in ["{\"id\":", &id, ",\"type\":\"", kind, "\",\"payload\":", payload, "}"] {
        text.push_str(part);
    }
    text
}

/// The end of an operation.
pub(super) fn complete(id: &str) -> String {
    format!("{{\"id\":{},\"type\":\"complete\"}}", Value::from(id))
}

/// The acceptance of a connection.
pub(super) const ACK: &str = "{\"type\":\"connection_ack\"}";

/// The answer to a ping, with its payload.
pub(super) fn pong(payload: Option<Map<String, Value>>) -> String {
    #[derive(Serialize)]
    struct Pong {
        r#type: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        payload: Option<Map<String, Value>>,
    }
    serde_json::to_string(&Pong { r#type: "pong", payload }).unwrap_or_default()
}

/// Why we end a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Close {
    pub code: u16,
    pub reason: String,
}

impl Close {
    fn new(code: u16, reason: &str) -> Self {
        let mut end = reason.len().min(REASON_MAX);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        Self { code, reason: reason[..end].to_owned() }
    }

    /// The server stops; clients come back.
    pub fn going_away() -> Self {
        Self::new(1001, "the server is stopping")
    }

    /// Frames that are no WebSocket's.
    pub fn broken() -> Self {
        Self::new(1002, "protocol error")
    }

    /// A message over the limit.
    pub fn too_large(limit: usize) -> Self {
        Self::new(1009, &format!("a message must be at most {limit} bytes"))
    }

    /// There is no room for a large message; clients come back.
    pub fn busy() -> Self {
        Self::new(1013, "the server has no room for a large message now")
    }

    /// A message that the protocol does not know.
    pub fn invalid(reason: &str) -> Self {
        Self::new(4400, &format!("Invalid message: {reason}"))
    }

    /// An operation before the connection was accepted.
    pub fn unauthorized() -> Self {
        Self::new(4401, "Unauthorized")
    }

    /// Credentials that are no good, or have ended.
    pub fn forbidden(reason: &str) -> Self {
        Self::new(4403, &format!("Forbidden: {reason}"))
    }

    /// The client does not speak our protocol.
    pub fn wrong_protocol() -> Self {
        Self::new(4406, &format!("Subprotocol not acceptable; use {PROTOCOL}"))
    }

    /// No `connection_init` in time.
    pub fn init_timeout() -> Self {
        Self::new(4408, "Connection initialisation timeout")
    }

    /// An id in use.
    pub fn duplicate(id: &str) -> Self {
        Self::new(4409, &format!("Subscriber for {id} already exists"))
    }

    /// A second `connection_init`.
    pub fn too_many_inits() -> Self {
        Self::new(4429, "Too many initialisation requests")
    }

    /// No sign of life.
    pub fn dead() -> Self {
        Self::new(4499, "No answer to a ping")
    }

    /// The frame.
    pub fn frame(self) -> CloseFrame {
        CloseFrame { code: self.code, reason: self.reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_message_closes_with_4400() {
        for text in [
            "",
            "1",
            "[]",
            "{}",
            r#"{"type":1}"#,
            r#"{"type":"start","id":"1","payload":{"query":"{a}"}}"#,
            r#"{"type":"subscribe","payload":{"query":"{a}"}}"#,
            r#"{"type":"subscribe","id":"","payload":{"query":"{a}"}}"#,
            r#"{"type":"subscribe","id":1,"payload":{"query":"{a}"}}"#,
            r#"{"type":"subscribe","id":"1"}"#,
            r#"{"type":"subscribe","id":"1","payload":"{a}"}"#,
            r#"{"type":"subscribe","id":"1","payload":{}}"#,
            r#"{"type":"subscribe","id":"1","payload":{"query":1}}"#,
            r#"{"type":"subscribe","id":"1","payload":{"query":"{a}","variables":[]}}"#,
            r#"{"type":"complete"}"#,
            r#"{"type":"connection_init","payload":"x"}"#,
            r#"{"type":"ping","payload":1}"#,
            r#"{"type":"pong","payload":1}"#,
            r#"{"type":"subscribe","id":"\ud83d","payload":{"query":"{a}"}}"#,
        ] {
            assert_eq!(ClientMessage::parse(text).expect_err(text).code, 4400);
        }
    }

    #[test]
    fn what_cannot_be_read_is_a_fault_of_its_operation() {
        for (payload, message) in [
            (
                r#"{"query":"{a}","variables":{"a":"b","text":["\ud83d"]}}"#,
                "variables.text must not contain half of a surrogate pair",
            ),
            (
                r#"{"query":"{a}","variables":{"\ud83d":1}}"#,
                "variables must not contain half of a surrogate pair",
            ),
            (r#"{"query":"{a \ude00}"}"#, "query must not contain half of a surrogate pair"),
            (
                r#"{"query":"{a}","extensions":{"a":"\ud83d!"}}"#,
                "extensions must not contain half of a surrogate pair",
            ),
        ] {
            let text = format!(r#"{{"type":"subscribe","id":"1","payload":{payload}}}"#);
            let message_of = |message| match message {
                ClientMessage::Subscribe { payload: Err(failure), .. } => failure.message,
                other => panic!("{other:?}"),
            };
            assert_eq!(message_of(ClientMessage::parse(&text).expect("a message")), message);
        }
    }

    #[test]
    fn a_reason_fits_its_frame() {
        let close = Close::duplicate(&"ä".repeat(200));
        assert!(close.reason.len() <= REASON_MAX);
    }

    #[test]
    fn an_id_is_escaped() {
        let text = message("next", "a\"b", "{}");
        let value: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value, serde_json::json!({"id": "a\"b", "type": "next", "payload": {}}));
    }
}
