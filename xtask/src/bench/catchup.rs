//! Reading a long session from its first record: one blocking connection, as fast as the server gives.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::ensure;

use super::load::micros;
use super::server::Server;
use super::stats::median;
use super::target::Reader;

/// Most passes of one row.
const PASSES: usize = 20;

/// What it came to.
pub(crate) struct CaughtUp {
    /// Millions of bytes a second as they crossed the wire, the median of the passes.
    pub(crate) rate: f64,
    /// Bytes of one pass.
    pub(crate) bytes: u64,
    pub(crate) server_us: f64,
}

/// Reads records 0 to `count` again and again for about `time`, each pass with a new reader.
pub(crate) fn catch_up(
    server: &Server,
    count: u64,
    time: Duration,
    reader: impl Fn() -> Box<dyn Reader>,
) -> anyhow::Result<CaughtUp> {
    // The first pass may find cold caches; it is checked but not counted.
    pass(server, count, reader().as_mut())?;
    let (began, cpu) = (Instant::now(), server.cpu()?);
    let (mut rates, mut bytes) = (Vec::new(), 0);
    while rates.len() < PASSES && (rates.len() < 3 || began.elapsed() < time) {
        let (read, took) = pass(server, count, reader().as_mut())?;
        rates.push(read as f64 / 1e6 / took.as_secs_f64());
        bytes = read;
    }
    let records = (count * rates.len() as u64) as f64;
    let server_us = micros(server.cpu()? - cpu) / records;
    Ok(CaughtUp { rate: median(rates).unwrap_or(0.0), bytes, server_us })
}

/// One pass: every record must come exactly once. Bytes and time from the request to the last record.
fn pass(server: &Server, count: u64, reader: &mut dyn Reader) -> anyhow::Result<(u64, Duration)> {
    let mut stream = server.connect()?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut seen = vec![false; usize::try_from(count)?];
    let (mut found, mut repeated, mut bytes) = (0, 0, 0);
    let mut buffer = vec![0; 256 * 1024];
    let began = Instant::now();
    stream.write_all(&reader.request())?;
    while found < count {
        let read = stream.read(&mut buffer)?;
        ensure!(read > 0, "the server hung up after {found} records");
        bytes += read as u64;
        let next = reader.feed(&buffer[..read], &mut |mark| match seen.get_mut(mark.number as usize) {
            Some(seen) if !*seen => {
                *seen = true;
                found += 1;
            }
            _ => repeated += 1,
        })?;
        if let Some(next) = next {
            stream.write_all(&next)?;
        }
    }
    ensure!(repeated == 0, "{repeated} records came twice");
    Ok((bytes, began.elapsed()))
}
