//! From the call of an append to the record at its followers, at a fixed rate; and the memory of idle followers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;

use super::load::{Writer, micros};
use super::record::nanos;
use super::server::{Server, own_cpu};
use super::stats::{Latency, Spread};
use super::target::{Reader, Target};

/// Time during which deliveries are checked but not timed.
const WARM_UP: Duration = Duration::from_secs(1);
/// How long the last record may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections that write to many channels by turns.
const WRITERS: usize = 16;

/// A delivery row.
pub(crate) struct Plan {
    pub(crate) channels: Vec<String>,
    /// Followers of each channel.
    pub(crate) followers: usize,
    /// Appends a second over all channels.
    pub(crate) rate: f64,
    pub(crate) time: Duration,
}

/// What it came to.
pub(crate) struct Delivered {
    pub(crate) spread: Spread,
    pub(crate) server_us: f64,
    pub(crate) client_us: f64,
    /// Records that a follower never saw, saw twice or saw out of order.
    pub(crate) lost: u64,
}

/// What one follower saw.
struct Seen {
    channel: usize,
    count: u64,
    disordered: u64,
    latency: Latency,
}

/// How followers come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// As after a restart: what opening them takes, a server may hold for all of them together.
    AtOnce,
    /// Each when the one before it has been accepted.
    OneByOne,
}

/// Followers that wait for records.
pub(crate) struct Followers {
    tasks: Vec<JoinHandle<anyhow::Result<Seen>>>,
    delivered: Arc<AtomicU64>,
    /// Nanosecond from which on deliveries are timed.
    timed_from: watch::Sender<u64>,
    stop: watch::Sender<bool>,
}

impl Followers {
    /// Connects `each` followers to every channel and returns once the server has accepted them all.
    pub(crate) async fn follow(
        target: &dyn Target,
        server: &Server,
        channels: &[String],
        each: usize,
        pace: Pace,
    ) -> anyhow::Result<Self> {
        let of = |channel: usize| std::iter::repeat_n(channel, each);
        let readers = (0..channels.len())
            .flat_map(of)
            .map(|channel| (channel, target.follow(server, &channels[channel])));
        let followers = Self::connect(server, readers, pace).await?;
        target.settle(server, followers.tasks.len())?;
        Ok(followers)
    }

    /// Connects the readers, each with the number of its channel, and returns once the server has accepted them all.
    pub(crate) async fn connect(
        server: &Server,
        readers: impl Iterator<Item = (usize, Box<dyn Reader>)>,
        pace: Pace,
    ) -> anyhow::Result<Self> {
        let (ready, mut accepted) = mpsc::unbounded_channel();
        let (timed_from, timed) = watch::channel(u64::MAX);
        let (stop, stopped) = watch::channel(false);
        let delivered = Arc::new(AtomicU64::new(0));
        let (mut tasks, mut awaited) = (Vec::new(), 0);
        for (channel, reader) in readers {
            let stream = TcpStream::connect(server.address).await?;
            stream.set_nodelay(true)?;
            let follower = Follower {
                stream,
                reader,
                ready: Some(ready.clone()),
                delivered: Arc::clone(&delivered),
                timed: timed.clone(),
            };
            tasks.push(tokio::spawn(follower.run(channel, stopped.clone())));
            awaited += 1;
            if pace == Pace::OneByOne {
                accept(&mut accepted, &mut awaited).await?;
            }
        }
        drop(ready);
        accept(&mut accepted, &mut awaited).await?;
        Ok(Self { tasks, delivered, timed_from, stop })
    }

    /// Hangs up, every one of them.
    pub(crate) async fn leave(self) -> anyhow::Result<()> {
        self.finish().await.map(drop)
    }

    async fn arrived(&self, expected: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.delivered.load(Ordering::Relaxed) < expected && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn finish(self) -> anyhow::Result<Vec<Seen>> {
        self.stop.send_replace(true);
        let mut seen = Vec::with_capacity(self.tasks.len());
        for task in self.tasks {
            seen.push(task.await??);
        }
        Ok(seen)
    }
}

/// Waits until so many have been accepted.
async fn accept(accepted: &mut mpsc::UnboundedReceiver<()>, awaited: &mut usize) -> anyhow::Result<()> {
    while *awaited > 0 {
        let one = tokio::time::timeout(PATIENCE, accepted.recv()).await?;
        ensure!(one.is_some(), "a follower was refused");
        *awaited -= 1;
    }
    Ok(())
}

struct Follower {
    stream: TcpStream,
    reader: Box<dyn Reader>,
    ready: Option<mpsc::UnboundedSender<()>>,
    delivered: Arc<AtomicU64>,
    timed: watch::Receiver<u64>,
}

impl Follower {
    async fn run(mut self, channel: usize, mut stop: watch::Receiver<bool>) -> anyhow::Result<Seen> {
        let mut seen = Seen { channel, count: 0, disordered: 0, latency: Latency::default() };
        self.stream.write_all(&self.reader.request()).await?;
        let mut buffer = vec![0; 8192];
        loop {
            if self.reader.ready()
                && let Some(ready) = self.ready.take()
            {
                let _ = ready.send(());
            }
            let read = tokio::select! {
                read = self.stream.read(&mut buffer) => read?,
                _ = stop.changed() => return Ok(seen),
            };
            ensure!(read > 0, "the server hung up on a follower");
            let now = nanos();
            let before = seen.count;
            let timed_from = *self.timed.borrow();
            let next = self.reader.feed(&buffer[..read], &mut |mark| {
                seen.disordered += u64::from(mark.number != seen.count);
                seen.count += 1;
                if mark.sent >= timed_from {
                    seen.latency.record_nanos(now.saturating_sub(mark.sent));
                }
            })?;
            self.delivered.fetch_add(seen.count - before, Ordering::Relaxed);
            if let Some(next) = next {
                self.stream.write_all(&next).await?;
            }
        }
    }
}

/// Appends at the plan's rate and counts what arrives.
pub(crate) async fn deliver(target: &dyn Target, server: &Server, plan: &Plan) -> anyhow::Result<Delivered> {
    let followers = Followers::follow(target, server, &plan.channels, plan.followers, Pace::AtOnce).await?;
    let warm = u64::try_from(WARM_UP.as_nanos())?;
    followers.timed_from.send_replace(nanos() + warm);
    let (server_before, client_before) = (server.cpu()?, own_cpu()?);
    let appended = write_all(target, server, plan).await?;
    let expected = appended.iter().sum::<u64>() * plan.followers as u64;
    followers.arrived(expected).await;
    let (server_after, client_after) = (server.cpu()?, own_cpu()?);
    let (mut latency, mut lost) = (Latency::default(), 0);
    for seen in followers.finish().await? {
        lost += appended[seen.channel].abs_diff(seen.count) + seen.disordered;
        latency.join(seen.latency);
    }
    let count = expected.max(1) as f64;
    Ok(Delivered {
        spread: latency.spread()?,
        server_us: micros(server_after - server_before) / count,
        client_us: micros(client_after - client_before) / count,
        lost,
    })
}

/// Runs the writers and answers how many records each channel got.
async fn write_all(target: &dyn Target, server: &Server, plan: &Plan) -> anyhow::Result<Vec<u64>> {
    let writers = WRITERS.min(plan.channels.len());
    let every = Duration::from_secs_f64(writers as f64 / plan.rate);
    let start = Instant::now();
    let end = start + WARM_UP + plan.time;
    let mut tasks: JoinSet<anyhow::Result<Vec<(usize, u64)>>> = JoinSet::new();
    for first in 0..writers {
        let mut writer = Writer::connect(server).await?;
        let mut requests: Vec<_> = (first..plan.channels.len())
            .step_by(writers)
            .map(|channel| (channel, 0, target.append(server, &plan.channels[channel])))
            .collect();
        let begin = start + every * u32::try_from(first)? / u32::try_from(writers)?;
        tasks.spawn(async move {
            let mut ticks = tokio::time::interval_at(begin.into(), every);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            for turn in 0.. {
                ticks.tick().await;
                if Instant::now() >= end {
                    break;
                }
                let turn = turn % requests.len();
                let (_, number, request) = &mut requests[turn];
                writer.send(request, *number).await?;
                *number += 1;
            }
            Ok(requests.into_iter().map(|(channel, number, _)| (channel, number)).collect())
        });
    }
    let mut appended = vec![0; plan.channels.len()];
    while let Some(done) = tasks.join_next().await {
        for (channel, count) in done?? {
            appended[channel] = count;
        }
    }
    Ok(appended)
}
