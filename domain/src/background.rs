//! Tasks that nobody waits for. Each has a name; a panic of one is caught, logged and counted, and then the task is begun again,
//! or, where nothing can go on without it, the process is told to end.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::task::JoinHandle;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// Pause before a task that has failed is begun again for the first time. Every further one is twice as long.
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest such pause. A task that has run for so long is well again: its next pause is the first one.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Hears the name of a task that has failed.
type Listener = Box<dyn Fn(&'static str) + Send + Sync>;

/// Runs and watches the tasks of one server. Names come from the code alone, so that they may be labels of a metric.
pub struct Background {
    stop: CancellationToken,
    listener: Listener,
    faults: Mutex<BTreeMap<&'static str, Faults>>,
    /// What keeps tasks from their work that run all the same.
    hindrances: Mutex<BTreeMap<&'static str, &'static str>>,
    failed: OnceLock<&'static str>,
    ending: CancellationToken,
}

/// What is known of a task that has failed.
#[derive(Clone, Copy, Debug)]
struct Faults {
    count: u64,
    last: Instant,
}

/// Watches without a server: never stops, tells nobody.
impl Default for Background {
    fn default() -> Self {
        Self::new(CancellationToken::new(), |_| {})
    }
}

impl Background {
    /// Watches tasks until `stop` is cancelled, and tells `listener` of each that fails.
    pub fn new(stop: CancellationToken, listener: impl Fn(&'static str) + Send + Sync + 'static) -> Self {
        Self {
            stop,
            listener: Box::new(listener),
            faults: Mutex::default(),
            hindrances: Mutex::default(),
            failed: OnceLock::new(),
            ending: CancellationToken::new(),
        }
    }

    /// Runs a task for as long as the server runs. Whenever it fails, by a panic or because it ends before it was told to, it
    /// is begun again after a pause, of [`FIRST_PAUSE`] to [`LONGEST_PAUSE`]. What is returned completes when it has ended for
    /// good.
    pub fn keep<F>(
        self: &Arc<Self>,
        name: &'static str,
        begin: impl Fn() -> F + Send + 'static,
    ) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let this = self.clone();
        tokio::spawn(async move { this.repeated(name, begin, false).await })
    }

    /// Runs a task here until it has ended by itself, or the server stops. After a panic it is begun again, as by
    /// [`Background::keep`].
    pub async fn survived<F: Future<Output = ()>>(&self, name: &'static str, begin: impl Fn() -> F) {
        self.repeated(name, begin, true).await;
    }

    async fn repeated<F: Future<Output = ()>>(
        &self,
        name: &'static str,
        begin: impl Fn() -> F,
        may_end: bool,
    ) {
        let mut pause = FIRST_PAUSE;
        loop {
            let begun = Instant::now();
            let ended = self.caught(name, begin()).await.is_some();
            if self.stop.is_cancelled() || (ended && may_end) {
                return;
            }
            if ended {
                self.faulted(name);
            }
            if begun.elapsed() >= LONGEST_PAUSE {
                pause = FIRST_PAUSE;
            }
            tracing::warn!(task = name, ?pause, "a background task is begun again after a pause");
            if self.stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Runs a task without which the server must not go on: when it fails, by a panic or because it ends before it was told
    /// to, [`Background::failed`] completes. What is returned completes with the task.
    pub fn require(
        self: &Arc<Self>,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> JoinHandle<()> {
        let this = self.clone();
        tokio::spawn(async move {
            match this.caught(name, task).await {
                None => this.end(name),
                Some(()) if !this.stop.is_cancelled() => this.fatal(name),
                Some(()) => {}
            }
        })
    }

    /// Runs a task that ends by itself, of which there may be many at once. What is returned completes with the task, whether
    /// it has panicked or not.
    pub fn once(
        self: &Arc<Self>,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> JoinHandle<()> {
        let this = self.clone();
        tokio::spawn(async move {
            this.caught(name, task).await;
        })
    }

    /// Runs a piece of work here. `None` if it has panicked, which is logged and counted under `name`.
    pub fn caught<T>(
        &self,
        name: &'static str,
        work: impl Future<Output = T>,
    ) -> impl Future<Output = Option<T>> {
        // What the work shares with others it leaves behind locks that are taken whether they are poisoned or not. No async
        // block, which would keep room for the work twice.
        AssertUnwindSafe(work).catch_unwind().map(move |ended| {
            if ended.is_err() {
                self.faulted(name);
            }
            ended.ok()
        })
    }

    /// Says that a task has failed without which the server must not go on.
    pub fn fatal(&self, name: &'static str) {
        self.faulted(name);
        self.end(name);
    }

    fn end(&self, name: &'static str) {
        tracing::error!(task = name, "the server cannot go on without a task that has failed");
        // The first one counts.
        let _ = self.failed.set(name);
        self.ending.cancel();
    }

    /// Counts a failure of a task that is not run here. What it was about, the panic hook has logged.
    pub fn faulted(&self, name: &'static str) {
        let now = Instant::now();
        let count = {
            let mut faults = self.faults();
            let known = faults.entry(name).or_insert(Faults { count: 0, last: now });
            *known = Faults { count: known.count + 1, last: now };
            known.count
        };
        tracing::error!(task = name, count, "a background task has failed");
        (self.listener)(name);
    }

    /// Completes with the name of a task without which the server must not go on, when it has failed.
    pub async fn failed(&self) -> &'static str {
        self.ending.cancelled().await;
        self.has_failed().unwrap_or_default()
    }

    /// The name of a task without which the server must not go on, if one has failed.
    pub fn has_failed(&self) -> Option<&'static str> {
        self.failed.get().copied()
    }

    /// Says what keeps a task from its work though it runs, as a sentence that anyone may read; `None` if nothing does.
    pub fn hindered(&self, name: &'static str, sentence: Option<&'static str>) {
        let mut hindrances = self.hindrances.lock().unwrap_or_else(PoisonError::into_inner);
        match sentence {
            Some(sentence) => hindrances.insert(name, sentence),
            None => hindrances.remove(name),
        };
    }

    /// A sentence, which anyone may read, for each task that has failed within [`LONGEST_PAUSE`], or [is kept from its
    /// work](Background::hindered).
    pub fn troubles(&self) -> Vec<String> {
        let hindrances = self.hindrances.lock().unwrap_or_else(PoisonError::into_inner);
        let hindered = hindrances.values().map(|sentence| (*sentence).to_owned()).collect::<Vec<_>>();
        drop(hindrances);
        let faults = self.faults();
        let recent = faults.iter().filter(|(_, faults)| faults.last.elapsed() < LONGEST_PAUSE);
        let failed = recent.map(|(name, Faults { count, .. })| {
            let times = if *count == 1 { "once".to_owned() } else { format!("{count} times") };
            format!("the background task \"{name}\" has failed ({times} since the start); the log says why")
        });
        failed.chain(hindered).collect()
    }

    fn faults(&self) -> MutexGuard<'_, BTreeMap<&'static str, Faults>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background").field("faults", &*self.faults()).finish_non_exhaustive()
    }
}

/// Ticks, the first time at once, until it is told to stop. A tick that comes late moves those behind it.
#[derive(Debug)]
pub struct Ticker {
    beat: Interval,
    stop: CancellationToken,
}

impl Ticker {
    /// A tick every `period`, which is not zero.
    pub fn new(period: Duration, stop: CancellationToken) -> Self {
        let mut beat = tokio::time::interval(period);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { beat, stop }
    }

    /// Waits for the next tick; false when it is time to stop. Cancel safe.
    pub async fn tick(&mut self) -> bool {
        self.stop.run_until_cancelled(self.beat.tick()).await.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn background() -> (Arc<Background>, CancellationToken, Arc<AtomicU32>) {
        let (stop, heard) = (CancellationToken::new(), Arc::new(AtomicU32::new(0)));
        let count = heard.clone();
        let listener = move |name| {
            assert_eq!(name, "a task");
            count.fetch_add(1, Ordering::SeqCst);
        };
        (Arc::new(Background::new(stop.clone(), listener)), stop, heard)
    }

    /// Panics, without the compiler knowing that nothing comes behind it.
    fn panic_if(condition: bool) {
        assert!(!condition, "on purpose");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_begun_again_after_pauses_that_grow() {
        let (background, stop, heard) = background();
        let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
        background.keep("a task", move || {
            let begun = begun.clone();
            async move {
                begun.send(Instant::now()).expect("the test listens");
                panic_if(true);
            }
        });
        assert_eq!(background.troubles(), Vec::<String>::new());
        let mut at = begins.recv().await.expect("it begins");
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            let again = begins.recv().await.expect("it begins again");
            assert_eq!((again - at).as_secs(), pause);
            at = again;
        }
        tokio::task::yield_now().await;
        let [trouble] = &background.troubles()[..] else { panic!("{:?}", background.troubles()) };
        assert!(trouble.contains("a task") && trouble.contains("9 times"), "{trouble}");
        stop.cancel();
        assert_eq!(begins.recv().await, None, "it is not begun again when the server stops");
        assert_eq!(heard.load(Ordering::SeqCst), 9);
        tokio::time::advance(LONGEST_PAUSE).await;
        assert_eq!(background.troubles(), Vec::<String>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_has_run_for_long_is_well_again() {
        let (background, _stop, _) = background();
        let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
        let runs = Arc::new(AtomicU32::new(0));
        background.keep("a task", move || {
            let (begun, run) = (begun.clone(), runs.fetch_add(1, Ordering::SeqCst));
            async move {
                begun.send(Instant::now()).expect("the test listens");
                if run == 2 {
                    tokio::time::sleep(LONGEST_PAUSE).await;
                }
            }
        });
        // It ends without a panic before it is told to, which is no better.
        let mut at = begins.recv().await.expect("it begins");
        for apart in [FIRST_PAUSE, 2 * FIRST_PAUSE, LONGEST_PAUSE + FIRST_PAUSE, 2 * FIRST_PAUSE] {
            let again = begins.recv().await.expect("it begins again");
            assert_eq!(again - at, apart);
            at = again;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_required_task_that_fails_ends_the_server_and_one_that_was_told_to_end_does_not() {
        let (background, stop, heard) = background();
        let required = background.require("a task", async { panic_if(true) });
        assert_eq!(background.failed().await, "a task");
        required.await.expect("the panic is caught");
        assert_eq!(heard.load(Ordering::SeqCst), 1);

        let other = Arc::new(Background::new(stop.clone(), |_| {}));
        let told = stop.clone();
        let required = other.require("another", async move { told.cancelled().await });
        stop.cancel();
        required.await.expect("it ends");
        assert!(other.failed().now_or_never().is_none());

        let early = Arc::new(Background::default());
        drop(early.require("early", async {}));
        assert_eq!(early.failed().await, "early");
    }

    #[tokio::test]
    async fn a_panic_of_one_task_of_many_is_counted_and_whoever_waits_for_it_goes_on() {
        let (background, _stop, heard) = background();
        background.once("a task", async { panic_if(true) }).await.expect("the panic is caught");
        background.once("a task", async { panic_if(false) }).await.expect("it ends");
        assert_eq!(background.caught("a task", async { 3 }).await, Some(3));
        assert_eq!(heard.load(Ordering::SeqCst), 1);
        assert_eq!(background.troubles().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_ticker_ticks_at_once_and_then_at_its_pace_until_it_is_stopped() {
        let stop = CancellationToken::new();
        let mut ticker = Ticker::new(Duration::from_secs(2), stop.clone());
        let begin = Instant::now();
        assert!(ticker.tick().await);
        assert_eq!(begin.elapsed(), Duration::ZERO);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(ticker.tick().await);
        assert!(ticker.tick().await);
        assert_eq!(begin.elapsed(), Duration::from_secs(7), "what was missed is not made up for");
        stop.cancel();
        assert!(!ticker.tick().await);
    }
}
