//! A session's own stream: its named channels and its seal.
//!
//! A named channel is registered here before it exists, with the empty fencing token. Sealing fences this stream in the
//! same batch that says when and why: that batch decides which close wins, and from then on the channels to be fenced are
//! known, because no other can be registered. Then every channel is fenced, the main ones in one batch with the record that
//! tells of the close. Whoever finds a session that was sealed and not fenced finishes the work: what is behind the first
//! fence of a channel nobody sees.

use std::sync::Arc;

use futures_util::future::FutureExt;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use quick_cache::sync::Cache;
use s2_sdk::types::{AppendRecord, SequencedRecord};

use super::codec::{self, Entry, SEAL};
use super::outbox::Outbox;
use super::remote::{Fault, Guard, Keep, Remote};
use sessiond_domain::{
    Background, ChannelAddress, ChannelKey, Close, Closure, Direction, Error, Result, SeqNum, SessionId,
    Timestamp, close,
};

/// Closures that are remembered; they never change.
const REMEMBERED: usize = 16_384;
/// Channels of one session that are fenced at a time.
const FENCES_AT_ONCE: usize = 32;

/// Times that the end of a main channel is looked at while others write there.
const LOOKS: usize = 8;
/// Records at the end of `.out`, commands among them, in which a `session-closed` is looked for.
const CLOSING_RECORDS: u64 = 16;

/// How a channel ends.
#[derive(Debug, Default)]
struct Last {
    tail: SeqNum,
    /// There is a seal, behind which nothing need be written.
    sealed: bool,
    /// The last record that is no command says that the session is closed.
    says_closed: bool,
}

/// What a registry says.
#[derive(Debug, Default)]
struct Sheet {
    channels: Vec<ChannelAddress>,
    close: Option<Close>,
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
            Entry::Closed { at, reason, told } => {
                let closure = Closure { at: Timestamp::from_millis(at), reason };
                self.close.get_or_insert(Close { closure, told });
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
    background: Arc<Background>,
    closures: Cache<SessionId, Closure>,
}

impl Registry {
    pub(super) fn new(remote: Arc<Remote>, outbox: Arc<Outbox>, background: Arc<Background>) -> Self {
        Self { remote, outbox, background, closures: Cache::new(REMEMBERED) }
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
        let Some(close) = sheet.close.take() else { return Ok(None) };
        if !sheet.fenced {
            self.finish(session, &sheet.channels, &close).await?;
        }
        let closure = close.closure;
        self.closures.insert(session.clone(), closure.clone());
        Ok(Some(closure))
    }

    /// Seals a session, unless it is sealed already, and returns the closure that holds.
    pub(super) async fn seal(&self, session: &SessionId, close: &Close) -> Result<Closure> {
        if let Some(closure) = self.completed(session).await? {
            return Ok(closure);
        }
        self.outbox.announce(session).await?;
        let registry = codec::registry_stream(session);
        let records = vec![Entry::closed(close).to_record()?, codec::fence(SEAL)?];
        match self.remote.append_surely(&registry, Keep::Always, records, Guard::token("")).await {
            Ok(_) => {}
            Err(Fault::Fenced(token)) if token == SEAL => {}
            Err(fault) => return Err(fault.into_error()),
        }
        self.closure(session).await
    }

    /// Fences every channel that a sealed session has or may have.
    async fn finish(&self, session: &SessionId, named: &[ChannelAddress], close: &Close) -> Result<()> {
        let stream = |address: &ChannelAddress| {
            codec::channel_stream(&ChannelKey { session: session.clone(), address: address.clone() })
        };
        let main = |direction| stream(&ChannelAddress::main(direction));
        let input = codec::encode(close::input_record(session))?;
        let output = codec::encode(close::output_record(&close.closure))?;
        let fences = named.iter().map(|address| self.end(stream(address), None).boxed());
        let fences = fences.chain([
            self.end_main(main(Direction::In), input, |_| false).boxed(),
            self.end_main(main(Direction::Out), output, |last| close.told || last.says_closed).boxed(),
        ]);
        let fences: Vec<_> = fences.collect();
        stream::iter(fences).buffer_unordered(FENCES_AT_ONCE).try_collect::<()>().await?;
        let (remote, registry) = (self.remote.clone(), codec::registry_stream(session));
        let done = vec![Entry::Fenced.to_record()?];
        // Saves the next who looks from fencing again; nothing else depends on it.
        self.background.once("note of a finished close on S2", async move {
            let _ = remote.append(&registry, done, Guard::token(SEAL)).await;
        });
        Ok(())
    }

    /// Fences a channel, behind its last record if that is given. Unconditional, because a user's fence may be set; what
    /// is behind the first seal nobody sees.
    async fn end(&self, stream: String, last: Option<AppendRecord>) -> Result<()> {
        let records = last.into_iter().chain([codec::fence(SEAL)?]).collect();
        let fenced = self.remote.append_surely(&stream, Keep::AsConfigured, records, Guard::NONE).await;
        fenced.map(drop).map_err(Fault::into_error)
    }

    /// Fences a main channel behind the record that tells of the close, unless that `is_told`. While others write, what the
    /// end says holds only for a batch that lands right behind it; so, too, many that finish one close add one batch.
    async fn end_main(
        &self,
        stream: String,
        record: AppendRecord,
        is_told: impl Fn(&Last) -> bool + Send,
    ) -> Result<()> {
        for _ in 0..LOOKS {
            let last = self.last(&stream).await?;
            if last.sealed {
                return Ok(());
            }
            let told = (!is_told(&last)).then(|| record.clone());
            let records = told.into_iter().chain([codec::fence(SEAL)?]).collect();
            let guard = Guard { token: None, tail: Some(last.tail) };
            match self.remote.append_surely(&stream, Keep::AsConfigured, records, guard).await {
                Err(Fault::Moved(_)) => {}
                done => return done.map(drop).map_err(Fault::into_error),
            }
        }
        let told = (!is_told(&Last::default())).then_some(record);
        self.end(stream, told).await
    }

    /// How a channel ends at this moment.
    async fn last(&self, stream: &str) -> Result<Last> {
        let Some(tail) = self.remote.tail(stream).await? else { return Ok(Last::default()) };
        let mut last = Last { tail: tail.seq_num, ..Last::default() };
        let see = |records: Vec<SequencedRecord>| {
            for record in records.into_iter().filter(|record| record.seq_num < last.tail) {
                last.sealed |= codec::is_seal(&record);
                if !record.is_command_record() {
                    last.says_closed = close::says_closed(&codec::shown(record).headers);
                }
            }
            Ok(())
        };
        let from = tail.seq_num.saturating_sub(CLOSING_RECORDS);
        self.remote.scan_below(stream, from, tail.seq_num, see).await?;
        Ok(last)
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
            if let Some(close) = sheet.close {
                return Ok(Arrival::Sealed(close.closure));
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
