//! The bodies of REST requests and answers.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::read::Reader;
use super::trigger;
use crate::api::error::Failure;
use crate::domain::run::named_run;
use crate::domain::{CreateSession, EndAndContinue, NewSession, RunId, Session, SessionPatch, Timestamp};

/// A session, as every route shows it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SessionItem {
    /// `session_...`
    pub id: String,
    /// The caller's own id.
    #[schema(required)]
    pub external_id: Option<String>,
    /// `ACTIVE`, `CLOSED` or `EXPIRED`, at the moment of the answer.
    pub status: &'static str,
    /// What kind of session.
    #[serde(rename = "type")]
    pub kind: String,
    /// Which task serves it.
    pub task_identifier: String,
    /// Labels.
    pub tags: Vec<String>,
    /// Free-form.
    #[schema(required, value_type = Option<Object>)]
    pub metadata: Option<Map<String, Value>>,
    /// How runs are to be started; absent if the session has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Object)]
    pub trigger_config: Option<Map<String, Value>>,
    /// The recorded run. There is no run engine: the id is stable and means nothing else.
    pub current_run_id: String,
    /// When it was closed.
    #[schema(required, format = DateTime)]
    pub closed_at: Option<String>,
    /// Why it was closed.
    #[schema(required)]
    pub closed_reason: Option<String>,
    /// When it expires.
    #[schema(required, format = DateTime)]
    pub expires_at: Option<String>,
    /// When it was created.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// When its row last changed.
    #[schema(format = DateTime)]
    pub updated_at: String,
}

impl SessionItem {
    /// A session as it stands at `now`.
    pub fn new(session: &Session, now: Timestamp) -> Self {
        let closed = session.closed.as_ref();
        Self {
            id: session.id.to_string(),
            external_id: session.external_id.as_ref().map(ToString::to_string),
            status: session.status(now).as_str(),
            kind: session.kind.clone(),
            task_identifier: session.task_identifier.clone(),
            tags: session.tags.clone(),
            metadata: session.metadata.clone(),
            trigger_config: session.trigger_config.clone(),
            current_run_id: session.current_run_id.to_string(),
            closed_at: closed.map(|closure| closure.at.to_string()),
            closed_reason: closed.and_then(|closure| closure.reason.clone()),
            expires_at: session.expires_at.map(|at| at.to_string()),
            created_at: session.created_at.to_string(),
            updated_at: session.updated_at.to_string(),
        }
    }
}

/// The answer to a create.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CreatedResponse {
    /// The session.
    #[serde(flatten)]
    pub session: SessionItem,
    /// As `currentRunId`.
    pub run_id: String,
    /// Reads and writes this session for an hour.
    pub public_access_token: String,
    /// True if the session was there before.
    pub is_cached: bool,
}

/// A page of sessions.
#[derive(Debug, Serialize, ToSchema)]
pub struct ListResponse {
    /// Newest first.
    pub data: Vec<SessionItem>,
    /// Cursors.
    pub pagination: Pagination,
}

/// Cursors of the neighbouring pages; absent where there is none.
#[derive(Debug, Serialize, ToSchema)]
pub struct Pagination {
    /// For `page[after]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next: Option<String>,
    /// For `page[before]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub previous: Option<String>,
}

/// A create. At most 32,768 bytes.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "camelCase")]
#[allow(dead_code, reason = "read field by field; the type documents the body")]
pub struct CreateBody {
    /// 1 to 64 characters.
    #[schema(rename = "type", min_length = 1, max_length = 64)]
    kind: String,
    /// The caller's own id: 1 to 256 characters, not starting with `session_`.
    external_id: Option<String>,
    /// 1 to 128 characters.
    #[schema(min_length = 1, max_length = 128)]
    task_identifier: String,
    /// How runs are to be started.
    #[schema(value_type = Option<Object>)]
    trigger_config: Option<Value>,
    /// At most 10, of 1 to 128 characters.
    #[schema(max_items = 10)]
    tags: Option<Vec<String>>,
    /// Free-form.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Value>,
    /// A date in the future.
    #[schema(format = DateTime)]
    expires_at: Option<String>,
}

/// Reads the body of a create.
pub fn create(body: &Map<String, Value>, request_key: Option<String>) -> Result<CreateSession, Failure> {
    let mut reader = Reader::new(body, "");
    let config = reader.object("triggerConfig");
    let session = NewSession {
        external_id: reader.text("externalId"),
        kind: reader.required_text("type"),
        task_identifier: reader.required_text("taskIdentifier"),
        tags: reader.texts("tags").unwrap_or_default(),
        metadata: reader.object("metadata"),
        expires_at: reader.date("expiresAt"),
        trigger_config: None,
    };
    reader.finish()?;
    let trigger_config = config.map(trigger::checked).transpose()?;
    let request_key = request_key.filter(|_| session.external_id.is_none());
    Ok(CreateSession { session: NewSession { trigger_config, ..session }, request_key })
}

/// A change. At most 32,768 bytes; absent fields stay.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "camelCase")]
#[allow(dead_code, reason = "read field by field; the type documents the body")]
pub struct UpdateBody {
    /// Replaces all tags.
    #[schema(max_items = 10)]
    tags: Option<Vec<String>>,
    /// Replaces the metadata; null clears it.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Value>,
    /// Replaces the external id; null clears it.
    external_id: Option<String>,
}

/// Reads the body of a change.
pub fn update(body: &Map<String, Value>) -> Result<SessionPatch, Failure> {
    let mut reader = Reader::new(body, "");
    let tags = reader.texts("tags");
    if reader.has("tags") && reader.get("tags").is_none() {
        reader.expected("tags", "an array of strings");
    }
    let metadata = reader.object("metadata");
    let metadata = reader.has("metadata").then_some(metadata);
    let external_id = reader.text("externalId");
    let external_id = reader.has("externalId").then_some(external_id);
    reader.finish()?;
    Ok(SessionPatch::new(tags, metadata, external_id)?)
}

/// A close. At most 1,024 bytes.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "camelCase")]
#[allow(dead_code, reason = "read field by field; the type documents the body")]
pub struct CloseBody {
    /// At most 256 characters.
    #[schema(max_length = 256)]
    reason: Option<String>,
    /// The run that closes. If it is the session's current run it has written its own `session-closed` to `.out`.
    calling_run_id: Option<String>,
}

/// Reads the body of a close: its reason, and the run that closes.
pub fn close(body: &Map<String, Value>) -> Result<(Option<String>, Option<RunId>), Failure> {
    let mut reader = Reader::new(body, "");
    let reason = reader.text("reason");
    let calling = reader.text("callingRunId").map(|id| named_run(&id));
    reader.finish()?;
    Ok((reason, calling))
}

/// A handover. At most 1,024 bytes.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "camelCase")]
#[allow(dead_code, reason = "read field by field; the type documents the body")]
pub struct EndAndContinueBody {
    /// The run that ends, `run_...`.
    calling_run_id: String,
    /// Why: `continuation`, `upgrade`; anything else counts as `manual`. At most 64 characters.
    #[schema(max_length = 64)]
    reason: Option<String>,
    /// Accepted and not used.
    external_deployment_id: Option<String>,
}

/// Reads the body of a handover.
pub fn end_and_continue(body: &Map<String, Value>) -> Result<EndAndContinue, Failure> {
    let mut reader = Reader::new(body, "");
    let calling = reader.required_text("callingRunId");
    let reason = reader.text("reason").unwrap_or_default();
    reader.text("externalDeploymentId");
    reader.finish()?;
    Ok(EndAndContinue { calling: named_run(&calling), reason, request_key: None })
}

/// The answer to a handover.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndAndContinueResponse {
    /// The session's run now.
    pub run_id: String,
    /// False if another run had taken over before.
    pub swapped: bool,
}

/// Any refusal.
#[derive(Debug, ToSchema)]
#[allow(dead_code, reason = "documents what `Failure` writes")]
#[schema(rename_all = "camelCase")]
pub struct ErrorBody {
    /// For people.
    error: String,
    /// For programs; stable.
    code: String,
    /// What is wrong with which field.
    #[schema(nullable = false)]
    details: Option<Vec<ErrorDetail>>,
    /// Names this request in the server's log; with faults of the server's only.
    #[schema(nullable = false)]
    request_id: Option<String>,
}

/// One thing wrong with one field.
#[derive(Debug, ToSchema)]
#[allow(dead_code, reason = "documents what `Failure` writes")]
#[schema(rename_all = "camelCase")]
pub struct ErrorDetail {
    /// Its path.
    field: String,
    /// What is wrong.
    message: String,
}

/// The schemas of a refusal.
pub fn error_schemas() -> [(String, RefOr<Schema>); 2] {
    [("ErrorBody".to_owned(), ErrorBody::schema()), ("ErrorDetail".to_owned(), ErrorDetail::schema())]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: &Value) -> Map<String, Value> {
        value.as_object().cloned().expect("an object")
    }

    #[test]
    fn nulls_are_absent_in_a_create() {
        let body = json!({"type": "chat", "taskIdentifier": "a", "externalId": null, "expiresAt": null,
                          "metadata": null, "tags": null, "triggerConfig": null});
        let read = create(&object(&body), Some("key".to_owned())).expect("valid");
        assert_eq!(read.session.expires_at, None);
        assert_eq!(read.session.metadata, None);
        assert_eq!(read.request_key.as_deref(), Some("key"));
    }

    #[test]
    fn an_expiry_is_text_or_milliseconds() {
        for (date, millis) in [(json!("2030-01-02T00:00:00Z"), 1_893_542_400_000_i64), (json!(5000), 5000)] {
            let body = json!({"type": "c", "taskIdentifier": "a", "expiresAt": date});
            let read = create(&object(&body), None).expect("valid");
            assert_eq!(read.session.expires_at, Some(Timestamp::from_millis(millis)));
        }
        let body = json!({"type": "c", "taskIdentifier": "a", "expiresAt": true});
        assert_eq!(create(&object(&body), None).expect_err("no date").status.as_u16(), 400);
    }

    #[test]
    fn wrong_types_are_all_reported_with_their_paths() {
        let failure = create(&object(&json!({"type": 1, "tags": [1]})), None).expect_err("wrong");
        assert_eq!(
            failure.message,
            "Validation error: expected a string at \"type\"; expected a string at \"taskIdentifier\"; \
             expected an array of strings at \"tags\""
        );
    }

    #[test]
    fn a_patch_tells_null_from_absent() {
        let patch = update(&object(&json!({"metadata": null, "externalId": null}))).expect("valid");
        assert_eq!((patch.tags, patch.metadata, patch.external_id), (None, Some(None), Some(None)));
        let patch = update(&Map::new()).expect("valid");
        assert_eq!((patch.tags, patch.metadata, patch.external_id), (None, None, None));
        assert_eq!(update(&object(&json!({"tags": null}))).expect_err("null").status.as_u16(), 400);
    }
}
