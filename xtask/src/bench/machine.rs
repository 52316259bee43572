//! The machine under the numbers: cores, kernel, the disk, and what one fdatasync costs on it.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::stats::{Latency, Spread};
use crate::process;

/// Time of one measurement of the floor.
const FLOOR: Duration = Duration::from_secs(2);

/// What stands above the tables.
pub(crate) struct Machine {
    /// One line each.
    pub(crate) lines: Vec<String>,
}

impl Machine {
    /// Looks around.
    ///
    /// # Errors
    /// If `home` lies in memory, where an fsync is free.
    pub(crate) fn look(home: &Path) -> anyhow::Result<Self> {
        let cores = thread::available_parallelism()?;
        let cpu = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("");
        let model = model.trim_start_matches([' ', '\t', ':']);
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let load = fs::read_to_string("/proc/loadavg")?;
        let (kind, device) = file_system(home)?;
        if ["tmpfs", "ramfs"].contains(&kind.as_str()) {
            bail!("{} is {kind}: an fsync there costs nothing; give --dir on a disk", home.display());
        }
        let date = process::answer(Command::new("date").args(["-u", "+%F %H:%M UTC"])).unwrap_or_default();
        Ok(Self {
            lines: vec![
                format!("date: {date}"),
                format!("cores: {cores} ({model}), shared by the server and the load generator"),
                format!("kernel: Linux {}", kernel.trim()),
                format!("file system: {kind} on {device}, mounted as found"),
                format!("load average at the start: {}", load.trim()),
            ],
        })
    }
}

/// Type and device of the file system that holds `path`.
fn file_system(path: &Path) -> anyhow::Result<(String, String)> {
    let path = path.canonicalize()?;
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (device, point, kind) = (words.next()?, words.next()?, words.next()?);
            path.starts_with(point).then_some((point.len(), kind.to_owned(), device.to_owned()))
        })
        .max_by_key(|(length, ..)| *length)
        .map(|(_, kind, device)| (kind, device))
        .context("no file system holds the folder")
}

/// Appends 512 bytes and syncs, again and again.
pub(crate) fn sync_floor(home: &Path) -> anyhow::Result<Spread> {
    let path = home.join("floor");
    let mut file = File::create(&path)?;
    let mut latency = Latency::default();
    let start = Instant::now();
    while start.elapsed() < FLOOR {
        let one = Instant::now();
        file.write_all(&[b'x'; 512])?;
        file.sync_data()?;
        latency.record(one.elapsed());
    }
    fs::remove_file(path)?;
    latency.spread()
}
