//! Sessions found together, and as they change.

use sessiond::domain::session::SharedSession;
use sessiond::domain::watch::{Watch, WatchEvent};
use sessiond::domain::{ExternalId, Filter, Session, SessionId, SessionPatch, Status};

use super::*;
use crate::harness::database::environment;

fn named(name: &str) -> NewSession {
    NewSession {
        kind: "chat".to_owned(),
        task_identifier: "agent".to_owned(),
        external_id: Some(name.to_owned()),
        ..NewSession::default()
    }
}

fn address(name: &str) -> SessionRef {
    SessionRef::External(ExternalId::parse(name).expect("an external id"))
}

fn tagged(tag: &str) -> SessionPatch {
    SessionPatch { tags: Some(vec![tag.to_owned()]), ..SessionPatch::default() }
}

impl Core {
    async fn create(&self, session: NewSession) -> Session {
        let create = CreateSession { session, request_key: None };
        self.sessions.create(&self.root, create).await.expect("a session").session
    }

    async fn update(&self, patch: SessionPatch) -> Session {
        self.sessions.update(&self.root, &self.address, patch).await.expect("updated")
    }

    async fn watch(&self, caller: &Caller, address: &SessionRef) -> Watch {
        self.sessions.watch(caller, address).await.expect("a watch")
    }
}

async fn event(watch: &mut Watch) -> Result<WatchEvent, Error> {
    tokio::time::timeout(Duration::from_secs(20), watch.next())
        .await
        .expect("an event before the test gives up")
}

async fn shown(watch: &mut Watch) -> SharedSession {
    match event(watch).await {
        Ok(WatchEvent::Session(session)) => session,
        other => panic!("expected a session, got {other:?}"),
    }
}

async fn ended(watch: &mut Watch) {
    for _ in 0..2 {
        let end = event(watch).await;
        assert!(matches!(end, Ok(WatchEvent::Ended)), "{end:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_sessions_come_in_the_order_asked_and_hidden_ones_look_missing() {
    let core = Core::open().await;
    let a = core.create(named("a")).await.id;
    let b = core.create(named("b")).await.id;
    let missing = SessionId::generate(START);
    core.sessions.get(&core.root, &SessionRef::Id(b.clone())).await.expect("cached");
    let asked = [b.clone(), missing, a.clone(), b.clone()];
    for (caller, seen) in [
        (core.root.clone(), [Some(&b), None, Some(&a), Some(&b)]),
        (core.public(&["read:sessions:a"]), [None, None, Some(&a), None]),
        (core.public(&["write:sessions"]), [None; 4]),
    ] {
        let found = core.sessions.get_many(&caller, &asked).await.expect("answers");
        let found: Vec<_> = found.iter().map(|session| session.as_ref().map(|session| &session.id)).collect();
        assert_eq!(found, seen, "{caller:?}");
    }
    let many: Vec<_> = (0..500).map(|_| SessionId::generate(START)).chain([a.clone()]).collect();
    let found = core.sessions.get_many(&core.root, &many).await.expect("answers");
    assert_eq!(found.iter().filter(|session| session.is_some()).count(), 1);
    assert_eq!(found[500].as_ref().map(|session| &session.id), Some(&a));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_missing_is_none_and_one_out_of_reach_is_denied() {
    let core = Core::open().await;
    let none = core.sessions.find(&core.root, &address("none")).await.expect("answers");
    assert!(none.is_none());
    let reader = core.public(&["read:sessions:s"]);
    assert!(core.sessions.find(&reader, &core.address).await.expect("answers").is_some());
    for name in ["none", "s"] {
        let writer = core.public(&["write:sessions"]);
        let refused = core.sessions.find(&writer, &address(name)).await;
        assert!(matches!(refused, Err(Error::Denied(_))), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_shows_the_session_then_its_changes_and_ends_with_its_close() {
    let core = Core::open().await;
    let mut watch = core.watch(&core.root, &core.address).await;
    assert!(shown(&mut watch).await.tags.is_empty());
    for tag in ["one", "two"] {
        core.create(named(tag)).await;
        core.update(tagged(tag)).await;
        assert_eq!(shown(&mut watch).await.tags, [tag]);
    }
    core.sessions.close(&core.root, &core.address, Some("done".to_owned()), None).await.expect("closed");
    core.sessions
        .close(&core.root, &core.address, Some("again".to_owned()), None)
        .await
        .expect("closed before");
    let last = shown(&mut watch).await;
    assert_eq!(last.closed.as_ref().and_then(|closed| closed.reason.as_deref()), Some("done"));
    core.update(tagged("a note")).await;
    ended(&mut watch).await;
    let mut late = core.watch(&core.root, &core.address).await;
    assert_eq!(shown(&mut late).await.tags, ["a note"]);
    ended(&mut late).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_of_an_external_id_waits_until_a_session_has_it() {
    let core = Core::open().await;
    let reader = core.public(&["read:sessions:later"]);
    let mut watch = core.watch(&reader, &address("later")).await;
    let waits = tokio::time::timeout(Duration::ZERO, watch.next()).await;
    assert!(waits.is_err(), "{waits:?}");
    core.create(named("another")).await;
    let later = core.create(named("later")).await;
    core.sessions.update(&core.root, &address("later"), tagged("changed")).await.expect("updated");
    let mut last = shown(&mut watch).await;
    while last.tags.is_empty() {
        last = shown(&mut watch).await;
    }
    assert_eq!(last.id, later.id);
    let unknown = SessionRef::Id(SessionId::generate(START));
    let refused = core.sessions.watch(&core.root, &unknown).await;
    assert!(matches!(refused, Err(Error::NotFound(_))), "{refused:?}");
    let refused = core.sessions.watch(&reader, &core.address).await;
    assert!(matches!(refused, Err(Error::Denied(_))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_shows_that_its_session_has_expired_and_ends() {
    let core = Core::open().await;
    let expires_at = Some(START.plus(Duration::from_secs(60)));
    core.create(NewSession { expires_at, ..named("brief") }).await;
    let mut watch = core.watch(&core.root, &address("brief")).await;
    assert_eq!(shown(&mut watch).await.status(START), Status::Active);
    core.clock.advance(Duration::from_secs(60));
    core.timers.wake_all();
    assert_eq!(shown(&mut watch).await.status(core.clock.now()), Status::Expired);
    ended(&mut watch).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_ends_with_its_credentials_and_with_the_server() {
    let core = Core::open().await;
    let revoked = Caller { revoked: CancellationToken::new(), ..core.public(&["read:sessions"]) };
    let expires_at = Some(START.plus(Duration::from_secs(60)));
    let brief = Caller { expires_at, ..core.public(&["read:sessions"]) };
    let mut watches = Vec::new();
    for caller in [&revoked, &brief, &core.root] {
        let mut one = core.watch(caller, &core.address).await;
        shown(&mut one).await;
        watches.push([one, core.sessions.watch_list(caller, Filter::default()).expect("a watch")]);
    }
    let [of_revoked, of_brief, of_root] = watches.try_into().expect("three callers");
    revoked.revoked.cancel();
    core.timers.wake_all();
    for mut watch in of_revoked {
        let end = event(&mut watch).await;
        assert!(matches!(end, Err(Error::Unauthenticated(_))), "{end:?}");
    }
    core.clock.advance(Duration::from_secs(60));
    core.timers.wake_all();
    for mut watch in of_brief {
        let end = event(&mut watch).await;
        assert!(matches!(end, Err(Error::Unauthenticated(_))), "{end:?}");
    }
    core.stopping.cancel();
    core.timers.wake_all();
    for mut watch in of_root {
        let end = event(&mut watch).await;
        assert!(matches!(end, Ok(WatchEvent::Stopping)), "{end:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watched_list_gives_the_sessions_that_match_when_they_change() {
    let core = Core::open().await;
    let filter = Filter { tags_any: vec!["mine".to_owned()], ..Filter::default() };
    let mut watch = core.sessions.watch_list(&core.root, filter).expect("a watch");
    core.create(named("other")).await;
    let new = core.create(NewSession { tags: vec!["mine".to_owned()], ..named("new") }).await;
    assert_eq!(shown(&mut watch).await.id, new.id);
    core.update(tagged("theirs")).await;
    let changed = core.update(tagged("mine")).await;
    assert_eq!(*shown(&mut watch).await, changed);
    core.sessions.close(&core.root, &core.address, None, None).await.expect("closed");
    assert!(shown(&mut watch).await.closed.is_some());
    let refused = core.sessions.watch_list(&core.public(&["read:sessions:s"]), Filter::default());
    assert!(matches!(refused, Err(Error::Denied(_))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_sees_nothing_of_another_environment() {
    let core = Core::open().await;
    let other = environment("env_elsewhere", "main", "elsewhere");
    core.store.create_environment(other.clone()).await.expect("an environment");
    let elsewhere = Caller { environment: other.id, ..core.root.clone() };
    let mut list = core.sessions.watch_list(&core.root, Filter::default()).expect("a watch");
    let mut one = core.watch(&core.root, &core.address).await;
    shown(&mut one).await;
    let create = CreateSession { session: named("s"), request_key: None };
    core.sessions.create(&elsewhere, create).await.expect("a session of the same name");
    let ours = core.update(tagged("ours")).await;
    assert_eq!(shown(&mut list).await.id, ours.id);
    assert_eq!(shown(&mut one).await.id, ours.id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_updates_race_a_watch_never_goes_back_and_ends_up_with_the_last() {
    let core = Core::open().await;
    let mut one = core.watch(&core.root, &core.address).await;
    let mut list = core.sessions.watch_list(&core.root, Filter::default()).expect("a watch");
    let updates = (0..4).map(|writer| {
        let (sessions, root, address) = (core.sessions.clone(), core.root.clone(), core.address.clone());
        tokio::spawn(async move {
            for n in 0..25 {
                let patch = tagged(&format!("{writer}.{n}"));
                sessions.update(&root, &address, patch).await.expect("updated");
            }
        })
    });
    for task in updates.collect::<Vec<_>>() {
        task.await.expect("no fault");
    }
    let last = core.sessions.get(&core.root, &core.address).await.expect("is there");
    for watch in [&mut one, &mut list] {
        let mut seen = shown(watch).await;
        while *seen != *last {
            let next = shown(watch).await;
            assert!(next.is_newer_than(&seen), "{next:?} after {seen:?}");
            seen = next;
        }
        let more = tokio::time::timeout(Duration::ZERO, watch.next()).await;
        assert!(more.is_err(), "{more:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_missed_changes_shows_the_newest_row_and_a_list_must_be_read_anew() {
    let core = Core::open().await;
    let mut one = core.watch(&core.root, &core.address).await;
    shown(&mut one).await;
    let mut list = core.sessions.watch_list(&core.root, Filter::default()).expect("a watch");
    let mut last = core.update(tagged("first")).await;
    for n in 0..1100 {
        last = core.update(tagged(&n.to_string())).await;
    }
    assert_eq!(*shown(&mut one).await, last);
    let after = core.update(tagged("after")).await;
    assert_eq!(*shown(&mut one).await, after);
    let lost = event(&mut list).await;
    assert!(matches!(lost, Err(Error::Unavailable { .. })), "{lost:?}");
}
