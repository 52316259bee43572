//! The runs of sessions, and how one hands over to the next.

use std::sync::Arc;

use async_graphql::{Context, Enum, InputObject, Result, SimpleObject};

use super::input::SessionBy;
use super::scalar::DateTime;
use super::session::SessionNode;
use super::user_error::{UserError, outcome};
use super::{app, caller};
use crate::domain::run::named_run;
use crate::domain::{EndAndContinue, Error, RunReason, Session, SessionRun};

/// Runs that a session shows, unless asked otherwise.
pub(super) const RUNS: i32 = 20;
/// Most runs that a session shows.
const RUNS_MAX: i32 = 100;

/// Why a run was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[graphql(name = "SessionRunReason")]
pub enum RunReasonNode {
    /// The session was created.
    Initial,
    /// The run before handed over.
    Continuation,
    /// The run before handed over to another version of the task.
    Upgrade,
    /// Anything else.
    Manual,
}

/// A run that a session has or had. There is no run engine behind it.
#[derive(Clone, Debug, SimpleObject)]
#[graphql(name = "SessionRun")]
pub struct RunNode {
    /// `run_...`
    run_id: String,
    /// Why it was recorded.
    reason: RunReasonNode,
    /// The run that it took over from; null for the first one.
    previous_run_id: Option<String>,
    /// When it was recorded.
    triggered_at: DateTime,
}

impl From<SessionRun> for RunNode {
    fn from(run: SessionRun) -> Self {
        Self {
            run_id: run.id.to_string(),
            reason: match run.reason {
                RunReason::Initial => RunReasonNode::Initial,
                RunReason::Continuation => RunReasonNode::Continuation,
                RunReason::Upgrade => RunReasonNode::Upgrade,
                RunReason::Manual => RunReasonNode::Manual,
            },
            previous_run_id: run.previous.as_ref().map(ToString::to_string),
            triggered_at: DateTime(run.triggered_at),
        }
    }
}

/// The newest runs of a session.
pub(super) async fn newest(ctx: &Context<'_>, session: &Session, first: Option<i32>) -> Result<Vec<RunNode>> {
    let first = first.unwrap_or(RUNS);
    let limit = usize::try_from(first).ok().filter(|_| (1..=RUNS_MAX).contains(&first));
    let limit = limit.ok_or_else(|| Error::invalid("first", format!("must be 1 to {RUNS_MAX}")))?;
    let runs = app(ctx).sessions.runs(caller(ctx)?, session, limit).await?;
    Ok(runs.into_iter().map(Into::into).collect())
}

/// A handover.
#[derive(Debug, InputObject)]
pub struct EndAndContinueSessionInput {
    /// Which session.
    by: SessionBy,
    /// `run_...`: the run that ends. Unless it is the session's current one, nothing changes.
    run_id: String,
    /// Why: `continuation`, `upgrade`; anything else counts as manual. At most 64 characters.
    reason: Option<String>,
    /// Makes a retry find the run that the first attempt has started; 1 to 256 bytes.
    idempotency_key: Option<String>,
    /// Given back in the payload.
    client_mutation_id: Option<String>,
}

/// What `endAndContinueSession` answers.
#[derive(Debug, Default, SimpleObject)]
pub struct EndAndContinueSessionPayload {
    /// The session as it now is.
    session: Option<SessionNode>,
    /// The run that has taken over: by this request, or, if `swapped` is false, before it.
    run_id: Option<String>,
    /// False if another run had taken over before.
    swapped: bool,
    /// What has to be mended; empty on success.
    user_errors: Vec<UserError>,
    /// As given.
    client_mutation_id: Option<String>,
}

/// Hands a session over.
pub(super) async fn end_and_continue(
    ctx: &Context<'_>,
    input: EndAndContinueSessionInput,
) -> Result<EndAndContinueSessionPayload> {
    let EndAndContinueSessionInput { by, run_id, reason, idempotency_key, client_mutation_id } = input;
    let hand_over = async {
        let request = EndAndContinue {
            calling: named_run(&run_id),
            reason: reason.unwrap_or_default(),
            request_key: idempotency_key,
        };
        app(ctx).sessions.end_and_continue(caller(ctx)?, &by.address()?, request).await
    };
    Ok(match outcome(hand_over.await)? {
        Ok(handed) => EndAndContinueSessionPayload {
            session: Some(SessionNode(Arc::new(handed.session))),
            run_id: Some(handed.run.to_string()),
            swapped: handed.swapped,
            user_errors: Vec::new(),
            client_mutation_id,
        },
        Err(user_errors) => {
            EndAndContinueSessionPayload { user_errors, client_mutation_id, ..Default::default() }
        }
    })
}
