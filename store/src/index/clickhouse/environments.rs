//! The names that an environment's rows are filed under.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sessiond_domain::EnvironmentId;
use sessiond_domain::error::Result;
use sessiond_domain::port::MetadataStore;
use sessiond_domain::tenant::Environment;

/// Environments by id. They never change, so what is known stays right.
pub struct Environments {
    store: Arc<dyn MetadataStore>,
    known: Mutex<HashMap<EnvironmentId, Arc<Environment>>>,
}

impl Environments {
    /// Those of `store`.
    pub fn new(store: Arc<dyn MetadataStore>) -> Self {
        Self { store, known: Mutex::default() }
    }

    /// The environment, if the metadata store has it, or it [is known](Environments::know) from elsewhere.
    ///
    /// # Errors
    /// [`Error::Unavailable`](sessiond_domain::Error::Unavailable).
    pub async fn find(&self, id: &EnvironmentId) -> Result<Option<Arc<Environment>>> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known().get(id).cloned() {
            return Ok(Some(found));
        }
        let all = self.store.environments().await?;
        let mut known = known();
        known.extend(all.into_iter().map(|one| (one.id.clone(), Arc::new(one))));
        Ok(known.get(id).cloned())
    }

    /// Remembers one that the metadata store does not have any more.
    pub fn know(&self, environment: Environment) -> Arc<Environment> {
        let environment = Arc::new(environment);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(environment.id.clone(), environment.clone());
        environment
    }
}
