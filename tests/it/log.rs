//! What only the embedded log promises: its folder, restarts, retention, forgetting.

mod model;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fjall::{Database, KeyspaceCreateOptions, PersistMode};
use futures_util::StreamExt;
use futures_util::future::join_all;
use sessiond::domain::record::{Command, ReadLimit};
use sessiond::domain::{
    AppendInput, ChannelKey, ChannelStore, Clock, Closure, Direction, Error, NewRecord, ReadStart, SessionId,
    TestClock, Timestamp,
};
use sessiond::store::channel::log::{LogChannels, LogOptions, OpenError};

use crate::harness::ample_budget;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn clock() -> TestClock {
    TestClock::at(Timestamp::from_millis(1_700_000_000_000))
}

fn open(folder: &Path, clock: &TestClock) -> LogChannels {
    LogChannels::open(folder, LogOptions::default(), Arc::new(clock.clone())).expect("opens")
}

fn key(session: &str) -> ChannelKey {
    ChannelKey::main(SessionId::from_stored(&format!("session_{session}")), Direction::Out)
}

fn part(id: &str, body: &str) -> AppendInput {
    let record = NewRecord { part_id: Some(id.into()), ..NewRecord::data(body.to_owned()) };
    AppendInput::one(record).expect("fits")
}

fn many(count: usize) -> AppendInput {
    AppendInput::new(vec![NewRecord::data("a"); count]).expect("fits")
}

fn command(command: Command) -> AppendInput {
    AppendInput::one(command.into_record()).expect("fits")
}

/// Rows of a keyspace of a closed log.
fn rows(folder: &Path, keyspace: &str) -> usize {
    let db = Database::builder(folder.join("log")).open().expect("opens");
    db.keyspace(keyspace, KeyspaceCreateOptions::default).expect("is there").len().expect("counts")
}

#[tokio::test]
async fn a_restart_keeps_everything() {
    let (folder, clock, key) = (tempfile::tempdir().expect("a folder"), clock(), key("a"));
    let closure = Closure { at: clock.now(), reason: Some("done".into()) };
    let before = {
        let log = open(folder.path(), &clock);
        log.append(&key, many(5)).await.expect("appends");
        log.append(&key, part("p", "b")).await.expect("appends");
        log.append(&key, command(Command::Fence("mine".into()))).await.expect("appends");
        log.append(&key, command(Command::Trim(2))).await.expect("appends");
        log.seal(&SessionId::from_stored("session_b"), closure.clone().into()).await.expect("seals");
        let read = log.read(&key, ReadStart::SeqNum(0), ReadLimit::BATCH).await.expect("reads");
        (log.log_id().to_owned(), log.bounds(&key).await.expect("bounds"), read.records.clone())
    };
    let log = open(folder.path(), &clock);
    let read = log.read(&key, ReadStart::SeqNum(0), ReadLimit::BATCH).await.expect("reads");
    let after = (log.log_id().to_owned(), log.bounds(&key).await.expect("bounds"), read.records.clone());
    assert_eq!(after, before);
    let mut fenced = many(1);
    fenced.fencing_token = Some("yours".into());
    assert!(matches!(log.append(&key, fenced).await, Err(Error::Fenced { expected }) if expected == "mine"));
    let again = log.append(&key, part("p", "b")).await.expect("repeats");
    assert_eq!((again.repeated, again.seq_nums), (true, vec![5]));
    let sealed = log.append(&self::key("b"), many(1)).await;
    assert!(matches!(sealed, Err(Error::Closed { .. })));
    let unsettled = log.unsettled().await.expect("lists");
    assert_eq!(unsettled, [(SessionId::from_stored("session_b"), closure)]);
    assert_eq!(log.append(&key, many(1)).await.expect("appends").start.seq_num, 8);
    // A new channel does not take an old one's number.
    assert_eq!(log.append(&self::key("c"), many(1)).await.expect("appends").start.seq_num, 0);
    assert_eq!(log.bounds(&key).await.expect("bounds").tail.seq_num, 9);
}

#[tokio::test]
async fn a_folder_is_opened_once_at_a_time() {
    let (folder, clock) = (tempfile::tempdir().expect("a folder"), clock());
    let log = open(folder.path(), &clock);
    let second = LogChannels::open(folder.path(), LogOptions::default(), Arc::new(clock.clone()));
    assert!(matches!(second, Err(OpenError::Locked { .. })));
    drop(log);
    open(folder.path(), &clock);
}

#[tokio::test]
async fn a_newer_format_is_refused() {
    let (folder, clock) = (tempfile::tempdir().expect("a folder"), clock());
    drop(open(folder.path(), &clock));
    {
        let db = Database::builder(folder.path().join("log")).open().expect("opens");
        let meta = db.keyspace("meta", KeyspaceCreateOptions::default).expect("is there");
        meta.insert("format", 2_u32.to_be_bytes()).expect("writes");
        db.persist(PersistMode::SyncAll).expect("syncs");
    }
    let opened = LogChannels::open(folder.path(), LogOptions::default(), Arc::new(clock));
    assert!(matches!(opened, Err(OpenError::Version { found: 2, supported: 1 })));
}

#[tokio::test]
async fn a_closed_log_refuses_appends_and_still_reads() {
    let (folder, clock, key) = (tempfile::tempdir().expect("a folder"), clock(), key("a"));
    let log = open(folder.path(), &clock);
    log.append(&key, many(3)).await.expect("appends");
    log.close();
    assert!(matches!(log.append(&key, many(1)).await, Err(Error::Unavailable { what: "log", .. })));
    assert!(log.ping().await.is_err());
    assert!(log.sweep().await.is_err());
    let read = log.read(&key, ReadStart::SeqNum(0), ReadLimit::BATCH).await.expect("reads");
    assert_eq!(read.records.len(), 3);
}

#[tokio::test]
async fn closing_commits_what_was_queued() {
    let (folder, clock, key) = (tempfile::tempdir().expect("a folder"), clock(), key("a"));
    let log = Arc::new(open(folder.path(), &clock));
    let appends: Vec<_> = (0..200).map(|_| log.append(&key, many(1))).collect();
    let closing = {
        let log = log.clone();
        async move { tokio::task::spawn_blocking(move || log.close()).await.expect("closes") }
    };
    let (answers, ()) = tokio::join!(join_all(appends), closing);
    for answer in answers {
        answer.expect("what stood in line before the close is committed");
    }
    assert_eq!(log.bounds(&key).await.expect("bounds").tail.seq_num, 200);
}

#[tokio::test]
async fn trimmed_records_leave_the_disk_even_across_a_restart() {
    let (folder, clock, key) = (tempfile::tempdir().expect("a folder"), clock(), key("a"));
    {
        let log = open(folder.path(), &clock);
        for _ in 0..5 {
            log.append(&key, many(1000)).await.expect("appends");
        }
        log.append(&key, command(Command::Trim(4990))).await.expect("trims");
    }
    {
        let log = open(folder.path(), &clock);
        log.sweep().await.expect("sweeps");
        let read = log.read(&key, ReadStart::SeqNum(0), ReadLimit::BATCH).await.expect("reads");
        assert_eq!(read.records.first().map(|record| record.position.seq_num), Some(4990));
    }
    assert_eq!((rows(folder.path(), "records"), rows(folder.path(), "removals")), (11, 0));
}

#[tokio::test]
async fn retention_forgets_old_records_of_sealed_channels_too() {
    let (folder, clock, key) = (tempfile::tempdir().expect("a folder"), clock(), key("a"));
    let options = LogOptions { retention: Some(DAY), ..LogOptions::default() };
    let log = LogChannels::open(folder.path(), options, Arc::new(clock.clone())).expect("opens");
    log.append(&key, many(700)).await.expect("appends");
    clock.advance(DAY);
    log.append(&key, many(2)).await.expect("appends");
    let closure = Closure { at: Timestamp::from_millis(1), reason: None };
    log.seal(&key.session, closure.into()).await.expect("seals");
    log.sweep().await.expect("sweeps");
    assert_eq!(log.bounds(&key).await.expect("bounds").earliest, 0);
    clock.advance(Duration::from_millis(1));
    log.sweep().await.expect("sweeps");
    assert_eq!(log.bounds(&key).await.expect("bounds").earliest, 700);
    drop(log);
    // The two, and what tells of the close in both main channels.
    assert_eq!(rows(folder.path(), "records"), 4);
}

#[tokio::test]
async fn a_part_id_is_known_for_a_day_or_until_its_record_is_trimmed() {
    let (folder, clock, key) = (tempfile::tempdir().expect("a folder"), clock(), key("a"));
    let log = open(folder.path(), &clock);
    log.append(&key, part("old", "a")).await.expect("appends");
    clock.advance(2 * DAY);
    assert!(log.append(&key, part("old", "a")).await.expect("repeats").repeated);
    log.append(&key, part("young", "b")).await.expect("appends");
    log.append(&key, command(Command::Trim(u64::MAX))).await.expect("trims");
    log.sweep().await.expect("sweeps");
    assert!(!log.append(&key, part("old", "a")).await.expect("appends").repeated);
    assert!(log.append(&key, part("young", "b")).await.expect("repeats").repeated);
    clock.advance(DAY);
    log.sweep().await.expect("sweeps");
    assert!(!log.append(&key, part("young", "b")).await.expect("appends").repeated);
    drop(log);
    assert_eq!((rows(folder.path(), "parts"), rows(folder.path(), "expiries")), (2, 0));
}

#[tokio::test]
async fn a_window_lives_as_long_as_its_followers() {
    let (folder, clock, key) = (tempfile::tempdir().expect("a folder"), clock(), key("a"));
    let log = open(folder.path(), &clock);
    let mut one = log.follow(&key, ReadStart::SeqNum(0), &ample_budget()).await.expect("follows");
    let two = log.follow(&key, ReadStart::SeqNum(0), &ample_budget()).await.expect("follows");
    one.next().await.expect("caught up").expect("no fault");
    drop(two);
    assert_eq!(log.followed_channels(), 1);
    drop(one);
    assert_eq!(log.followed_channels(), 0);
}

#[tokio::test]
async fn metered_ends_count_every_byte_ever_appended() {
    let (folder, clock, key) = (tempfile::tempdir().expect("a folder"), clock(), key("a"));
    let log = open(folder.path(), &clock);
    log.append(&key, AppendInput::new(vec![NewRecord::data("12"), NewRecord::data("1234")]).expect("fits"))
        .await
        .expect("appends");
    log.append(&key, command(Command::Trim(2))).await.expect("trims");
    let header = NewRecord { headers: vec![("a".into(), "bc".into())], ..NewRecord::data("d") };
    log.append(&key, AppendInput::one(header).expect("fits")).await.expect("appends");
    let batch = log.read(&key, ReadStart::SeqNum(0), ReadLimit::BATCH).await.expect("reads");
    let ends: Vec<_> = batch.records.iter().map(|record| record.metered_end).collect();
    assert_eq!(ends, [22 + 22, 22 + 22 + 14]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_was_forgotten_in_memory_is_read_again() {
    let (folder, clock, key) = (tempfile::tempdir().expect("a folder"), clock(), key("first"));
    let log = open(folder.path(), &clock);
    log.append(&key, part("p", "a")).await.expect("appends");
    for round in 0..17 {
        let keys: Vec<_> = (0..1000).map(|index| self::key(&format!("{round}x{index}"))).collect();
        for answer in join_all(keys.iter().map(|key| log.append(key, many(1)))).await {
            assert_eq!(answer.expect("appends").start.seq_num, 0);
        }
    }
    assert!(log.append(&key, part("p", "a")).await.expect("repeats").repeated);
    assert_eq!(log.append(&key, many(1)).await.expect("appends").start.seq_num, 1);
}
