//! The use cases over the real adapters, for what no route can show: control records, commands, settled turns, races.

mod background;
mod records;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sessiond::auth::keys::NewEnvironment;
use sessiond::config::{Config, Overrides};
use sessiond::domain::record::Command;
use sessiond::domain::tenant::EnvironmentKind;
use sessiond::domain::timer::Timers;
use sessiond::domain::{
    AppendInput, Backends, Caller, CallerKind, ChannelAddress, Clock, CreateSession, Direction, Error,
    Follow, FollowEvent, FollowOptions, KeyId, MetadataStore, NewRecord, NewSession, ReadStart, Scopes,
    SessionRef, Sessions, SessionsConfig, TestClock,
};
use sessiond::server::Control;
use sessiond::store::blob::ObjectBlobs;
use sessiond::store::channel::log::{LogChannels, LogOptions};
use sessiond::store::index::sql::SqlIndex;
use sessiond::store::metadata::SqlMetadata;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::harness::ample_budget;
use crate::harness::server::START;

struct Core {
    sessions: Arc<Sessions>,
    clock: TestClock,
    timers: Arc<Timers>,
    stopping: CancellationToken,
    store: Arc<dyn MetadataStore>,
    root: Caller,
    address: SessionRef,
    out: ChannelAddress,
    _data: TempDir,
}

impl Core {
    async fn open() -> Self {
        Self::open_with(|_| {}).await
    }

    /// On other backends.
    async fn open_with(change: impl FnOnce(&mut Backends)) -> Self {
        let data = tempfile::tempdir().expect("a folder");
        let test_clock = TestClock::at(START);
        let clock: Arc<dyn Clock> = Arc::new(test_clock.clone());
        let overrides = Overrides { data: Some(data.path().to_path_buf()), ..Overrides::default() };
        let config = Config::load(&overrides).expect("valid settings");
        let control = Control::open(&config, clock.clone()).await.expect("the control plane");
        let new = NewEnvironment {
            organization: "o".to_owned(),
            project: "p".to_owned(),
            slug: "e".to_owned(),
            kind: EnvironmentKind::Development,
        };
        let (environment, key) = control.keys().create_environment(new, None).await.expect("an environment");
        let log = LogChannels::open(config.log_dir(), LogOptions::default(), clock.clone()).expect("a log");
        let (timers, stopping) = (Timers::new(clock.clone()), CancellationToken::new());
        let mut backends = Backends {
            store: control.store.clone(),
            waitpoints: control.store.clone(),
            channels: Arc::new(log),
            index: Arc::new(SqlIndex::new(SqlMetadata::clone(&control.store))),
            blobs: Arc::new(ObjectBlobs::folder(&config.blobs_dir()).expect("a folder of blobs")),
            timers: timers.clone(),
            background: Arc::default(),
            clock,
            stopping: stopping.clone(),
        };
        change(&mut backends);
        let sessions = Sessions::new(backends, SessionsConfig::default());
        let root = Caller {
            signed_with: None,
            environment: environment.id,
            kind: CallerKind::Root,
            key: key.key.id,
            expires_at: None,
            revoked: CancellationToken::new(),
        };
        let session = NewSession {
            kind: "chat".to_owned(),
            task_identifier: "agent".to_owned(),
            external_id: Some("s".to_owned()),
            ..NewSession::default()
        };
        let create = CreateSession { session, request_key: None };
        let created = sessions.create(&root, create).await.expect("a session");
        let address = created.session.canonical_ref();
        let out = ChannelAddress::main(Direction::Out);
        let store = control.store.clone();
        Self { sessions, clock: test_clock, timers, stopping, store, root, address, out, _data: data }
    }

    fn public(&self, scopes: &[&str]) -> Caller {
        let scopes = Scopes::new(scopes.iter().map(|scope| (*scope).to_owned()).collect());
        Caller { kind: CallerKind::Public(scopes), key: KeyId::from_stored("key_x"), ..self.root.clone() }
    }

    async fn append(
        &self,
        caller: &Caller,
        channel: &ChannelAddress,
        record: NewRecord,
    ) -> Result<u64, Error> {
        let input = AppendInput::one(record)?;
        Ok(self.sessions.append(caller, &self.address, channel, input).await?.start.seq_num)
    }

    async fn is_settled(&self) -> bool {
        let options =
            FollowOptions { start: ReadStart::SeqNum(0), peek_settled: true, require_complete: false };
        let mut follow = self
            .sessions
            .follow(&self.root, &self.address, &self.out, options, &ample_budget())
            .await
            .expect("a follower");
        let settled = follow.is_settled();
        if settled {
            let soon = START.plus(Duration::from_secs(5));
            while !matches!(follow.next(soon).await.expect("an event"), FollowEvent::Settled) {}
        }
        settled
    }
}

/// The sequence numbers that a follower gives out until something else comes, asked with a deadline that has passed.
async fn drained(follow: &mut Follow) -> (Vec<u64>, FollowEvent) {
    let mut seen = Vec::new();
    loop {
        match follow.next(START).await.expect("an event") {
            FollowEvent::Batch(batch) => {
                seen.extend(batch.records.iter().map(|record| record.position.seq_num));
            }
            FollowEvent::CaughtUp(_) => {}
            other => return (seen, other),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_does_not_cut_a_slow_reader_off_from_what_is_stored() {
    let core = Core::open().await;
    for _ in 0..4 {
        core.append(&core.root, &core.out, NewRecord::data(vec![b'x'; 700_000])).await.expect("appended");
    }
    let options = FollowOptions { start: ReadStart::SeqNum(0), peek_settled: false, require_complete: false };
    let mut follow = core
        .sessions
        .follow(&core.root, &core.address, &core.out, options, &ample_budget())
        .await
        .expect("a follower");
    let (seen, end) = drained(&mut follow).await;
    assert_eq!(seen, [0, 1, 2, 3]);
    assert!(matches!(end, FollowEvent::Reached), "{end:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expiry_waits_until_a_follower_that_fell_behind_has_everything() {
    let core = Core::open().await;
    let session = NewSession {
        kind: "chat".to_owned(),
        task_identifier: "agent".to_owned(),
        external_id: Some("short".to_owned()),
        expires_at: Some(START.plus(Duration::from_secs(60))),
        ..NewSession::default()
    };
    let created = core.sessions.create(&core.root, CreateSession { session, request_key: None }).await;
    let address = created.expect("a session").session.canonical_ref();
    let options = FollowOptions { start: ReadStart::SeqNum(0), peek_settled: false, require_complete: false };
    let mut follow = core
        .sessions
        .follow(&core.root, &address, &core.out, options, &ample_budget())
        .await
        .expect("a follower");
    let soon = START.plus(Duration::from_secs(5));
    assert!(matches!(follow.next(soon).await.expect("an event"), FollowEvent::CaughtUp(_)));
    // More than the live window holds, so that the follower must go back to the store.
    for _ in 0..3 {
        let input = AppendInput::one(NewRecord::data(vec![b'x'; 100_000])).expect("fits");
        core.sessions.append(&core.root, &address, &core.out, input).await.expect("appended");
    }
    core.clock.advance(Duration::from_secs(61));
    let (seen, end) = drained(&mut follow).await;
    assert_eq!(seen, [0, 1, 2]);
    assert!(matches!(end, FollowEvent::Expired(_)), "{end:?}");
}

fn with_header(name: &'static str, value: &'static str) -> NewRecord {
    NewRecord { headers: vec![(Bytes::from(name), Bytes::from(value))], ..NewRecord::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_is_settled_when_its_last_record_that_is_no_command_says_so() {
    let core = Core::open().await;
    assert!(!core.is_settled().await, "an empty channel");
    core.append(&core.root, &core.out, NewRecord::data("one")).await.expect("appended");
    assert!(!core.is_settled().await, "data at the end");
    let turn = core.append(&core.root, &core.out, with_header("trigger-control", "turn-complete")).await;
    assert_eq!(turn.expect("appended"), 1);
    assert!(core.is_settled().await);
    for _ in 0..40 {
        core.append(&core.root, &core.out, Command::Trim(1).into_record()).await.expect("trimmed");
    }
    assert!(core.is_settled().await, "however many commands hide it");
    core.append(&core.root, &core.out, with_header("trigger-control", "upgrade-required"))
        .await
        .expect("appended");
    assert!(!core.is_settled().await, "another kind of control record");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_is_not_settled_when_another_one_has_been_asked_for_since() {
    let core = Core::open().await;
    let input = ChannelAddress::main(Direction::In);
    let send = async |body: &str| {
        let body = serde_json::json!({"data": body, "id": "p"}).to_string();
        core.append(&core.root, &input, NewRecord::data(body)).await.expect("appended")
    };
    let complete = async |seen: u64| {
        let mut record = with_header("trigger-control", "turn-complete");
        record.headers.push((Bytes::from("session-in-event-id"), Bytes::from(seen.to_string())));
        core.append(&core.root, &core.out, record).await.expect("appended");
    };
    let first = send(r#"{"kind":"message","payload":{"trigger":"submit-message"}}"#).await;
    complete(first).await;
    assert!(core.is_settled().await, "it has seen all there is");
    send(r#"{"kind":"stop"}"#).await;
    send(r#"{"kind":"message","payload":{"trigger":"action"}}"#).await;
    send(r#"{"kind":"message","payload":{"trigger":"close"}}"#).await;
    send("message").await;
    assert!(core.is_settled().await, "nobody has asked for a turn");
    let second = send(r#"{"kind":"message","payload":{"trigger":"submit-message"}}"#).await;
    assert!(!core.is_settled().await, "it has not seen the last message");
    complete(second).await;
    assert!(core.is_settled().await);
    let written = r#"{"data":{"kind":"message","payload":{}},"id":"q"}"#;
    core.append(&core.root, &input, NewRecord::data(written)).await.expect("appended");
    assert!(!core.is_settled().await, "nor one that was written as a value");
    core.append(&core.root, &core.out, with_header("trigger-control", "turn-complete"))
        .await
        .expect("appended");
    assert!(core.is_settled().await, "a turn that does not say what it has seen");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trim_hides_what_is_below_it_from_every_reader_at_once() {
    let core = Core::open().await;
    for body in ["a", "b", "c"] {
        core.append(&core.root, &core.out, NewRecord::data(body)).await.expect("appended");
    }
    core.append(&core.root, &core.out, Command::Trim(2).into_record()).await.expect("trimmed");
    let bounds = core.sessions.bounds(&core.root, &core.address, &core.out).await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.tail.seq_num), (2, 4));
    let options = FollowOptions { start: ReadStart::SeqNum(0), peek_settled: false, require_complete: false };
    let mut follow = core
        .sessions
        .follow(&core.root, &core.address, &core.out, options, &ample_budget())
        .await
        .expect("a follower");
    match follow.next(START.plus(Duration::from_secs(5))).await.expect("an event") {
        FollowEvent::Batch(batch) => assert_eq!(batch.records[0].position.seq_num, 2),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_public_caller_only_appends_and_cannot_forge_an_order() {
    let core = Core::open().await;
    let public = core.public(&["write:sessions:s", "read:sessions:s", "admin"]);
    let input = ChannelAddress::main(Direction::In);
    for record in [
        Command::Trim(0).into_record(),
        Command::Fence("mine".to_owned()).into_record(),
        with_header("trigger-control", "turn-complete"),
        with_header("Trigger-Control", "session-closed"),
    ] {
        let refused = core.append(&public, &input, record.clone()).await;
        assert!(matches!(refused, Err(Error::Denied(_))), "{record:?}: {refused:?}");
    }
    let refused = core.append(&public, &core.out, NewRecord::data("x")).await;
    assert!(matches!(refused, Err(Error::Denied(_))), "{refused:?}");
    let bounds = core.sessions.bounds(&core.root, &core.address, &input).await.expect("bounds");
    assert_eq!(bounds.tail.seq_num, 0, "nothing was stored");
    assert_eq!(core.append(&public, &input, NewRecord::data("x")).await.expect("appended"), 0);
}
