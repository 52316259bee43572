//! Puts the parts together: configuration to adapters, adapters to use cases, use cases to doors.
//! The only place that picks an adapter.

mod files;
mod master_key;
mod private;
mod replicating;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use secrecy::{ExposeSecret, SecretString};
use tokio_util::sync::CancellationToken;

use crate::api::rate_limit::{Rate, RateLimits};
use crate::api::{self, ApiConfig, ApiState};
use crate::auth::Auth;
use crate::auth::keys::{Keys, NewEnvironment, RevealedKey};
use crate::auth::vault::Vault;
use crate::config::{BlobPlace, ClickHouseConfig, Config, Fallback, HttpConfig, ListSource};
use crate::domain::tenant::{Environment, EnvironmentKind, StoredKey};
use crate::domain::timer::Timers;
use crate::domain::{
    Backends, Background, Blobs, ChannelStore, Clock, ListIndex, MetadataStore, Sessions, SessionsConfig,
    Ticker,
};
use crate::listener::Listener;
use crate::replication::{self, leader::Replicator};
use crate::shutdown::Shutdown;
use crate::store::blob::{ObjectBlobs, S3Options};
use crate::store::channel::log::{LogChannels, LogOptions};
use crate::store::channel::s2::{S2Channels, S2Options};
use crate::store::channel::{CommitStats, LogObserver};
use crate::store::index::clickhouse::{ClickHouse, ClickHouseIndex, ClickHouseOptions};
use crate::store::index::fallback::FallbackIndex;
use crate::store::index::sql::SqlIndex;
use crate::store::metadata::{OpenError, OpenOptions, SqlMetadata};
use crate::telemetry::{self, Metrics};
use files::Files;
pub use private::keep_private;
pub use replicating::{open_context, replicator, source_options};

/// The environment that a first start makes.
const DEFAULT_NAME: &str = "default";
/// How often closes are looked for that another replica has begun and may not have finished.
const RECOVER_EVERY: Duration = Duration::from_secs(30);
/// How often expired sessions are marked.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// Linux's number of the signal that a write past the file size limit raises; unhandled it ends the process.
const SIGXFSZ: i32 = 25;

/// The control plane without a listener, as the command line uses it.
pub struct Control {
    /// Sessions, environments, keys.
    pub store: Arc<SqlMetadata>,
    /// Protects keys.
    pub vault: Arc<Vault>,
    /// The time.
    pub clock: Arc<dyn Clock>,
}

impl Control {
    /// Opens the metadata store (migrating it) and the vault; makes what is missing of both.
    ///
    /// # Errors
    /// If the store cannot be opened, or the master key is not the one that its keys are sealed with.
    pub async fn open(config: &Config, clock: Arc<dyn Clock>) -> anyhow::Result<Self> {
        private::make_folder(&config.data)
            .with_context(|| format!("cannot make the data folder {}", config.data.display()))?;
        Self::open_store(config, clock, true).await
    }

    /// As [`Control::open`], but makes nothing: a mistyped folder must not become a store of its own.
    ///
    /// # Errors
    /// As [`Control::open`]; if there is no store.
    pub async fn open_existing(config: &Config, clock: Arc<dyn Clock>) -> anyhow::Result<Self> {
        Self::open_store(config, clock, false).await
    }

    async fn open_store(config: &Config, clock: Arc<dyn Clock>, create: bool) -> anyhow::Result<Self> {
        let connections = config.metadata.connections;
        let options = OpenOptions { connections, create, ..OpenOptions::default() };
        let store = match SqlMetadata::open(&config.metadata_url(), options).await {
            Err(missing @ OpenError::Missing(_)) => {
                bail!("{missing}: `sessiond serve` makes one, and --data says in which folder")
            }
            other => Arc::new(other?),
        };
        let sealed = store.sample_keys(clock.now(), master_key::TRIED).await?;
        let vault = Arc::new(master_key::open(config, &sealed, create)?);
        Ok(Self { store, vault, clock })
    }

    /// Key management.
    pub fn keys(&self) -> Keys<'_> {
        Keys::new(self.store.clone(), &self.vault, self.clock.clone())
    }

    /// The oldest environment, made if there is none, and its root key.
    ///
    /// # Errors
    /// If the store is away, or the given secret cannot be used.
    pub async fn default_environment(
        &self,
        secret: Option<SecretString>,
    ) -> anyhow::Result<(Environment, RootKey)> {
        let keys = self.keys();
        let Some(environment) = self.store.environments().await?.into_iter().next() else {
            let kind = secret.as_ref().map_or(EnvironmentKind::Development, kind_of);
            let new = NewEnvironment {
                organization: DEFAULT_NAME.to_owned(),
                project: DEFAULT_NAME.to_owned(),
                slug: kind.as_str().to_owned(),
                kind,
            };
            let (environment, made) = keys.create_environment(new, secret).await?;
            let key = if made.key.given { RootKey::Given(made.key) } else { RootKey::Made(made) };
            return Ok((environment, key));
        };
        let key = match secret {
            Some(secret) => {
                let (key, new) = keys.adopt(&environment, secret).await?;
                self.name_others(&key, new).await?;
                RootKey::Given(key)
            }
            None => match keys.current_root(&environment.id).await? {
                Some(key) => RootKey::Stored(key),
                None => RootKey::Made(keys.create(&environment, "made at start", None, None).await?),
            },
        };
        Ok((environment, key))
    }

    /// Warns of root keys that still live beside the one that is given now: of all when the setting has changed, later of
    /// those that were given before, because who changes a secret mostly means to end the old one.
    async fn name_others(&self, given: &StoredKey, new: bool) -> anyhow::Result<()> {
        let now = self.clock.now();
        let keys = self.keys().list(&given.environment).await?;
        let others = keys.iter().filter(|key| key.is_root() && key.is_live(now) && key.id != given.id);
        let others: Vec<_> = others.filter(|key| new || key.given).map(|key| key.id.as_str()).collect();
        if !others.is_empty() {
            tracing::warn!(
                key = %given.id,
                still_live = others.join(" "),
                changed = new,
                "SESSIOND_SECRET_KEY (secret_key) is not the only root key: what it was before still opens the \
                 environment until `sessiond keys revoke` ends it"
            );
        }
        Ok(())
    }
}

/// The root key of the default environment, and how a start came by it.
pub enum RootKey {
    /// Made by this start, the only one that shows it of its own accord.
    Made(RevealedKey),
    /// Stored before.
    Stored(StoredKey),
    /// Given by the setting `secret_key`. Its secret is the operator's and never shown.
    Given(StoredKey),
}

/// The log in use.
#[derive(Clone)]
enum Engine {
    /// In the data folder.
    Log(Arc<LogChannels>),
    /// In a basin that other replicas may share.
    S2(Arc<S2Channels>),
}

impl Engine {
    async fn open(
        config: &Config,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
        background: Arc<Background>,
    ) -> anyhow::Result<Self> {
        let observer = Arc::new(LogMetrics(metrics));
        let retention = config.log.retention;
        let Some(basin) = config.log.basin() else {
            let disk_reserve = config.log.disk_reserve_mib.map(|mib| mib.saturating_mul(1 << 20));
            let options =
                LogOptions { retention, disk_reserve, observer, background, ..LogOptions::default() };
            let log = LogChannels::open(config.log_dir(), options, clock).context("cannot open the log")?;
            return Ok(Self::Log(Arc::new(log)));
        };
        let options = S2Options {
            endpoint: config.log.endpoint.as_ref().map(|url| url.origin().ascii_serialization()),
            basin: basin.to_owned(),
            token: config.log.token.clone().unwrap_or_else(|| "none".into()),
            retention,
            longest_pause: S2Options::LONGEST_PAUSE,
            observer,
            background,
        };
        Ok(Self::S2(Arc::new(S2Channels::open(options, clock).await.context("cannot open the log")?)))
    }

    fn channels(&self) -> Arc<dyn ChannelStore> {
        match self {
            Self::Log(log) => log.clone(),
            Self::S2(s2) => s2.clone(),
        }
    }

    fn log_id(&self) -> &str {
        match self {
            Self::Log(log) => log.log_id(),
            Self::S2(s2) => s2.log_id(),
        }
    }

    /// Whether other processes may use the same log.
    fn is_shared(&self) -> bool {
        matches!(self, Self::S2(_))
    }
}

/// A server that is bound and ready to run.
pub struct Server {
    control: Control,
    sessions: Arc<Sessions>,
    auth: Arc<Auth>,
    timers: Arc<Timers>,
    engine: Engine,
    metrics: Arc<Metrics>,
    listener: Listener,
    shutdown: Shutdown,
    /// `None` unless one is to run beside the server.
    replicator: Option<Box<Replicator>>,
    config: Config,
    key: RootKey,
}

impl Server {
    /// Opens every backend and binds the listener.
    ///
    /// # Errors
    /// If a backend cannot be opened, the log belongs to another metadata store, or the address is taken.
    pub async fn start(config: Config, clock: Arc<dyn Clock>) -> anyhow::Result<Self> {
        let metrics = Metrics::new();
        let files = Files::share(&config)?;
        let http = HttpConfig { max_connections: files.connections, ..config.http.clone() };
        let listener = Listener::bind(http, files.downloads(), metrics.clone()).await?;
        private::repair(&config);
        let control = Control::open(&config, clock.clone()).await?;
        let faults = metrics.clone();
        let shutdown = Shutdown::new(move |task| faults.task_fault(task));
        let background = shutdown.background().clone();
        let engine = Engine::open(&config, clock.clone(), metrics.clone(), background.clone()).await?;
        claim_log(&control, engine.log_id()).await?;
        let (_, key) = control.default_environment(config.secret_key.clone()).await?;
        let timers = Timers::new(clock.clone());
        let backends = Backends {
            store: control.store.clone(),
            waitpoints: control.store.clone(),
            channels: engine.channels(),
            index: open_index(&config.clickhouse, &control, &background)?,
            blobs: open_blobs(&config, files.blobs)?,
            clock: clock.clone(),
            timers: timers.clone(),
            background,
            stopping: shutdown.draining().clone(),
        };
        let rows =
            SessionsConfig { cached_rows: config.metadata.cached_rows, replicated: engine.is_shared() };
        let sessions = Sessions::new(backends, rows);
        sessions.recover().await?;
        let auth = Auth::new(control.store.clone(), control.vault.clone(), clock.clone(), timers.clone());
        let replicator = config.replication.enabled.then(|| {
            let metadata = SqlMetadata::clone(&control.store);
            let watch = (shutdown.background().clone(), metrics.replication().clone());
            replicator(&config, open_context(&config, metadata, watch, clock)?).map(Box::new)
        });
        // Nothing of it keeps the server from its work.
        let replicator = replicator.and_then(|replicator| {
            let hindered = |error: &anyhow::Error| {
                tracing::error!(error = &**error as &dyn std::error::Error, "cannot replicate to ClickHouse");
                shutdown.background().hindered(replication::NAME, Some(replication::HINDRANCE));
            };
            replicator.inspect_err(hindered).ok()
        });
        Ok(Self {
            control,
            sessions,
            auth,
            timers,
            engine,
            metrics,
            listener,
            shutdown,
            replicator,
            config,
            key,
        })
    }

    /// The address in use.
    ///
    /// # Errors
    /// If the socket has none.
    pub fn local_addr(&self) -> anyhow::Result<SocketAddr> {
        Ok(self.listener.local_addr()?)
    }

    /// The origin that clients on this machine use.
    ///
    /// # Errors
    /// As [`Server::local_addr`].
    pub fn base_url(&self) -> anyhow::Result<String> {
        let mut address = self.local_addr()?;
        if address.ip().is_unspecified() {
            address.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
        }
        Ok(format!("{}://{address}", self.listener.scheme()))
    }

    /// The root key of the default environment.
    pub fn root_key(&self) -> &RootKey {
        &self.key
    }

    /// The control plane of this server.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// What the front ends stand on.
    pub fn api_state(&self) -> ApiState {
        ApiState {
            sessions: self.sessions.clone(),
            auth: self.auth.clone(),
            metrics: self.metrics.clone(),
            clock: self.control.clock.clone(),
            config: api_config(&self.config),
            shutdown: self.shutdown.clone(),
        }
    }

    /// Serves until `stop` completes, and for `http.shutdown_delay` longer unless `hurry` completes; then stops gracefully. Stops
    /// as well, at once, when a task has failed without which it must not go on.
    ///
    /// # Errors
    /// If such a task has failed, or the log cannot be closed.
    pub async fn run(
        self,
        stop: impl Future<Output = ()>,
        hurry: impl Future<Output = ()>,
    ) -> anyhow::Result<()> {
        let address = self.local_addr()?;
        self.keep_tasks();
        let router = api::router(self.api_state());
        let background = self.shutdown.background();
        let stop_replicating = CancellationToken::new();
        let replicating = self.replicator.map(|replicator| replicator.start(stop_replicating.clone()));
        let listening = background.require("listener", self.listener.serve(router, self.shutdown.clone()));
        tracing::info!(%address, "listening");
        tokio::select! {
            () = stop => {}
            _ = background.failed() => {}
        }
        self.shutdown.announce();
        let delay = self.config.http.shutdown_delay;
        // What a failed task leaves undone is worse than a client that comes too late.
        if background.has_failed().is_none() && !delay.is_zero() {
            tracing::info!(?delay, "not ready any more; stopping after the delay, or at a second signal");
            tokio::select! {
                _ = tokio::time::timeout(delay, hurry) => {}
                _ = background.failed() => {}
            }
        }
        tracing::info!("stopping");
        self.shutdown.begin();
        self.timers.wake_all();
        let cut = self.shutdown.finish(self.config.http.shutdown_deadline).await;
        if cut > 0 {
            tracing::warn!(connections = cut, "cut connections that did not end in time");
        }
        listening.await?;
        // After the last request, so that what it has changed is not left for another replicator.
        stop_replicating.cancel();
        if let Some(replicating) = replicating {
            replicating.await?;
        }
        if let Engine::Log(log) = self.engine {
            tokio::task::spawn_blocking(move || log.close()).await?;
        }
        self.control.store.close().await;
        tracing::info!("stopped");
        match self.shutdown.background().has_failed() {
            Some(task) => bail!("the background task {task:?} has failed, and nothing can go on without it"),
            None => Ok(()),
        }
    }

    /// Begins what runs beside the requests. Without timers streams do not end on time, and without the watch over keys
    /// revoked ones go on opening: then the server ends, and whoever runs it starts it again.
    fn keep_tasks(&self) {
        let (background, stop) = (self.shutdown.background(), self.shutdown.draining());
        background.require("timers", self.timers.clone().run(stop.clone()));
        background.require("watch over keys", self.auth.clone().watch_keys(stop.clone()));
        let (sessions, clock, store) =
            (self.sessions.clone(), self.control.clock.clone(), self.control.store.clone());
        let token = stop.clone();
        background
            .keep("expired sessions", move || sweep_expired(store.clone(), clock.clone(), token.clone()));
        if self.engine.is_shared() {
            let (shared, token) = (sessions.clone(), stop.clone());
            background.keep("closes elsewhere", move || shared.clone().watch_replicas(token.clone()));
            let (shared, token) = (sessions.clone(), stop.clone());
            background.keep("unfinished closes", move || recover_regularly(shared.clone(), token.clone()));
        }
        background.keep("waits", move || sessions.clone().end_waits());
    }
}

/// Sets what holds for the whole process: one TLS provider, panics in the log, all the files we may open, no death by SIGXFSZ.
///
/// # Errors
/// If the signal handler cannot be installed.
pub fn prepare_process() -> anyhow::Result<()> {
    // A second call finds the provider in place, which is what we want.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    telemetry::log_panics();
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        tracing::warn!(error = &error as &dyn std::error::Error, "cannot raise the limit on open files");
    }
    let kind = tokio::signal::unix::SignalKind::from_raw(SIGXFSZ);
    let mut full = tokio::signal::unix::signal(kind)?;
    tokio::spawn(async move { while full.recv().await.is_some() {} });
    Ok(())
}

/// A connection to the ClickHouse of the settings, not yet made.
///
/// # Errors
/// If its URL needs TLS and this machine trusts no certificates.
pub fn open_clickhouse(config: &ClickHouseConfig) -> anyhow::Result<ClickHouse> {
    let options = ClickHouseOptions {
        url: config.url.as_ref().map(ToString::to_string).unwrap_or_default(),
        database: config.database.clone(),
        user: config.user.clone(),
        password: config.password.clone(),
        query_timeout: config.query_timeout,
        insert_timeout: config.insert_timeout,
        cluster: config.cluster.clone(),
        metadata_column: config.metadata_column,
    };
    ClickHouse::new(options).context("cannot use ClickHouse")
}

/// Asks ClickHouse nothing: it may be away when the server starts.
fn open_index(
    config: &ClickHouseConfig,
    control: &Control,
    background: &Arc<Background>,
) -> anyhow::Result<Arc<dyn ListIndex>> {
    let sql = Arc::new(SqlIndex::new(SqlMetadata::clone(&control.store)));
    if config.url.is_none() || config.lists == ListSource::Sql {
        return Ok(sql);
    }
    let clickhouse = open_clickhouse(config)?;
    let index = Arc::new(ClickHouseIndex::new(clickhouse, control.store.clone(), background.clone()));
    Ok(match config.fallback {
        Fallback::None => index,
        Fallback::Sql => Arc::new(FallbackIndex::new(index, sql)),
    })
}

fn open_blobs(config: &Config, at_once: usize) -> anyhow::Result<Arc<dyn Blobs>> {
    let blobs = &config.blobs;
    let opened = match blobs.place() {
        None => ObjectBlobs::folder(&config.blobs_dir()),
        Some(BlobPlace::Folder(folder)) => ObjectBlobs::folder(&folder),
        Some(BlobPlace::S3 { bucket, prefix }) => ObjectBlobs::s3(&S3Options {
            bucket,
            prefix,
            endpoint: blobs.endpoint.as_ref().map(ToString::to_string),
            region: blobs.region.clone(),
            credentials: blobs.access_key.clone().zip(blobs.secret_key.clone()),
            allow_http: blobs.allow_http,
        }),
    };
    Ok(Arc::new(opened.context("cannot open the store of blobs")?.at_once(at_once)))
}

/// A log and a metadata store belong together for ever: with another's log every session would lose its records.
async fn claim_log(control: &Control, ours: &str) -> anyhow::Result<()> {
    let known = control.store.claim_log(ours).await?;
    anyhow::ensure!(
        ours == known,
        "the log in use (id {ours}) belongs to another metadata store; this one's log has the id {known}"
    );
    Ok(())
}

fn api_config(config: &Config) -> ApiConfig {
    let http = &config.http;
    let HttpConfig { rate_limit, cors_origins, .. } = http;
    let any = cors_origins.iter().any(|origin| origin == "*");
    ApiConfig {
        allowed_origins: (!any).then(|| cors_origins.clone().into()),
        rate_limits: RateLimits {
            environment: Rate::new(rate_limit.key_burst, rate_limit.key_per_10s, Duration::from_secs(10)),
            token: Rate::new(
                rate_limit.token_per_minute,
                rate_limit.token_per_minute,
                Duration::from_secs(60),
            ),
            address: Rate::new(rate_limit.anonymous, rate_limit.anonymous, Duration::from_secs(10)),
        },
        trusted_proxies: http.trusted_networks(),
        body_chunk_timeout: http.body_pause_timeout,
        body_timeout: http.body_timeout,
        graphql: config.graphql.clone(),
        direct: config.direct.clone(),
        url_ttl: config.blobs.url_ttl,
        // Of the URL what an origin is: scheme, host, port.
        public_url: http.public_url.as_ref().map(|url| url.origin().ascii_serialization()),
        tls: http.tls.certificate.is_some(),
    }
}

/// Finds closes of replicas that died between the log and the row, and did not come back.
async fn recover_regularly(sessions: Arc<Sessions>, stop: CancellationToken) {
    let mut ticker = Ticker::new(RECOVER_EVERY, stop);
    // The first tick is at once, and the start has done that already.
    ticker.tick().await;
    while ticker.tick().await {
        if let Err(error) = sessions.recover().await {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot look for closes without a row");
        }
    }
}

/// Keeps lists by status fast; they are exact without it.
async fn sweep_expired(store: Arc<SqlMetadata>, clock: Arc<dyn Clock>, stop: CancellationToken) {
    let mut ticker = Ticker::new(SWEEP_EVERY, stop);
    while ticker.tick().await {
        if let Err(error) = store.sweep_expired(clock.now()).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot mark expired sessions");
        }
    }
}

struct LogMetrics(Arc<Metrics>);

impl LogObserver for LogMetrics {
    fn committed(&self, stats: CommitStats) {
        self.0.committed(stats.records, stats.bytes, stats.sync_duration);
    }

    // Counted at the doors, where it is known which door.
    fn followers(&self, _: i64) {}

    fn poisoned(&self) {
        self.0.log_poisoned();
    }
}

fn kind_of(secret: &SecretString) -> EnvironmentKind {
    let kind = secret.expose_secret().strip_prefix("tr_").and_then(|rest| rest.split('_').next());
    kind.and_then(EnvironmentKind::parse).unwrap_or(EnvironmentKind::Development)
}
