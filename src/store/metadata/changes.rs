//! [`PgChanges`]: the feed of changes between replicas on one Postgres, by NOTIFY and LISTEN.
//!
//! One task announces, in batches and on a connection of its own: a notification inside each write would make commits
//! queue for one lock (ADR 22). Another one listens. Every replica also says once a second that it is there, to itself
//! as well: so it finds out that its own connection is dead, and that another replica died before it could announce
//! what it had committed. What may be lost is told as [`Heard::Missed`].
//!
//! A notification is the sender's id and then one of: nothing (it lives), `bye`, `!` (too much to be told), or sessions
//! by environment, `@env_a session_1 session_2+ @env_b session_3`, where `+` means closed. `keys` alone tells of keys.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt};
use sea_orm::sqlx::postgres::{PgConnectOptions, PgConnection, PgListener, PgPoolOptions};
use sea_orm::sqlx::{self, ConnectOptions, Connection};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, broadcast};
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;

use super::OpenError;
use crate::domain::{ChangeFeed, ChangedSession, EnvironmentId, Heard, SessionId};

/// Where replicas meet.
pub(super) const CHANNEL: &str = "sessiond_changes";
/// The notification that keys have changed.
pub(super) const KEYS: &str = "keys";

const BYE: &str = "bye";
const TOO_MUCH: &str = "!";
/// How long announcements are gathered.
const GATHER: Duration = Duration::from_millis(2);
/// How often a replica says that it is there.
const BEAT: Duration = Duration::from_secs(1);
/// After this silence a connection counts as dead, and another replica as gone.
const SILENCE: Duration = Duration::from_secs(4);
/// Longest wait for a connection, or for a notification to be taken.
const PATIENCE: Duration = Duration::from_secs(5);
/// First and longest pause between two attempts to connect.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Postgres takes notifications of less than 8000 bytes.
const PAYLOAD_MAX: usize = 7900;
/// Sessions that wait to be announced; with more, the others are told to look for themselves.
const PENDING_MAX: usize = 50_000;
/// What a subscriber may leave lying before it has missed something.
const HEARD_KEPT: usize = 1024;
/// How long ago that was at most, if it has.
const HEARD_FOR: Duration = Duration::from_secs(60);

/// Announcements of this replica, and of all others on the same database.
pub struct PgChanges {
    options: PgConnectOptions,
    /// Tells our own notifications from others'.
    sender: String,
    pending: Mutex<Pending>,
    /// Something is pending.
    wake: Notify,
    heard: broadcast::Sender<Heard>,
}

#[derive(Default)]
struct Pending {
    /// By environment and id, and whether it is closed.
    sessions: BTreeMap<(EnvironmentId, SessionId), bool>,
    too_much: bool,
}

impl PgChanges {
    /// A feed over the database at `url`, which must lead to Postgres itself or to a pooler that keeps sessions.
    ///
    /// # Errors
    /// [`OpenError::Connect`] if the URL cannot be read.
    pub fn new(url: &str) -> Result<Arc<Self>, OpenError> {
        let options = PgConnectOptions::from_str(url)?
            .application_name("sessiond changes")
            // A notification needs no disk.
            .options([("synchronous_commit", "off")])
            .disable_statement_logging();
        Ok(Arc::new(Self {
            options,
            sender: uuid::Uuid::new_v4().simple().to_string(),
            pending: Mutex::default(),
            wake: Notify::new(),
            heard: broadcast::Sender::new(HEARD_KEPT),
        }))
    }

    /// Announces and listens until `stop` is cancelled, and says good-bye.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        tokio::join!(self.announce_all(&stop), self.listen(&stop));
    }

    async fn announce_all(&self, stop: &CancellationToken) {
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut connection, mut failed) = (None, false);
        while !stop.is_cancelled() {
            let alive = tokio::select! {
                () = stop.cancelled() => break,
                _ = beat.tick() => true,
                () = self.wake.notified(), if !failed => false,
            };
            if !alive {
                tokio::time::sleep(GATHER).await;
            }
            let batch = std::mem::take(&mut *self.lock());
            let mut payloads = batch.payloads(&self.sender);
            if alive {
                payloads.push(self.sender.clone());
            }
            let sent = self.send(&mut connection, &payloads).await;
            if let Err(error) = &sent {
                tracing::warn!(%error, "cannot tell other replicas of changes; trying again");
                self.put_back(batch);
            }
            failed = sent.is_err();
        }
        let mut payloads = std::mem::take(&mut *self.lock()).payloads(&self.sender);
        payloads.push(format!("{} {BYE}", self.sender));
        if let Err(error) = self.send(&mut connection, &payloads).await {
            tracing::warn!(%error, "cannot tell other replicas of the last changes");
        }
    }

    /// Sends notifications, all or none; the connection is made if there is none, and given up after a fault.
    async fn send(
        &self,
        connection: &mut Option<PgConnection>,
        payloads: &[String],
    ) -> Result<(), sqlx::Error> {
        let send = async {
            let mut current = match connection.take() {
                Some(current) => current,
                None => PgConnection::connect_with(&self.options).await?,
            };
            sqlx::query("SELECT pg_notify($1, payload) FROM unnest($2) AS payload")
                .bind(CHANNEL)
                .bind(payloads)
                .execute(&mut current)
                .await?;
            *connection = Some(current);
            Ok(())
        };
        timeout(PATIENCE, send).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }

    fn put_back(&self, batch: Pending) {
        let mut pending = self.lock();
        pending.too_much |= batch.too_much;
        for (key, closed) in batch.sessions {
            pending.add(key, closed);
        }
    }

    async fn listen(&self, stop: &CancellationToken) {
        let mut last = Instant::now();
        let mut pause = RETRY.0;
        while !stop.is_cancelled() {
            let attempt = async {
                let connected = timeout(PATIENCE, self.listener()).await;
                connected.unwrap_or(Err(sqlx::Error::PoolTimedOut))
            };
            let Some(connected) = stop.run_until_cancelled(attempt).await else { return };
            match connected {
                Ok(listener) => {
                    // From here on nothing is lost; before it, anything may be.
                    self.tell(Heard::Missed(last.elapsed()));
                    pause = RETRY.0;
                    last = Instant::now();
                    stop.run_until_cancelled(self.hear(listener, &mut last)).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot listen to other replicas; trying again");
                    stop.run_until_cancelled(tokio::time::sleep(pause)).await;
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }

    async fn listener(&self) -> Result<PgListener, sqlx::Error> {
        let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(self.options.clone());
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.eager_reconnect(false);
        listener.listen(CHANNEL).await?;
        Ok(listener)
    }

    /// Takes what comes, until the connection is lost or silent.
    async fn hear(&self, mut listener: PgListener, last: &mut Instant) {
        let mut replicas: HashMap<String, Instant> = HashMap::new();
        while let Ok(Ok(Some(notification))) = timeout(SILENCE, listener.try_recv()).await {
            let now = Instant::now();
            let (sender, rest) =
                notification.payload().split_once(' ').unwrap_or((notification.payload(), ""));
            *last = now;
            if sender == KEYS {
                self.tell(Heard::Keys);
            } else if rest == BYE {
                replicas.remove(sender);
            } else if sender != self.sender {
                replicas.insert(sender.to_owned(), now);
                match rest {
                    "" => {}
                    TOO_MUCH => self.tell(Heard::Missed(HEARD_FOR)),
                    sessions => self.tell(Heard::Sessions(parse(sessions))),
                }
            }
            replicas.retain(|_, heard| {
                let silence = now - *heard;
                if silence > SILENCE {
                    // It may have died between a commit and its announcement.
                    self.tell(Heard::Missed(silence));
                }
                silence <= SILENCE
            });
        }
        tracing::warn!("lost the connection over which other replicas tell of changes; connecting again");
    }

    fn tell(&self, heard: Heard) {
        // Nobody may be listening yet.
        let _ = self.heard.send(heard);
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ChangeFeed for PgChanges {
    fn announce(&self, change: ChangedSession) {
        self.lock().add((change.environment, change.id), change.closed);
        self.wake.notify_one();
    }

    fn subscribe(&self) -> BoxStream<'static, Heard> {
        stream::unfold(self.heard.subscribe(), |mut heard| async move {
            match heard.recv().await {
                Ok(news) => Some((news, heard)),
                Err(RecvError::Lagged(_)) => Some((Heard::Missed(HEARD_FOR), heard)),
                Err(RecvError::Closed) => None,
            }
        })
        .boxed()
    }
}

impl Pending {
    fn add(&mut self, key: (EnvironmentId, SessionId), closed: bool) {
        if self.sessions.len() >= PENDING_MAX {
            self.sessions.clear();
            self.too_much = true;
        }
        *self.sessions.entry(key).or_default() |= closed;
    }

    fn payloads(&self, sender: &str) -> Vec<String> {
        let mut payloads = Vec::new();
        if self.too_much {
            payloads.push(format!("{sender} {TOO_MUCH}"));
        }
        let mut environment = None;
        for ((env, id), closed) in &self.sessions {
            let fits =
                |payload: &String| payload.len() + env.as_str().len() + id.as_str().len() + 4 <= PAYLOAD_MAX;
            if !payloads.last().is_some_and(|payload| environment.is_some() && fits(payload)) {
                payloads.push(sender.to_owned());
                environment = None;
            }
            let Some(payload) = payloads.last_mut() else { continue };
            if environment != Some(env) {
                environment = Some(env);
                payload.push_str(" @");
                payload.push_str(env.as_str());
            }
            payload.push(' ');
            payload.push_str(id.as_str());
            if *closed {
                payload.push('+');
            }
        }
        payloads
    }
}

fn parse(text: &str) -> Vec<ChangedSession> {
    let mut environment = None;
    let mut changes = Vec::new();
    for word in text.split(' ') {
        if let Some(name) = word.strip_prefix('@') {
            environment = Some(EnvironmentId::from_stored(name));
        } else if let Some(environment) = &environment {
            let (id, closed) = word.strip_suffix('+').map_or((word, false), |id| (id, true));
            let id = SessionId::from_stored(id);
            changes.push(ChangedSession { environment: environment.clone(), id, closed });
        }
    }
    changes
}

impl fmt::Debug for PgChanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PgChanges").field("sender", &self.sender).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(number: usize) -> ((EnvironmentId, SessionId), bool) {
        let environment = EnvironmentId::from_stored(&format!("env_{}", number % 3));
        ((environment, SessionId::from_stored(&format!("session_{number:05}"))), number.is_multiple_of(5))
    }

    #[test]
    fn any_number_of_changes_is_told_in_payloads_that_postgres_takes() {
        for count in [0, 1, 2, 5000] {
            let mut pending = Pending::default();
            (0..count).map(change).for_each(|(key, closed)| pending.add(key, closed));
            let payloads = pending.payloads("sender");
            assert!(payloads.iter().all(|payload| payload.len() <= PAYLOAD_MAX));
            assert_eq!(payloads.len() > 1, count > 1000);
            let told = payloads.iter().flat_map(|payload| {
                let (sender, rest) = payload.split_once(' ').expect("a sender");
                assert_eq!(sender, "sender");
                parse(rest)
            });
            let told: BTreeMap<_, _> =
                told.map(|change| ((change.environment, change.id), change.closed)).collect();
            assert_eq!(told, (0..count).map(change).collect());
        }
    }

    #[test]
    fn too_much_is_told_as_such_and_what_comes_later_again_by_name() {
        let mut pending = Pending::default();
        (0..=PENDING_MAX).map(change).for_each(|(key, closed)| pending.add(key, closed));
        let payloads = pending.payloads("sender");
        assert_eq!(payloads, ["sender !", &format!("sender @env_2 session_{PENDING_MAX}+")]);
    }

    #[test]
    fn a_close_is_not_forgotten_for_an_earlier_version_told_again() {
        let mut pending = Pending::default();
        pending.add(change(0).0, true);
        pending.add(change(0).0, false);
        assert_eq!(pending.payloads("s"), ["s @env_0 session_00000+"]);
    }
}
