//! What is stored at once: of every session the newest version.
//!
//! A key and its version must mean the same content at every delivery, by whomever, or a repeat could put an old row over a new
//! one. So the version comes from the place of the transaction and from the number of the change in it, and a batch never
//! ends within a chunk of [`CHUNK`] changes of one transaction.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::pgoutput::{Change, Old};
use super::row::{RowError, SortKey, Version};
use super::{Epoch, Lsn, RowVersion};

/// Changes of one transaction that share a version. Part of what versions mean: it never changes.
pub const CHUNK: u32 = 1000;
/// The last chunk of a transaction with a version of its own; all behind it share it. A commit takes 48 bytes of the log at
/// least, so the version of no other transaction lies among these.
pub const LAST_CHUNK: u32 = 39;

/// Bytes that a tombstone takes in memory, roughly.
const TOMBSTONE_SIZE: usize = 256;

/// What a session has become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowChange {
    /// Its version.
    pub version: RowVersion,
    /// The transaction, as its Begin names it: the lower 32 bits of its id; `None` for what a query has found.
    pub xid: Option<u32>,
    /// Its columns; `None` once it is gone.
    pub row: Option<Version>,
}

/// Changes that are stored at once.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// By what they are changes of.
    pub rows: HashMap<SortKey, RowChange>,
    /// Bytes that they take in memory, roughly.
    pub bytes: usize,
    /// Once this batch and all before it are stored, everything before this place is.
    pub reached: Option<Lsn>,
    /// When the first of their transactions was committed, in milliseconds since 1970 by Postgres' clock.
    pub committed_at: Option<i64>,
    /// It shares versions with the batch before it: nothing else may be on its way beside it.
    pub in_order: bool,
}

/// A transaction that is being told.
#[derive(Clone, Copy, Debug)]
struct Transaction {
    commit: Lsn,
    committed_at: i64,
    xid: u32,
    /// Changes so far.
    changes: u32,
}

impl Transaction {
    fn chunk(&self) -> u32 {
        self.changes / CHUNK
    }

    fn version(&self, epoch: Epoch) -> RowVersion {
        RowVersion::new(epoch, Lsn(self.commit.0 + u64::from(self.chunk().min(LAST_CHUNK))))
    }

    /// Goes on with the next chunk, unless nothing is in this one.
    fn round_up(&mut self) {
        self.changes = self.changes.next_multiple_of(CHUNK);
    }
}

/// Where a TRUNCATE stands among versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truncation {
    /// Every row with a lower version is gone.
    pub at: RowVersion,
    /// The lowest version of what follows; equal to `at` where chunks share a version.
    pub next: RowVersion,
}

/// Why a message cannot be taken into a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// The stream tells of a change before it tells of its transaction.
    #[error("the stream tells of a change outside of a transaction")]
    NoTransaction,
    /// A row cannot be read.
    #[error(transparent)]
    Row(#[from] RowError),
}

/// Puts changes of one stream together.
#[derive(Debug)]
pub struct Batcher {
    epoch: Epoch,
    open: Option<Transaction>,
    batch: Batch,
}

impl Batcher {
    /// For a stream that is read under `epoch`.
    pub fn new(epoch: Epoch) -> Self {
        Self { epoch, open: None, batch: Batch::default() }
    }

    /// Changes that wait.
    pub fn rows(&self) -> usize {
        self.batch.rows.len()
    }

    /// Bytes that they take in memory, roughly.
    pub fn bytes(&self) -> usize {
        self.batch.bytes
    }

    /// Whether what waits shares versions with what went before it.
    pub fn is_in_order(&self) -> bool {
        self.batch.in_order
    }

    /// Whether a batch may end here.
    pub fn may_end(&self) -> bool {
        self.open.is_none_or(|open| open.changes.is_multiple_of(CHUNK))
    }

    /// A transaction begins, whose commit stands at `commit`.
    pub fn begin(&mut self, commit: Lsn, committed_at: i64, xid: u32) {
        self.open = Some(Transaction { commit, committed_at, xid, changes: 0 });
    }

    /// Takes a change of the open transaction, but for [`Change::Truncate`]: see [`Batcher::truncate`].
    ///
    /// # Errors
    /// [`BatchError`].
    pub fn take(&mut self, change: Change) -> Result<(), BatchError> {
        let open = self.open.as_mut().ok_or(BatchError::NoTransaction)?;
        let (gone, row) = match change {
            Change::Insert(new) => (None, Some(Version::new(new)?)),
            Change::Update { old, new } => {
                let mut row = Version::new(new)?;
                if let Some(Old::Full(old)) = &old {
                    row.complete_from(old);
                }
                let old = old.map(|old| SortKey::of(old.tuple())).transpose()?;
                (old.filter(|old| old != row.key()), Some(row))
            }
            Change::Delete(old) => (Some(SortKey::of(old.tuple())?), None),
            Change::Truncate | Change::Nothing => return Ok(()),
        };
        let (version, xid) = (open.version(self.epoch), Some(open.xid));
        self.batch.in_order |= open.chunk() > LAST_CHUNK;
        self.batch.committed_at.get_or_insert(open.committed_at);
        open.changes = open.changes.saturating_add(1);
        if let Some(gone) = gone {
            self.put(gone, RowChange { version, xid, row: None });
        }
        if let Some(row) = row {
            self.put(row.key().clone(), RowChange { version, xid, row: Some(row) });
        }
        Ok(())
    }

    /// Gives a TRUNCATE a chunk of its own. Everything that was taken before must be stored before the rows are removed.
    ///
    /// # Errors
    /// [`BatchError::NoTransaction`].
    pub fn truncate(&mut self) -> Result<Truncation, BatchError> {
        let open = self.open.as_mut().ok_or(BatchError::NoTransaction)?;
        open.round_up();
        let version = open.version(self.epoch);
        open.changes = open.changes.saturating_add(CHUNK);
        Ok(Truncation { at: version, next: open.version(self.epoch) })
    }

    /// The open transaction ends before `end`, which is given back if nothing waits: then it is known to be stored as soon as
    /// what is on its way is.
    pub fn commit(&mut self, end: Lsn) -> Option<Lsn> {
        self.open = None;
        self.pass(end)
    }

    /// Nothing that has not been told stands before `end`, as far as transactions go that have ended. Given back as by
    /// [`Batcher::commit`].
    pub fn pass(&mut self, end: Lsn) -> Option<Lsn> {
        if self.open.is_some() {
            return None;
        }
        if self.batch.rows.is_empty() {
            return Some(end);
        }
        self.batch.reached = self.batch.reached.max(Some(end));
        None
    }

    /// Takes out what waits. To be called only where a batch [may end](Batcher::may_end).
    pub fn end(&mut self) -> Batch {
        debug_assert!(self.may_end(), "a batch that ends within a chunk");
        std::mem::take(&mut self.batch)
    }

    fn put(&mut self, key: SortKey, mut new: RowChange) {
        let size = |change: &RowChange| change.row.as_ref().map_or(TOMBSTONE_SIZE, Version::size);
        let batch = &mut self.batch;
        match batch.rows.entry(key) {
            Entry::Vacant(entry) => {
                batch.bytes += size(&new);
                entry.insert(new);
            }
            Entry::Occupied(mut entry) => {
                if let (Some(row), Some(before)) = (&mut new.row, &entry.get().row) {
                    row.complete_from(before.columns());
                }
                batch.bytes = batch.bytes + size(&new) - size(entry.get());
                entry.insert(new);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::replication::pgoutput::{Column, Tuple};
    use crate::replication::row::tests::{known, tuple};

    const EPOCH: Epoch = Epoch(2);

    fn at(place: u64) -> RowVersion {
        RowVersion::new(EPOCH, Lsn(place))
    }

    fn session(id: &'static str) -> Tuple {
        tuple(&[("id", known(id))])
    }

    fn key(id: &'static str) -> SortKey {
        SortKey::of(&session(id)).expect("a key")
    }

    fn update(new: Tuple) -> Change {
        Change::Update { old: None, new }
    }

    fn begun(commit: u64) -> Batcher {
        let mut batcher = Batcher::new(EPOCH);
        batcher.begin(Lsn(commit), 5, 77);
        batcher
    }

    #[test]
    fn the_newest_change_of_a_session_counts() {
        let mut batcher = begun(100);
        batcher.take(Change::Insert(session("a"))).expect("taken");
        batcher.take(Change::Insert(session("b"))).expect("taken");
        assert_eq!(batcher.commit(Lsn(150)), None);
        batcher.begin(Lsn(200), 6, 78);
        batcher.take(Change::Delete(Old::Key(session("a")))).expect("taken");
        assert_eq!(batcher.commit(Lsn(250)), None);
        let batch = batcher.end();
        assert_eq!(batch.rows[&key("a")], RowChange { version: at(200), xid: Some(78), row: None });
        assert_eq!((batch.rows[&key("b")].version, batch.rows[&key("b")].xid), (at(100), Some(77)));
        assert_eq!((batch.reached, batch.committed_at, batch.in_order), (Some(Lsn(250)), Some(5), false));
        assert_eq!((batcher.rows(), batcher.bytes()), (0, 0));
    }

    #[test]
    fn bytes_are_those_of_what_is_kept() {
        let mut batcher = begun(100);
        batcher.take(Change::Insert(session("a"))).expect("taken");
        let one = batcher.bytes();
        batcher.take(update(session("a"))).expect("taken");
        assert_eq!(batcher.bytes(), one);
        batcher.take(Change::Delete(Old::Key(session("a")))).expect("taken");
        assert_eq!(batcher.bytes(), TOMBSTONE_SIZE);
    }

    #[test]
    fn what_is_not_repeated_comes_from_the_version_before_or_the_old_row() {
        let missing = tuple(&[("id", known("a")), ("metadata", Column::Unchanged)]);
        let mut batcher = begun(100);
        batcher.take(Change::Insert(session("a"))).expect("taken");
        batcher.take(update(missing.clone())).expect("taken");
        batcher.commit(Lsn(110));
        assert!(batcher.end().rows[&key("a")].row.as_ref().is_some_and(Version::is_whole));
        batcher.begin(Lsn(120), 5, 78);
        let full = Some(Old::Full(session("a")));
        batcher.take(Change::Update { old: full, new: missing.clone() }).expect("taken");
        batcher.commit(Lsn(130));
        assert!(batcher.end().rows[&key("a")].row.as_ref().is_some_and(Version::is_whole));
        batcher.begin(Lsn(140), 5, 79);
        batcher.take(update(missing)).expect("taken");
        batcher.commit(Lsn(150));
        assert!(!batcher.end().rows[&key("a")].row.as_ref().is_some_and(Version::is_whole));
    }

    #[test]
    fn what_comes_behind_a_truncate_among_the_last_chunks_shares_its_version() {
        let mut batcher = begun(100);
        for chunk in 0..u64::from(LAST_CHUNK) {
            assert_eq!(batcher.truncate(), Ok(Truncation { at: at(100 + chunk), next: at(101 + chunk) }));
        }
        let last = at(100 + u64::from(LAST_CHUNK));
        assert_eq!(batcher.truncate(), Ok(Truncation { at: last, next: last }));
    }

    #[test]
    fn a_row_whose_key_changes_leaves_a_tombstone() {
        let moved = tuple(&[("id", known("a")), ("created_at", known("43"))]);
        let mut batcher = begun(100);
        let old = Some(Old::Key(session("a")));
        batcher.take(Change::Update { old: old.clone(), new: moved.clone() }).expect("taken");
        batcher.commit(Lsn(150));
        let batch = batcher.end();
        assert_eq!(batch.rows.len(), 2);
        assert_eq!(batch.rows[&key("a")], RowChange { version: at(100), xid: Some(77), row: None });
        assert_eq!(batch.rows[&SortKey::of(&moved).expect("a key")].version, at(100));
        batcher.begin(Lsn(200), 5, 78);
        batcher.take(Change::Update { old, new: session("a") }).expect("taken");
        batcher.commit(Lsn(250));
        assert_eq!(batcher.end().rows.len(), 1, "an old key that is the new one");
    }

    #[test]
    fn a_large_transaction_ends_batches_at_its_chunks_alone() {
        let mut batcher = begun(1_000);
        let mut versions = Vec::new();
        for change in 0..42 * CHUNK {
            assert_eq!(batcher.may_end(), change % CHUNK == 0, "{change}");
            if change > 0 && batcher.may_end() {
                let batch = batcher.end();
                assert_eq!((batch.reached, batch.rows.len()), (None, 1), "nothing of it is confirmed");
                versions.push((batch.rows[&key("a")].version, batch.in_order));
            }
            batcher.take(update(session("a"))).expect("taken");
        }
        let expected: Vec<_> = (0..41).map(|chunk: u64| (at(1_000 + chunk.min(39)), chunk > 39)).collect();
        assert_eq!(versions, expected);
        assert_eq!(batcher.commit(Lsn(1_048)), None);
        assert!(batcher.may_end());
        let last = batcher.end();
        assert_eq!((last.reached, last.in_order), (Some(Lsn(1_048)), true));
        assert!(at(1_000 + u64::from(LAST_CHUNK)) < at(1_048));
        batcher.begin(Lsn(2_000), 5, 78);
        batcher.take(update(session("a"))).expect("taken");
        batcher.commit(Lsn(2_050));
        assert!(!batcher.end().in_order);
    }

    #[test]
    fn a_truncate_has_a_chunk_of_its_own() {
        let mut batcher = begun(100);
        assert_eq!(
            batcher.truncate(),
            Ok(Truncation { at: at(100), next: at(101) }),
            "at the first place if nothing is before it"
        );
        batcher.take(Change::Insert(session("a"))).expect("taken");
        assert!(!batcher.may_end());
        assert_eq!(batcher.truncate(), Ok(Truncation { at: at(102), next: at(103) }));
        assert!(batcher.may_end());
        assert_eq!(batcher.end().rows[&key("a")].version, at(101));
        batcher.take(Change::Insert(session("b"))).expect("taken");
        batcher.commit(Lsn(150));
        assert_eq!(batcher.end().rows[&key("b")].version, at(103));
    }

    #[test]
    fn what_nothing_waits_for_is_given_back() {
        let mut batcher = Batcher::new(EPOCH);
        assert_eq!(batcher.pass(Lsn(10)), Some(Lsn(10)));
        batcher.begin(Lsn(20), 5, 77);
        assert_eq!(batcher.pass(Lsn(25)), None, "a transaction is open");
        assert_eq!(batcher.commit(Lsn(30)), Some(Lsn(30)));
        batcher.begin(Lsn(40), 5, 78);
        batcher.take(Change::Insert(session("a"))).expect("taken");
        assert_eq!(batcher.commit(Lsn(50)), None);
        assert_eq!(batcher.pass(Lsn(60)), None);
        assert_eq!(batcher.end().reached, Some(Lsn(60)));
    }

    #[test]
    fn a_change_outside_of_a_transaction_is_refused() {
        let mut batcher = Batcher::new(EPOCH);
        assert_eq!(batcher.take(Change::Insert(session("a"))), Err(BatchError::NoTransaction));
        assert_eq!(batcher.truncate(), Err(BatchError::NoTransaction));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// However a stream is cut into batches, a key at a version has one content, and the newest of all is the last.
        #[test]
        fn a_version_means_the_same_however_batches_end(
            changes in proptest::collection::vec((0usize..4, 0usize..1000, any::<bool>()), 1..8),
            ends in proptest::collection::vec(any::<bool>(), 40),
        ) {
            const IDS: [&str; 4] = ["a", "b", "c", "d"];
            let deliver = |ends: &[bool]| {
                let mut batcher = Batcher::new(EPOCH);
                let mut stored: HashMap<(SortKey, RowVersion), Option<i64>> = HashMap::new();
                let mut store = |batch: Batch| {
                    for (key, change) in batch.rows {
                        let updated = change.row.map(|row| match &row.columns()[3] {
                            Column::Text(text) => String::from_utf8_lossy(text).parse().expect("a number"),
                            other => panic!("{other:?}"),
                        });
                        if let Some(known) = stored.insert((key, change.version), updated) {
                            assert_eq!(known, updated, "two contents for one version");
                        }
                    }
                };
                for (number, (id, repeats, gone)) in changes.iter().enumerate() {
                    let commit = 1000 * (number as u64 + 1);
                    batcher.begin(Lsn(commit), 5, 1);
                    for repeat in 0..3 * repeats {
                        let updated = (number * 10_000 + repeat).to_string();
                        let updated = ("updated_at", Column::Text(updated.into()));
                        batcher.take(update(tuple(&[("id", known(IDS[*id])), updated]))).expect("taken");
                        if batcher.may_end() && ends[(number + repeat) % ends.len()] {
                            store(batcher.end());
                        }
                    }
                    if *gone {
                        batcher.take(Change::Delete(Old::Key(session(IDS[*id])))).expect("taken");
                    }
                    batcher.commit(Lsn(commit + 100));
                    if ends[number % ends.len()] {
                        store(batcher.end());
                    }
                }
                store(batcher.end());
                stored
            };
            let (one, other) = (deliver(&ends), deliver(&[false]));
            let mut both = one.clone();
            both.extend(other.clone());
            prop_assert!(one.iter().chain(&other).all(|(key, content)| both[key] == *content));
            for id in IDS {
                let newest = |stored: &HashMap<(SortKey, RowVersion), Option<i64>>| {
                    let of = stored.iter().filter(|((key, _), _)| key.session == id);
                    of.max_by_key(|((_, version), _)| *version).map(|((_, version), content)| (*version, *content))
                };
                prop_assert_eq!(newest(&one), newest(&other));
            }
        }
    }
}
