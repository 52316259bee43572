//! Opaque ids of the `Node` interface: base64url of a kind and what names the thing.

use async_graphql::ID;
use data_encoding::BASE64URL_NOPAD;

use crate::domain::{
    ChannelAddress, ChannelKey, ChannelName, Direction, SeqNum, SessionId, SessionRef, WaitpointId,
};

/// What an id names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::api::graphql) enum GlobalId {
    /// `s:{session id}`
    Session(SessionId),
    /// `c:{channel key}`
    Channel(ChannelKey),
    /// `r:{seq num}:{channel key}`
    Record(ChannelKey, SeqNum),
    /// `w:{waitpoint id}`
    Waitpoint(WaitpointId),
}

impl GlobalId {
    /// The opaque text.
    pub fn encode(&self) -> ID {
        BASE64URL_NOPAD.encode(self.plain().as_bytes()).into()
    }

    /// What is encoded.
    pub fn plain(&self) -> String {
        match self {
            Self::Session(id) => format!("s:{id}"),
            Self::Channel(key) => format!("c:{key}"),
            Self::Record(key, seq_num) => format!("r:{seq_num}:{key}"),
            Self::Waitpoint(id) => format!("w:{id}"),
        }
    }

    /// Reads an id that [`GlobalId::encode`] wrote; anything else names nothing.
    pub fn decode(id: &ID) -> Option<Self> {
        let bytes = BASE64URL_NOPAD.decode(id.as_bytes()).ok()?;
        let (kind, rest) = std::str::from_utf8(&bytes).ok()?.split_once(':')?;
        match kind {
            "s" => session(rest).map(Self::Session),
            "c" => channel(rest).map(Self::Channel),
            "r" => {
                let (seq_num, key) = rest.split_once(':')?;
                Some(Self::Record(channel(key)?, seq_num.parse().ok()?))
            }
            "w" => WaitpointId::parse(rest).ok().map(Self::Waitpoint),
            _ => None,
        }
    }
}

fn session(text: &str) -> Option<SessionId> {
    match SessionRef::parse(text) {
        Ok(SessionRef::Id(id)) => Some(id),
        _ => None,
    }
}

fn channel(text: &str) -> Option<ChannelKey> {
    let parts: Vec<_> = text.split('/').collect();
    let (id, name, io) = match parts[..] {
        ["sessions", id, io] => (id, None, io),
        ["sessions", id, "channels", name, io] => (id, Some(name), io),
        _ => return None,
    };
    let name = name.map(ChannelName::parse).transpose().ok()?;
    let address = ChannelAddress { direction: Direction::parse(io).ok()?, name };
    Some(ChannelKey { session: session(id)?, address })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_comes_back_unchanged() {
        let session = SessionId::from_stored("session_0abc");
        let name = ChannelName::parse("a.b").expect("a name");
        let side = ChannelAddress { direction: Direction::Out, name: Some(name) };
        let key = ChannelKey { session: session.clone(), address: side };
        for id in [
            GlobalId::Session(session.clone()),
            GlobalId::Channel(ChannelKey::main(session, Direction::In)),
            GlobalId::Channel(key.clone()),
            GlobalId::Record(key, u64::MAX),
            GlobalId::Waitpoint(WaitpointId::from_stored("waitpoint_0abc")),
        ] {
            assert_eq!(GlobalId::decode(&id.encode()), Some(id));
        }
    }

    #[test]
    fn anything_else_names_nothing() {
        for plain in [
            "",
            "s:",
            "s:abc",
            "x:session_a",
            "c:session_a",
            "c:sessions/session_a/up",
            "r:1",
            "r:x:sessions/session_a/in",
            "w:session_a",
        ] {
            assert_eq!(GlobalId::decode(&BASE64URL_NOPAD.encode(plain.as_bytes()).into()), None, "{plain}");
        }
        assert_eq!(GlobalId::decode(&"!".into()), None);
    }
}
