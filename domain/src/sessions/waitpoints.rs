//! Waiting for input: a run waits for the next record of a channel; others see who waits, and answer.

use std::sync::Arc;

use serde_json::value::RawValue;
use tracing::instrument;

use super::{Sessions, detached};
use crate::access::{Action, Caller, Resource, UNAUTHORIZED};
use crate::channel::ChannelAddress;
use crate::clock::Timestamp;
use crate::envelope::{self, Content, NewPayload};
use crate::error::{Error, Result};
use crate::id::{RunId, SessionRef, WaitpointId};
use crate::lifeline::{Cut, Lifeline};
use crate::port::Registered;
use crate::record::{AppendInput, ReadLimit, ReadStart, Record};
use crate::session::SharedSession;
use crate::waitpoint::{
    NewWaitpoint, Outcome, Waitpoint, WaitpointFilter, WaitpointPage, WaitpointPageRequest,
};

/// How often an answer tries again when something else has been appended meanwhile.
const ANSWER_ATTEMPTS: usize = 32;

/// How an await has ended.
#[derive(Debug)]
pub enum Awaited {
    /// The wait is over.
    Completed(Waitpoint),
    /// The moment given has come first.
    Waiting(Waitpoint),
    /// The server stops.
    Stopping(Waitpoint),
}

impl Awaited {
    /// The waitpoint, however it stands.
    pub fn into_waitpoint(self) -> Waitpoint {
        match self {
            Self::Completed(waitpoint) | Self::Waiting(waitpoint) | Self::Stopping(waitpoint) => waitpoint,
        }
    }
}

impl Sessions {
    /// Registers a wait. One on a closed or expired session is over at once, with the record that had come before or
    /// without one.
    ///
    /// # Errors
    /// [`Error::Denied`] for every public caller too; [`Error::NotFound`] for the run or the session;
    /// [`Error::Invalid`].
    #[instrument(skip_all, name = "create_waitpoint", fields(session.id = %new.session))]
    pub async fn create_waitpoint(
        self: &Arc<Self>,
        caller: &Caller,
        new: NewWaitpoint,
    ) -> Result<Registered> {
        if !caller.is_private() {
            return Err(UNAUTHORIZED);
        }
        let session = self.visible(caller, Action::Write, &new.session).await?;
        if let Some(run) = &new.run {
            self.store.find_run(&caller.environment, run).await?.ok_or(Error::NotFound("run"))?;
        }
        let session = session.ok_or(Error::NotFound("session"))?;
        let now = self.clock.now();
        let waitpoint = new.into_waitpoint(&session, now)?;
        if let Some(after) = waitpoint.after {
            let tail = self.channels.bounds(&waitpoint.channel()).await?.tail.seq_num;
            if after >= tail {
                return Err(Error::invalid("lastSeqNum", format!("must be below the tail, {tail}")));
            }
        }
        let this = self.clone();
        detached(async move {
            let mut registered = this.waitpoints.create_waitpoint(waitpoint, now).await?;
            this.waiting.watch(&registered.waitpoint).await;
            let Waitpoint { environment, id, .. } = &registered.waitpoint;
            if let Some(current) = this.waitpoints.find_waitpoint(environment, id).await? {
                registered.waitpoint = current;
            }
            Ok(registered)
        })
        .await
    }

    /// Confirms that a run may be blocked on a waitpoint. There is no run engine, so nothing is blocked.
    ///
    /// # Errors
    /// [`Error::Denied`] for every public caller too; [`Error::NotFound`] for the run or the waitpoint.
    pub async fn block_on_waitpoint(&self, caller: &Caller, run: &RunId, id: &WaitpointId) -> Result<()> {
        if !caller.is_private() {
            return Err(UNAUTHORIZED);
        }
        self.waitpoint_of(caller, Action::Read, id).await?;
        match self.store.find_run(&caller.environment, run).await? {
            Some(_) => Ok(()),
            None => Err(Error::NotFound("run")),
        }
    }

    /// A waitpoint as it stands.
    ///
    /// # Errors
    /// [`Error::Denied`], also for a caller of some sessions only who names a waitpoint that does not exist;
    /// [`Error::NotFound`].
    #[instrument(skip_all, name = "waitpoint", fields(waitpoint.id = %id))]
    pub async fn waitpoint(&self, caller: &Caller, id: &WaitpointId) -> Result<Waitpoint> {
        self.fresh(caller, Action::Read, id).await.map(|(waitpoint, _)| waitpoint)
    }

    /// Waits until a waitpoint is complete, or `until`.
    ///
    /// # Errors
    /// As [`Sessions::waitpoint`]; [`Error::Unauthenticated`] when the caller's credentials end.
    #[instrument(skip_all, name = "await_waitpoint", fields(waitpoint.id = %id))]
    pub async fn await_waitpoint(
        &self,
        caller: &Caller,
        id: &WaitpointId,
        until: Timestamp,
    ) -> Result<Awaited> {
        let mut lifeline = Lifeline::new(Some(caller), self.bounds.clone());
        loop {
            // First, so that no completion falls between the look at the row and the wait.
            let mut listening = self.waiting.listen(id);
            let waitpoint = self.waitpoint(caller, id).await?;
            if waitpoint.completion.is_some() {
                return Ok(Awaited::Completed(waitpoint));
            }
            match lifeline.check(lifeline.now(), until) {
                Some(Cut::Credentials(error)) => return Err(error),
                Some(Cut::Stopping) => return Ok(Awaited::Stopping(waitpoint)),
                None if until <= lifeline.now() => return Ok(Awaited::Waiting(waitpoint)),
                None => {}
            }
            tokio::select! {
                () = listening.ring() => {}
                () = lifeline.ring() => {}
            }
        }
    }

    /// Answers a waitpoint: appends `data` to its channel, as [`Sessions::append_text`] would, provided that nothing
    /// else has ended the wait. The same answer again changes nothing.
    ///
    /// # Errors
    /// As [`Sessions::waitpoint`] and [`Sessions::append`]; [`Error::Conflict`] if the wait is over.
    #[instrument(skip_all, name = "complete_waitpoint", fields(waitpoint.id = %id))]
    pub async fn complete_waitpoint(
        self: &Arc<Self>,
        caller: &Caller,
        id: &WaitpointId,
        data: &RawValue,
    ) -> Result<Waitpoint> {
        for _ in 0..ANSWER_ATTEMPTS {
            let (waitpoint, session) = self.fresh(caller, Action::Write, id).await?;
            let answer = NewPayload { content: Content::Text(data.get()), part_id: Some(id.as_str()) };
            let answer = envelope::record(waitpoint.direction, &answer)?;
            if let Some(completion) = waitpoint.completion {
                let told = self.completing_record(&waitpoint).await?;
                // The envelope holds the id of the answer, so only the same answer is equal.
                return match told {
                    Some(record) if record.body == answer.body => Ok(waitpoint),
                    _ => Err(Error::Conflict(over(completion.outcome).to_owned())),
                };
            }
            let key = waitpoint.channel();
            let tail = self.channels.bounds(&key).await?.tail.seq_num;
            let (first, _) = self.waiting.first_data(&key, waitpoint.first_seq_num()).await?;
            if first.is_some() {
                self.waiting.watch(&waitpoint).await;
                continue;
            }
            let mut input = AppendInput::one(answer)?;
            // Whatever comes in between might be what the waiter waits for.
            input.match_seq_num = Some(tail);
            let address = ChannelAddress::main(waitpoint.direction);
            match self.append(caller, &SessionRef::Id(session.id.clone()), &address, input).await {
                Ok(_) => self.waiting.watch(&waitpoint).await,
                Err(Error::SeqNumMismatch { .. }) => {}
                Err(Error::IdempotencyMismatch { .. }) => {
                    return Err(Error::Conflict(over(Outcome::Record(0)).to_owned()));
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::Unavailable { what: "channel", source: None })
    }

    /// A page of waitpoints, newest first: of a session, or of the whole environment for who may see every session.
    ///
    /// # Errors
    /// [`Error::Denied`]; [`Error::Invalid`] for a filter that is too large.
    #[instrument(skip_all, name = "waitpoints")]
    pub async fn waitpoints(
        &self,
        caller: &Caller,
        session: Option<&SessionRef>,
        filter: WaitpointFilter,
        page: &WaitpointPageRequest,
    ) -> Result<WaitpointPage> {
        let mut filter = filter.checked()?;
        match session {
            Some(address) => match self.visible(caller, Action::Read, address).await? {
                Some(session) => filter.session = Some(session.id.clone()),
                None => return Ok(WaitpointPage::default()),
            },
            None => caller.require_any(Action::Read, &[Resource::Sessions])?,
        }
        self.waitpoints.list_waitpoints(&caller.environment, &filter, page).await
    }

    /// The record that has completed a waitpoint; `None` where none has, or where it has been trimmed since.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn completing_record(&self, waitpoint: &Waitpoint) -> Result<Option<Record>> {
        let Some(Outcome::Record(seq_num)) = waitpoint.completion.map(|completion| completion.outcome) else {
            return Ok(None);
        };
        let key = waitpoint.channel();
        let batch = self.channels.read(&key, ReadStart::SeqNum(seq_num), ReadLimit::count(1)).await?;
        Ok(batch.records.first().filter(|record| record.position.seq_num == seq_num).cloned())
    }

    /// Ends waits at their time and notices what other replicas do, until the server stops.
    pub async fn end_waits(self: Arc<Self>) {
        self.waiting.clone().run(self.bounds.stopping.clone()).await;
    }

    /// As [`Sessions::waitpoint_of`], after a look at the log.
    async fn fresh(
        &self,
        caller: &Caller,
        action: Action,
        id: &WaitpointId,
    ) -> Result<(Waitpoint, SharedSession)> {
        let (waitpoint, session) = self.waitpoint_of(caller, action, id).await?;
        if waitpoint.completion.is_some() {
            return Ok((waitpoint, session));
        }
        self.waiting.watch(&waitpoint).await;
        let current = self.waitpoints.find_waitpoint(&caller.environment, id).await?;
        Ok((current.unwrap_or(waitpoint), session))
    }

    async fn waitpoint_of(
        &self,
        caller: &Caller,
        action: Action,
        id: &WaitpointId,
    ) -> Result<(Waitpoint, SharedSession)> {
        let Some(waitpoint) = self.waitpoints.find_waitpoint(&caller.environment, id).await? else {
            // Who may not see every session must not learn which waitpoints exist.
            caller.require_any(action, &[Resource::Sessions])?;
            return Err(Error::NotFound("waitpoint"));
        };
        let session = self.require(caller, action, &SessionRef::Id(waitpoint.session.clone())).await?;
        Ok((waitpoint, session))
    }
}

fn over(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Record(_) => "The waitpoint is completed already",
        Outcome::TimedOut => "The waitpoint has timed out",
        Outcome::Closed => "The waitpoint has ended, because the session was closed",
        Outcome::Expired => "The waitpoint has ended, because the session expired",
    }
}
