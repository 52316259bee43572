//! The one error of the core. Each variant is named for what the caller can do about it.
//!
//! [`Code`] is the wire word. Only `api/error.rs` knows what status or close code a word becomes.

use std::fmt;
use std::time::Duration;

use super::clock::Timestamp;
use super::record::SeqNum;

/// Shorthand for results of the core.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A boxed cause, kept for the log and never shown to a caller.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// One thing wrong with one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field as the wire spells it, such as `triggerConfig.queue`.
    pub field: String,
    /// What is wrong, naming the limit.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.field, self.message)
    }
}

/// What went wrong in a use case.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing of that name is visible to the caller.
    #[error("{0} not found")]
    NotFound(&'static str),
    /// The request contradicts what is stored; repeating it unchanged cannot help.
    #[error("{0}")]
    Conflict(String),
    /// The session is closed. Write-once: it never opens again.
    #[error("session is closed")]
    Closed {
        /// When it was closed.
        at: Timestamp,
        /// Why, in the words of whoever closed it.
        reason: Option<String>,
    },
    /// The session's `expiresAt` has passed.
    #[error("session is expired")]
    Expired {
        /// When it expired.
        at: Timestamp,
    },
    /// No caller could be made of the credentials.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// The caller may not do this. Says nothing about whether the session exists.
    #[error("{0}")]
    Denied(&'static str),
    /// Scopes were asked for that the caller's own key does not have.
    #[error("the key does not have the requested scopes")]
    ScopesExceeded(Vec<String>),
    /// The request cannot be read at all.
    #[error("{0}")]
    Malformed(Violation),
    /// The request can be read but breaks a rule; every broken rule is listed.
    #[error("{}", join(.0))]
    Invalid(Vec<Violation>),
    /// Something is over its size limit.
    #[error("{what} is {size} bytes; the limit is {limit}")]
    TooLarge {
        /// What was measured.
        what: &'static str,
        /// Its size in bytes.
        size: u64,
        /// The largest size accepted, in bytes.
        limit: u64,
    },
    /// Another writer holds the channel: the fencing token sent is not the one set.
    #[error("fencing token mismatch")]
    Fenced {
        /// The token that is set now.
        expected: String,
    },
    /// The channel's tail is not where the writer expected it.
    #[error("expected the tail at another sequence number; it is {tail}")]
    SeqNumMismatch {
        /// The sequence number that the next record will get.
        tail: SeqNum,
    },
    /// The records that a reader must not miss have been trimmed.
    #[error("the records after the cursor have been trimmed; the earliest that remains is {earliest}")]
    Trimmed {
        /// The first sequence number that remains.
        earliest: SeqNum,
    },
    /// A reader goes on after a record that the channel does not have: records that were acknowledged are lost, or the
    /// cursor is another channel's.
    #[error("the channel has no record at the cursor; its tail is {tail}")]
    CursorAhead {
        /// The sequence number that the next record will get.
        tail: SeqNum,
    },
    /// The part id was used before with another body.
    #[error("part id {part_id:?} was used before with a different body")]
    IdempotencyMismatch {
        /// The id in question.
        part_id: String,
    },
    /// Too many requests; try again at the given time.
    #[error("rate limit exceeded")]
    RateLimited(RateLimit),
    /// A backend is away, full or poisoned. Retrying may help.
    #[error("{what} is unavailable")]
    Unavailable {
        /// Which backend, in a word a caller may see.
        what: &'static str,
        /// The cause, for the log.
        #[source]
        source: Option<Source>,
    },
    /// A backend lacks what an operator must do first; says what, to anyone.
    #[error("{0}")]
    NotReady(&'static str),
    /// A bug or an inconsistency of ours.
    #[error("internal error")]
    Internal(#[source] Source),
}

/// The state of a rate limiter at a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Requests allowed in a burst.
    pub limit: u32,
    /// Requests that would be accepted now; fewer than were asked for.
    pub remaining: u32,
    /// When what was asked for will be accepted.
    pub reset: Timestamp,
    /// How long that is from now.
    pub wait: Duration,
}

impl Error {
    /// A single broken rule.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation { field: field.into(), message: message.into() }])
    }

    /// A field that cannot be read.
    pub fn malformed(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Malformed(Violation { field: field.into(), message: message.into() })
    }

    /// A backend fault.
    pub fn unavailable(what: &'static str, source: impl Into<Source>) -> Self {
        Self::Unavailable { what, source: Some(source.into()) }
    }

    /// A bug or inconsistency of ours.
    pub fn internal(source: impl Into<Source>) -> Self {
        Self::Internal(source.into())
    }

    /// A task of ours that has panicked or was cut off. What the panic said is left out: it may hold what a client has sent,
    /// and errors are logged.
    pub fn interrupted(cause: &tokio::task::JoinError) -> Self {
        Self::internal(if cause.is_panic() { "a task has panicked" } else { "a task was cut off" })
    }

    /// The wire word.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NotFound,
            Self::Conflict(_) => Code::Conflict,
            Self::Closed { .. } => Code::SessionClosed,
            Self::Expired { .. } => Code::SessionExpired,
            Self::Unauthenticated(_) => Code::Unauthenticated,
            Self::Denied(_) => Code::Unauthorized,
            Self::ScopesExceeded(_) => Code::ScopesExceedKeyAccess,
            Self::Malformed(_) => Code::BadRequest,
            Self::Invalid(_) => Code::ValidationFailed,
            Self::TooLarge { .. } => Code::TooLarge,
            Self::Fenced { .. } => Code::FencingTokenMismatch,
            Self::SeqNumMismatch { .. } => Code::SeqNumMismatch,
            Self::IdempotencyMismatch { .. } => Code::IdempotencyMismatch,
            Self::Trimmed { .. } => Code::CursorExpired,
            Self::CursorAhead { .. } => Code::CursorAhead,
            Self::RateLimited(_) => Code::RateLimited,
            Self::Unavailable { .. } | Self::NotReady(_) => Code::Unavailable,
            Self::Internal(_) => Code::Internal,
        }
    }

    /// What a caller may read of this error.
    pub fn detail(&self) -> String {
        match self {
            Self::Malformed(violation) => violation.message.clone(),
            Self::Invalid(violations) if violations.len() == 1 => violations[0].message.clone(),
            other => other.to_string(),
        }
    }
}

/// The stable, machine-readable word for an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// `not_found`
    NotFound,
    /// `conflict`
    Conflict,
    /// `session_closed`
    SessionClosed,
    /// `session_expired`
    SessionExpired,
    /// `unauthenticated`
    Unauthenticated,
    /// `unauthorized`: authenticated, but not allowed (the word the SDK knows)
    Unauthorized,
    /// `scopes_exceed_key_access`
    ScopesExceedKeyAccess,
    /// `bad_request`
    BadRequest,
    /// `validation_failed`
    ValidationFailed,
    /// `too_large`
    TooLarge,
    /// `fencing_token_mismatch`
    FencingTokenMismatch,
    /// `seq_num_mismatch`
    SeqNumMismatch,
    /// `idempotency_mismatch`
    IdempotencyMismatch,
    /// `cursor_expired`
    CursorExpired,
    /// `cursor_ahead`
    CursorAhead,
    /// `rate_limited`
    RateLimited,
    /// `unavailable`
    Unavailable,
    /// `internal`
    Internal,
}

impl Code {
    /// Every code, for tables and documents.
    pub const ALL: [Self; 18] = [
        Self::NotFound,
        Self::Conflict,
        Self::SessionClosed,
        Self::SessionExpired,
        Self::Unauthenticated,
        Self::Unauthorized,
        Self::ScopesExceedKeyAccess,
        Self::BadRequest,
        Self::ValidationFailed,
        Self::TooLarge,
        Self::FencingTokenMismatch,
        Self::SeqNumMismatch,
        Self::IdempotencyMismatch,
        Self::CursorExpired,
        Self::CursorAhead,
        Self::RateLimited,
        Self::Unavailable,
        Self::Internal,
    ];

    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::SessionClosed => "session_closed",
            Self::SessionExpired => "session_expired",
            Self::Unauthenticated => "unauthenticated",
            Self::Unauthorized => "unauthorized",
            Self::ScopesExceedKeyAccess => "scopes_exceed_key_access",
            Self::BadRequest => "bad_request",
            Self::ValidationFailed => "validation_failed",
            Self::TooLarge => "too_large",
            Self::FencingTokenMismatch => "fencing_token_mismatch",
            Self::SeqNumMismatch => "seq_num_mismatch",
            Self::IdempotencyMismatch => "idempotency_mismatch",
            Self::CursorExpired => "cursor_expired",
            Self::CursorAhead => "cursor_ahead",
            Self::RateLimited => "rate_limited",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
        }
    }

    /// Whether the same request may succeed later.
    pub fn retryable(self) -> bool {
        matches!(self, Self::RateLimited | Self::Unavailable | Self::Internal)
    }
}

fn join(violations: &[Violation]) -> String {
    violations.iter().map(Violation::to_string).collect::<Vec<_>>().join("; ")
}
