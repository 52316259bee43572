//! Rows of `sessions_v1`: as they are inserted, and as a list reads them.

use clickhouse::Row;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::client::Fault;
use sessiond_domain::session::{Closure, Session};
use sessiond_domain::tenant::{Environment, EnvironmentKind};
use sessiond_domain::{EnvironmentId, ExternalId, RunId, SessionId, Timestamp};

/// What the column `metadata` holds unless it is asked for.
const NO_METADATA: &str = "{}";

/// One version of a session, in the order of the table's columns.
#[derive(Clone, Debug, PartialEq, Row, Serialize, Deserialize)]
pub struct SessionRow {
    /// Id of the environment.
    pub environment_id: String,
    /// Slug of the organization.
    pub organization_id: String,
    /// Slug of the project.
    pub project_id: String,
    /// `session_...`
    pub session_id: String,
    /// `PRODUCTION`, `STAGING`, `PREVIEW` or `DEVELOPMENT`.
    pub environment_type: String,
    /// As `session_id`: the published table tells them apart, sessiond has one.
    pub friendly_id: String,
    /// Empty without one, which an external id never is.
    pub external_id: String,
    /// The kind.
    pub r#type: String,
    /// The task.
    pub task_identifier: String,
    /// The tags.
    pub tags: Vec<String>,
    /// JSON text of `{"data": metadata}`, or `{}`.
    pub metadata: String,
    /// Milliseconds.
    pub closed_at: Option<i64>,
    /// Empty without one; `document` tells the two apart.
    pub closed_reason: String,
    /// Milliseconds.
    pub expires_at: Option<i64>,
    /// Milliseconds.
    pub created_at: i64,
    /// Milliseconds.
    pub updated_at: i64,
    /// Always 0.
    pub is_test: u8,
    /// The greatest is the one that counts.
    pub _version: u64,
    /// 1 for a tombstone.
    pub _is_deleted: u8,
    /// JSON text of [`Document`].
    pub document: String,
}

/// What a list gives back and no filter looks at.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    metadata: Option<Map<String, Value>>,
    trigger_config: Option<Map<String, Value>>,
    closed_reason: Option<String>,
    current_run_id: String,
}

/// A session as its row in Postgres gives it, JSON as text.
#[derive(Debug)]
pub struct SessionTexts<'a> {
    /// `session_...`
    pub id: &'a str,
    /// The caller's own id.
    pub external_id: Option<&'a str>,
    /// The kind.
    pub kind: &'a str,
    /// The task.
    pub task_identifier: &'a str,
    /// The tags.
    pub tags: Vec<String>,
    /// An object.
    pub metadata: Option<&'a RawValue>,
    /// An object.
    pub trigger_config: Option<&'a RawValue>,
    /// The recorded run.
    pub current_run_id: &'a str,
    /// Milliseconds.
    pub created_at: i64,
    /// Milliseconds.
    pub updated_at: i64,
    /// Milliseconds.
    pub expires_at: Option<i64>,
    /// Milliseconds.
    pub closed_at: Option<i64>,
    /// Why it was closed.
    pub closed_reason: Option<&'a str>,
}

/// [`Document`] of texts.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct TextDocument<'a> {
    metadata: Option<&'a RawValue>,
    trigger_config: Option<&'a RawValue>,
    closed_reason: Option<&'a str>,
    current_run_id: &'a str,
}

impl SessionRow {
    /// What hides every older version of a session, which `environment` owned, from `version` on.
    pub fn tombstone(environment: &Environment, session: &str, created_at: i64, version: u64) -> Self {
        Self {
            environment_id: environment.id.to_string(),
            organization_id: environment.organization.clone(),
            project_id: environment.project.clone(),
            session_id: session.to_owned(),
            environment_type: environment_type(environment.kind).to_owned(),
            friendly_id: session.to_owned(),
            external_id: String::new(),
            r#type: String::new(),
            task_identifier: String::new(),
            tags: Vec::new(),
            metadata: NO_METADATA.to_owned(),
            closed_at: None,
            closed_reason: String::new(),
            expires_at: None,
            created_at,
            updated_at: created_at,
            is_test: 0,
            _version: version,
            _is_deleted: 1,
            document: String::new(),
        }
    }

    /// The row of the session that these texts are of, which `environment` owns, at `version`.
    pub fn of_texts(session: SessionTexts<'_>, environment: &Environment, version: u64) -> Self {
        let SessionTexts { metadata, trigger_config, closed_reason, current_run_id, .. } = session;
        let document = TextDocument { metadata, trigger_config, closed_reason, current_run_id };
        Self {
            environment_id: environment.id.to_string(),
            organization_id: environment.organization.clone(),
            project_id: environment.project.clone(),
            session_id: session.id.to_owned(),
            environment_type: environment_type(environment.kind).to_owned(),
            friendly_id: session.id.to_owned(),
            external_id: session.external_id.unwrap_or_default().to_owned(),
            r#type: session.kind.to_owned(),
            task_identifier: session.task_identifier.to_owned(),
            tags: session.tags,
            metadata: NO_METADATA.to_owned(),
            closed_at: session.closed_at,
            closed_reason: closed_reason.unwrap_or_default().to_owned(),
            expires_at: session.expires_at,
            created_at: session.created_at,
            updated_at: session.updated_at,
            is_test: 0,
            _version: version,
            _is_deleted: 0,
            document: serde_json::to_string(&document).expect("JSON and texts are JSON"),
        }
    }

    /// The row of `session`, which `environment` owns, at `version`.
    pub fn new(session: Session, environment: &Environment, version: u64) -> Self {
        let (closed_at, closed_reason) = match session.closed {
            Some(closure) => (Some(closure.at.millis()), closure.reason),
            None => (None, None),
        };
        let document = Document {
            metadata: session.metadata,
            trigger_config: session.trigger_config,
            closed_reason,
            current_run_id: session.current_run_id.to_string(),
        };
        Self {
            environment_id: environment.id.to_string(),
            organization_id: environment.organization.clone(),
            project_id: environment.project.clone(),
            session_id: session.id.to_string(),
            environment_type: environment_type(environment.kind).to_owned(),
            friendly_id: session.id.to_string(),
            external_id: session.external_id.map_or_else(String::new, |id| id.as_str().to_owned()),
            r#type: session.kind,
            task_identifier: session.task_identifier,
            tags: session.tags,
            metadata: NO_METADATA.to_owned(),
            closed_at,
            closed_reason: document.closed_reason.clone().unwrap_or_default(),
            expires_at: session.expires_at.map(Timestamp::millis),
            created_at: session.created_at.millis(),
            updated_at: session.updated_at.millis(),
            is_test: 0,
            _version: version,
            _is_deleted: 0,
            document: serde_json::to_string(&document).expect("maps with text for keys are JSON"),
        }
    }

    /// The same with its metadata in the column of type `JSON` too.
    pub fn with_metadata_column(mut self) -> Self {
        // Cut out as text: whatever it is, it is whole in `document`.
        #[derive(Deserialize)]
        struct Metadata<'a> {
            #[serde(borrow)]
            metadata: &'a RawValue,
        }
        if let Ok(found) = serde_json::from_str::<Metadata<'_>>(&self.document) {
            self.metadata = format!(r#"{{"data":{}}}"#, found.metadata);
        }
        self
    }

    /// The same without, for a server that refuses the value.
    pub fn without_metadata_column(mut self) -> Self {
        NO_METADATA.clone_into(&mut self.metadata);
        self
    }
}

/// The words of the published table.
/// The kind of an environment by the word in the table.
pub(super) fn environment_kind(word: &str) -> Option<EnvironmentKind> {
    EnvironmentKind::ALL.into_iter().find(|kind| environment_type(*kind) == word)
}

fn environment_type(kind: EnvironmentKind) -> &'static str {
    match kind {
        EnvironmentKind::Production => "PRODUCTION",
        EnvironmentKind::Staging => "STAGING",
        EnvironmentKind::Preview => "PREVIEW",
        EnvironmentKind::Development => "DEVELOPMENT",
    }
}

/// What a list reads of a row.
#[derive(Debug, Row, Deserialize)]
pub(super) struct ListedRow {
    session_id: String,
    external_id: String,
    r#type: String,
    task_identifier: String,
    tags: Vec<String>,
    closed_at: Option<i64>,
    expires_at: Option<i64>,
    created_at: i64,
    updated_at: i64,
    document: String,
}

impl ListedRow {
    /// Its columns.
    pub(super) const COLUMNS: &str = "session_id, external_id, type, task_identifier, tags, closed_at, expires_at, \
                                      created_at, updated_at, document";

    /// The session.
    ///
    /// # Errors
    /// [`Fault::Row`] if `document` is not what [`SessionRow::new`] writes.
    pub(super) fn into_session(self, environment: &EnvironmentId) -> Result<Session, Fault> {
        let fault = || Fault::Row { column: "document", session: self.session_id.clone() };
        let document: Document = serde_json::from_str(&self.document).map_err(|_| fault())?;
        let time = |millis: Option<i64>| millis.map(Timestamp::from_millis);
        Ok(Session {
            id: SessionId::from_stored(&self.session_id),
            environment: environment.clone(),
            external_id: Some(&self.external_id)
                .filter(|id| !id.is_empty())
                .map(|id| ExternalId::from_stored(id)),
            kind: self.r#type,
            task_identifier: self.task_identifier,
            tags: self.tags,
            metadata: document.metadata,
            trigger_config: document.trigger_config,
            current_run_id: RunId::from_stored(&document.current_run_id),
            created_at: Timestamp::from_millis(self.created_at),
            updated_at: Timestamp::from_millis(self.updated_at),
            expires_at: time(self.expires_at),
            closed: time(self.closed_at).map(|at| Closure { at, reason: document.closed_reason }),
        })
    }
}
