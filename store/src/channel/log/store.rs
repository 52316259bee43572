//! The files: opening the folder, its keyspaces, and every read. Writes go through the writer alone.

use std::fs::{File, TryLockError};
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode, Readable, Snapshot};

use super::codec::{self, Part, Tail, Unreadable};
use sessiond_domain::clock::Timestamp;
use sessiond_domain::record::{Bounds, Position, ReadLimit, ReadStart, Record, RecordBatch, metered_size};
use sessiond_domain::{ChannelKey, Closure, Error, Result, SeqNum, SessionId};

/// Version of the folder as a whole.
const FORMAT: u32 = 1;
/// Blocks kept in memory.
const CACHE_BYTES: u64 = 16 << 20;
/// Journals on disk before memtables are flushed to free them; fjall's least.
const JOURNAL_BYTES: u64 = 64 << 20;
/// Memtable of the records.
const RECORDS_MEMTABLE: u64 = 16 << 20;
/// Memtable of every other keyspace.
const SMALL_MEMTABLE: u64 = 4 << 20;
/// Threads that flush and compact.
const WORKERS: usize = 2;
/// Open tables kept.
const OPEN_FILES: usize = 256;
/// Files open at most: those, and what comes and goes, which are the journals, the tables that the workers read and write
/// past that cache, and the folders that are synced.
pub(super) const FILES: u64 = OPEN_FILES as u64 + 96;

/// Why a log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has the folder open.
    #[error("{path} is in use by another process")]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// The folder cannot be read or written.
    #[error("{path} cannot be used")]
    Io {
        /// The folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The folder was written by a version that this one does not know.
    #[error("the log has format {found}; this version reads up to {supported}")]
    Version {
        /// As stored.
        found: u32,
        /// The newest that can be read.
        supported: u32,
    },
    /// What is stored cannot be read.
    #[error("the log in {path} is damaged")]
    Corrupt {
        /// The folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The open folder. Cheap reads aside, its methods may wait for the disk.
pub(super) struct Store {
    pub db: Database,
    /// Channel key -> number.
    pub channels: Keyspace,
    /// (number, sequence number) -> record.
    pub records: Keyspace,
    /// Number -> [`Tail`].
    pub tails: Keyspace,
    /// (number, part id) -> [`Part`].
    pub parts: Keyspace,
    /// (time, number, part id) -> sequence number: part ids of removed records and when to forget them.
    pub expiries: Keyspace,
    /// Number -> channel key: channels that have trimmed records still on disk.
    pub removals: Keyspace,
    /// Session -> closure.
    pub seals: Keyspace,
    /// Sessions whose seal may not have reached their rows.
    pub unsettled: Keyspace,
    pub log_id: String,
    /// Held, never read. After the database, so that it is released last.
    _lock: File,
}

impl Store {
    pub(super) fn open(path: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        std::fs::create_dir_all(path).map_err(io)?;
        let lock = File::create(path.join("lock")).map_err(io)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => OpenError::Locked { path: path.to_owned() },
            TryLockError::Error(source) => io(source),
        })?;
        let fault = |error| match error {
            fjall::Error::Locked => OpenError::Locked { path: path.to_owned() },
            fjall::Error::Io(source) => OpenError::Io { path: path.to_owned(), source },
            error => OpenError::Corrupt { path: path.to_owned(), source: Box::new(error) },
        };
        let db = Database::builder(path.join("log"))
            .cache_size(CACHE_BYTES)
            .max_journaling_size(JOURNAL_BYTES)
            .worker_threads(WORKERS)
            .max_cached_files(Some(OPEN_FILES))
            .manual_journal_persist(true)
            .open()
            .map_err(fault)?;
        let open = |name: &str, memtable| {
            db.keyspace(name, || {
                KeyspaceCreateOptions::default().max_memtable_size(memtable).manual_journal_persist(true)
            })
            .map_err(fault)
        };
        // `format` and `log_id`.
        let meta = open("meta", SMALL_MEMTABLE)?;
        let log_id = claim_format(&db, &meta).map_err(fault)?.map_err(|found| match found {
            Some(found) => OpenError::Version { found, supported: FORMAT },
            None => OpenError::Corrupt { path: path.to_owned(), source: Box::new(Unreadable("format")) },
        })?;
        Ok(Self {
            channels: open("channels", SMALL_MEMTABLE)?,
            records: open("records", RECORDS_MEMTABLE)?,
            tails: open("tails", SMALL_MEMTABLE)?,
            parts: open("parts", SMALL_MEMTABLE)?,
            expiries: open("expiries", SMALL_MEMTABLE)?,
            removals: open("removals", SMALL_MEMTABLE)?,
            seals: open("seals", SMALL_MEMTABLE)?,
            unsettled: open("unsettled", SMALL_MEMTABLE)?,
            db,
            log_id,
            _lock: lock,
        })
    }

    /// The number that the next new channel gets.
    pub(super) fn next_number(&self) -> Result<u64> {
        let Some(last) = self.tails.last_key_value() else { return Ok(0) };
        let key = last.key().map_err(fault)?;
        let number = <[u8; 8]>::try_from(key.as_ref()).map_err(|_| unreadable(Unreadable("channel")))?;
        Ok(u64::from_be_bytes(number) + 1)
    }

    /// A channel's number and tail, if it was ever written.
    pub(super) fn channel(&self, key: &ChannelKey) -> Result<Option<(u64, Tail)>> {
        self.view().channel(key)
    }

    /// A session's seal.
    pub(super) fn closure(&self, session: &SessionId) -> Result<Option<Closure>> {
        self.view().closure(session)
    }

    /// What is remembered of a part id.
    pub(super) fn part(&self, key: &[u8]) -> Result<Option<Part>> {
        let row = self.parts.get(key).map_err(fault)?;
        row.map(|row| Part::decode(&row).map_err(unreadable)).transpose()
    }

    /// At most `limit` rows of `keyspace` after `after` and below `below`.
    pub(super) fn page(
        keyspace: &Keyspace,
        after: &[u8],
        below: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Bytes>> {
        let below = below.map_or(Bound::Unbounded, |key| Bound::Excluded(key.to_vec()));
        let rows = keyspace.range((Bound::Excluded(after.to_vec()), below)).take(limit);
        rows.map(|row| row.key().map(Bytes::from).map_err(fault)).collect()
    }

    /// Everything durable at this moment.
    pub(super) fn view(&self) -> View<'_> {
        View { store: self, snapshot: self.db.snapshot() }
    }

    /// Seals that were not settled.
    pub(super) fn unsettled(&self) -> Result<Vec<(SessionId, Closure)>> {
        let mut found = Vec::new();
        for row in self.unsettled.iter() {
            let key = row.key().map_err(fault)?;
            let session = std::str::from_utf8(&key).map_err(|_| unreadable(Unreadable("session id")))?;
            let session = SessionId::from_stored(session);
            if let Some(closure) = self.closure(&session)? {
                found.push((session, closure));
            }
        }
        Ok(found)
    }
}

/// Reads the format and the log's id, or writes them to a new folder. `Err(Some(_))` is a newer format.
fn claim_format(db: &Database, meta: &Keyspace) -> fjall::Result<std::result::Result<String, Option<u32>>> {
    let Some(format) = meta.get("format")? else {
        let id = format!("log_{}", uuid::Uuid::new_v4().simple());
        let mut batch = db.batch().durability(Some(PersistMode::SyncAll));
        batch.insert(meta, "format", FORMAT.to_be_bytes());
        batch.insert(meta, "log_id", id.as_str());
        batch.commit()?;
        return Ok(Ok(id));
    };
    let Ok(format) = <[u8; 4]>::try_from(format.as_ref()).map(u32::from_be_bytes) else {
        return Ok(Err(None));
    };
    if format > FORMAT {
        return Ok(Err(Some(format)));
    }
    let id = meta.get("log_id")?.and_then(|id| String::from_utf8(id.to_vec()).ok());
    Ok(id.ok_or(None))
}

/// A consistent picture of the store.
pub(super) struct View<'a> {
    store: &'a Store,
    snapshot: Snapshot,
}

impl View<'_> {
    fn get(&self, keyspace: &Keyspace, key: &[u8]) -> Result<Option<Bytes>> {
        Ok(self.snapshot.get(keyspace, key).map_err(fault)?.map(Bytes::from))
    }

    pub(super) fn channel(&self, key: &ChannelKey) -> Result<Option<(u64, Tail)>> {
        let Some(number) = self.get(&self.store.channels, &codec::channel_key(key))? else { return Ok(None) };
        let number = codec::decode_number(number).map_err(unreadable)?;
        let tail = self.get(&self.store.tails, &number.to_be_bytes())?;
        let tail = tail.ok_or_else(|| unreadable(Unreadable("tail")))?;
        Ok(Some((number, Tail::decode(tail).map_err(unreadable)?)))
    }

    pub(super) fn closure(&self, session: &SessionId) -> Result<Option<Closure>> {
        let row = self.get(&self.store.seals, session.as_str().as_bytes())?;
        row.map(|row| codec::decode_closure(row).map_err(unreadable)).transpose()
    }

    /// Where a channel begins and ends.
    pub(super) fn bounds(&self, key: &ChannelKey) -> Result<Bounds> {
        Ok(self.channel(key)?.map_or_else(Bounds::default, |(_, tail)| bounds(&tail)))
    }

    /// See [`ChannelStore::read`](sessiond_domain::ChannelStore::read).
    pub(super) fn read(&self, key: &ChannelKey, start: ReadStart, limit: ReadLimit) -> Result<RecordBatch> {
        let Some((number, tail)) = self.channel(key)? else {
            return Ok(RecordBatch::new(Vec::new(), Some(Position::default())));
        };
        let first = self.locate(number, &tail, start)?;
        let (mut records, mut bytes) = (Vec::new(), 0);
        for item in self.range(number, first, tail.next.seq_num) {
            let (record, _) = item?;
            bytes += metered_size(&record.headers, &record.body);
            if !records.is_empty() && (records.len() >= limit.count || bytes > limit.bytes) {
                break;
            }
            records.push(record);
        }
        let end = records.last().map_or(first, |record| record.position.seq_num + 1);
        Ok(RecordBatch::new(records, (end == tail.next.seq_num).then_some(tail.next)))
    }

    /// The sequence number that `start` means.
    pub(super) fn resolve(&self, key: &ChannelKey, start: ReadStart) -> Result<(SeqNum, Bounds)> {
        match self.channel(key)? {
            None => Ok((0, Bounds::default())),
            Some((number, tail)) => Ok((self.locate(number, &tail, start)?, bounds(&tail))),
        }
    }

    fn locate(&self, number: u64, tail: &Tail, start: ReadStart) -> Result<SeqNum> {
        let end = tail.next.seq_num;
        Ok(match start {
            ReadStart::SeqNum(seq_num) => seq_num.clamp(tail.earliest, end),
            ReadStart::TailOffset(offset) => end.saturating_sub(offset).max(tail.earliest),
            ReadStart::Timestamp(at) => self.first_at(number, tail.earliest, end, at)?,
        })
    }

    /// The first record of `from..to` at or after `at`. Times never run backwards, so halving finds it.
    pub(super) fn first_at(&self, number: u64, from: SeqNum, to: SeqNum, at: Timestamp) -> Result<SeqNum> {
        let (mut low, mut high) = (from, to);
        while low < high {
            let middle = low + (high - low) / 2;
            let row = self.get(&self.store.records, &codec::record_key(number, middle))?;
            let row = row.ok_or_else(|| unreadable(Unreadable("record")))?;
            match codec::record_timestamp(&row).map_err(unreadable)? < at {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        Ok(low)
    }

    /// The records of `from..to` with their part ids.
    pub(super) fn range(
        &self,
        number: u64,
        from: SeqNum,
        to: SeqNum,
    ) -> impl Iterator<Item = Result<(Record, Option<Bytes>)>> {
        let keys = codec::record_key(number, from)..codec::record_key(number, to.max(from));
        self.snapshot.range(&self.store.records, keys).map(|item| {
            let (key, value) = item.into_inner().map_err(fault)?;
            let seq_num = codec::record_seq_num(&key).map_err(unreadable)?;
            codec::decode_record(seq_num, Bytes::from(value)).map_err(unreadable)
        })
    }
}

pub(super) fn bounds(tail: &Tail) -> Bounds {
    Bounds { earliest: tail.earliest, tail: tail.next }
}

/// A fault of the disk or of the engine.
pub(super) fn fault(error: fjall::Error) -> Error {
    Error::unavailable("log", error)
}

pub(super) fn unreadable(error: Unreadable) -> Error {
    Error::internal(error)
}
