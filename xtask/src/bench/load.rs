//! Writers: one connection and one request at a time each.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::record::Request;
use super::report::Metric;
use super::server::{Server, own_cpu};
use super::stats::{Latency, Spread};
use super::target::Target;

/// Time before anything is counted.
const WARM_UP: Duration = Duration::from_secs(1);
/// Writers that fill a channel before it is read.
const FILLERS: u64 = 64;

/// A connection that appends, or asks.
pub(crate) struct Writer {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Writer {
    pub(crate) async fn connect(server: &Server) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(server.address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![0; 4096] })
    }

    /// Sends the request, with record `number` if it appends, and waits for the answer.
    pub(crate) async fn send(&mut self, request: &mut Request, number: u64) -> anyhow::Result<()> {
        self.stream.write_all(request.stamp(number)).await?;
        let mut filled = 0;
        loop {
            if filled == self.buffer.len() {
                self.buffer.resize(2 * filled, 0);
            }
            let read = self.stream.read(&mut self.buffer[filled..]).await?;
            ensure!(read > 0, "the server hung up on a request");
            filled += read;
            if (request.answered)(&self.buffer[..filled])?.is_some() {
                return Ok(());
            }
        }
    }
}

/// What a row of answers came to.
pub(crate) struct Answers {
    per_second: f64,
    spread: Spread,
    server_us: f64,
    client_us: f64,
}

impl Answers {
    /// As the tables show them.
    pub(crate) fn values(&self) -> Vec<(Metric, f64)> {
        vec![
            (Metric::PerSecond, self.per_second),
            (Metric::P50, self.spread.p50),
            (Metric::P99, self.spread.p99),
            (Metric::ServerUs, self.server_us),
            (Metric::ClientUs, self.client_us),
        ]
    }
}

/// One sequential writer per request, for `time` after warming up.
pub(crate) async fn answers(
    server: &Server,
    requests: Vec<Request>,
    time: Duration,
) -> anyhow::Result<Answers> {
    let mut writers = Vec::with_capacity(requests.len());
    for request in requests {
        writers.push((Writer::connect(server).await?, request));
    }
    let (start, end) = warm_up(time);
    let mut tasks = JoinSet::new();
    for (writer, request) in writers {
        tasks.spawn(write(writer, request, start, end));
    }
    measure(server, tasks, Measured { start, end, time }).await
}

/// When counting begins and ends, if the load begins now.
pub(crate) fn warm_up(time: Duration) -> (Instant, Instant) {
    let start = Instant::now() + WARM_UP;
    (start, start + time)
}

/// The time that counts.
pub(crate) struct Measured {
    pub(crate) start: Instant,
    pub(crate) end: Instant,
    pub(crate) time: Duration,
}

/// What a load comes to that is under way.
pub(crate) async fn measure(
    server: &Server,
    mut tasks: JoinSet<anyhow::Result<Latency>>,
    Measured { start, end, time }: Measured,
) -> anyhow::Result<Answers> {
    tokio::time::sleep_until(start.into()).await;
    let (began, server_before, client_before) = (Instant::now(), server.cpu()?, own_cpu()?);
    tokio::time::sleep_until(end.into()).await;
    let (took, server_after, client_after) = (began.elapsed(), server.cpu()?, own_cpu()?);
    let mut latency = Latency::default();
    while let Some(done) = tasks.join_next().await {
        latency.join(done??);
    }
    let spread = latency.spread()?;
    let count = spread.count.max(1) as f64;
    // A busy machine wakes us late, so the rates are over the time that really passed.
    let stretch = took.as_secs_f64() / time.as_secs_f64();
    Ok(Answers {
        per_second: count / time.as_secs_f64(),
        spread,
        server_us: micros(server_after - server_before) / (count * stretch),
        client_us: micros(client_after - client_before) / (count * stretch),
    })
}

async fn write(
    mut writer: Writer,
    mut request: Request,
    start: Instant,
    end: Instant,
) -> anyhow::Result<Latency> {
    let mut latency = Latency::default();
    for number in 0.. {
        let sent = Instant::now();
        if sent >= end {
            break;
        }
        writer.send(&mut request, number).await?;
        let answered = Instant::now();
        if sent >= start && answered <= end {
            latency.record(answered - sent);
        }
    }
    Ok(latency)
}

/// Appends records 0 to `count` to one session, in no particular order.
pub(crate) async fn fill(
    target: &dyn Target,
    server: &Server,
    session: &str,
    count: u64,
) -> anyhow::Result<()> {
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    for _ in 0..FILLERS {
        let mut writer = Writer::connect(server).await?;
        let mut request = target.append(server, session);
        let next = Arc::clone(&next);
        tasks.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return Ok(());
                }
                writer.send(&mut request, number).await?;
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done?.context("cannot fill the session")?;
    }
    Ok(())
}

/// Microseconds as the tables show them.
pub(crate) fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
