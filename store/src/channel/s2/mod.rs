//! S2 as the engine: s2.dev, or an s2-lite of one's own. Any number of replicas share one basin.
//!
//! Start at `writer`: one task for each channel that is written, with one pipeline to S2; `plan` decides about part ids.
//! `registry` is what closes a session, `outbox` finds closes that a crash has left without their row. `read` and `follow`
//! are the way back; followers of a channel share one connection. `remote` is the only file that sends requests.
//! Knows no session rows: what is closed is what was sealed in S2.

mod append;
mod codec;
mod follow;
mod index;
mod known;
mod outbox;
mod plan;
mod read;
mod registry;
mod remote;
mod writer;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use s2_sdk::types::{AppendRecord, ReadFrom, ReadLimits};
use secrecy::SecretString;

use self::codec::ID_STREAM;
use self::index::Indexes;
use self::known::Memory;
use self::outbox::Outbox;
use self::registry::Registry;
use self::remote::{Fault, Guard, Keep, Remote, away};
use self::writer::Writers;
use super::live::Live;
use super::observer::LogObserver;
use sessiond_domain::port::Followed;
use sessiond_domain::record::{Bounds, ReadLimit};
use sessiond_domain::{
    AppendAck, AppendInput, Background, ChannelKey, ChannelStore, Clock, Close, Closure, ConnectionBudget,
    Error, ReadStart, RecordBatch, Result, SessionId,
};

/// The first pause before something is tried again, before jitter.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// Longest an answer to "are you there" may take.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Which S2, and how it is used.
#[derive(Clone)]
pub struct S2Options {
    /// Scheme and authority of an s2-lite; `None` for s2.dev.
    pub endpoint: Option<String>,
    /// Name of the basin; made if there is none.
    pub basin: String,
    /// Access token; s2-lite looks at none.
    pub token: SecretString,
    /// Records older than this are trimmed by S2; `None` keeps them.
    pub retention: Option<Duration>,
    /// The longest pause before S2 is asked again while it is away, before jitter of up to as much again.
    pub longest_pause: Duration,
    /// Who is told what the engine does.
    pub observer: Arc<dyn LogObserver>,
    /// What watches the engine's tasks.
    pub background: Arc<Background>,
}

impl S2Options {
    /// What [`S2Options::longest_pause`] is outside tests.
    pub const LONGEST_PAUSE: Duration = Duration::from_secs(5);
}

impl fmt::Debug for S2Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { endpoint, basin, retention, .. } = self;
        f.debug_struct("S2Options")
            .field("endpoint", endpoint)
            .field("basin", basin)
            .field("retention", retention)
            .finish_non_exhaustive()
    }
}

/// Why S2 cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A setting makes no sense.
    #[error("the settings of S2 cannot be used: {0}")]
    Config(String),
    /// The basin makes streams by itself, so a seal would not know all that it has to cover.
    #[error(
        "the basin {0} creates streams on append or on read; switch both off, or sessions could be written after \
         their close"
    )]
    AutoCreate(String),
    /// S2 is away or does not let us in.
    #[error("S2 cannot be used")]
    S2(#[source] s2_sdk::error::RequestError),
    /// The basin cannot be prepared.
    #[error("the basin cannot be used")]
    Basin(#[source] Error),
}

/// What the tasks of this replica share.
struct Shared {
    remote: Arc<Remote>,
    registry: Registry,
    outbox: Arc<Outbox>,
    memory: Memory,
    indexes: Indexes,
    live: Arc<Live>,
    feeds: follow::Feeds,
    writers: Writers,
    longest_pause: Duration,
    observer: Arc<dyn LogObserver>,
    background: Arc<Background>,
}

/// The channels of one basin.
pub struct S2Channels {
    shared: Arc<Shared>,
    log_id: String,
}

impl S2Channels {
    /// Connects to a basin, making it if there is none.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(options: S2Options, clock: Arc<dyn Clock>) -> Result<Self, OpenError> {
        let remote = Arc::new(Remote::open(&options).await?);
        let log_id = claim_id(&remote).await.map_err(OpenError::Basin)?;
        let outbox = Arc::new(Outbox::new(remote.clone(), clock));
        let shared = Shared {
            registry: Registry::new(remote.clone(), outbox.clone(), options.background.clone()),
            remote,
            outbox,
            memory: Memory::default(),
            indexes: Indexes::default(),
            live: Arc::default(),
            feeds: follow::Feeds::default(),
            writers: Writers::default(),
            longest_pause: options.longest_pause,
            background: options.background,
            observer: options.observer,
        };
        Ok(Self { shared: Arc::new(shared), log_id })
    }

    /// The log's own id, made once for each basin.
    pub fn log_id(&self) -> &str {
        &self.log_id
    }

    /// Channels that have followers here.
    pub fn followed_channels(&self) -> usize {
        self.shared.live.len()
    }
}

/// Reads the id of the log, or writes it into a new basin.
async fn claim_id(remote: &Remote) -> Result<String> {
    let candidate = format!("log_{}", uuid::Uuid::new_v4().simple());
    let record = AppendRecord::new(candidate.clone()).map_err(Error::internal)?;
    let first = Guard { token: None, tail: Some(0) };
    match remote.append_surely(ID_STREAM, Keep::Always, vec![record], first).await {
        Ok(_) => return Ok(candidate),
        Err(Fault::Moved(_)) => {}
        Err(fault) => return Err(fault.into_error()),
    }
    let stored = remote.read(ID_STREAM, ReadFrom::SeqNum(0), ReadLimits::new().with_count(1)).await?;
    let stored = stored.unwrap_or_default().records.into_iter().next();
    let id = stored.and_then(|record| String::from_utf8(record.body.to_vec()).ok());
    id.ok_or_else(|| Error::internal("the basin's first record of its own cannot be read"))
}

impl fmt::Debug for S2Channels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S2Channels").field("log_id", &self.log_id).finish_non_exhaustive()
    }
}

#[async_trait]
impl ChannelStore for S2Channels {
    fn append(&self, key: &ChannelKey, input: AppendInput) -> BoxFuture<'static, Result<AppendAck>> {
        Writers::append(&self.shared, key, input)
    }

    async fn bounds(&self, key: &ChannelKey) -> Result<Bounds> {
        self.shared.bounds(key).await
    }

    async fn read(&self, key: &ChannelKey, start: ReadStart, limit: ReadLimit) -> Result<Arc<RecordBatch>> {
        self.shared.read(key, start, limit).await.map(Arc::new)
    }

    async fn follow(
        &self,
        key: &ChannelKey,
        start: ReadStart,
        budget: &ConnectionBudget,
    ) -> Result<BoxStream<'static, Result<Followed>>> {
        follow::follow(self.shared.clone(), key.clone(), start, budget.clone()).await
    }

    async fn seal(&self, session: &SessionId, close: Close) -> Result<Closure> {
        self.shared.registry.seal(session, &close).await
    }

    async fn settle(&self, session: &SessionId) -> Result<()> {
        self.shared.outbox.settle(session).await
    }

    async fn unsettled(&self) -> Result<Vec<(SessionId, Closure)>> {
        let mut found = Vec::new();
        for notice in self.shared.outbox.open().await? {
            match self.shared.registry.completed(&notice.session).await? {
                Some(closure) => found.push((notice.session, closure)),
                None => self.shared.outbox.abandon(&notice).await?,
            }
        }
        Ok(found)
    }

    async fn ping(&self) -> Result<()> {
        let answer = tokio::time::timeout(PING_TIMEOUT, self.shared.remote.tail(ID_STREAM)).await;
        answer.map_err(away)?.map(drop)
    }
}
