//! Changes that go to ClickHouse together: of every session the newest version, whole transactions as far as they fit.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::convert::Columns;
use super::decode::{Change, DecodeError, Key};
use super::postgres::Lsn;

/// Cuts inside one transaction that get versions of their own. A commit takes 48 bytes of WAL at least, so no other commit
/// lies closer behind.
pub(super) const CUTS_MAX: u64 = 39;
/// What a tombstone counts for.
const TOMBSTONE_SIZE: usize = 256;

/// `epoch << 56 | lsn`.
pub(super) fn version(epoch: u8, place: u64) -> u64 {
    u64::from(epoch) << 56 | (place & ((1 << 56) - 1))
}

/// What a session has become.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Fate {
    /// This row; its large columns may be missing.
    Row(Box<Columns>),
    /// Nothing.
    Gone,
}

impl Fate {
    fn size(&self) -> usize {
        match self {
            Self::Row(columns) => columns.size(),
            Self::Gone => TOMBSTONE_SIZE,
        }
    }
}

/// Changes that are flushed as one.
#[derive(Debug, Default)]
pub(super) struct Cut {
    /// What became of each session, and the version of it.
    pub(super) rows: Vec<(Key, Fate, u64)>,
    /// Bytes that they take.
    pub(super) bytes: usize,
    /// Once they are stored, everything before this place is, as far as this cut and those before it go.
    pub(super) reached: Option<Lsn>,
    /// When the first of their transactions was committed, in Unix milliseconds.
    pub(super) committed_at: Option<i64>,
}

/// The cut in the making.
#[derive(Debug)]
pub(super) struct Batch {
    epoch: u8,
    rows: HashMap<Key, (Fate, u64)>,
    bytes: usize,
    reached: Option<Lsn>,
    committed_at: Option<i64>,
    open: Option<Open>,
    in_order: bool,
}

/// The transaction that is being told.
#[derive(Clone, Copy, Debug)]
struct Open {
    commit: Lsn,
    cuts: u64,
}

impl Batch {
    pub(super) fn new(epoch: u8) -> Self {
        Self {
            epoch,
            rows: HashMap::new(),
            bytes: 0,
            reached: None,
            committed_at: None,
            open: None,
            in_order: false,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// True between the first and the last message of a transaction.
    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// It shares a version with the cut before it, and must not overtake it.
    pub(super) fn is_in_order(&self) -> bool {
        self.in_order
    }

    pub(super) fn begin(&mut self, commit: Lsn) {
        self.open = Some(Open { commit, cuts: 0 });
    }

    /// Takes a change of the open transaction. [`Change::Truncate`] is not for batches.
    pub(super) fn take(&mut self, change: Change) -> Result<(), DecodeError> {
        let open = self.open.ok_or(DecodeError("a change outside of a transaction"))?;
        self.in_order |= open.cuts > CUTS_MAX;
        let version = version(self.epoch, open.commit.0 + open.cuts.min(CUTS_MAX));
        match change {
            Change::Upsert { new, moved } => {
                if let Some(key) = moved {
                    self.put(key, Fate::Gone, version);
                }
                self.put(Key::of(&new)?, Fate::Row(new), version);
            }
            Change::Delete(key) => self.put(key, Fate::Gone, version),
            Change::Truncate | Change::Nothing => {}
        }
        Ok(())
    }

    fn put(&mut self, key: Key, mut fate: Fate, version: u64) {
        match self.rows.entry(key) {
            Entry::Vacant(entry) => {
                self.bytes += fate.size();
                entry.insert((fate, version));
            }
            Entry::Occupied(mut entry) => {
                if let (Fate::Row(new), (Fate::Row(old), _)) = (&mut fate, entry.get()) {
                    new.complete_from(old);
                }
                self.bytes = self.bytes + fate.size() - entry.get().0.size();
                entry.insert((fate, version));
            }
        }
    }

    /// The open transaction ends. Where it changed nothing of ours and nothing is waiting, the place is given back.
    pub(super) fn commit(&mut self, end: Lsn, at: i64) -> Option<Lsn> {
        self.open = None;
        if !self.rows.is_empty() {
            self.committed_at.get_or_insert(at);
        }
        self.idle(end)
    }

    /// There is nothing of ours before this place that has not been told. Given back if nothing is waiting.
    pub(super) fn idle(&mut self, place: Lsn) -> Option<Lsn> {
        if self.rows.is_empty() {
            return Some(place);
        }
        self.reached = self.reached.max(Some(place));
        None
    }

    /// What has come so far, to be flushed. An open transaction goes on in the next cut.
    pub(super) fn cut(&mut self) -> Cut {
        self.in_order = false;
        if let Some(open) = &mut self.open {
            open.cuts += 1;
        }
        let rows = self.rows.drain().map(|(key, (fate, version))| (key, fate, version)).collect();
        Cut {
            rows,
            bytes: std::mem::take(&mut self.bytes),
            reached: self.reached.take(),
            committed_at: self.committed_at.take(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(id: &str, metadata: Option<&str>) -> Columns {
        let text = |text: &str| Some(text.to_owned());
        let mut small: [Option<String>; 11] = std::array::from_fn(|_| None);
        small[0] = text(id);
        small[1] = text("env");
        small[2] = text("5");
        let metadata = metadata.map(text);
        Columns { small, large: [Some(None), metadata, Some(None)] }
    }

    fn key(id: &str) -> Key {
        Key { id: id.to_owned(), environment_id: "env".to_owned(), created_at: 5 }
    }

    fn upsert(id: &str, metadata: Option<&str>) -> Change {
        Change::Upsert { new: Box::new(columns(id, metadata)), moved: None }
    }

    #[test]
    fn the_newest_change_of_a_session_holds() {
        let mut batch = Batch::new(1);
        batch.begin(Lsn(100));
        batch.take(upsert("a", Some("{}"))).expect("taken");
        batch.take(upsert("b", Some("{}"))).expect("taken");
        assert_eq!(batch.commit(Lsn(150), 1), None);
        batch.begin(Lsn(200));
        batch.take(Change::Delete(key("a"))).expect("taken");
        assert_eq!(batch.commit(Lsn(250), 2), None);
        let mut cut = batch.cut();
        cut.rows.sort_by(|one, other| one.0.id.cmp(&other.0.id));
        assert_eq!(cut.rows[0], (key("a"), Fate::Gone, version(1, 200)));
        assert_eq!(cut.rows[1].2, version(1, 100));
        assert_eq!((cut.reached, cut.committed_at), (Some(Lsn(250)), Some(1)));
        assert!(batch.is_empty());
        assert_eq!(batch.bytes(), 0);
    }

    #[test]
    fn what_has_not_changed_comes_from_the_version_before() {
        let mut batch = Batch::new(1);
        batch.begin(Lsn(100));
        batch.take(upsert("a", Some("{}"))).expect("taken");
        batch.take(upsert("a", None)).expect("taken");
        let Fate::Row(row) = &batch.cut().rows[0].1 else { panic!("a row") };
        assert!(!row.is_partial());
    }

    #[test]
    fn a_moved_row_leaves_a_tombstone() {
        let mut batch = Batch::new(1);
        batch.begin(Lsn(100));
        batch
            .take(Change::Upsert { new: Box::new(columns("a", Some("{}"))), moved: Some(key("old")) })
            .expect("taken");
        let cut = batch.cut();
        assert!(cut.rows.contains(&(key("old"), Fate::Gone, version(1, 100))));
        assert_eq!(cut.rows.len(), 2);
    }

    #[test]
    fn cuts_inside_a_transaction_have_versions_of_their_own_and_do_not_confirm_it() {
        let mut batch = Batch::new(2);
        batch.begin(Lsn(1000));
        for cut in 0..45 {
            batch.take(upsert("a", Some("{}"))).expect("taken");
            assert_eq!(batch.is_in_order(), cut > CUTS_MAX, "{cut}");
            let cut_off = batch.cut();
            assert_eq!(cut_off.reached, None);
            assert_eq!(cut_off.rows[0].2, version(2, 1000 + cut.min(CUTS_MAX)));
        }
        assert_eq!(batch.commit(Lsn(1048), 1), Some(Lsn(1048)));
        assert!(version(2, 1000 + CUTS_MAX) < version(2, 1048));
    }

    #[test]
    fn an_epoch_outweighs_every_place() {
        assert!(version(2, 0) > version(1, (1 << 56) - 1));
        assert_eq!(version(1, u64::MAX), version(1, (1 << 56) - 1));
    }

    #[test]
    fn nothing_of_ours_is_given_back_at_once_only_if_nothing_waits() {
        let mut batch = Batch::new(1);
        assert_eq!(batch.idle(Lsn(10)), Some(Lsn(10)));
        batch.begin(Lsn(20));
        assert_eq!(batch.commit(Lsn(30), 1), Some(Lsn(30)));
        batch.begin(Lsn(40));
        batch.take(upsert("a", Some("{}"))).expect("taken");
        assert_eq!(batch.commit(Lsn(50), 1), None);
        assert_eq!(batch.idle(Lsn(60)), None);
        assert_eq!(batch.cut().reached, Some(Lsn(60)));
    }

    #[test]
    fn a_change_outside_of_a_transaction_is_refused() {
        assert!(Batch::new(1).take(upsert("a", None)).is_err());
    }
}
