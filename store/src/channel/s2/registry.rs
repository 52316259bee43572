//! A session's own stream: its named channels and its seal.
//!
//! A named channel is registered here before it exists, with the empty fencing token. Sealing fences this stream in the
//! same batch that says when and why: that batch decides which close wins, and from then on the channels to be fenced are
//! known, because no other can be registered. Then every channel is fenced. Whoever finds a session that was sealed and
//! not fenced finishes the work.

use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use quick_cache::sync::Cache;

use super::codec::{self, Entry, SEAL};
use super::outbox::Outbox;
use super::remote::{Fault, Guard, Keep, Remote};
use sessiond_domain::{ChannelAddress, ChannelKey, Closure, Direction, Error, Result, SessionId, Timestamp};

/// Closures that are remembered; they never change.
const REMEMBERED: usize = 16_384;
/// Channels of one session that are fenced at a time.
const FENCES_AT_ONCE: usize = 32;

/// What a registry says.
#[derive(Debug, Default)]
struct Sheet {
    channels: Vec<ChannelAddress>,
    closure: Option<Closure>,
    fenced: bool,
}

impl Sheet {
    fn take(&mut self, entry: Entry) -> Result<()> {
        match entry {
            Entry::Channel { direction, name } => {
                let address = codec::address(&direction, &name)?;
                if !self.channels.contains(&address) {
                    self.channels.push(address);
                }
            }
            Entry::Closed { at, reason } => {
                self.closure.get_or_insert(Closure { at: Timestamp::from_millis(at), reason });
            }
            Entry::Fenced => self.fenced = true,
        }
        Ok(())
    }
}

/// Why a wait for a channel has ended.
pub(super) enum Arrival {
    /// It is registered.
    Registered,
    /// The session is sealed.
    Sealed(Closure),
    /// The connection ended.
    Interrupted,
}

/// The registries of all sessions.
pub(super) struct Registry {
    remote: Arc<Remote>,
    outbox: Arc<Outbox>,
    closures: Cache<SessionId, Closure>,
}

impl Registry {
    pub(super) fn new(remote: Arc<Remote>, outbox: Arc<Outbox>) -> Self {
        Self { remote, outbox, closures: Cache::new(REMEMBERED) }
    }

    /// Makes the stream of a channel, registering it first if it has a name.
    ///
    /// # Errors
    /// [`Error::Closed`] if the session is sealed and the channel is not there.
    pub(super) async fn create(&self, key: &ChannelKey) -> Result<()> {
        if let Some(entry) = Entry::channel(&key.address) {
            let registry = codec::registry_stream(&key.session);
            let records = vec![entry.to_record()?];
            match self.remote.append_surely(&registry, Keep::Always, records, Guard::token("")).await {
                Ok(_) => {}
                Err(Fault::Fenced(token)) if token == SEAL => {
                    let Closure { at, reason } = self.closure(&key.session).await?;
                    return Err(Error::Closed { at, reason });
                }
                Err(fault) => return Err(fault.into_error()),
            }
        }
        self.remote.ensure(&codec::channel_stream(key), Keep::AsConfigured).await
    }

    /// The closure of a session of which a stream carries the seal. Finishes the seal if its own process did not.
    pub(super) async fn closure(&self, session: &SessionId) -> Result<Closure> {
        let missing = || Error::internal(format!("a stream of {session} is sealed and its registry is not"));
        self.completed(session).await?.ok_or_else(missing)
    }

    /// The closure of a session, if it is sealed. Finishes the seal if its own process did not.
    pub(super) async fn completed(&self, session: &SessionId) -> Result<Option<Closure>> {
        if let Some(closure) = self.closures.get(session) {
            return Ok(Some(closure));
        }
        let mut sheet = self.read(session).await?;
        let Some(closure) = sheet.closure.take() else { return Ok(None) };
        self.finish(session, &sheet).await?;
        self.closures.insert(session.clone(), closure.clone());
        Ok(Some(closure))
    }

    /// Seals a session, unless it is sealed already, and returns the closure that holds.
    pub(super) async fn seal(&self, session: &SessionId, closure: Closure) -> Result<Closure> {
        if let Some(closure) = self.completed(session).await? {
            return Ok(closure);
        }
        self.outbox.announce(session).await?;
        let registry = codec::registry_stream(session);
        let records = vec![Entry::closed(&closure).to_record()?, codec::fence(SEAL)?];
        match self.remote.append_surely(&registry, Keep::Always, records, Guard::token("")).await {
            Ok(_) => {}
            Err(Fault::Fenced(token)) if token == SEAL => {}
            Err(fault) => return Err(fault.into_error()),
        }
        self.closure(session).await
    }

    /// Fences every channel that a sealed session has or may have.
    async fn finish(&self, session: &SessionId, sheet: &Sheet) -> Result<()> {
        if sheet.fenced {
            return Ok(());
        }
        let main = [Direction::In, Direction::Out].map(ChannelAddress::main);
        let streams = main.iter().chain(&sheet.channels).map(|address| {
            let key = ChannelKey { session: session.clone(), address: address.clone() };
            codec::channel_stream(&key)
        });
        // Unconditional, because a user's fence may be set; a second fence changes nothing.
        let fence = |stream: String| async move {
            let records = vec![codec::fence(SEAL)?];
            let fenced = self.remote.append_surely(&stream, Keep::AsConfigured, records, Guard::NONE).await;
            fenced.map(drop).map_err(Fault::into_error)
        };
        let streams: Vec<_> = streams.collect();
        stream::iter(streams.into_iter().map(fence))
            .buffer_unordered(FENCES_AT_ONCE)
            .try_collect::<()>()
            .await?;
        let (remote, registry) = (self.remote.clone(), codec::registry_stream(session));
        let done = vec![Entry::Fenced.to_record()?];
        // Saves the next who looks from fencing again; nothing else depends on it.
        tokio::spawn(async move { remote.append(&registry, done, Guard::token(SEAL)).await.map(drop) });
        Ok(())
    }

    /// Waits until a named channel is registered, or the session is sealed.
    pub(super) async fn wait_for(&self, key: &ChannelKey) -> Result<Arrival> {
        let registry = codec::registry_stream(&key.session);
        let session = match self.remote.follow(&registry, 0).await? {
            Some(session) => Some(session),
            None => {
                self.remote.ensure(&registry, Keep::Always).await?;
                self.remote.follow(&registry, 0).await?
            }
        };
        let Some(mut session) = session else { return Ok(Arrival::Interrupted) };
        let mut sheet = Sheet::default();
        while let Some(batch) = session.next().await {
            let batch = batch.map_err(super::remote::away)?;
            for record in &batch.records {
                if let Some(entry) = Entry::parse(record)? {
                    sheet.take(entry)?;
                }
            }
            if sheet.channels.contains(&key.address) {
                return Ok(Arrival::Registered);
            }
            if let Some(closure) = sheet.closure {
                return Ok(Arrival::Sealed(closure));
            }
        }
        Ok(Arrival::Interrupted)
    }

    async fn read(&self, session: &SessionId) -> Result<Sheet> {
        let mut sheet = Sheet::default();
        let read = |records: Vec<_>| {
            records
                .iter()
                .try_for_each(|record| Entry::parse(record)?.map_or(Ok(()), |entry| sheet.take(entry)))
        };
        self.remote.scan(&codec::registry_stream(session), 0, read).await?;
        Ok(sheet)
    }
}
