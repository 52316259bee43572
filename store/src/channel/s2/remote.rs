//! The basin: every request to S2 passes here, and every fault of S2 becomes one of ours here.

use std::num::NonZeroU32;
use std::time::Duration;

use s2_sdk::append_session::{AppendSession, AppendSessionConfig};
use s2_sdk::error::{
    AppendConditionFailed, AppendError, AppendSessionError, ErrorCode, ReadError, RequestError,
};
use s2_sdk::read_session::ReadSession;
use s2_sdk::types::{
    AppendInput, AppendRecord, AppendRecordBatch, AppendRetryPolicy, BasinConfig, CreateBasinInput,
    EnsureStreamInput, FencingToken, ReadFrom, ReadInput, ReadLimits, ReadSessionConfig, ReadStart, ReadStop,
    RetentionPolicy, RetryConfig, S2Config, S2Endpoints, SequencedRecord, StreamConfig, TimestampingConfig,
    TimestampingMode,
};
use s2_sdk::{S2, S2Basin, S2Stream};
use secrecy::ExposeSecret;

use super::{FIRST_PAUSE, OpenError, S2Options, codec};
use sessiond_domain::record::BATCH_RECORDS_MAX;
use sessiond_domain::{Backoff, Error, Position, Result, SeqNum};

/// Longest a request or an ack may take before S2 counts as away.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Tries of a request that surely did nothing.
const ATTEMPTS: NonZeroU32 = NonZeroU32::new(3).expect("not zero");
/// Metered bytes that one channel may have on their way.
const SESSION_BYTES: u32 = 16 << 20;

/// Why S2 did not append.
#[derive(Debug)]
pub(super) enum Fault {
    /// There is no such stream; nothing was stored.
    NoStream,
    /// Another fencing token is set; nothing was stored.
    Fenced(String),
    /// The tail is elsewhere; nothing was stored.
    Moved(SeqNum),
    /// S2 cannot be reached or refused; nothing was stored.
    Away(Error),
    /// Nobody knows whether the records are stored, or will be.
    Unknown(Error),
}

impl Fault {
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::NoStream => away("a stream that was just made does not exist"),
            Self::Fenced(expected) => Error::Fenced { expected },
            Self::Moved(tail) => Error::SeqNumMismatch { tail },
            Self::Away(error) | Self::Unknown(error) => error,
        }
    }
}

/// What a stored-records request brought.
#[derive(Debug, Default)]
pub(super) struct Stored {
    /// Consecutive but for what retention has removed.
    pub records: Vec<SequencedRecord>,
    /// The tail, if the request began at it.
    pub at_tail: Option<Position>,
}

/// The client of one basin.
pub(super) struct Remote {
    basin: S2Basin,
    retention: Option<Duration>,
    longest_pause: Duration,
}

impl Remote {
    /// Connects, and makes the basin if there is none.
    pub(super) async fn open(options: &S2Options) -> Result<Self, OpenError> {
        let invalid = |error: s2_sdk::types::ValidationError| OpenError::Config(error.to_string());
        let endpoints = match &options.endpoint {
            Some(endpoint) => S2Endpoints::for_endpoint(endpoint).map_err(invalid)?,
            None => S2Endpoints::for_cloud(),
        };
        let retry = RetryConfig::new()
            .with_max_attempts(ATTEMPTS)
            .with_append_retry_policy(AppendRetryPolicy::NoSideEffects);
        let config = S2Config::new(options.token.expose_secret())
            .with_endpoints(endpoints)
            .with_retry(retry)
            .with_request_timeout(REQUEST_TIMEOUT)
            .with_connection_timeout(CONNECT_TIMEOUT)
            .with_rustls_crypto_provider(rustls::crypto::aws_lc_rs::default_provider());
        let s2 = S2::new(config).map_err(OpenError::S2)?;
        let name: s2_sdk::types::BasinName = options.basin.parse().map_err(invalid)?;
        match s2.get_basin_config(name.clone()).await {
            Ok(config) if config.create_stream_on_append || config.create_stream_on_read => {
                return Err(OpenError::AutoCreate(options.basin.clone()));
            }
            Ok(_) => {}
            Err(error) if code(&error) == Some(ErrorCode::BasinNotFound) => {
                let create = CreateBasinInput::new(name.clone()).with_config(BasinConfig::new());
                match s2.create_basin(create).await {
                    Err(error) if code(&error) != Some(ErrorCode::ResourceAlreadyExists) => {
                        return Err(OpenError::S2(error));
                    }
                    _ => {}
                }
            }
            Err(error) => return Err(OpenError::S2(error)),
        }
        let S2Options { retention, longest_pause, .. } = *options;
        Ok(Self { basin: s2.basin(name), retention, longest_pause })
    }

    fn stream(&self, name: &str) -> Result<S2Stream> {
        Ok(self.basin.stream(name.parse().map_err(Error::internal)?))
    }

    /// Makes a stream that may be there already. Those of our own bookkeeping keep their records for ever.
    pub(super) async fn ensure(&self, name: &str, keep: Keep) -> Result<()> {
        let retention = match (keep, self.retention) {
            (Keep::AsConfigured, Some(age)) => RetentionPolicy::Age(age.as_secs().max(1)),
            _ => RetentionPolicy::Infinite,
        };
        let times = TimestampingConfig::new().with_mode(TimestampingMode::ClientPrefer).with_uncapped(false);
        let config = StreamConfig::new().with_retention_policy(retention).with_timestamping(times);
        let input = EnsureStreamInput::new(name.parse().map_err(Error::internal)?).with_config(config);
        self.basin.ensure_stream(input).await.map(drop).map_err(away)
    }

    /// Appends once.
    pub(super) async fn append(
        &self,
        name: &str,
        records: Vec<AppendRecord>,
        guard: Guard<'_>,
    ) -> Result<Position, Fault> {
        let input = guard.input(records).map_err(Fault::Away)?;
        let stream = self.stream(name).map_err(Fault::Away)?;
        stream.append(input).await.map(|ack| codec::position(ack.start)).map_err(append_fault)
    }

    /// Appends, making the stream if it is missing. S2 may take a moment to know a stream that others make at the same time.
    pub(super) async fn append_or_create(
        &self,
        name: &str,
        keep: Keep,
        records: Vec<AppendRecord>,
        guard: Guard<'_>,
    ) -> Result<Position, Fault> {
        let mut backoff = Backoff::new(FIRST_PAUSE, self.longest_pause);
        loop {
            match self.append(name, records.clone(), guard).await {
                Err(Fault::NoStream) if backoff.tries() < ATTEMPTS.get() => {
                    if backoff.tries() > 0 {
                        backoff.pause().await;
                    }
                    self.ensure(name, keep).await.map_err(Fault::Away)?;
                }
                done => return done,
            }
        }
    }

    /// As [`Remote::append_or_create`], for records that may be stored twice: tries again when the outcome is not known.
    pub(super) async fn append_surely(
        &self,
        name: &str,
        keep: Keep,
        records: Vec<AppendRecord>,
        guard: Guard<'_>,
    ) -> Result<Position, Fault> {
        let mut backoff = Backoff::new(FIRST_PAUSE, self.longest_pause);
        loop {
            match self.append_or_create(name, keep, records.clone(), guard).await {
                Err(Fault::Unknown(_)) if backoff.tries() < ATTEMPTS.get() => backoff.pause().await,
                done => return done,
            }
        }
    }

    /// A pipeline into a stream.
    pub(super) fn session(&self, name: &str) -> Result<AppendSession> {
        let config =
            AppendSessionConfig::new().with_max_unacked_bytes(SESSION_BYTES).map_err(Error::internal)?;
        Ok(self.stream(name)?.append_session(config))
    }

    /// The tail; `None` if there is no such stream.
    pub(super) async fn tail(&self, name: &str) -> Result<Option<Position>> {
        match self.stream(name)?.check_tail().await {
            Ok(tail) => Ok(Some(codec::position(tail))),
            Err(error) if no_stream(error.request_error()) => Ok(None),
            Err(error) => Err(away(error)),
        }
    }

    /// One request's worth of records; `None` if there is no such stream.
    pub(super) async fn read(
        &self,
        name: &str,
        from: ReadFrom,
        limits: ReadLimits,
    ) -> Result<Option<Stored>> {
        let start = ReadStart::new().with_from(from).with_clamp_to_tail(true);
        let input = ReadInput::new().with_start(start).with_stop(ReadStop::new().with_limits(limits));
        match self.stream(name)?.read(input).await {
            Ok(batch) => Ok(Some(Stored { records: batch.records, at_tail: None })),
            Err(ReadError::ReadUnwritten(tail)) => {
                Ok(Some(Stored { records: Vec::new(), at_tail: Some(codec::position(tail)) }))
            }
            Err(error) if no_stream(error.request_error()) => Ok(None),
            Err(error) => Err(away(error)),
        }
    }

    /// The records from `from` to the tail as it is when the last request finds nothing more, handed over a request at a
    /// time, and that tail; `None` if there is no such stream.
    pub(super) async fn scan(
        &self,
        name: &str,
        from: SeqNum,
        each: impl FnMut(Vec<SequencedRecord>) -> Result<()>,
    ) -> Result<Option<Position>> {
        self.scan_below(name, from, SeqNum::MAX, each).await
    }

    /// As [`Remote::scan`], but ends when it has come to `below`; then the place is not the tail.
    pub(super) async fn scan_below(
        &self,
        name: &str,
        from: SeqNum,
        below: SeqNum,
        mut each: impl FnMut(Vec<SequencedRecord>) -> Result<()>,
    ) -> Result<Option<Position>> {
        let (mut next, mut empty) = (from, false);
        loop {
            if next >= below {
                return Ok(Some(Position { seq_num: next, ..Position::default() }));
            }
            let limits = ReadLimits::new().with_count(BATCH_RECORDS_MAX);
            let Some(stored) = self.read(name, ReadFrom::SeqNum(next), limits).await? else {
                return Ok(None);
            };
            if let Some(tail) = stored.at_tail {
                return Ok(Some(tail));
            }
            match stored.records.last() {
                Some(last) => next = last.seq_num + 1,
                // Nothing is left up to the tail that there was.
                None if empty => return self.tail(name).await,
                None => {
                    let Some(tail) = self.tail(name).await? else { return Ok(None) };
                    (next, empty) = (tail.seq_num, true);
                    continue;
                }
            }
            empty = false;
            each(stored.records)?;
        }
    }

    /// The records from `from` on, for as long as the connection holds; `None` if there is no such stream.
    pub(super) async fn follow(&self, name: &str, from: SeqNum) -> Result<Option<ReadSession>> {
        let start = ReadStart::new().with_from(ReadFrom::SeqNum(from)).with_clamp_to_tail(true);
        let input = ReadInput::new().with_start(start);
        match self.stream(name)?.read_session(input, ReadSessionConfig::new()).await {
            Ok(session) => Ok(Some(session)),
            Err(error) if no_stream(error.request_error()) => Ok(None),
            Err(error) => Err(away(error)),
        }
    }
}

/// How long the records of a stream are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// As channels are.
    AsConfigured,
    /// For ever.
    Always,
}

/// What must hold for an append to be stored.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Guard<'a> {
    /// The fencing token that is set.
    pub token: Option<&'a str>,
    /// The tail.
    pub tail: Option<SeqNum>,
}

impl<'a> Guard<'a> {
    pub(super) const NONE: Guard<'static> = Guard { token: None, tail: None };

    pub(super) fn token(token: &'a str) -> Self {
        Self { token: Some(token), tail: None }
    }

    pub(super) fn input(self, records: Vec<AppendRecord>) -> Result<AppendInput> {
        let mut input = AppendInput::new(AppendRecordBatch::try_from_iter(records).map_err(Error::internal)?);
        input.match_seq_num = self.tail;
        input.fencing_token =
            self.token.map(str::parse::<FencingToken>).transpose().map_err(Error::internal)?;
        Ok(input)
    }
}

/// What became of an append in a pipeline.
pub(super) fn session_fault(error: AppendSessionError) -> Fault {
    match error {
        AppendSessionError::Append(error) => append_fault(error),
        error if error.has_no_side_effects() => Fault::Away(away(error)),
        error => Fault::Unknown(away(error)),
    }
}

fn append_fault(error: AppendError) -> Fault {
    match error {
        AppendError::ConditionFailed(AppendConditionFailed::FencingTokenMismatch(token)) => {
            Fault::Fenced(token.to_string())
        }
        AppendError::ConditionFailed(AppendConditionFailed::SeqNumMismatch(tail)) => Fault::Moved(tail),
        AppendError::Request(error) if no_stream(Some(&error)) => Fault::NoStream,
        error if error.has_no_side_effects() => Fault::Away(away(error)),
        error => Fault::Unknown(away(error)),
    }
}

fn no_stream(error: Option<&RequestError>) -> bool {
    error.and_then(code) == Some(ErrorCode::StreamNotFound)
}

fn code(error: &RequestError) -> Option<ErrorCode> {
    error.server_error().and_then(s2_sdk::error::ServerError::known_code)
}

/// S2 did not answer as it should: retrying may help.
pub(super) fn away(error: impl Into<sessiond_domain::error::Source>) -> Error {
    Error::unavailable("log", error)
}
