//! The runs of sessions: which there were, and how one hands over to the next.

use std::sync::Arc;

use tracing::instrument;

use super::{Sessions, detached};
use crate::access::{Action, Caller};
use crate::error::{Error, Result};
use crate::id::{RunId, SessionRef};
use crate::port::HandedOver;
use crate::run::{RunReason, SessionRun};
use crate::session::Session;

/// Longest request key of a handover, in bytes.
const REQUEST_KEY_MAX: usize = 256;

/// A handover as a front end takes it.
#[derive(Clone, Debug)]
pub struct EndAndContinue {
    /// The run that ends.
    pub calling: RunId,
    /// Why, in the caller's words.
    pub reason: String,
    /// Makes a retry of the same request find the run that the first attempt has started.
    pub request_key: Option<String>,
}

impl Sessions {
    /// Ends a session's run and records the one that goes on in its place. Of several runs that try, the one that is
    /// current wins, and the others are told who did.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`] for the session or the run, [`Error::Closed`], [`Error::Expired`],
    /// [`Error::Invalid`].
    #[instrument(skip_all, name = "end_and_continue", fields(session.id = %address))]
    pub async fn end_and_continue(
        self: &Arc<Self>,
        caller: &Caller,
        address: &SessionRef,
        request: EndAndContinue,
    ) -> Result<HandedOver> {
        let reason = RunReason::of_handover(&request.reason)?;
        let request_key = request.request_key.filter(|key| (1..=REQUEST_KEY_MAX).contains(&key.len()));
        if request_key.as_ref().is_some_and(|key| key.contains('\0')) {
            return Err(Error::invalid(
                "x-trigger-request-idempotency-key",
                "must not contain a NUL character",
            ));
        }
        let session = self.require(caller, Action::Write, address).await?;
        let now = self.clock.now();
        session.require_active(now)?;
        if self.store.find_run(&session.environment, &request.calling).await?.is_none() {
            return Err(Error::NotFound("run"));
        }
        let run = SessionRun {
            id: RunId::generate(now),
            environment: session.environment.clone(),
            session: session.id.clone(),
            reason,
            previous: Some(request.calling),
            triggered_at: now,
        };
        let this = self.clone();
        detached(async move {
            let handed = this.store.hand_over(run, request_key.as_deref()).await?;
            let handed = handed.ok_or(Error::NotFound("session"))?;
            if handed.swapped {
                this.rows.changed(&[&session, &handed.session]);
            } else {
                handed.session.require_active(now)?;
            }
            Ok(handed)
        })
        .await
    }

    /// The newest runs of a session that the caller has been shown, newest first.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`].
    #[instrument(skip_all, name = "runs", fields(session.id = %session.id))]
    pub async fn runs(&self, caller: &Caller, session: &Session, limit: usize) -> Result<Vec<SessionRun>> {
        let session = self.require(caller, Action::Read, &SessionRef::Id(session.id.clone())).await?;
        self.store.runs(&session.environment, &session.id, limit).await
    }
}
