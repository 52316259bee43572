//! A row of `sessions`, column by column as text, to a row of ClickHouse: the same from the WAL as from a query.

use super::environments::Environment;
use crate::clickhouse::SessionRow;

/// The columns that a row is made of, in the order in which [`Columns`] holds them.
pub(super) const COLUMNS: [&str; 14] = [
    "id",
    "environment_id",
    "created_at",
    "updated_at",
    "external_id",
    "kind",
    "task_identifier",
    "expires_at",
    "closed_at",
    "closed_reason",
    "current_run_id",
    "tags",
    "metadata",
    "trigger_config",
];
/// How many of them may be stored out of line, and are then not told by the WAL unless they change: the last ones.
pub(super) const LARGE: usize = 3;
const SMALL: usize = COLUMNS.len() - LARGE;

/// A value as text; `None` is NULL.
pub(super) type Text = Option<String>;

/// A column that no row can be made of: a schema that this binary does not know.
#[derive(Debug, thiserror::Error)]
#[error("column {0} of sessions does not hold what it should")]
pub struct ConvertError(pub(super) &'static str);

/// One version of a session. The large columns may be missing.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Columns {
    pub(super) small: [Text; SMALL],
    pub(super) large: [Option<Text>; LARGE],
}

impl Columns {
    /// Bytes that it holds.
    pub(super) fn size(&self) -> usize {
        let length = |text: &Text| text.as_ref().map_or(0, String::len);
        let small: usize = self.small.iter().map(length).sum();
        let large: usize = self.large.iter().flatten().map(length).sum();
        // And about as much again for what holds them.
        small + large + size_of::<Self>()
    }

    /// Whether a large column is missing.
    pub(super) fn is_partial(&self) -> bool {
        self.large.iter().any(Option::is_none)
    }

    /// Takes the large columns that are missing from an older version of the same session.
    pub(super) fn complete_from(&mut self, older: &Self) {
        for (mine, theirs) in self.large.iter_mut().zip(&older.large) {
            if mine.is_none() {
                mine.clone_from(theirs);
            }
        }
    }

    pub(super) fn id(&self) -> &str {
        self.small[0].as_deref().unwrap_or_default()
    }

    pub(super) fn environment_id(&self) -> &str {
        self.small[1].as_deref().unwrap_or_default()
    }

    fn required(&self, at: usize) -> Result<&str, ConvertError> {
        self.small[at].as_deref().ok_or(ConvertError(COLUMNS[at]))
    }

    fn number(&self, at: usize) -> Result<Option<i64>, ConvertError> {
        self.small[at].as_deref().map(|text| text.parse().map_err(|_| ConvertError(COLUMNS[at]))).transpose()
    }

    pub(super) fn created_at(&self) -> Result<i64, ConvertError> {
        self.number(2)?.ok_or(ConvertError(COLUMNS[2]))
    }

    fn text(&self, at: usize) -> String {
        self.small[at].clone().unwrap_or_default()
    }
}

/// The row of a version that is whole.
pub(super) fn row(
    columns: &Columns,
    environment: &Environment,
    version: u64,
) -> Result<SessionRow, ConvertError> {
    let large = |at: usize| columns.large[at].as_ref().ok_or(ConvertError(COLUMNS[SMALL + at]));
    let tags = match large(0)? {
        Some(tags) => serde_json::from_str(tags).map_err(|_| ConvertError("tags"))?,
        None => Vec::new(),
    };
    let metadata = large(1)?.as_deref();
    let id = columns.required(0)?.to_owned();
    Ok(SessionRow {
        environment_id: columns.required(1)?.to_owned(),
        organization_id: environment.organization.clone(),
        project_id: environment.project.clone(),
        friendly_id: id.clone(),
        session_id: id,
        environment_type: environment.kind.clone(),
        external_id: columns.text(4),
        r#type: columns.required(5)?.to_owned(),
        task_identifier: columns.required(6)?.to_owned(),
        tags,
        metadata: format!(r#"{{"data":{}}}"#, metadata.unwrap_or("null")),
        closed_at: columns.number(8)?,
        closed_reason: columns.text(9),
        expires_at: columns.number(7)?,
        created_at: columns.created_at()?,
        updated_at: columns.number(3)?.ok_or(ConvertError("updated_at"))?,
        _version: version,
        _is_deleted: 0,
        metadata_text: metadata.unwrap_or_default().to_owned(),
        trigger_config: large(2)?.clone().unwrap_or_default(),
        current_run_id: columns.required(10)?.to_owned(),
    })
}

/// What hides every version of a session before `version`.
pub(super) fn tombstone(
    id: &str,
    environment_id: &str,
    created_at: i64,
    environment: &Environment,
    version: u64,
) -> SessionRow {
    SessionRow {
        environment_id: environment_id.to_owned(),
        organization_id: environment.organization.clone(),
        project_id: environment.project.clone(),
        session_id: id.to_owned(),
        environment_type: environment.kind.clone(),
        friendly_id: id.to_owned(),
        external_id: String::new(),
        r#type: String::new(),
        task_identifier: String::new(),
        tags: Vec::new(),
        metadata: "{}".to_owned(),
        closed_at: None,
        closed_reason: String::new(),
        expires_at: None,
        created_at,
        updated_at: created_at,
        _version: version,
        _is_deleted: 1,
        metadata_text: String::new(),
        trigger_config: String::new(),
        current_run_id: String::new(),
    }
}

/// Selects every column of [`COLUMNS`] as text.
pub(super) fn select() -> String {
    COLUMNS.map(|column| format!("{column}::text")).join(", ")
}
