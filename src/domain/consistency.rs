//! How a reader of lists asks for what it has written.

use async_trait::async_trait;
use data_encoding::BASE64URL_NOPAD;

use super::error::{Error, Result};

/// A point that lists must have reached for a write to be seen in them. Opaque to callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConsistencyToken {
    /// Which run of the replication; it begins anew when the slot is lost. 0 is from before the first one.
    pub epoch: u8,
    /// A place in the write-ahead log of Postgres, at or behind the write's commit.
    pub lsn: u64,
}

impl ConsistencyToken {
    const VERSION: u8 = 1;

    /// The opaque text: base64url of version, epoch and place.
    pub fn encode(&self) -> String {
        let mut bytes = vec![Self::VERSION, self.epoch];
        bytes.extend(self.lsn.to_be_bytes());
        BASE64URL_NOPAD.encode(&bytes)
    }

    /// Reads a token that [`ConsistencyToken::encode`] wrote.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming `field`.
    pub fn decode(field: &str, text: &str) -> Result<Self> {
        let read = || {
            let bytes = BASE64URL_NOPAD.decode(text.as_bytes()).ok()?;
            let (head, lsn) = bytes.split_first_chunk::<2>()?;
            let lsn = u64::from_be_bytes(lsn.try_into().ok()?);
            (head[0] == Self::VERSION).then_some(Self { epoch: head[1], lsn })
        };
        read().ok_or_else(|| Error::malformed(field, "is not a consistency token"))
    }
}

/// How far lists are behind the writes that they show.
#[async_trait]
pub trait Freshness: Send + Sync {
    /// To be asked before a write, for [`Freshness::mark`] after it; `None` where lists are never behind.
    fn epoch(&self) -> Option<u8>;

    /// A token for everything that had been committed before this call, if `epoch` was asked before the write began.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    async fn mark(&self, epoch: u8) -> Result<ConsistencyToken>;

    /// Waits until lists show everything that the token stands for. Returns at once where lists are never behind.
    ///
    /// # Errors
    /// [`Error::NotYetVisible`] if that takes too long; [`Error::Unavailable`].
    async fn reach(&self, token: ConsistencyToken) -> Result<()>;

    /// What keeps lists from becoming fresher, in words for an operator; `None` when nothing does.
    async fn trouble(&self) -> Option<String>;
}

/// Lists that are read where sessions are written.
#[derive(Clone, Copy, Debug)]
pub struct AlwaysFresh;

#[async_trait]
impl Freshness for AlwaysFresh {
    fn epoch(&self) -> Option<u8> {
        None
    }

    async fn mark(&self, epoch: u8) -> Result<ConsistencyToken> {
        Ok(ConsistencyToken { epoch, lsn: 0 })
    }

    async fn reach(&self, _: ConsistencyToken) -> Result<()> {
        Ok(())
    }

    async fn trouble(&self) -> Option<String> {
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn tokens_come_back_unchanged(epoch in any::<u8>(), lsn in any::<u64>()) {
            let token = ConsistencyToken { epoch, lsn };
            prop_assert_eq!(ConsistencyToken::decode("token", &token.encode()).expect("decodes"), token);
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in ".{0,40}") {
            let _ = ConsistencyToken::decode("token", &text);
        }
    }

    #[test]
    fn foreign_text_is_no_token() {
        for text in ["", "AQ", "AQE", "!!", &"A".repeat(100)] {
            assert!(ConsistencyToken::decode("token", text).is_err(), "{text}");
        }
    }
}
