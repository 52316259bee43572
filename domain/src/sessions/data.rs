//! The data plane: appending to channels, reading and following them.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt, TryStreamExt};
use tracing::instrument;

use super::appender::may_write;
use super::{Appended, FollowOptions, Sessions, in_own_task};
use crate::access::{Action, Caller, UNAUTHORIZED};
use crate::channel::{ChannelAddress, ChannelKey, Direction};
use crate::close;
use crate::envelope::{self, Content, NewPayload};
use crate::error::{Error, Result};
use crate::follow::{Demands, Follow, Item};
use crate::id::SessionRef;
use crate::record::{
    AppendAck, AppendInput, Bounds, Command, ReadLimit, ReadStart, Record, RecordAnchor, RecordBatch,
    RecordPage, RecordPageRequest, SeqNum, metered_size,
};
use crate::send_budget::{ConnectionBudget, Delivery};
use crate::session::{Closure, SharedSession, Status};

/// Most metered bytes of a page of records, unless one record alone is larger.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// Stored records that are read as they are asked for.
struct Drain {
    sessions: Arc<Sessions>,
    caller: Caller,
    key: ChannelKey,
    next: SeqNum,
    /// The tail when it began.
    end: SeqNum,
    /// What is left of its limit; none when that is reached.
    left: Option<ReadLimit>,
    begun: bool,
}

impl Drain {
    async fn next(&mut self, budget: &ConnectionBudget) -> Result<Option<Delivery>> {
        let Some(left) = self.left.filter(|left| self.next < self.end && left.count > 0) else {
            return Ok(None);
        };
        let (channels, key, start) = (&self.sessions.channels, &self.key, ReadStart::SeqNum(self.next));
        let batch = budget.read(|limit| channels.read(key, start, limit.within(left))).await?;
        self.caller.require_current(self.sessions.clock.now())?;
        self.left = left.after(&batch.records);
        // A record that is larger than what is left comes alone, and only where nothing came before.
        let fits = self.left.is_some() || !std::mem::replace(&mut self.begun, true);
        let Some(next) = batch.next_seq_num().filter(|_| fits) else { return Ok(None) };
        (self.next, self.begun) = (next, true);
        Ok(Some(batch))
    }
}

impl Sessions {
    /// Appends one request body as a data record, the way the append routes do: wrapped in an envelope whose
    /// id is the part id. What clients send to `.in` is cleaned of claims that only the server may make.
    ///
    /// # Errors
    /// As [`Sessions::append`].
    pub async fn append_text(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        text: &str,
        part_id: Option<&str>,
    ) -> Result<AppendAck> {
        let payload = NewPayload { content: Content::Text(text), part_id };
        let record = envelope::record(channel.direction, &payload)?;
        self.append(caller, address, channel, AppendInput::one(record)?).await
    }

    /// Appends a batch as one unit; see [`ChannelStore::append`]. The ack means durable.
    ///
    /// # Errors
    /// [`Error::Denied`] also for a public caller that writes `.out`, trims, fences or forges a control
    /// record; [`Error::NotFound`], [`Error::Closed`], [`Error::Expired`], and what the log refuses.
    #[instrument(level = "debug", skip_all, name = "append", fields(session.id = %address))]
    pub async fn append(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        input: AppendInput,
    ) -> Result<AppendAck> {
        Ok(self.append_to(caller, address, channel, input).await?.ack)
    }

    async fn append_to(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        input: AppendInput,
    ) -> Result<Appended> {
        may_write(caller, channel, input.records())?;
        let session = self.require(caller, Action::Write, address).await?;
        session.require_active(self.clock.now())?;
        let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
        let room = self.room.reserve(&input).await;
        // A caller that hangs up now leaves the append to the log, and nobody to say that it is done.
        let doubt = self.waiting.doubt(&key);
        let result = self.channels.append(&key, input).await;
        drop(room);
        let ack = self.after_append(&session, &key, result).await?;
        doubt.dispel();
        Ok(Appended { ack, session, key })
    }

    /// What must follow an append, whatever came of it.
    pub(super) async fn after_append(
        &self,
        session: &SharedSession,
        key: &ChannelKey,
        result: Result<AppendAck>,
    ) -> Result<AppendAck> {
        if let Err(Error::Closed { at, reason }) = &result {
            tracing::debug!(channel = %key, "an append met the seal of its session");
            let closure = Closure { at: *at, reason: reason.clone() };
            self.complete_close(session, &closure).await?;
        }
        if let Ok(ack) = &result {
            self.waiting.appended(key, ack);
        }
        result
    }

    /// Appends payloads as one unit, each wrapped in its envelope.
    ///
    /// # Errors
    /// As [`Sessions::append`].
    pub async fn append_payloads(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        payloads: &[NewPayload<'_>],
        match_seq_num: Option<SeqNum>,
    ) -> Result<Appended> {
        let records = payloads.iter().map(|payload| envelope::record(channel.direction, payload));
        let mut input = AppendInput::new(records.collect::<Result<_>>()?)?;
        input.match_seq_num = match_seq_num;
        self.append_to(caller, address, channel, input).await
    }

    /// The records that an append has written or found, in its order; those trimmed since are left out. Whoever may
    /// write may see what was written.
    ///
    /// # Errors
    /// [`Error::Unavailable`]. The records are stored nevertheless.
    pub async fn appended(&self, appended: &Appended) -> Result<Vec<Record>> {
        let mut records = Vec::with_capacity(appended.ack.seq_nums.len());
        for run in appended.ack.seq_nums.chunk_by(|one, other| *other == one + 1) {
            let (mut next, end) = (run[0], run[0] + run.len() as u64);
            while next < end {
                let limit = ReadLimit::count(usize::try_from(end - next).unwrap_or(run.len()));
                let batch = self.channels.read(&appended.key, ReadStart::SeqNum(next), limit).await?;
                records.extend(batch.records.iter().filter(|record| record.position.seq_num < end).cloned());
                next = batch.next_seq_num().unwrap_or(end);
            }
        }
        Ok(records)
    }

    /// Forgets the records below `before`, and answers the session.
    ///
    /// # Errors
    /// As [`Sessions::append`]; [`Error::Invalid`] naming the field `before` if it is past the tail.
    pub async fn trim(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        before: SeqNum,
    ) -> Result<SharedSession> {
        if !caller.is_private() {
            return Err(UNAUTHORIZED);
        }
        let session = self.require(caller, Action::Write, address).await?;
        let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
        let tail = self.channels.bounds(&key).await?.tail.seq_num;
        if before > tail {
            return Err(Error::invalid("before", format!("must be at most the tail, {tail}")));
        }
        let input = AppendInput::one(Command::Trim(before).into_record())?;
        Ok(self.append_to(caller, address, channel, input).await?.session)
    }

    /// Where a channel begins and ends; both zero for an external id that no session has yet.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`] for an unknown `session_...` id.
    #[instrument(skip_all, name = "bounds", fields(session.id = %address))]
    pub async fn bounds(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
    ) -> Result<Bounds> {
        match self.row_optional(caller, address).await? {
            Some(session) => {
                let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
                self.channels.bounds(&key).await
            }
            None => Ok(Bounds::default()),
        }
    }

    /// The channel's tail, if a reader that asks for the records from `start` on has been given records that the channel
    /// does not have. Nothing is known of an external id that no session has yet.
    ///
    /// # Errors
    /// As [`Sessions::bounds`].
    pub async fn tail_before(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        start: SeqNum,
    ) -> Result<Option<SeqNum>> {
        let Some(session) = self.row_optional(caller, address).await? else { return Ok(None) };
        let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
        let tail = self.channels.bounds(&key).await?.tail.seq_num;
        Ok((start > tail).then_some(tail))
    }

    /// The records from `start` to the tail as it is now, as many as `limit` allows, in batches that are read as they are
    /// asked for and as there is room for them.
    ///
    /// # Errors
    /// As [`Sessions::bounds`].
    #[instrument(skip_all, name = "read", fields(session.id = %address))]
    pub async fn drain(
        self: &Arc<Self>,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        start: SeqNum,
        limit: ReadLimit,
        budget: &ConnectionBudget,
    ) -> Result<BoxStream<'static, Result<Delivery>>> {
        let Some(session) = self.row_optional(caller, address).await? else {
            return Ok(stream::empty().boxed());
        };
        let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
        let end = self.channels.bounds(&key).await?.tail.seq_num;
        let drain = Drain {
            sessions: self.clone(),
            caller: caller.clone(),
            key,
            next: start,
            end,
            left: Some(limit),
            begun: false,
        };
        let budget = budget.clone();
        let batches = stream::try_unfold((drain, budget), move |(mut drain, budget)| async move {
            let batch = drain.next(&budget).await?;
            Ok(batch.map(|batch| (batch, (drain, budget))))
        });
        Ok(batches.boxed())
    }

    /// One bounded read.
    ///
    /// # Errors
    /// As [`Sessions::bounds`].
    #[instrument(skip_all, name = "read", fields(session.id = %address))]
    pub async fn read(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        start: ReadStart,
        limit: ReadLimit,
    ) -> Result<Arc<RecordBatch>> {
        let Some(session) = self.row_optional(caller, address).await? else {
            return Ok(Arc::new(RecordBatch::default()));
        };
        let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
        self.channels.read(&key, start, limit).await
    }

    /// Stored records, then live ones. An external id that no session has yet is waited for.
    ///
    /// # Errors
    /// As [`Sessions::bounds`].
    #[instrument(skip_all, name = "follow", fields(session.id = %address))]
    pub async fn follow(
        self: &Arc<Self>,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        options: FollowOptions,
        budget: &ConnectionBudget,
    ) -> Result<Follow> {
        let session = self.row_optional(caller, address).await?;
        let settled = match &session {
            Some(session) if options.peek_settled && channel.direction == Direction::Out => {
                let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
                self.is_settled(&key).await?
            }
            _ => false,
        };
        let next = match options.start {
            ReadStart::SeqNum(next) => Some(next),
            _ => None,
        };
        let now = self.bounds.clock.now();
        let is_over = session.as_ref().is_some_and(|session| session.status(now) != Status::Active);
        // The end of the session says more.
        let demands = Demands { settled: settled && !is_over, complete: options.require_complete, next };
        let stream = self.attach(caller, session, address, channel, options.start, budget).await?;
        Ok(Follow::new(stream, caller, demands, settled || is_over, self.bounds.clone()))
    }

    /// A page of stored records, without commands.
    ///
    /// # Errors
    /// As [`Sessions::bounds`]; [`Error::CursorAhead`] if it is to begin after a record that the channel does not have.
    #[instrument(skip_all, name = "read", fields(session.id = %address))]
    pub async fn page(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        request: RecordPageRequest,
    ) -> Result<RecordPage> {
        let Some(session) = self.row_optional(caller, address).await? else {
            return Ok(RecordPage::default());
        };
        let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
        let bounds = self.channels.bounds(&key).await?;
        match request.anchor {
            RecordAnchor::After(cursor) => {
                let tail = bounds.tail.seq_num;
                if cursor.is_some_and(|cursor| cursor >= tail) {
                    return Err(Error::CursorAhead { tail });
                }
                let start = cursor.map_or(0, |cursor| cursor.saturating_add(1)).max(bounds.earliest);
                self.page_forward(&key, start, request.size, start > bounds.earliest).await
            }
            RecordAnchor::Before(cursor) => {
                let end = cursor.map_or(bounds.tail.seq_num, |cursor| cursor.min(bounds.tail.seq_num));
                self.page_backward(&key, bounds.earliest, end, request.size, end < bounds.tail.seq_num).await
            }
        }
    }

    /// From `start` up.
    async fn page_forward(
        &self,
        key: &ChannelKey,
        start: SeqNum,
        size: usize,
        has_previous: bool,
    ) -> Result<RecordPage> {
        let (mut next, mut records, mut bytes) = (start, Vec::new(), 0);
        loop {
            // One more than fits tells whether any follow.
            let limit = ReadLimit::count(size + 1 - records.len());
            let batch = self.channels.read(key, ReadStart::SeqNum(next), limit).await?;
            for record in batch.records.iter().filter(|record| !record.is_command()) {
                bytes += metered_size(&record.headers, &record.body);
                if records.len() == size || (bytes > PAGE_BYTES && !records.is_empty()) {
                    return Ok(RecordPage { records, has_next: true, has_previous });
                }
                records.push(record.clone());
            }
            match batch.next_seq_num() {
                Some(after) if batch.tail.is_none() => next = after,
                _ => return Ok(RecordPage { records, has_next: false, has_previous }),
            }
        }
    }

    /// From `end` down to `earliest`.
    async fn page_backward(
        &self,
        key: &ChannelKey,
        earliest: SeqNum,
        end: SeqNum,
        size: usize,
        has_next: bool,
    ) -> Result<RecordPage> {
        let (mut end, mut records, mut bytes) = (end, VecDeque::new(), 0);
        let mut window = size as u64 + 1;
        while end > earliest {
            let start = end.saturating_sub(window).max(earliest);
            let limit = ReadLimit::count(usize::try_from(end - start).unwrap_or(size));
            let batch = self.channels.read(key, ReadStart::SeqNum(start), limit).await?;
            // Too large for one read: fewer, so that never more than one is held besides the page.
            if end - start > 1 && batch.next_seq_num().is_some_and(|next| next < end) {
                window = (end - start) / 2;
                continue;
            }
            let found = batch.records.iter().filter(|record| record.position.seq_num < end);
            for record in found.filter(|record| !record.is_command()).rev() {
                bytes += metered_size(&record.headers, &record.body);
                if records.len() == size || (bytes > PAGE_BYTES && !records.is_empty()) {
                    return Ok(RecordPage { records: records.into(), has_next, has_previous: true });
                }
                records.push_front(record.clone());
            }
            end = start;
        }
        Ok(RecordPage { records: records.into(), has_next, has_previous: false })
    }

    async fn attach(
        self: &Arc<Self>,
        caller: &Caller,
        session: Option<SharedSession>,
        address: &SessionRef,
        channel: &ChannelAddress,
        start: ReadStart,
        budget: &ConnectionBudget,
    ) -> Result<BoxStream<'static, Result<Item>>> {
        if let Some(session) = session {
            return self.attached(session, channel.clone(), start, budget).await;
        }
        let SessionRef::External(external) = address.clone() else {
            return Err(Error::NotFound("session"));
        };
        let (this, environment, channel) = (self.clone(), caller.environment.clone(), channel.clone());
        let budget = budget.clone();
        // Whatever is written to a session that did not exist yet comes after "now".
        let start = if start == ReadStart::TailOffset(0) { ReadStart::SeqNum(0) } else { start };
        let waiting = async move {
            let session = this.rows.wait_for(&environment, &external).await?;
            this.attached(session, channel, start, &budget).await
        };
        Ok(stream::once(in_own_task(waiting)).try_flatten().boxed())
    }

    async fn attached(
        &self,
        session: SharedSession,
        channel: ChannelAddress,
        start: ReadStart,
        budget: &ConnectionBudget,
    ) -> Result<BoxStream<'static, Result<Item>>> {
        let key = ChannelKey { session: session.id.clone(), address: channel };
        let followed = self.channels.follow(&key, start, budget).await?;
        let attached = stream::once(async move { Ok(Item::Attached(session)) });
        Ok(attached.chain(followed.map_ok(Item::Followed)).boxed())
    }

    /// Whether the last record that is not a command says that the session is closed, or that the turn is complete and nobody
    /// has asked for another one since.
    async fn is_settled(&self, key: &ChannelKey) -> Result<bool> {
        const WINDOW: usize = 16;
        let mut end = self.channels.bounds(key).await?;
        while end.tail.seq_num > end.earliest {
            let start = end.tail.seq_num.saturating_sub(WINDOW as u64).max(end.earliest);
            let limit = ReadLimit::count(usize::try_from(end.tail.seq_num - start).unwrap_or(WINDOW));
            let batch = self.channels.read(key, ReadStart::SeqNum(start), limit).await?;
            if let Some(last) = batch.records.iter().rfind(|record| !record.is_command()) {
                return match envelope::seen_input(last) {
                    _ if close::says_closed(&last.headers) => Ok(true),
                    _ if !envelope::is_turn_complete(last) => Ok(false),
                    Some(seen) => Ok(!self.has_message_after(key, seen).await?),
                    None => Ok(true),
                };
            }
            end.tail.seq_num = start;
        }
        Ok(false)
    }

    /// Whether a client has asked for a turn behind this record of the `.in` that belongs to an `.out`. If there are too many
    /// records to look at, it has.
    async fn has_message_after(&self, out: &ChannelKey, seen: SeqNum) -> Result<bool> {
        const LOOKS: usize = 16;
        let address = ChannelAddress { direction: Direction::In, ..out.address.clone() };
        let key = &ChannelKey { session: out.session.clone(), address };
        let mut next = seen.saturating_add(1);
        for _ in 0..LOOKS {
            let batch = self.channels.read(key, ReadStart::SeqNum(next), ReadLimit::count(64)).await?;
            if batch.records.iter().any(envelope::is_message) {
                return Ok(true);
            }
            match batch.next_seq_num() {
                Some(after) if batch.tail.is_none() => next = after,
                _ => return Ok(false),
            }
        }
        Ok(true)
    }
}
