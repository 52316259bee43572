//! Messages of `pgoutput`, protocol version 1, with values as text.
//!
//! Source: PostgreSQL documentation, "Logical Replication Message Formats". The transport tells begin, commit and messages of
//! the log apart by itself; all others come here.

use std::collections::HashMap;

use bytes::{Buf, Bytes};

/// A value of a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Column {
    /// SQL's NULL.
    Null,
    /// Stored out of line and not changed: the stream does not repeat it.
    Unchanged,
    /// What it is as text, as UTF-8.
    Text(Bytes),
}

/// The values of the columns that a [`Decoder`] was asked for, in that order.
pub type Tuple = Vec<Column>;

/// What has happened to the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new row.
    Insert(Tuple),
    /// A row has changed.
    Update {
        /// What it was, if the stream tells: its key when that has changed, or all of it under `REPLICA IDENTITY FULL`.
        old: Option<Old>,
        /// What it is.
        new: Tuple,
    },
    /// A row is gone.
    Delete(Old),
    /// All rows are gone.
    Truncate,
    /// Nothing that concerns the table.
    Nothing,
}

/// A row before a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Old {
    /// The columns of the replica identity; every other one is [`Column::Null`], which says nothing about it.
    Key(Tuple),
    /// The whole row.
    Full(Tuple),
}

impl Old {
    /// The values, of which those of the replica identity can be relied on.
    pub fn tuple(&self) -> &Tuple {
        match self {
            Self::Key(tuple) | Self::Full(tuple) => tuple,
        }
    }
}

/// Why a message cannot be read: it is cut off or of a kind that protocol version 1 does not have, or the table is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot read the replication stream: {0}")]
pub struct DecodeError(pub &'static str);

type Result<T> = std::result::Result<T, DecodeError>;

/// Reads the messages of one connection, which introduces every table before it tells of its rows.
#[derive(Debug)]
pub struct Decoder {
    table: &'static str,
    columns: &'static [&'static str],
    /// `None` for a table that nobody asked for.
    relations: HashMap<u32, Option<Layout>>,
}

/// Where each of the wanted columns stands in the tuples of a relation.
#[derive(Debug)]
struct Layout {
    /// Positions among the wanted columns, by position in a tuple.
    wanted: Vec<Option<usize>>,
}

impl Decoder {
    /// Reads changes of `table`, and of its rows these columns.
    pub fn new(table: &'static str, columns: &'static [&'static str]) -> Self {
        Self { table, columns, relations: HashMap::new() }
    }

    /// Reads one message.
    ///
    /// # Errors
    /// [`DecodeError`]; the messages behind it can be read all the same.
    pub fn decode(&mut self, message: Bytes) -> Result<Change> {
        let mut message = Message(message);
        match message.u8()? {
            b'R' => self.introduce(&mut message),
            b'I' => match self.layout(&mut message)? {
                None => Ok(Change::Nothing),
                Some(layout) => {
                    message.expect(b'N')?;
                    Ok(Change::Insert(self.tuple(&mut message, layout)?))
                }
            },
            b'U' => match self.layout(&mut message)? {
                None => Ok(Change::Nothing),
                Some(layout) => {
                    let (mut old, mut kind) = (None, message.u8()?);
                    if kind != b'N' {
                        old = Some(self.old(kind, &mut message, layout)?);
                        kind = message.u8()?;
                    }
                    if kind != b'N' {
                        return Err(DecodeError("an update without its new row"));
                    }
                    Ok(Change::Update { old, new: self.tuple(&mut message, layout)? })
                }
            },
            b'D' => match self.layout(&mut message)? {
                None => Ok(Change::Nothing),
                Some(layout) => {
                    let kind = message.u8()?;
                    Ok(Change::Delete(self.old(kind, &mut message, layout)?))
                }
            },
            b'T' => {
                let count = message.u32()?;
                let _options = message.u8()?;
                let mut concerns = false;
                for _ in 0..count {
                    concerns |= matches!(self.relations.get(&message.u32()?), Some(Some(_)));
                }
                Ok(if concerns { Change::Truncate } else { Change::Nothing })
            }
            // Origins and types.
            b'O' | b'Y' => Ok(Change::Nothing),
            _ => Err(DecodeError("a message of an unknown kind")),
        }
    }

    fn introduce(&mut self, message: &mut Message) -> Result<Change> {
        let id = message.u32()?;
        let _namespace = message.name()?;
        let is_wanted = message.name()? == self.table.as_bytes();
        let _identity = message.u8()?;
        let width = message.u16()?;
        let mut wanted = Vec::new();
        for _ in 0..width {
            let _flags = message.u8()?;
            let name = message.name()?;
            let (_type, _modifier) = (message.u32()?, message.u32()?);
            wanted.push(self.columns.iter().position(|column| column.as_bytes() == name));
        }
        let found = wanted.iter().flatten().count();
        if is_wanted && found != self.columns.len() {
            return Err(DecodeError("the table lacks a column"));
        }
        self.relations.insert(id, is_wanted.then_some(Layout { wanted }));
        Ok(Change::Nothing)
    }

    fn layout(&self, message: &mut Message) -> Result<Option<&Layout>> {
        let known = self.relations.get(&message.u32()?);
        Ok(known.ok_or(DecodeError("a row of a table that was not introduced"))?.as_ref())
    }

    fn old(&self, kind: u8, message: &mut Message, layout: &Layout) -> Result<Old> {
        match kind {
            b'K' => Ok(Old::Key(self.tuple(message, layout)?)),
            b'O' => Ok(Old::Full(self.tuple(message, layout)?)),
            _ => Err(DecodeError("a row of an unknown kind")),
        }
    }

    fn tuple(&self, message: &mut Message, layout: &Layout) -> Result<Tuple> {
        if usize::from(message.u16()?) != layout.wanted.len() {
            return Err(DecodeError("a row that is wider or narrower than its table"));
        }
        let mut tuple = vec![Column::Null; self.columns.len()];
        for place in &layout.wanted {
            let column = match message.u8()? {
                b'n' => Column::Null,
                b'u' => Column::Unchanged,
                b't' => {
                    let length = usize::try_from(message.u32()?);
                    Column::Text(message.take(length.map_err(|_| TOO_SHORT)?)?)
                }
                _ => return Err(DecodeError("a value of an unknown kind")),
            };
            if let Some(place) = place {
                tuple[*place] = column;
            }
        }
        Ok(tuple)
    }
}

const TOO_SHORT: DecodeError = DecodeError("a message that is cut off");

/// What of a message is still to be read.
struct Message(Bytes);

impl Message {
    fn u8(&mut self) -> Result<u8> {
        self.0.try_get_u8().map_err(|_| TOO_SHORT)
    }

    fn u16(&mut self) -> Result<u16> {
        self.0.try_get_u16().map_err(|_| TOO_SHORT)
    }

    fn u32(&mut self) -> Result<u32> {
        self.0.try_get_u32().map_err(|_| TOO_SHORT)
    }

    fn take(&mut self, length: usize) -> Result<Bytes> {
        if self.0.len() < length {
            return Err(TOO_SHORT);
        }
        Ok(self.0.split_to(length))
    }

    /// Up to a zero byte, which is passed over.
    fn name(&mut self) -> Result<Bytes> {
        let length = self.0.iter().position(|byte| *byte == 0).ok_or(TOO_SHORT)?;
        let name = self.take(length)?;
        self.0.advance(1);
        Ok(name)
    }

    fn expect(&mut self, kind: u8) -> Result<()> {
        if self.u8()? == kind { Ok(()) } else { Err(DecodeError("a row of an unknown kind")) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const COLUMNS: &[&str] = &["id", "metadata", "created_at"];
    const TABLE: [u8; 4] = [0, 0, 0, 9];

    /// Introduces a table with a column that nobody asks for, and the others in an order of their own.
    fn relation(name: &str) -> Vec<u8> {
        let mut message = [&[b'R'][..], &TABLE, b"public\0", name.as_bytes(), b"\0i", &[0, 4]].concat();
        for column in ["created_at", "lapsed", "id", "metadata"] {
            message.extend([&[1][..], column.as_bytes(), &[0; 9]].concat());
        }
        message
    }

    fn text(value: &str) -> Vec<u8> {
        let length = u32::try_from(value.len()).expect("short").to_be_bytes();
        [&b"t"[..], &length, value.as_bytes()].concat()
    }

    /// A tuple of the table.
    fn values(created_at: &[u8], id: &str, metadata: &[u8]) -> Vec<u8> {
        [&[0, 4][..], created_at, b"n", &text(id), metadata].concat()
    }

    fn message(kind: u8, tuples: &[(u8, Vec<u8>)]) -> Bytes {
        let mut message = [&[kind][..], &TABLE].concat();
        for (kind, tuple) in tuples {
            message.push(*kind);
            message.extend(tuple);
        }
        message.into()
    }

    fn decoder() -> Decoder {
        let mut decoder = Decoder::new("sessions", COLUMNS);
        assert_eq!(decoder.decode(relation("sessions").into()), Ok(Change::Nothing));
        decoder
    }

    fn known(value: &'static str) -> Column {
        Column::Text(Bytes::from_static(value.as_bytes()))
    }

    #[test]
    fn columns_are_found_by_their_names() {
        let insert = message(b'I', &[(b'N', values(&text("42"), "s", &text("{}")))]);
        let row = vec![known("s"), known("{}"), known("42")];
        assert_eq!(decoder().decode(insert), Ok(Change::Insert(row)));
    }

    #[test]
    fn an_update_tells_what_has_not_changed_and_what_the_row_was() {
        let new = (b'N', values(&text("42"), "s", b"u"));
        let unchanged = vec![known("s"), Column::Unchanged, known("42")];
        let plain = decoder().decode(message(b'U', std::slice::from_ref(&new)));
        assert_eq!(plain, Ok(Change::Update { old: None, new: unchanged.clone() }));
        let key = (b'K', values(&text("41"), "s", b"n"));
        let old = Some(Old::Key(vec![known("s"), Column::Null, known("41")]));
        let moved = decoder().decode(message(b'U', &[key, new.clone()]));
        assert_eq!(moved, Ok(Change::Update { old, new: unchanged.clone() }));
        let full = (b'O', values(&text("42"), "s", &text("{}")));
        let old = Some(Old::Full(vec![known("s"), known("{}"), known("42")]));
        assert_eq!(decoder().decode(message(b'U', &[full, new])), Ok(Change::Update { old, new: unchanged }));
    }

    #[test]
    fn a_delete_tells_its_key() {
        let delete = message(b'D', &[(b'K', values(&text("42"), "s", b"n"))]);
        let key = vec![known("s"), Column::Null, known("42")];
        assert_eq!(decoder().decode(delete), Ok(Change::Delete(Old::Key(key))));
    }

    #[test]
    fn other_tables_are_passed_over_and_unknown_ones_refused() {
        let insert = message(b'I', &[(b'N', values(&text("42"), "s", &text("{}")))]);
        assert!(Decoder::new("sessions", COLUMNS).decode(insert.clone()).is_err());
        let mut decoder = Decoder::new("sessions", COLUMNS);
        assert_eq!(decoder.decode(relation("keys").into()), Ok(Change::Nothing));
        assert_eq!(decoder.decode(insert), Ok(Change::Nothing));
        let truncate = |id: [u8; 4]| Bytes::from([&[b'T', 0, 0, 0, 1, 0][..], &id].concat());
        assert_eq!(decoder.decode(truncate(TABLE)), Ok(Change::Nothing));
        assert_eq!(self::decoder().decode(truncate(TABLE)), Ok(Change::Truncate));
        assert_eq!(self::decoder().decode(truncate([0, 0, 0, 8])), Ok(Change::Nothing));
    }

    #[test]
    fn a_table_that_has_lost_a_column_is_refused() {
        let mut decoder = Decoder::new("sessions", &["id", "kind"]);
        assert_eq!(decoder.decode(relation("sessions").into()), Err(DecodeError("the table lacks a column")));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decoder().decode(bytes.clone().into());
            let _ = Decoder::new("sessions", COLUMNS).decode(bytes.into());
        }

        #[test]
        fn no_cut_and_no_flipped_bit_makes_it_panic(cut in 0usize..120, at in 0usize..120, bit in 0u8..8) {
            let update = [(b'K', values(&text("41"), "s", b"n")), (b'N', values(&text("42"), "s", b"u"))];
            for mut bytes in [relation("sessions"), message(b'U', &update).to_vec()] {
                bytes.truncate(cut);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << bit;
                }
                let _ = decoder().decode(bytes.into());
            }
        }

        #[test]
        fn a_message_that_is_cut_off_is_refused(cut in 1usize..40) {
            let insert = message(b'I', &[(b'N', values(&text("42"), "s", &text("{}")))]);
            let cut = cut.min(insert.len() - 1);
            prop_assert_eq!(decoder().decode(insert.slice(..cut)), Err(TOO_SHORT));
        }
    }
}
