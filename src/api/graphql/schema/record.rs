//! Records as the schema shows them.

use std::borrow::Cow;
use std::sync::Arc;

use async_graphql::{ComplexObject, Enum, ID, Object, SimpleObject, Value};

use super::global_id::GlobalId;
use super::page::PageInfo;
use super::scalar::{Cursor, DateTime, Json, UInt64};
use crate::api::graphql::payload::{self, Payload};
use crate::domain::envelope;
use crate::domain::{ChannelKey, Direction, Position, Record};

/// Who writes a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[graphql(name = "ChannelIO")]
pub enum ChannelIo {
    /// From clients to the agent. Public tokens with write access may append.
    In,
    /// From the agent to clients. Only secret keys may append.
    Out,
}

impl From<ChannelIo> for Direction {
    fn from(io: ChannelIo) -> Self {
        match io {
            ChannelIo::In => Self::In,
            ChannelIo::Out => Self::Out,
        }
    }
}

impl From<Direction> for ChannelIo {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::In => Self::In,
            Direction::Out => Self::Out,
        }
    }
}

/// A place in a channel.
#[derive(Clone, Copy, Debug, SimpleObject)]
#[graphql(name = "Position")]
pub struct PositionNode {
    /// Sequence number, from 0, without gaps.
    seq_num: UInt64,
    /// Time of the record before this place; null when there never was one.
    timestamp: Option<DateTime>,
}

impl From<Position> for PositionNode {
    fn from(position: Position) -> Self {
        let timestamp = (position.seq_num > 0).then_some(DateTime(position.timestamp));
        Self { seq_num: UInt64(position.seq_num), timestamp }
    }
}

/// A name and a value that a writer gave a record.
#[derive(Clone, Debug, SimpleObject)]
#[graphql(name = "Header")]
pub struct HeaderNode {
    /// Name; need not be unique. Bytes that are not UTF-8 are shown as U+FFFD.
    name: String,
    /// Value, likewise.
    value: String,
}

/// One entry of a channel; never changes.
#[derive(Clone, Debug)]
pub struct RecordNode {
    pub(in crate::api::graphql) channel: Arc<ChannelKey>,
    pub(in crate::api::graphql) record: Record,
}

/// One entry of a channel; never changes.
#[Object(name = "Record")]
impl RecordNode {
    /// Opaque; for `node` and `nodes`.
    pub async fn id(&self) -> ID {
        GlobalId::Record(ChannelKey::clone(&self.channel), self.record.position.seq_num).encode()
    }

    /// Place in the channel: from 0, without gaps, in the order of the acknowledged appends.
    async fn seq_num(&self) -> UInt64 {
        UInt64(self.record.position.seq_num)
    }

    /// To go on after this record, here, in REST or with server-sent events.
    async fn cursor(&self) -> Cursor {
        Cursor(self.record.position.seq_num)
    }

    /// When it was appended; never earlier than the record before it.
    async fn timestamp(&self) -> DateTime {
        DateTime(self.record.position.timestamp)
    }

    /// The payload. A text that is a JSON object or array is shown as that value, any other text as a string. Null
    /// for control records and for bodies that are not in the envelope of this product.
    async fn data(&self) -> Option<Json> {
        let payload = Payload::of(&self.record)?;
        serde_json::from_str::<Value>(&payload.json()).ok().map(Json)
    }

    /// The payload as it was written: the text itself, or the JSON text of a value; a body in no envelope as it is.
    /// Null for control records and for bytes that are not UTF-8.
    async fn text(&self) -> Option<Cow<'_, str>> {
        match Payload::of(&self.record) {
            Some(payload) => Some(payload.text()),
            None => payload::bare_text(&self.record).map(Cow::Borrowed),
        }
    }

    /// Headers, in the order in which the writer gave them.
    async fn headers(&self) -> Vec<HeaderNode> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        self.record
            .headers
            .iter()
            .map(|(name, value)| HeaderNode { name: text(name), value: text(value) })
            .collect()
    }

    /// Subtype of a control record, such as `turn-complete`; null for data records.
    async fn control(&self) -> Option<&str> {
        envelope::control(&self.record.headers)
    }

    /// The writer's own id of the payload (`idempotencyKey` or `X-Part-Id`), or one that the server made; null for
    /// control records.
    async fn part_id(&self) -> Option<String> {
        Payload::of(&self.record).map(|payload| payload.part_id().to_owned())
    }
}

/// A page of records, in channel order.
#[derive(Clone, Debug, SimpleObject)]
#[graphql(complex)]
pub struct RecordConnection {
    #[graphql(skip)]
    pub(super) nodes_: Vec<RecordNode>,
    /// Where the neighbouring pages are.
    pub(super) page_info: PageInfo,
}

#[ComplexObject]
impl RecordConnection {
    /// The records with their cursors.
    async fn edges(&self) -> Vec<RecordEdge> {
        self.nodes_.iter().map(|node| RecordEdge { cursor: cursor(node), node: node.clone() }).collect()
    }

    /// The records.
    async fn nodes(&self) -> &[RecordNode] {
        &self.nodes_
    }
}

/// A record of a page.
#[derive(Clone, Debug, SimpleObject)]
pub struct RecordEdge {
    /// For `after` and `before`.
    cursor: String,
    /// The record.
    node: RecordNode,
}

/// Text of the cursor of a record, for connections.
pub(super) fn cursor(node: &RecordNode) -> String {
    Cursor(node.record.position.seq_num).to_string()
}
