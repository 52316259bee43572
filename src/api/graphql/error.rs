//! Refusals as GraphQL shows them. What a code means on the wire is decided in [`crate::api::error`]; here it only
//! gets its GraphQL spelling, its place in the document and its path in the data.

use std::borrow::Cow;
use std::sync::Arc;

use async_graphql::{Enum, PathSegment, Pos, ServerError};
use http::StatusCode;
use serde_json::{Map, Value, json};

use crate::api::error::Failure;
use crate::domain::{Code, Error};

/// Longest message, in characters.
const MESSAGE_MAX: usize = 500;

/// The stable word of a refusal: in `errors[].extensions.code` and in `userErrors[].code`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum ErrorCode {
    /// No such session, or nothing by that id, that the caller may know of.
    NotFound,
    /// The request contradicts what is stored; repeating it cannot help.
    Conflict,
    /// The session is closed for ever.
    SessionClosed,
    /// The session's `expiresAt` has passed.
    SessionExpired,
    /// No credentials, or none that are valid (any more).
    Unauthenticated,
    /// The caller's scopes do not allow this; says nothing about whether the session exists.
    Unauthorized,
    /// A token was asked for with scopes that the caller does not have.
    ScopesExceedKeyAccess,
    /// The request cannot be read.
    BadRequest,
    /// A value breaks a rule; the message names the field and the limit.
    ValidationFailed,
    /// Something is over its size limit.
    TooLarge,
    /// Another writer holds the channel.
    FencingTokenMismatch,
    /// The channel's tail is not at `expectedSeqNum`.
    SeqNumMismatch,
    /// The idempotency key was used before with another record.
    IdempotencyMismatch,
    /// The records after the cursor have been trimmed; `extensions.earliest` is the first that remains.
    CursorExpired,
    /// The channel has no record at the cursor, so some are lost; `extensions.tail` is where the next one will stand.
    CursorAhead,
    /// Too many requests; `extensions.retryAfterMs` tells when to try again.
    RateLimited,
    /// A backend is away; retrying may help.
    Unavailable,
    /// A fault of the server's; `extensions.requestId` finds it in the log.
    Internal,
    /// The document is not GraphQL.
    GraphqlParseFailed,
    /// The document or its variables do not fit the schema.
    GraphqlValidationFailed,
    /// A variable, which the message names, cannot be read.
    BadUserInput,
    /// The document is longer, deeper or wider than the server reads.
    QueryTooLarge,
    /// The operation would do more work than one request may.
    QueryTooComplex,
    /// The hash of a persisted query is unknown; send it again with the document.
    PersistedQueryNotFound,
    /// The operation may not be sent with this HTTP method.
    MethodNotAllowed,
    /// None of the media types that the client accepts can carry the answer.
    NotAcceptable,
    /// The body is not `application/json`, or it is encoded.
    UnsupportedMediaType,
    /// The connection has as many subscriptions as it may.
    LimitExceeded,
    /// The operation took too long and was given up; a mutation may have taken effect.
    RequestTimeout,
}

impl From<Code> for ErrorCode {
    fn from(code: Code) -> Self {
        match code {
            Code::NotFound => Self::NotFound,
            Code::Conflict => Self::Conflict,
            Code::SessionClosed => Self::SessionClosed,
            Code::SessionExpired => Self::SessionExpired,
            Code::Unauthenticated => Self::Unauthenticated,
            Code::Unauthorized => Self::Unauthorized,
            Code::ScopesExceedKeyAccess => Self::ScopesExceedKeyAccess,
            Code::BadRequest => Self::BadRequest,
            Code::ValidationFailed => Self::ValidationFailed,
            Code::TooLarge => Self::TooLarge,
            Code::FencingTokenMismatch => Self::FencingTokenMismatch,
            Code::SeqNumMismatch => Self::SeqNumMismatch,
            Code::IdempotencyMismatch => Self::IdempotencyMismatch,
            Code::CursorExpired => Self::CursorExpired,
            Code::CursorAhead => Self::CursorAhead,
            Code::RateLimited => Self::RateLimited,
            Code::Unavailable => Self::Unavailable,
            Code::Internal => Self::Internal,
        }
    }
}

/// A refusal by GraphQL itself, which no rule of the core knows. `word` is the code in lower case.
pub(super) fn protocol(status: StatusCode, word: &'static str, message: impl Into<String>) -> Failure {
    Failure::new(status, word, message)
}

/// A refusal with its place.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub failure: Failure,
    locations: Vec<Pos>,
    path: Vec<PathSegment>,
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Self {
        Self { failure, locations: Vec::new(), path: Vec::new() }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Failure::from(error).into()
    }
}

impl From<ServerError> for Fault {
    fn from(error: ServerError) -> Self {
        let source = error.source.map(|source| source.downcast::<Error>());
        let failure = match source {
            Some(Ok(error)) => Failure::from(error),
            Some(Err(other)) => match other.downcast::<Failure>() {
                Ok(failure) => Failure::clone(&failure),
                Err(_) => {
                    Failure::from(Error::internal("a resolver failed with an error of an unknown kind"))
                }
            },
            None => protocol(StatusCode::BAD_REQUEST, "graphql_validation_failed", error.message),
        };
        Self { failure, locations: error.locations, path: error.path }
    }
}

impl Fault {
    /// A document that cannot be parsed.
    pub fn unparsable(error: async_graphql::parser::Error) -> Self {
        let ServerError { message, locations, .. } = error.into();
        let failure = protocol(StatusCode::BAD_REQUEST, "graphql_parse_failed", one_line(&message));
        Self { failure, locations, path: Vec::new() }
    }

    /// A document that does not fit the schema, or variables that do not fit the document.
    pub fn invalid(message: String, at: Pos) -> Self {
        let failure = protocol(StatusCode::BAD_REQUEST, "graphql_validation_failed", message);
        Self { failure, locations: vec![at], path: Vec::new() }
    }

    /// True if a field was being resolved, so that the rest of the data stands.
    pub fn is_in_data(&self) -> bool {
        !self.path.is_empty()
    }

    /// One member of `errors`.
    pub fn to_json(&self, request_id: &str) -> Value {
        let mut error = Map::new();
        error.insert("message".to_owned(), json!(shortened(&self.failure.message)));
        if !self.locations.is_empty() {
            error.insert("locations".to_owned(), json!(self.locations));
        }
        if !self.path.is_empty() {
            error.insert("path".to_owned(), json!(self.path));
        }
        let mut extensions = self.failure.details().clone();
        extensions.insert("code".to_owned(), json!(self.failure.code.to_ascii_uppercase()));
        if self.failure.status.is_server_error() {
            extensions.insert("requestId".to_owned(), json!(request_id));
        }
        error.insert("extensions".to_owned(), Value::Object(extensions));
        Value::Object(error)
    }
}

/// A message may repeat what it was given.
fn shortened(message: &str) -> Cow<'_, str> {
    match message.char_indices().nth(MESSAGE_MAX) {
        Some((end, _)) => Cow::Owned(format!("{}...", &message[..end])),
        None => Cow::Borrowed(message),
    }
}

/// The parser draws the place into its message, over several lines; `locations` tells it already.
fn one_line(message: &str) -> String {
    let reason = message.lines().rev().find_map(|line| line.trim().strip_prefix("= "));
    reason.unwrap_or(message).trim().to_owned()
}

/// A refusal on its way out of a resolver or of the validator. Errors of the core need no help: they convert by `?`.
impl From<Failure> for async_graphql::Error {
    fn from(failure: Failure) -> Self {
        Self { message: failure.message.clone(), source: Some(Arc::new(failure)), extensions: None }
    }
}

#[cfg(test)]
mod tests {
    use async_graphql::resolver_utils::EnumType;

    use super::*;

    #[test]
    fn every_code_of_the_core_is_spelled_as_rest_spells_it_in_upper_case() {
        for code in Code::ALL {
            let item = ErrorCode::items().iter().find(|item| item.value == code.into()).expect("an item");
            assert_eq!(item.name, code.as_str().to_ascii_uppercase());
        }
    }

    #[test]
    fn a_syntax_error_is_told_in_one_line_and_its_place_apart() {
        let error = async_graphql::parser::parse_query("{ a(").expect_err("no document");
        let fault = Fault::unparsable(error).to_json("r1");
        assert_eq!(fault["locations"][0]["line"], 1);
        assert!(!fault["message"].as_str().expect("text").contains('\n'), "{fault}");
        assert_eq!(fault["extensions"]["code"], "GRAPHQL_PARSE_FAILED");
    }
}
