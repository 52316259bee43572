//! Versions of sessions, column by column as Postgres writes them: the same from the stream as from a query.

use serde_json::value::RawValue;

use super::RowVersion;
use super::pgoutput::{Column, Tuple};
use crate::domain::tenant::Environment;
use crate::store::index::clickhouse::{SessionRow, SessionTexts};

/// The columns of `sessions` that a version is made of, in the order of its tuple.
pub const COLUMNS: &[&str] = &[
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

const ID: usize = 0;
const ENVIRONMENT_ID: usize = 1;
const CREATED_AT: usize = 2;
const UPDATED_AT: usize = 3;
const EXTERNAL_ID: usize = 4;
const KIND: usize = 5;
const TASK_IDENTIFIER: usize = 6;
const EXPIRES_AT: usize = 7;
const CLOSED_AT: usize = 8;
const CLOSED_REASON: usize = 9;
const CURRENT_RUN_ID: usize = 10;
const TAGS: usize = 11;
const METADATA: usize = 12;
const TRIGGER_CONFIG: usize = 13;

/// What a version holds beside its texts, roughly: the key twice, the place in a batch.
const OVERHEAD: usize = 512;

/// What names a session in ClickHouse, together with the organization and the project of its environment, which never
/// change. The replica identity of `sessions` in Postgres.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SortKey {
    /// `environment_id`.
    pub environment: String,
    /// Milliseconds since 1970.
    pub created_at: i64,
    /// `id`.
    pub session: String,
}

/// A column that does not hold what it should: the schema is not the one that this binary knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the column {0} of sessions does not hold what it should")]
pub struct RowError(pub &'static str);

/// A version of a session. Columns that are stored out of line may be missing, where the stream has not repeated them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    key: SortKey,
    columns: Tuple,
}

impl SortKey {
    /// The key in a tuple of [`COLUMNS`].
    ///
    /// # Errors
    /// [`RowError`] if one of its columns is missing.
    pub fn of(columns: &Tuple) -> Result<Self, RowError> {
        Ok(Self {
            environment: text(columns, ENVIRONMENT_ID)?.to_owned(),
            created_at: number(columns, CREATED_AT)?.ok_or(RowError(COLUMNS[CREATED_AT]))?,
            session: text(columns, ID)?.to_owned(),
        })
    }
}

impl Version {
    /// A version whose columns are a tuple of [`COLUMNS`].
    ///
    /// # Errors
    /// As [`SortKey::of`].
    pub fn new(columns: Tuple) -> Result<Self, RowError> {
        Ok(Self { key: SortKey::of(&columns)?, columns })
    }

    /// What it is a version of.
    pub fn key(&self) -> &SortKey {
        &self.key
    }

    /// Whether no column is missing.
    pub fn is_whole(&self) -> bool {
        !self.columns.contains(&Column::Unchanged)
    }

    /// Takes what is missing from a tuple of [`COLUMNS`] that was there before, or is there now.
    pub fn complete_from(&mut self, other: &Tuple) {
        for (mine, others) in self.columns.iter_mut().zip(other) {
            if *mine == Column::Unchanged {
                mine.clone_from(others);
            }
        }
    }

    /// The columns, as far as they are known.
    pub fn columns(&self) -> &Tuple {
        &self.columns
    }

    /// Bytes that it takes in memory, roughly.
    pub fn size(&self) -> usize {
        let texts = self.columns.iter().map(|column| match column {
            Column::Text(text) => text.len(),
            Column::Null | Column::Unchanged => 0,
        });
        texts.sum::<usize>() + OVERHEAD
    }

    /// The row of ClickHouse, filed under `environment`.
    ///
    /// # Errors
    /// [`RowError`] naming the column; a missing one too.
    pub fn row(&self, environment: &Environment, version: RowVersion) -> Result<SessionRow, RowError> {
        let columns = &self.columns;
        let tags = serde_json::from_str(text(columns, TAGS)?).map_err(|_| RowError(COLUMNS[TAGS]))?;
        let texts = SessionTexts {
            id: text(columns, ID)?,
            external_id: optional(columns, EXTERNAL_ID)?,
            kind: text(columns, KIND)?,
            task_identifier: text(columns, TASK_IDENTIFIER)?,
            tags,
            metadata: json(columns, METADATA)?,
            trigger_config: json(columns, TRIGGER_CONFIG)?,
            current_run_id: text(columns, CURRENT_RUN_ID)?,
            created_at: self.key.created_at,
            updated_at: number(columns, UPDATED_AT)?.ok_or(RowError(COLUMNS[UPDATED_AT]))?,
            expires_at: number(columns, EXPIRES_AT)?,
            closed_at: number(columns, CLOSED_AT)?,
            closed_reason: optional(columns, CLOSED_REASON)?,
        };
        Ok(SessionRow::of_texts(texts, environment, version.0))
    }
}

fn optional(columns: &Tuple, at: usize) -> Result<Option<&str>, RowError> {
    match columns.get(at) {
        Some(Column::Text(text)) => std::str::from_utf8(text).map(Some).map_err(|_| RowError(COLUMNS[at])),
        Some(Column::Null) => Ok(None),
        Some(Column::Unchanged) | None => Err(RowError(COLUMNS[at])),
    }
}

fn text(columns: &Tuple, at: usize) -> Result<&str, RowError> {
    optional(columns, at)?.ok_or(RowError(COLUMNS[at]))
}

fn number(columns: &Tuple, at: usize) -> Result<Option<i64>, RowError> {
    optional(columns, at)?.map(|text| text.parse().map_err(|_| RowError(COLUMNS[at]))).transpose()
}

fn json(columns: &Tuple, at: usize) -> Result<Option<&RawValue>, RowError> {
    let text = optional(columns, at)?;
    text.map(|text| serde_json::from_str(text).map_err(|_| RowError(COLUMNS[at]))).transpose()
}

#[cfg(test)]
pub(super) mod tests {
    use bytes::Bytes;
    use serde_json::{Value, json};

    use super::*;
    use crate::domain::tenant::EnvironmentKind;
    use crate::domain::{EnvironmentId, Timestamp};

    /// A tuple whose text columns hold their names, and what is said otherwise.
    pub(in crate::replication) fn tuple(changed: &[(&str, Column)]) -> Tuple {
        let value = |name: &&'static str| {
            if let Some((_, column)) = changed.iter().find(|(changed, _)| changed == name) {
                return column.clone();
            }
            known(match *name {
                "created_at" | "updated_at" => "42",
                "tags" => r#"["a", "b:c"]"#,
                "metadata" | "trigger_config" => r#"{"k": 1.0}"#,
                "expires_at" | "closed_at" => return Column::Null,
                name => name,
            })
        };
        COLUMNS.iter().map(value).collect()
    }

    pub(in crate::replication) fn known(text: &'static str) -> Column {
        Column::Text(Bytes::from_static(text.as_bytes()))
    }

    fn environment() -> Environment {
        Environment {
            id: EnvironmentId::from_stored("environment_id"),
            organization: "o".to_owned(),
            project: "p".to_owned(),
            slug: "e".to_owned(),
            kind: EnvironmentKind::Staging,
            created_at: Timestamp::from_millis(1),
        }
    }

    fn row(changed: &[(&str, Column)]) -> Result<SessionRow, RowError> {
        Version::new(tuple(changed)).and_then(|version| version.row(&environment(), RowVersion(7)))
    }

    #[test]
    fn every_column_finds_its_place() {
        let closed = [("closed_at", known("44")), ("expires_at", known("43")), ("updated_at", known("45"))];
        let row = row(&closed).expect("a row");
        assert_eq!(
            [&row.session_id, &row.friendly_id, &row.environment_id, &row.organization_id, &row.project_id],
            ["id", "id", "environment_id", "o", "p"]
        );
        assert_eq!(row.environment_type, "STAGING");
        assert_eq!(
            [&row.external_id, &row.r#type, &row.task_identifier],
            ["external_id", "kind", "task_identifier"]
        );
        assert_eq!(row.tags, ["a", "b:c"]);
        assert_eq!(
            (row.created_at, row.expires_at, row.closed_at, row.updated_at),
            (42, Some(43), Some(44), 45)
        );
        assert_eq!(row.closed_reason, "closed_reason");
        assert_eq!((row._version, row._is_deleted), (7, 0));
        assert_eq!(
            row.document,
            r#"{"metadata":{"k": 1.0},"triggerConfig":{"k": 1.0},"closedReason":"closed_reason","currentRunId":"current_run_id"}"#
        );
    }

    #[test]
    fn null_is_told_from_what_is_empty() {
        let nulls =
            ["external_id", "closed_reason", "metadata", "trigger_config"].map(|name| (name, Column::Null));
        let none = row(&nulls).expect("a row");
        assert_eq!((none.external_id.as_str(), none.closed_reason.as_str(), none.closed_at), ("", "", None));
        let document: Value = serde_json::from_str(&none.document).expect("JSON");
        let expected = json!({"metadata": null, "triggerConfig": null, "closedReason": null, "currentRunId": "current_run_id"});
        assert_eq!(document, expected);
        let empty = row(&[("closed_reason", known("")), ("closed_at", known("1"))]).expect("a row");
        let document: Value = serde_json::from_str(&empty.document).expect("JSON");
        assert_eq!(document["closedReason"], "");
    }

    #[test]
    fn a_column_that_holds_something_else_is_named() {
        for (name, value) in [
            ("created_at", known("soon")),
            ("updated_at", Column::Null),
            ("tags", known("no list")),
            ("tags", Column::Null),
            ("metadata", known("{")),
            ("expires_at", known("1.5")),
            ("kind", Column::Unchanged),
            ("id", Column::Text(Bytes::from_static(&[0xFF]))),
        ] {
            assert_eq!(row(&[(name, value.clone())]), Err(RowError(name)), "{value:?}");
        }
    }

    #[test]
    fn what_is_missing_comes_from_another_version() {
        let mut version = Version::new(tuple(&[("metadata", Column::Unchanged)])).expect("a version");
        assert!(!version.is_whole());
        version.complete_from(&tuple(&[("metadata", Column::Unchanged)]));
        assert!(!version.is_whole());
        version.complete_from(&tuple(&[("metadata", known("{}")), ("kind", known("another"))]));
        assert!(version.is_whole());
        assert_eq!(version.columns(), &tuple(&[("metadata", known("{}"))]));
    }
}
