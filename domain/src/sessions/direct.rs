//! Writing past the append routes: what a caller must know to write directly, and what its batches become.

use std::sync::Arc;

use tracing::instrument;

use super::Sessions;
use crate::access::{Action, Caller};
use crate::channel::{ChannelAddress, Direction};
use crate::envelope;
use crate::error::{Error, Result};
use crate::id::SessionRef;
use crate::record::{AppendAck, AppendInput, NewRecord};
use crate::session::SharedSession;

/// A batch as a direct writer sends it.
#[derive(Clone, Debug, Default)]
pub struct DirectBatch {
    /// The records, which the writer has wrapped itself.
    pub records: Vec<NewRecord>,
    /// See [`AppendInput::match_seq_num`].
    pub match_seq_num: Option<u64>,
    /// See [`AppendInput::fencing_token`].
    pub fencing_token: Option<String>,
}

impl DirectBatch {
    /// The batch as the log takes it, under the rules of its channel.
    ///
    /// # Errors
    /// As [`AppendInput::new`].
    pub fn into_input(mut self, direction: Direction) -> Result<AppendInput> {
        let part_ids = envelope::adopt(direction, &mut self.records)?;
        let mut input = AppendInput::new(self.records)?;
        input.part_ids = part_ids;
        input.match_seq_num = self.match_seq_num;
        input.fencing_token = self.fencing_token;
        Ok(input)
    }
}

impl Sessions {
    /// Prepares a channel for direct writes. `None` for an external id that no session has yet: writes find nothing
    /// until one has.
    ///
    /// # Errors
    /// [`Error::Denied`] also for `.out` without a secret key; [`Error::NotFound`] for an unknown `session_...` id;
    /// [`Error::Closed`], [`Error::Expired`].
    #[instrument(skip_all, name = "initialize", fields(session.id = %address))]
    pub async fn initialize(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
    ) -> Result<Option<SharedSession>> {
        if channel.direction == Direction::Out && !caller.is_private() {
            return Err(Error::Denied("Initializing the out channel requires secret key authentication"));
        }
        let session = match (self.present(caller, Action::Write, address).await?, address) {
            (None, SessionRef::Id(_)) => return Err(Error::NotFound("session")),
            (session, _) => session,
        };
        if let Some(session) = &session {
            session.require_active(self.clock.now())?;
        }
        Ok(session)
    }

    /// Appends one batch of a direct writer.
    ///
    /// # Errors
    /// As [`Sessions::append`].
    pub async fn append_direct(
        self: &Arc<Self>,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        batch: DirectBatch,
    ) -> Result<AppendAck> {
        self.append(caller, address, channel, batch.into_input(channel.direction)?).await
    }
}
