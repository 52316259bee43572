//! Ends waits: notices what may have ended one, reads from the log whether it has, and writes that down once.
//!
//! The log is the truth and the row a note of it. Every replica holds all open waits in memory and, from the moment it
//! learns of one, derives its end once from the log and again after each of its own appends and closes. So whichever
//! replica takes a record, that one ends the wait; a record that was there before is found when the wait is learned of.
//! A pass over everything open, now and then, makes up for a replica that died in between.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;
use tokio_util::sync::CancellationToken;

use crate::background::{Background, Ticker};
use crate::channel::{ChannelAddress, ChannelKey, Direction};
use crate::clock::{Clock, Timestamp};
use crate::close;
use crate::envelope;
use crate::error::Result;
use crate::id::{SessionId, SessionRef, WaitpointId};
use crate::port::{ChannelStore, MetadataStore, Waitpoints};
use crate::record::{AppendAck, Position, ReadLimit, ReadStart, Record, SeqNum};
use crate::session::Closure;
use crate::timer::Timers;
use crate::waitpoint::{Waitpoint, WaitpointCursor};

/// What ends waits, as a background task.
const TASK: &str = "ending of waits";
/// How often to look for waits that another replica has made or ended.
const BEAT: Duration = Duration::from_secs(1);
/// Beats between two passes over everything that is open.
const PASS_EVERY: u32 = 60;
/// How far apart the clocks of replicas may be, and how long an insert may take to be seen.
const SKEW: Duration = Duration::from_secs(5);
/// Rows of one query.
const ROWS: usize = 500;
/// Ids of one query.
const IDS: usize = 200;
/// Channels that a pass reads at a time.
const READS: usize = 16;
/// Records of one read in search of the first data record.
const SCAN: usize = 16;

/// What is waited for, and who is to be told.
pub(super) struct Waiting {
    store: Arc<dyn MetadataStore>,
    waitpoints: Arc<dyn Waitpoints>,
    channels: Arc<dyn ChannelStore>,
    clock: Arc<dyn Clock>,
    timers: Arc<Timers>,
    background: Arc<Background>,
    index: Mutex<Index>,
    /// Waits in the index, so that an append where nobody waits at all costs no lock.
    open: AtomicUsize,
    /// Who awaits a waitpoint here, by its id.
    awaited: Mutex<HashMap<WaitpointId, Arc<Notify>>>,
    /// An earlier deadline has been added.
    hurry: Notify,
}

#[derive(Default)]
struct Index {
    channels: HashMap<ChannelKey, Waits>,
    keys: HashMap<WaitpointId, ChannelKey>,
    deadlines: BTreeSet<(Timestamp, WaitpointId)>,
    /// The newest creation seen.
    newest: Option<Timestamp>,
}

/// The waits on one channel.
#[derive(Default)]
struct Waits {
    open: Vec<Wait>,
    work: Work,
    /// Rings when `work` becomes idle.
    done: Arc<Notify>,
    /// The last attempt has failed.
    failed: bool,
    /// Something may have been appended that nobody has told of.
    doubtful: bool,
    /// The session may be closed.
    look: bool,
}

#[derive(Clone)]
struct Wait {
    waitpoint: Arc<Waitpoint>,
    /// Nothing before this record can end it.
    next: SeqNum,
}

/// Whether somebody is ending waits of a channel.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Work {
    #[default]
    Idle,
    Running,
    /// Running, and there is a reason to look once more.
    Again,
}

/// Whose turn it is to end waits of a channel.
enum Turn {
    Mine,
    /// Somebody is at it and will look once more before this completes.
    Others(Pin<Box<OwnedNotified>>),
    /// Nobody waits.
    Nothing,
}

impl Waiting {
    pub(super) fn new(
        store: Arc<dyn MetadataStore>,
        waitpoints: Arc<dyn Waitpoints>,
        channels: Arc<dyn ChannelStore>,
        clock: Arc<dyn Clock>,
        timers: Arc<Timers>,
        background: Arc<Background>,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            waitpoints,
            channels,
            clock,
            timers,
            background,
            index: Mutex::default(),
            open: AtomicUsize::new(0),
            awaited: Mutex::default(),
            hurry: Notify::new(),
        })
    }

    /// To be called after every durable append. Neither waits nor fails.
    pub(super) fn appended(self: &Arc<Self>, key: &ChannelKey, ack: &AppendAck) {
        // Pairs with the one in `learn`: either we see the wait, or whoever adds it sees our record.
        if self.open.load(Ordering::SeqCst) == 0 || key.address.name.is_some() {
            return;
        }
        let concerned = |waits: &Waits| waits.open.iter().any(|wait| wait.next < ack.end.seq_num);
        if self.lock().channels.get(key).is_some_and(concerned) {
            self.kick(key, false);
        }
    }

    /// To be taken before an append, and dispelled after [`Waiting::appended`]. An append that fails or is given up in
    /// between may be stored nevertheless, so its channel is looked at again a little later.
    pub(super) fn doubt<'a>(&'a self, key: &'a ChannelKey) -> Doubt<'a> {
        Doubt { waiting: self, key, dispelled: false }
    }

    /// To be called once a session's close has reached its row.
    pub(super) fn closed(self: &Arc<Self>, session: &SessionId) {
        if self.open.load(Ordering::SeqCst) == 0 {
            return;
        }
        for direction in [Direction::In, Direction::Out] {
            let key = ChannelKey::main(session.clone(), direction);
            if self.lock().channels.contains_key(&key) {
                self.kick(&key, true);
            }
        }
    }

    /// Takes a wait over that is not over yet, and ends it if something has come already.
    pub(super) async fn watch(self: &Arc<Self>, waitpoint: &Waitpoint) {
        if waitpoint.completion.is_none() {
            self.learn(vec![waitpoint.clone()]);
        }
        self.settle(&waitpoint.channel(), true).await;
    }

    /// Ends what has ended on a channel. Whatever was durable before the call has been looked at when it returns.
    pub(super) async fn settle(self: &Arc<Self>, key: &ChannelKey, look: bool) {
        match self.begin(key, look) {
            Turn::Mine => {
                // A caller that hangs up must not end it. A panic is logged, and leaves the rest to the next beat.
                let _ = self.background.once(TASK, self.clone().work(key.clone())).await;
            }
            Turn::Others(done) => done.await,
            Turn::Nothing => {}
        }
    }

    fn kick(self: &Arc<Self>, key: &ChannelKey, look: bool) {
        if matches!(self.begin(key, look), Turn::Mine) {
            self.background.once(TASK, self.clone().work(key.clone()));
        }
    }

    fn begin(&self, key: &ChannelKey, look: bool) -> Turn {
        let mut index = self.lock();
        let Some(waits) = index.channels.get_mut(key) else { return Turn::Nothing };
        waits.look |= look;
        if waits.work == Work::Idle {
            waits.work = Work::Running;
            return Turn::Mine;
        }
        waits.work = Work::Again;
        Turn::Others(Box::pin(waits.done.clone().notified_owned()))
    }

    async fn work(self: Arc<Self>, key: ChannelKey) {
        let turn = Working { waiting: &self, key: &key, ended: false };
        loop {
            let (open, look) = {
                let mut index = self.lock();
                let Some(waits) = index.channels.get_mut(&key) else { return turn.end() };
                waits.work = Work::Running;
                (waits.open.clone(), std::mem::take(&mut waits.look))
            };
            let outcome = self.end(&key, &open, look).await;
            let mut index = self.lock();
            let Some(waits) = index.channels.get_mut(&key) else { return turn.end() };
            if let Err(error) = &outcome {
                tracing::warn!(channel = %key, %error, "cannot tell yet whether waits have ended");
            }
            waits.failed = outcome.is_err();
            waits.look |= look && waits.failed;
            if waits.work == Work::Again && !waits.failed {
                continue;
            }
            waits.work = Work::Idle;
            waits.done.notify_waiters();
            if waits.open.is_empty() {
                index.channels.remove(&key);
            }
            return turn.end();
        }
    }

    /// Ends those of `open` that are over.
    async fn end(&self, key: &ChannelKey, open: &[Wait], look: bool) -> Result<()> {
        let Some(first) = open.first() else { return Ok(()) };
        let closure = if look { self.closure(&first.waitpoint).await? } else { None };
        // Most of them begin at the same record.
        let mut found = BTreeMap::new();
        for wait in open {
            let (first, next) = match found.get(&wait.next) {
                Some(known) => *known,
                None => {
                    let scanned = self.first_data(key, wait.next).await?;
                    found.insert(wait.next, scanned);
                    scanned
                }
            };
            match wait.waitpoint.ended(first, closure.as_ref(), self.clock.now()) {
                Some(completion) => {
                    let Waitpoint { environment, id, .. } = wait.waitpoint.as_ref();
                    self.waitpoints.complete_waitpoint(environment, id, &completion).await?;
                    self.forget(&wait.waitpoint);
                    self.tell(id);
                }
                None => self.advance(key, &wait.waitpoint.id, next),
            }
        }
        Ok(())
    }

    /// Past the cache, which may not know of a close through another replica.
    async fn closure(&self, waitpoint: &Waitpoint) -> Result<Option<Closure>> {
        let address = SessionRef::Id(waitpoint.session.clone());
        let session = self.store.find_session(&waitpoint.environment, &address).await?;
        Ok(session.and_then(|session| session.closed))
    }

    /// The first data record at `from` or after it, and where to go on looking if there is none. Not the one that the close
    /// leaves: what ends a wait is the close.
    pub(super) async fn first_data(
        &self,
        key: &ChannelKey,
        from: SeqNum,
    ) -> Result<(Option<Position>, SeqNum)> {
        let mut next = from;
        let is_answer = |record: &&Record| {
            envelope::is_data(record)
                && (key.address != ChannelAddress::main(Direction::In)
                    || !close::is_input_record(record, &key.session))
        };
        loop {
            let batch = self.channels.read(key, ReadStart::SeqNum(next), ReadLimit::count(SCAN)).await?;
            if let Some(record) = batch.records.iter().find(is_answer) {
                return Ok((Some(record.position), record.position.seq_num));
            }
            let Some(after) = batch.next_seq_num() else { return Ok((None, next)) };
            next = next.max(after);
        }
    }

    fn advance(&self, key: &ChannelKey, id: &WaitpointId, next: SeqNum) {
        let mut index = self.lock();
        let waits = index
            .channels
            .get_mut(key)
            .and_then(|waits| waits.open.iter_mut().find(|wait| wait.waitpoint.id == *id));
        if let Some(wait) = waits {
            wait.next = wait.next.max(next);
        }
    }

    /// Adds waits that are not known yet, and gives their channels.
    fn learn(&self, waitpoints: Vec<Waitpoint>) -> Vec<ChannelKey> {
        let mut added = Vec::new();
        let mut index = self.lock();
        for waitpoint in waitpoints {
            index.newest = index.newest.max(Some(waitpoint.created_at));
            if index.keys.contains_key(&waitpoint.id) {
                continue;
            }
            let key = waitpoint.channel();
            index.keys.insert(waitpoint.id.clone(), key.clone());
            if let Some(at) = waitpoint.deadline() {
                index.deadlines.insert((at, waitpoint.id.clone()));
            }
            let next = waitpoint.first_seq_num();
            let wait = Wait { waitpoint: Arc::new(waitpoint), next };
            index.channels.entry(key.clone()).or_default().open.push(wait);
            self.open.fetch_add(1, Ordering::SeqCst);
            added.push(key);
        }
        if !added.is_empty() {
            self.hurry.notify_one();
        }
        added
    }

    fn forget(&self, waitpoint: &Waitpoint) {
        let mut index = self.lock();
        let Some(key) = index.keys.remove(&waitpoint.id) else { return };
        if let Some(at) = waitpoint.deadline() {
            index.deadlines.remove(&(at, waitpoint.id.clone()));
        }
        if let Some(waits) = index.channels.get_mut(&key) {
            waits.open.retain(|wait| wait.waitpoint.id != waitpoint.id);
        }
        self.open.fetch_sub(1, Ordering::SeqCst);
    }

    /// Takes over every wait that is open, and ends those that something has come for while nobody was looking.
    pub(super) async fn recover(self: &Arc<Self>) -> Result<()> {
        let keys = self.discover(None).await?;
        self.settle_all(keys).await;
        Ok(())
    }

    async fn discover(&self, mut after: Option<WaitpointCursor>) -> Result<HashSet<ChannelKey>> {
        let mut found = HashSet::new();
        loop {
            let rows = self.waitpoints.open_waitpoints(after.as_ref(), ROWS).await?;
            let (last, full) = (rows.last().map(WaitpointCursor::of), rows.len() == ROWS);
            found.extend(self.learn(rows));
            if !full {
                return Ok(found);
            }
            after = last;
        }
    }

    async fn settle_all(self: &Arc<Self>, keys: HashSet<ChannelKey>) {
        stream::iter(keys)
            .for_each_concurrent(READS, |key| async move { self.settle(&key, true).await })
            .await;
    }

    /// Ends waits at their time and looks out for other replicas, until `stop` is cancelled.
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut ticker = Ticker::new(BEAT, stop);
        let mut beats: u32 = 0;
        loop {
            // The alarm is set before the clock is read, or the moment could pass in between.
            let alarm = self.lock().deadlines.first().map(|(at, _)| self.timers.reached(*at));
            self.end_due();
            let alarm = async {
                match alarm {
                    Some(alarm) => alarm.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = alarm => {}
                () = self.hurry.notified() => {}
                ticked = ticker.tick() => {
                    if !ticked {
                        return;
                    }
                    beats = beats.wrapping_add(1);
                    if let Err(error) = self.look_around(beats.is_multiple_of(PASS_EVERY)).await {
                        tracing::warn!(%error, "cannot look for waits of other replicas");
                    }
                }
            }
        }
    }

    fn end_due(self: &Arc<Self>) {
        let now = self.clock.now();
        let due: BTreeSet<_> = {
            let mut index = self.lock();
            let mut due = BTreeSet::new();
            while let Some((at, id)) = index.deadlines.first().cloned().filter(|(at, _)| *at <= now) {
                index.deadlines.remove(&(at, id.clone()));
                due.insert(id);
            }
            due
        };
        for id in due {
            let key = self.lock().keys.get(&id).cloned();
            if let Some(key) = key {
                self.kick(&key, false);
            }
        }
    }

    async fn look_around(self: &Arc<Self>, everything: bool) -> Result<()> {
        let newest = self.lock().newest;
        let after =
            newest.map(|at| WaitpointCursor { created_at: at.minus(SKEW), id: WaitpointId::from_stored("") });
        let mut keys = self.discover(after).await?;
        {
            let mut index = self.lock();
            let channels = index.channels.iter_mut().filter_map(|(key, waits)| {
                let doubtful = std::mem::take(&mut waits.doubtful);
                (everything || waits.failed || doubtful).then(|| key.clone())
            });
            keys.extend(channels);
        }
        if !keys.is_empty() {
            let this = self.clone();
            self.background.once(TASK, async move { this.settle_all(keys).await });
        }
        let awaited: Vec<_> = self.awaited().keys().cloned().collect();
        for ids in awaited.chunks(IDS) {
            for id in self.waitpoints.completed_among(ids).await? {
                self.tell(&id);
            }
        }
        Ok(())
    }

    /// Completes when something may have happened to a waitpoint. Listens from the moment of the call.
    pub(super) fn listen(&self, id: &WaitpointId) -> Listening<'_> {
        let bell = self.awaited().entry(id.clone()).or_default().clone();
        let ring = bell.clone().notified_owned();
        Listening { waiting: self, id: id.clone(), bell: Some(bell), ring: Box::pin(ring) }
    }

    fn tell(&self, id: &WaitpointId) {
        let bell = self.awaited().get(id).cloned();
        if let Some(bell) = bell {
            bell.notify_waiters();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn awaited(&self) -> MutexGuard<'_, HashMap<WaitpointId, Arc<Notify>>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The turn of a task at the waits of a channel.
struct Working<'a> {
    waiting: &'a Waiting,
    key: &'a ChannelKey,
    ended: bool,
}

impl Working<'_> {
    fn end(mut self) {
        self.ended = true;
    }
}

impl Drop for Working<'_> {
    /// After a panic nobody is at it any more: whoever waits for this turn goes on, and the next beat takes another.
    fn drop(&mut self) {
        if !self.ended
            && let Some(waits) = self.waiting.lock().channels.get_mut(self.key)
        {
            waits.work = Work::Idle;
            waits.failed = true;
            waits.look = true;
            waits.done.notify_waiters();
        }
    }
}

/// An append of which nobody may tell how it went.
pub(super) struct Doubt<'a> {
    waiting: &'a Waiting,
    key: &'a ChannelKey,
    dispelled: bool,
}

impl Doubt<'_> {
    pub(super) fn dispel(mut self) {
        self.dispelled = true;
    }
}

impl Drop for Doubt<'_> {
    fn drop(&mut self) {
        if !self.dispelled
            && self.waiting.open.load(Ordering::SeqCst) > 0
            && let Some(waits) = self.waiting.lock().channels.get_mut(self.key)
        {
            waits.doubtful = true;
        }
    }
}

/// Somebody who awaits a waitpoint; the last one to leave takes the entry along.
pub(super) struct Listening<'a> {
    waiting: &'a Waiting,
    id: WaitpointId,
    /// Taken when it ends.
    bell: Option<Arc<Notify>>,
    ring: Pin<Box<OwnedNotified>>,
}

impl Listening<'_> {
    pub(super) async fn ring(&mut self) {
        self.ring.as_mut().await;
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        // A future that still listens holds the bell too.
        let fresh = Arc::new(Notify::new()).notified_owned();
        self.ring = Box::pin(fresh);
        let mut awaited = self.waiting.awaited();
        drop(self.bell.take());
        if awaited.get(&self.id).is_some_and(|bell| Arc::strong_count(bell) == 1) {
            awaited.remove(&self.id);
        }
    }
}
