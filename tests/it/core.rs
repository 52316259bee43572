//! The use cases over the real adapters, for what no route can show yet: control records, commands, settled turns.

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
    FollowEvent, FollowOptions, KeyId, NewRecord, NewSession, ReadStart, Scopes, SessionRef, Sessions,
    SessionsConfig, TestClock,
};
use sessiond::server::Control;
use sessiond::store::channel::log::{LogChannels, LogOptions};
use sessiond::store::index::sql::SqlIndex;
use sessiond::store::metadata::SqlMetadata;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::harness::server::START;

struct Core {
    sessions: Arc<Sessions>,
    root: Caller,
    address: SessionRef,
    out: ChannelAddress,
    _data: TempDir,
}

impl Core {
    async fn open() -> Self {
        let data = tempfile::tempdir().expect("a folder");
        let clock: Arc<dyn Clock> = Arc::new(TestClock::at(START));
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
        let backends = Backends {
            store: control.store.clone(),
            channels: Arc::new(log),
            index: Arc::new(SqlIndex::new(SqlMetadata::clone(&control.store))),
            timers: Timers::new(clock.clone()),
            clock,
            stopping: CancellationToken::new(),
        };
        let sessions = Sessions::new(backends, SessionsConfig::default());
        let root = Caller {
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
        Self { sessions, root, address, out: ChannelAddress::main(Direction::Out), _data: data }
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
        let mut follow =
            self.sessions.follow(&self.root, &self.address, &self.out, options).await.expect("a follower");
        let settled = follow.is_settled();
        if settled {
            let soon = START.plus(Duration::from_secs(5));
            while !matches!(follow.next(soon).await.expect("an event"), FollowEvent::Settled) {}
        }
        settled
    }
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
async fn a_trim_hides_what_is_below_it_from_every_reader_at_once() {
    let core = Core::open().await;
    for body in ["a", "b", "c"] {
        core.append(&core.root, &core.out, NewRecord::data(body)).await.expect("appended");
    }
    core.append(&core.root, &core.out, Command::Trim(2).into_record()).await.expect("trimmed");
    let bounds = core.sessions.bounds(&core.root, &core.address, &core.out).await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.tail.seq_num), (2, 4));
    let options = FollowOptions { start: ReadStart::SeqNum(0), peek_settled: false, require_complete: false };
    let mut follow =
        core.sessions.follow(&core.root, &core.address, &core.out, options).await.expect("a follower");
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
