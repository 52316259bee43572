//! The messages of `pgoutput`, protocol version 1, values as text.
//!
//! Source: PostgreSQL documentation, "Logical Replication Message Formats". `Begin`, `Commit` and messages of the log are
//! told apart by the transport already.

use std::collections::HashMap;

use super::convert::{COLUMNS, Columns, LARGE, Text};

/// Bytes that are no message, or a table that is not ours.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("cannot read the replication stream: {0}")]
pub(super) struct DecodeError(pub(super) &'static str);

type Result<T> = std::result::Result<T, DecodeError>;

/// A change of one session.
#[derive(Debug, PartialEq)]
pub(super) enum Change {
    /// A new version. `moved` is the key that it had before, if that has changed.
    Upsert {
        /// The row.
        new: Box<Columns>,
        /// Where it was.
        moved: Option<Key>,
    },
    /// It is gone.
    Delete(Key),
    /// Every row is gone.
    Truncate,
    /// Nothing that changes a session.
    Nothing,
}

/// What the replica identity tells of a row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// Session.
    pub(super) id: String,
    /// Its environment.
    pub(super) environment_id: String,
    /// Unix milliseconds.
    pub(super) created_at: i64,
}

impl Key {
    pub(super) fn of(columns: &Columns) -> Result<Self> {
        Ok(Self {
            id: columns.id().to_owned(),
            environment_id: columns.environment_id().to_owned(),
            created_at: columns.created_at().map_err(|_| DecodeError("a row without a creation time"))?,
        })
    }
}

/// Where each of [`COLUMNS`] stands in the tuples of a relation.
#[derive(Debug, PartialEq, Eq)]
struct Relation {
    places: [usize; COLUMNS.len()],
    width: usize,
}

/// Reads messages; remembers what relations look like, which each connection is told before it is told of their rows.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// `None` for a table that is not ours.
    relations: HashMap<u32, Option<Relation>>,
}

impl Decoder {
    /// Reads one message.
    pub(super) fn change(&mut self, message: &[u8]) -> Result<Change> {
        let mut bytes = Bytes(message);
        match bytes.u8()? {
            b'R' => {
                let (id, relation) = relation(&mut bytes)?;
                self.relations.insert(id, relation);
                Ok(Change::Nothing)
            }
            b'I' => {
                let Some(relation) = self.relation(&mut bytes)? else { return Ok(Change::Nothing) };
                bytes.expect(b'N')?;
                Ok(Change::Upsert { new: Box::new(whole(tuple(&mut bytes, relation)?)?), moved: None })
            }
            b'U' => self.update(&mut bytes),
            b'D' => {
                let Some(relation) = self.relation(&mut bytes)? else { return Ok(Change::Nothing) };
                bytes.one_of(b"KO")?;
                Ok(Change::Delete(Key::of(&tuple(&mut bytes, relation)?)?))
            }
            b'T' => {
                let count = bytes.u32()?;
                bytes.u8()?;
                let mut ours = false;
                for _ in 0..count {
                    ours |= matches!(self.relations.get(&bytes.u32()?), Some(Some(_)));
                }
                Ok(if ours { Change::Truncate } else { Change::Nothing })
            }
            // Origins and types.
            b'O' | b'Y' => Ok(Change::Nothing),
            _ => Err(DecodeError("an unknown message")),
        }
    }

    fn update(&self, bytes: &mut Bytes<'_>) -> Result<Change> {
        let Some(relation) = self.relation(bytes)? else { return Ok(Change::Nothing) };
        let kind = bytes.one_of(b"KON")?;
        if kind == b'N' {
            return Ok(Change::Upsert { new: Box::new(whole(tuple(bytes, relation)?)?), moved: None });
        }
        let old = tuple(bytes, relation)?;
        bytes.expect(b'N')?;
        let mut new = whole(tuple(bytes, relation)?)?;
        // A key holds NULL in the place of everything else, which tells nothing.
        if kind == b'O' {
            new.complete_from(&old);
        }
        let key = Key::of(&old)?;
        let moved = (key != Key::of(&new)?).then_some(key);
        Ok(Change::Upsert { new: Box::new(new), moved })
    }

    fn relation(&self, bytes: &mut Bytes<'_>) -> Result<Option<&Relation>> {
        let known = self.relations.get(&bytes.u32()?);
        Ok(known.ok_or(DecodeError("a row of a relation that was not introduced"))?.as_ref())
    }
}

fn relation(bytes: &mut Bytes<'_>) -> Result<(u32, Option<Relation>)> {
    let id = bytes.u32()?;
    let _namespace = bytes.name()?;
    let name = bytes.name()?;
    bytes.u8()?;
    let width = usize::from(bytes.u16()?);
    let mut places = [usize::MAX; COLUMNS.len()];
    for place in 0..width {
        bytes.u8()?;
        let column = bytes.name()?;
        bytes.u32()?;
        bytes.u32()?;
        if let Some(at) = COLUMNS.iter().position(|known| known.as_bytes() == column) {
            places[at] = place;
        }
    }
    if name != b"sessions" {
        return Ok((id, None));
    }
    if places.contains(&usize::MAX) {
        return Err(DecodeError("the table sessions lacks a column"));
    }
    Ok((id, Some(Relation { places, width })))
}

enum Value {
    Null,
    Unchanged,
    Text(String),
}

fn tuple(bytes: &mut Bytes<'_>, relation: &Relation) -> Result<Columns> {
    if usize::from(bytes.u16()?) != relation.width {
        return Err(DecodeError("a row of another width than its relation"));
    }
    let mut values: Vec<Value> = Vec::with_capacity(relation.width);
    for _ in 0..relation.width {
        values.push(match bytes.u8()? {
            b'n' => Value::Null,
            b'u' => Value::Unchanged,
            b't' => Value::Text(bytes.text()?),
            _ => return Err(DecodeError("a value of an unknown kind")),
        });
    }
    let mut take = |at: usize| -> Option<Text> {
        match std::mem::replace(&mut values[relation.places[at]], Value::Null) {
            Value::Null => Some(None),
            Value::Unchanged => None,
            Value::Text(text) => Some(Some(text)),
        }
    };
    let small = std::array::from_fn(|at| take(at).flatten());
    let large = std::array::from_fn(|at| take(COLUMNS.len() - LARGE + at));
    Ok(Columns { small, large })
}

/// A row, in contrast to the key of one, names its session and environment.
fn whole(columns: Columns) -> Result<Columns> {
    if columns.id().is_empty() || columns.environment_id().is_empty() {
        return Err(DecodeError("a row without an id"));
    }
    Ok(columns)
}

/// What is left of a message.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (head, rest) =
            self.0.split_at_checked(len).ok_or(DecodeError("a message that ends too early"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) =
            self.0.split_first_chunk::<N>().ok_or(DecodeError("a message that ends too early"))?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// Ends with a zero byte.
    fn name(&mut self) -> Result<&'a [u8]> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(DecodeError("a name without an end"))?;
        let name = self.take(end)?;
        self.u8()?;
        Ok(name)
    }

    fn text(&mut self) -> Result<String> {
        let len = usize::try_from(self.u32()?).map_err(|_| DecodeError("a value that is too long"))?;
        let bytes = self.take(len)?.to_vec();
        String::from_utf8(bytes).map_err(|_| DecodeError("text that is not UTF-8"))
    }

    fn expect(&mut self, byte: u8) -> Result<()> {
        self.one_of(&[byte]).map(drop)
    }

    fn one_of(&mut self, wanted: &[u8]) -> Result<u8> {
        let byte = self.u8()?;
        wanted.contains(&byte).then_some(byte).ok_or(DecodeError("an unknown kind of row"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn introduced() -> Vec<u8> {
        let mut message = vec![b'R', 0, 0, 0, 9];
        message.extend(b"public\0sessions\0i");
        let names: Vec<&str> = ["lapsed"].into_iter().chain(COLUMNS).collect();
        message.extend((names.len() as u16).to_be_bytes());
        for name in names {
            message.push(0);
            message.extend(name.as_bytes());
            message.extend([0; 9]);
        }
        message
    }

    fn decoder() -> Decoder {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.change(&introduced()), Ok(Change::Nothing));
        decoder
    }

    /// A tuple whose every column holds its own name, but for numbers and what is said otherwise.
    fn values(metadata: &[u8]) -> Vec<u8> {
        let mut tuple = ((COLUMNS.len() + 1) as u16).to_be_bytes().to_vec();
        tuple.push(b'n');
        for column in COLUMNS {
            match column {
                "metadata" => tuple.extend(metadata),
                "created_at" | "updated_at" => tuple.extend(b"t\0\0\0\x0242"),
                _ => {
                    tuple.push(b't');
                    tuple.extend((column.len() as u32).to_be_bytes());
                    tuple.extend(column.as_bytes());
                }
            }
        }
        tuple
    }

    fn message(head: &[u8], tuples: &[(u8, Vec<u8>)]) -> Vec<u8> {
        let mut message = head.to_vec();
        message.extend([0, 0, 0, 9]);
        for (kind, tuple) in tuples {
            message.push(*kind);
            message.extend(tuple);
        }
        message
    }

    #[test]
    fn columns_are_found_by_name() {
        let change = decoder().change(&message(b"I", &[(b'N', values(b"t\0\0\0\x02{}"))]));
        let Ok(Change::Upsert { new, moved: None }) = change else { panic!("{change:?}") };
        assert_eq!(
            (new.id(), new.environment_id(), new.created_at().expect("a number")),
            ("id", "environment_id", 42)
        );
        assert_eq!(new.large[1], Some(Some("{}".to_owned())));
    }

    #[test]
    fn what_has_not_changed_is_missing_unless_the_old_row_tells() {
        let change = decoder().change(&message(b"U", &[(b'N', values(b"u"))]));
        let Ok(Change::Upsert { new, moved: None }) = change else { panic!("{change:?}") };
        assert!(new.is_partial());
        let both = [(b'O', values(b"t\0\0\0\x02{}")), (b'N', values(b"u"))];
        let Ok(Change::Upsert { new, moved: None }) = decoder().change(&message(b"U", &both)) else {
            panic!("an update")
        };
        assert!(!new.is_partial());
        let key = [(b'K', values(b"n")), (b'N', values(b"u"))];
        let Ok(Change::Upsert { new, moved: None }) = decoder().change(&message(b"U", &key)) else {
            panic!("an update")
        };
        assert!(new.is_partial(), "a key tells nothing of it");
    }

    #[test]
    fn a_row_of_an_unknown_relation_is_refused_and_one_of_another_table_passed_over() {
        assert!(Decoder::default().change(&message(b"I", &[(b'N', values(b"n"))])).is_err());
        let mut decoder = Decoder::default();
        let mut other = vec![b'R', 0, 0, 0, 9];
        other.extend(b"public\0keys\0d\0\0");
        assert_eq!(decoder.change(&other), Ok(Change::Nothing));
        assert_eq!(decoder.change(&message(b"I", &[(b'N', vec![0, 0])])), Ok(Change::Nothing));
    }

    #[test]
    fn truncate_is_told() {
        assert_eq!(decoder().change(&[b'T', 0, 0, 0, 1, 0, 0, 0, 0, 9]), Ok(Change::Truncate));
        assert_eq!(decoder().change(&[b'T', 0, 0, 0, 1, 0, 0, 0, 0, 8]), Ok(Change::Nothing));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decoder().change(&bytes);
            let _ = Decoder::default().change(&bytes);
        }

        #[test]
        fn no_cut_or_flip_makes_the_decoder_panic(cut in 0usize..600, at in 0usize..600, bit in 0u8..8) {
            for mut whole in [introduced(), message(b"U", &[(b'K', values(b"n")), (b'N', values(b"u"))])] {
                whole.truncate(cut);
                if let Some(byte) = whole.get_mut(at) {
                    *byte ^= 1 << bit;
                }
                let _ = decoder().change(&whole);
            }
        }
    }
}
