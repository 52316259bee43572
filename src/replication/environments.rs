//! What an environment is called. It never changes, so it is asked for once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::postgres::Postgres;

/// The names of an environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Environment {
    pub(super) organization: String,
    pub(super) project: String,
    pub(super) kind: String,
}

/// Environments by id.
#[derive(Clone, Debug)]
pub(super) struct Environments {
    postgres: Postgres,
    known: Arc<Mutex<HashMap<String, Arc<Environment>>>>,
}

impl Environments {
    pub(super) fn new(postgres: Postgres) -> Self {
        Self { postgres, known: Arc::default() }
    }

    /// The environment with this id. One that is gone with all its sessions has no names, and no rows either.
    pub(super) async fn find(&self, id: &str) -> Result<Option<Arc<Environment>>, sqlx::Error> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(environment) = known().get(id).cloned() {
            return Ok(Some(environment));
        }
        let found: Option<(String, String, String)> =
            sqlx::query_as("SELECT organization, project, kind FROM environments WHERE id = $1")
                .bind(id)
                .fetch_optional(self.postgres.pool())
                .await?;
        let found =
            found.map(|(organization, project, kind)| Arc::new(Environment { organization, project, kind }));
        if let Some(environment) = &found {
            known().insert(id.to_owned(), environment.clone());
        }
        Ok(found)
    }
}
