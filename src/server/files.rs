//! Shares the limit on open files out, so that connections cannot take what the stores need: a log that cannot open a file
//! takes no append until a restart.

use anyhow::ensure;

use crate::config::{BlobPlace, Config};
use crate::store::blob::ObjectBlobs;
use crate::store::channel::log::LogChannels;
use crate::store::metadata::{OpenOptions, SqlMetadata};

/// Standard streams, epoll, wakers, signals, the listener, and name look-ups; the rest is room for what nobody foresaw.
const BASE: u64 = 64;
/// Fewer connections than this are no service.
const CONNECTIONS_MIN: u64 = 64;
/// Part of the limit that blobs get, and its bounds: blobs that are written or read at once.
const BLOBS_SHARE: u64 = 32;
const BLOBS: (u64, u64) = (16, 1024);
/// Part of the limit that connections to S2 get, each of which carries a hundred channels, and its bounds.
const S2_SHARE: u64 = 16;
const S2: (u64, u64) = (32, 1024);

/// A replicator: its connections to Postgres, the stream with the tunnel to it, and connections to ClickHouse, but for those of
/// inserts that are on their way.
const REPLICATION: u64 = 32;

/// Who gets how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Files {
    /// Connections that are accepted.
    pub connections: usize,
    /// Blobs that are written or read at once.
    pub blobs: usize,
}

impl Files {
    /// Of the limit that this process has. Lowers `http.max_connections` with a warning if it must.
    ///
    /// # Errors
    /// If the limit is too low to work with.
    pub(super) fn share(config: &Config) -> anyhow::Result<Self> {
        let (limit, _) = rlimit::getrlimit(rlimit::Resource::NOFILE)?;
        let files = Self::of(limit, config)?;
        if files.connections < config.http.max_connections {
            tracing::warn!(
                max_connections = files.connections,
                wanted = config.http.max_connections,
                open_files = limit,
                "fewer connections are taken than http.max_connections says, because the limit on open files is too low: \
                 raise it (ulimit -n, LimitNOFILE)"
            );
        }
        Ok(files)
    }

    /// Blobs that are sent to clients at once, at a pace that those choose: not all that may be read.
    pub(super) fn downloads(self) -> usize {
        ObjectBlobs::reads(self.blobs) * 3 / 4
    }

    fn of(limit: u64, config: &Config) -> anyhow::Result<Self> {
        let part = |share: u64, (least, most)| (limit / share).clamp(least, most);
        let options = OpenOptions { connections: config.metadata.connections, ..OpenOptions::default() };
        let metadata = SqlMetadata::files(&config.metadata_url(), options);
        let log = if config.log.basin().is_some() { part(S2_SHARE, S2) } else { LogChannels::FILES };
        // Those that a bucket leaves idle are no more than those it had at once.
        let each = match config.blobs.place() {
            Some(BlobPlace::S3 { .. }) => 1,
            _ => ObjectBlobs::FILES_EACH,
        };
        let blobs = part(BLOBS_SHARE, BLOBS);
        let replication =
            if config.replication.enabled { REPLICATION + config.replication.in_flight as u64 } else { 0 };
        let reserve = BASE + metadata + log + replication + blobs * each;
        let needed = reserve + CONNECTIONS_MIN.min(config.http.max_connections as u64);
        ensure!(
            limit >= needed,
            "the limit on open files is {limit}, and the server needs at least {needed}: raise it (ulimit -n, LimitNOFILE)"
        );
        let left = usize::try_from(limit - reserve).unwrap_or(usize::MAX);
        let blobs = usize::try_from(blobs).unwrap_or(usize::MAX);
        Ok(Self { connections: config.http.max_connections.min(left), blobs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Overrides;

    fn config() -> Config {
        Config::load(&Overrides::default()).expect("the defaults")
    }

    #[test]
    fn connections_get_what_the_stores_leave() {
        let config = config();
        let of = |limit| Files::of(limit, &config);
        for low in [0, 256, 512] {
            let refusal = of(low).expect_err("too low").to_string();
            assert!(refusal.contains(&format!("is {low}, and")), "{refusal}");
        }
        let small = of(1024).expect("enough");
        assert!((400..700).contains(&small.connections) && small.blobs == 32, "{small:?}");
        let usual = of(4096).expect("enough");
        assert!((3300..3700).contains(&usual.connections), "{usual:?}");
        assert_eq!(of(u64::MAX).expect("enough"), Files { connections: 50_000, blobs: 1024 });
    }

    #[test]
    fn the_least_limit_is_the_one_that_is_named() {
        let config = config();
        let refusal = Files::of(1, &config).expect_err("too low").to_string();
        let words: Vec<_> = refusal.split([' ', ':']).collect();
        let needed: u64 = words.iter().filter_map(|word| word.parse().ok()).max().expect("a number");
        assert!(Files::of(needed - 1, &config).is_err());
        assert_eq!(Files::of(needed, &config).expect("enough").connections, 64);
    }

    #[test]
    fn upstream_sockets_count_too() {
        let mut s2 = config();
        s2.log.url = Some("s2://basin-of-ours".parse().expect("a URL"));
        let mut s3 = config();
        s3.blobs.url = Some("s3://bucket/prefix".parse().expect("a URL"));
        let mut postgres = config();
        postgres.metadata.url = Some("postgres://x".to_owned().into());
        postgres.metadata.connections = 500;
        let usual = Files::of(4096, &config()).expect("enough").connections;
        let connections =
            [s2, s3, postgres].map(|config| Files::of(4096, &config).expect("enough").connections);
        assert!(connections[0] > usual, "256 to S2 are fewer than the log's");
        assert!(connections[1] > usual, "a bucket has no folder to sync");
        assert!(connections[2] < usual - 400, "{connections:?} and {usual}");
    }
}
