//! Failures that the author of a mutation can mend.

use async_graphql::{Result, SimpleObject};

use crate::api::graphql::error::ErrorCode;
use crate::domain::{Code, Error, Violation};

/// What has to be mended in an input.
#[derive(Clone, Debug, SimpleObject)]
pub struct UserError {
    /// For programs; stable.
    code: ErrorCode,
    /// Where, such as `["input", "tags", "0"]`.
    path: Vec<String>,
    /// For people; names the limit.
    message: String,
}

impl UserError {
    fn at(code: Code, field: &str, message: impl Into<String>) -> Self {
        let parts = field.split('.').filter(|part| !part.is_empty()).map(str::to_owned);
        let path = std::iter::once("input".to_owned()).chain(parts).collect();
        Self { code: code.into(), path, message: message.into() }
    }
}

/// Sorts a result: what the author can mend belongs into the payload, every other refusal ends the operation.
pub(super) fn outcome<T>(result: Result<T, Error>) -> Result<Result<T, Vec<UserError>>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(error) => user_errors(&error).map(Err).ok_or_else(|| error.into()),
    }
}

fn user_errors(error: &Error) -> Option<Vec<UserError>> {
    let code = error.code();
    let one = |field: &str| Some(vec![UserError::at(code, field, error.detail())]);
    let at = |fault: &Violation| UserError::at(Code::ValidationFailed, &fault.field, &fault.message);
    match error {
        Error::NotFound("waitpoint") => one("id"),
        Error::NotFound("run") => one("runId"),
        Error::NotFound(_) | Error::Closed { .. } | Error::Expired { .. } => one("by"),
        Error::Conflict(_) => one(""),
        Error::Malformed(fault) => Some(vec![at(fault)]),
        Error::Invalid(faults) => Some(faults.iter().map(at).collect()),
        Error::SeqNumMismatch { .. } => one("expectedSeqNum"),
        Error::Fenced { .. } | Error::IdempotencyMismatch { .. } => one("records"),
        Error::Unauthenticated(_)
        | Error::Denied(_)
        | Error::ScopesExceeded(_)
        | Error::TooLarge { .. }
        | Error::Trimmed { .. }
        | Error::CursorAhead { .. }
        | Error::RateLimited(_)
        | Error::Unavailable { .. }
        | Error::NotReady(_)
        | Error::Internal(_) => None,
    }
}
