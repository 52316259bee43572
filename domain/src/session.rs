//! Sessions as values: what one is, what may be asked for, and every limit on it.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::clock::Timestamp;
use super::error::{Error, Result, Violation};
use super::id::{EnvironmentId, ExternalId, RunId, SessionId, SessionRef, utf16_len};

/// Longest `type`, in UTF-16 units; the shortest is 1.
pub const TYPE_MAX: usize = 64;
/// Longest `taskIdentifier`, in UTF-16 units; the shortest is 1.
pub const TASK_MAX: usize = 128;
/// Most tags on a session.
pub const TAGS_MAX: usize = 10;
/// Longest tag, in UTF-16 units; the shortest is 1.
pub const TAG_MAX: usize = 128;
/// Longest close reason, in UTF-16 units.
pub const REASON_MAX: usize = 256;

/// A durable two-way conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    /// Our id.
    pub id: SessionId,
    /// The environment that owns it.
    pub environment: EnvironmentId,
    /// The caller's id; may be changed or cleared, and is unique while set.
    pub external_id: Option<ExternalId>,
    /// What kind of session, in the caller's words.
    pub kind: String,
    /// Which task (agent) serves it.
    pub task_identifier: String,
    /// Labels to filter by.
    pub tags: Vec<String>,
    /// Free-form, the caller's.
    pub metadata: Option<Map<String, Value>>,
    /// How the caller wants runs of the task started; kept and given back.
    pub trigger_config: Option<Map<String, Value>>,
    /// The recorded run. There is no run engine.
    pub current_run_id: RunId,
    /// Never changes; whole milliseconds.
    pub created_at: Timestamp,
    /// Last change of the row; every update sets a later one.
    pub updated_at: Timestamp,
    /// Write-once.
    pub expires_at: Option<Timestamp>,
    /// Write-once.
    pub closed: Option<Closure>,
}

/// The end of a session, written once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closure {
    /// When.
    pub at: Timestamp,
    /// Why, in the closer's words.
    pub reason: Option<String>,
}

/// Derived from `closedAt` and `expiresAt`; never stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Status {
    /// Neither closed nor expired.
    Active,
    /// Closed; wins over expired.
    Closed,
    /// `expiresAt` has been reached.
    Expired,
}

impl Status {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Active, Self::Closed, Self::Expired];

    /// The one definition, for rows, filters and streams alike: a session is expired *at* `expiresAt`.
    pub fn derive(closed: bool, expires_at: Option<Timestamp>, now: Timestamp) -> Self {
        if closed {
            Self::Closed
        } else if expires_at.is_some_and(|at| at <= now) {
            Self::Expired
        } else {
            Self::Active
        }
    }

    /// The wire word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "ACTIVE",
            Self::Closed => "CLOSED",
            Self::Expired => "EXPIRED",
        }
    }

    /// Reads the wire word.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == text)
    }
}

impl Session {
    /// See [`Status::derive`].
    pub fn status(&self, now: Timestamp) -> Status {
        Status::derive(self.closed.is_some(), self.expires_at, now)
    }

    /// Refuses a session that is closed or expired.
    ///
    /// # Errors
    /// [`Error::Closed`] or [`Error::Expired`].
    pub fn require_active(&self, now: Timestamp) -> Result<()> {
        match (self.status(now), &self.closed, self.expires_at) {
            (Status::Closed, Some(closure), _) => Err(closure.to_error()),
            (Status::Expired, _, Some(at)) => Err(Error::Expired { at }),
            _ => Ok(()),
        }
    }

    /// Whether this is a later version of the same row than `other`: every update has a later time than the one
    /// before, and a close, which may keep the time, comes once.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        let version = |session: &Self| (session.closed.is_some(), session.updated_at);
        version(self) > version(other)
    }

    /// What clients put into addresses and scopes: the external id if there is one.
    pub fn canonical_ref(&self) -> SessionRef {
        match &self.external_id {
            Some(id) => SessionRef::External(id.clone()),
            None => SessionRef::Id(self.id.clone()),
        }
    }
}

impl Closure {
    /// The refusal that a closed session answers with.
    pub fn to_error(&self) -> Error {
        Error::Closed { at: self.at, reason: self.reason.clone() }
    }
}

/// What a caller says of a session to be created, not yet checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NewSession {
    /// See [`Session::external_id`].
    pub external_id: Option<String>,
    /// See [`Session::kind`].
    pub kind: String,
    /// See [`Session::task_identifier`].
    pub task_identifier: String,
    /// See [`Session::tags`].
    pub tags: Vec<String>,
    /// See [`Session::metadata`].
    pub metadata: Option<Map<String, Value>>,
    /// See [`Session::trigger_config`].
    pub trigger_config: Option<Map<String, Value>>,
    /// See [`Session::expires_at`].
    pub expires_at: Option<Timestamp>,
}

impl NewSession {
    /// Checks every limit at once and gives the session its ids.
    ///
    /// # Errors
    /// [`Error::Invalid`] with every broken rule.
    pub fn into_session(self, environment: EnvironmentId, now: Timestamp) -> Result<Session> {
        let mut faults = Faults::default();
        let external_id = self.external_id.as_deref().and_then(|text| faults.take(ExternalId::parse(text)));
        faults.length("type", &self.kind, 1, TYPE_MAX);
        faults.length("taskIdentifier", &self.task_identifier, 1, TASK_MAX);
        let tags = faults.tags(&self.tags);
        faults.json("metadata", self.metadata.as_ref());
        faults.json("triggerConfig", self.trigger_config.as_ref());
        if self.expires_at.is_some_and(|at| at <= now) {
            faults.add("expiresAt", "must be in the future");
        }
        faults.into_result()?;
        Ok(Session {
            id: SessionId::generate(now),
            environment,
            external_id,
            kind: self.kind,
            task_identifier: self.task_identifier,
            tags,
            metadata: self.metadata,
            trigger_config: self.trigger_config,
            current_run_id: RunId::generate(now),
            created_at: now,
            updated_at: now,
            expires_at: self.expires_at,
            closed: None,
        })
    }
}

/// A change of a session; `None` leaves the field as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SessionPatch {
    /// Replaces all tags.
    pub tags: Option<Vec<String>>,
    /// Replaces or (inner `None`) clears the metadata.
    pub metadata: Option<Option<Map<String, Value>>>,
    /// Replaces or (inner `None`) clears the external id.
    pub external_id: Option<Option<ExternalId>>,
    /// Replaces the trigger config; only a repeated create does that.
    pub trigger_config: Option<Map<String, Value>>,
}

impl SessionPatch {
    /// Checks a patch as a caller wrote it.
    ///
    /// # Errors
    /// [`Error::Invalid`] with every broken rule.
    pub fn new(
        tags: Option<Vec<String>>,
        metadata: Option<Option<Map<String, Value>>>,
        external_id: Option<Option<String>>,
    ) -> Result<Self> {
        let mut faults = Faults::default();
        let tags = tags.map(|tags| faults.tags(&tags));
        faults.json("metadata", metadata.as_ref().and_then(Option::as_ref));
        let external_id = external_id.map(|id| id.and_then(|text| faults.take(ExternalId::parse(&text))));
        faults.into_result()?;
        Ok(Self { tags, metadata, external_id, trigger_config: None })
    }
}

/// Checks a close reason.
///
/// # Errors
/// [`Error::Invalid`] naming the field `reason`.
pub fn check_reason(reason: Option<&str>) -> Result<()> {
    let mut faults = Faults::default();
    if let Some(reason) = reason {
        faults.length("reason", reason, 0, REASON_MAX);
    }
    faults.into_result()
}

/// Checks the labels of something that has labels as a session does, and drops repeated ones.
///
/// # Errors
/// [`Error::Invalid`] naming the field `tags`.
pub(super) fn checked_tags(tags: &[String]) -> Result<Vec<String>> {
    let mut faults = Faults::default();
    let tags = faults.tags(tags);
    faults.into_result()?;
    Ok(tags)
}

/// Collects every broken rule, so that a caller sees all of them at once.
#[derive(Default)]
struct Faults(Vec<Violation>);

impl Faults {
    fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Violation { field: field.into(), message: message.into() });
    }

    fn take<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(Error::Invalid(violations)) => {
                self.0.extend(violations);
                None
            }
            Err(other) => {
                self.add("", other.detail());
                None
            }
        }
    }

    fn length(&mut self, field: &str, text: &str, min: usize, max: usize) {
        let length = utf16_len(text);
        if length < min {
            self.add(field, "must not be empty");
        } else if length > max {
            self.add(field, format!("must be at most {max} characters"));
        }
        if text.contains('\0') {
            self.add(field, "must not contain a NUL character");
        }
    }

    /// Drops repeated tags, keeping their order.
    fn tags(&mut self, tags: &[String]) -> Vec<String> {
        if tags.len() > TAGS_MAX {
            self.add("tags", format!("must hold at most {TAGS_MAX} tags"));
            return Vec::new();
        }
        for (index, tag) in tags.iter().enumerate() {
            self.length(&format!("tags.{index}"), tag, 1, TAG_MAX);
        }
        let mut seen = BTreeSet::new();
        tags.iter().filter(|tag| seen.insert(tag.as_str())).cloned().collect()
    }

    /// Postgres cannot keep a NUL inside JSON, so no engine takes one.
    fn json(&mut self, field: &str, object: Option<&Map<String, Value>>) {
        if object.is_some_and(|object| object.iter().any(|(key, value)| key.contains('\0') || has_nul(value)))
        {
            self.add(field, "must not contain a NUL character");
        }
    }

    fn into_result(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::Invalid(self.0)) }
    }
}

fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(has_nul),
        Value::Object(object) => object.iter().any(|(key, value)| key.contains('\0') || has_nul(value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A row shared between the cache and its readers.
pub type SharedSession = Arc<Session>;

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn new_session() -> NewSession {
        NewSession { kind: "chat".into(), task_identifier: "agent".into(), ..NewSession::default() }
    }

    fn check(new: NewSession) -> Result<Session> {
        new.into_session(EnvironmentId::from_stored("env_a"), at(1000))
    }

    #[test]
    fn status_has_one_definition() {
        for (closed, expires, now, status) in [
            (false, None, 10, Status::Active),
            (false, Some(11), 10, Status::Active),
            (false, Some(10), 10, Status::Expired),
            (false, Some(9), 10, Status::Expired),
            (true, Some(9), 10, Status::Closed),
            (true, None, 10, Status::Closed),
        ] {
            assert_eq!(Status::derive(closed, expires.map(at), at(now)), status);
        }
    }

    #[test]
    fn every_limit_holds_exactly_at_its_edge() {
        type Set = fn(&mut NewSession, usize);
        let fields: [(&str, usize, Set); 5] = [
            ("type", TYPE_MAX, |new, n| new.kind = "x".repeat(n)),
            ("taskIdentifier", TASK_MAX, |new, n| new.task_identifier = "x".repeat(n)),
            ("externalId", 256, |new, n| new.external_id = Some("x".repeat(n))),
            ("tags.0", TAG_MAX, |new, n| new.tags = vec!["x".repeat(n)]),
            ("tags", TAGS_MAX, |new, n| new.tags = (0..n).map(|i| i.to_string()).collect()),
        ];
        for (field, limit, set) in fields {
            let mut fits = new_session();
            set(&mut fits, limit);
            assert!(check(fits).is_ok(), "{field} at {limit}");
            let mut over = new_session();
            set(&mut over, limit + 1);
            match check(over) {
                Err(Error::Invalid(violations)) => assert_eq!(violations[0].field, field),
                other => panic!("{field} over {limit}: {other:?}"),
            }
        }
    }

    #[test]
    fn every_fault_is_reported_at_once() {
        let new = NewSession {
            external_id: Some("session_x".into()),
            tags: vec![String::new()],
            expires_at: Some(at(1000)),
            ..NewSession::default()
        };
        let Err(Error::Invalid(violations)) = check(new) else { panic!("must be refused") };
        let fields: Vec<_> = violations.iter().map(|violation| violation.field.as_str()).collect();
        assert_eq!(fields, ["externalId", "type", "taskIdentifier", "tags.0", "expiresAt"]);
    }

    #[test]
    fn repeated_tags_count_once_and_nul_is_refused_everywhere() {
        let tagged = NewSession { tags: vec!["b".into(), "a".into(), "b".into()], ..new_session() };
        assert_eq!(check(tagged).expect("valid").tags, ["b", "a"]);
        let nested = serde_json::json!({"a": [{"b": "x\0"}]});
        let metadata = nested.as_object().cloned();
        assert!(check(NewSession { metadata, ..new_session() }).is_err());
    }
}
