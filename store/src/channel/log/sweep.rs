//! The thread that finds what may be forgotten and hands it to the writer in small slices: records past
//! their retention, trimmed records, part ids past their time. It only reads, so it holds no append up.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::codec;
use super::queue::{Request, Sweep, gone};
use super::store::Store;
use super::{LogOptions, Shared};
use sessiond_domain::background;
use sessiond_domain::{ChannelKey, Error, Result, SeqNum, Timestamp};

/// Rows deleted in one slice, so that the appends of the same commit wait little longer.
const SLICE: SeqNum = 512;
/// How often the disk and the engine are looked at, whether anything is written or not.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Channels looked at under one snapshot.
const PAGE: usize = 256;

/// Why the sweeper is awake.
pub(super) enum Wake {
    /// A channel was trimmed.
    Trimmed,
    /// Somebody wants everything done now.
    Now(oneshot::Sender<Result<()>>),
    /// The log closes.
    Stop,
}

/// Runs until told to stop. After a panic it begins again, after a pause that grows.
pub(super) fn run(shared: &Arc<Shared>, options: &LogOptions, wake: &Receiver<Wake>) {
    let (mut pause, mut begun) = (background::FIRST_PAUSE, Instant::now());
    // What a turn shares with others it leaves behind locks that are taken whether they are poisoned or not.
    while panic::catch_unwind(AssertUnwindSafe(|| turns(shared, options, wake))).is_err() {
        shared.background.faulted("log sweeper");
        if begun.elapsed() >= background::LONGEST_PAUSE {
            pause = background::FIRST_PAUSE;
        }
        let until = Instant::now() + pause;
        // Whoever has woken it meanwhile gets what the next turn finds.
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            match wake.recv_timeout(left) {
                Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(Wake::Trimmed) => shared.sweep_woken(),
                Ok(Wake::Now(reply)) => drop(reply.send(Err(gone()))),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        pause = (pause * 2).min(background::LONGEST_PAUSE);
        begun = Instant::now();
    }
}

/// Runs until told to stop.
fn turns(shared: &Arc<Shared>, options: &LogOptions, wake: &Receiver<Wake>) {
    let sweeper = Sweeper { shared, retention: options.retention };
    // What a crash has left undone.
    let mut result = sweeper.remove_trimmed();
    // A moment, not a pause: trims that come more often must not put it off for ever.
    let mut due = Instant::now() + options.sweep_every;
    loop {
        if let Err(error) = &result
            && !shared.queue.is_closed()
        {
            tracing::warn!(error = %error, "the log could not forget what it may; it tries again later");
        }
        if Instant::now() >= due {
            result = sweeper.sweep();
            due = Instant::now() + options.sweep_every;
            continue;
        }
        let pause = due.saturating_duration_since(Instant::now()).min(LOOK_EVERY);
        result = match wake.recv_timeout(pause) {
            Ok(Wake::Trimmed) => {
                shared.sweep_woken();
                sweeper.remove_trimmed()
            }
            Ok(Wake::Now(reply)) => {
                let _ = reply.send(sweeper.sweep());
                Ok(())
            }
            Err(RecvTimeoutError::Timeout) => {
                // What it finds it logs, and keeps for whoever asks.
                let _ = shared.look();
                Ok(())
            }
            Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
        };
    }
}

struct Sweeper<'a> {
    shared: &'a Arc<Shared>,
    retention: Option<Duration>,
}

impl Sweeper<'_> {
    fn sweep(&self) -> Result<()> {
        let now = self.shared.clock.now();
        if let Some(retention) = self.retention {
            self.trim_older(now.minus(retention))?;
        }
        self.remove_trimmed()?;
        self.forget_parts(now)
    }

    fn trim_older(&self, than: Timestamp) -> Result<()> {
        let store = &self.shared.store;
        let mut after = Bytes::new();
        loop {
            let page = Store::page(&store.channels, &after, None, PAGE)?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.clone();
            for row in page {
                let key = codec::parse_channel_key(&row)?;
                let view = store.view();
                let Some((number, tail)) = view.channel(&key)? else { continue };
                let below = view.first_at(number, tail.earliest, tail.next.seq_num, than)?;
                if below > tail.earliest {
                    self.hand_over(Sweep::Trim { key, below })?;
                }
            }
        }
    }

    fn remove_trimmed(&self) -> Result<()> {
        let store = &self.shared.store;
        let mut after = Bytes::new();
        loop {
            let page = Store::page(&store.removals, &after, None, PAGE)?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.clone();
            for number in page {
                let Some(key) = store.removals.get(&number).map_err(super::store::fault)? else { continue };
                let key = codec::parse_channel_key(&key)?;
                while self.remove_slice(&key)? {}
            }
        }
    }

    /// Removes some trimmed records of a channel; false when there are none.
    fn remove_slice(&self, key: &ChannelKey) -> Result<bool> {
        let view = self.shared.store.view();
        let Some((number, tail)) = view.channel(key)? else { return Ok(false) };
        let (from, to) = (tail.removed, tail.earliest.min(tail.removed + SLICE));
        if from == to {
            return Ok(false);
        }
        let mut parts = Vec::new();
        for item in view.range(number, from, to) {
            let (record, Some(part_id)) = item? else { continue };
            let part_id = std::str::from_utf8(&part_id).map_err(Error::internal)?;
            let part_key = codec::part_key(number, part_id);
            if let Some(part) = self.shared.store.part(&part_key)?
                && part.position.seq_num == record.position.seq_num
            {
                parts.push((Bytes::from(part_key), part.stored_at));
            }
        }
        self.hand_over(Sweep::Remove { key: key.clone(), from, to, parts })?;
        Ok(true)
    }

    fn forget_parts(&self, now: Timestamp) -> Result<()> {
        let below = codec::expiry_key(now.plus(Duration::from_millis(1)), &[]);
        loop {
            let limit = usize::try_from(SLICE).unwrap_or(usize::MAX);
            let expiries = Store::page(&self.shared.store.expiries, &[], Some(&below), limit)?;
            if expiries.is_empty() {
                return Ok(());
            }
            self.hand_over(Sweep::Forget { expiries })?;
        }
    }

    fn hand_over(&self, sweep: Sweep) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.shared.queue.push(Request::Sweep { sweep, reply })?;
        answer.blocking_recv().unwrap_or_else(|_| Err(gone()))
    }
}
