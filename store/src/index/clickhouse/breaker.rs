//! [`Breaker`]: while ClickHouse says nothing, lists do not wait for it.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use super::client::Fault;
use sessiond_domain::Background;
use sessiond_domain::error::{Error, Result};

/// Pause between two probes of a server that is silent.
const PAUSE: Duration = Duration::from_secs(1);
/// A query whose caller has left after this long leaves a doubt behind.
const DOUBTFUL: Duration = Duration::from_secs(1);
/// Queries that may be under way at once. One takes both cores of a small server.
const QUERIES_MAX: usize = 16;

/// Asks the smallest question there is, in a short time.
pub(super) type Probe = Arc<dyn Fn() -> BoxFuture<'static, Result<(), Fault>> + Send + Sync>;

/// Lets queries through while the server answers. Once one has met silence (a refused connection, a timeout) the others are
/// refused at once, until a probe is answered. So a query that is too large costs the others one probe, and nobody's query
/// has to try.
pub(super) struct Breaker {
    shared: Arc<Shared>,
    places: Semaphore,
    /// Longest a query may wait for its place.
    patience: Duration,
}

struct Shared {
    state: Mutex<State>,
    probe: Probe,
    background: Arc<Background>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    silent: bool,
    /// A task asks the server.
    probing: bool,
}

/// A query under way.
struct Running<'a> {
    breaker: &'a Breaker,
    since: Instant,
    ended: bool,
}

impl Breaker {
    pub(super) fn new(patience: Duration, probe: Probe, background: Arc<Background>) -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), probe, background });
        Self { shared, places: Semaphore::new(QUERIES_MAX), patience }
    }

    /// Runs `work` once there is a place for it, or refuses.
    pub(super) async fn run<T>(&self, work: impl Future<Output = Result<T, Fault>>) -> Result<T> {
        // Before the queue and after it: what the server did meanwhile counts.
        self.require_answering()?;
        let place = tokio::time::timeout(self.patience, self.places.acquire()).await;
        let _place = place.map_err(|_| away())?.map_err(Error::internal)?;
        self.run_at_once(work).await
    }

    /// Runs `work` beside all others, for what is small.
    pub(super) async fn run_at_once<T>(&self, work: impl Future<Output = Result<T, Fault>>) -> Result<T> {
        self.require_answering()?;
        let running = Running { breaker: self, since: Instant::now(), ended: false };
        let done = work.await;
        running.end(done.as_ref().err());
        Ok(done?)
    }

    /// Refuses until a probe is answered.
    pub(super) fn silence(&self, fault: &Fault) {
        if !std::mem::replace(&mut self.shared.state().silent, true) {
            tracing::warn!(
                error = fault as &dyn std::error::Error,
                "ClickHouse does not answer; lists do not wait for it"
            );
        }
        self.probe();
    }

    /// Sends a probe, whose answer decides.
    pub(super) fn probe(&self) {
        // A caller may be dropped with the runtime.
        if Handle::try_current().is_err() || std::mem::replace(&mut self.shared.state().probing, true) {
            return;
        }
        let (shared, probe) = (Arc::downgrade(&self.shared), self.shared.probe.clone());
        let background = self.shared.background.clone();
        tokio::spawn(async move {
            let begin = || probe_until_answered(shared.clone(), probe.clone());
            background.survived("probe of ClickHouse", begin).await;
        });
    }

    fn require_answering(&self) -> Result<()> {
        if self.shared.state().silent { Err(away()) } else { Ok(()) }
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a probe has found out.
    fn heard(&self, answered: bool) {
        let mut state = self.state();
        let was_silent = std::mem::replace(&mut state.silent, !answered);
        state.probing = !answered;
        if answered && was_silent {
            tracing::info!("ClickHouse answers");
        }
    }
}

/// Ends with an answer, or with the breaker.
async fn probe_until_answered(shared: Weak<Shared>, probe: Probe) {
    loop {
        let answered = !probe().await.as_ref().is_err_and(Fault::is_silence);
        match shared.upgrade() {
            Some(shared) => shared.heard(answered),
            None => return,
        }
        if answered {
            return;
        }
        sleep(PAUSE).await;
    }
}

fn away() -> Error {
    Error::Unavailable { what: "the list index", source: None }
}

impl Running<'_> {
    fn end(mut self, fault: Option<&Fault>) {
        self.ended = true;
        if let Some(fault) = fault.filter(|fault| fault.is_silence()) {
            self.breaker.silence(fault);
        }
    }
}

impl Drop for Running<'_> {
    /// Callers may be less patient than we are, and all of them would wait for a server that is silent.
    fn drop(&mut self) {
        if !self.ended && self.since.elapsed() >= DOUBTFUL {
            self.breaker.probe();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    /// A breaker whose server answers probes while the flag is set, and how many it has met.
    fn breaker() -> (Breaker, Arc<AtomicBool>, Arc<AtomicUsize>) {
        let (answers, probes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (answering, count) = (answers.clone(), probes.clone());
        let probe: Probe = Arc::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
            let answer = if answering.load(Ordering::Relaxed) { Ok(()) } else { silence() };
            Box::pin(async { answer })
        });
        (Breaker::new(Duration::from_secs(5), probe, Arc::default()), answers, probes)
    }

    fn silence<T>() -> Result<T, Fault> {
        Err(Fault::TimedOut(Duration::ZERO))
    }

    async fn is_refused(breaker: &Breaker) -> bool {
        let asked = AtomicBool::new(false);
        let work = async {
            asked.store(true, Ordering::Relaxed);
            Ok(())
        };
        let refused = breaker.run(work).await.is_err();
        assert_ne!(refused, asked.load(Ordering::Relaxed));
        refused
    }

    #[tokio::test(start_paused = true)]
    async fn a_silence_refuses_all_until_a_probe_is_answered() {
        let (breaker, answers, probes) = breaker();
        assert!(breaker.run(async { silence::<()>() }).await.is_err());
        assert!(is_refused(&breaker).await);
        sleep(PAUSE * 3).await;
        assert!(is_refused(&breaker).await);
        assert!((3..=4).contains(&probes.load(Ordering::Relaxed)), "one probe a second");
        answers.store(true, Ordering::Relaxed);
        sleep(PAUSE).await;
        assert!(!is_refused(&breaker).await);
        let before = probes.load(Ordering::Relaxed);
        sleep(PAUSE * 3).await;
        assert_eq!(probes.load(Ordering::Relaxed), before, "nobody asks a server that answers");
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_that_the_server_tells_is_an_answer() {
        let (breaker, ..) = breaker();
        let refused = async {
            Err::<(), _>(Fault::from(clickhouse::error::Error::BadResponse(
                "Code: 241. DB::Exception".to_owned(),
            )))
        };
        assert!(breaker.run(refused).await.is_err());
        assert!(!is_refused(&breaker).await);
    }

    #[tokio::test(start_paused = true)]
    async fn callers_who_hang_up_before_we_do_do_not_hide_a_silence() {
        let (breaker, answers, _) = breaker();
        let impatient =
            |after| tokio::time::timeout(after, breaker.run(std::future::pending::<Result<(), Fault>>()));
        assert!(impatient(DOUBTFUL / 2).await.is_err());
        sleep(PAUSE).await;
        assert!(!is_refused(&breaker).await, "who leaves soon says nothing");
        assert!(impatient(DOUBTFUL * 2).await.is_err());
        sleep(PAUSE / 2).await;
        assert!(is_refused(&breaker).await, "the probe was not answered");
        answers.store(true, Ordering::Relaxed);
        sleep(PAUSE).await;
        assert!(!is_refused(&breaker).await);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_place_is_refused_once_the_server_is_silent() {
        let (breaker, ..) = breaker();
        let slow = || async {
            sleep(Duration::from_secs(1)).await;
            silence::<()>()
        };
        let all = futures_util::future::join_all((0..100).map(|_| breaker.run(slow())));
        let started = Instant::now();
        assert!(all.await.iter().all(Result::is_err));
        assert_eq!(
            started.elapsed(),
            Duration::from_secs(1),
            "the first sixteen waited, and nobody after them"
        );
    }
}
