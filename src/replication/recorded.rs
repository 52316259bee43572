//! A stream that was recorded: what `recorded.txt` says a server has told.

use bytes::{Buf, Bytes};
use data_encoding::HEXLOWER;

use super::batch::{Batch, Batcher};
use super::pgoutput::{Change, Decoder};
use super::row::{COLUMNS, SortKey, Version};
use super::{Epoch, Lsn, RowVersion};

const RECORDED: &str = include_str!("recorded.txt");

/// Feeds the batcher until so many transactions have been told, and takes what waits.
struct Recording {
    messages: std::vec::IntoIter<Bytes>,
    decoder: Decoder,
    batcher: Batcher,
    truncated: Option<RowVersion>,
}

impl Recording {
    fn new() -> Self {
        let lines = RECORDED.lines().filter(|line| !line.starts_with('#'));
        let messages: Vec<Bytes> =
            lines.map(|line| HEXLOWER.decode(line.as_bytes()).expect("hexadecimal").into()).collect();
        Self {
            messages: messages.into_iter(),
            decoder: Decoder::new("sessions", COLUMNS),
            batcher: Batcher::new(Epoch(1)),
            truncated: None,
        }
    }

    fn transactions(&mut self, count: usize) -> Batch {
        let mut ended = 0;
        while ended < count {
            let mut message = self.messages.next().expect("a message");
            match message[0] {
                b'B' => {
                    message.advance(1);
                    let (commit, micros, xid) = (message.get_u64(), message.get_i64(), message.get_u32());
                    self.batcher.begin(Lsn(commit), micros / 1000, xid);
                }
                b'C' => {
                    message.advance(10);
                    self.batcher.commit(Lsn(message.get_u64()));
                    ended += 1;
                }
                _ => match self.decoder.decode(message).expect("a message that can be read") {
                    Change::Truncate => {
                        self.truncated = Some(self.batcher.truncate().expect("in a transaction").at);
                    }
                    change => self.batcher.take(change).expect("taken"),
                },
            }
        }
        self.batcher.end()
    }
}

fn key(session: &str, created_at: i64) -> SortKey {
    SortKey { environment: "env_1".to_owned(), created_at, session: session.to_owned() }
}

fn row(batch: &Batch, session: &str, created_at: i64) -> Version {
    batch.rows[&key(session, created_at)].row.clone().expect("it is there")
}

#[test]
fn each_transaction_is_what_its_statements_made() {
    let mut recording = Recording::new();
    let made = recording.transactions(2);
    assert_eq!(made.rows.len(), 2);
    let first = row(&made, "session_a", 1000);
    assert!(first.is_whole() && row(&made, "session_b", 2000).is_whole());

    let closed = recording.transactions(1);
    assert!(
        !row(&closed, "session_b", 2000).is_whole(),
        "its metadata is stored out of line and has not changed"
    );
    assert!(closed.rows[&key("session_b", 2000)].version > made.rows[&key("session_b", 2000)].version);

    let moved = recording.transactions(1);
    assert_eq!(moved.rows.len(), 2);
    assert_eq!(moved.rows[&key("session_a", 1000)].row, None);
    assert!(row(&moved, "session_a", 1001).is_whole());

    let both = recording.transactions(1);
    assert_eq!(both.rows[&key("session_b", 2000)].row, None);
    assert_eq!(both.rows[&key("session_a", 1001)].version, both.rows[&key("session_b", 2000)].version);

    // What was rolled back is not told.
    assert_eq!(recording.transactions(1).rows.len(), 0);
    let truncated = recording.truncated.expect("it is told");
    assert!(truncated > both.rows[&key("session_a", 1001)].version);
    assert_eq!(recording.messages.len(), 0);
}

#[test]
fn all_of_it_at_once_is_the_newest_of_each_session() {
    let batch = Recording::new().transactions(5);
    let mut rows: Vec<_> =
        batch.rows.iter().map(|(key, change)| (key.clone(), change.row.is_some())).collect();
    rows.sort();
    let expected =
        [(key("session_a", 1000), false), (key("session_a", 1001), true), (key("session_b", 2000), false)];
    assert_eq!(rows, expected);
    assert!(row(&batch, "session_a", 1001).is_whole());
}
