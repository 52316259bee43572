//! [`Breaker`]: while ClickHouse says nothing, lists do not wait for it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::client::Fault;
use sessiond_domain::error::{Error, Result};

/// How long nothing is asked after the server has been silent.
const PAUSE: Duration = Duration::from_secs(1);
/// Queries that may be under way at once. One takes both cores of a small server.
const QUERIES_MAX: usize = 16;

/// Lets queries through while the server answers. After a silence (a refused connection, a timeout) it refuses at once for
/// a second, then lets one query try.
pub(super) struct Breaker {
    state: Mutex<State>,
    places: Semaphore,
    /// Longest a query may wait for its place.
    patience: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Answering,
    Silent {
        until: Instant,
    },
    /// One query is trying.
    Trying,
}

/// A query that has been let through. One that tries and is dropped has found nothing out.
struct Pass<'a> {
    breaker: &'a Breaker,
    tries: bool,
}

impl Breaker {
    pub(super) fn new(patience: Duration) -> Self {
        Self { state: Mutex::new(State::Answering), places: Semaphore::new(QUERIES_MAX), patience }
    }

    /// Runs `work`, or refuses.
    pub(super) async fn run<T>(&self, work: impl Future<Output = Result<T, Fault>>) -> Result<T> {
        // Before the queue, and after it: what the server did meanwhile counts.
        drop(self.pass()?);
        let place = tokio::time::timeout(self.patience, self.places.acquire()).await;
        let _place = place.map_err(|_| away())?.map_err(Error::internal)?;
        let pass = self.pass()?;
        let done = work.await;
        pass.end(!done.as_ref().is_err_and(Fault::is_silence));
        Ok(done?)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass(&self) -> Result<Pass<'_>> {
        let mut state = self.state();
        match *state {
            State::Answering => Ok(Pass { breaker: self, tries: false }),
            State::Silent { until } if until <= Instant::now() => {
                *state = State::Trying;
                Ok(Pass { breaker: self, tries: true })
            }
            State::Silent { .. } | State::Trying => Err(away()),
        }
    }
}

fn away() -> Error {
    Error::Unavailable { what: "the list index", source: None }
}

impl Pass<'_> {
    fn end(mut self, answered: bool) {
        let mut state = self.breaker.state();
        let before = *state;
        *state = if answered { State::Answering } else { State::Silent { until: Instant::now() + PAUSE } };
        match (before, answered) {
            (State::Answering, false) => {
                tracing::warn!("ClickHouse does not answer; lists do not wait for it");
            }
            (State::Silent { .. } | State::Trying, true) => tracing::info!("ClickHouse answers again"),
            _ => {}
        }
        self.tries = false;
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if self.tries {
            *self.breaker.state() = State::Silent { until: Instant::now() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silence<T>() -> Result<T, Fault> {
        Err(Fault::TimedOut(Duration::ZERO))
    }

    #[tokio::test(start_paused = true)]
    async fn a_silence_is_answered_at_once_until_one_query_has_tried() {
        let breaker = Breaker::new(Duration::from_secs(5));
        assert!(breaker.run(async { silence::<()>() }).await.is_err());
        let never = || async { panic!("nothing may be asked") };
        assert!(breaker.run::<()>(never()).await.is_err());
        tokio::time::advance(PAUSE).await;
        {
            let mut trying = Box::pin(breaker.run(std::future::pending::<Result<(), Fault>>()));
            assert!(futures_util::poll!(&mut trying).is_pending());
            assert!(breaker.run::<()>(never()).await.is_err(), "one tries, the others do not");
        }
        assert!(breaker.run(async { Ok(1) }).await.is_ok(), "who tried has hung up, so the next one may");
        assert!(breaker.run(async { Ok(1) }).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_that_the_server_tells_is_an_answer() {
        let breaker = Breaker::new(Duration::from_secs(5));
        let refused = || async {
            Err::<(), _>(Fault::from(clickhouse::error::Error::BadResponse(
                "Code: 241. DB::Exception".to_owned(),
            )))
        };
        assert!(breaker.run(refused()).await.is_err());
        assert!(breaker.run(async { Ok(1) }).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_place_is_refused_once_the_server_is_silent() {
        let breaker = Breaker::new(Duration::from_secs(5));
        let slow = || async {
            tokio::time::sleep(Duration::from_secs(1)).await;
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
