//! A fault of ours while a wait is being ended.

use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use sessiond::domain::Timestamp;
use sessiond::domain::port::{Registered, Waitpoints};
use sessiond::domain::waitpoint::{WaitpointCursor, WaitpointPage, WaitpointPageRequest};
use sessiond::domain::{
    Awaited, Completion, EnvironmentId, NewWaitpoint, Outcome, Waitpoint, WaitpointFilter, WaitpointId,
};

use super::*;

/// Panics instead of writing a completion, once.
struct Faulty {
    waitpoints: Arc<dyn Waitpoints>,
    armed: Arc<AtomicBool>,
}

#[async_trait]
impl Waitpoints for Faulty {
    async fn create_waitpoint(&self, waitpoint: Waitpoint, now: Timestamp) -> Result<Registered, Error> {
        self.waitpoints.create_waitpoint(waitpoint, now).await
    }

    async fn find_waitpoint(
        &self,
        environment: &EnvironmentId,
        id: &WaitpointId,
    ) -> Result<Option<Waitpoint>, Error> {
        self.waitpoints.find_waitpoint(environment, id).await
    }

    async fn complete_waitpoint(
        &self,
        environment: &EnvironmentId,
        id: &WaitpointId,
        completion: &Completion,
    ) -> Result<Option<Waitpoint>, Error> {
        assert!(!self.armed.swap(false, Ordering::SeqCst), "a fault of ours");
        self.waitpoints.complete_waitpoint(environment, id, completion).await
    }

    async fn list_waitpoints(
        &self,
        environment: &EnvironmentId,
        filter: &WaitpointFilter,
        page: &WaitpointPageRequest,
    ) -> Result<WaitpointPage, Error> {
        self.waitpoints.list_waitpoints(environment, filter, page).await
    }

    async fn open_waitpoints(
        &self,
        after: Option<&WaitpointCursor>,
        limit: usize,
    ) -> Result<Vec<Waitpoint>, Error> {
        self.waitpoints.open_waitpoints(after, limit).await
    }

    async fn completed_among(&self, ids: &[WaitpointId]) -> Result<Vec<WaitpointId>, Error> {
        self.waitpoints.completed_among(ids).await
    }
}

#[tokio::test]
async fn a_panic_while_a_wait_is_ended_leaves_the_waits_of_its_channel_to_the_next_look() {
    let armed = Arc::new(AtomicBool::new(true));
    let fault = armed.clone();
    let core = Core::open_with(|backends| {
        backends.waitpoints = Arc::new(Faulty { waitpoints: backends.waitpoints.clone(), armed: fault });
    })
    .await;
    let new = NewWaitpoint {
        run: None,
        session: core.address.clone(),
        direction: Direction::In,
        after: None,
        timeout_at: None,
        tags: Vec::new(),
        idempotency_key: None,
        key_expires_at: None,
    };
    let wait = core.sessions.create_waitpoint(&core.root, new).await.expect("a wait").waitpoint;
    let input = ChannelAddress::main(Direction::In);
    let record = NewRecord { body: Bytes::from_static(b"{}"), ..NewRecord::default() };
    core.append(&core.root, &input, record).await.expect("appended");

    // Whoever awaits it may have met the turn that failed; then the next beat takes another.
    let beats = tokio::spawn(core.sessions.clone().end_waits());
    let awaited = core.sessions.await_waitpoint(&core.root, &wait.id, START.plus(Duration::from_secs(60)));
    let awaited = tokio::time::timeout(Duration::from_secs(20), awaited).await;
    let awaited = awaited.expect("it ends before the test gives up").expect("no error");
    assert!(!armed.load(Ordering::SeqCst), "the fault was met");
    let Awaited::Completed(waitpoint) = awaited else { panic!("{awaited:?}") };
    assert_eq!(waitpoint.completion.map(|completion| completion.outcome), Some(Outcome::Record(0)));

    core.stopping.cancel();
    beats.await.expect("it ends");

    let degraded = core.sessions.ready().await.expect("ready");
    assert!(degraded.iter().any(|trouble| trouble.contains("ending of waits")), "{degraded:?}");
}
