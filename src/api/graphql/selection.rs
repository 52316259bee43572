//! Writes the events of a channel as JSON, straight from the records, as far as a subscriber has selected them.
//!
//! The executor builds a tree of boxed futures and values for every event of every subscriber, which costs ten times
//! what the bytes do. The fields of an event need nothing but the event, so the selection is read once, when the
//! subscription begins, and its text is a key: a batch that many subscribers get is written once for all that have the
//! same one. Nothing of it depends on who asks, so sharing cannot show anybody what is not theirs.

use std::fmt::Write;
use std::sync::Arc;

use async_graphql::SelectionField;
use bytes::Bytes;

use super::events::{Content, Event};
use super::payload::{self, Payload};
use super::schema::{GlobalId, SessionStatus};
use crate::domain::{ChannelKey, Position, Record, Status, Timestamp, envelope};

/// Room for what is written around a body.
const FRAME: usize = 64;

/// The selected fields of one object.
#[derive(Debug)]
struct Fields<F>(Vec<(String, F)>);

/// A field of an object type whose values can be written without the executor.
trait Field: Sized {
    const TYPE: &'static str;

    /// The field of this name with what is selected below it; `None` if it needs the executor.
    fn of(name: &str, below: &[SelectionField<'_>]) -> Option<Self>;

    /// What is selected below, for the key.
    fn key(&self, into: &mut String);
}

macro_rules! leaves {
    ($name:ident of $type:literal { $($field:ident = $wire:literal),+ $(,)? }) => {
        #[derive(Clone, Copy, Debug)]
        enum $name {
            Typename,
            $($field),+
        }

        impl Field for $name {
            const TYPE: &'static str = $type;

            fn of(name: &str, _: &[SelectionField<'_>]) -> Option<Self> {
                match name {
                    "__typename" => Some(Self::Typename),
                    $($wire => Some(Self::$field),)+
                    _ => None,
                }
            }

            fn key(&self, into: &mut String) {
                let _ = write!(into, "{self:?}");
            }
        }
    };
}

leaves!(PositionField of "Position" { SeqNum = "seqNum", Timestamp = "timestamp" });
leaves!(ClosedField of "ChannelClosed" { At = "at", Reason = "reason", Status = "status" });
leaves!(HeaderField of "Header" { Name = "name", Value = "value" });

#[derive(Debug)]
enum RecordField {
    Typename,
    Id,
    SeqNum,
    Cursor,
    Timestamp,
    Data,
    Text,
    Headers(Fields<HeaderField>),
    Control,
    PartId,
}

impl Field for RecordField {
    const TYPE: &'static str = "Record";

    fn of(name: &str, below: &[SelectionField<'_>]) -> Option<Self> {
        Some(match name {
            "__typename" => Self::Typename,
            "id" => Self::Id,
            "seqNum" => Self::SeqNum,
            "cursor" => Self::Cursor,
            "timestamp" => Self::Timestamp,
            "data" => Self::Data,
            "text" => Self::Text,
            "headers" => Self::Headers(Fields::of(below)?),
            "control" => Self::Control,
            "partId" => Self::PartId,
            _ => return None,
        })
    }

    fn key(&self, into: &mut String) {
        match self {
            Self::Headers(fields) => fields.key("Headers", into),
            other => {
                let _ = write!(into, "{other:?}");
            }
        }
    }
}

#[derive(Debug)]
enum EventField {
    Typename,
    Records(Fields<RecordField>),
    EndCursor,
    CaughtUp,
    Tail(Fields<PositionField>),
    Closed(Fields<ClosedField>),
}

impl Field for EventField {
    const TYPE: &'static str = "ChannelEvent";

    fn of(name: &str, below: &[SelectionField<'_>]) -> Option<Self> {
        Some(match name {
            "__typename" => Self::Typename,
            "records" => Self::Records(Fields::of(below)?),
            "endCursor" => Self::EndCursor,
            "caughtUp" => Self::CaughtUp,
            "tail" => Self::Tail(Fields::of(below)?),
            "closed" => Self::Closed(Fields::of(below)?),
            _ => return None,
        })
    }

    fn key(&self, into: &mut String) {
        match self {
            Self::Records(fields) => fields.key("Records", into),
            Self::Tail(fields) => fields.key("Tail", into),
            Self::Closed(fields) => fields.key("Closed", into),
            other => {
                let _ = write!(into, "{other:?}");
            }
        }
    }
}

impl<F: Field> Fields<F> {
    /// What these fields select below them. Several fields of one response name are one field.
    fn of(parents: &[SelectionField<'_>]) -> Option<Self> {
        let mut groups: Vec<(&str, Vec<SelectionField<'_>>)> = Vec::new();
        for field in parents.iter().flat_map(SelectionField::selection_set) {
            let name = field.alias().unwrap_or(field.name());
            match groups.iter_mut().find(|(known, _)| *known == name) {
                Some((_, group)) => group.push(field),
                None => groups.push((name, vec![field])),
            }
        }
        let field = |(name, group): (&str, Vec<SelectionField<'_>>)| {
            Some((name.to_owned(), F::of(group.first()?.name(), &group)?))
        };
        groups.into_iter().map(field).collect::<Option<_>>().map(Self)
    }

    fn key(&self, name: &str, into: &mut String) {
        let _ = write!(into, "{name}{{");
        for (alias, field) in &self.0 {
            let _ = write!(into, "{alias}:");
            field.key(into);
            into.push(' ');
        }
        into.push('}');
    }

    /// An object of these fields.
    fn write(&self, out: &mut String, mut value: impl FnMut(&F, &mut String)) {
        out.push('{');
        for (index, (name, field)) in self.0.iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            // A name of GraphQL needs no escape.
            let _ = write!(out, "\"{name}\":");
            value(field, out);
        }
        out.push('}');
    }
}

/// What a subscriber wants to see of each event.
#[derive(Debug)]
pub(super) struct Selection {
    /// What comes before the event in a result.
    head: String,
    fields: Fields<EventField>,
    /// Equal for equal fields.
    key: Arc<str>,
}

impl Selection {
    /// What `root`, the field `channelRecords`, selects; `None` if it needs the executor.
    pub fn of(root: &SelectionField<'_>) -> Option<Self> {
        let fields = Fields::of(std::slice::from_ref(root))?;
        let mut key = String::from("graphql ");
        fields.key("", &mut key);
        let head = format!("{{\"data\":{{\"{}\":", root.alias().unwrap_or(root.name()));
        Some(Self { head, fields, key: key.into() })
    }

    /// The execution result of an event.
    pub fn result(&self, event: &Event) -> String {
        let mut out = String::new();
        match &event.content {
            Content::Records { batch, part, .. } if part.len() == batch.records.len() => {
                let shared = batch.batch().selected(&self.key, |_| {
                    let mut text = String::new();
                    self.write(&mut text, event);
                    Bytes::from(text)
                });
                let shared = std::str::from_utf8(&shared).unwrap_or("null");
                out.reserve_exact(self.head.len() + shared.len() + 2);
                out.push_str(&self.head);
                out.push_str(shared);
            }
            _ => {
                out.reserve(event.records().map(|record| record.body.len() + FRAME).sum::<usize>() + FRAME);
                out.push_str(&self.head);
                self.write(&mut out, event);
            }
        }
        out.push_str("}}");
        out
    }

    fn write(&self, out: &mut String, event: &Event) {
        self.fields.write(out, |field, out| match field {
            EventField::Typename => text(out, EventField::TYPE),
            EventField::Records(fields) => list(out, event.records(), |record, out| {
                write_record(fields, out, record, event.channel.as_deref());
            }),
            EventField::EndCursor => match event.last {
                Some(last) => number(out, last),
                None => out.push_str("null"),
            },
            EventField::CaughtUp => out.push_str(if event.is_caught_up() { "true" } else { "false" }),
            EventField::Tail(fields) => write_position(fields, out, event.tail),
            EventField::Closed(fields) => match &event.content {
                Content::Closed { at, reason, status } => {
                    write_closed(fields, out, *at, reason.as_deref(), *status);
                }
                Content::Records { .. } | Content::CaughtUp => out.push_str("null"),
            },
        });
    }
}

fn write_record(
    fields: &Fields<RecordField>,
    out: &mut String,
    record: &Record,
    channel: Option<&ChannelKey>,
) {
    let mut opened = None;
    fields.write(out, |field, out| match field {
        RecordField::Typename => text(out, RecordField::TYPE),
        RecordField::Id => match channel {
            Some(key) => text(out, &GlobalId::Record(key.clone(), record.position.seq_num).encode()),
            None => out.push_str("null"),
        },
        RecordField::SeqNum | RecordField::Cursor => number(out, record.position.seq_num),
        RecordField::Timestamp => moment(out, record.position.timestamp),
        RecordField::Data => match opened.get_or_insert_with(|| Payload::of(record)) {
            Some(payload) => out.push_str(&payload.json()),
            None => out.push_str("null"),
        },
        RecordField::Text => match opened.get_or_insert_with(|| Payload::of(record)) {
            Some(payload) => text(out, &payload.text()),
            None => optional(out, payload::bare_text(record)),
        },
        RecordField::Headers(fields) => list(out, record.headers.iter(), |(name, value), out| {
            fields.write(out, |field, out| match field {
                HeaderField::Typename => text(out, HeaderField::TYPE),
                HeaderField::Name => text(out, &String::from_utf8_lossy(name)),
                HeaderField::Value => text(out, &String::from_utf8_lossy(value)),
            });
        }),
        RecordField::Control => optional(out, envelope::control(&record.headers)),
        RecordField::PartId => {
            optional(out, opened.get_or_insert_with(|| Payload::of(record)).as_ref().map(Payload::part_id));
        }
    });
}

fn write_position(fields: &Fields<PositionField>, out: &mut String, position: Position) {
    fields.write(out, |field, out| match field {
        PositionField::Typename => text(out, PositionField::TYPE),
        PositionField::SeqNum => number(out, position.seq_num),
        PositionField::Timestamp if position.seq_num == 0 => out.push_str("null"),
        PositionField::Timestamp => moment(out, position.timestamp),
    });
}

fn write_closed(
    fields: &Fields<ClosedField>,
    out: &mut String,
    at: Timestamp,
    reason: Option<&str>,
    status: SessionStatus,
) {
    fields.write(out, |field, out| match field {
        ClosedField::Typename => text(out, ClosedField::TYPE),
        ClosedField::At => moment(out, at),
        ClosedField::Reason => optional(out, reason),
        ClosedField::Status => text(out, Status::from(status).as_str()),
    });
}

fn list<T>(out: &mut String, items: impl Iterator<Item = T>, mut write: impl FnMut(T, &mut String)) {
    out.push('[');
    for (index, item) in items.enumerate() {
        if index > 0 {
            out.push(',');
        }
        write(item, out);
    }
    out.push(']');
}

/// A string, escaped.
fn text(out: &mut String, text: &str) {
    let clean = !text.bytes().any(|b| matches!(b, 0..=0x1f | b'"' | b'\\'));
    if clean {
        out.push('"');
        out.push_str(text);
        out.push('"');
    } else {
        out.push_str(&serde_json::Value::from(text).to_string());
    }
}

fn optional(out: &mut String, value: Option<&str>) {
    match value {
        Some(value) => text(out, value),
        None => out.push_str("null"),
    }
}

/// 64 bits, as a string of digits.
fn number(out: &mut String, number: u64) {
    let _ = write!(out, "\"{number}\"");
}

fn moment(out: &mut String, at: Timestamp) {
    let _ = write!(out, "\"{at}\"");
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_graphql::{Context, EmptyMutation, EmptySubscription, Object, Schema, Value};

    use super::*;
    use crate::api::graphql::schema::{ChannelEvent, Node};
    use crate::domain::{Delivery, Direction, RecordBatch, SendBudget, SessionId};

    /// Answers `channelRecords` through the executor and notes what the selection writes.
    struct Both {
        event: fn() -> Event,
        written: Arc<Mutex<String>>,
    }

    #[Object]
    impl Both {
        async fn channel_records(&self, ctx: &Context<'_>) -> ChannelEvent {
            let selection = Selection::of(&ctx.field()).expect("every field can be written");
            *self.written.lock().expect("not poisoned") = selection.result(&(self.event)());
            (self.event)().into_object()
        }
    }

    fn key() -> Option<Arc<ChannelKey>> {
        Some(Arc::new(ChannelKey::main(SessionId::from_stored("session_a"), Direction::Out)))
    }

    fn batch() -> RecordBatch {
        let bodies: [&'static [u8]; 7] = [
            br#"{"data":"hi \"there\"\n","id":"p0"}"#,
            br#"{"data":"{\"a\":[1,2.5,null]}","id":"p1"}"#,
            br#"{"data":{"b":"\u00e4"},"id":"p2"}"#,
            b"",
            b"plain",
            b"\xff\xfe",
            b"12345678",
        ];
        let headers: [&[(&'static [u8], &'static [u8])]; 7] = [
            &[],
            &[(b"a", b"b"), (b"a", b"\xff")],
            &[],
            &[(b"trigger-control", b"turn-complete")],
            &[],
            &[],
            &[(b"", b"trim")],
        ];
        let records = bodies.into_iter().zip(headers).zip(3..).map(|((body, headers), seq_num)| Record {
            position: Position { seq_num, timestamp: Timestamp::from_millis(1_767_225_600_000) },
            headers: headers.iter().map(|(n, v)| (Bytes::from_static(n), Bytes::from_static(v))).collect(),
            body: Bytes::from_static(body),
            metered_end: 0,
        });
        let tail = Position { seq_num: 10, timestamp: Timestamp::from_millis(1_767_225_600_000) };
        RecordBatch::new(records.collect(), Some(tail))
    }

    fn delivery() -> Delivery {
        let budget = SendBudget::new(0, 1).connection();
        Delivery::new(Arc::new(batch()), budget.try_reserve(1).expect("room"))
    }

    fn whole() -> Event {
        let content = Content::Records { batch: delivery(), part: 0..7, caught_up: true };
        Event { channel: key(), content, last: Some(9), tail: batch().tail.unwrap_or_default() }
    }

    fn part() -> Event {
        let content = Content::Records { batch: delivery(), part: 1..3, caught_up: false };
        Event { content, last: Some(5), ..whole() }
    }

    fn nothing_yet() -> Event {
        Event { channel: key(), content: Content::CaughtUp, last: None, tail: Position::default() }
    }

    fn closed() -> Event {
        let at = Timestamp::from_millis(1_767_225_600_000);
        let content =
            Content::Closed { at, reason: Some("d\u{e4}ne".to_owned()), status: SessionStatus::Closed };
        Event { content, ..whole() }
    }

    /// Every field of a type and of the types below it.
    fn everything(schema: &str, name: &str) -> String {
        let types: Value = serde_json::from_str(schema).expect("JSON");
        let types = types.into_json().expect("JSON");
        fn of(types: &serde_json::Value, name: &str) -> String {
            let list = types["__schema"]["types"].as_array().expect("types");
            let found = list.iter().find(|known| known["name"] == name).expect("the type");
            let fields = found["fields"].as_array().into_iter().flatten().map(|field| {
                let mut kind = &field["type"];
                while kind["ofType"].is_object() {
                    kind = &kind["ofType"];
                }
                let name = field["name"].as_str().expect("a name");
                match kind["kind"].as_str() {
                    Some("OBJECT") => {
                        format!("{name} {{{}}}", of(types, kind["name"].as_str().expect("a name")))
                    }
                    _ => name.to_owned(),
                }
            });
            fields.chain(["__typename".to_owned()]).collect::<Vec<_>>().join(" ")
        }
        of(&types, name)
    }

    #[tokio::test]
    async fn every_field_is_written_as_the_executor_resolves_it() {
        const INTROSPECTION: &str =
            "{__schema{types{name fields{name type{kind name ofType{kind name ofType{kind name
            ofType{kind name}}}}}}}}";
        for event in [whole, part, nothing_yet, closed] {
            let written = Arc::<Mutex<String>>::default();
            let both = Both { event, written: written.clone() };
            let schema = Schema::build(both, EmptyMutation, EmptySubscription);
            let schema = schema.register_output_type::<Node>().finish();
            let types = schema.execute(INTROSPECTION).await;
            let all = everything(&types.data.into_json().expect("JSON").to_string(), "ChannelEvent");
            assert!(all.contains("headers {name value __typename}"), "{all}");
            for query in [
                format!("{{ channelRecords {{ {all} }} }}"),
                format!("{{ it: channelRecords {{ ...F x: endCursor records {{ seqNum }} records {{ n: seqNum }} }} }} fragment F on ChannelEvent {{ {all} }}"),
                "{ channelRecords { ... on ChannelEvent { records { ... on Node { id } } } tail @skip(if: true) { seqNum } } }".to_owned(),
            ] {
                let response = schema.execute(query.as_str()).await;
                assert!(response.errors.is_empty(), "{query}: {:?}", response.errors);
                let executed = serde_json::to_value(&response).expect("JSON");
                let written: serde_json::Value =
                    serde_json::from_str(&written.lock().expect("not poisoned")).expect("the selection writes JSON");
                assert_eq!(written, executed, "{query}");
            }
        }
    }

    #[tokio::test]
    async fn equal_selections_have_equal_keys_and_share_a_batch() {
        struct Keys(Arc<Mutex<Vec<Arc<str>>>>);

        #[Object]
        impl Keys {
            async fn channel_records(&self, ctx: &Context<'_>) -> ChannelEvent {
                let selection = Selection::of(&ctx.field()).expect("every field can be written");
                self.0.lock().expect("not poisoned").push(selection.key);
                nothing_yet().into_object()
            }
        }

        let keys = Arc::<Mutex<Vec<Arc<str>>>>::default();
        let schema = Schema::new(Keys(keys.clone()), EmptyMutation, EmptySubscription);
        for query in [
            "{ channelRecords { records { seqNum } endCursor } }",
            "{ a: channelRecords { ...F } } fragment F on ChannelEvent { records { seqNum } endCursor }",
            "{ channelRecords { records { s: seqNum } endCursor } }",
            "{ channelRecords { endCursor records { seqNum } } }",
        ] {
            assert!(schema.execute(query).await.errors.is_empty(), "{query}");
        }
        let keys = keys.lock().expect("not poisoned");
        assert_eq!(keys[0], keys[1]);
        assert!(keys[2] != keys[0] && keys[3] != keys[0] && keys[2] != keys[3]);
    }
}
