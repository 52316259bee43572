//! The names that an environment's rows are filed under.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sessiond_domain::EnvironmentId;
use sessiond_domain::error::Result;
use sessiond_domain::port::MetadataStore;
use sessiond_domain::tenant::Environment;

/// Environments by id. They never change, so what is known stays right.
pub(super) struct Environments {
    store: Arc<dyn MetadataStore>,
    known: Mutex<HashMap<EnvironmentId, Arc<Environment>>>,
}

impl Environments {
    pub(super) fn new(store: Arc<dyn MetadataStore>) -> Self {
        Self { store, known: Mutex::default() }
    }

    /// The environment, if the metadata store has it.
    pub(super) async fn find(&self, id: &EnvironmentId) -> Result<Option<Arc<Environment>>> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known().get(id).cloned() {
            return Ok(Some(found));
        }
        let all = self.store.environments().await?;
        let mut known = known();
        known.extend(all.into_iter().map(|one| (one.id.clone(), Arc::new(one))));
        Ok(known.get(id).cloned())
    }
}
